"""One split, one model, one protocol: every task's metrics, the orders, and the baselines."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import SPLITS, Manifest, Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.answers import (
    FOLDS,
    FUSED,
    Answers,
    calibrated_logits,
    described,
    order_statistics,
)
from mtrec_jax.evaluation.collect import Collected, collect, people, recommended_name
from mtrec_jax.evaluation.comparison import Metrics, compare
from mtrec_jax.evaluation.lists import Background, alarms, list_statistics, make_background
from mtrec_jax.evaluation.metrics import (
    Linear,
    Statistic,
    bootstrap_intervals,
    metric_named,
    ranking_statistics,
    reliability,
    task_statistics,
)
from mtrec_jax.evaluation.paired import user_sums
from mtrec_jax.evaluation.protocol import Protocol, protocol_from, protocol_of
from mtrec_jax.evaluation.segments import segments
from mtrec_jax.losses.tasks import class_numbers
from mtrec_jax.models.serve import Serving, predictions
from mtrec_jax.types import FIRST, PyTree

Measured = dict[str, tuple[dict[str, Statistic], np.ndarray]]  # {task: (by metric, targets)}
# {name: {value: {task: metrics and their "targets"}}}
Segments = dict[str, dict[str, dict[str, dict[str, float | int]]]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluation.json` holds, but for the count of looks at the test set."""

    split: str
    protocol: Protocol
    fingerprint: str
    tasks: dict[str, Metrics]
    judged: str = ""  # hex digits over the files of events and the split of each of their rows
    baselines: dict[str, Metrics] = field(default_factory=dict)  # {name: {"task/metric": value}}
    orders: dict[str, Metrics] = field(default_factory=dict)
    intervals: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)  # {task: examples behind its metrics}
    # {binary task: bins of its reliability diagram}, see `metrics.reliability`
    reliability: dict[str, list[dict[str, float | int]]] = field(default_factory=dict)
    segments: Segments = field(default_factory=dict)
    users: pa.Table | None = field(default=None, compare=False, repr=False)  # see `sums_by_user`
    order: str = ""  # the one that `recommend` takes, why, and the declared utility
    calibration: str = ""  # how the predictions are calibrated; "": they are not
    alarms: tuple[str, ...] = ()  # what is wrong with the recommended lists, see `lists.alarms`

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; undefined metrics are null. The users have a file of their own."""
        found = dataclasses.asdict(dataclasses.replace(self, users=None))
        del found["users"]
        return _without_nan(found | {"protocol": self.protocol.to_dict()})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], users: pa.Table | None = None) -> Evaluation:
        """What `to_dict` gave; other keys are left out."""
        known = {f.name for f in dataclasses.fields(cls)} - {"users"}
        found = {n: _with_nan(v) for n, v in values.items() if n in known}
        found["alarms"] = tuple(found.get("alarms", ()))
        found["intervals"] = {
            task: {metric: tuple(ends) for metric, ends in of.items()}
            for task, of in found["intervals"].items()
        }
        return cls(**found | {"protocol": protocol_from(values["protocol"]), "users": users})


def evaluate(
    experiment: Experiment,
    prepared: Prepared,
    serving: Serving,
    params: PyTree,
    tables: dict[str, jax.Array],
    split: str,
    full: bool = True,
    answers: Answers | None = None,
) -> Evaluation:
    """Evaluate parameters on a split.

    Args:
      experiment: tasks, ks, baselines.
      prepared: the data.
      serving: compiled passes of the model.
      params, tables: what is evaluated.
      split: "train", "validation" or "test".
      full: also the recommended lists and their alarms, the orders, the baselines, the bootstrap
        intervals, the segments and the sums of each user; training leaves them out.
      answers: calibrations and the chosen order of these parameters, found on validation. Where
        `evaluate.calibrate` is set, metrics are those of calibrated predictions, and on validation
        itself cross-fitted over users.

    Raises:
      ConfigError: there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"split {split!r}: it must be one of {', '.join(SPLITS)}")
    config = experiment.evaluate
    known = answers.calibration if answers else {}
    params = serving.calibrated(params, known)
    order = answers.order if answers else FUSED
    parts = experiment, prepared, serving, params, tables, split
    collected = collect(*parts, orders=full, recommended=order if full else "")
    background = _background(*parts) if collected.lists else None
    here = known if config.calibrate else {}
    logits = calibrated_logits(experiment, collected, here, bool(here) and split == "validation")
    values = predictions(experiment, prepared.manifest, logits)
    everything = np.arange(len(collected.user))
    manifest = prepared.manifest
    measured = _measured(experiment, manifest, collected, values, everything, background)
    result = Evaluation(
        split=split,
        protocol=protocol_of(experiment, manifest),
        fingerprint=manifest.fingerprint,
        judged=judged(manifest),
        tasks={task: _at_ones(*found) for task, found in measured.items()},
        targets={task: len(rows) for task, (_, rows) in measured.items()},
        calibration=_calibration(config.calibration, split) if here else "",
    )
    if not full:
        return result
    return dataclasses.replace(
        result,
        orders=_orders(experiment, prepared, collected, background),
        order=_order(experiment, answers),
        baselines=compare(experiment, prepared, collected, split, background),
        intervals=_intervals(measured, collected.user, config.bootstrap),
        reliability={
            name: reliability(collected.labels[name][rows], values[name][rows])
            for name, (_, rows) in measured.items()
            if experiment.tasks[name].kind == "binary"
        },
        segments=_segments(experiment, prepared, collected, values, split, background),
        users=sums_by_user(prepared, measured, collected.user, split),
        alarms=_alarms(experiment, collected, background, order),
    )


def _order(experiment: Experiment, answers: Answers | None) -> str:
    """The order that `recommend` takes, in words, where there are several."""
    diversifier = experiment.evaluate.diversify
    if answers is None or (len(experiment.tasks) < 2 and diversifier is None):
        return ""
    return described(experiment, answers, diversifier=diversifier)


def _background(
    experiment: Experiment,
    prepared: Prepared,
    serving: Serving,
    params: PyTree,
    tables: dict[str, jax.Array],
    split: str,
) -> Background:
    """What the lists of a split are judged against."""

    def vectors() -> np.ndarray:
        whole = serving.own(serving.item_vectors(params, tables))
        return np.asarray(serving.compared(whole))[FIRST:]

    return make_background(experiment, prepared, split, vectors)


def _alarms(
    experiment: Experiment, collected: Collected, background: Background | None, order: str
) -> tuple[str, ...]:
    """Alarms about the lists of the retrieval, and of the order that `recommend` takes."""
    rows, found = np.flatnonzero(collected.retrieved), list[str]()
    if background is None or not len(rows):
        return ()
    retrieval = next(n for n, t in experiment.tasks.items() if t.kind == "retrieval")
    recommended = recommended_name(order, experiment.evaluate.diversify)
    for name in dict.fromkeys([retrieval, recommended]):
        lists, users = collected.lists[name][rows], collected.user[rows]
        found += alarms(name, lists, users, background, experiment.evaluate.ks[0])
    return tuple(found)


def _calibration(kind: str, split: str) -> str:
    """How predictions were calibrated that were measured on a split."""
    if split == "validation":
        return f"{kind}, fitted on validation too: cross-fitted over {FOLDS} groups of users"
    return f"{kind}, fitted on validation"


def judged(manifest: Manifest) -> str:
    """Hex digits that are equal where two prepared folders judge by the same events, whatever their
    features: over the files of events, and which of their rows are in which split."""
    text = " ".join([*manifest.event_files, manifest.split.fingerprint])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _measured(
    experiment: Experiment,
    manifest: Manifest,
    collected: Collected,
    values: dict[str, np.ndarray],
    of: np.ndarray,
    background: Background | None = None,
) -> Measured:
    """The statistics of each task on some of the targets, and those of them that they are of."""
    found: Measured = {}
    who, ks = people(collected.user), experiment.evaluate.ks
    for name, task in experiment.tasks.items():
        if task.kind == "retrieval":
            rows = of[collected.retrieved[of]]
            statistics = ranking_statistics(collected.ranks[rows], ks)
            if background:
                lists, users = collected.lists[name][rows], collected.user[rows]
                statistics |= list_statistics(lists, users, background, ks)
        else:
            rows = of[~np.isnan(collected.labels[name][of])]
            labels, predicted = collected.labels[name][rows], values[name][rows]
            users = who[rows] if experiment.data.user else None
            numbers = class_numbers(manifest.tasks[name].classes)
            statistics = task_statistics(task.kind, labels, predicted, users, ks, numbers)
        found[name] = statistics, rows
    return found


def _at_ones(statistics: dict[str, Statistic], rows: np.ndarray) -> Metrics:
    ones = np.ones(len(rows))
    return {metric: value(ones) for metric, value in statistics.items()}


def _segments(
    experiment: Experiment,
    prepared: Prepared,
    collected: Collected,
    values: dict[str, np.ndarray],
    split: str,
    background: Background | None,
) -> Segments:
    """All metrics of each part of the split, and how many targets they are of."""
    parts = segments(experiment, prepared, split, collected.candidate, collected.user)
    found: Segments = {}
    for name, by_value in parts.items():
        found[name] = {}
        for value, places in by_value.items():
            parts_of = experiment, prepared.manifest, collected, values
            measured = _measured(*parts_of, places, background)
            found[name][value] = {
                task: {"targets": len(rows), **_at_ones(statistics, rows)}
                for task, (statistics, rows) in measured.items()
            }
    return found


def sums_by_user(prepared: Prepared, measured: Measured, user: np.ndarray, split: str) -> pa.Table:
    """One row a user of the split: what each adds to every metric, for paired tests.

    Args:
      prepared: the data.
      measured: statistics and targets of each task.
      user: id of each target [n], in file order.
      split: which split.

    Returns:
      "user", the raw id; for targets of nobody known "row N" of the source. For each task
      "TASK targets" and for each metric that has them "TASK/METRIC", see `paired.user_sums`: 0
      where a user has no target.
    """
    everybody, first = np.unique(people(user), return_index=True)
    known = np.flatnonzero(everybody >= FIRST)
    source = prepared.interactions(split)["row"][first].astype(str)
    names = np.char.add("row ", source).astype(object)
    if len(known):
        ids = np.array(prepared.user_names, object)
        names[known] = ids[everybody[known] - FIRST]
    columns: dict[str, Any] = {"user": pa.array(names, pa.string())}
    for task, (statistics, rows) in measured.items():
        whose = np.searchsorted(everybody, people(user)[rows])
        columns[f"{task} targets"] = np.bincount(whose, minlength=len(everybody))
        for metric, statistic in statistics.items():
            if isinstance(statistic, Linear):
                found, _, sums = user_sums(statistic, whose)
                columns[f"{task}/{metric}"] = np.zeros(len(everybody))
                columns[f"{task}/{metric}"][found] = sums
    return pa.table(columns)


def _orders(
    experiment: Experiment,
    prepared: Prepared,
    collected: Collected,
    background: Background | None = None,
) -> dict[str, Metrics]:
    """The fused order beside each task's own order and the diversified one, by the metrics of
    `order_statistics`, and how diverse the lists of each are."""
    if len(experiment.tasks) < 2 and experiment.evaluate.diversify is None:
        return {}
    found = {
        order: {metric: value(np.ones(len(rows))) for metric, (value, rows) in metrics.items()}
        for order, metrics in order_statistics(experiment, prepared, collected).items()
    }
    rows, ks = np.flatnonzero(collected.retrieved), experiment.evaluate.ks
    if background:
        for order, lists in collected.lists.items():
            of = list_statistics(lists[rows], collected.user[rows], background, ks)
            for name in (f"diversity@{k}" for k in ks):
                found[order][name] = of[name](np.ones(len(rows)))
    return found


def _intervals(
    measured: Measured, user: np.ndarray, resamples: int
) -> dict[str, dict[str, tuple[float, float]]]:
    """95 % bootstrap intervals over the users; a target of nobody known is on its own."""
    if not resamples:
        return {}
    who, found = people(user), {}
    for task, (statistics, rows) in measured.items():
        resampled = {n: of for n, of in statistics.items() if metric_named(n).resampled}
        found[task] = bootstrap_intervals(resampled, who[rows], resamples)
    return found


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_nan(v) for v in value]
    return float("nan") if value is None else value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and np.isnan(value) else value
