"""Where a feature's rows live, and what padding and bags of ids look up."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.model import make_model
from mtrec_jax.sharding import make_mesh
from mtrec_jax.tables.layout import (
    MOST_ROWS,
    ROW_MULTIPLE,
    Layout,
    Place,
    Slots,
    TableSize,
    addresses,
    by_stack,
    initial_stacks,
    make_layout,
    pool,
    rule_of,
    side_by_side,
    spread,
)
from mtrec_jax.tables.lookup import fetch, gather
from tests import tiny

# ids stand side by side: segment | tags, tags, tags | city
SEGMENT = Slots(Place("segment", "dense", 10, 5), 1)
TAGS = Slots(Place("tags", "sparse", 20, 9), 3)
CITY = Slots(Place("city", "dense", 30, 4), 1)
MIXED = (SEGMENT, TAGS, CITY)
IDS = jnp.array([[2, 3, 4, 0, 1], [0, 0, 0, 0, 0], [4, 5, 0, 0, 3]], jnp.int32)


def _layout(tables: dict[str, tuple[str, int]]) -> Layout:
    return make_layout({n: TableSize(*size) for n, size in tables.items()}, {}, width=8)


def test_layout_gives_each_table_its_own_rows_of_its_stack() -> None:
    found = _layout({"item": ("sparse", 100), "a": ("dense", 5), "b": ("sparse", 40)})
    assert [(p.stack, p.offset, p.size) for p in found.places.values()] == [
        ("sparse", 0, 100),
        ("dense", 0, 5),
        ("sparse", 100, 40),
    ]
    assert found.rows == {"sparse": 2 * ROW_MULTIPLE, "dense": ROW_MULTIPLE}  # 140, 5: rounded up


def test_a_further_stack_opens_before_addresses_overflow() -> None:
    big = MOST_ROWS - 100
    places, rows, _, _ = _layout(
        {
            "a": ("adagrad", big),
            "b": ("adagrad", 2 * 10**9),
            "c": ("sgd", 7),
            "d": ("adagrad", 90),
            "e": ("adagrad", 2 * 10**9),
        }
    )
    assert {name: place.stack for name, place in places.items()} == {
        "a": "adagrad",
        "b": "adagrad-2",
        "c": "sgd",
        "d": "adagrad",
        "e": "adagrad-3",
    }
    assert places["d"].offset == big
    assert places["b"].offset == places["e"].offset == 0
    assert max(rows.values()) < 2**31
    assert {rule_of(stack) for stack in rows} == {"adagrad", "sgd"}
    assert places["e"].spread == rows["adagrad-3"]
    # the last row of the largest stack
    assert int(spread(jnp.array(rows["adagrad"] - 1), rows["adagrad"])) == rows["adagrad"] - 1


def test_a_table_that_no_stack_holds_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"user: .*set tables\.user\.hash_rows"):
        _layout({"user": ("adagrad", 2**31)})
    with pytest.raises(ConfigError, match=r'tables\.NAME\.update = "sparse"'):
        _layout({"a": ("dense", 2 * 10**9), "b": ("dense", 2 * 10**9)})


def test_addresses_add_the_offset_and_mark_padding() -> None:
    found = addresses(MIXED, IDS)
    np.testing.assert_array_equal(found["dense"], [[12, 31], [-1, -1], [14, 33]])
    np.testing.assert_array_equal(found["sparse"], [[23, 24, -1], [-1, -1, -1], [25, -1, -1]])
    assert addresses((SEGMENT,), IDS[:, :1]).keys() == {"dense"}


def test_padding_gathers_zero_rows_and_sends_back_no_gradient() -> None:
    table = jnp.arange(1.0, 9.0).reshape(4, 2)
    address = jnp.array([[2, -1], [3, 2]])

    def total(table: jax.Array) -> jax.Array:
        return jnp.sum(gather(table, address))

    np.testing.assert_array_equal(gather(table, address)[0], [[5, 6], [0, 0]])
    # neither the last row, nor the row that -1 wraps around to, hears of the padding
    np.testing.assert_array_equal(jax.grad(total)(table)[:, 0], [0, 0, 2, 1])


def _rows(tables: dict[str, jax.Array], group: tuple[Slots, ...], ids: jax.Array) -> jax.Array:
    found = {stack: gather(tables[stack], a) for stack, a in addresses(group, ids).items()}
    return side_by_side(group, found)


def test_rows_of_mixed_stacks_stand_in_the_order_of_the_ids_and_their_gradients_return() -> None:
    rng = np.random.default_rng(0)
    tables = {s: jnp.asarray(rng.normal(size=(40, 4)), jnp.float32) for s in ("dense", "sparse")}
    found = np.asarray(_rows(tables, MIXED, IDS))
    dense, sparse, nothing = np.asarray(tables["dense"]), np.asarray(tables["sparse"]), np.zeros(4)
    np.testing.assert_array_equal(found[0], [dense[12], sparse[23], sparse[24], nothing, dense[31]])
    np.testing.assert_array_equal(found[1], np.zeros((5, 4)))
    assert MIXED[0].place.stack == "dense"
    back = by_stack(MIXED, jnp.asarray(found))  # the way back keeps each beside its address
    np.testing.assert_array_equal(back["dense"], found[:, [0, 4]])
    np.testing.assert_array_equal(back["sparse"], found[:, 1:4])
    # what autodiff of a gather from both tables gives
    slope = jnp.asarray(rng.normal(size=found.shape), jnp.float32)
    expected = jax.grad(lambda tables: jnp.sum(_rows(tables, MIXED, IDS) * slope))(tables)
    for stack, address in addresses(MIXED, IDS).items():
        total = np.zeros((40, 4))
        keep = np.asarray(address) >= 0
        np.add.at(total, np.asarray(address)[keep], np.asarray(by_stack(MIXED, slope)[stack])[keep])
        np.testing.assert_allclose(total, expected[stack], atol=1e-6)


def test_pool_is_the_mean_of_each_bag() -> None:
    rng = np.random.default_rng(0)
    tables = {s: jnp.asarray(rng.normal(size=(40, 4)), jnp.float32) for s in ("dense", "sparse")}
    pooled = np.asarray(pool(MIXED, IDS, _rows(tables, MIXED, IDS)))
    dense, sparse, nothing = np.asarray(tables["dense"]), np.asarray(tables["sparse"]), np.zeros(4)
    expected = [
        [dense[12], (sparse[23] + sparse[24]) / 2, dense[31]],
        [nothing, nothing, nothing],
        [dense[14], sparse[25], dense[33]],
    ]
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_pool_of_single_ids_is_their_rows() -> None:
    rows = jnp.arange(12.0).reshape(2, 2, 3)
    np.testing.assert_array_equal(pool((SEGMENT, CITY), jnp.array([[2, 3], [4, 1]]), rows), rows)


@pytest.mark.parametrize("stack", ["sgd", "dense"])
def test_initial_padding_and_unknown_rows_are_zero(stack: str) -> None:
    found = _layout({"item": (stack, 60), "b": (stack, 50)})
    table = initial_stacks(
        found._replace(width=64), jax.random.key(0), jnp.dtype("float32"), low=False
    )[stack]
    lengths = np.linalg.norm(table, axis=1)
    silent = [0, 1, 60, 61]  # one part of 128 rows is spread to itself
    assert (lengths[silent] == 0).all()
    real = np.delete(lengths, silent)
    assert real.min() > 0.15
    assert real.max() < 0.35


def test_initial_rows_do_not_depend_on_the_devices() -> None:
    found = _layout({"item": ("sgd", 300), "b": ("sgd", 50)})
    make = jax.jit(
        lambda key, mesh: initial_stacks(found, key, jnp.dtype("float32"), False, mesh)["sgd"],
        static_argnums=1,
    )
    key = jax.random.key(1, impl="rbg")
    one = np.asarray(make(key, None))
    np.testing.assert_array_equal(one, make(key, make_mesh((2, 4))))
    silent = np.asarray(spread(jnp.array([0, 1, 300, 301]), found.rows["sgd"]))
    assert set(np.flatnonzero((one == 0).all(axis=1))) == set(silent)


def test_a_hashed_id_is_the_sum_of_its_rows_and_a_bag_the_mean_of_its_ids() -> None:
    users = Slots(Place("user", "sgd", 40, 12, spread=128, functions=2), 2)
    group = (SEGMENT, users)
    ids = jnp.array([[2, 7, 9], [0, 7, 0], [3, 1, 0], [4, 0, 0]], jnp.int32)
    found = jax.jit(lambda: addresses(group, ids))()
    np.testing.assert_array_equal(found["dense"], [[12], [-1], [13], [14]])
    at = np.asarray(found["sgd"])
    numbers = np.where(at < 0, -1, at)  # one part of 128 rows is spread to itself
    assert numbers.shape == (4, 4)
    real = numbers[0]
    assert ((real >= 42) & (real < 52)).all()
    assert len(set(real[:2])) == 2  # these two functions differ here
    assert numbers[1].tolist() == [*real[:2], -1, -1]
    assert numbers[2].tolist() == [41, -1, -1, -1]  # unknown has a row of its own
    assert numbers[3].tolist() == [-1] * 4
    rng = np.random.default_rng(0)
    tables = {s: jnp.asarray(rng.normal(size=(128, 4)), jnp.float32) for s in ("dense", "sgd")}

    @jax.jit
    def vectors(tables: dict[str, jax.Array]) -> jax.Array:
        return pool(group, ids, _rows(tables, group, ids))

    pooled, table = vectors(tables)[:, 1], np.asarray(tables["sgd"])
    np.testing.assert_allclose(pooled[0], table[real].sum(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(pooled[1], table[real[:2]].sum(0), rtol=1e-5)
    np.testing.assert_allclose(pooled[2], table[41], rtol=1e-5)
    np.testing.assert_array_equal(pooled[3], np.zeros(4))

    gradient = jax.grad(lambda t: jnp.sum(vectors(t)[1]))(tables)["sgd"]  # of one id alone
    assert sorted(np.flatnonzero(np.asarray(gradient).any(axis=1))) == sorted(real[:2])


def test_tables_of_a_group_are_fetched_by_their_names() -> None:
    sizes = {
        "item": TableSize("sgd", 5),
        "city": TableSize("dense", 4),
        "user": TableSize("sgd", 6),
    }
    groups = {"context": [("city", 1), ("user", 2)], "item": [("item", 1)], "request": []}
    found = make_layout(sizes, groups, width=3)
    assert list(found.groups) == ["context", "item"]  # nothing stands for no tables
    stacks = {
        stack: jnp.arange(1.0, rows * 3 + 1).reshape(rows, 3) for stack, rows in found.rows.items()
    }
    ids = {"context": jnp.array([[2, 3, 0]]), "item": jnp.array([[4], [0], [1]])}
    rows = jax.jit(lambda ids: fetch(found, stacks, ids))(ids)
    city, user = stacks["dense"][2], stacks["sgd"][5 + 3]
    np.testing.assert_array_equal(rows["context"], [[city, user, jnp.zeros(3)]])
    np.testing.assert_array_equal(
        rows["item"], [[stacks["sgd"][4]], [jnp.zeros(3)], [stacks["sgd"][1]]]
    )


def test_tables_stay_where_they_are_while_vocabularies_grow() -> None:
    def layout(sizes: dict[str, int], capacity: int) -> Layout:
        before = tiny.manifest()
        tags = replace(before.context_ids[1], size=sizes["tags"])
        grown = replace(
            before, context_ids=(before.context_ids[0], tags), item_values=sizes["items"]
        )
        tables = {
            "tags": {"update": "sparse", "capacity": capacity},
            "item": {"capacity": capacity},
        }
        return make_model(tiny.experiment(tables=tables), grown).layout

    small, large = layout({"tags": 7, "items": 10}, 40), layout({"tags": 42, "items": 40}, 40)
    assert small == large
    assert small.places["tags"].size == small.places["item"].size == 42
    assert layout({"tags": 7, "items": 10}, 0) != layout({"tags": 8, "items": 10}, 0)
    message = r"tables\.item\.capacity: 41 values have a row .* 40.* init_from="
    with pytest.raises(ConfigError, match=message):
        layout({"tags": 7, "items": 41}, 40)
