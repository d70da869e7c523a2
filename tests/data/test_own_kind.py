"""Kinds of features that no file of the package knows, from a configuration to new requests."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import IdField, NumberField, open_prepared
from mtrec_jax.data.features import Encoding, Feature, encode, restore
from mtrec_jax.data.new_rows import encode_requests
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import parse_experiment


@dataclass(frozen=True, kw_only=True)
class Parity(Feature):
    """Ids: whether a number is even or odd, the more frequent one first."""

    kind: Literal["parity"] = "parity"
    shift: int = 0

    def fit(self, name: str, cells: pa.Array, counts: np.ndarray) -> Encoding:
        """Learn which one is more frequent."""
        words = np.array([self._word(text) for text in cells.to_pylist()])
        often = {word: int(counts[words == word].sum()) for word in ("even", "odd")}
        order = sorted(often, key=lambda word: -often[word])
        values = pa.array(order, pa.string())
        return Encoding(name, self, values, np.array([often[word] for word in order]))

    def encode(self, encoding: Encoding, cells: pa.Array) -> np.ndarray:
        """2 for the more frequent one, 3 for the other, 0 where there is no number."""
        known = {word: place + 2 for place, word in enumerate(encoding.values.to_pylist())}
        ids = [known.get(self._word(text), 0) for text in cells.to_pylist()]
        return np.array(ids, np.int32)[:, None]

    def _word(self, text: str | None) -> str:
        return "" if text is None else ("even", "odd")[(int(text) + self.shift) % 2]


@dataclass(frozen=True, kw_only=True)
class Length(Feature):
    """Two numbers: the letters of a text beside what training has on average, and whether there."""

    kind: Literal["length"] = "length"
    gives_numbers: ClassVar[bool] = True

    def fit(self, name: str, cells: pa.Array, counts: np.ndarray) -> Encoding:
        """Learn the average."""
        lengths = np.array([len(text or "") for text in cells.to_pylist()])
        return Encoding(name, self, slots=2, mean=float((lengths * counts).sum() / counts.sum()))

    def encode(self, encoding: Encoding, cells: pa.Array) -> np.ndarray:
        """The difference, and 1 or 0."""
        texts = cells.to_pylist()
        pairs = [(len(text or "") - encoding.mean, text is not None) for text in texts]
        return np.array(pairs, np.float32)


OWN = [Parity, Length]
LOG = """user,item,page,place,click
a,x,1,top,1
a,y,3,side,0
b,x,2,top,1
b,y,5,bottom,0
c,x,4,side,1
"""


def experiment(**features: dict[str, str | int]) -> Experiment:
    declared = {
        "parity": {"kind": "parity", "on": "request", "column": "page"},
        "past_parity": {"kind": "parity", "on": "history", "column": "page", "shift": 1},
        "place": {"kind": "length", "on": "request"},
        "name": {"kind": "length", "on": "item"},
    }
    return parse_experiment(
        {
            "name": "own",
            "data": {
                "events": {"files": ["log.csv"]},
                "items": {"files": ["items.csv"]},
                "user": "user",
                "item": "item",
                "history_length": 3,
            },
            "split": {
                "kind": "files",
                "test_files": ["test.csv"],
                "validation_files": ["test.csv"],
            },
            "features": declared | features,
            "tasks": {"click": {"kind": "binary"}},
            "train": {"epochs": 1},
        },
        extensions=OWN,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own")
    (path / "log.csv").write_text(LOG, "utf-8")
    (path / "test.csv").write_text("user,item,page,place,click\nc,y,7,top,1\n", "utf-8")
    (path / "items.csv").write_text("item,name\nx,abcd\ny,ab\n", "utf-8")
    prepare(experiment(), path, path / "out")
    return path


def test_what_it_learns_is_in_the_folder_and_comes_back(folder: Path) -> None:
    prepared = open_prepared(folder / "out", OWN)
    m = prepared.manifest
    assert m.request_ids == (IdField(name="parity", size=4, slots=1),)
    assert m.request_numbers == (
        NumberField(name="place", mean=4.0, std=1.0, slots=2, missing=0.0),
    )
    assert m.history == (IdField(name="past_parity", size=4, slots=1),)
    assert prepared.catalogue()["numbers"][2:].tolist() == [
        [1, 1],
        [-1, 1],
    ]  # x, y: 4 and 2 letters
    found = restore(prepared, "parity")
    assert found.feature == Parity(on="request", column="page")
    assert (found.values.to_pylist(), found.counts.tolist()) == (["odd", "even"], [3, 2])
    assert encode(found, pa.array(["8", "9", None])).tolist() == [[3], [2], [0]]
    place = restore(prepared, "place")
    assert encode(place, pa.array(["abcde", None])).tolist() == [
        [1.0, 1.0],
        [-4.0, 0.0],
    ]
    assert restore(prepared, "past_parity").values.to_pylist() == ["even", "odd"]


def test_new_requests_are_encoded_alike(folder: Path) -> None:
    prepared = open_prepared(folder / "out", OWN)
    rows = pa.table(
        {"user": ["a", "z"], "item": ["x", "y"], "page": ["4", None], "place": ["top", "t"]}
    )
    found = encode_requests(prepared, rows)
    assert found["request_ids"].tolist() == [[3], [0]]
    assert found["request_numbers"].tolist() == [[-1, 1], [-3, 1]]
    view = open_prepared(folder / "out").chosen(experiment())  # the experiment brings its classes
    again = encode_requests(view, rows)
    np.testing.assert_array_equal(again["request_numbers"], found["request_numbers"])


def test_it_grows_and_is_chosen_like_any_other(folder: Path) -> None:
    chosen = open_prepared(folder / "out").chosen(experiment())
    assert [f.name for f in chosen.manifest.request_ids] == ["parity"]
    with pytest.raises(ConfigError, match=r"features\.parity\.shift: 0 there, 1 here"):
        open_prepared(folder / "out").chosen(
            experiment(parity={"kind": "parity", "on": "request", "column": "page", "shift": 1})
        )
    first = open_prepared(folder / "out", OWN)
    grown = prepare(experiment(), folder, folder / "grown", grow_from=first.folder)
    assert restore(grown, "parity").values.to_pylist() == ["odd", "even"]


def test_its_class_is_asked_for(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'parity' is not one of .*extensions=\["):
        restore(open_prepared(folder / "out"), "parity")
    text = tomllib.loads(to_toml(experiment()))
    assert parse_experiment(text, extensions=OWN) == experiment()
