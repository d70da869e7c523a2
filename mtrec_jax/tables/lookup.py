"""Rows of the sparse stacks for a step, and their update, on one shard or over several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.models.model import Rows, gather_rows
from mtrec_jax.tables import exchange
from mtrec_jax.tables.layout import RowUpdate, as_numbers, rule_of
from mtrec_jax.tables.update import RowOptimizer, apply_rows, row_update
from mtrec_jax.types import PyTree, TrainState

Addresses = dict[str, dict[str, jax.Array]]  # {stack: {role: addresses, -1 where nothing}}
BuffersOf = dict[str, exchange.Buffers]  # {stack: sizes}; default_buffers where there are none


class Fetched(NamedTuple):
    """Rows of a step, and what its update needs to find them again."""

    rows: Rows
    addresses: Addresses
    scratch: dict[str, jax.Array]
    asked: dict[str, exchange.Asked]  # {} where every device holds whole tables
    buffers: BuffersOf  # of the stacks in `asked`


def new_scratch(
    tables: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Work space of the exact dedup, one int32 a table row."""
    return {stack: jnp.zeros(table.shape[0], jnp.int32) for stack, table in tables.items()}


def fetch(
    tables: dict[str, jax.Array],
    scratch: dict[str, jax.Array],
    addresses: Addresses,
    mesh: jax.sharding.Mesh,
    buffers: BuffersOf,
) -> Fetched:
    """The rows at the addresses; differentiate with respect to `rows`."""
    if mesh.shape["table"] == 1:
        return Fetched(gather_rows({}, tables, addresses), addresses, scratch, {}, {})
    rows, asked, used, scratch = {}, {}, dict[str, exchange.Buffers](), dict(scratch)
    for stack, by_role in addresses.items():
        table, ids = tables[stack], flat(by_role, mesh.size)
        used[stack] = buffers.get(stack) or exchange.default_buffers(len(ids), mesh)
        found, scratch[stack], asked[stack] = exchange.look_up(
            table, scratch[stack], ids, mesh, used[stack]
        )
        rows[stack] = _by_role(as_numbers(found), by_role, mesh.size)
    return Fetched(rows, addresses, scratch, asked, used)


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
    """`tables`, `slots`, `scratch` after the row-wise update with the gradients of all roles, and
    the `rounds` of the slowest exchange so far.

    If `wanted` is false, no row is touched.
    """
    tables, slots, scratch = dict(state.tables), dict(state.slots), dict(fetched.scratch)
    most = state.rounds
    for stack, by_role in fetched.addresses.items():
        table, optimizer = tables[stack], rules[rule_of(stack)]
        grads = _joined(gradients[stack], mesh.size)
        if stack not in fetched.asked:
            # Every device updates its own copy: it takes the gradients of all, once.
            all_of = flat(by_role, mesh.size), grads
            ids, grads = jax.lax.with_sharding_constraint(all_of, NamedSharding(mesh, P()))
            ids = jnp.where(wanted, ids, -1)
            # A copy fetches from its own memory what other devices would have to send.
            rows = _joined(fetched.rows[stack], 1) if mesh.size == 1 else None
            tables[stack], slots[stack], scratch[stack] = apply_rows(
                optimizer, table, slots[stack], scratch[stack], ids, grads, rate, key, rows
            )
            continue
        asked, sizes = fetched.asked[stack], fetched.buffers[stack]
        rule = _rule(optimizer, rate, key, table.dtype)
        most = jnp.maximum(most, exchange.rounds(asked, sizes))
        asked = asked._replace(numbers=jnp.where(wanted, asked.numbers, 0))
        tables[stack], slots[stack] = exchange.update(
            rule, table, slots[stack], asked, grads, mesh, sizes
        )
    return {"tables": tables, "slots": slots, "scratch": scratch, "rounds": most}


def _rule(
    optimizer: RowOptimizer, rate: jax.Array | float, key: jax.Array, dtype: Any
) -> RowUpdate:
    def rule(rows: jax.Array, slots: PyTree, grads: jax.Array) -> tuple[jax.Array, PyTree]:
        own = jax.random.fold_in(key, jax.lax.axis_index("table"))
        return row_update(optimizer, rate, own, dtype)(rows, slots, grads)

    return rule


def flat(by_role: dict[str, jax.Array], parts: int) -> jax.Array:
    """The addresses of all roles as one array that divides over devices, -1 where nothing.

    Each device's part is made of its own parts of all roles, so that nothing moves.

    >>> flat({"a": jnp.array([[1, 2], [3, 4]]), "b": jnp.array([5, 6, 7])}, 2).tolist()
    [1, 2, 5, 6, 3, 4, 7, -1]
    """
    return _part_by_part([by_role[role].reshape(-1) for role in sorted(by_role)], parts, -1)


def _joined(by_role: dict[str, jax.Array], parts: int) -> jax.Array:
    """The rows of all roles [n, D], in the order of their `flat` addresses."""
    rows = [by_role[role].reshape(-1, by_role[role].shape[-1]) for role in sorted(by_role)]
    return _part_by_part(rows, parts, 0)


def _part_by_part(arrays: list[jax.Array], parts: int, fill: int) -> jax.Array:
    columns = []
    for array in arrays:
        more = ((0, -len(array) % parts), *[(0, 0)] * (array.ndim - 1))
        whole = jnp.pad(array, more, constant_values=fill)
        columns.append(whole.reshape(parts, len(whole) // parts, *array.shape[1:]))
    joined = jnp.concatenate(columns, axis=1)
    return joined.reshape(-1, *joined.shape[2:])


def _by_role(rows: jax.Array, by_role: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """The rows [n, D] of `flat` addresses as each role has them: [..., D]."""
    columns = rows.reshape(parts, len(rows) // parts, rows.shape[1])
    found, end = {}, 0
    for role in sorted(by_role):
        shape, size = by_role[role].shape, by_role[role].size
        start, end = end, end - (-size // parts)
        part = columns[:, start:end].reshape(-1, rows.shape[1])
        found[role] = part[:size].reshape(*shape, rows.shape[1])
    return found
