"""Vocabularies that begin with those of an earlier folder: known values keep their ids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.examples import Log
from mtrec_jax.data.fit import with_quantiles
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.losses.tasks import TaskField
from tests import tiny
from tests.data.small import make

HEADER = "user,item,shade,price,time"
FIRST_LOG = f"""{HEADER}
a,x,dark,1,1
a,y,light,2,2
a,x,dark,3,3
a,z,dark,4,4
a,z,dark,4,5
b,y,light,5,1
b,x,dark,6,2
b,x,dark,7,3
b,w,dark,8,4
"""  # the last two events of each user do not train
SECOND_LOG = f"""{HEADER}
c,new,grey,100,1
c,new,grey,,2
c,new,grey,300,3
c,w,grey,400,4
c,new,light,500,5
b,y,dark,500,6
b,y,dark,600,7
b,y,dark,700,8
b,y,dark,800,9
"""
FIRST_ITEMS = "item,tags\nx,red blue\ny,blue\nz,pink\nw,pink\n"
SECOND_ITEMS = "item,tags\nnew,green red\ny,green\nw,blue pink\n"
FEATURES: dict[str, dict[str, Any]] = {
    "who": {"on": "context", "column": "user"},
    "tags": {"on": "item", "kind": "multi_valued", "max_values": 2},
    "shade": {"on": "history"},
    "bin": {"on": "history", "kind": "binned", "column": "price", "bins": 3, "impute": "own"},
}


def experiment(**changes: dict[str, Any]) -> Experiment:
    features = {name: declared | changes.get(name, {}) for name, declared in FEATURES.items()}
    tasks = {"next": {"kind": "retrieval"}, "tone": {"kind": "multiclass", "column": "shade"}}
    tasks["cost"] = {"kind": "regression", "column": "price"}
    tasks["grade"] = {"kind": "ordinal", "column": "price"}
    items = {"items": {"files": ["items.csv"]}}
    return make(data=items, features=features, tasks=tasks)


def prepared(folder: Path, text: str, base: Prepared | None = None, **changes: Any) -> Prepared:
    folder.mkdir(exist_ok=True)
    (folder / "log.csv").write_text(text, encoding="utf-8")
    items = FIRST_ITEMS if text == FIRST_LOG else SECOND_ITEMS
    (folder / "items.csv").write_text(items, encoding="utf-8")
    grow_from = base.folder if base else None
    return prepare(experiment(**changes), folder, folder / "out", grow_from=grow_from)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("first"), FIRST_LOG)


@pytest.fixture(scope="module")
def second(first: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("second"), SECOND_LOG, first)


def values(folder: Prepared, feature: str) -> list[str]:
    return folder.vocabulary(feature)["value"].to_pylist()


def test_known_values_keep_their_ids_and_new_ones_follow(first: Prepared, second: Prepared) -> None:
    assert values(first, "shade") == ["dark", "light"]
    # grey is the most frequent one
    assert values(second, "shade") == ["dark", "light", "grey"]
    assert values(first, "who") == ["a", "b"]
    assert values(second, "who") == ["a", "b", "c"]
    assert second.vocabulary("who")["count"].to_pylist() == [0, 2, 3]  # a is not in the second log
    assert values(first, "tags") == ["blue", "red"]
    assert values(second, "tags") == ["blue", "red", "green"]
    assert second.vocabulary("tags")["count"].to_pylist() == [0, 1, 2]
    ids = dict(zip(second.item_names, second.catalogue()["ids"][2:].tolist(), strict=True))
    assert ids == {"new": [4, 3], "y": [4, 0], "w": [2, 1]}
    # the user c is local id 4 in all of its examples
    for block in second.blocks("train"):
        mine = block["user"] == second.user_ids["c"]
        assert set(block["context_who"][mine]) <= {4}
        assert set(block["context_who"][~mine]) <= {3}


def test_without_an_earlier_folder_ids_follow_the_counts(tmp_path: Path) -> None:
    alone = prepared(tmp_path / "alone", SECOND_LOG)
    assert values(alone, "shade")[0] == "grey"
    assert (alone.manifest.continues, alone.manifest.item_values) == ("", 0)
    assert alone.item_vocabulary.to_pylist() == alone.item_names[: alone.manifest.trained_items]
    trained = alone.manifest.trained_items
    unknown = [1] * (alone.manifest.items - trained)
    assert alone.item_rows().tolist() == [0, 1, *range(2, trained + 2), *unknown]


def test_bins_scales_and_classes_stay(first: Prepared, second: Prepared) -> None:
    assert values(first, "bin") == ["1.0", "2.0", "5.0"]
    assert values(second, "bin") == ["1.0", "2.0", "5.0", ""]  # no price was missing before
    assert second.vocabulary("bin")["count"].to_pylist() == [0, 0, 4, 1]
    missing = [f.missing for m in (first, second) for f in m.manifest.history if f.name == "bin"]
    assert missing == [1, 5]
    assert second.manifest.tasks["tone"].classes == ("dark", "light", "grey")
    assert second.manifest.tasks["cost"] == first.manifest.tasks["cost"]
    grades = [m.manifest.tasks["grade"] for m in (first, second)]
    assert grades[0].classes == ("1", "2", "3", "5", "6")
    assert grades[1].classes == ("1", "2", "3", "5", "6", "100", "300", "500", "600")  # in order
    assert grades[1].shares == pytest.approx([0] * 5 + [1 / 4] * 4)


def test_known_groups_of_durations_keep_their_quantiles() -> None:
    """Of three groups the earlier folder has known two."""
    n, steps = 60, np.linspace(0, 1, 101)
    seconds = np.arange(n, dtype=np.float32)
    log = Log(
        user=np.full(n, 2, np.int32),
        split=np.zeros(n, np.int8),
        row=np.arange(n),
        time=np.arange(n, dtype=float),
        events={"item": np.full(n, 2, np.int32)},
        targets={"label_watch": seconds},
        request={},
    )
    watch = {"kind": "watch_time", "duration": "length"}
    features = {"length": {"on": "item", "kind": "binned"}}
    grown = make(tasks={"watch": watch}, features=features)
    old = TaskField(mean=9.0, quantiles=((0.0, 1.0), (2.0, 3.0)))
    base = Prepared(Path(), dataclasses.replace(tiny.manifest(), tasks={"watch": old}))
    groups = {"length": (np.array([2], np.int32), 3)}
    found = with_quantiles({"watch": TaskField(mean=9.0)}, grown, log, groups, base)["watch"]
    assert found.quantiles[:2] == old.quantiles
    np.testing.assert_allclose(found.quantiles[2], 59 * steps, rtol=1e-6)
    alone = with_quantiles({"watch": TaskField()}, grown, log, groups)["watch"]
    assert [len(alone.quantiles), alone.quantiles[2]] == [3, found.quantiles[2]]


def test_items_keep_their_rows_whatever_their_ids(first: Prepared, second: Prepared) -> None:
    from mtrec_jax.models.serve import load_catalogue

    assert first.item_vocabulary.to_pylist() == ["x", "y"]
    rows = second.item_vocabulary.to_pylist()
    assert rows == ["x", "y", "new"]
    assert second.manifest.item_values == 3
    assert second.item_names == ["new", "y", "w"]  # by training count
    catalogue = load_catalogue(second, experiment())
    assert np.asarray(catalogue.row).tolist() == [0, 1, 4, 3, 1]
    # negatives are items that train now, in the order of their ids
    sampled = np.isfinite(catalogue.log_probability).tolist()
    assert sampled == [False, False, True, True, False]


@pytest.mark.slow
def test_a_third_folder_knows_what_the_second_no_longer_met(
    first: Prepared, second: Prepared, tmp_path: Path
) -> None:
    third = prepared(tmp_path / "third", FIRST_LOG, second)
    assert values(third, "who") == ["a", "b", "c"]
    assert third.item_vocabulary.to_pylist() == ["x", "y", "new"]
    assert third.manifest.continues == second.manifest.fingerprint
    assert len({f.manifest.fingerprint for f in (first, second, third)}) == 3


def test_what_means_something_else_does_not_grow(first: Prepared, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"features\.bin\.bins: 3 there, 4 here"):
        prepared(tmp_path / "other", SECOND_LOG, first, bin={"bins": 4})
    prepared(tmp_path / "same", SECOND_LOG, first, who={"min_count": 1})
    with pytest.raises(DataError, match="no prepared folder"):
        prepare(experiment(), tmp_path, tmp_path / "out", grow_from=tmp_path)
