"""Metrics against scikit-learn, hand-computed values and naive resampling."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.config import selection
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation import metrics
from mtrec_jax.evaluation.metrics import metrics_of
from mtrec_jax.experiments import load_experiment

BINARY_ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=40
)


def _columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels, scores, weights = np.array(rows).T
    return labels.astype(np.float32), scores / 8 + 0.1, weights.astype(np.float64)


def _both_classes(labels: np.ndarray, weights: np.ndarray) -> bool:
    return len(np.unique(labels[weights > 0])) == 2


@settings(deadline=None)
@given(BINARY_ROWS)
def test_auc_with_ties_and_weights_is_that_of_scikit_learn(rows: list) -> None:
    labels, scores, weights = _columns(rows)
    for weight in (None, weights):
        counted = np.ones(len(labels)) if weight is None else weight
        ours = metrics.auc(labels, scores, weight)
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


@settings(deadline=None, max_examples=50)
@given(BINARY_ROWS)
def test_log_loss_and_accuracy_are_those_of_scikit_learn(rows: list) -> None:
    labels, probabilities, weights = _columns(rows)
    statistics = metrics.task_statistics("binary", labels, probabilities)
    for weight in (np.ones(len(labels)), weights):
        if not weight.sum():
            assert np.isnan(statistics["log_loss"](weight))
            continue
        theirs = sklearn.metrics.log_loss(
            labels, probabilities, sample_weight=weight, labels=[0, 1]
        )
        assert statistics["log_loss"](weight) == pytest.approx(theirs, abs=1e-12)
        classes = (probabilities >= 0.5).astype(np.float32)
        hits = sklearn.metrics.accuracy_score(labels, classes, sample_weight=weight)
        assert statistics["accuracy"](weight) == pytest.approx(hits, abs=1e-12)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 5))
def test_regression_and_multiclass_are_those_of_scikit_learn(seed: int, n: int, c: int) -> None:
    generator = np.random.default_rng(seed)
    truth, guess, weights = generator.normal(size=(3, n))
    weights = np.abs(weights)
    statistics = metrics.task_statistics("regression", truth, guess)
    squared = sklearn.metrics.mean_squared_error(truth, guess, sample_weight=weights)
    assert statistics["rmse"](weights) == pytest.approx(squared**0.5, abs=1e-12)
    absolute = sklearn.metrics.mean_absolute_error(truth, guess, sample_weight=weights)
    assert statistics["mae"](weights) == pytest.approx(absolute, abs=1e-12)

    labels = generator.integers(0, c, n)
    probabilities = generator.dirichlet(np.ones(c), n)
    ours = metrics.task_metrics("multiclass", labels.astype(np.float32), probabilities)
    theirs = sklearn.metrics.log_loss(labels, probabilities, labels=range(c))
    assert ours["log_loss"] == pytest.approx(theirs, abs=1e-12)
    assert ours["accuracy"] == pytest.approx(np.mean(probabilities.argmax(1) == labels))


def test_log_loss_of_certain_and_wrong_predictions_is_finite() -> None:
    wrong = metrics.task_metrics("binary", np.array([0, 1]), np.array([1, 0], np.float32))
    assert wrong["log_loss"] == pytest.approx(-np.log(np.finfo(np.float32).eps))


def _concordant(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> float:
    """XAUC by its definition, pair by pair."""
    good = pairs = 0.0
    for i in range(len(labels)):
        for j in range(len(labels)):
            if labels[i] > labels[j]:
                weight = weights[i] * weights[j]
                pairs += weight
                above = predictions[i] > predictions[j]
                good += weight * (above + 0.5 * (predictions[i] == predictions[j]))
    return good / pairs if pairs else float("nan")


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=40
    )
)
def test_xauc_is_the_share_of_pairs_in_order(rows: list) -> None:
    labels, predictions, weights = _columns(rows)
    found = metrics.xauc_statistic(labels, predictions)(weights)
    np.testing.assert_allclose(found, _concordant(labels, predictions, weights), rtol=1e-12)
    binary = (labels > 4).astype(np.float32)
    found = metrics.xauc_statistic(binary, predictions)(weights)
    np.testing.assert_allclose(found, metrics.auc(binary, predictions, weights), rtol=1e-12)


def test_xauc_by_hand() -> None:
    """Of 60, 30, 30 and 0 seconds five pairs differ. Predicted are 40, 50, 10 and 10: 60 above the
    second 30 and above 0, the first 30 above 0, and the other ties with it: 3.5 of 5."""
    watched, predicted = np.array([60.0, 30, 30, 0]), np.array([40.0, 50, 10, 10])
    found = metrics.task_metrics("watch_time", watched, predicted)
    assert list(found) == metrics_of("watch_time", ())
    assert found == pytest.approx({"mae": 17.5, "rmse": 325**0.5, "xauc": 0.7})
    undefined = metrics.xauc_statistic(watched, np.array([1.0, 2, 3, np.nan]))(np.ones(4))
    assert np.isnan(undefined)


def test_ordered_classes_are_judged_as_numbers_and_as_classes() -> None:
    """Labels 1 and 5 of 1, 2 and 5. Expected are .5 + .6 + 1 = 2.1 and .1 + .2 + 4 = 4.3; the most
    probable classes are the right ones."""
    labels = np.array([1.0, 5.0], np.float32)
    p = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    found = metrics.task_metrics("ordinal", labels, p, numbers=(1, 2, 5))
    assert list(found) == metrics_of("ordinal", ())
    expected = {"rmse": ((1.1**2 + 0.7**2) / 2) ** 0.5, "mae": 0.9}
    classes = {"log_loss": -(np.log(0.5) + np.log(0.8)) / 2, "accuracy": 1.0}
    assert found == pytest.approx(expected | classes)
    numbers = metrics.task_metrics("ordinal", labels, np.array([2.1, 4.3]), numbers=(1, 2, 5))
    assert numbers == pytest.approx(expected)  # of a prediction that is a number these alone
    with pytest.raises(DataError, match=r"ordinal: labels \(2,\), predictions \(2, 3\) and 0 num"):
        metrics.task_metrics("ordinal", labels, p)


@pytest.mark.parametrize("kind", ["binary", "regression", "multiclass"])
def test_task_metrics_have_the_names_of_the_configuration(kind: str) -> None:
    shape = (4, 3) if kind == "multiclass" else (4,)
    labels = np.array([0.0, 1, 1, 0])
    users = np.array([7, 7, 8, 8])
    alone = metrics.task_metrics(kind, labels, np.full(shape, 0.3))
    assert list(alone) == metrics_of(kind, [2], users=False)
    found = metrics.task_metrics(kind, labels, np.full(shape, 0.3), users, [2])
    assert list(found) == metrics_of(kind, [2])
    empty = metrics.task_metrics(kind, labels[:0], np.zeros((0, *shape[1:])), users[:0], [2])
    assert all(np.isnan(value) for value in empty.values())
    broken = metrics.task_metrics(kind, labels, np.full(shape, np.nan), users, [2])
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
    ours = metrics.ranking_metrics(np.array([rank]), [k])
    assert ours[f"ndcg@{k}"] == pytest.approx(theirs)


def test_a_metric_of_ones_own_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured, may choose the checkpoint, and its direction is known."""

    def worst(labels: np.ndarray, predictions: np.ndarray) -> metrics.Statistic:
        return lambda weights: float(np.max(np.abs(labels - predictions)[weights > 0]))

    line = metrics.Metric(worst, larger_is_better=False)
    monkeypatch.setitem(metrics.METRICS["regression"], "worst", line)
    found = metrics.task_metrics("regression", np.array([1.0, 5.0]), np.array([2.0, 8.0]))
    assert found["worst"] == 3
    experiment = load_experiment("shop", ["select.metric=stars/worst"])
    assert selection(experiment) == ((("stars", "worst"),), False, ())


# ---- within users, precision and recall, entropy, clicks over predicted ones ----

PEOPLE = np.array([3, 3, 3, 5, 5, 5, 5, 8, 8, 9])
LABELS = np.array([1, 0, 0, 1, 1, 0, 0, 1, 1, 0])
SCORES = np.array([0.5, 0.4, 0.9, 0.7, 0.2, 0.2, 0.1, 0.3, 0.6, 0.8])


def test_gauc_by_hand() -> None:
    """User 3: of two pairs one is won. User 5: of four pairs .7 wins two, .2 wins one and ties one.
    Users 8 and 9 have one class. Weighted by rows: (3 * 1/2 + 4 * 7/8) / 7."""
    statistic = metrics.gauc_statistic(LABELS, SCORES, PEOPLE)
    assert statistic(np.ones(10)) == pytest.approx((3 / 2 + 4 * 7 / 8) / 7)
    # user 3 drawn twice, user 5 never, those of one class are no matter
    assert statistic(np.array([2, 2, 2, 0, 0, 0, 0, 9, 9, 1])) == pytest.approx(1 / 2)
    assert np.isnan(statistic(np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 1])))


@settings(deadline=None, max_examples=40)
@given(BINARY_ROWS, st.integers(0, 2**32 - 1))
def test_gauc_is_the_mean_of_scikit_learns_aucs(rows: list, seed: int) -> None:
    labels, scores, _ = _columns(rows)
    users = np.random.default_rng(seed).integers(-2, 3, len(labels))
    parts = []
    for user in np.unique(users):
        own = users == user
        if len(np.unique(labels[own])) == 2:
            parts.append((sklearn.metrics.roc_auc_score(labels[own], scores[own]), own.sum()))
    found = metrics.gauc_statistic(labels, scores, users)(np.ones(len(labels)))
    if parts:
        values, sizes = np.array(parts).T
        assert found == pytest.approx(np.average(values, weights=sizes), abs=1e-12)
    else:
        assert np.isnan(found)


def test_ndcg_of_impressions_by_hand() -> None:
    """At 2. User 3: the click is second, 1 / log2(3) of an ideal 1. User 5: the first click is
    first, the second ties for places two and three, of which one counts: (1 + 1/2 / log2(3)) of an
    ideal 1 + 1 / log2(3). Users 8 and 9 have one class. Each list counts once."""
    second = 1 / np.log2(3)
    expected = (second + (1 + second / 2) / (1 + second)) / 2
    statistic = metrics.list_ndcg_statistic(LABELS, SCORES, PEOPLE, 2)
    assert statistic(np.ones(10)) == pytest.approx(expected)
    assert statistic((PEOPLE == 3) * 5.0) == pytest.approx(second)
    assert statistic(np.where(PEOPLE == 5, 3.0, 1.0)) == pytest.approx(
        (second + 3 * (1 + second / 2) / (1 + second)) / 4
    )


@settings(deadline=None, max_examples=40)
@given(BINARY_ROWS, st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_ndcg_of_impressions_is_scikit_learns_of_each_list(rows: list, seed: int, k: int) -> None:
    labels, scores, _ = _columns(rows)
    users = np.random.default_rng(seed).integers(0, 4, len(labels))
    lists = [users == user for user in np.unique(users)]
    values = [
        sklearn.metrics.ndcg_score(labels[own][None], scores[own][None], k=k)
        for own in lists
        if len(np.unique(labels[own])) == 2
    ]
    found = metrics.list_ndcg_statistic(labels, scores, users, k)(np.ones(len(labels)))
    assert found == pytest.approx(np.mean(values) if values else np.nan, abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=40)
@given(BINARY_ROWS)
def test_average_precision_with_ties_and_weights_is_that_of_scikit_learn(rows: list) -> None:
    labels, scores, weights = _columns(rows)
    statistic = metrics.average_precision_statistic(labels, scores)
    for weight in (np.ones(len(labels)), weights):
        if (weight * labels).sum():
            theirs = sklearn.metrics.average_precision_score(labels, scores, sample_weight=weight)
            assert statistic(weight) == pytest.approx(theirs, abs=1e-12)
        else:
            assert np.isnan(statistic(weight))


def test_normalised_entropy_and_copc_by_hand() -> None:
    """One click in four: the entropy of 1/4. Predicted are 1.5 clicks."""
    labels, probabilities = np.array([1, 0, 0, 0]), np.array([0.5, 0.5, 0.25, 0.25])
    found = metrics.task_metrics("binary", labels, probabilities)
    entropy = -(np.log(1 / 4) / 4 + 3 * np.log(3 / 4) / 4)
    loss = -(np.log(1 / 2) * 2 + np.log(3 / 4) * 2) / 4
    assert found["ne"] == pytest.approx(loss / entropy)
    assert found["copc"] == pytest.approx(1 / 1.5)
    theirs = 1 - sklearn.metrics.d2_log_loss_score(labels, probabilities)
    assert found["ne"] == pytest.approx(theirs)
    constant = metrics.task_metrics("binary", labels, np.full(4, 0.25))
    assert constant["ne"] == pytest.approx(1)
    assert constant["copc"] == 1
    one_class = metrics.task_metrics("binary", np.ones(2), np.full(2, 0.5))
    assert np.isnan(one_class["ne"])
    assert one_class["copc"] == 2


def test_a_reliability_diagram_by_hand() -> None:
    """Two bins: .1, .2, .2 with one click, .6 and .8 with one; its gaps are the calibration error.

    Places 0, 1-2, 3, 4 of 5: their middles, doubled, 0, 3, 6, 8, make bins 0, 0, 1, 1 of 2.
    """
    labels, probabilities = np.array([0, 1, 0, 1, 0]), np.array([0.1, 0.2, 0.2, 0.6, 0.8])
    low, high = metrics.reliability(labels, probabilities, 2)
    assert low == pytest.approx({"predicted": 0.5 / 3, "observed": 1 / 3, "targets": 3})
    assert high == pytest.approx({"predicted": 0.7, "observed": 0.5, "targets": 2})
    gaps = [abs(b["predicted"] - b["observed"]) * b["targets"] / 5 for b in (low, high)]
    assert sum(gaps) == pytest.approx(_calibration_error(labels, probabilities, 2))
    assert metrics.reliability(labels[:0], probabilities[:0]) == []


@pytest.mark.parametrize("name", [*metrics_of("binary", [2]), "rmse", "mae"])
def test_rows_of_a_statistic_are_its_derivatives(name: str) -> None:
    """n times the change of the value with the weight of each row, by central differences."""
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 2, 30)
    predictions = np.round(np.clip(generator.random(30) + labels / 5, 0.05, 0.95), 1)  # with ties
    users = generator.integers(0, 6, 30)
    found = metrics.task_statistics("binary", labels, predictions, users, [2])
    found |= metrics.task_statistics("regression", 3.0 * labels, predictions)
    statistic, ones = found[name], np.ones(30)
    if name == "calibration_error":
        assert not isinstance(statistic, metrics.Linear), "it has a kink where a gap is 0"
        return
    assert isinstance(statistic, metrics.Linear)
    step = 1e-6 * np.eye(30)
    slopes = [(statistic(ones + s) - statistic(ones - s)) / 2e-6 for s in step]
    np.testing.assert_allclose(statistic.rows(), statistic(ones) + 30 * np.array(slopes), atol=1e-6)
    assert statistic.rows().mean() == pytest.approx(statistic(ones))


def test_errors_say_what_is_wrong() -> None:
    ones = np.ones(2)
    with pytest.raises(DataError, match=r"label 3.0 is neither 0 nor 1; .*at_least"):
        metrics.auc(np.array([0.0, 3.0]), ones)
    with pytest.raises(DataError, match="label nan is neither 0 nor 1"):
        metrics.task_metrics("binary", np.array([0.0, np.nan]), ones)
    with pytest.raises(DataError, match=r"label 2.0 is not a class number 0 \.\. 1"):
        metrics.task_metrics("multiclass", np.array([0.0, 2.0]), np.full((2, 2), 0.5))
    with pytest.raises(DataError, match="ranks start at 0, found -1"):
        metrics.ranking_metrics(np.array([-1]), [10])
    with pytest.raises(ConfigError, match="retrieval is measured by ranking_metrics"):
        metrics.task_metrics("retrieval", ones, ones)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_weights_of_another_length_are_refused(n: int) -> None:
    """One weight alone would count for every row, and the rest of a longer array for none."""
    labels, values = np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.8, 0.4])
    statistics = {
        **metrics.task_statistics("binary", labels, values),
        **metrics.task_statistics("regression", labels, values),
        **metrics.ranking_statistics(np.array([0, 1, 2]), [2]),
    }
    for statistic in statistics.values():
        with pytest.raises(DataError, match=rf"weights \({n},\) and 3 rows"):
            statistic(np.ones(n))
        assert np.isfinite(statistic(np.ones(3)))


def test_logits_are_no_probabilities() -> None:
    labels = np.array([0.0, 1.0])
    for wrong in ([-0.1, 0.5], [0.2, 1.5], [-3.0, 2.0]):
        with pytest.raises(DataError, match=r"is no probability .* sigmoid\(logits\)"):
            metrics.task_metrics("binary", labels, np.array(wrong))
        with pytest.raises(DataError, match=r"is no probability .* sigmoid\(logits\)"):
            metrics.calibration_statistic(labels, np.array(wrong))
        assert metrics.auc(labels, np.array(wrong)) == 1  # only the order matters
    with pytest.raises(DataError, match=r"is no probability .* softmax\(logits\)"):
        metrics.task_metrics("multiclass", labels, np.array([[2.0, -1.0], [0.0, 1.0]]))
    certain = metrics.task_metrics("binary", labels, labels)
    assert (certain["accuracy"], certain["calibration_error"]) == (1, 0)


# ---- calibration ----


def _calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> float:
    return metrics.calibration_statistic(labels, probabilities, bins)(np.ones(len(labels)))


@settings(deadline=None)
@given(BINARY_ROWS, st.integers(1, 20))
def test_calibration_error_is_the_mean_gap_of_the_bins(rows: list, bins: int) -> None:
    """A row's bin is where the middle of the places of all equal predictions falls."""
    labels, probabilities, _ = _columns(rows)
    labels = labels.astype(np.float64)
    places = [np.flatnonzero(np.sort(probabilities) == p) for p in probabilities]
    bin_of = np.array([(p[0] + p[-1]) * bins // (2 * len(labels)) for p in places])
    gaps = [
        abs(probabilities[bin_of == b].mean() - labels[bin_of == b].mean()) * np.mean(bin_of == b)
        for b in np.unique(bin_of)
    ]
    found = _calibration_error(labels, probabilities, bins)
    assert found == pytest.approx(sum(gaps), abs=1e-12)
    backwards = _calibration_error(labels[::-1], probabilities[::-1], bins)
    assert found == pytest.approx(backwards, abs=1e-12)


def test_bins_hold_equally_many_rows_and_equal_predictions_share_one() -> None:
    # two bins of two rows, far from equally wide: |0.05 - 0.5| / 2 + |0.65 - 0.5| / 2
    labels, spread = np.array([0, 1, 0, 1]), np.array([0.0, 0.1, 0.4, 0.9])
    assert _calibration_error(labels, spread, 2) == pytest.approx(0.3)
    labels = np.array([1, 1, 0, 0, 0])
    assert _calibration_error(labels, np.full(5, 0.5)) == pytest.approx(0.1)


def test_calibration_error_of_a_calibrated_model_is_near_zero() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.random(50_000)
    labels = (generator.random(50_000) < probabilities).astype(np.float32)
    assert _calibration_error(labels, probabilities) < 0.01
    assert _calibration_error(labels, probabilities / 2) == pytest.approx(0.25, abs=0.01)


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
        found = metrics.bootstrap_interval(statistic, np.arange(n), resamples, seed)
        np.testing.assert_allclose(found, np.percentile(naive(metric), (2.5, 97.5)), atol=1e-12)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(5, 2, 2000)
    everyone = np.arange(2000)
    low, high = metrics.bootstrap_interval(metrics.mean_statistic(values), everyone, 2000, seed=1)
    error = values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


@pytest.mark.slow
def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for trial in range(200):  # AUC of N(1, 1) against N(0, 1) is Phi(1 / sqrt 2) = 0.76025
        labels = np.arange(150) % 2
        scores = generator.normal(size=150) + labels
        statistic = metrics.auc_statistic(labels, scores)
        low, high = metrics.bootstrap_interval(statistic, np.arange(150), 200, seed=trial)
        covered += low <= 0.76025 <= high
    assert 180 <= covered <= 198


def test_users_are_resampled_with_all_of_their_targets() -> None:
    """Two users, four targets each, all alike within a user: as if there were two draws of two.

    A resample is the first user twice, both, or the second twice: 1/4, 1/2, 1/4. So the interval
    is the whole range. Resampled as eight targets, their mean is never as low as 0 or as high as 1
    that often.
    """
    users, values = np.repeat([7, 3], 4), np.repeat([0.0, 1.0], 4)
    statistic = metrics.mean_statistic(values)
    drawn = []

    def watched(weights: np.ndarray) -> float:
        drawn.append(weights.tolist())
        return statistic(weights)

    assert metrics.bootstrap_interval(watched, users, 400) == (0, 1)
    assert {tuple(w) for w in drawn} == {(0, 0, 0, 0, 2, 2, 2, 2), (1,) * 8, (2,) * 4 + (0,) * 4}
    assert drawn.count([1.0] * 8) / 400 == pytest.approx(0.5, abs=0.1)
    low, high = metrics.bootstrap_interval(statistic, np.arange(8), 400)
    assert 0 < low < 0.5 < high < 1


def test_a_paired_interval_is_of_the_difference_on_the_same_draws() -> None:
    generator = np.random.default_rng(5)
    values = generator.normal(size=50)
    ours, theirs = metrics.mean_statistic(values + 0.25), metrics.mean_statistic(values)
    low, high = metrics.bootstrap_interval(lambda w: ours(w) - theirs(w), np.arange(50))
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(0.25)


def test_interval_is_repeatable_and_undefined_without_rows_or_resamples() -> None:
    statistic = metrics.auc_statistic(np.array([0, 0, 0, 1]), np.array([1.0, 2, 3, 4]))
    first = metrics.bootstrap_interval(statistic, np.arange(4), 50, seed=1)
    assert first == metrics.bootstrap_interval(statistic, np.arange(4), 50, seed=1) == (1.0, 1.0)
    assert np.isnan(metrics.bootstrap_interval(statistic, np.arange(4), 0)).all()
    nothing = np.zeros(0, np.int64)
    assert np.isnan(metrics.bootstrap_interval(metrics.mean_statistic(nothing), nothing)).all()
    one_class = metrics.auc_statistic(np.zeros(3), np.zeros(3))
    assert np.isnan(metrics.bootstrap_interval(one_class, np.arange(3))).all()
