"""Ids to rows: once a step, on one device or over several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mtrec_jax.tables import exchange
from mtrec_jax.tables.layout import DENSE, Layout, addresses, as_numbers, side_by_side

Ids = Mapping[str, Int[Array, "... M"]]  # {group: ids}
Rows = dict[str, Float[Array, "... M D"]]  # {group: rows}
Addresses = dict[str, dict[str, jax.Array]]  # {stack: {group: addresses, -1 where nothing}}


class Ticket(NamedTuple):
    """What a lookup knows that the update of its rows needs."""

    addresses: Addresses
    rows: dict[str, dict[str, jax.Array]]  # {stack: {group: rows}}
    scratch: dict[str, jax.Array]
    asked: dict[str, exchange.Asked]  # {} where every device holds whole tables
    buffers: exchange.BuffersOf  # of the stacks in `asked`


def find(layout: Layout, ids: Ids) -> Addresses:
    """The addresses of ids, by stack and group."""
    found: Addresses = {}
    for group, of in ids.items():
        for stack, address in addresses(layout.groups[group], of).items():
            found.setdefault(stack, {})[group] = address
    return found


def fetch(layout: Layout, stacks: Mapping[str, Num[Array, "V D"]], ids: Ids) -> Rows:
    """The rows of ids {group: [..., M]} from stacks that each device holds: {group: [..., M, D]}.

    Padding gives zeros. For serving; training uses `lookup`.
    """
    return _named(layout, _gathered(stacks, find(layout, ids)), ids)


def lookup(
    layout: Layout,
    stacks: Mapping[str, Num[Array, "V D"]],
    scratch: Mapping[str, Int[Array, " V"]],
    ids: Ids,
    mesh: jax.sharding.Mesh,
    buffers: exchange.BuffersOf,
) -> tuple[Rows, Ticket]:
    """The rows of ids {group: [..., M]}, as {group: [..., M, D]}; differentiate by them.

    Args:
      layout: of the tables.
      stacks: all of them, the dense one among them.
      scratch: {sparse stack: work space}, whatever is in it.
      ids: leading axes of examples are split over all devices of the mesh.
      mesh: with the axes "data" and "table"; sparse stacks are split over the latter.
      buffers: {stack: sizes} of the exchange; `exchange.default_buffers` where there are none.
    """
    found = find(layout, ids)
    if mesh.shape["table"] == 1:
        rows = _gathered(stacks, found)
        return _named(layout, rows, ids), Ticket(found, rows, dict(scratch), {}, {})
    rows = _gathered(stacks, {s: a for s, a in found.items() if s == DENSE})
    asked, used, scratch = {}, dict[str, exchange.Buffers](), dict(scratch)
    for stack, by_group in found.items():
        if stack == DENSE:
            continue
        wanted = flat(by_group, mesh.size)
        used[stack] = buffers.get(stack) or exchange.default_buffers(len(wanted), mesh)
        fetched, scratch[stack], asked[stack] = exchange.look_up(
            stacks[stack], scratch[stack], wanted, mesh, used[stack]
        )
        rows[stack] = _by_group(as_numbers(fetched), by_group, mesh.size)
    return _named(layout, rows, ids), Ticket(found, rows, scratch, asked, used)


def gather(table: Num[Array, "V D"], address: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows at the addresses, zero where the address is -1; tables of `BITS` give float32."""
    rows = as_numbers(table.at[address].get(mode="clip"))
    return jnp.where((address >= 0)[..., None], rows, 0)


def _gathered(
    stacks: Mapping[str, Num[Array, "V D"]], found: Addresses
) -> dict[str, dict[str, jax.Array]]:
    return {
        stack: {group: gather(stacks[stack], address) for group, address in by_group.items()}
        for stack, by_group in found.items()
    }


def _named(layout: Layout, rows: dict[str, dict[str, jax.Array]], ids: Ids) -> Rows:
    return {
        group: side_by_side(
            layout.groups[group], {s: by[group] for s, by in rows.items() if group in by}
        )
        for group in ids
    }


# --- All groups of a stack at once


def flat(by_group: Mapping[str, jax.Array], parts: int) -> jax.Array:
    """The addresses of all groups as one array that divides over devices, -1 where nothing.

    Each device's part is made of its own parts of all groups, so that nothing moves.

    >>> flat({"a": jnp.array([[1, 2], [3, 4]]), "b": jnp.array([5, 6, 7])}, 2).tolist()
    [1, 2, 5, 6, 3, 4, 7, -1]
    """
    return _part_by_part([by_group[group].reshape(-1) for group in sorted(by_group)], parts, -1)


def joined(by_group: Mapping[str, jax.Array], parts: int) -> jax.Array:
    """The rows of all groups [n, D], in the order of their `flat` addresses."""
    rows = [by_group[group].reshape(-1, by_group[group].shape[-1]) for group in sorted(by_group)]
    return _part_by_part(rows, parts, 0)


def _part_by_part(arrays: list[jax.Array], parts: int, fill: int) -> jax.Array:
    columns = []
    for array in arrays:
        more = ((0, -len(array) % parts), *[(0, 0)] * (array.ndim - 1))
        whole = jnp.pad(array, more, constant_values=fill)
        columns.append(whole.reshape(parts, len(whole) // parts, *array.shape[1:]))
    together = jnp.concatenate(columns, axis=1)
    return together.reshape(-1, *together.shape[2:])


def _by_group(
    rows: jax.Array, by_group: Mapping[str, jax.Array], parts: int
) -> dict[str, jax.Array]:
    """The rows [n, D] of `flat` addresses as each group has them: [..., D]."""
    columns = rows.reshape(parts, len(rows) // parts, rows.shape[1])
    found, end = {}, 0
    for group in sorted(by_group):
        shape, size = by_group[group].shape, by_group[group].size
        start, end = end, end - (-size // parts)
        part = columns[:, start:end].reshape(-1, rows.shape[1])
        found[group] = part[:size].reshape(*shape, rows.shape[1])
    return found
