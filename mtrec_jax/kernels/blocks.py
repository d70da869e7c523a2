"""A catalogue in blocks: rough scores of one block after the other, folded into something small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

_SCORES = 1 << 21  # scores of one block in a loop, 8 MB
_FEW = 16  # queries for which scores are made at once: a loop would copy the items, which are more
_WHOLE = 1 << 25  # as long as there are no more scores than this, 128 MB
PIECE = 2048  # entries that are taken out at a time


class Items(NamedTuple):
    """A catalogue: vectors, and what makes cosines of their products."""

    vectors: Array  # [N, D] of any floating or integer type
    scale: Float[Array, " N"] | None = None  # inverse norms: cosine; None: dot products
    largest: Float[Array, ""] | float = 1.0  # bound of all |query| |item|


class Admissible(NamedTuple):
    """Which items a query may get; all, where a part is None."""

    exclude: Int[Array, "Q X"] | None = None  # ascending ids, filled up with N or more
    entries: Int[Array, "2 E"] | None = None  # (id, query) of all these, by ascending id
    allowed: Bool[Array, "G N"] | None = None
    group: Int[Array, " Q"] | None = None  # which row of `allowed`; None: the first
    stop: Int[Array, ""] | None = None  # ids from here on are no items


ALL = Admissible()


class Plan(NamedTuple):
    """How a catalogue is cut: static numbers."""

    items: int
    block: int  # items of a block, a multiple of `group`
    blocks: int
    group: int  # neighbouring items of which only the maximum is kept
    groups: int  # of all blocks

    @property
    def each(self) -> int:
        """Groups of a block."""
        return self.block // self.group


def make_plan(rows: int, count: int, group: int, block: int | None) -> Plan:
    """Blocks of items, by default as large as fits the cache with so many queries."""
    if block is None:
        most = _WHOLE if rows <= _FEW else _SCORES
        block = count if rows * count <= most else max(1, _SCORES // rows)
    block = -(-min(block, count) // group) * group
    blocks = -(-count // block)
    return Plan(count, block, blocks, group, blocks * block // group)


def block_for(queries: Array, items: Items, block: int | None) -> int | None:
    """Blocks even for few queries where items have to be converted, a block at a time."""
    if block is None and items.vectors.dtype != queries.dtype:
        return _SCORES // max(len(queries), _FEW)
    return block


def starts(numbers: Array, plan: Plan) -> Array:
    """The first item of blocks: the last one is moved back to end with the items."""
    return jnp.minimum(numbers * plan.block, max(plan.items - plan.block, 0))


def stream(
    queries: Array,
    items: Items,
    admissible: Admissible,
    plan: Plan,
    reduce: Callable[[Array, Array, Any], Any],
    start: Any,
    scores: Float[Array, "block Q"] | None = None,
) -> Any:
    """Fold `reduce(number, scores [block, Q], carry)` over the blocks.

    Items that the last block shares with the one before, padding and items that are not admissible
    score -inf. Where all is one block, `scores` may have been made by `at_once`.
    """
    if plan.blocks == 1:
        scores = at_once(queries, items, admissible, plan) if scores is None else scores
        return reduce(jnp.int32(0), scores, start)

    def body(number: Array, carry: Any) -> Any:
        number = number.astype(jnp.int32)
        first = starts(number, plan)
        vectors = lax.dynamic_slice_in_dim(items.vectors, first, plan.block)
        scale = items.scale
        if scale is not None:
            scale = lax.dynamic_slice_in_dim(scale, first, plan.block)
        scores = _products(vectors, scale, queries)
        return reduce(number, _masked(scores, number, first, admissible, plan), carry)

    return lax.fori_loop(0, plan.blocks, body, start)


def at_once(
    queries: Array,
    items: Items,
    admissible: Admissible,
    plan: Plan,
    memory: Float[Array, "block Q"] | None = None,
) -> Float[Array, "block Q"]:
    """The scores of all items, for a plan of one block.

    In a program of its own, `memory` can be donated (`keep_unused`) to be written over: a CPU takes
    longer to provide fresh memory than to multiply.
    """
    assert memory is None or memory.shape == (plan.block, len(queries))
    scores = _products(items.vectors, items.scale, queries)
    scores = jnp.pad(scores, ((0, plan.block - plan.items), (0, 0)), constant_values=-jnp.inf)
    # On one device the padding is less than a 64th, see `placing.placed`.
    tail = None if memory is None else min(len(scores), len(scores) // 32 + 64)
    return _masked(scores, 0, 0, admissible, plan, tail)


def _products(vectors: Array, scale: Array | None, queries: Array) -> Float[Array, "n Q"]:
    """Rough scores, items first: in this layout maxima of groups run along whole rows."""
    found = lax.dot_general(
        vectors.astype(queries.dtype),
        queries,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
    )
    return found if scale is None else found * scale[:, None]


def _masked(
    scores: Array,
    number: Any,
    first: Any,
    admissible: Admissible,
    plan: Plan,
    tail: int | None = None,
) -> Array:
    ids = first + jnp.arange(plan.block, dtype=jnp.int32)
    if plan.blocks > 1:
        scores = jnp.where((ids >= number * plan.block)[:, None], scores, -jnp.inf)
    if admissible.stop is not None:
        size = len(scores) if tail is None else tail
        scores = _without_tail(scores, admissible.stop - first, size)
    if admissible.allowed is not None:
        allowed = admissible.allowed
        if plan.blocks > 1:
            allowed = lax.dynamic_slice_in_dim(allowed, first, plan.block, axis=1)
        else:
            allowed = jnp.pad(allowed, ((0, 0), (0, plan.block - plan.items)))
        group = admissible.group
        chosen = allowed[0][:, None] if group is None else allowed.T[:, group]
        scores = jnp.where(chosen, scores, -jnp.inf)
    if admissible.entries is not None:
        scores = _without(scores, admissible.entries, first, plan.block)
    return scores


def _without_tail(scores: Array, count: Array, size: int) -> Array:
    """-inf from the row `count` on, which is among the last `size`: only these are written."""
    start = len(scores) - size
    place = start + jnp.arange(size, dtype=jnp.int32)[:, None]
    tail = jnp.where(place < count, scores[start:], -jnp.inf)
    return lax.dynamic_update_slice_in_dim(scores, tail, start, 0)


def _without(scores: Array, entries: Array, first: Any, block: int) -> Array:
    """-inf at the (item, query) entries of a block, which stand together."""
    size = min(PIECE, entries.shape[1])
    begin, end = jnp.searchsorted(entries[0], jnp.stack([first, first + block]))

    def take_out(piece: Array, scores: Array) -> Array:
        start = jnp.minimum(begin + piece * size, entries.shape[1] - size)
        item, query = lax.dynamic_slice_in_dim(entries, start, size, axis=1)
        inside = (item >= first) & (item < first + block)
        place = jnp.where(inside, item - first, block)
        return scores.at[place, query].set(-jnp.inf, mode="drop")

    return lax.fori_loop(0, (end - begin + size - 1) // size, take_out, scores)
