"""Embedding tables: where a feature's row lives, and the gather that fetches it.

All tables that are updated alike share one array, a *stack*: "dense" (part of the parameters,
updated by optax), or one named after its rule (updated row by row, see `train.sparse`). Addresses
are int32: what one stack cannot hold goes to a further one, "adagrad-2" after "adagrad". The number
of a row is the offset of its owner + local id, and in the dense stack that is its address. Stacks
that are updated row by row are split over devices; popular ids are often neighbours there, so
neighbours are spread over all parts, the same way for any number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from mtrec_jax.errors import ConfigError
from mtrec_jax.sharding import ROW_MULTIPLE
from mtrec_jax.tables.hashing import hash_rows
from mtrec_jax.types import FIRST, PAD, PyTree

DENSE = "dense"
# A table of bfloat16 rows is an array of their bits: for a scatter of bfloat16 itself, XLA on CPUs
# makes a float32 copy of the whole table in every step.
BITS = jnp.dtype(jnp.uint16)
MOST_ROWS = 2**31 - 2**24  # of a stack; addresses beyond it, of what must not be written, are int32


@dataclass(frozen=True)
class Field:
    """One owner of rows in a stack."""

    owner: str  # "item", or the role and the name of a feature: "context.age"
    stack: str
    offset: int  # number of its padding row
    size: int  # rows: padding, unknown, vocabulary
    slots: int  # ids per example
    spread: int = 0  # rows of the stack over which neighbours are spread; 0: they are not
    functions: int = 0  # hash functions that give each id its rows; 0: it has one of its own

    @property
    def lookups(self) -> int:
        """Rows per example."""
        return self.slots * max(1, self.functions)


@dataclass(frozen=True)
class Group:
    """Fields that are looked up together: their ids stand side by side in one [..., M] array."""

    fields: tuple[Field, ...]

    @property
    def slots(self) -> int:
        """M, the ids of all fields."""
        return sum(f.slots for f in self.fields)


def layout(owners: Sequence[tuple[str, str, int, int]]) -> tuple[dict[str, Field], dict[str, int]]:
    """Give each owner its place: (owner, rule, size, slots) -> ({owner: Field}, {stack: rows}).

    Raises:
      ConfigError: a table has more rows than a stack can hold.

    >>> fields, rows = layout([("item", "sgd", 5, 1), ("context.user", "sgd", 4, 1)])
    >>> fields["context.user"].offset, rows
    (5, {'sgd': 128})
    """
    fields: dict[str, Field] = {}
    used: dict[str, int] = {}
    for owner, rule, size, slots in owners:
        stack = _stack_with_room(owner, rule, size, used)
        fields[owner] = Field(owner, stack, used.get(stack, 0), size, slots)
        used[stack] = used.get(stack, 0) + size
    rows = {s: -(-n // ROW_MULTIPLE) * ROW_MULTIPLE for s, n in used.items()}
    spread = {o: replace(f, spread=rows[f.stack]) for o, f in fields.items() if f.stack != DENSE}
    return fields | spread, rows


def rule_of(stack: str) -> str:
    """The rule that updates a stack.

    >>> rule_of("adagrad-2")
    'adagrad'
    """
    return stack.split("-")[0]


def _stack_with_room(owner: str, rule: str, size: int, used: dict[str, int]) -> str:
    if size > MOST_ROWS:
        raise ConfigError(
            f"{owner}: a table of {size:,} rows is more than the {MOST_ROWS:,} of one array; hash "
            "its values into fewer buckets (kind = hashed), or split the feature into several"
        )
    stack, number = rule, 1
    while used.get(stack, 0) + size > MOST_ROWS:
        if rule == DENSE:
            raise ConfigError(
                f"{owner}: the tables with placement = dense have more than {MOST_ROWS:,} rows "
                "together; give the large ones placement = sparse"
            )
        number += 1
        stack = f"{rule}-{number}"
    return stack


def spread(number: Int[Array, "..."], rows: int) -> Int[Array, "..."]:
    """The address of a row: numbers take turns in ROW_MULTIPLE equal parts of the stack.

    >>> spread(jnp.array([-1, 0, 1, 2, 128, 129]), 256).tolist()
    [-1, 0, 2, 4, 1, 3]
    """
    parts = ROW_MULTIPLE
    return jnp.where(number < 0, number, number % parts * (rows // parts) + number // parts)


def addresses(group: Group, ids: Int[Array, "... M"]) -> dict[str, Int[Array, "... M_stack"]]:
    """Local ids of a group's slots to addresses by stack; padding becomes -1 in every stack.

    An id of a hashed field becomes as many addresses as it has hash functions, side by side.
    """
    group, ids = _hashed(group, ids)
    found = {}
    for stack in _stacks(group):
        offsets = [
            (f.offset, start + i)
            for f, start in zip(group.fields, _starts(group), strict=True)
            if f.stack == stack
            for i in range(f.slots)
        ]
        if offsets:
            shift, slots = (np.array(x, np.int32) for x in zip(*offsets, strict=True))
            local = ids if len(slots) == group.slots else ids[..., slots]
            number = jnp.where(local == PAD, -1, local + jnp.broadcast_to(shift, local.shape))
            rows = next(f.spread for f in group.fields if f.stack == stack)
            found[stack] = spread(number, rows) if rows else number
    return found


def gather(table: Num[Array, "V D"], address: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows at the addresses, zero where the address is -1; tables of `BITS` give float32."""
    rows = as_numbers(table.at[address].get(mode="clip"))
    return jnp.where((address >= 0)[..., None], rows, 0)


# (rows [n, D], slots, grads [n, D]) -> (rows, slots), each slot with a row for each of n
RowUpdate = Callable[[jax.Array, PyTree, jax.Array], tuple[jax.Array, PyTree]]


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


def pool(
    group: Group, ids: Int[Array, "... M"], rows: dict[str, Float[Array, "... M_stack D"]]
) -> Float[Array, "... F D"]:
    """One vector per field: the row of a single id, the mean of several; zero for padding.

    The vector of a hashed id is the sum of its rows.
    """
    taken = dict.fromkeys(_stacks(group), 0)
    if all(f.lookups == 1 for f in group.fields) and len(taken) == 1:
        return rows[group.fields[0].stack]
    vectors = []
    for f, start in zip(group.fields, _starts(group), strict=True):
        part = rows[f.stack][..., taken[f.stack] : taken[f.stack] + f.lookups, :]
        taken[f.stack] += f.lookups
        count = jnp.sum(ids[..., start : start + f.slots] != PAD, axis=-1)[..., None]
        vectors.append(jnp.sum(part, axis=-2) / jnp.maximum(count, 1).astype(part.dtype))
    return jnp.stack(vectors, axis=-2)


def initial_table(
    key: jax.Array,
    fields: Sequence[Field],
    rows: int,
    width: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> Num[Array, "V D"]:
    """Normal rows of length about 1 / 4; padding and unknown rows are zero: they say nothing.

    A stack that is spread is made part by part, by the devices of the mesh that will hold the
    parts: what is in it does not depend on their number, and no device holds all of it.
    """
    silent = np.concatenate([np.arange(f.offset, f.offset + FIRST) for f in fields])
    drawn = jnp.float32 if dtype == BITS else dtype
    scale = 0.25 * width**-0.5
    if not fields[0].spread:
        return (jax.random.normal(key, (rows, width), dtype) * scale).at[silent].set(0)
    size = rows // ROW_MULTIPLE

    def part(number: Array) -> Array:
        made = jax.random.normal(jax.random.fold_in(key, number), (size, width), drawn) * scale
        own = jnp.where(silent % ROW_MULTIPLE == number, silent // ROW_MULTIPLE, size)
        return as_held(made.at[own].set(0, mode="drop"), dtype)

    def parts(numbers: Array) -> Array:
        return lax.map(part, numbers).reshape(-1, width)

    numbers = jnp.arange(ROW_MULTIPLE, dtype=jnp.int32)
    if mesh is None:
        return parts(numbers)
    by_row = P("table")
    sharded = jax.shard_map(parts, mesh=mesh, in_specs=by_row, out_specs=by_row, check_vma=False)
    return sharded(numbers)


def _hashed(group: Group, ids: Int[Array, "... M"]) -> tuple[Group, Int[Array, "... N"]]:
    """The group with the rows of hashed ids in their place, as if these were its ids."""
    if not any(f.functions for f in group.fields):
        return group, ids
    parts = []
    for f, start in zip(group.fields, _starts(group), strict=True):
        part = ids[..., start : start + f.slots]
        parts.append(hash_rows(part, f.owner, f.size - FIRST, f.functions) if f.functions else part)
    fields = tuple(replace(f, slots=f.lookups, functions=0) for f in group.fields)
    return Group(fields), jnp.concatenate(parts, axis=-1)


def _stacks(group: Group) -> list[str]:
    return sorted({f.stack for f in group.fields})


def _starts(group: Group) -> list[int]:
    ends = np.cumsum([f.slots for f in group.fields])
    return [int(end) - f.slots for end, f in zip(ends, group.fields, strict=True)]
