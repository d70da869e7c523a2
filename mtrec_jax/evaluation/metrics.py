"""Metrics of one task's examples, and their bootstrap intervals.

A metric is a *statistic*: a function of row weights that has done the sorting and the logarithms
already, so that each bootstrap resample, a vector of counts, costs O(n). `METRICS` has a line for
each. Everything is computed in float64, and what is undefined (no rows, one class only, a
prediction that is not a number) is nan: never 0, as in torchmetrics and LensKit.

Every statistic is exact over all rows it is given; none is a mean of means of batches. Several
processes therefore exchange labels and predictions (`collect`), since AUC, average precision and
the bins of the calibration error need the order of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from mtrec_jax.errors import ConfigError, DataError

Statistic = Callable[[np.ndarray], float]  # row weights [n] (counts, for the bootstrap) -> value


@dataclass(frozen=True)
class Linear:
    """A statistic that knows what each row adds to it, for sums by user and paired tests.

    `rows()[i]` is the value, plus n times its derivative by the weight of row i where all weights
    are 1: the rows of a mean are its values, and the mean of the rows is the value of any statistic
    that does not change when all weights are multiplied. Their spread is that of the statistic to
    first order (infinitesimal jackknife; Efron 1982, chapter 6; for ratios the delta method).
    """

    value: Statistic
    rows: Callable[[], np.ndarray]  # [n]

    def __call__(self, weights: np.ndarray) -> float:
        """The value under row weights [n]."""
        return self.value(weights)


class Metric(NamedTuple):
    """One line of `METRICS`."""

    statistic: Callable[[Any, Any], Statistic]  # of (labels, predictions)
    larger_is_better: bool = True
    resampled: bool = True  # has an interval; resampling moves absolute values of means upwards
    ideal: float | None = None  # the best value, where neither larger nor lower is better
    of_places: bool = False  # ordinal: of the classes' places and probabilities, not of numbers


def auc(
    labels: Shaped[np.ndarray, " n"],
    scores: Num[np.ndarray, " n"],
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Area under the ROC curve: P(score of a positive > of a negative), ties count one half.

    Exact, by the Mann-Whitney statistic with midranks (Hanley and McNeil, 1982), as scikit-learn
    does. One class alone: nan (torchmetrics: 0). torchmetrics puts a sigmoid on scores outside
    0 .. 1, so that large logits tie; cornac counts a tie as lost.

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

    def rows() -> np.ndarray:
        """By the shares of the other class that a row is right about (DeLong et al., 1988)."""
        n, mean = len(order), value(np.ones(len(order)))
        if np.isnan(mean):
            return np.full(n, mean)
        run = np.cumsum(np.append(True, ordered[1:] != ordered[:-1])) - 1
        won, lost = (np.bincount(run, of) for of in (positive, 1 - positive))
        below, above = np.cumsum(lost) - lost / 2, won.sum() - np.cumsum(won) + won / 2
        right = np.where(positive > 0, below[run] / lost.sum(), above[run] / won.sum())
        share = n / np.where(positive > 0, won.sum(), lost.sum())
        found = np.empty(n)
        found[order] = mean + share * (right - mean)
        return found

    return Linear(value, rows)


def average_precision_statistic(
    labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"]
) -> Statistic:
    """Area under the precision-recall curve as average precision: sum of precision x recall gained.

    Rows of equal score are one threshold, nothing is interpolated (Davis and Goadrich, 2006): the
    `average_precision_score` of scikit-learn, not the trapezoids of its `auc(recall, precision)`,
    which are too optimistic. Without a positive: nan (scikit-learn: 0). Constant scores have the
    share of positives. It is no MAP@k, of which ranking libraries have four definitions.

    >>> labels, scores = np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.8, 0.1])
    >>> round(average_precision_statistic(labels, scores)(np.ones(4)), 6)  # 1/2 + 1/2 * 2/3
    0.833333
    """
    _check(labels, scores, binary=True)
    order = np.argsort(scores)[::-1]
    ordered, positive = scores[order], labels[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    undefined = not len(ordered) or bool(np.isnan(ordered[0]))

    def curve(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positives of each threshold; positives and rows from it on upwards."""
        weight = _a_row_each(weights, len(order))[order]
        gained = np.add.reduceat(weight * positive, starts)
        return gained, np.cumsum(gained), np.cumsum(np.add.reduceat(weight, starts))

    def value(weights: np.ndarray) -> float:
        if undefined:
            _a_row_each(weights, len(order))
            return float("nan")
        gained, found, shown = curve(weights)
        if found[-1] <= 0:
            return float("nan")
        return float((gained * found / np.maximum(shown, 1e-300)).sum() / found[-1])

    def rows() -> np.ndarray:
        n, mean = len(order), value(np.ones(len(order)))
        if np.isnan(mean):
            return np.full(n, mean)
        gained, found, shown = curve(np.ones(n))
        # a row at threshold t is among those that are shown at t and at all lower ones
        later = np.cumsum((gained / shown)[::-1])[::-1]
        wrong = np.cumsum((gained * found / shown**2)[::-1])[::-1]
        run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, n)))
        change = positive * (found / shown + later)[run] - wrong[run] - positive * mean
        result = np.empty(n)
        result[order] = mean + n * change / found[-1]
        return result

    return Linear(value, rows)


def utility_auc_statistic(
    utility: Num[np.ndarray, " n"], scores: Num[np.ndarray, " n"]
) -> Statistic:
    """How well scores order rows by utility: `auc` for amounts, each pair of rows counting by the
    difference of its utilities; for a utility of 0 and 1 it is `auc`.

    (1 + normalised Gini coefficient) / 2 of the concentration curve (Kakwani 1977): among all
    orders the one by expected utility has the highest. nan where all utilities are equal.

    >>> worth = np.array([0.0, 1.0, 4.0])
    >>> utility_auc_statistic(worth, np.array([1.0, 3.0, 2.0]))(np.ones(3))  # (1 + 4) / (1 + 4 + 3)
    0.625
    """
    won, best = _placed(utility, scores), _placed(utility, utility)

    def value(weights: np.ndarray) -> float:
        most = best(_a_row_each(weights, len(utility)))
        return 0.5 * (1 + won(weights) / most) if most > 0 else float("nan")

    return value


def _placed(utility: np.ndarray, scores: np.ndarray) -> Statistic:
    """Sum over pairs of the difference in utility, negative where the lower one is placed first."""
    order = np.argsort(scores)
    ordered, worth = scores[order], utility[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # of runs of equal scores
    run = np.cumsum(np.append(0, ordered[1:] != ordered[:-1]))[: len(ordered)]

    def value(weights: np.ndarray) -> float:
        if not len(ordered):
            return 0.0
        weight = weights[order]
        of_run = np.add.reduceat(weight, starts)
        below = np.cumsum(of_run) - of_run
        above = of_run.sum() - below - of_run
        return float((weight * worth * (below - above)[run]).sum())

    return value


def mean_statistic(values: Num[np.ndarray, " n"]) -> Statistic:
    """The mean of per-example values; nan when the weights sum to 0."""
    return ratio_statistic(values, np.ones(len(values)))


def ratio_statistic(top: Num[np.ndarray, " n"], bottom: Num[np.ndarray, " n"]) -> Statistic:
    """The sum of one value a row over the sum of another; nan where that is 0.

    >>> ratio_statistic(np.array([1, 0, 2]), np.array([1, 1, 4]))(np.ones(3))
    0.5
    """

    def value(weights: np.ndarray) -> float:
        weights = _a_row_each(weights, len(top))
        total = float((weights * bottom).sum())
        return float((weights * top).sum()) / total if total > 0 else float("nan")

    def rows() -> np.ndarray:
        n, mean = len(top), value(np.ones(len(top)))
        if np.isnan(mean):
            return np.full(n, mean)
        return np.asarray(mean + n * (top - mean * bottom) / np.sum(bottom), np.float64)

    return Linear(value, rows)


def gauc_statistic(
    labels: Shaped[np.ndarray, " n"], scores: Num[np.ndarray, " n"], users: Int[np.ndarray, " n"]
) -> Statistic:
    """GAUC: the AUC of each user's rows, averaged with their numbers of rows as weights.

    Zhu et al. (2017), "Optimized cost per click in Taobao display advertising", who weight by
    impressions, or by clicks, and leave out users whose rows have one class; so do we, by
    impressions. Ties count one half. RecBole weights by the positives of a user; LibRecommender
    counts users of one class as 0; scikit-learn, RecTools, LensKit and implicit have none.

    Args:
      labels: 0 or 1.
      scores: only their order within a user matters.
      users: any numbers, equal for rows of one user.

    >>> labels, scores = np.array([1, 0, 0, 1, 1]), np.array([0.9, 0.1, 0.3, 0.2, 0.5])
    >>> gauc_statistic(labels, scores, np.array([7, 7, 3, 3, 4]))(np.ones(5))
    0.5
    """
    _check(labels, scores, binary=True)
    of_user, user = _auc_by(labels, scores, users)
    kept = ~np.isnan(of_user)[user]
    values = np.where(kept, np.nan_to_num(of_user)[user], 0.0)
    if np.isnan(scores).any():
        values = np.full(len(values), np.nan)
    return ratio_statistic(values, kept.astype(np.float64))


def list_ndcg_statistic(
    labels: Shaped[np.ndarray, " n"],
    scores: Num[np.ndarray, " n"],
    lists: Int[np.ndarray, " n"],
    k: int,
) -> Statistic:
    """Mean nDCG@k over lists of impressions, each put in order by its scores.

    Järvelin and Kekäläinen (2002), with gains 0 and 1 and discounts 1 / log2(place + 1). A list is
    what was shown to one user; one without both classes says nothing about an order and is left
    out. Equal scores get the discount that is *expected* of a random order of them (McSherry and
    Najork, 2008), as in scikit-learn's `ndcg_score`, which this equals list by list; rax takes them
    as they come, keras-rs and ranx by chance. The ideal order is cut at k as well. scikit-learn
    gives lists without a 1 the value 0, LensKit the value 0 in its summary; in LensKit places 1
    and 2 weigh alike; RecTools' ideal has k relevant items however many there are. Gains 2^g - 1
    (rax, keras-rs) are those of 0 and 1, too.

    The weights of the rows of a list are averaged; the bootstrap gives them all the same.

    >>> labels, scores = np.array([0, 1, 0, 1]), np.array([0.9, 0.2, 0.5, 0.5])
    >>> list_ndcg_statistic(labels, scores, np.array([1, 1, 2, 2]), 1)(np.ones(4))
    0.25
    """
    _check(labels, scores, binary=True)
    _, which = np.unique(lists, return_inverse=True)
    order = np.lexsort((-scores, which))
    group, ordered, gain = which[order], scores[order], labels[order].astype(np.float64)
    sizes = np.bincount(which)
    first = np.concatenate([[0], np.cumsum(sizes)])[:-1]
    place = np.arange(len(order)) - first[group]
    discount = np.where(place < k, 1 / np.log2(place + 2.0), 0.0)
    run = np.cumsum(np.append(True, (np.diff(group) != 0) | (ordered[1:] != ordered[:-1]))) - 1
    run = run[: len(order)]
    expected = (np.bincount(run, discount) / np.bincount(run))[run]
    relevant = np.bincount(group, gain).astype(np.int64)
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2.0))])
    mixed = (relevant > 0) & (relevant < sizes)
    found = np.bincount(group, gain * expected) / np.where(mixed, best[np.minimum(relevant, k)], 1)
    if np.isnan(scores).any():
        found = np.full(len(found), np.nan)
    share = (mixed / sizes)[which]
    return ratio_statistic(np.where(mixed, found, 0.0)[which] * share, share)


def _auc_by(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """AUC [G] of each group, nan with one class; the group [n] of each row."""
    _, which = np.unique(groups, return_inverse=True)
    order = np.lexsort((scores, which))
    group, ordered, won = which[order], scores[order], labels[order].astype(np.float64)
    start = np.append(True, (np.diff(group) != 0) | (ordered[1:] != ordered[:-1]))[: len(order)]
    run = np.cumsum(start) - 1
    of_run = group[start]
    gained, lost = np.bincount(run, won), np.bincount(run, 1 - won)
    positives, negatives = np.bincount(group, won), np.bincount(group, 1 - won)
    before = np.concatenate([[0.0], np.cumsum(negatives)])[:-1]  # negatives of earlier groups
    below = np.cumsum(lost) - lost / 2 - before[of_run]
    pairs = positives * negatives
    right = np.bincount(of_run, gained * below, minlength=len(pairs))
    return np.where(pairs > 0, right / np.where(pairs > 0, pairs, 1), np.nan), which


def calibration_statistic(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int = 15
) -> Statistic:
    """Expected calibration error: sum over bins of share x |mean prediction - mean label|.

    Also called ECE. Naeini et al. (2015), "Obtaining well calibrated probabilities using Bayesian
    binning". Bins hold equally many rows (Nixon et al., 2019, "Measuring calibration in deep
    learning") rather than equal widths (torchmetrics, and `calibration_curve` of scikit-learn
    unless strategy = "quantile"), because predictions of clicks crowd near zero. Equal predictions
    share a bin, so that the result depends neither on the order of the rows nor on how ties fall.
    torchmetrics' is of the confidence in the likelier class; this is of the probability of 1.

    >>> labels, probabilities = np.array([0, 1, 1, 1]), np.array([0.25, 0.25, 0.75, 0.75])
    >>> calibration_statistic(labels, probabilities, bins=2)(np.ones(4))
    0.25
    """
    _check(labels, probabilities, binary=True)
    _check_probabilities(probabilities, "sigmoid")
    bin_of = _bins_of(probabilities, bins)
    gap = probabilities.astype(np.float64) - labels

    def value(weights: np.ndarray) -> float:
        weights = _a_row_each(weights, len(gap))
        total = float(weights.sum())
        if total <= 0:
            return float("nan")
        # share x |mean gap| = |sum of gaps| / total: the size of a bin cancels
        return float(np.abs(np.bincount(bin_of, weights * gap, bins)).sum() / total)

    return value


def _bins_of(probabilities: np.ndarray, bins: int) -> np.ndarray:
    """The bin [n] of each prediction, by the middle of the ranks of all equal ones."""
    ordered = np.sort(probabilities)
    first = np.searchsorted(ordered, probabilities, "left")
    last = np.searchsorted(ordered, probabilities, "right") - 1
    return (first + last) * bins // max(2 * len(ordered), 1)


def reliability(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int = 15
) -> list[dict[str, float | int]]:
    """The reliability diagram behind `calibration_statistic`: its bins, lowest predictions first.

    Returns:
      {"predicted": mean prediction, "observed": share of label 1, "targets": rows} a bin that has
      any. The mean of abs(predicted - observed), weighted by targets, is the calibration error.

    >>> reliability(np.array([0, 1, 1, 1]), np.array([0.25, 0.25, 0.75, 0.75]), bins=2)[0]
    {'predicted': 0.25, 'observed': 0.5, 'targets': 2}
    """
    _check(labels, probabilities, binary=True)
    _check_probabilities(probabilities, "sigmoid")
    bin_of = _bins_of(probabilities, bins)
    sizes = np.bincount(bin_of, minlength=bins)
    sums = [np.bincount(bin_of, of, bins) for of in (probabilities.astype(np.float64), labels)]
    return [
        {"predicted": float(p / n), "observed": float(y / n), "targets": int(n)}
        for p, y, n in zip(*sums, sizes, strict=True)
        if n
    ]


def normalised_entropy_statistic(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"]
) -> Statistic:
    """NE: the log loss, divided by that of predicting the share of positives for every row.

    He et al. (2014), "Practical lessons from predicting clicks on ads at Facebook", section 3: 1 is
    what the mean of these very labels would get, lower is better. The share is that of the rows
    that are measured, not of the training rows. One class alone: nan. scikit-learn has none; its
    `d2_log_loss_score` is 1 - NE.
    """
    labels = labels.astype(np.float64)
    losses = _losses(labels, probabilities)
    loss, share = mean_statistic(losses), mean_statistic(labels)

    def value(weights: np.ndarray) -> float:
        mean, p = loss(weights), share(weights)
        return float(mean / _entropy(p)) if 0 < p < 1 else float("nan")

    def rows() -> np.ndarray:
        ones = np.ones(len(labels))
        mean, p, ratio = loss(ones), share(ones), value(ones)
        if np.isnan(ratio):
            return np.full(len(labels), ratio)
        turned = np.log((1 - p) / p) * (labels - p)  # what a row changes in the entropy
        return np.asarray(ratio + (losses - mean - ratio * turned) / _entropy(p))

    return Linear(value, rows)


def _entropy(share: float) -> float:
    return -float(share * np.log(share) + (1 - share) * np.log1p(-share))


def copc_statistic(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"]
) -> Statistic:
    """COPC: clicks over predicted clicks, sum of labels / sum of probabilities; 1 is right, more
    says that the model predicts too little. Graepel et al. (2010) call its inverse bias."""
    _check(labels, probabilities, binary=True)
    _check_probabilities(probabilities, "sigmoid")
    return ratio_statistic(labels.astype(np.float64), probabilities.astype(np.float64))


def _log_loss(labels: np.ndarray, probabilities: np.ndarray) -> Statistic:
    """Mean of -log P(label) in nats, P kept a rounding unit of its type away from 0 and 1."""
    return mean_statistic(_losses(labels, probabilities))


def _losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    _check(labels, probabilities, binary=True)
    _check_probabilities(probabilities, "sigmoid")
    inside = _inside(probabilities)
    return -np.where(labels.astype(bool), np.log(inside), np.log1p(-inside))


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
    """Root of the mean squared error over all rows, in the label's unit, as scikit-learn's."""
    _check(labels, predictions)
    squares = (predictions.astype(np.float64) - labels) ** 2
    squared = mean_statistic(squares)

    def value(weights: np.ndarray) -> float:
        return float(np.sqrt(squared(weights)))

    def rows() -> np.ndarray:
        root = value(np.ones(len(squares)))
        return (squares + root**2) / (2 * root) if root else np.zeros(len(squares))

    return Linear(value, rows)


def _mae(labels: np.ndarray, predictions: np.ndarray) -> Statistic:
    _check(labels, predictions)
    return mean_statistic(np.abs(predictions.astype(np.float64) - labels))


def xauc(labels: Num[np.ndarray, " n"], predictions: Num[np.ndarray, " n"]) -> float:
    """Of the pairs with different labels, the share that the predictions put in the same order.

    Ties of the predictions count one half. XAUC (Zhan et al., "Deconfounding duration bias in
    watch-time prediction", KDD 2022) over all pairs; for labels 0 and 1 it is the AUC.

    >>> xauc(np.array([0.0, 10, 10, 30]), np.array([1.0, 5, 2, 3]))
    0.8
    """
    return xauc_statistic(labels, predictions)(np.ones(len(labels)))


def xauc_statistic(labels: Num[np.ndarray, " n"], predictions: Num[np.ndarray, " n"]) -> Statistic:
    """`xauc` as a function of row weights: pairs weigh the product of those of their rows.

    Two labels differ in a highest binary digit of their ranks. So the pairs are counted digit by
    digit: among rows that agree in all higher digits, those with a 1 against those with a 0, of
    which the ones with lower predictions are in order. O(n log² n), for each vector of weights.
    """
    _check(labels, predictions)
    order = np.argsort(predictions, kind="stable")
    ordered = predictions[order]
    run = np.cumsum(np.append(0, ordered[1:] != ordered[:-1])[: len(ordered)])
    levels, rank = np.unique(labels[order], return_inverse=True)
    undefined = not len(ordered) or bool(np.isnan(ordered[-1]))

    def value(weights: np.ndarray) -> float:
        weight = _a_row_each(weights, len(order))[order]
        if undefined:
            return float("nan")
        good = pairs = 0.0
        for digit in range(int(len(levels) - 1).bit_length()):
            above = rank >> digit + 1
            by = np.argsort(above, kind="stable")  # predictions rise inside of each
            high = (rank[by] >> digit & 1) * weight[by]
            low = weight[by] - high
            first = np.append(True, np.diff(above[by]) != 0)
            ties = np.flatnonzero(first | np.append(True, np.diff(run[by]) != 0))
            group = np.cumsum(first[ties]) - 1
            won, lost = np.add.reduceat(high, ties), np.add.reduceat(low, ties)
            total = np.bincount(group, lost)
            before = np.cumsum(lost) - lost / 2 - (np.cumsum(total) - total)[group]
            good += float(won @ before)
            pairs += float(np.bincount(group, won) @ total)
        return good / pairs if pairs > 0 else float("nan")

    return value


# {kind of task: {name: metric}}; the first one chooses the best checkpoint unless told otherwise
METRICS: dict[str, dict[str, Metric]] = {
    "binary": {
        "auc": Metric(auc_statistic),
        "log_loss": Metric(_log_loss, larger_is_better=False),
        "calibration_error": Metric(calibration_statistic, False, resampled=False),
        "accuracy": Metric(_accuracy),
        "pr_auc": Metric(average_precision_statistic),
        "ne": Metric(normalised_entropy_statistic, larger_is_better=False),
        "copc": Metric(copc_statistic, ideal=1.0),
    },
    "regression": {
        "rmse": Metric(_rmse, larger_is_better=False),
        "mae": Metric(_mae, larger_is_better=False),
    },
    "multiclass": {
        "accuracy": Metric(_accuracy),
        "log_loss": Metric(_class_log_loss, larger_is_better=False),
    },
    "ordinal": {
        "rmse": Metric(_rmse, larger_is_better=False),
        "mae": Metric(_mae, larger_is_better=False),
        "log_loss": Metric(_class_log_loss, larger_is_better=False, of_places=True),
        "accuracy": Metric(_accuracy, of_places=True),
    },
    "watch_time": {
        "mae": Metric(_mae, larger_is_better=False),
        "rmse": Metric(_rmse, larger_is_better=False),
        "xauc": Metric(xauc_statistic, resampled=False),  # slow
    },
}
# {name: of each query, from the rank (0 = first) of its one relevant item and k}, 0 from rank k on.
# With one item to find, recall is hr, map is mrr and precision is hr / k: all names are in use.
RANKING: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "hr": lambda rank, k: np.ones_like(rank),
    "ndcg": lambda rank, k: 1 / np.log2(rank + 2),  # the ideal order has DCG 1
    "mrr": lambda rank, k: 1 / (rank + 1),
    "recall": lambda rank, k: np.ones_like(rank),
    "precision": lambda rank, k: np.full_like(rank, 1 / k),
    "map": lambda rank, k: 1 / (rank + 1),  # the precision at the one place that is relevant
}


def _mean_of_predictions(labels: np.ndarray, predictions: np.ndarray) -> Statistic:
    return mean_statistic(predictions)


# {name: of recommended lists, see `evaluation.lists`}; resampled users share fewer different items
OF_LISTS: dict[str, Metric] = {
    "coverage": Metric(_mean_of_predictions, resampled=False),
    "novelty": Metric(_mean_of_predictions),
    "diversity": Metric(_mean_of_predictions),
    "popularity": Metric(_mean_of_predictions, ideal=1.0),
    "gini": Metric(_mean_of_predictions, larger_is_better=False, resampled=False),
}


def metrics_of(kind: str, ks: Iterable[int], users: bool = True) -> list[str]:
    """Names of the metrics that evaluation reports for a kind of task; those within users only for
    data that have users.

    >>> metrics_of("binary", [10])[-3:]
    ['copc', 'gauc', 'ndcg@10']
    """
    if kind == "retrieval":
        return [f"{m}@{k}" for k in ks for m in RANKING]
    within = ["gauc", *(f"ndcg@{k}" for k in ks)] if users and kind == "binary" else []
    return [*METRICS[kind], *within]


def metric_named(name: str) -> Metric:
    """The line of a metric's name, of whatever kind of task; ranking metrics are larger-is-better.

    >>> metric_named("rmse").larger_is_better, metric_named("ndcg@10").larger_is_better
    (False, True)
    >>> metric_named("popularity@10").ideal
    1.0
    """
    of_lists = OF_LISTS.get(name.partition("@")[0], Metric(_mean_of_predictions))
    return next((known[name] for known in METRICS.values() if name in known), of_lists)


def task_statistics(
    kind: str,
    labels: Shaped[np.ndarray, " n"],
    predictions: Float[np.ndarray, "n ..."],
    users: Int[np.ndarray, " n"] | None = None,
    ks: Iterable[int] = (),
    numbers: Sequence[float | int] = (),
) -> dict[str, Statistic]:
    """`task_metrics` as functions of row weights `[n]`; same arguments, same errors."""
    if kind not in METRICS:
        raise ConfigError(
            f"task_metrics: kind {kind!r} is not one of {', '.join(METRICS)}; retrieval is "
            "measured by ranking_metrics"
        )
    given = of_places = labels, predictions
    if kind == "ordinal" and predictions.ndim == 2:
        places, values = _places(labels, predictions, numbers), np.asarray(numbers)
        given, of_places = (labels, predictions @ values), (places, predictions)
    found = {
        name: m.statistic(*(of_places if m.of_places else given))
        for name, m in METRICS[kind].items()
        if not m.of_places or of_places is not given
    }
    if users is not None and kind == "binary":
        found["gauc"] = gauc_statistic(labels, predictions, users)
        for k in ks:
            found[f"ndcg@{k}"] = list_ndcg_statistic(labels, predictions, users, k)
    return found


def task_metrics(
    kind: str,
    labels: Shaped[np.ndarray, " n"],
    predictions: Float[np.ndarray, "n ..."],
    users: Int[np.ndarray, " n"] | None = None,
    ks: Iterable[int] = (),
    numbers: Sequence[float | int] = (),
) -> dict[str, float]:
    """All metrics of a task, by the names of `metrics_of`.

    Args:
      kind: "binary", "regression", "multiclass", "ordinal" or "watch_time".
      labels: one per example that has one: 0 or 1, a number, or a class number.
      predictions: probability of label 1 `[n]`, a number `[n]`, or class probabilities `[n, C]`;
        for "ordinal" either of the two last, of numbers `rmse` and `mae` alone.
      users: of the examples, any numbers; None leaves out the metrics within users.
      ks: cut-offs of nDCG inside of a user's impressions, of binary tasks.
      numbers: "ordinal": the C numbers that labels are, in rising order.

    Raises:
      ConfigError: another kind.
      DataError: labels that do not fit the kind, lengths that differ, or logits in the place of
        probabilities.

    >>> task_metrics("regression", np.array([3.0, 5.0]), np.array([4.0, 4.0]))
    {'rmse': 1.0, 'mae': 1.0}
    """
    return _values(task_statistics(kind, labels, predictions, users, ks, numbers), len(labels))


def ranking_statistics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, Statistic]:
    """`ranking_metrics` as functions of query weights `[Q]`."""
    if ranks.size and ranks.min() < 0:
        raise DataError(f"ranks start at 0, found {ranks.min()}; give unknown ranks a large number")
    rank = ranks.astype(np.float64)
    return {
        f"{name}@{k}": mean_statistic(np.where(rank < k, gain(rank, k), 0))
        for k in ks
        for name, gain in RANKING.items()
    }


def ranking_metrics(ranks: Int[np.ndarray, " Q"], ks: Iterable[int]) -> dict[str, float]:
    """Means over queries of hr, ndcg (Järvelin and Kekäläinen, 2002), mrr, recall, precision and
    map at each k.

    Each held-out event is a query of its own with one relevant item, so that recall is hr,
    precision hr / k, and map, whose average precision has one term, mrr. With several targets a
    user most libraries take the user as one query with all of them, which gives larger values:
    hits at places 1, 3 and 8 of five targets are ndcg@10 .363, hr .6 here, .616 and 1 there. With
    one target a user the definitions coincide, but for LensKit (2025.8), where places 1 and 2 weigh
    alike, and RecTools (0.19), whose ideal has k relevant items unless `divide_by_achievable`.

    Args:
      ranks: of the one relevant item, 0 = first; k or more where it was not found.

    Raises:
      DataError: a rank is negative.

    >>> found = ranking_metrics(np.array([0, 2, 9, 99]), [10])
    >>> [(name, round(value, 3)) for name, value in found.items()][:3]
    [('hr@10', 0.75), ('ndcg@10', 0.447), ('mrr@10', 0.358)]
    >>> [(name, round(value, 3)) for name, value in found.items()][3:]
    [('recall@10', 0.75), ('precision@10', 0.075), ('map@10', 0.358)]
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
    return bootstrap_intervals({"": statistic}, users, resamples, seed)[""]


def bootstrap_intervals(
    statistics: Mapping[str, Statistic],
    users: Int[np.ndarray, " n"],
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """`bootstrap_interval` of several metrics of the same examples: drawn once for all of them.

    >>> bootstrap_intervals({"hr": mean_statistic(np.full(9, 0.5))}, np.arange(9), resamples=10)
    {'hr': (0.5, 0.5)}
    """
    generator = np.random.default_rng(seed)
    people, who = np.unique(users, return_inverse=True)
    n = len(people)
    values = np.empty((len(statistics), resamples if n else 0))
    for i in range(values.shape[1]):
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        weights = counts[who].astype(np.float64)
        values[:, i] = [statistic(weights) for statistic in statistics.values()]
    return {name: _middle(of) for name, of in zip(statistics, values, strict=True)}


def _middle(values: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """The middle 95 % of those that are defined."""
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


def _places(
    labels: np.ndarray, predictions: np.ndarray, numbers: Sequence[float | int]
) -> Int[np.ndarray, " n"]:
    """The place of each label among the numbers of ordered classes."""
    if predictions.shape != (len(labels), len(numbers)):
        raise DataError(
            f"ordinal: labels {labels.shape}, predictions {predictions.shape} and {len(numbers)} "
            "numbers; pass [n] labels, [n, C] probabilities and the C numbers"
        )
    found = np.abs(labels[:, None] - np.asarray(numbers, labels.dtype)).argmin(axis=1)
    return found


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
