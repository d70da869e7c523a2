"""Rows of the sparse stacks for a step, and their update, on one shard or over several."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtrec_jax.nn import exchange
from mtrec_jax.nn.embedding import computed_dtype
from mtrec_jax.nn.model import Rows, gather_rows
from mtrec_jax.train.sparse import RowOptimizer, apply_rows, stochastic_round
from mtrec_jax.types import PyTree, TrainState

Addresses = dict[str, dict[str, jax.Array]]  # {stack: {role: addresses, -1 where nothing}}


class Fetched(NamedTuple):
    """Rows of a step, and what its update needs to find them again."""

    rows: Rows
    addresses: Addresses
    scratch: dict[str, jax.Array]
    asked: dict[str, exchange.Asked]  # {} where every device holds whole tables


def new_scratch(tables: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Work space of the exact dedup, one int32 a table row."""
    return {stack: jnp.zeros(table.shape[0], jnp.int32) for stack, table in tables.items()}


def fetch(
    tables: dict[str, jax.Array],
    scratch: dict[str, jax.Array],
    addresses: Addresses,
    mesh: jax.sharding.Mesh,
) -> Fetched:
    """The rows at the addresses; differentiate with respect to `rows`."""
    if mesh.shape["table"] == 1:
        return Fetched(gather_rows({}, tables, addresses), addresses, scratch, {})
    rows, asked, scratch = {}, {}, dict(scratch)
    for stack, by_role in addresses.items():
        table, ids = tables[stack], _flat(by_role, mesh.size)
        sizes = exchange.default_buffers(len(ids), mesh)
        found, scratch[stack], asked[stack] = exchange.look_up(
            table, scratch[stack], ids, mesh, sizes
        )
        rows[stack] = _by_role(found.astype(computed_dtype(table)), by_role)
    return Fetched(rows, addresses, scratch, asked)


def apply_gradients(
    rules: dict[str, RowOptimizer],
    state: TrainState,
    fetched: Fetched,
    gradients: Rows,
    rate: jax.Array | float,
    key: jax.Array,
    wanted: jax.Array,
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """`tables`, `slots` and `scratch` after the row-wise update with the gradients of all roles.

    If `wanted` is false, no row is touched.
    """
    tables, slots, scratch = dict(state.tables), dict(state.slots), dict(fetched.scratch)
    for stack, by_role in fetched.addresses.items():
        table, roles = tables[stack], sorted(by_role)
        grads = jnp.concatenate([gradients[stack][r].reshape(-1, table.shape[1]) for r in roles])
        if stack not in fetched.asked:
            ids = jnp.concatenate([by_role[r].reshape(-1) for r in roles])
            ids = jnp.where(wanted, ids, -1)
            tables[stack], slots[stack], scratch[stack] = apply_rows(
                rules[stack], table, slots[stack], scratch[stack], ids, grads, rate, key
            )
            continue
        asked = fetched.asked[stack]
        size = len(asked.leader)
        grads = jnp.pad(grads, ((0, size - len(grads)), (0, 0)))
        rule = _rule(rules[stack], rate, key, table.dtype)
        sizes = exchange.default_buffers(size, mesh)
        asked = asked._replace(numbers=jnp.where(wanted, asked.numbers, 0))
        tables[stack], slots[stack] = exchange.update(
            rule, table, slots[stack], asked, grads, mesh, sizes
        )
    return {"tables": tables, "slots": slots, "scratch": scratch}


def _rule(
    optimizer: RowOptimizer, rate: jax.Array | float, key: jax.Array, dtype: Any
) -> exchange.Update:
    def rule(rows: jax.Array, slots: PyTree, grads: jax.Array) -> tuple[jax.Array, PyTree]:
        new, slots = optimizer.update(rows, slots, grads, rate)
        if dtype == jnp.bfloat16:
            own = jax.random.fold_in(key, jax.lax.axis_index("table"))
            new = stochastic_round(new, own)
        return new, slots

    return rule


def _flat(by_role: dict[str, jax.Array], parts: int) -> jax.Array:
    """The addresses of all roles one after the other, filled up with -1 to divide over devices."""
    ids = jnp.concatenate([by_role[role].reshape(-1) for role in sorted(by_role)])
    return jnp.pad(ids, (0, -len(ids) % parts), constant_values=-1)


def _by_role(rows: jax.Array, by_role: dict[str, jax.Array]) -> dict[str, jax.Array]:
    roles = sorted(by_role)
    ends = np.cumsum([by_role[role].size for role in roles])
    return {
        role: rows[end - by_role[role].size : end].reshape(*by_role[role].shape, rows.shape[1])
        for role, end in zip(roles, ends, strict=True)
    }
