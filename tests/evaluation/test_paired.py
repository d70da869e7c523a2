"""Paired tests over users, beside SciPy's, DeLong's formula and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mtrec_jax.evaluation.metrics import Linear, Statistic, auc_statistic, mean_statistic
from mtrec_jax.evaluation.paired import holm, paired_difference, user_sums


def linear(statistic: Statistic) -> Linear:
    assert isinstance(statistic, Linear)
    return statistic


def test_sums_of_a_mean_are_plain_and_add_up_over_parts() -> None:
    values, users = np.array([0.5, 1.0, 0.0, 0.25]), np.array([4, 2, 4, 2])
    people, sizes, sums = user_sums(linear(mean_statistic(values)), users)
    assert (people.tolist(), sizes.tolist(), sums.tolist()) == ([2, 4], [2, 2], [1.25, 0.5])
    halves = [user_sums(linear(mean_statistic(values[h])), users[h]) for h in ([0, 1], [2, 3])]
    np.testing.assert_allclose(sum(half[2][::-1] for half in halves), [0.5, 1.25])


def test_with_equally_many_rows_it_is_the_paired_t_test() -> None:
    """Two rows a user: SciPy's test of the users' means."""
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 40))
    users = np.repeat(np.arange(20), 2)
    first, second = (
        user_sums(linear(mean_statistic(values)), users)[2] for values in (ours, theirs)
    )
    found = paired_difference(first, second, np.full(20, 2))
    means = [values.reshape(20, 2).mean(axis=1) for values in (ours, theirs)]
    expected = stats.ttest_rel(*means)
    assert found.mean == pytest.approx((means[0] - means[1]).mean())
    assert found.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_with_a_row_a_user_it_is_the_test_of_delong() -> None:
    """Their variance of a difference of AUCs from the shares of pairs won, all written out."""
    generator = np.random.default_rng(3)
    labels = np.arange(400) % 4 == 0
    scores = [generator.normal(size=400) + labels * shift for shift in (0.8, 0.5)]
    users = np.arange(400)
    first, second = (user_sums(linear(auc_statistic(labels, s)), users)[2] for s in scores)
    found = paired_difference(first, second, np.ones(400, int))
    of_positives, of_negatives = [], []
    for s in scores:
        won = (s[labels][:, None] > s[~labels]) + 0.5 * (s[labels][:, None] == s[~labels])
        of_positives.append(won.mean(axis=1))
        of_negatives.append(won.mean(axis=0))
    aucs = [won.mean() for won in of_positives]
    assert found.mean == pytest.approx(aucs[0] - aucs[1])
    variance = sum(np.var(v[0] - v[1], ddof=1) / len(v[0]) for v in (of_positives, of_negatives))
    error = (found.high - found.low) / 2 / stats.t.ppf(0.975, 399)
    assert error == pytest.approx(variance**0.5, rel=0.01)  # they divide by n - 1 in each class


def test_intervals_cover_the_truth_where_users_differ_in_size() -> None:
    """Users of 1 to 9 rows with effects of their own, which a test over rows would take for more
    evidence than there is: 95 % of the intervals hold the true difference, not 75 %."""
    generator = np.random.default_rng(5)
    covered, small = 0, 0
    for _ in range(200):
        sizes = generator.integers(1, 10, 60)
        users = np.repeat(np.arange(60), sizes)
        effect = generator.normal(0.1, 1, 60)[users]  # of a user, on every row
        values = generator.normal(size=len(users))
        first, second = (np.bincount(users, v) for v in (values + effect, values))
        found = paired_difference(first, second, sizes)
        covered += found.low <= 0.1 <= found.high
        small += paired_difference(first - 0.1 * sizes, second, sizes).p < 0.05
    assert 182 <= covered <= 198
    assert 3 <= small <= 18, "without a difference p is below .05 about one time in twenty"


def test_what_can_be_said_of_few_or_equal_users() -> None:
    one = paired_difference(np.array([1.0, 0.0]), np.array([0.5, 0.0]), np.array([2, 0]))
    assert one.mean == 0.25
    assert np.isnan(one[1:]).all(), "one user, no spread"
    same = np.array([1.0, 2.0, 0.1])
    assert paired_difference(same, same, np.ones(3, int)) == (0, 0, 0, 1)
    moved = paired_difference(same + 0.5, same, np.ones(3, int))
    assert moved == pytest.approx((0.5, 0.5, 0.5, 0))
    undefined = paired_difference(same, np.full(3, np.nan), np.ones(3, int))
    assert np.isnan(undefined).all()
    assert np.isnan(paired_difference(same[:0], same[:0], np.zeros(0, int))).all()


def test_holm_by_hand() -> None:
    """.01 * 4, .02 * 3, .03 * 2 raised to .06, .5; in the order in which they came."""
    assert holm([0.5, 0.02, 0.01, 0.03]) == pytest.approx([0.5, 0.06, 0.04, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []
