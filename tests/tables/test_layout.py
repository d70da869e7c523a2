"""Where a feature's rows live, and what padding and bags of ids look up."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.network import Plan, make_plan
from mtrec_jax.tables.layout import (
    MOST_ROWS,
    ROW_MULTIPLE,
    Field,
    Group,
    addresses,
    gather,
    initial_table,
    layout,
    pool,
    rule_of,
    spread,
)
from tests import tiny

# ids stand side by side: segment | tags, tags, tags | city
SEGMENT = Field("context.segment", "dense", 10, 5, 1)
TAGS = Field("context.tags", "sparse", 20, 9, 3)
CITY = Field("context.city", "dense", 30, 4, 1)
MIXED = Group((SEGMENT, TAGS, CITY))
IDS = jnp.array([[2, 3, 4, 0, 1], [0, 0, 0, 0, 0], [4, 5, 0, 0, 3]], jnp.int32)


def test_layout_gives_each_owner_its_own_rows_of_its_stack() -> None:
    fields, rows = layout(
        [("item", "sparse", 100, 1), ("a", "dense", 5, 1), ("b", "sparse", 40, 3)]
    )
    assert [(f.stack, f.offset) for f in fields.values()] == [
        ("sparse", 0),
        ("dense", 0),
        ("sparse", 100),
    ]
    assert rows == {"sparse": 2 * ROW_MULTIPLE, "dense": ROW_MULTIPLE}  # 140 and 5, rounded up


def test_a_further_stack_opens_before_addresses_overflow() -> None:
    big = MOST_ROWS - 100
    fields, rows = layout(
        [
            ("a", "adagrad", big, 1),
            ("b", "adagrad", 2 * 10**9, 1),
            ("c", "sgd", 7, 1),
            ("d", "adagrad", 90, 1),
            ("e", "adagrad", 2 * 10**9, 1),
        ]
    )
    stacks = {owner: f.stack for owner, f in fields.items()}
    assert stacks == {
        "a": "adagrad",
        "b": "adagrad-2",
        "c": "sgd",
        "d": "adagrad",
        "e": "adagrad-3",
    }
    assert fields["d"].offset == big
    assert fields["b"].offset == fields["e"].offset == 0
    assert max(rows.values()) < 2**31
    assert {rule_of(stack) for stack in rows} == {"adagrad", "sgd"}
    assert fields["e"].spread == rows["adagrad-3"]
    # the last row of the largest stack
    assert int(spread(jnp.array(rows["adagrad"] - 1), rows["adagrad"])) == rows["adagrad"] - 1


def test_a_table_that_no_stack_holds_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"context\.user: .*kind = hashed"):
        layout([("context.user", "adagrad", 2**31, 1)])
    with pytest.raises(ConfigError, match="placement = sparse"):
        layout([("a", "dense", 2 * 10**9, 1), ("b", "dense", 2 * 10**9, 1)])


def test_addresses_add_the_owner_offset_and_mark_padding() -> None:
    found = addresses(MIXED, IDS)
    np.testing.assert_array_equal(found["dense"], [[12, 31], [-1, -1], [14, 33]])
    np.testing.assert_array_equal(found["sparse"], [[23, 24, -1], [-1, -1, -1], [25, -1, -1]])
    assert addresses(Group((SEGMENT,)), IDS[:, :1]).keys() == {"dense"}


def test_padding_gathers_zero_rows_and_sends_back_no_gradient() -> None:
    table = jnp.arange(1.0, 9.0).reshape(4, 2)
    address = jnp.array([[2, -1], [3, 2]])

    def total(table: jax.Array) -> jax.Array:
        return jnp.sum(gather(table, address))

    np.testing.assert_array_equal(gather(table, address)[0], [[5, 6], [0, 0]])
    # neither the last row, nor the row that -1 wraps around to, hears of the padding
    np.testing.assert_array_equal(jax.grad(total)(table)[:, 0], [0, 0, 2, 1])


def test_pool_of_mixed_stacks_is_the_mean_of_each_bag() -> None:
    rng = np.random.default_rng(0)
    tables = {s: rng.normal(size=(40, 4)).astype(np.float32) for s in ("dense", "sparse")}
    rows = {s: gather(jnp.asarray(tables[s]), a) for s, a in addresses(MIXED, IDS).items()}
    pooled = np.asarray(pool(MIXED, IDS, rows))
    dense, sparse, nothing = tables["dense"], tables["sparse"], np.zeros(4)
    expected = [
        [dense[12], (sparse[23] + sparse[24]) / 2, dense[31]],
        [nothing, nothing, nothing],
        [dense[14], sparse[25], dense[33]],
    ]
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def test_pool_of_single_ids_is_their_rows() -> None:
    rows = {"dense": jnp.arange(12.0).reshape(2, 2, 3)}
    group = Group((SEGMENT, CITY))
    np.testing.assert_array_equal(pool(group, jnp.array([[2, 3], [4, 1]]), rows), rows["dense"])


def test_initial_padding_and_unknown_rows_are_zero() -> None:
    fields, rows = layout([("item", "sparse", 60, 1), ("b", "sparse", 50, 1)])
    table = initial_table(
        jax.random.key(0), list(fields.values()), rows["sparse"], 64, jnp.dtype("float32")
    )
    lengths = np.linalg.norm(table, axis=1)
    silent = [0, 1, 60, 61]
    assert (lengths[silent] == 0).all()
    real = np.delete(lengths, silent)
    assert real.min() > 0.15
    assert real.max() < 0.35


def test_a_hashed_id_is_the_sum_of_its_rows_and_a_bag_the_mean_of_its_ids() -> None:
    users = Field("context.user", "sgd", 40, 12, 2, spread=128, functions=2)
    group = Group((SEGMENT, users))
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
        return pool(group, ids, {s: gather(tables[s], a) for s, a in addresses(group, ids).items()})

    pooled, table = vectors(tables)[:, 1], np.asarray(tables["sgd"])
    np.testing.assert_allclose(pooled[0], table[real].sum(0) / 2, rtol=1e-5)
    np.testing.assert_allclose(pooled[1], table[real[:2]].sum(0), rtol=1e-5)
    np.testing.assert_allclose(pooled[2], table[41], rtol=1e-5)
    np.testing.assert_array_equal(pooled[3], np.zeros(4))

    gradient = jax.grad(lambda t: jnp.sum(vectors(t)[1]))(tables)["sgd"]  # of one id alone
    assert sorted(np.flatnonzero(np.asarray(gradient).any(axis=1))) == sorted(real[:2])


def test_owners_stay_where_they_are_while_vocabularies_grow() -> None:
    def plan(sizes: dict[str, int], capacity: int) -> Plan:
        before = tiny.manifest()
        tags = replace(before.context_ids[1], size=sizes["tags"], capacity=capacity)
        context = (before.context_ids[0], tags)
        grown = replace(before, context_ids=context, item_values=sizes["items"])
        declared = tiny.experiment(model={"item_placement": "sparse", "item_capacity": capacity})
        return make_plan(declared, grown)

    small, large = plan({"tags": 7, "items": 10}, 40), plan({"tags": 42, "items": 40}, 40)
    assert small.fields == large.fields
    assert small.rows == large.rows
    assert small.fields["context.tags"].size == small.fields["item"].size == 42
    assert plan({"tags": 7, "items": 10}, 0).fields != plan({"tags": 8, "items": 10}, 0).fields
    message = r"item: 41 items have a row .* model\.item_capacity = 40.* --init-from"
    with pytest.raises(ConfigError, match=message):
        plan({"tags": 7, "items": 41}, 40)
