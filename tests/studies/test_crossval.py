"""Cross-validation on a small log: folds, runs that are not trained again, figures by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import mtrec_jax
from benchmarks import conflict
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared, open_prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import overridden, parse_experiment
from mtrec_jax.studies.crossval import _pairs, _scores
from mtrec_jax.studies.runs import Predicted, read_predicted


def test_runs_of_a_fold_are_trained_once_and_measured_on_equal_targets(
    small: tuple[Experiment, Prepared], tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """The first fold of two configurations, which differ in their seed."""
    one = overridden(small[0], {"train.steps": 4, "train.evaluate_every": 0})
    both = {"one": one, "other": overridden(one, {"train.seed": 5})}
    tables = {"events": conflict.planted(300, seed=1)}
    given: dict[str, Any] = {"folds": 3, "seeds": 1, "stratify": "plus", "tables": tables}
    given |= {"show_progress": False, "only_folds": 1}
    found = mtrec_jax.study_crossval(both, None, tmp_path, **given)
    kept = tmp_path / "kept" / "validation"
    runs = sorted(str(path.relative_to(kept)) for path in kept.rglob("*.parquet"))
    assert runs == ["one/0-0.parquet", "other/0-5.parquet"]
    data = tmp_path / "data" / "0"
    assert sorted(path.name for path in data.iterdir()) == ["cleaned", "fold-0"]
    prepared = open_prepared(data / "fold-0")
    splits = {split: prepared.interactions(split) for split in ("validation", "test")}
    ones = [int(np.sum(part["label_plus"])) for part in splits.values()]
    assert max(ones) - min(ones) <= 1, "equal shares of the label"
    values = [
        mtrec_jax.evaluate_run(tmp_path / "runs" / run)[0].tasks["minus"]["auc"]
        for run in ("one/0-0", "other/0-5")
    ]
    means = {
        row["configuration"]: row["mean"]
        for row in found.scores
        if (row["task"], row["metric"]) == ("minus", "auc")
    }
    assert means == pytest.approx(dict(zip(both, values, strict=True)), abs=1e-9)
    assert found.pairs is not None
    (pair,) = [row for row in found.pairs if row["task"] == "minus"]
    assert pair["first is better by"] == pytest.approx(values[0] - values[1], abs=1e-9)

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = mtrec_jax.study_crossval(both, None, tmp_path, **given)
    assert list(again.scores) == list(found.scores)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == written
    assert again.test_looks == 0
    for look in (1, 2):
        looked = mtrec_jax.study_crossval({"one": one}, None, tmp_path, split="test", **given)
        assert looked.test_looks == look
    rows = read_predicted(tmp_path / "kept" / "test" / "one" / "0-0.parquet").row
    assert sorted(rows) == sorted(splits["test"]["row"])


def test_p_values_of_pairs_are_corrected_for_their_number() -> None:
    """Three configurations, so three comparisons: the smallest p of the corrected t test over three
    folds times 3, the next one times 2, the largest as it is, none below one before (Holm 1979)."""
    errors = {"a": (1.0, 2.0, 3.0), "b": (1.5, 2.4, 3.6), "c": (1.2, 3.5, 4.5)}
    e = _regression()
    kept = {
        (name, fold, 0): _off_by(by) for name, of in errors.items() for fold, by in enumerate(of)
    }
    found = _pairs(dict.fromkeys(errors, e), kept, 0.5)
    assert found is not None
    alone = {}
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        d = np.subtract(errors[other], errors[one])
        t = d.mean() / np.sqrt((1 / 3 + 0.5) * d.var(ddof=1))
        alone[one, other] = 2 * stats.t.sf(abs(t), 2)
    ranked = sorted(alone, key=lambda pair: alone[pair])
    expected, before = {}, 0.0
    for pair, times in zip(ranked, (3, 2, 1), strict=True):
        expected[pair] = before = max(before, min(1.0, times * alone[pair]))
    assert {(row["first"], row["second"]): row["p over folds"] for row in found} == pytest.approx(
        expected
    )


def _regression() -> Experiment:
    return parse_experiment(
        {
            "name": "a",
            "tasks": {"r": {"kind": "regression"}},
            "features": {"f": {"on": "request"}},
            "split": {"kind": "random"},
            "data": {"history_length": 0},
            "train": {"steps": 1},
            "evaluate": {"bootstrap": 0},
        }
    )


def _off_by(error: float) -> Predicted:
    """Of two targets that are 0."""
    return Predicted(
        np.array(["u", "v"]),
        np.arange(2),
        np.full(2, -1),
        {"r": np.zeros(2)},
        {"r": np.full(2, error)},
    )


def test_deviations_are_over_folds_and_over_seeds() -> None:
    """Squared errors 1, 9 in fold 0 and 4, 16 in fold 1; the ensemble is off by 2 and 3."""
    off = {("a", 0, 0): 1.0, ("a", 0, 1): 3.0, ("a", 1, 0): 2.0, ("a", 1, 1): 4.0}
    e = _regression()
    kept = {key: _off_by(by) for key, by in off.items()}
    row = next(row for row in _scores({"a": e}, kept) if row["metric"] == "rmse")
    assert row["mean"] == pytest.approx(2.5)
    assert row["over folds"] == pytest.approx(0.5**0.5), "of 2 and 3"
    assert row["over seeds"] == pytest.approx(2**0.5), "of 1, 3 and of 2, 4"
    assert row["ensemble"] == pytest.approx(2.5)
    halved = {key: each for key, each in kept.items() if key[2] == 0}
    assert next(iter(_scores({"a": e}, halved)))["over seeds"] is None


def test_what_does_not_suit_the_data_is_refused(tmp_path: Path) -> None:
    e = conflict.experiment()
    tables = {"events": conflict.planted(30, seed=1)}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"by": "user"}, r"split\.by: 'user' needs data\.user"),
        ({"by": "time", "stratify": "plus"}, r"split\.by: 'time' needs data\.time"),
        ({"stratify": "pluss"}, "Did you mean 'plus'"),
        ({"folds": 2}, r"split\.hold_back"),
    ]
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            mtrec_jax.study_crossval(e, None, tmp_path, tables=tables, **changes)


def test_the_fold_stands_in_the_protocol() -> None:
    from mtrec_jax.config import Split
    from mtrec_jax.data.describe import _fold_in_words

    split = Split(kind="folds", by="time")
    said = {_fold_in_words(dataclasses.replace(split, fold=fold)) for fold in range(3)}
    assert said == {
        f"fold {f} of 5 (windows of time) tests, the window before validates" for f in range(3)
    }
