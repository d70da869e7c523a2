"""What each user adds to a metric, and paired tests of two models over the same users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from scipy import stats

from mtrec_jax.evaluation.metrics import Linear


class Difference(NamedTuple):
    """A metric of one model minus that of another."""

    mean: float  # nan where either is undefined
    low: float  # 95 % interval
    high: float
    p: float  # two-sided, that the true difference is 0


def user_sums(
    statistic: Linear, users: Int[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " U"], Float[np.ndarray, " U"]]:
    """A metric as one sum a user: (users in ascending order, their rows, their sums).

    The sums of all users, divided by all rows, are the metric. For means (log loss, hits, errors)
    they are the plain sums of a user's rows, which add up over any parts of the data; for others
    (AUC, average precision, ratios) those of `Linear.rows`.

    >>> from mtrec_jax.evaluation.metrics import mean_statistic
    >>> statistic = mean_statistic(np.array([1.0, 0.0, 0.5]))
    >>> [part.tolist() for part in user_sums(statistic, np.array([7, 3, 7]))]
    [[3, 7], [1, 2], [0.0, 1.5]]
    """
    people, who = np.unique(users, return_inverse=True)
    sizes = np.bincount(who, minlength=len(people))
    return people, sizes, np.bincount(who, statistic.rows(), len(people))


def paired_difference(
    first: Num[np.ndarray, " U"], second: Num[np.ndarray, " U"], targets: Int[np.ndarray, " U"]
) -> Difference:
    """Whether two models differ: a paired t test over users.

    A model's value is sum(first) / sum(targets). Users are drawn, not their rows: with the rows'
    number random as well this is the delta method for ratios (Deng et al., 2018, "Applying the
    delta method in metric analytics"), which is the ordinary paired t test where all users have
    equally many rows, and for the AUC that of DeLong et al. (1988), with users as clusters
    (Obuchowski, 1997). It is what a bootstrap over users converges to, without its draws and the
    limit that their number sets to p. Sums of several seeds may be averaged before.

    Args:
      first, second: sums of each user, from `user_sums` or the file that an evaluation keeps.
      targets: rows of each user, the same for both; users without any do not count.

    >>> ours, theirs = np.array([1.0, 2.0, 3.0, 2.0]), np.array([0.0, 2.0, 1.0, 1.0])
    >>> found = paired_difference(ours, theirs, np.ones(4, int))
    >>> found.mean, round(found.p, 4)  # differences 1, 0, 2, 1: t = 1 / sqrt(2 / 3 / 4)
    (1.0, 0.0917)
    """
    rows, users = float(np.sum(targets)), int(np.count_nonzero(targets))
    if not rows:
        return Difference(*[float("nan")] * 4)
    each = (np.asarray(first, np.float64) - second) / rows
    mean = float(each.sum())
    spread = each - mean * np.asarray(targets) / rows
    if np.isnan(mean) or users < 2:
        return Difference(mean, *[float("nan")] * 3)
    error = float(np.sqrt(users / (users - 1) * (spread**2).sum()))
    if error <= 1e-12 * float(np.abs(each).sum()):  # rounding: the same difference for everybody
        return Difference(mean, mean, mean, float(mean == 0))
    reach = float(stats.t.ppf(0.975, users - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, users - 1))
    return Difference(mean, mean - reach, mean + reach, p)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979): the chance that any of them falls below a
    level by luck is at most this level. What is nan stays so and does not count.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03, float("nan")])]
    [0.03, 0.06, 0.06, nan]
    """
    values = np.asarray(p, np.float64)
    order = np.argsort(values)[: int((~np.isnan(values)).sum())]  # nan sorts last
    corrected = np.full(len(values), np.nan)
    steps = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(value) for value in corrected]
