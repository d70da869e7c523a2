"""Baselines and existing predictions, measured on the model's own targets."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mtrec_jax.baselines import Baseline, Interactions, Predicts, Ranks
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.examples import past_items
from mtrec_jax.evaluation.collect import Collected, seen_items
from mtrec_jax.evaluation.metrics import ranking_metrics, task_metrics
from mtrec_jax.evaluation.ranking import target_ranks
from mtrec_jax.types import FIRST

Metrics = dict[str, float]


def compare(
    experiment: Experiment, prepared: Prepared, collected: Collected, split: str
) -> dict[str, Metrics]:
    """The configured baselines on the same targets, seen items excluded as for the model.

    Returns:
      {baseline: {"task/metric": value}}.
    """
    found: dict[str, Metrics] = {}
    if experiment.evaluate.baselines:
        train = training_interactions(prepared)
        for name, baseline in named(experiment.evaluate.baselines).items():
            found[name] = _measured(baseline.fit(train), experiment, prepared, collected, split)
    reference = _reference(experiment, prepared, split)
    if reference:
        found[experiment.data.reference] = reference
    return {name: metrics for name, metrics in found.items() if metrics}


def training_interactions(prepared: Prepared) -> Interactions:
    """What baselines are fitted on: the targets of the training split."""
    manifest, train = prepared.manifest, prepared.interactions("train")
    kinds = {name: manifest.config["tasks"][name]["kind"] for name in manifest.tasks}
    retrieval = next((name for name, kind in kinds.items() if kind == "retrieval"), None)
    return Interactions(
        users=train["user"],
        items=train["candidate"],
        n_users=manifest.users,
        n_items=manifest.items,
        positive=None if retrieval is None else ~np.isnan(train[f"label_{retrieval}"]),
        labels={name: train[f"label_{name}"] for name in kinds},
        kinds={name: kind for name, kind in kinds.items() if kind in ("binary", "regression")},
    )


def named(baselines: Iterable[Baseline]) -> dict[str, Baseline]:
    """Baselines by their kinds; of several of one kind, with the options that tell them apart.

    >>> from mtrec_jax.baselines.knn import ItemKnn
    >>> list(named([ItemKnn(neighbours=10), ItemKnn(neighbours=50)]))
    ['item_knn (neighbours 10)', 'item_knn (neighbours 50)']
    """
    baselines = list(dict.fromkeys(baselines))
    often = Counter(baseline.kind for baseline in baselines)
    found: dict[str, Baseline] = {}
    for baseline in baselines:
        options = [
            f"{field.name} {getattr(baseline, field.name)}"
            for field in dataclasses.fields(baseline)  # type: ignore[arg-type]
            if field.name != "kind"
        ]
        kind = baseline.kind
        found[f"{kind} ({', '.join(options)})" if often[kind] > 1 else kind] = baseline
    return found


def _measured(
    fitted: Ranks | Predicts,
    experiment: Experiment,
    prepared: Prepared,
    collected: Collected,
    split: str,
) -> Metrics:
    """What a fitted baseline can do, on the model's own examples."""
    found: Metrics = {}
    rows = np.flatnonzero(collected.retrieved)
    if isinstance(fitted, Ranks) and len(rows):
        retrieval = next(n for n, t in experiment.tasks.items() if t.kind == "retrieval")
        users = collected.user[rows]
        seen = seen_items(prepared, split, users) if experiment.evaluate.exclude_seen else None
        targets = (collected.candidate[rows] - FIRST).astype(np.int64)
        scorer = fitted.scorer(users, past_items(prepared, split, rows))
        ranks = target_ranks(scorer, targets, seen, prepared.manifest.items)
        found |= _of_task(retrieval, ranking_metrics(ranks, experiment.evaluate.ks))
    if isinstance(fitted, Predicts):
        for name, values in fitted.predict(collected.user, collected.candidate).items():
            observed = ~np.isnan(collected.labels[name])
            kind, labels = experiment.tasks[name].kind, collected.labels[name][observed]
            found |= _of_task(name, task_metrics(kind, labels, values[observed]))
    return found


def _reference(experiment: Experiment, prepared: Prepared, split: str) -> Metrics:
    """Metrics of the predictions that came with the data, on the same rows."""
    found: Metrics = {}
    with_reference = [n for n, t in experiment.tasks.items() if t.reference]
    rows = prepared.interactions(split) if with_reference else {}
    for name in with_reference:
        labels, values = rows[f"label_{name}"], rows[f"reference_{name}"]
        observed = ~np.isnan(labels) & ~np.isnan(values)
        metrics = task_metrics(experiment.tasks[name].kind, labels[observed], values[observed])
        found |= _of_task(name, metrics)
    return found


def _of_task(task: str, metrics: Metrics) -> Metrics:
    return {f"{task}/{metric}": value for metric, value in metrics.items()}
