"""Metrics of one task's examples, and their bootstrap intervals.

A metric exists in two forms: a function of (labels, predictions), and a *statistic*, a function of
row weights alone. The statistic does the sorting and the logarithms once; each bootstrap resample
is then a vector of counts and costs O(n). Everything is computed in float64, and what is undefined
(no rows, one class only, a prediction that is not a number) is nan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation.calibration import calibration_statistic

Statistic = Callable[[np.ndarray], float]  # row weights [n] (counts, for the bootstrap) -> value


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
      DataError: a label is neither 0 nor 1, or lengths differ.

    >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    """
    return auc_statistic(labels, scores)(_ones(labels) if weights is None else weights)


def log_loss(
    labels: Shaped[np.ndarray, " n"],
    probabilities: Float[np.ndarray, " n"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Mean of -log P(label), in nats.

    Probabilities are kept one rounding unit of their dtype away from 0 and 1, as in scikit-learn.

    Args:
      labels: 0 or 1.
      probabilities: of label 1.
      weights: of the rows; None: all 1.

    Raises:
      DataError: a label is neither 0 nor 1, or lengths differ.

    >>> round(log_loss(np.array([1, 0]), np.array([0.5, 0.75])), 4)
    1.0397
    """
    return _mean(_log_losses(labels, probabilities), weights)


def multiclass_log_loss(
    labels: Shaped[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n C"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Mean of -log P(label), in nats, over C classes; rows of `probabilities` sum to 1.

    Raises:
      DataError: a label is no class number 0 .. C - 1, or lengths differ.

    >>> round(multiclass_log_loss(np.array([2]), np.array([[0.25, 0.25, 0.5]])), 4)
    0.6931
    """
    return _mean(_class_losses(labels, probabilities), weights)


def rmse(
    labels: Num[np.ndarray, " n"],
    predictions: Num[np.ndarray, " n"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Root mean squared error, in the unit of the label.

    >>> rmse(np.array([1.0, 2.0]), np.array([4.0, 6.0])) == 12.5**0.5
    True
    """
    return float(np.sqrt(_mean(_errors(labels, predictions) ** 2, weights)))


def mae(
    labels: Num[np.ndarray, " n"],
    predictions: Num[np.ndarray, " n"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Mean absolute error, in the unit of the label.

    >>> mae(np.array([1.0, 2.0]), np.array([4.0, 6.0]))
    3.5
    """
    return _mean(np.abs(_errors(labels, predictions)), weights)


def accuracy(
    labels: Shaped[np.ndarray, " n"],
    classes: Shaped[np.ndarray, " n"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Fraction of examples whose predicted class is the label.

    >>> accuracy(np.array([0, 2, 1, 1]), np.array([0, 2, 1, 0]))
    0.75
    """
    _check_lengths("accuracy", labels, classes)
    return _mean((labels == classes).astype(np.float64), weights)


def per_query(ranks: Int[np.ndarray, " Q"], k: int) -> dict[str, Float[np.ndarray, " Q"]]:
    """Each query's value of hr, ndcg, mrr and recall at k, when one item is relevant.

    With rank r (0 = first) < k: hr = recall = 1, ndcg = 1 / log2(r + 2) (Järvelin and Kekäläinen,
    2002; the ideal order has DCG 1) and mrr = 1 / (r + 1); all are 0 from rank k on.

    Raises:
      DataError: a rank is negative. Give an item that was not found any rank of k or more.

    >>> {name: values.tolist() for name, values in per_query(np.array([0, 2, 9]), 3).items()}
    {'hr': [1.0, 1.0, 0.0], 'ndcg': [1.0, 0.5, 0.0], 'mrr': [1.0, 0.333..., 0.0],
     'recall': [1.0, 1.0, 0.0]}
    """
    if ranks.size and ranks.min() < 0:
        raise DataError(f"ranks start at 0, found {ranks.min()}; give unknown ranks a large number")
    hit = (ranks < k).astype(np.float64)
    rank = ranks.astype(np.float64)
    return {"hr": hit, "ndcg": hit / np.log2(rank + 2), "mrr": hit / (rank + 1), "recall": hit}


def ranking_metrics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, float]:
    """Means over queries of hr, ndcg, mrr and recall at each k, when one item is relevant.

    recall@k equals hr@k here, since there is one item to find; both names are in use.

    Args:
      ranks: of the relevant item, 0 = first; k or more where it was not found.

    Raises:
      DataError: a rank is negative.

    >>> ranking_metrics(np.array([0, 2, 9, 99]), [10])
    {'hr@10': 0.75, 'ndcg@10': 0.447..., 'mrr@10': 0.358..., 'recall@10': 0.75}
    """
    ones = np.ones(len(ranks))
    return {name: value(ones) for name, value in ranking_statistics(ranks, ks).items()}


def task_metrics(
    kind: str, labels: Shaped[np.ndarray, " n"], predictions: Float[np.ndarray, "n ..."]
) -> dict[str, float]:
    """All metrics of a task, named as `config.metrics_of(kind)` lists them.

    Args:
      kind: "binary", "regression" or "multiclass".
      labels: one per example that has one: 0 or 1, a number, or a class number.
      predictions: probability of label 1 `[n]`, a number `[n]`, or class probabilities `[n, C]`.
        Accuracy says 1 from probability 0.5 on, or the most probable class.

    Raises:
      ConfigError: another kind.
      DataError: labels that do not fit the kind, or lengths that differ.

    >>> task_metrics("regression", np.array([3.0, 5.0]), np.array([4.0, 4.0]))
    {'rmse': 1.0, 'mae': 1.0}
    """
    ones = np.ones(len(labels))
    statistics = task_statistics(kind, labels, predictions)
    return {name: value(ones) for name, value in statistics.items()}


def bootstrap_interval(
    statistic: Statistic, n: int, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a metric over n independent examples.

    Efron and Tibshirani (1993), "An introduction to the bootstrap", chapter 13. Drawing n of n
    rows with replacement is drawing how often each row counts, so a resample is a weight vector.

    Args:
      statistic: the metric as a function of row weights, from `task_statistics`,
        `ranking_statistics`, `auc_statistic` or `mean_statistic`.
      n: examples.
      resamples: 0 gives (nan, nan).
      seed: the same seed draws the same resamples, so that models are compared on equal ones.

    Returns:
      (low, high); resamples in which the metric is undefined are left out.

    >>> bootstrap_interval(mean_statistic(np.full(20, 0.5)), 20, resamples=10)
    (0.5, 0.5)
    """
    generator = np.random.default_rng(seed)
    values = np.empty(resamples if n else 0)
    for i in range(len(values)):
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        values[i] = statistic(counts.astype(np.float64))
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


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


def mean_statistic(values: Num[np.ndarray, " n"]) -> Statistic:
    """The mean of per-example values as a function of row weights; nan when they sum to 0."""

    def value(weights: np.ndarray) -> float:
        total = float(weights.sum())
        return float((weights * values).sum()) / total if total > 0 else float("nan")

    return value


def ranking_statistics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, Statistic]:
    """`ranking_metrics` as functions of query weights `[Q]`."""
    return {
        f"{name}@{k}": mean_statistic(values)
        for k in ks
        for name, values in per_query(ranks, k).items()
    }


def task_statistics(
    kind: str, labels: Shaped[np.ndarray, " n"], predictions: Float[np.ndarray, "n ..."]
) -> dict[str, Statistic]:
    """`task_metrics` as functions of row weights `[n]`; same arguments, same errors."""
    if kind == "binary":
        return {
            "auc": auc_statistic(labels, predictions),
            "log_loss": mean_statistic(_log_losses(labels, predictions)),
            "calibration_error": calibration_statistic(labels, predictions),
            "accuracy": mean_statistic(_hits(labels, predictions >= 0.5, predictions)),
        }
    if kind == "regression":
        errors = _errors(labels, predictions)
        squared = mean_statistic(errors**2)
        return {
            "rmse": lambda weights: float(np.sqrt(squared(weights))),
            "mae": mean_statistic(np.abs(errors)),
        }
    if kind == "multiclass":
        losses = _class_losses(labels, predictions)
        hits = _hits(labels, predictions.argmax(axis=1), predictions.sum(axis=1))
        return {"accuracy": mean_statistic(hits), "log_loss": mean_statistic(losses)}
    raise ConfigError(
        f"task_metrics: kind {kind!r} is not 'binary', 'regression' or 'multiclass'; retrieval is "
        "measured by ranking_metrics"
    )


def _ones(labels: np.ndarray) -> Float[np.ndarray, " n"]:
    return np.ones(len(labels))


def _mean(values: Float[np.ndarray, " n"], weights: np.ndarray | None) -> float:
    return mean_statistic(values)(_ones(values) if weights is None else weights)


def _errors(labels: np.ndarray, predictions: np.ndarray) -> Float[np.ndarray, " n"]:
    _check_lengths("rmse and mae", labels, predictions)
    return predictions.astype(np.float64) - labels.astype(np.float64)


def _log_losses(labels: np.ndarray, probabilities: np.ndarray) -> Float[np.ndarray, " n"]:
    """-log P(label) of each example."""
    _check_lengths("log_loss", labels, probabilities)
    _check_binary("log_loss", labels)
    unit = float(np.finfo(probabilities.dtype).eps)
    inside = np.clip(probabilities.astype(np.float64), unit, 1 - unit)
    return -np.where(labels.astype(bool), np.log(inside), np.log1p(-inside))


def _class_losses(labels: np.ndarray, probabilities: np.ndarray) -> Float[np.ndarray, " n"]:
    """-log P(label) of each example; `labels` may be class numbers in a float array."""
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
    of_label = probabilities[np.arange(len(labels)), labels.astype(np.int64)]
    unit = float(np.finfo(probabilities.dtype).eps)
    return -np.log(np.clip(of_label.astype(np.float64), unit, 1 - unit))


def _hits(labels: np.ndarray, classes: np.ndarray, sound: np.ndarray) -> Float[np.ndarray, " n"]:
    """1 where the class is right, nan where the prediction behind it is not a number."""
    return np.where(np.isnan(sound), np.nan, (labels == classes).astype(np.float64))


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
