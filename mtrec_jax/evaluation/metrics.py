"""Metrics of one task's examples, and their bootstrap intervals.

A metric is made from labels and predictions as a *statistic*: a function of row weights alone. The
sorting and the logarithms are done once; each bootstrap resample is then a vector of counts and
costs O(n). Everything is computed in float64, and what is undefined (no rows, one class only, a
prediction that is not a number) is nan. `METRICS` names all that there are, a line each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from mtrec_jax.errors import ConfigError, DataError

Statistic = Callable[[np.ndarray], float]  # row weights [n] (counts, for the bootstrap) -> value


class Metric(NamedTuple):
    """How a metric is made, and read."""

    statistic: Callable[..., Statistic]  # of labels and predictions; of retrieval: of ranks and k
    lower_is_better: bool = False
    interval: bool = True  # False: resampling adds noise to an absolute value, and so shifts it


def auc(labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"]) -> float:
    """Area under the ROC curve: P(score of a positive > of a negative), ties count one half.

    Exact, by the Mann-Whitney statistic with midranks (Hanley and McNeil, 1982).

    Args:
      labels: 0 or 1.
      scores: larger means more likely 1; only their order matters.

    Raises:
      DataError: a label is neither 0 nor 1, or lengths differ.

    >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    return auc_statistic(labels, scores)(np.ones(len(labels)))


def auc_statistic(labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"]) -> Statistic:
    """`auc` as a function of row weights: scores are sorted once, here."""
    _check_lengths("auc", labels, scores)
    _check_binary("auc", labels)
    order = np.argsort(scores)
    ordered, positive = scores[order], labels[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # of runs of equal scores
    tied = len(starts) < len(ordered)
    undefined = not len(ordered) or bool(np.isnan(ordered[-1]))  # nan sorts last

    def value(weights: np.ndarray) -> float:
        if undefined:
            return float("nan")
        weight = np.asarray(weights, np.float64)[order]
        won = weight * positive
        lost = weight - won
        if tied:
            won, lost = np.add.reduceat(won, starts), np.add.reduceat(lost, starts)
        pairs = won.sum() * lost.sum()
        below = np.cumsum(lost) - lost / 2  # negatives that a positive of this score beats
        return float((won * below).sum() / pairs) if pairs > 0 else float("nan")

    return value


def log_loss(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n ..."]
) -> Statistic:
    """Mean of -log P(label), in nats, of label 1 `[n]` or of C classes `[n, C]`.

    Probabilities are kept one rounding unit of their dtype away from 0 and 1, as in scikit-learn.
    """
    unit = float(np.finfo(probabilities.dtype).eps)
    inside = np.clip(probabilities.astype(np.float64), unit, 1 - unit)
    if probabilities.ndim == 2:
        _check_classes(labels, probabilities)
        return mean_statistic(-np.log(inside[np.arange(len(labels)), labels.astype(np.int64)]))
    _check_lengths("log_loss", labels, probabilities)
    _check_binary("log_loss", labels)
    return mean_statistic(-np.where(labels.astype(bool), np.log(inside), np.log1p(-inside)))


def accuracy(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, "n ..."]
) -> Statistic:
    """Part of the examples whose most probable class is the label; of two, 1 from 0.5 on."""
    if probabilities.ndim == 2:
        _check_classes(labels, probabilities)
        classes, sound = probabilities.argmax(axis=1), probabilities.sum(axis=1)
    else:
        _check_lengths("accuracy", labels, probabilities)
        classes, sound = probabilities >= 0.5, probabilities
    hits = (labels == classes).astype(np.float64)
    return mean_statistic(np.where(np.isnan(sound), np.nan, hits))


def calibration_error(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int = 15
) -> Statistic:
    """Expected calibration error: sum over bins of share x |mean prediction - mean label|.

    Naeini et al. (2015), "Obtaining well calibrated probabilities using Bayesian binning", with
    bins of equally many rows (Nixon et al., 2019, "Measuring calibration in deep learning") rather
    than equal widths, because predictions of clicks and conversions crowd near zero. Equal
    predictions share a bin, so that neither the order of the rows nor how ties fall matters.

    >>> labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.25, 0.25, 0.75, 0.75])
    >>> calibration_error(labels, probabilities, bins=2)(np.ones(4))
    0.25
    """
    _check_lengths("calibration_error", labels, probabilities)
    ordered = np.sort(probabilities)
    first = np.searchsorted(ordered, probabilities, "left")
    last = np.searchsorted(ordered, probabilities, "right") - 1
    # the bin of each row by the middle of the ranks that its prediction occupies
    bin_of = (first + last) * bins // (2 * max(len(ordered), 1))
    gap = np.asarray(probabilities, np.float64) - np.asarray(labels, np.float64)

    def value(weights: np.ndarray) -> float:
        total = float(weights.sum())
        if total <= 0:
            return float("nan")
        # share x |mean gap| = |sum of gaps| / total: the size of a bin cancels
        return float(np.abs(np.bincount(bin_of, weights * gap, bins)).sum() / total)

    return value


def rmse(labels: Num[np.ndarray, " n"], predictions: Num[np.ndarray, " n"]) -> Statistic:
    """Root mean squared error, in the unit of the label."""
    squared = mean_statistic(_errors("rmse", labels, predictions) ** 2)
    return lambda weights: float(np.sqrt(squared(weights)))


def mae(labels: Num[np.ndarray, " n"], predictions: Num[np.ndarray, " n"]) -> Statistic:
    """Mean absolute error, in the unit of the label."""
    return mean_statistic(np.abs(_errors("mae", labels, predictions)))


def hit_rate(ranks: Int[np.ndarray, " Q"], k: int) -> Statistic:
    """Part of the queries whose one relevant item is among the first k; recall@k is the same."""
    return mean_statistic(_hits(ranks, k))


def ndcg(ranks: Int[np.ndarray, " Q"], k: int) -> Statistic:
    """Mean of 1 / log2(rank + 2) below rank k, else 0 (Järvelin and Kekäläinen, 2002; with one
    relevant item the ideal order has DCG 1)."""
    return mean_statistic(_hits(ranks, k) / np.log2(ranks + 2.0))


def mrr(ranks: Int[np.ndarray, " Q"], k: int) -> Statistic:
    """Mean of 1 / (rank + 1) below rank k, else 0."""
    return mean_statistic(_hits(ranks, k) / (ranks + 1.0))


METRICS: dict[str, dict[str, Metric]] = {  # {kind of task: {name: metric}}; of retrieval, each @k
    "retrieval": {
        "hr": Metric(hit_rate),
        "ndcg": Metric(ndcg),
        "mrr": Metric(mrr),
        "recall": Metric(hit_rate),
    },
    "binary": {
        "auc": Metric(auc_statistic),
        "log_loss": Metric(log_loss, lower_is_better=True),
        "calibration_error": Metric(calibration_error, lower_is_better=True, interval=False),
        "accuracy": Metric(accuracy),
    },
    "regression": {
        "rmse": Metric(rmse, lower_is_better=True),
        "mae": Metric(mae, lower_is_better=True),
    },
    "multiclass": {
        "accuracy": Metric(accuracy),
        "log_loss": Metric(log_loss, lower_is_better=True),
    },
}


def metric_of(name: str) -> Metric | None:
    """The metric of a name such as "ndcg@10" or "auc"; None for a name that there is not.

    >>> metric_of("rmse").lower_is_better, metric_of("ndcg@10").lower_is_better
    (True, False)
    """
    plain = name.partition("@")[0]
    return next((metrics[plain] for metrics in METRICS.values() if plain in metrics), None)


def ranking_statistics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, Statistic]:
    """`ranking_metrics` as functions of query weights `[Q]`."""
    return {
        f"{name}@{k}": metric.statistic(ranks, k)
        for k in ks
        for name, metric in METRICS["retrieval"].items()
    }


def ranking_metrics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, float]:
    """The metrics of retrieval at each k, when one item a query is relevant.

    recall@k equals hr@k here, since there is one item to find; both names are in use.

    Args:
      ranks: of the relevant item, 0 = first; k or more where it was not found.

    Raises:
      DataError: a rank is negative.

    >>> ranking_metrics(np.array([0, 2, 9, 99]), [10])
    {'hr@10': 0.75, 'ndcg@10': 0.447..., 'mrr@10': 0.358..., 'recall@10': 0.75}
    """
    return _values(ranking_statistics(ranks, ks), len(ranks))


def task_statistics(
    kind: str, labels: Shaped[np.ndarray, " n"], predictions: Float[np.ndarray, "n ..."]
) -> dict[str, Statistic]:
    """`task_metrics` as functions of row weights `[n]`; same arguments, same errors."""
    if kind not in METRICS or kind == "retrieval":
        kinds = ", ".join(repr(known) for known in METRICS if known != "retrieval")
        raise ConfigError(
            f"task_metrics: kind {kind!r} is not one of {kinds}; retrieval is measured by "
            "ranking_metrics"
        )
    return {name: metric.statistic(labels, predictions) for name, metric in METRICS[kind].items()}


def task_metrics(
    kind: str, labels: Shaped[np.ndarray, " n"], predictions: Float[np.ndarray, "n ..."]
) -> dict[str, float]:
    """All metrics of a task, by their names in `METRICS`.

    Args:
      kind: "binary", "regression" or "multiclass".
      labels: one per example that has one: 0 or 1, a number, or a class number.
      predictions: probability of label 1 `[n]`, a number `[n]`, or class probabilities `[n, C]`.

    Raises:
      ConfigError: another kind.
      DataError: labels that do not fit the kind, or lengths that differ.

    >>> task_metrics("regression", np.array([3.0, 5.0]), np.array([4.0, 4.0]))
    {'rmse': 1.0, 'mae': 1.0}
    """
    return _values(task_statistics(kind, labels, predictions), len(labels))


def bootstrap_interval(
    statistic: Statistic,
    n: int,
    resamples: int = 200,
    seed: int = 0,
    groups: Int[np.ndarray, " n"] | None = None,
) -> tuple[float, float]:
    """95 % percentile interval of a metric over n examples.

    Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 13. Drawing n of n
    rows with replacement is drawing how often each row counts, so a resample is a weight vector.
    Rows of one group (a user's) are not independent: groups are drawn, each with all of its rows.

    Args:
      statistic: the metric as a function of row weights.
      n: examples.
      resamples: 0 gives (nan, nan).
      seed: the same seed draws the same resamples, so that models are compared on equal ones.
      groups: of each row; negative: the row is a group by itself. None: all rows are.

    Returns:
      (low, high); resamples in which the metric is undefined are left out.

    >>> bootstrap_interval(mean_statistic(np.full(20, 0.5)), 20, resamples=10)
    (0.5, 0.5)
    """
    group_of = np.arange(n)
    if groups is not None:
        own = np.where(groups < 0, groups.max(initial=0) + 1 + np.arange(n), groups)
        group_of = np.unique(own, return_inverse=True)[1]
    size = int(group_of.max(initial=-1)) + 1
    generator = np.random.default_rng(seed)
    values = np.empty(resamples if n else 0)
    for i in range(len(values)):
        counts = np.bincount(generator.integers(0, size, size), minlength=size)
        values[i] = statistic(counts[group_of].astype(np.float64))
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def mean_statistic(values: Num[np.ndarray, " n"]) -> Statistic:
    """The mean of per-example values as a function of row weights; nan when they sum to 0."""

    def value(weights: np.ndarray) -> float:
        total = float(weights.sum())
        return float((weights * values).sum()) / total if total > 0 else float("nan")

    return value


def _values(statistics: dict[str, Statistic], n: int) -> dict[str, float]:
    return {name: value(np.ones(n)) for name, value in statistics.items()}


def _hits(ranks: Int[np.ndarray, " Q"], k: int) -> Float[np.ndarray, " Q"]:
    if ranks.size and ranks.min() < 0:
        raise DataError(f"ranks start at 0, found {ranks.min()}; give unknown ranks a large number")
    return (ranks < k).astype(np.float64)


def _errors(metric: str, labels: np.ndarray, predictions: np.ndarray) -> Float[np.ndarray, " n"]:
    _check_lengths(metric, labels, predictions)
    return predictions.astype(np.float64) - labels.astype(np.float64)


def _check_classes(labels: np.ndarray, probabilities: np.ndarray) -> None:
    """`labels` may be class numbers in a float array."""
    classes = probabilities.shape[1]
    known = (labels >= 0) & (labels < classes) & (labels == np.floor(labels))
    if len(labels) != len(probabilities):
        raise DataError(
            f"multiclass: labels {labels.shape} and predictions {probabilities.shape}; pass [n] "
            "class numbers and [n, C] probabilities"
        )
    if not known.all():
        raise DataError(
            f"multiclass: label {labels[~known][0]} is not a class number 0 .. {classes - 1}; pass "
            "the labelled examples only"
        )


def _check_lengths(metric: str, labels: np.ndarray, predictions: np.ndarray) -> None:
    if labels.shape != predictions.shape:
        raise DataError(
            f"{metric}: labels {labels.shape} and predictions {predictions.shape}; pass one of "
            "each per example"
        )


def _check_binary(metric: str, labels: np.ndarray) -> None:
    other = (labels != 0) & (labels != 1)
    if other.any():
        raise DataError(
            f"{metric}: label {labels[other][0]} is neither 0 nor 1; pass the labelled examples "
            "only, and declare the task with at_least or equals if its column has other values"
        )
