"""Embedding tables: which row of which array belongs to which id.

A *table* has a row an id. All tables that are updated alike share one array, a *stack*: "dense"
(with the dense parameters, updated by optax), or one named after its rule (sparse: updated row by
row, see `tables.rules`). The number of a row is the offset of its table + id; in the dense stack,
that is its address. Sparse stacks are split over devices where there are several; popular ids are
often neighbours, so neighbours are spread over all parts, the same way for any number of devices.
Addresses are int32: what one stack cannot hold goes to a further one, "adagrad-2" after "adagrad".

Tables that are looked up together form a *group*: their ids stand side by side in one [..., M]
array, and so do their rows, [..., M, D].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from mtrec_jax.errors import ConfigError
from mtrec_jax.sharding import ROW_MULTIPLE, AnyMesh
from mtrec_jax.tables.hashing import hash_rows
from mtrec_jax.types import FIRST, PAD

DENSE = "dense"
# A table of bfloat16 rows is an array of their bits: for a scatter of bfloat16 itself, XLA on CPUs
# makes a float32 copy of the whole table in every step.
BITS = jnp.dtype(jnp.uint16)
MOST_ROWS = 2**31 - 2**24  # of a stack; addresses beyond it, of what must not be written, are int32


@dataclass(frozen=True)
class Place:
    """Where a table lies."""

    name: str
    stack: str
    offset: int  # number of its padding row
    size: int  # rows: padding, unknown, vocabulary
    spread: int = 0  # rows of the stack over which neighbours are spread; 0: they are not
    functions: int = 0  # hash functions that give each id its rows; 0: it has one of its own


class Slots(NamedTuple):
    """A table's ids in a group."""

    place: Place
    ids: int  # ids side by side

    @property
    def lookups(self) -> int:
        """Rows that they take."""
        return self.ids * max(1, self.place.functions)


Group = tuple[Slots, ...]


class Layout(NamedTuple):
    """All tables of a model, and how it looks them up."""

    places: dict[str, Place]
    rows: dict[str, int]  # {stack: V}
    groups: dict[str, Group]
    width: int  # D


@dataclass(frozen=True)
class TableSize:
    """A table before it has a place."""

    rule: str  # DENSE, or the rule that updates it row by row
    rows: int  # padding, unknown, vocabulary and room for more
    functions: int = 0  # hash functions; 0: a row an id


def make_layout(
    tables: Mapping[str, TableSize],
    groups: Mapping[str, Sequence[tuple[str, int]]],
    width: int,
) -> Layout:
    """Give each table its place: {name: size}, {group: [(table, ids side by side)]} -> layout.

    Raises:
      ConfigError: a table has more rows than a stack can hold.

    >>> sizes = {"item": TableSize("sgd", 5), "user": TableSize("sgd", 4)}
    >>> found = make_layout(sizes, {"context": [("user", 1)]}, width=8)
    >>> found.places["user"].offset, found.rows
    (5, {'sgd': 128})
    """
    places: dict[str, Place] = {}
    used: dict[str, int] = {}
    for name, table in tables.items():
        stack = _stack_with_room(name, table, used)
        offset = used.get(stack, 0)
        places[name] = Place(name, stack, offset, table.rows, functions=table.functions)
        used[stack] = offset + table.rows
    rows = {s: -(-n // ROW_MULTIPLE) * ROW_MULTIPLE for s, n in used.items()}
    spread = {n: replace(p, spread=rows[p.stack]) for n, p in places.items() if p.stack != DENSE}
    places |= spread
    named = {g: tuple(Slots(places[n], count) for n, count in of) for g, of in groups.items()}
    return Layout(places, rows, {g: of for g, of in named.items() if of}, width)


def rule_of(stack: str) -> str:
    """The rule that updates a stack.

    >>> rule_of("adagrad-2")
    'adagrad'
    """
    return stack.split("-")[0]


def _stack_with_room(name: str, table: TableSize, used: dict[str, int]) -> str:
    if table.rows > MOST_ROWS:
        raise ConfigError(
            f"{name}: a table of {table.rows:,} rows is more than the {MOST_ROWS:,} of one array; "
            f"set tables.{name}.hash_rows, or split the feature into several"
        )
    stack, number = table.rule, 1
    while used.get(stack, 0) + table.rows > MOST_ROWS:
        if table.rule == DENSE:
            raise ConfigError(
                f"{name}: the dense tables have more than {MOST_ROWS:,} rows together; give the "
                'large ones tables.NAME.update = "sparse"'
            )
        number += 1
        stack = f"{table.rule}-{number}"
    return stack


def spread(number: Int[Array, "..."], rows: int) -> Int[Array, "..."]:
    """The address of a row: numbers take turns in ROW_MULTIPLE equal parts of the stack.

    >>> spread(jnp.array([-1, 0, 1, 2, 128, 129]), 256).tolist()
    [-1, 0, 2, 4, 1, 3]
    """
    parts = ROW_MULTIPLE
    return jnp.where(number < 0, number, number % parts * (rows // parts) + number // parts)


def addresses(group: Group, ids: Int[Array, "... M"]) -> dict[str, Int[Array, "... M_stack"]]:
    """Ids of a group to addresses by stack; padding becomes -1.

    An id of a hashed table becomes as many addresses as it has hash functions, side by side.
    """
    parts: dict[str, list[Array]] = {}
    if not any(slots.place.functions for slots in group):
        return _addresses_at_once(group, ids)
    start = 0
    for (place, count), slots in zip(group, group, strict=True):
        local = ids[..., start : start + count]
        start += count
        if place.functions:
            local = hash_rows(local, place.name, place.size - FIRST, place.functions)
        one = (Slots(replace(place, functions=0), slots.lookups),)
        parts.setdefault(place.stack, []).append(_addresses_at_once(one, local)[place.stack])
    return {stack: jnp.concatenate(found, axis=-1) for stack, found in parts.items()}


def _addresses_at_once(group: Group, ids: Int[Array, "... M"]) -> dict[str, Array]:
    """The addresses of ids of which each has one row."""
    found = {}
    for stack in stacks(group):
        of_slots, start = [], 0
        for place, count in group:
            if place.stack == stack:
                of_slots += [(place.offset, start + i) for i in range(count)]
            start += count
        shift, slots = (np.array(x, np.int32) for x in zip(*of_slots, strict=True))
        local = ids if len(slots) == start else ids[..., slots]
        number = jnp.where(local == PAD, -1, local + jnp.broadcast_to(shift, local.shape))
        rows = next(place.spread for place, _ in group if place.stack == stack)
        found[stack] = spread(number, rows) if rows else number
    return found


def side_by_side(
    group: Group, rows: Mapping[str, Float[Array, "... M_stack D"]]
) -> Float[Array, "... M D"]:
    """Rows by stack, as `addresses` orders them, in the order of the group's ids.

    The row of a hashed id is the sum of its rows.
    """
    if len(rows) == 1 and not any(slots.place.functions for slots in group):
        return next(iter(rows.values()))
    parts, taken = [], dict.fromkeys(rows, 0)
    for slots in group:
        place, count = slots
        part = rows[place.stack][..., taken[place.stack] :, :][..., : slots.lookups, :]
        taken[place.stack] += slots.lookups
        if place.functions:
            part = part.reshape(*part.shape[:-2], count, place.functions, part.shape[-1]).sum(-2)
        parts.append(part)
    return jnp.concatenate(parts, axis=-2)


def by_stack(group: Group, grads: Float[Array, "... M D"]) -> dict[str, Float[Array, "... m D"]]:
    """Gradients of the rows of `side_by_side` as those of the rows by stack."""
    if len(stacks(group)) == 1 and not any(slots.place.functions for slots in group):
        return {group[0].place.stack: grads}
    parts: dict[str, list[Array]] = {}
    start = 0
    for place, count in group:
        part = grads[..., start : start + count, :]
        start += count
        if place.functions:
            part = jnp.repeat(part, place.functions, axis=-2)
        parts.setdefault(place.stack, []).append(part)
    return {stack: jnp.concatenate(found, axis=-2) for stack, found in parts.items()}


def stacks(group: Group) -> list[str]:
    """The stacks in which a group has tables."""
    return sorted({slots.place.stack for slots in group})


def pool(
    group: Group, ids: Int[Array, "... M"], rows: Float[Array, "... M D"]
) -> Float[Array, "... F D"]:
    """One vector a table: the row of a single id, the mean of several; zero for padding."""
    if all(count == 1 for _, count in group):
        return rows
    vectors, start = [], 0
    for _, count in group:
        part = rows[..., start : start + count, :]
        there = jnp.sum(ids[..., start : start + count] != PAD, axis=-1)[..., None]
        vectors.append(jnp.sum(part, axis=-2) / jnp.maximum(there, 1).astype(part.dtype))
        start += count
    return jnp.stack(vectors, axis=-2)


# --- What the arrays hold


def computed_dtype(table: jax.Array | jax.ShapeDtypeStruct) -> jnp.dtype:
    """Of arithmetic on rows: float32 for a table of `BITS`, else the table's own."""
    return jnp.dtype(jnp.float32) if table.dtype == BITS else table.dtype


def as_numbers(rows: Array) -> Array:
    """Rows of a table as numbers of its `computed_dtype`.

    >>> as_numbers(as_held(jnp.array([0.1, 2.0]), BITS)).tolist()
    [0.10009765625, 2.0]
    """
    if rows.dtype != BITS:
        return rows
    return lax.bitcast_convert_type(rows, jnp.bfloat16).astype(jnp.float32)


def as_held(rows: Array, dtype: jnp.dtype) -> Array:
    """Numbers as a table of `dtype` holds them; bfloat16 is rounded to the nearest."""
    if dtype == BITS:
        return lax.bitcast_convert_type(rows.astype(jnp.bfloat16), BITS)
    return rows.astype(dtype)


def initial_stacks(
    layout: Layout, key: jax.Array, dtype: jnp.dtype, low: bool, mesh: AnyMesh | None = None
) -> dict[str, Num[Array, "V D"]]:
    """Normal rows of length about 1 / 4; those of padding and unknown are zero: they say nothing.

    Args:
      layout: which rows there are.
      key: of the draws.
      dtype: of the rows.
      low: sparse stacks are kept in bfloat16.
      mesh: a sparse stack is made part by part, by the devices that will hold the parts; what is
        in it does not depend on their number, and no device holds all of it. None: one device.
    """
    found = {}
    for i, (stack, rows) in enumerate(sorted(layout.rows.items())):
        offsets = [p.offset for p in layout.places.values() if p.stack == stack]
        silent = np.concatenate([np.arange(o, o + FIRST) for o in offsets])
        kept = BITS if low and stack != DENSE else dtype
        shape = rows, layout.width
        of_stack = jax.random.fold_in(key, i)
        if stack == DENSE:
            drawn = jax.random.normal(of_stack, shape, dtype) * _scale(layout.width)
            found[stack] = drawn.at[silent].set(0)
        else:
            found[stack] = _initial_parts(of_stack, silent, shape, kept, mesh)
    return found


def _scale(width: int) -> float:
    return 0.25 * width**-0.5


def _initial_parts(
    key: jax.Array,
    silent: np.ndarray,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    mesh: AnyMesh | None,
) -> Num[Array, "V D"]:
    (rows, width), drawn = shape, jnp.float32 if dtype == BITS else dtype
    size = rows // ROW_MULTIPLE

    def part(number: Array) -> Array:
        own = jax.random.fold_in(key, number)
        made = jax.random.normal(own, (size, width), drawn) * _scale(width)
        zero = jnp.where(silent % ROW_MULTIPLE == number, silent // ROW_MULTIPLE, size)
        return as_held(made.at[zero].set(0, mode="drop"), dtype)

    def parts(numbers: Array) -> Array:
        return lax.map(part, numbers).reshape(-1, width)

    numbers = jnp.arange(ROW_MULTIPLE, dtype=jnp.int32)
    if mesh is None:
        return parts(numbers)
    by_row = P("table")
    sharded = jax.shard_map(parts, mesh=mesh, in_specs=by_row, out_specs=by_row, check_vma=False)
    return sharded(numbers)
