"""An index: ids of any kind, masks, NaN, files, and the same answers on any number of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.kernels import ItemIndex, cosine_topk, dot_topk

RNG = np.random.default_rng(0)
ITEMS, QUERIES = RNG.normal(size=(1001, 16)), RNG.normal(size=(20, 16))
EXCLUDE = RNG.integers(-1, 1001, (20, 9))
ALLOWED, GROUPS = RNG.random((2, 1001)) < 0.3, RNG.integers(0, 2, 20)
LIMITS: list[dict[str, Any]] = [
    {},
    {"exclude": EXCLUDE},
    {"allowed": ALLOWED[0]},
    {"exclude": EXCLUDE, "allowed": ALLOWED, "group": GROUPS},
]


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "+".join(limits) or "all")
def test_limits_as_in_the_reference(limits: dict[str, Any]) -> None:
    for function in (cosine_topk, dot_topk):
        found = function(QUERIES, ITEMS, 10, **limits)
        expected = function(QUERIES, ITEMS, 10, implementation="reference", **limits)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "+".join(limits) or "all")
def test_eight_devices_give_the_answer_of_one(limits: dict[str, Any]) -> None:
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((2, 4), ("data", "table"), (jax.sharding.AxisType.Auto,) * 2)
    one, eight = ItemIndex(ITEMS), ItemIndex(ITEMS, mesh=mesh)
    for k in (10, 300):
        expected, found = one.search(QUERIES, k, **limits), eight.search(QUERIES, k, **limits)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
    targets = RNG.integers(0, 1001, 20)
    ranks = one.rank(QUERIES, targets, **limits)
    np.testing.assert_array_equal(eight.rank(QUERIES, targets, **limits), ranks)
    assert "over 8 devices" in repr(eight)


@pytest.mark.parametrize("kind", ["int", "text"])
def test_raw_ids(kind: str) -> None:
    ids: Any = np.arange(1001)[::-1] * 10
    ids = ids if kind == "int" else np.char.add("p", ids.astype(str))
    index = ItemIndex(ITEMS, ids)
    rows = cosine_topk(QUERIES, ITEMS, 4)[1]
    np.testing.assert_array_equal(index.search(QUERIES, 4)[1], ids[rows])
    exclude = np.concatenate([ids[rows[:, :1]], np.full((20, 1), -1 if kind == "int" else "")], 1)
    np.testing.assert_array_equal(index.search(QUERIES, 3, exclude)[1], ids[rows[:, 1:]])
    np.testing.assert_array_equal(index.rank(QUERIES, ids[rows[:, 2]]), 2)
    nobody = np.zeros(1001, bool)
    assert set(index.search(QUERIES, 2, allowed=nobody)[1].flat) == {-1 if kind == "int" else ""}
    with pytest.raises(DataError, match="is no id of this index"):
        index.rank(QUERIES, np.full(20, 7 if kind == "int" else "x"))


def test_nan_is_an_error_or_dropped() -> None:
    items = ITEMS.copy()
    items[5, 3], items[7, 0] = np.nan, np.inf
    with pytest.raises(DataError, match="items row 5 holds NaN"):
        ItemIndex(items)
    found = ItemIndex(items, nan="drop").search(QUERIES, 1001)[1]
    assert not np.isin([5, 7], found).any()
    assert (found == -1).sum(axis=1).tolist() == [2] * 20


def test_long_short_and_zero_vectors() -> None:
    items = ITEMS.astype(np.float32)
    items[3] *= 1e30
    items[4] *= 1e-30
    items[6] = 0
    found = ItemIndex(items).search(QUERIES, 1001)
    expected = cosine_topk(QUERIES, items, 1001, implementation="reference")
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_saved_and_loaded(tmp_path: Path, dtype: str) -> None:
    items = (ITEMS * 20).astype(jnp.dtype(dtype))
    index = ItemIndex(items, ids=np.arange(1001) + 5, metric="dot")
    index.save(tmp_path / "items.npz")
    again = ItemIndex.load(tmp_path / "items.npz")
    assert (
        repr(again) == repr(index) == f"ItemIndex(1,001 items of width 16, {dtype}, metric='dot')"
    )
    np.testing.assert_array_equal(again.search(QUERIES, 9)[1], index.search(QUERIES, 9)[1])


def test_a_file_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no")
    for name in ("x.npz", "absent.npz"):
        with pytest.raises(DataError, match=r"npz is no saved ItemIndex .*; write one by save"):
            ItemIndex.load(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": [1, 2]}, DataError, "one integer or text for each of the 1001 items"),
        ({"ids": [1] * 1001}, DataError, r"ids\[1\] is .*1.*, which another item has already"),
        ({"metric": "l2"}, ConfigError, "no metric 'l2': use one of cosine, dot"),
        ({"nan": "keep"}, ConfigError, "no nan 'keep': use one of error, drop"),
    ],
)
def test_wrong_indexes(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ItemIndex(ITEMS, **arguments)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"allowed": ALLOWED}, r"allowed must hold booleans \[N\], or .* with N=1001"),
        ({"allowed": ALLOWED[0].astype(int)}, "allowed must hold booleans"),
        ({"group": GROUPS}, "pass allowed"),
        ({"allowed": ALLOWED, "group": GROUPS + 1}, r"group\[\d+\] is 2"),
    ],
)
def test_wrong_masks(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ItemIndex(ITEMS).search(QUERIES, 3, **limits)
