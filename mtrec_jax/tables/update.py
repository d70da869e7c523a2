"""Rows are updated: each touched row once, with the gradients of all places that looked it up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from mtrec_jax.mixing import mixed_bits
from mtrec_jax.tables import exchange
from mtrec_jax.tables.layout import (
    BITS,
    DENSE,
    Layout,
    as_held,
    as_numbers,
    by_stack,
    computed_dtype,
    rule_of,
)
from mtrec_jax.tables.lookup import Ticket, flat, joined
from mtrec_jax.tables.rules import Rate, RowOptimizer
from mtrec_jax.types import PyTree

_BLOCK = 2**14  # rows that are updated at once: it bounds the work space

# (rows [n, D], slots, grads [n, D]) -> (rows, slots), each slot with a row for each of n
RowUpdate = Callable[[jax.Array, PyTree, jax.Array], tuple[jax.Array, PyTree]]


class Updated(NamedTuple):
    """The sparse stacks after a step."""

    tables: dict[str, jax.Array]
    slots: dict[str, PyTree]
    scratch: dict[str, jax.Array]
    rounds: jax.Array  # of the slowest exchange so far


def update(
    layout: Layout,
    rules: Mapping[str, RowOptimizer],
    state: Updated,
    ticket: Ticket,
    grads: Mapping[str, Float[Array, "... M D"]],
    rate: Rate,
    key: jax.Array,
    wanted: jax.Array,
    mesh: jax.sharding.Mesh,
) -> Updated:
    """Row-wise update of the sparse stacks with the gradients of all groups of a lookup.

    Args:
      layout: of the tables.
      rules: {name: rule}.
      state: the stacks; their scratch is the ticket's.
      ticket: from `lookup`.
      grads: {group: gradient of its rows}.
      rate: learning rate.
      key: of the rounding of bfloat16 rows.
      wanted: [] bool; if false, no row is touched.
      mesh: the devices.
    """
    tables, slots, scratch = dict(state.tables), dict(state.slots), dict(ticket.scratch)
    most = state.rounds
    grads_of = _of_stacks(layout, grads)
    for stack, by_group in ticket.addresses.items():
        if stack == DENSE:
            continue
        table, optimizer = tables[stack], rules[rule_of(stack)]
        given = joined(grads_of[stack], mesh.size)
        if stack not in ticket.asked:
            # Every device updates its own copy: it takes the gradients of all, once.
            all_of = flat(by_group, mesh.size), given
            ids, given = jax.lax.with_sharding_constraint(all_of, NamedSharding(mesh, P()))
            ids = jnp.where(wanted, ids, -1)
            # A copy fetches from its own memory what other devices would have to send.
            rows = joined(ticket.rows[stack], 1) if mesh.size == 1 else None
            tables[stack], slots[stack], scratch[stack] = apply_rows(
                optimizer, table, slots[stack], scratch[stack], ids, given, rate, key, rows
            )
            continue
        asked, sizes = ticket.asked[stack], ticket.buffers[stack]
        rule = _rule_of_shard(optimizer, rate, key, table.dtype)
        most = jnp.maximum(most, exchange.rounds(asked, sizes))
        asked = asked._replace(numbers=jnp.where(wanted, asked.numbers, 0))
        tables[stack], slots[stack] = exchange.update(
            functools.partial(update_rows, rule), table, slots[stack], asked, given, mesh, sizes
        )
    return Updated(tables, slots, scratch, most)


def dense_gradient(
    layout: Layout, ticket: Ticket, grads: Mapping[str, Float[Array, "... M D"]]
) -> Float[Array, "V D"]:
    """The gradient of the dense stack, for optax: the sum over all places that looked a row up."""
    by_group = _of_stacks(layout, grads)[DENSE]
    total: Any = 0
    for group, address in ticket.addresses[DENSE].items():
        part = by_group[group]
        zeros = jnp.zeros((layout.rows[DENSE], layout.width), part.dtype)
        place = jnp.where(address < 0, layout.rows[DENSE], address)
        total = total + zeros.at[place].add(part, mode="drop")
    return total


def _of_stacks(
    layout: Layout, grads: Mapping[str, Float[Array, "... M D"]]
) -> dict[str, dict[str, Array]]:
    found: dict[str, dict[str, Array]] = {}
    for group, gradient in grads.items():
        for stack, part in by_stack(layout.groups[group], gradient).items():
            found.setdefault(stack, {})[group] = part
    return found


def new_scratch(
    tables: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Work space of the exact dedup, one int32 a table row."""
    return {stack: jnp.zeros(table.shape[0], jnp.int32) for stack, table in tables.items()}


def apply_rows(
    optimizer: RowOptimizer,
    table: Num[Array, "V D"],
    slots: PyTree,
    scratch: Int[Array, " V"],
    ids: Int[Array, " n"],
    grads: Float[Array, "n D"],
    learning_rate: Rate,
    key: jax.Array | None = None,
    rows: Float[Array, "n D"] | None = None,
) -> tuple[Num[Array, "V D"], PyTree, Int[Array, " V"]]:
    """Sum the gradients of equal ids, update each touched row once; ids below 0 are padding.

    The exact dedup needs no sort: every id writes its position into `scratch` and reads back one
    winner among its equals; gradients of the others are added to the winner's. `scratch` is work
    space whose content means nothing between calls. Returns (table, slots, scratch), updated in
    place when the caller donates them. bfloat16 rows (a table of `layout.BITS`) are updated in
    float32 and rounded at random, by `key`.
    Whoever has the `rows` of the ids already, from `lookup.gather`, saves fetching them anew.
    """
    n, rows_total = ids.shape[0], table.shape[0]
    position = jnp.arange(n, dtype=jnp.int32)
    valid = ids >= 0
    # Positions that must not write are sent to distinct rows past the end, which are dropped: a
    # clamped index would hit the last row, a repeated one would break unique_indices.
    outside = rows_total + position
    scratch = scratch.at[jnp.where(valid, ids, outside)].set(position, mode="drop")
    winner = jnp.where(valid, scratch.at[ids].get(mode="clip"), position)
    grads = grads.astype(computed_dtype(table))
    # The winner has its own gradient already: only those of its equals are added.
    summed = grads.at[jnp.where(winner == position, n, winner)].add(grads, mode="drop")
    target = jnp.where(valid & (winner == position), ids, outside)
    blocks = max(1, -(-n // _BLOCK))
    block = -(-n // blocks)

    def one_block(number: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        first = number * block
        start = jnp.minimum(first, n - block)  # the last block begins inside the one before it
        of_block = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block
        )
        place = start + jnp.arange(block, dtype=jnp.int32)
        address = jnp.where(place >= first, of_block(target), rows_total + place)
        own = None if key is None else jax.random.fold_in(key, number)
        rule = row_update(optimizer, learning_rate, own, table.dtype)
        old = None if rows is None else of_block(rows)
        return update_rows(rule, *state, address, of_block(summed), old)

    table, slots = jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), one_block, (table, slots))
    return table, slots, scratch


def update_rows(
    rule: RowUpdate,
    table: Num[Array, "V D"],
    slots: PyTree,
    address: Int[Array, " n"],
    grads: Float[Array, "n D"],
    rows: Float[Array, "n D"] | None = None,
) -> tuple[Num[Array, "V D"], PyTree]:
    """Apply `rule(rows, slots, grads)` to different rows and their slots, in place if donated.

    Addresses beyond the table are dropped. A caller who has the `rows` already, in the type of the
    gradients, saves fetching them anew.
    """
    old = as_numbers(table.at[address].get(mode="clip")) if rows is None else rows
    old_slots = jax.tree.map(lambda s: s.at[address].get(mode="clip"), slots)
    new, new_slots = rule(old, old_slots, grads)

    def write(whole: Array, part: Array) -> Array:
        part = as_held(part, whole.dtype)
        return whole.at[address].set(part, mode="drop", unique_indices=True)

    return write(table, new), jax.tree.map(write, slots, new_slots)


def row_update(
    optimizer: RowOptimizer, learning_rate: Rate, key: jax.Array | None, dtype: jnp.dtype
) -> RowUpdate:
    """The rule as a function of (rows, slots, grads); bfloat16 rows are rounded at random."""

    def rule(rows: jax.Array, slots: PyTree, grads: jax.Array) -> tuple[jax.Array, PyTree]:
        new, slots = optimizer.update(rows, slots, grads, learning_rate)
        return stochastic_round(new, key) if dtype == BITS else new, slots

    return rule


def _rule_of_shard(optimizer: RowOptimizer, rate: Rate, key: jax.Array, dtype: Any) -> RowUpdate:
    def rule(rows: jax.Array, slots: PyTree, grads: jax.Array) -> tuple[jax.Array, PyTree]:
        own = jax.random.fold_in(key, jax.lax.axis_index("table"))
        return row_update(optimizer, rate, own, dtype)(rows, slots, grads)

    return rule


def stochastic_round(x: Float[Array, "n D"], key: jax.Array | None) -> Float[Array, "n D"]:
    """float32 to one of the two nearest bfloat16, in proportion to how near: right on average.

    Rounding to the nearest would lose every update below half a unit in the last of 8 bits.
    """
    if key is None:
        raise ValueError("a table of bfloat16 rows needs a key, to be rounded at random")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += mixed_bits(x.shape, key) >> 16  # a carry moves to the next number
    down = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), down, x.astype(jnp.bfloat16))
