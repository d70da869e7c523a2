"""How a trained model answers: what its logits are worth, and which order it recommends by.

Both are found on validation when training ends, and stored with the run; nothing of it is ever
fitted on the test set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from mtrec_jax import diversity
from mtrec_jax.config import Experiment, fusion_objective, utility_of
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.evaluation.collect import Collected, collect, ordering
from mtrec_jax.evaluation.metrics import Statistic, auc_statistic, utility_auc_statistic
from mtrec_jax.models import calibration
from mtrec_jax.models.calibration import Calibration
from mtrec_jax.models.serve import Serving
from mtrec_jax.types import FIRST, PyTree

FUSED, CHOSEN = "fused", "chosen"
UNCHOSEN = "the default; nothing was chosen on validation"
FOLDS = 5  # of the users, where a calibration is measured on the split that it is fitted on


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was found on validation for the parameters of one step."""

    step: int
    order: str = FUSED  # or a task, whose own order was worth more
    by: str = ""  # the measure of the declared utility that chose it; "": nothing did
    values: dict[str, float] = field(default_factory=dict)  # {order: its value}
    calibration: dict[str, Calibration] = field(default_factory=dict)  # {task: of its logits}


def find_answers(
    experiment: Experiment,
    prepared: Prepared,
    serving: Serving,
    params: PyTree,
    tables: dict[str, jax.Array],
    step: int,
) -> Answers:
    """Fit the calibrations on validation, and choose the order of the highest declared utility.

    The default order is thereby never worse *on validation* than any single task's: the fused one,
    unless a task's own order has a higher value@k, at the first of `evaluate.ks`; without retrieval
    a higher utility AUC. On other data it can be.
    """
    parts = experiment, prepared, serving
    found: dict[str, Calibration] = {}
    kinds = {task.kind for task in experiment.tasks.values()}
    if experiment.evaluate.calibration != "none" and kinds & {"binary", "multiclass"}:
        raw = collect(*parts, params, tables, "validation", orders=False)
        found = fit_calibrations(experiment, raw, np.ones(len(raw.user), bool))
    answers = Answers(step=step, calibration=found)
    if len(experiment.tasks) < 2 or not utility_of(experiment).terms:
        return answers
    params = serving.calibrated(params, found)
    collected = collect(*parts, params, tables, "validation", orders=True)
    by, values = order_values(experiment, prepared, collected)
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    best = max(known, key=lambda name: known[name], default=FUSED)  # of equal ones the first: fused
    return dataclasses.replace(answers, order=best, by=by if known else "", values=known)


def fit_calibrations(
    experiment: Experiment, collected: Collected, rows: np.ndarray
) -> dict[str, Calibration]:
    """{task: calibration} of binary and multiclass tasks, fitted on some rows [n] bool; a task that
    has not both labels there has none."""
    found = {}
    for name, task in experiment.tasks.items():
        labels, logits = collected.labels[name], collected.logits[name]
        known = rows & ~np.isnan(labels)
        made: Calibration | None = None
        if task.kind == "binary":
            how = experiment.evaluate.calibration
            made = calibration.fit_binary(how, logits[known], labels[known])
        elif task.kind == "multiclass":
            made = calibration.fit_classes(logits[known], labels[known].astype(np.int64))
        if made is not None:
            found[name] = made
    return found


def calibrated_logits(
    experiment: Experiment,
    collected: Collected,
    calibrations: Mapping[str, Calibration],
    cross_fitted: bool,
) -> dict[str, np.ndarray]:
    """Logits {task: [n, ...]} as they are calibrated.

    `cross_fitted`: these rows are the ones that the calibrations were fitted on. So that their
    metrics are not flattered, the rows of each of five groups of users are calibrated by what is
    fitted anew on the other four.
    """
    raw = {name: x.astype(np.float64) for name, x in collected.logits.items()}
    if not cross_fitted:
        return {name: calibration.apply(calibrations.get(name), x) for name, x in raw.items()}
    n = len(collected.user)
    fold = np.where(collected.user >= FIRST, collected.user, np.arange(n)) % FOLDS
    found = {name: x.copy() for name, x in raw.items()}
    for number in range(FOLDS):
        here = fold == number
        fitted = fit_calibrations(experiment, collected, ~here)
        for name in calibrations:
            found[name][here] = calibration.apply(fitted.get(name), raw[name][here])
    return found


def order_scores(
    experiment: Experiment, prepared: Prepared, collected: Collected
) -> dict[str, np.ndarray]:
    """{order: score [n] of every target}: the fused one, and each task's own."""
    scores = {FUSED: collected.fused}
    for name, order in ordering(experiment, prepared.manifest).items():
        scores[name] = order(collected.logits[name])
    return scores


def order_statistics(
    experiment: Experiment, prepared: Prepared, collected: Collected
) -> dict[str, dict[str, tuple[Statistic, np.ndarray]]]:
    """{order: {metric: (its statistic, the targets [m] that it is of)}}; differences of two orders
    may be resampled together.

    "ndcg@k": the retrieved candidates put in this order; "value@k": the same, each target counted
    by its worth under `model.fusion_objective`; "utility auc": how well the order separates targets
    of more worth from those of less; "auc TASK": the labels of a binary task of the objective.
    """
    objective = fusion_objective(experiment)
    labels = collected.labels
    seen = np.zeros(len(collected.user), bool)
    for task in objective:
        seen |= ~np.isnan(labels[task])
    worth = sum((w * np.nan_to_num(labels[n]) for n, w in objective.items()), np.zeros(len(seen)))
    rows, chosen = np.flatnonzero(seen), np.flatnonzero(collected.retrieved)
    scores = order_scores(experiment, prepared, collected)
    found: dict[str, dict[str, tuple[Statistic, np.ndarray]]] = {name: {} for name in scores}
    for name, of in collected.order_ranks.items() if len(chosen) else ():
        found.setdefault(name, {})
        ranks = of[chosen]
        for k in experiment.evaluate.ks:
            gain = np.where(ranks < k, 1 / np.log2(ranks + 2.0), 0)
            found[name][f"ndcg@{k}"] = _share(gain, np.ones(len(chosen))), chosen
            found[name][f"value@{k}"] = _share(gain, worth[chosen]), chosen
    for name, score in scores.items():  # a diversified order has no score of a target
        if objective:
            found[name]["utility auc"] = utility_auc_statistic(worth[rows], score[rows]), rows
        for task in objective:
            if experiment.tasks[task].kind == "binary":
                own = np.flatnonzero(~np.isnan(labels[task]))
                found[name][f"auc {task}"] = auc_statistic(labels[task][own], score[own]), own
    return found


def _share(gain: np.ndarray, worth: np.ndarray) -> Statistic:
    """What part of the worth an order wins; 0 where nothing is worth anything."""

    def value(weights: np.ndarray) -> float:
        total = float((weights * worth).sum())
        return float((weights * worth * gain).sum()) / total if total else 0.0

    return value


def order_values(
    experiment: Experiment, prepared: Prepared, collected: Collected
) -> tuple[str, dict[str, float]]:
    """The measure of the declared utility, and its value for each order, the fused one first."""
    found = order_statistics(experiment, prepared, collected)
    by = f"value@{experiment.evaluate.ks[0]}"
    if any(by not in metrics for metrics in found.values()):
        by = "utility auc"
    values = {}
    for name, metrics in found.items():
        statistic, rows = metrics[by]
        values[name] = statistic(np.ones(len(rows)))
    return (by, values) if any(values.values()) else ("", {})


def described(
    experiment: Experiment, answers: Answers, asked: str = CHOSEN, diversifier: Any = None
) -> str:
    """One line for people: the order, why it is the one, the declared utility, and what puts the
    lists together, if anything does."""
    order = answers.order if asked == CHOSEN else asked
    name = f"{FUSED} ({experiment.model.fusion.kind})" if order == FUSED else f"by {order}"
    if asked != CHOSEN:
        why = "as asked"
    elif not answers.by:
        why = UNCHOSEN
    else:
        others = {n: v for n, v in answers.values.items() if n != order}
        next_best = max(others, key=lambda n: others[n], default="")
        beside = f", {next_best} {others[next_best]:.4f}" if next_best else ""
        why = f"chosen on validation by {answers.by} {answers.values[order]:.4f}{beside}"
    utility = utility_of(experiment)
    parts = [f"order: {name}, {why}", *([f"utility: {utility}"] if utility.terms else [])]
    by = [] if diversifier is None else [f"diversified by {diversity.described(diversifier)}"]
    return "; ".join([*parts, *by])


def to_json(answers: Answers) -> dict[str, Any]:
    """Plain values."""
    plain = calibration.to_json(answers.calibration)
    return {
        "step": answers.step,
        "fitted on": "validation",
        "order": answers.order,
        "by": answers.by,
        "values": answers.values,
        "calibration": plain,
    }


def from_json(plain: Mapping[str, Any], dtype: str) -> Answers:
    """What `to_json` gave."""
    return Answers(
        step=plain["step"],
        order=plain["order"],
        by=plain["by"],
        values=plain["values"],
        calibration=calibration.from_json(plain["calibration"], dtype),
    )
