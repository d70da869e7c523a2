"""An index: ids of any kind, masks, NaN, files, and the same answers on any number of devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.kernels import ItemIndex, cosine_topk, dot_topk, programs
from mtrec_jax.sharding import make_mesh

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


@pytest.mark.slow
def test_places_beyond_the_items_are_filled_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are asked for no more than there is, and for large k a few queries at a time."""
    asked: list[int] = []
    monkeypatch.setattr(programs, "_MEMORY", 1001 * 16 * 4 * 3)
    real = programs.program

    def counted(*given: Any) -> Any:
        run = real(*given)

        def program(rows: Any, items: Any, k: int, may: Any) -> Any:
            asked.append(len(rows) * k)
            return run(rows, items, k, may)

        return program

    monkeypatch.setattr(programs, "program", counted)
    index = ItemIndex(ITEMS.astype(np.float32))
    scores, ids = index.search(QUERIES.astype(np.float32)[:5], 2_000, exclude=EXCLUDE[:5])
    assert asked
    assert max(asked) <= 3 * 1001
    args = QUERIES.astype(np.float32)[:5], ITEMS.astype(np.float32), 2_000, EXCLUDE[:5]
    expected = cosine_topk(*args, implementation="reference")
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


@pytest.mark.parametrize(
    "limits",
    [pytest.param(one, marks=[pytest.mark.slow] * (len(one) == 1)) for one in LIMITS],
    ids=lambda limits: "+".join(limits) or "all",
)
def test_limits_as_in_the_reference(limits: dict[str, Any]) -> None:
    for function in (cosine_topk, dot_topk):
        found = function(QUERIES, ITEMS, 10, **limits)
        expected = function(QUERIES, ITEMS, 10, implementation="reference", **limits)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize(
    "limits",
    [pytest.param(one, marks=pytest.mark.slow) for one in LIMITS[:3]] + [LIMITS[3]],
    ids=lambda limits: "+".join(limits) or "all",
)
@pytest.mark.slow
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


@pytest.mark.parametrize("kind", [pytest.param("int", marks=pytest.mark.slow), "text"])
def test_raw_ids(kind: str) -> None:
    ids: Any = np.arange(1001)[::-1] * 10
    ids = ids if kind == "int" else np.char.add("p", ids.astype(str))
    index = ItemIndex(ITEMS, ids)
    rows = cosine_topk(QUERIES, ITEMS, 4)[1]
    np.testing.assert_array_equal(index.search(QUERIES, 4)[1], ids[rows])
    exclude = np.concatenate([ids[rows[:, :1]], np.full((20, 1), -1 if kind == "int" else "")], 1)
    np.testing.assert_array_equal(index.search(QUERIES, 4, exclude)[1][:, :3], ids[rows[:, 1:]])
    np.testing.assert_array_equal(index.rank(QUERIES, ids[rows[:, 2]]), 2)
    nobody = np.zeros(1001, bool)
    assert set(index.search(QUERIES, 4, allowed=nobody)[1].flat) == {-1 if kind == "int" else ""}
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


@pytest.mark.parametrize(
    "dtype",
    [
        "bfloat16",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "float16", "int8")),
    ],
)
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


def _dot_problem(scale: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    items = 1e10 * (rng.normal(size=32) + 1e-6 * rng.normal(size=(800, 32)))
    return (rng.normal(size=(16, 32)) * scale).astype(np.float32), items.astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30])
def test_short_queries_do_not_lose_the_bound_of_rounding(scale: float) -> None:
    """Squares of their numbers vanish in float32, and with them would the bound."""
    queries, items = _dot_problem(scale)
    scores, ids = dot_topk(queries, items, 10)
    expected = dot_topk(queries, items, 10, implementation="reference")
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def test_integers_beyond_32_bits_do_not_wrap() -> None:
    large = np.array([[2**32 + 5, 1], [7, 1]])
    scores, ids = dot_topk(np.array([[1, 0]], np.float32), large, 2)
    assert ids.tolist() == [[0, 1]]
    assert scores.tolist() == [[float(np.float32(2**32 + 5)), 7.0]]
    scores, _ = dot_topk(np.array([[2**31, 0]]), np.array([[1, 0]], np.float32), 1)
    assert scores.tolist() == [[2.0**31]]


def test_products_that_overflow_are_refused() -> None:
    with pytest.raises(DataError, match=r"overflow float32; divide one of them by a constant"):
        dot_topk(np.array([[1e30, 0]], np.float32), np.array([[-1e30, 0], [1, 0]], np.float32), 2)


@pytest.mark.slow
def test_the_index_holds_a_copy() -> None:
    """64-byte aligned memory is what JAX would share; also over a mesh, and where it is large."""
    for rows, mesh in ((64, None), (64, make_mesh((2, 4))), (70_000, None)):
        memory = np.empty(rows * 64 * 4 + 64, np.uint8)
        start = -memory.ctypes.data % 64
        items = memory[start : start + rows * 64 * 4].view(np.float32).reshape(rows, 64)
        items[...] = np.random.default_rng(0).normal(size=items.shape)
        index = ItemIndex(items, metric="dot", mesh=mesh)
        queries = items[:3].copy()
        before = index.search(queries, 4)
        items[...] = 0
        for one, other in zip(before, index.search(queries, 4), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_items_on_another_device_are_searched_there() -> None:
    items = np.random.default_rng(0).normal(size=(320, 8)).astype(np.float32)
    expected = ItemIndex(items).search(items[:5], 3)
    index = ItemIndex(jax.device_put(items, jax.devices()[1]))
    found = index.search(items[:5], 3)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(index.rank(items[:5], np.arange(5)), np.zeros(5))


@pytest.mark.slow
def test_threads_share_an_index() -> None:
    items = np.random.default_rng(0).normal(size=(1600, 8)).astype(np.float32)
    index = ItemIndex(items)
    sizes = [1, 7, 30, 3]
    expected = [index.search(items[:n], 5) for n in sizes]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for right, found in zip(
                expected, pool.map(lambda n: index.search(items[:n], 5), sizes), strict=True
            ):
                np.testing.assert_array_equal(found[1], right[1])
                np.testing.assert_array_equal(found[0], right[0])


def test_a_saved_cosine_index_gives_the_same_bits(tmp_path: Path) -> None:
    items = np.random.default_rng(0).normal(size=(333, 8)).astype(np.float32)
    items[7] = np.nan
    index = ItemIndex(items, nan="drop")
    index.save(tmp_path / "items.npz")
    queries = items[20:30]
    again = ItemIndex.load(tmp_path / "items.npz")
    for one, other in zip(index.search(queries, 50), again.search(queries, 50), strict=True):
        np.testing.assert_array_equal(one, other)
    assert 7 not in again.search(queries, 333)[1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([b"a", b"b"]), "one integer or text"),
        (np.array([3, -1]), r"ids\[1\] is -1, which stands for no item"),
        (np.array(["", "b"]), r"ids\[0\] is '', which stands for no item"),
    ],
)
def test_ids_that_could_not_be_told_from_nothing_are_refused(ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ItemIndex(np.eye(2), ids=ids)


def test_unsigned_ids_work() -> None:
    index = ItemIndex(np.eye(2), ids=np.array([5, 9], np.uint64))
    _scores, ids = index.search(np.eye(2), 3, exclude=np.array([[9], [-1]]))
    assert ids.tolist() == [[5, -1, -1], [9, 5, -1]]
