"""Baselines and existing predictions, measured on the model's own targets."""

from __future__ import annotations

import numpy as np

from mtrec_jax.baselines import bias, knn, popularity
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.examples import past_items
from mtrec_jax.evaluation.collect import Collected, seen_items
from mtrec_jax.evaluation.metrics import ranking_metrics, task_metrics
from mtrec_jax.evaluation.protocol import Scorer, target_ranks
from mtrec_jax.types import FIRST

Metrics = dict[str, float]


def compare(
    experiment: Experiment, prepared: Prepared, collected: Collected, split: str
) -> dict[str, Metrics]:
    """The configured baselines on the same targets, seen items excluded as for the model.

    Returns:
      {baseline: {"task/metric": value}}.
    """
    config, manifest = experiment.evaluate, prepared.manifest
    found: dict[str, Metrics] = {}
    train = prepared.interactions("train") if config.baselines else {}
    rows = np.flatnonzero(collected.retrieved)
    if config.baselines and len(rows):
        retrieval = next(n for n, t in experiment.tasks.items() if t.kind == "retrieval")
        positive = ~np.isnan(train[f"label_{retrieval}"])
        users = collected.user[rows]
        excluded = seen_items(prepared, split, users) if config.exclude_seen else None
        targets = (collected.candidate[rows] - FIRST).astype(np.int64)
        scorers: dict[str, Scorer] = {}
        if "popularity" in config.baselines:
            counts = popularity.fit(train["candidate"][positive], manifest.items)
            scorers["popularity"] = popularity.scorer(counts)
        if "item_knn" in config.baselines:
            liked = train["user"][positive], train["candidate"][positive]
            similar = knn.fit(*liked, manifest.users, manifest.items, config.neighbours)
            scorers["item_knn"] = knn.scorer(similar, past_items(prepared, split, rows))
        for name, scorer in scorers.items():
            ranks = target_ranks(scorer, targets, excluded, manifest.items)
            found[name] = _of_task(retrieval, ranking_metrics(ranks, config.ks))
    if "bias" in config.baselines:
        found["bias"] = _bias(experiment, prepared, collected, train)
    reference = _reference(experiment, prepared, split)
    if reference:
        found[experiment.data.reference] = reference
    return found


def _bias(
    experiment: Experiment, prepared: Prepared, collected: Collected, train: dict[str, np.ndarray]
) -> Metrics:
    """User + item biases for each binary and regression task, on the model's own examples."""
    found: Metrics = {}
    manifest = prepared.manifest
    for name, task in experiment.tasks.items():
        if task.kind not in ("binary", "regression"):
            continue
        limits = bias.PROBABILITY if task.kind == "binary" else None
        fitted = bias.fit(
            train["user"],
            train["candidate"],
            train[f"label_{name}"],
            manifest.users,
            manifest.items,
            limits,
        )
        observed = ~np.isnan(collected.labels[name])
        predicted = bias.predict(fitted, collected.user[observed], collected.candidate[observed])
        metrics = task_metrics(task.kind, collected.labels[name][observed], predicted)
        found |= _of_task(name, metrics)
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
