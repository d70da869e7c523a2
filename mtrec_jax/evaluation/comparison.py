"""Baselines and existing predictions, measured on the model's own targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from mtrec_jax.baselines import Interactions, Predicts, Ranks
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.collect import (
    ABSENT,
    Collected,
    candidates_of,
    left_out_items,
    met_items,
    people,
)
from mtrec_jax.evaluation.lists import Background, list_statistics
from mtrec_jax.evaluation.metrics import METRICS, auc, ranking_metrics, task_metrics
from mtrec_jax.evaluation.ranking import ranks_and_lists
from mtrec_jax.losses.tasks import KINDS, labelled
from mtrec_jax.types import FIRST

Metrics = dict[str, float]


def compare(
    experiment: Experiment,
    prepared: Prepared,
    collected: Collected,
    split: str,
    background: Background | None = None,
) -> dict[str, Metrics]:
    """The configured baselines on the same targets, seen items excluded as for the model.

    Args:
      experiment, prepared, split: what is measured.
      collected: the targets.
      background: what recommended lists are judged against; None: they are not.

    Returns:
      {baseline: {"task/metric": value}}.

    Raises:
      ConfigError: a baseline neither ranks nor predicts.
    """
    baselines = experiment.evaluate.baselines
    interactions = training_interactions(experiment, prepared) if baselines else None
    found: dict[str, Metrics] = {}
    for name, baseline in _named(baselines).items():
        fitted = baseline.fit(interactions)
        if not isinstance(fitted, Ranks | Predicts):
            raise ConfigError(
                f"evaluate.baselines: {type(baseline).__name__}.fit gave a "
                f"{type(fitted).__name__}, which has neither scorer(users, histories) nor "
                "predict(task, users, items)"
            )
        found[name] = {}
        if isinstance(fitted, Ranks):
            parts = experiment, prepared, collected, split
            found[name] |= _ranked(*parts, fitted, background)
        if isinstance(fitted, Predicts):
            found[name] |= _predicted(experiment, collected, fitted)
    reference = _reference(experiment, prepared, split)
    if reference:
        found[experiment.data.reference] = reference
    return {name: metrics for name, metrics in found.items() if metrics}


def training_interactions(experiment: Experiment, prepared: Prepared) -> Interactions:
    """The training split as baselines are fitted on it."""
    train, tasks = prepared.interactions("train"), experiment.tasks
    kinds: dict[str, str] = {
        n: KINDS[t.kind].judged for n, t in tasks.items() if t.kind in labelled("numbers", "levels")
    }
    retrieval = next((n for n, t in tasks.items() if t.kind == "retrieval"), None)
    none = np.zeros(len(train["user"]), bool)
    return Interactions(
        users=train["user"],
        items=train["candidate"],
        liked=none if retrieval is None else ~np.isnan(train[f"label_{retrieval}"]),
        labels={name: train[f"label_{name}"] for name in kinds},
        kinds=kinds,
        n_users=prepared.manifest.users,
        n_items=prepared.manifest.items,
        times=prepared.times("train"),
    )


def _named(baselines: Iterable[Any]) -> dict[str, Any]:
    """Baselines by their kind; of one kind with other options, by these as well."""
    different = list(dict.fromkeys(baselines))
    kinds = [baseline.kind for baseline in different]

    def name(baseline: Any) -> str:
        if kinds.count(baseline.kind) == 1:
            return str(baseline.kind)
        options = {f.name: getattr(baseline, f.name) for f in dataclasses.fields(baseline)}
        shown = ", ".join(f"{key}={value}" for key, value in options.items() if key != "kind")
        return f"{baseline.kind} ({shown})"

    return {name(baseline): baseline for baseline in different}


def _ranked(
    experiment: Experiment,
    prepared: Prepared,
    collected: Collected,
    split: str,
    fitted: Ranks,
    background: Background | None,
) -> Metrics:
    """Ranks of the retrieval targets among all items, and what the lists are like."""
    from mtrec_jax.data.examples import past_items  # answers do without the query engine

    rows = np.flatnonzero(collected.retrieved)
    if not len(rows):
        return {}
    retrieval = next(n for n, t in experiment.tasks.items() if t.kind == "retrieval")
    users = collected.user[rows]
    excluded = None
    if experiment.evaluate.exclude_seen:
        excluded = left_out_items(experiment, prepared, split, users)
    targets = (collected.candidate[rows] - FIRST).astype(np.int64)
    # asked with what they are fitted on: events that the retrieval is to find
    past = past_items(prepared, split, rows, met_items(prepared, prepared.wanted)[2])
    scorer = fitted.scorer(users, past)
    n, ks = prepared.manifest.items, experiment.evaluate.ks
    k = min(max(ks), n) if background else 0
    mask = candidates_of(experiment, prepared)
    ranks, lists = ranks_and_lists(scorer, targets, excluded, k, n, mask)
    if excluded is not None:
        is_seen = [target in excluded[i] for i, target in enumerate(targets)]
        ranks = np.where(is_seen, ABSENT, ranks)
    found = ranking_metrics(ranks, ks)
    if background:
        ones = np.ones(len(rows))
        statistics = list_statistics(lists, users, background, ks)
        found |= {name: value(ones) for name, value in statistics.items()}
    return _of_task(retrieval, found)


def _predicted(experiment: Experiment, collected: Collected, fitted: Predicts) -> Metrics:
    """Metrics of the tasks that it predicts, on the examples that have a label."""
    found: Metrics = {}
    for name, task in experiment.tasks.items():
        if task.kind not in METRICS:
            continue
        observed = ~np.isnan(collected.labels[name])
        users, items = collected.user[observed], collected.candidate[observed]
        values = fitted.predict(name, users, items)
        if values is not None:
            whose = people(collected.user)[observed] if experiment.data.user else None
            metrics = task_metrics(
                task.kind, collected.labels[name][observed], values, whose, experiment.evaluate.ks
            )
            found |= _of_task(name, metrics)
    return found


def _reference(experiment: Experiment, prepared: Prepared, split: str) -> Metrics:
    """Metrics of the predictions that came with the data, on the same rows; of scores that are no
    probabilities the AUC alone."""
    found: Metrics = {}
    with_reference = [n for n, t in experiment.tasks.items() if t.reference]
    rows = prepared.interactions(split) if with_reference else {}
    for name in with_reference:
        labels, values = rows[f"label_{name}"], rows[f"reference_{name}"]
        observed = ~np.isnan(labels) & ~np.isnan(values)
        labels, values = labels[observed], values[observed]
        kind = experiment.tasks[name].kind
        if kind == "binary" and ((values < 0) | (values > 1)).any():
            metrics = {"auc": auc(labels, values)}
        else:
            whose = people(rows["user"])[observed] if experiment.data.user else None
            metrics = task_metrics(kind, labels, values, whose, experiment.evaluate.ks)
        found |= _of_task(name, metrics)
    return found


def _of_task(task: str, metrics: Metrics) -> Metrics:
    return {f"{task}/{metric}": value for metric, value in metrics.items()}
