"""Differences between runs, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

import mtrec_jax
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.experiments import overridden, parse_experiment
from mtrec_jax.models.calibration import Scaling
from mtrec_jax.studies import runs
from mtrec_jax.studies.runs import (
    Predicted,
    corrected_t_test,
    difference,
    ensemble,
    metrics_by_run,
    predicted,
    trained,
)
from mtrec_jax.train.run import Run, best_step, load_answers, load_best


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


KINDS = ("binary", "regression", "multiclass", "ordinal", "watch_time")


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Prepared]:
    """160 rows with a task of every kind but retrieval, all of one number."""
    x = np.random.default_rng(0).normal(size=160)
    labels = {
        "binary": (x > 0).astype(np.int64),
        "regression": 2 * x,
        "multiclass": np.where(x > 0, "high", "low"),
        "ordinal": np.digitize(x, [-0.5, 0.5]) * 2 + 1,
        "watch_time": np.exp(x),
    }
    experiment = parse_experiment(
        {
            "name": "kinds",
            "data": {"history_length": 0},
            "split": {"kind": "random", "validation": 0.3, "test": 0.1},
            "features": {"x": {"on": "request", "kind": "numeric"}},
            "tasks": {kind: {"kind": kind} for kind in KINDS},
            "model": {
                "width": 4,
                "dropout": 0,
                "fusion": "none",
                "towers": {"kind": "shared_bottom", "expert_hidden": [4], "tower_hidden": []},
            },
            "train": {"steps": 2, "batch_size": 32, "evaluate_every": 2, "mesh": [1, 1]},
            "evaluate": {"bootstrap": 0, "calibrate": True},
        }
    )
    folder = tmp_path_factory.mktemp("kinds") / "prepared"
    tables = {"events": pa.table({"x": x} | labels)}
    return experiment, mtrec_jax.prepare(experiment, None, folder, tables=tables)


def _by_hand(kind: str, labels: np.ndarray, said: np.ndarray) -> tuple[str, float]:
    """Mean -log of the label's probability, or the mean absolute error: of ordered classes that of
    the expected number."""
    if kind == "binary":
        return "log_loss", float(-np.log(np.where(labels == 1, said, 1 - said)).mean())
    if kind == "multiclass":
        return "log_loss", float(-np.log(said[np.arange(len(said)), labels.astype(int)]).mean())
    expected = said @ [1, 3, 5] if kind == "ordinal" else said
    return "mae", float(np.abs(labels - expected).mean())


def test_every_kind_is_measured(
    every_kind: tuple[Experiment, Prepared], tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """From the kept file, ordered classes by their numbers, and an ensemble of both halves."""
    run = trained(*every_kind, tmp_path / "run", show_progress=False)
    found = predicted(run, "validation", tmp_path / "kept.parquet")
    off = {task: said * 0.5 for task, said in found.values.items()}
    off |= {
        task: (said + 1 / said.shape[1]) / 2
        for task, said in found.values.items()
        if said.ndim == 2
    }
    other = found._replace(values=off)
    for kind in KINDS:
        metric, expected = _by_hand(kind, found.labels[kind], found.values[kind])
        (values,) = metrics_by_run({0: found}, kind, kind, (10,)).values()
        assert values[metric] == pytest.approx(expected, rel=1e-5), kind
        worse = _by_hand(kind, found.labels[kind], off[kind])[1]
        pair = difference([(found, other)], kind, kind, metric, resamples=0)
        assert pair.value == pytest.approx(worse - expected, abs=1e-6), kind
    joined = ensemble([found, other]).statistics("ordinal", "ordinal", ())
    mean = (found.values["ordinal"] + off["ordinal"]) / 2
    value = joined["mae"](np.ones(len(found.row)))
    assert value == pytest.approx(_by_hand("ordinal", found.labels["ordinal"], mean)[1], rel=1e-5)


def test_predictions_are_kept_while_nothing_changes_that_they_depend_on(
    shop_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lengthened run is another configuration, and has another best step once it has trained."""
    made: list[str] = []

    def said(run: Run, split: str, known: object) -> pa.Table:
        made.append(split)
        return pa.table({"user": ["u"], "row": [len(made)], "rank": [-1]})

    def rows(run: Run, split: str = "validation") -> list[int]:
        return predicted(run, split, tmp_path / "kept.parquet").row.tolist()

    monkeypatch.setattr(runs, "_said", said)
    assert [rows(shop_run), rows(shop_run)] == [[1], [1]]
    longer = replace(shop_run, experiment=overridden(shop_run.experiment, {"train.steps": 54}))
    assert [rows(longer), rows(longer)] == [[2], [2]]
    step = best_step(shop_run)
    monkeypatch.setattr(runs, "best_step", lambda run: step + 27)
    assert [rows(longer), rows(longer)] == [[3], [3]]
    assert [rows(longer, "test"), rows(longer, "test")] == [[4], [4]]
    rules = replace(longer.experiment.evaluate, calibrate=True)
    calibrated = replace(longer, experiment=replace(longer.experiment, evaluate=rules))
    monkeypatch.setattr(runs, "best_step", lambda run: step)
    assert rows(calibrated, "test") == [5]
    answers = load_answers(shop_run, step)
    assert answers is not None
    other = replace(answers, calibration={"click": Scaling(2.0)})
    monkeypatch.setattr(runs, "load_answers", lambda run, step: other)
    assert [rows(calibrated, "test"), rows(calibrated, "test")] == [[6], [6]]
