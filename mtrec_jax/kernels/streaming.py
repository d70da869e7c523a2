"""Exact top-k and target ranks over a stream of item blocks: plain JAX, to be used in `jax.jit`.

A block of items is multiplied with all queries, reduced to the maxima of small groups of items
while it is still in cache, and forgotten: nothing of shape [Q, N] exists beyond one block. These
products are approximate, as their rounding depends on shapes and devices. They choose groups, with
more of them than are needed; the members are scored anew by `arithmetic.dot`, whose bits depend on
nothing but the two vectors, and these scores alone decide. Where the products leave it open
whether an item outside the chosen groups could belong to the answer, because more scores than usual
lie within the rounding error of each other (items that occur many times), many more groups are
chosen; where that does not suffice, the query is computed by `arithmetic.dot` throughout.
So scores, ids and ranks do not depend on blocks, on other queries or on the number of devices.

Shapes are static and values are not checked (`mtrec_jax.kernels.scoring` does that).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mtrec_jax.kernels.blocks import ALL, Admissible, Items, block_for, make_plan, stream
from mtrec_jax.kernels.candidates import (
    EXACT,
    error_bound,
    exact_block,
    exact_scores,
    filled,
    is_admissible,
    largest,
    members,
    of_one,
    ordered,
    rough_scores,
    top_of_groups,
)

WIDE = 512  # candidates beyond k where these did not suffice, as many items score the same
SPARE = 4  # candidates beyond k, so that close scores seldom need the slow way
# Groups in which a rank may depend on rounding before the slow way is taken: at least 8, and one in
# 4096 items, as scores are the closer to each other the more there are.
NEAR, NEAR_SHARE = 8, 4096
RANK_GROUP = 8  # items of a group in `rank`


def topk(
    queries: Float[Array, "Q D"],
    items: Items,
    k: int,
    admissible: Admissible = ALL,
    block: int | None = None,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The k largest scores per query, and their ids, best first: [Q, K] both.

    Equal scores come in the order of ids. Places that no item can fill hold -inf and -1.

    >>> import jax
    >>> items = Items(jnp.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]]))
    >>> scores, ids = jax.jit(topk, static_argnames="k")(jnp.eye(2), items, k=2)
    >>> ids.tolist()
    [[1, 0], [0, 1]]
    """
    rows, count = queries.shape[0], items.vectors.shape[0]
    kept = min(k, count)
    if rows == 0 or kept == 0:
        return filled(jnp.zeros((rows, 0), queries.dtype), jnp.zeros((rows, 0), jnp.int32), k)
    found = candidates(queries, items, k, admissible, block)
    return settled(queries, items, k, found, admissible, block)


class Candidates(NamedTuple):
    """Groups of items that can hold the answer."""

    chosen: Int[Array, "Q C"]  # the groups with the highest products
    floor: Float[Array, " Q"]  # no product outside of them is higher


def candidates(
    queries: Float[Array, "Q D"],
    items: Items,
    k: int,
    admissible: Admissible = ALL,
    block: int | None = None,
    scores: Float[Array, "M Q"] | None = None,
    spare: int = SPARE,
) -> Candidates:
    """The first half of `topk`, for Q and N above 0: the stream, or `blocks.at_once`.

    A program of its own is faster: within one, XLA computes the groups anew for each use of them.
    """
    kept, rows = min(k, items.vectors.shape[0]), queries.shape[0]
    block = block_for(queries, items, block)
    plan = make_plan(rows, items.vectors.shape[0], group_size(kept), block)

    def reduce(number: Array, scores: Array, maxima: Array) -> Array:
        grouped = scores.reshape(-1, plan.group, rows).max(axis=1)
        return lax.dynamic_update_slice_in_dim(maxima, grouped, number * plan.each, 0)

    empty = jnp.full((plan.groups, rows), -jnp.inf, queries.dtype)
    maxima = stream(queries, items, admissible, plan, reduce, empty, scores)
    highest, chosen = largest(maxima, min(kept + spare, plan.groups))
    # The minimum, as XLA no longer knows a sort for a `top_k` once one of its places is sliced out.
    floor = jnp.min(highest, axis=1)
    if chosen.shape[1] == plan.groups:
        floor = jnp.full_like(floor, -jnp.inf)
    return Candidates(chosen, floor)


def settled(
    queries: Float[Array, "Q D"],
    items: Items,
    k: int,
    found: Candidates,
    admissible: Admissible = ALL,
    block: int | None = None,
    rough: Float[Array, "M Q"] | None = None,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The second half of `topk`: exact scores of the candidates decide.

    The rough scores of their members are made anew, unless they are there: `blocks.at_once`.
    """
    rows, kept = queries.shape[0], min(k, items.vectors.shape[0])
    scores, ids, certain = _rescored(queries, items, kept, found, admissible, block, rough)

    def wider() -> tuple[Array, Array]:
        found = candidates(queries, items, k, admissible, block, rough, WIDE)
        scores, ids, certain = _rescored(
            queries, items, kept, found, admissible, block, rough, WIDE
        )

        def one(row: Any) -> tuple[Array, Array]:
            number, found = row
            return lax.cond(
                certain[number],
                lambda: found,
                lambda: _topk_exact(queries[number], items, kept, of_one(admissible, number)),
            )

        return lax.cond(
            jnp.all(certain),
            lambda: (scores, ids),
            lambda: lax.map(one, (jnp.arange(rows), (scores, ids))),
        )

    scores, ids = lax.cond(jnp.all(certain), lambda: (scores, ids), wider)
    return filled(scores, ids, k)


def group_size(kept: int) -> int:
    """Items of a group: larger groups make the stream cheaper, and more items to be scored anew."""
    return 16 if kept <= 16 else 8 if kept <= 128 else 4


def _rescored(
    queries: Array,
    items: Items,
    kept: int,
    found: Candidates,
    admissible: Admissible,
    block: int | None,
    every: Array | None = None,
    spare: int = SPARE,
) -> tuple[Array, Array, Array]:
    """Scores, ids, and for which queries they are certainly right."""
    block = block_for(queries, items, block)
    plan = make_plan(queries.shape[0], items.vectors.shape[0], group_size(kept), block)
    floor = found.floor
    # Barriers keep XLA from computing a step anew in each place that uses it.
    ids, real = members(lax.optimization_barrier(found.chosen), plan)
    if every is None:
        real &= is_admissible(ids, admissible)
        rough = jnp.where(real, rough_scores(queries, items, ids), -jnp.inf)
    else:  # where what is not admissible stands as -inf
        column = jnp.arange(len(ids), dtype=jnp.int32)[:, None]
        rough = jnp.where(real, every.at[ids, column].get(mode="promise_in_bounds"), -jnp.inf)
    ids, rough = lax.optimization_barrier((ids, rough))
    groups = rough.reshape(len(rough), -1, plan.group)
    best, place = top_of_groups(groups, min(kept + spare, ids.shape[1]))
    if place.shape[1] < ids.shape[1]:
        floor = jnp.maximum(floor, jnp.min(best, axis=1))
    ids = lax.optimization_barrier(jnp.take_along_axis(ids, place, axis=1))
    scores = jnp.where(best == -jnp.inf, -jnp.inf, exact_scores(queries, items, ids))
    scores, ids = ordered(scores, ids, kept)
    certain = (floor == -jnp.inf) | (floor < scores[:, -1] - error_bound(queries, items))
    return scores, ids, certain


def _topk_exact(
    query: Array, items: Items, kept: int, admissible: Admissible
) -> tuple[Array, Array]:
    def merge(number: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scores, ids = exact_block(query, items, admissible, number)
        # What is kept has lower ids and stands first: `top_k` gives ties to the lowest position.
        scores, place = lax.top_k(jnp.concatenate([best[0], scores]), kept)
        return scores, jnp.concatenate([best[1], ids])[place]

    none = (jnp.full(kept, -jnp.inf, query.dtype), jnp.full(kept, -1, jnp.int32))
    return lax.fori_loop(0, -(-items.vectors.shape[0] // EXACT), merge, none)


def rank(
    queries: Float[Array, "Q D"],
    items: Items,
    targets: Int[Array, " Q"],
    admissible: Admissible = ALL,
    block: int | None = None,
    own: Float[Array, " Q"] | None = None,
) -> Int[Array, " Q"]:
    """How many items stand before each query's target in the order of `topk`: int32 [Q], 0 = first.

    An item stands before the target if its score is higher, or equal with a lower id. Items that
    are not admissible do not count; the target keeps its place even if it is one of them. Where
    `own` gives the targets' scores, they need not be among these items: ids below 0, or of N and
    more, stand for items of other shards.

    >>> import jax
    >>> items = Items(jnp.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]]))
    >>> jax.jit(rank)(jnp.eye(2), items, jnp.array([0, 2])).tolist()
    [1, 2]
    """
    rows, count = queries.shape[0], items.vectors.shape[0]
    if rows == 0 or count == 0:
        return jnp.zeros(rows, jnp.int32)
    targets = targets.astype(jnp.int32)
    own = exact_scores(queries, items, targets[:, None])[:, 0] if own is None else own
    block = block_for(queries, items, block)
    error, plan = error_bound(queries, items), make_plan(rows, count, RANK_GROUP, block)

    def reduce(number: Array, scores: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        before, near = found
        scores = scores.reshape(-1, plan.group, rows)
        close = jnp.any(jnp.abs(scores - own[None, None, :]) <= error, axis=1)
        higher = jnp.sum(scores > own[None, None, :], axis=1, dtype=jnp.int32)
        before += jnp.sum(jnp.where(close, 0, higher), axis=0, dtype=jnp.int32)
        close = close.astype(queries.dtype)
        return before, lax.dynamic_update_slice_in_dim(near, close, number * plan.each, 0)

    zeros = jnp.zeros(rows, jnp.int32), jnp.zeros((plan.groups, rows), queries.dtype)
    before, near = stream(queries, items, admissible, plan, reduce, zeros)
    most = min(max(NEAR, count // NEAR_SHARE), plan.groups)
    flags, chosen = largest(near, most)
    ids, real = members(chosen, plan)
    real &= jnp.repeat(flags > 0, plan.group, axis=1) & is_admissible(ids, admissible)
    before += _count_before(exact_scores(queries, items, ids), ids, real, own, targets)
    certain = jnp.sum(near, axis=0) <= most

    def one(row: Any) -> Array:
        number, found = row
        return lax.cond(
            certain[number],
            lambda: found,
            lambda: _rank_exact(
                queries[number], items, own[number], targets[number], of_one(admissible, number)
            ),
        )

    return lax.cond(
        jnp.all(certain),
        lambda: before,
        lambda: lax.map(one, (jnp.arange(rows), before)),
    )


def _rank_exact(
    query: Array, items: Items, own: Array, target: Array, admissible: Admissible
) -> Array:
    def add(number: Array, before: Array) -> Array:
        scores, ids = exact_block(query, items, admissible, number)
        real = scores > -jnp.inf
        return before + _count_before(
            scores[None], ids[None], real[None], own[None], target[None]
        ).squeeze(0)

    start = jnp.zeros((), jnp.int32)
    return lax.fori_loop(0, -(-items.vectors.shape[0] // EXACT), add, start)


def _count_before(
    scores: Array, ids: Array, real: Array, own: Array, targets: Array
) -> Int[Array, " Q"]:
    higher = scores > own[:, None]
    tied = (scores == own[:, None]) & (ids < targets[:, None])
    return jnp.sum(real & (higher | tied), axis=1, dtype=jnp.int32)
