"""Metrics of one task's examples, and their bootstrap intervals.

A metric is a *statistic*: a function of row weights that has done the sorting and the logarithms
already, so that each bootstrap resample, a vector of counts, costs O(n). `METRICS` has a line for
each. Everything is computed in float64, and what is undefined (no rows, one class only, a
prediction that is not a number) is nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from mtrec_jax.errors import ConfigError, DataError

Statistic = Callable[[np.ndarray], float]  # row weights [n] (counts, for the bootstrap) -> value


class Metric(NamedTuple):
    """One line of `METRICS`."""

    statistic: Callable[[Any, Any], Statistic]  # of (labels, predictions)
    larger_is_better: bool = True
    resampled: bool = True  # has an interval; resampling moves absolute values of means upwards


def auc(
    labels: Shaped[np.ndarray, " n"],
    scores: Num[np.ndarray, " n"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Area under the ROC curve: P(score of a positive > of a negative), ties count one half.

    Exact, by the Mann-Whitney statistic with midranks (Hanley and McNeil, 1982).

    Args:
      labels: 0 or 1.
      scores: larger means more likely 1; only their order matters.
      weights: of the rows; None: all 1.

    Raises:
      DataError: a label is neither 0 nor 1, or lengths differ, also that of the weights.

    >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    statistic = auc_statistic(labels, scores)
    return statistic(np.ones(len(labels)) if weights is None else np.asarray(weights))


def auc_statistic(labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"]) -> Statistic:
    """`auc` as a function of row weights: scores are sorted once, here."""
    _check(labels, scores, binary=True)
    order = np.argsort(scores)
    ordered, positive = scores[order], labels[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # of runs of equal scores
    tied = len(starts) < len(ordered)
    undefined = not len(ordered) or bool(np.isnan(ordered[-1]))  # nan sorts last

    def value(weights: np.ndarray) -> float:
        weight = _a_row_each(weights, len(order))[order]
        if undefined:
            return float("nan")
        won = weight * positive
        lost = weight - won
        if tied:
            won, lost = np.add.reduceat(won, starts), np.add.reduceat(lost, starts)
        pairs = won.sum() * lost.sum()
        below = np.cumsum(lost) - lost / 2  # negatives that a positive of this score beats
        return float((won * below).sum() / pairs) if pairs > 0 else float("nan")

    return value


def mean_statistic(values: Num[np.ndarray, " n"]) -> Statistic:
    """The mean of per-example values; nan when the weights sum to 0."""

    def value(weights: np.ndarray) -> float:
        weights = _a_row_each(weights, len(values))
        total = float(weights.sum())
        return float((weights * values).sum()) / total if total > 0 else float("nan")

    return value


def calibration_statistic(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int = 15
) -> Statistic:
    """Expected calibration error: sum over bins of share x |mean prediction - mean label|.

    Naeini et al. (2015), "Obtaining well calibrated probabilities using Bayesian binning". Bins
    hold equally many rows (Nixon et al., 2019, "Measuring calibration in deep learning") rather
    than equal widths, because predictions of clicks crowd near zero. Equal predictions share a
    bin, so that the result depends neither on the order of the rows nor on how ties fall.

    >>> labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.25, 0.25, 0.75, 0.75])
    >>> calibration_statistic(labels, probabilities, bins=2)(np.ones(4))
    0.25
    """
    _check(labels, probabilities, binary=True)
    _check_probabilities(probabilities, "sigmoid")
    ordered = np.sort(probabilities)
    first = np.searchsorted(ordered, probabilities, "left")
    last = np.searchsorted(ordered, probabilities, "right") - 1
    bin_of = (first + last) * bins // max(2 * len(ordered), 1)  # by the middle of its ranks
    gap = probabilities.astype(np.float64) - labels

    def value(weights: np.ndarray) -> float:
        weights = _a_row_each(weights, len(gap))
        total = float(weights.sum())
        if total <= 0:
            return float("nan")
        # share x |mean gap| = |sum of gaps| / total: the size of a bin cancels
        return float(np.abs(np.bincount(bin_of, weights * gap, bins)).sum() / total)

    return value


def _log_loss(labels: np.ndarray, probabilities: np.ndarray) -> Statistic:
    """Mean of -log P(label) in nats, P kept a rounding unit of its type away from 0 and 1."""
    _check(labels, probabilities, binary=True)
    _check_probabilities(probabilities, "sigmoid")
    inside = _inside(probabilities)
    return mean_statistic(-np.where(labels.astype(bool), np.log(inside), np.log1p(-inside)))


def _class_log_loss(labels: np.ndarray, probabilities: np.ndarray) -> Statistic:
    _check_classes(labels, probabilities)
    of_label = probabilities[np.arange(len(labels)), labels.astype(np.int64)]
    return mean_statistic(-np.log(_inside(of_label)))


def _accuracy(labels: np.ndarray, probabilities: np.ndarray) -> Statistic:
    """Share of right classes: 1 from probability 0.5 on, or the most probable one."""
    if probabilities.ndim == 2:
        _check_classes(labels, probabilities)
        classes, sound = probabilities.argmax(axis=1), probabilities.sum(axis=1)
    else:
        _check(labels, probabilities, binary=True)
        _check_probabilities(probabilities, "sigmoid")
        classes, sound = probabilities >= 0.5, probabilities
    return mean_statistic(np.where(np.isnan(sound), np.nan, labels == classes))


def _rmse(labels: np.ndarray, predictions: np.ndarray) -> Statistic:
    _check(labels, predictions)
    squared = mean_statistic((predictions.astype(np.float64) - labels) ** 2)
    return lambda weights: float(np.sqrt(squared(weights)))


def _mae(labels: np.ndarray, predictions: np.ndarray) -> Statistic:
    _check(labels, predictions)
    return mean_statistic(np.abs(predictions.astype(np.float64) - labels))


# {kind of task: {name: metric}}; the first one chooses the best checkpoint unless told otherwise
METRICS: dict[str, dict[str, Metric]] = {
    "binary": {
        "auc": Metric(auc_statistic),
        "log_loss": Metric(_log_loss, larger_is_better=False),
        "calibration_error": Metric(calibration_statistic, False, resampled=False),
        "accuracy": Metric(_accuracy),
    },
    "regression": {
        "rmse": Metric(_rmse, larger_is_better=False),
        "mae": Metric(_mae, larger_is_better=False),
    },
    "multiclass": {
        "accuracy": Metric(_accuracy),
        "log_loss": Metric(_class_log_loss, larger_is_better=False),
    },
}
# {name: of each query, from the rank (0 = first) of its one relevant item}, 0 from rank k on
RANKING: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hr": np.ones_like,
    "ndcg": lambda rank: 1 / np.log2(rank + 2),  # the ideal order has DCG 1
    "mrr": lambda rank: 1 / (rank + 1),
    "recall": np.ones_like,  # hr, since there is one item to find; both names are in use
}


def metrics_of(kind: str, ks: Iterable[int]) -> list[str]:
    """Names of the metrics that evaluation reports for a kind of task."""
    return [f"{m}@{k}" for k in ks for m in RANKING] if kind == "retrieval" else [*METRICS[kind]]


def metric_named(name: str) -> Metric:
    """The line of a metric's name, of whatever kind of task; ranking metrics are larger-is-better.

    >>> metric_named("rmse").larger_is_better, metric_named("ndcg@10").larger_is_better
    (False, True)
    """
    plain = Metric(lambda labels, predictions: mean_statistic(predictions))
    return next((known[name] for known in METRICS.values() if name in known), plain)


def task_statistics(
    kind: str, labels: Shaped[np.ndarray, " n"], predictions: Float[np.ndarray, "n ..."]
) -> dict[str, Statistic]:
    """`task_metrics` as functions of row weights `[n]`; same arguments, same errors."""
    if kind not in METRICS:
        raise ConfigError(
            f"task_metrics: kind {kind!r} is not one of {', '.join(METRICS)}; retrieval is "
            "measured by ranking_metrics"
        )
    return {name: m.statistic(labels, predictions) for name, m in METRICS[kind].items()}


def task_metrics(
    kind: str, labels: Shaped[np.ndarray, " n"], predictions: Float[np.ndarray, "n ..."]
) -> dict[str, float]:
    """All metrics of a task, by the names in `METRICS`.

    Args:
      kind: "binary", "regression" or "multiclass".
      labels: one per example that has one: 0 or 1, a number, or a class number.
      predictions: probability of label 1 `[n]`, a number `[n]`, or class probabilities `[n, C]`.

    Raises:
      ConfigError: another kind.
      DataError: labels that do not fit the kind, lengths that differ, or logits in the place of
        probabilities.

    >>> task_metrics("regression", np.array([3.0, 5.0]), np.array([4.0, 4.0]))
    {'rmse': 1.0, 'mae': 1.0}
    """
    return _values(task_statistics(kind, labels, predictions), len(labels))


def ranking_statistics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, Statistic]:
    """`ranking_metrics` as functions of query weights `[Q]`."""
    if ranks.size and ranks.min() < 0:
        raise DataError(f"ranks start at 0, found {ranks.min()}; give unknown ranks a large number")
    rank = ranks.astype(np.float64)
    return {
        f"{name}@{k}": mean_statistic(np.where(rank < k, gain(rank), 0))
        for k in ks
        for name, gain in RANKING.items()
    }


def ranking_metrics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, float]:
    """Means over queries of hr, ndcg (Järvelin and Kekäläinen, 2002), mrr and recall at each k.

    Args:
      ranks: of the one relevant item, 0 = first; k or more where it was not found.

    Raises:
      DataError: a rank is negative.

    >>> ranking_metrics(np.array([0, 2, 9, 99]), [10])
    {'hr@10': 0.75, 'ndcg@10': 0.447..., 'mrr@10': 0.358..., 'recall@10': 0.75}
    """
    return _values(ranking_statistics(ranks, ks), len(ranks))


def bootstrap_interval(
    statistic: Statistic, users: Int[np.ndarray, " n"], resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a metric, resampling users with all of their examples.

    Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 13. The examples of a
    user resemble each other, and are no independent draws; users are. A resample is a vector of
    how often each example counts.

    Args:
      statistic: the metric as a function of row weights, from `task_statistics`,
        `ranking_statistics`, `auc_statistic` or `mean_statistic`; also a difference of two of
        them on the same rows, for a paired comparison.
      users: of the examples, any numbers; examples with a number of their own are independent.
      resamples: 0 gives (nan, nan).
      seed: the same seed draws the same resamples, so that models are compared on equal ones.

    Returns:
      (low, high); resamples in which the metric is undefined are left out.

    >>> bootstrap_interval(mean_statistic(np.full(20, 0.5)), np.arange(20), resamples=10)
    (0.5, 0.5)
    """
    generator = np.random.default_rng(seed)
    people, who = np.unique(users, return_inverse=True)
    n = len(people)
    values = np.empty(resamples if n else 0)
    for i in range(len(values)):
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        values[i] = statistic(counts[who].astype(np.float64))
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _values(statistics: dict[str, Statistic], n: int) -> dict[str, float]:
    ones = np.ones(n)
    return {name: statistic(ones) for name, statistic in statistics.items()}


def _inside(probabilities: np.ndarray) -> Float[np.ndarray, " n"]:
    unit = float(np.finfo(probabilities.dtype).eps)
    return np.clip(probabilities.astype(np.float64), unit, 1 - unit)


def _check(labels: np.ndarray, predictions: np.ndarray, binary: bool = False) -> None:
    if labels.shape != predictions.shape:
        raise DataError(
            f"labels {labels.shape} and predictions {predictions.shape}; pass one of each per "
            "example"
        )
    other = (labels != 0) & (labels != 1)
    if binary and other.any():
        raise DataError(
            f"label {labels[other][0]} is neither 0 nor 1; pass the labelled examples only, and "
            "declare the task with at_least or equals if its column has other values"
        )


def _check_probabilities(probabilities: np.ndarray, function: str) -> None:
    outside = (probabilities < 0) | (probabilities > 1)
    if outside.any():
        raise DataError(
            f"prediction {probabilities[outside][0]} is no probability between 0 and 1; of logits "
            f"pass {function}(logits)"
        )


def _a_row_each(weights: np.ndarray, rows: int) -> Float[np.ndarray, " n"]:
    if weights.shape != (rows,):
        raise DataError(
            f"weights {weights.shape} and {rows} rows; pass one weight per row, or None for all 1"
        )
    return weights.astype(np.float64, copy=False)


def _check_classes(labels: np.ndarray, probabilities: np.ndarray) -> None:
    if len(labels) != len(probabilities) or probabilities.ndim != 2:
        raise DataError(
            f"multiclass: labels {labels.shape} and predictions {probabilities.shape}; pass [n] "
            "class numbers and [n, C] probabilities"
        )
    classes = probabilities.shape[1]
    known = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))
    if not known.all():
        raise DataError(
            f"multiclass: label {labels[~known][0]} is not a class number 0 .. {classes - 1}; pass "
            "the labelled examples only"
        )
    _check_probabilities(probabilities, "softmax")
