"""Differences between runs, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from mtrec_jax.models.calibration import Scaling
from mtrec_jax.studies.runs import Predicted, corrected_t_test, difference, predicted
from mtrec_jax.train.run import Run, load_answers, load_best


def said(labels: list[float], values: list[float], users: list[str], rows: list[int]) -> Predicted:
    """What a run says of a regression."""
    n = len(labels)
    given = {"stars": np.array(labels, float)}, {"stars": np.array(values, float)}
    return Predicted(np.array(users), np.array(rows), np.full(n, -1), *given)


def test_the_first_is_better_by_the_mean_over_pairs_whatever_the_order_of_rows() -> None:
    """RMSE: seed 0 has sqrt(4 / 2) and sqrt(16 / 2), seed 1 has 0 and sqrt(2 / 2)."""
    first = said([1, 2], [3, 2], ["a", "b"], [10, 11])
    second = said([2, 1], [2, 5], ["b", "a"], [11, 10])
    other = (said([1, 2], [1, 2], ["a", "b"], [10, 11]), said([1, 2], [2, 1], ["a", "b"], [10, 11]))
    found = difference([(first, second), other], "stars", "regression", "rmse", resamples=0)
    assert found.each == pytest.approx((8**0.5 - 2**0.5, 1.0))
    assert found.value == pytest.approx((8**0.5 - 2**0.5 + 1) / 2)
    assert found.verdict == "no difference", "no interval was asked for"


def test_an_interval_resamples_users_with_their_targets_in_all_pairs() -> None:
    """One user only: each resample is the sample itself."""
    pair = said([1, 2], [1, 2], ["a", "a"], [0, 1]), said([1, 2], [3, 2], ["a", "a"], [0, 1])
    found = difference([pair, pair], "stars", "regression", "rmse", resamples=20)
    assert (found.low, found.high) == (found.value, found.value) == (2**0.5, 2**0.5)
    assert found.verdict == "better"
    two = said([1, 2], [1, 2], ["a", "b"], [0, 1]), said([1, 2], [3, 2], ["a", "b"], [0, 1])
    assert difference([two], "stars", "regression", "rmse", resamples=50).low == 0, "b draws twice"


def test_ranks_and_missing_labels_count_where_they_are() -> None:
    user, row = np.array(["a", "b", "c"]), np.arange(3)
    one = Predicted(user, row, np.array([0, -1, 20]), {}, {})
    other = Predicted(user, row, np.array([2, -1, 0]), {}, {})
    found = difference([(one, other)], "next", "retrieval", "ndcg@10", resamples=0)
    assert found.value == pytest.approx((1 + 0) / 2 - (1 / 2 + 1) / 2)
    labels, values = {"like": np.array([1.0, 0, np.nan])}, {"like": np.array([0.9, 0.1, 0.5])}
    right = Predicted(user, row, np.full(3, -1), labels, values)
    wrong = right._replace(values={"like": 1 - values["like"]})
    assert difference([(right, wrong)], "like", "binary", "auc", resamples=0).value == 1


def test_runs_of_other_targets_are_no_pair() -> None:
    one, other = (said([1], [1], ["a"], [row]) for row in (0, 1))
    with pytest.raises(ValueError, match="different targets"):
        difference([(one, other)], "stars", "regression", "rmse")


def test_the_corrected_test_widens_the_variance_by_the_share_of_the_test_fold() -> None:
    """Of 1, 2, 3, 4: mean 2.5, variance 5 / 3; without overlap it is the plain t test."""
    values = [1.0, 2.0, 3.0, 4.0]
    assert corrected_t_test(values, 0.0) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    t = 2.5 / ((1 / 4 + 1 / 3) * 5 / 3) ** 0.5
    assert corrected_t_test(values, 1 / 3) == pytest.approx(2 * stats.t.sf(t, 3))
    assert np.isnan(corrected_t_test([1.0], 0.25))


def test_what_a_run_says_is_calibrated_where_its_evaluation_is(
    shop_run: Run, tmp_path: Path
) -> None:
    """Platt's gain and bias of the log-odds, by hand."""
    raw = predicted(shop_run, "test", tmp_path / "raw.parquet").values["click"]
    rules = replace(shop_run.experiment.evaluate, calibrate=True)
    run = replace(shop_run, experiment=replace(shop_run.experiment, evaluate=rules))
    found = predicted(run, "test", tmp_path / "told.parquet").values["click"]
    answers = load_answers(shop_run, load_best(shop_run)[2])
    assert answers is not None
    known = answers.calibration["click"]
    assert isinstance(known, Scaling)
    odds = known.gain * np.log(raw / (1 - raw)) + known.bias
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-odds)), rtol=1e-6)
    assert np.abs(found - raw).max() > 1e-4
