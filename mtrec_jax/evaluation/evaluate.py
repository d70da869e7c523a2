"""One split, one model, one protocol: every task's metrics, the orders, and the baselines."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mtrec_jax.config import Experiment, fusion_objective
from mtrec_jax.data.dataset import SPLITS, Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.collect import Collected, collect, order_score, ordering
from mtrec_jax.evaluation.comparison import Metrics, compare
from mtrec_jax.evaluation.metrics import (
    Statistic,
    auc,
    bootstrap_interval,
    metric_named,
    ranking_statistics,
    task_statistics,
)
from mtrec_jax.evaluation.protocol import Protocol, protocol_of
from mtrec_jax.models.serve import Serving, predictions
from mtrec_jax.types import FIRST, PyTree

Measured = dict[str, tuple[dict[str, Statistic], np.ndarray]]  # {task: (by metric, targets)}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluation.json` holds, but for the count of looks at the test set."""

    split: str
    protocol: Protocol
    fingerprint: str
    tasks: dict[str, Metrics]
    baselines: dict[str, Metrics] = field(default_factory=dict)  # {name: {"task/metric": value}}
    orders: dict[str, Metrics] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)  # {task: examples behind its metrics}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined metrics are null."""
        found = dataclasses.asdict(self) | {"protocol": self.protocol.to_dict()}
        return _without_nan(found)


def evaluate(
    experiment: Experiment,
    prepared: Prepared,
    serving: Serving,
    params: PyTree,
    tables: dict[str, jax.Array],
    split: str,
    full: bool = True,
) -> Evaluation:
    """Evaluate parameters on a split.

    Args:
      experiment: tasks, ks, baselines.
      prepared: the data.
      serving: compiled passes of the model.
      params, tables: what is evaluated.
      split: "train", "validation" or "test".
      full: also the orders, the baselines and the bootstrap intervals; training leaves them out.

    Raises:
      ConfigError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: it must be one of {', '.join(SPLITS)}")
    config = experiment.evaluate
    collected = collect(experiment, prepared, serving, params, tables, split, orders=full)
    measured = _measured(experiment, prepared, collected)
    result = Evaluation(
        split=split,
        protocol=protocol_of(experiment, prepared.manifest),
        fingerprint=prepared.manifest.fingerprint,
        tasks={
            task: {metric: value(np.ones(len(rows))) for metric, value in statistics.items()}
            for task, (statistics, rows) in measured.items()
        },
        targets={task: len(rows) for task, (_, rows) in measured.items()},
    )
    if not full:
        return result
    return dataclasses.replace(
        result,
        orders=_orders(experiment, prepared, collected),
        baselines=compare(experiment, prepared, collected, split),
        intervals=_intervals(measured, collected.user, config.bootstrap),
    )


def _measured(experiment: Experiment, prepared: Prepared, collected: Collected) -> Measured:
    """The statistics of each task, and the targets that they are of."""
    found: Measured = {}
    exact = {n: x.astype(np.float64) for n, x in collected.logits.items()}
    values = predictions(experiment, prepared.manifest, exact)
    for name, task in experiment.tasks.items():
        if task.kind == "retrieval":
            rows = np.flatnonzero(collected.retrieved)
            statistics = ranking_statistics(collected.ranks[rows], experiment.evaluate.ks)
        else:
            rows = np.flatnonzero(~np.isnan(collected.labels[name]))
            labels, predicted = collected.labels[name][rows], values[name][rows]
            statistics = task_statistics(task.kind, labels, predicted)
        found[name] = statistics, rows
    return found


def _orders(experiment: Experiment, prepared: Prepared, collected: Collected) -> dict[str, Metrics]:
    """The fused order beside each task's own order.

    "ndcg@k": the retrieved candidates put in this order; "value@k": the same, each target counted
    by its worth under the fusion objective; "auc TASK": how well the order separates the observed
    labels of a binary task of the objective. A multiclass task whose classes are not all numbers
    has no order.
    """
    objective = fusion_objective(experiment)
    binary = [n for n in objective if experiment.tasks[n].kind == "binary"]
    scores = {"fused": collected.fused}
    for name, classes in ordering(experiment, prepared.manifest).items():
        scores[name] = order_score(collected.logits[name], classes)
    found: dict[str, Metrics] = {name: {} for name in scores}
    chosen = collected.retrieved
    if collected.order_ranks and chosen.any():
        ranks = {name: places[chosen] for name, places in collected.order_ranks.items()}
        worth = sum(w * np.nan_to_num(collected.labels[n][chosen]) for n, w in objective.items())
        for name in found:
            for k in experiment.evaluate.ks:
                gain = np.where(ranks[name] < k, 1 / np.log2(ranks[name] + 2.0), 0)
                found[name][f"ndcg@{k}"] = float(gain.mean())
                total = float(np.sum(worth))
                found[name][f"value@{k}"] = float((gain * worth).sum()) / total if total else 0.0
    for task in binary:
        observed = ~np.isnan(collected.labels[task])
        for name, score in scores.items():
            found[name][f"auc {task}"] = auc(collected.labels[task][observed], score[observed])
    return found if len(experiment.tasks) > 1 else {}


def _intervals(
    measured: Measured, user: np.ndarray, resamples: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % bootstrap intervals over the users; a target of nobody known is on its own."""
    if not resamples:
        return {}
    who = np.where(user >= FIRST, user.astype(np.int64), -1 - np.arange(len(user)))
    return {
        task: {
            metric: bootstrap_interval(statistic, who[rows], resamples)
            for metric, statistic in statistics.items()
            if metric_named(metric).resampled
        }
        for task, (statistics, rows) in measured.items()
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and np.isnan(value) else value
