"""Metrics against scikit-learn, hand-computed values and naive resampling."""

from __future__ import annotations

import time

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.config import metrics_of
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation import metrics
from mtrec_jax.evaluation.metrics import Statistic

BINARY_ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=40
)


def _columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores, weights = np.array(rows).T
    return labels.astype(np.float32), scores / 8 + 0.1, weights.astype(np.float64)


def _both_classes(labels: np.ndarray, weights: np.ndarray) -> bool:
    return len(np.unique(labels[weights > 0])) == 2


def _value(statistic: Statistic, n: int, weights: np.ndarray | None = None) -> float:
    return statistic(np.ones(n) if weights is None else weights)


@settings(deadline=None)
@given(BINARY_ROWS)
def test_auc_with_ties_and_weights_is_that_of_scikit_learn(rows: list) -> None:
    labels, scores, weights = _columns(rows)
    for weight in (None, weights):
        counted = np.ones(len(labels)) if weight is None else weight
        ours = metrics.auc_statistic(labels, scores)(counted)
        if _both_classes(labels, counted):
            theirs = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weight)
            assert ours == pytest.approx(theirs, abs=1e-12)
        else:
            assert np.isnan(ours)


@settings(deadline=None)
@given(BINARY_ROWS)
def test_auc_depends_on_the_order_of_scores_alone(rows: list) -> None:
    labels, scores, _ = _columns(rows)
    same = metrics.auc(labels, np.exp(3 * scores))
    opposite = metrics.auc(labels, -scores)
    ours = metrics.auc(labels, scores)
    np.testing.assert_array_equal(ours, same)
    np.testing.assert_allclose(opposite, 1 - ours, atol=1e-12)


@settings(deadline=None)
@given(BINARY_ROWS)
def test_log_loss_and_accuracy_are_those_of_scikit_learn(rows: list) -> None:
    labels, probabilities, weights = _columns(rows)
    for weight in (None, weights):
        loss = _value(metrics.log_loss(labels, probabilities), len(labels), weight)
        if weight is not None and not weight.sum():
            assert np.isnan(loss)
            continue
        theirs = sklearn.metrics.log_loss(
            labels, probabilities, sample_weight=weight, labels=[0, 1]
        )
        assert loss == pytest.approx(theirs, abs=1e-12)
        classes = (probabilities >= 0.5).astype(np.float32)
        hits = sklearn.metrics.accuracy_score(labels, classes, sample_weight=weight)
        ours = _value(metrics.accuracy(labels, probabilities), len(labels), weight)
        assert ours == pytest.approx(hits, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 5))
def test_regression_and_multiclass_are_those_of_scikit_learn(seed: int, n: int, c: int) -> None:
    generator = np.random.default_rng(seed)
    truth, guess, weights = generator.normal(size=(3, n))
    weights = np.abs(weights)
    squared = sklearn.metrics.mean_squared_error(truth, guess, sample_weight=weights)
    assert metrics.rmse(truth, guess)(weights) == pytest.approx(squared**0.5, abs=1e-12)
    absolute = sklearn.metrics.mean_absolute_error(truth, guess)
    assert metrics.mae(truth, guess)(np.ones(n)) == pytest.approx(absolute, abs=1e-12)

    labels = generator.integers(0, c, n)
    probabilities = generator.dirichlet(np.ones(c), n)
    ours = metrics.task_metrics("multiclass", labels.astype(np.float32), probabilities)
    theirs = sklearn.metrics.log_loss(labels, probabilities, labels=range(c))
    assert ours["log_loss"] == pytest.approx(theirs, abs=1e-12)
    assert ours["accuracy"] == pytest.approx(np.mean(probabilities.argmax(1) == labels))


def test_log_loss_of_certain_and_wrong_predictions_is_finite() -> None:
    wrong = metrics.log_loss(np.array([0, 1]), np.array([1, 0], np.float32))(np.ones(2))
    assert wrong == pytest.approx(-np.log(np.finfo(np.float32).eps))


@pytest.mark.parametrize("kind", ["binary", "regression", "multiclass"])
def test_task_metrics_have_the_names_of_the_configuration(kind: str) -> None:
    shape = (4, 3) if kind == "multiclass" else (4,)
    labels = np.array([0.0, 1, 1, 0])
    assert list(metrics.task_metrics(kind, labels, np.full(shape, 0.3))) == metrics_of(kind, ())
    empty = metrics.task_metrics(kind, labels[:0], np.zeros((0, *shape[1:])))
    assert all(np.isnan(value) for value in empty.values())
    broken = metrics.task_metrics(kind, labels, np.full(shape, np.nan))
    assert all(np.isnan(value) for value in broken.values())


def test_binary_task_metrics_on_a_case_by_hand() -> None:
    labels, probabilities = np.array([0.0, 0, 1, 1]), np.array([0.1, 0.6, 0.5, 0.9])
    found = metrics.task_metrics("binary", labels, probabilities)
    assert found["auc"] == 0.75  # of 4 pairs, (0.6, 0.5) is wrong
    assert found["accuracy"] == 0.75  # 0.6 is wrong; 0.5 counts as 1
    assert found["log_loss"] == pytest.approx(-np.log([0.9, 0.4, 0.5, 0.9]).mean())
    assert found["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.5 + 0.1) / 4)


def test_ranking_metrics_by_hand() -> None:
    ranks = np.array([0, 1, 3, 10, 10**9])
    found = metrics.ranking_metrics(ranks, [1, 4])
    assert list(found) == metrics_of("retrieval", [1, 4])
    assert found["hr@1"] == found["ndcg@1"] == found["mrr@1"] == pytest.approx(1 / 5)
    assert found["hr@4"] == found["recall@4"] == pytest.approx(3 / 5)
    assert found["ndcg@4"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(5)) / 5)
    assert found["mrr@4"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 5)
    assert all(np.isnan(value) for value in metrics.ranking_metrics(ranks[:0], [10]).values())


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 10))
def test_ndcg_is_that_of_scikit_learn(rank: int, k: int) -> None:
    scores = -np.arange(10.0)[None]
    relevant = (np.arange(10) == rank)[None]
    theirs = sklearn.metrics.ndcg_score(relevant, scores, k=k)
    assert metrics.ndcg(np.array([rank]), k)(np.ones(1)) == pytest.approx(theirs)


def test_errors_say_what_is_wrong() -> None:
    ones = np.ones(2)
    with pytest.raises(DataError, match=r"label 3.0 is neither 0 nor 1; .*at_least"):
        metrics.auc(np.array([0.0, 3.0]), ones)
    with pytest.raises(DataError, match="label nan is neither 0 nor 1"):
        metrics.log_loss(np.array([0.0, np.nan]), ones)
    with pytest.raises(DataError, match=r"label 2.0 is not a class number 0 \.\. 1"):
        metrics.log_loss(np.array([0.0, 2.0]), np.full((2, 2), 0.5))
    with pytest.raises(DataError, match="ranks start at 0, found -1"):
        metrics.ranking_metrics(np.array([-1]), [10])
    with pytest.raises(ConfigError, match="retrieval is measured by ranking_metrics"):
        metrics.task_metrics("retrieval", ones, ones)


# ---- calibration ----


@settings(deadline=None)
@given(BINARY_ROWS, st.integers(1, 20))
def test_calibration_error_is_the_mean_gap_of_bins_of_equal_predictions(
    rows: list, bins: int
) -> None:
    """Each row is in the bin of the middle of the ranks of its prediction, slowly."""
    labels, probabilities, _ = _columns(rows)
    ordered, n = sorted(probabilities.tolist()), len(rows)
    members: dict[int, list[int]] = {}
    for row, value in enumerate(probabilities.tolist()):
        places = [place for place, other in enumerate(ordered) if other == value]
        members.setdefault((places[0] + places[-1]) * bins // (2 * n), []).append(row)
    gaps = [
        len(inside) / n * abs(np.mean(probabilities[inside] - labels[inside].astype(float)))
        for inside in members.values()
    ]
    found = _value(metrics.calibration_error(labels, probabilities, bins), n)
    assert found == pytest.approx(sum(gaps), abs=1e-12)


def test_equal_predictions_share_a_bin() -> None:
    labels = np.array([1, 1, 0, 0, 0])
    assert _value(metrics.calibration_error(labels, np.full(5, 0.5)), 5) == pytest.approx(0.1)


def test_calibration_error_of_a_calibrated_model_is_near_zero() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.random(50_000)
    labels = (generator.random(50_000) < probabilities).astype(np.float32)
    n = len(labels)
    assert _value(metrics.calibration_error(labels, probabilities), n) < 0.01
    half = _value(metrics.calibration_error(labels, probabilities / 2), n)
    assert half == pytest.approx(0.25, abs=0.01)


# ---- bootstrap ----


def test_weighted_resamples_equal_naive_resampling_of_rows() -> None:
    generator = np.random.default_rng(3)
    n, resamples, seed = 60, 40, 11
    labels = generator.integers(0, 2, n)
    scores = np.round(generator.random(n), 1)  # with ties
    draws = np.random.default_rng(seed)
    rows = [draws.integers(0, n, n) for _ in range(resamples)]

    def naive(metric: str) -> list[float]:
        return [metrics.task_metrics("binary", labels[r], scores[r])[metric] for r in rows]

    for metric in ("auc", "log_loss", "accuracy"):
        statistic = metrics.task_statistics("binary", labels, scores)[metric]
        found = metrics.bootstrap_interval(statistic, n, resamples, seed)
        np.testing.assert_allclose(found, np.percentile(naive(metric), (2.5, 97.5)), atol=1e-12)


def test_users_are_drawn_with_all_of_their_targets() -> None:
    """Two users of three equal targets each: 0 or 1 of both or of one, so 0, 1/2 and 1 come up as
    often as two coins say; independent targets would not reach 0 and 1 so often."""
    values, users = np.array([0.0, 0, 0, 1, 1, 1]), np.array([7, 7, 7, 2, 2, 2])
    mean, seen = metrics.mean_statistic(values), set()

    def recorded(weights: np.ndarray) -> float:
        assert len(set(weights[:3])) == len(set(weights[3:])) == 1, "a user comes whole"
        assert weights[0] + weights[3] == 2, "as many users as there are"
        seen.add(mean(weights))
        return mean(weights)

    assert metrics.bootstrap_interval(recorded, 6, 200, groups=users) == (0.0, 1.0)
    assert seen == {0.0, 0.5, 1.0}
    low, high = metrics.bootstrap_interval(mean, 6, 2000)
    assert (low, high) == (pytest.approx(1 / 6, abs=0.17), pytest.approx(5 / 6, abs=0.17))


def test_targets_without_a_user_are_drawn_one_by_one() -> None:
    values = np.random.default_rng(0).normal(size=50)
    mean = metrics.mean_statistic(values)
    nobody = metrics.bootstrap_interval(mean, 50, 40, groups=np.full(50, -1))
    assert nobody == metrics.bootstrap_interval(mean, 50, 40)


def test_unequal_users_weigh_by_their_targets() -> None:
    """Three users of 1, 2 and 3 targets whose values are their numbers: every resample's mean is
    the weighted one of some three users."""
    users = np.array([10, 20, 20, 30, 30, 30])
    values = np.array([1.0, 2, 2, 3, 3, 3])
    possible = {
        (a + 4 * b + 9 * c) / (a + 2 * b + 3 * c)
        for a in range(4)
        for b in range(4 - a)
        for c in (3 - a - b,)
    }
    mean = metrics.mean_statistic(values)

    def recorded(weights: np.ndarray) -> float:
        assert min(abs(mean(weights) - value) for value in possible) < 1e-12
        return mean(weights)

    assert metrics.bootstrap_interval(recorded, 6, 300, groups=users) == (1.0, 3.0)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 2000)
    low, high = metrics.bootstrap_interval(metrics.mean_statistic(values), 2000, 2000, seed=1)
    error = values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):  # AUC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = 0.76025
        labels = np.arange(150) % 2
        scores = generator.normal(size=150) + labels
        statistic = metrics.auc_statistic(labels, scores)
        low, high = metrics.bootstrap_interval(statistic, 150, 200, seed=trial)
        covered += low <= 0.76025 <= high
    assert 180 <= covered <= 198


def test_interval_is_repeatable_and_undefined_without_rows_or_resamples() -> None:
    statistic = metrics.auc_statistic(np.array([0, 0, 0, 1]), np.array([1.0, 2, 3, 4]))
    first = metrics.bootstrap_interval(statistic, 4, 50, seed=1)
    assert first == metrics.bootstrap_interval(statistic, 4, 50, seed=1) == (1.0, 1.0)
    assert np.isnan(metrics.bootstrap_interval(statistic, 4, 0)).all()
    assert np.isnan(metrics.bootstrap_interval(metrics.mean_statistic(np.zeros(0)), 0)).all()
    one_class = metrics.auc_statistic(np.zeros(3), np.zeros(3))
    assert np.isnan(metrics.bootstrap_interval(one_class, 3)).all()


def test_bootstrap_of_a_large_test_set_takes_seconds() -> None:
    generator = np.random.default_rng(0)
    labels, scores = generator.integers(0, 2, 100_000), generator.random(100_000)
    start = time.perf_counter()
    metrics.bootstrap_interval(metrics.auc_statistic(labels, scores), 100_000, 200)
    assert time.perf_counter() - start < 8  # about 0.5 s
