"""Exact top-k and target ranks over a stream of item blocks: plain JAX, to be used in `jax.jit`.

A block of items is multiplied with all queries, reduced while it is still in cache, and forgotten:
nothing of shape [Q, N] ever exists. Scores are dot products; give vectors from `normalise` for
cosines. Shapes are static and values are not checked (`mtrec_jax.kernels.scoring` does that).
Memory is O(Q * block), so callers with many queries send them in chunks.

What is promised about rounding. The score of a pair is whatever the one product of shape
[Q, D] x [block, D] gives it; ordering, ties and ranks are those of exactly these numbers. `topk`
and `rank` called with equal shapes use equal products and agree to the last bit; equal item
vectors tie. Another Q, block or device may round a score differently by a few units in the last
place and so swap items whose true scores are that close; nothing else can change.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 4096  # items per product: [256, 4096] scores and [4096, 64] items stay in the L2/L3 cache
GROUP = 16  # neighbouring items of which only the maximum takes part in the selection
_SMALLEST_BLOCK = 128  # below this, matrix products take other code paths and round differently


def normalise(vectors: Float[Array, "n D"]) -> Float[Array, "n D"]:
    """Rows [n, D] divided by their L2 norm; a zero row stays zero and has zero gradient.

    Rows are first divided by their largest magnitude, so that squares neither overflow nor vanish
    and parallel rows such as [1, 2] and [3, 6] become equal to the last bit. A row whose largest
    magnitude is below the smallest normal number counts as zero.

    >>> jax.jit(normalise)(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6..., 0.8...], [0.0, 0.0]]
    """
    largest = jnp.max(jnp.abs(vectors), axis=1, keepdims=True, initial=0)
    is_zero = largest < jnp.finfo(vectors.dtype).tiny
    # Ones keep the unused branch finite: its gradient would be 0 * inf otherwise.
    safe = jnp.where(is_zero, 1, vectors)
    # This maximum is `largest`, but XLA would multiply with the reciprocal of a broadcast divisor,
    # which overflows and rounds parallel rows apart; the barrier stops (a / b) / c = a / (b * c).
    divisor = lax.stop_gradient(jnp.maximum(jnp.abs(safe), largest))
    scaled = lax.optimization_barrier(safe / divisor)
    unit = scaled / jnp.sqrt(jnp.sum(scaled * scaled, axis=1, keepdims=True))
    return jnp.where(is_zero, 0, unit)


def dot_scores(queries: Float[Array, "Q D"], items: Float[Array, "N D"]) -> Float[Array, "Q N"]:
    """Dot products [Q, N] in full precision on every platform (TPUs would multiply in bfloat16).

    >>> dot_scores(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0], [5.0, 6.0]])).tolist()
    [[11.0, 17.0]]
    """
    return lax.dot_general(
        queries, items, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
    )


def topk(
    queries: Float[Array, "Q D"],
    items: Float[Array, "N D"],
    k: int,
    exclude: Int[Array, "Q X"] | None = None,
    block: int = BLOCK,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The k largest dot products per query: scores and int32 ids [Q, K], best first.

    Equal scores come in the order of ids. Ids in `exclude` (-1: none) are left out; places that no
    item can fill hold score -inf and id -1. The k best items always lie in the k groups of
    neighbours with the largest maxima, in the order (maximum descending, group ascending): an item
    of another group would have k items before it. So each block only offers its group maxima,
    the k best groups travel on with their scores, and one small selection at the end orders them.

    >>> items = jnp.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    >>> scores, ids = jax.jit(topk, static_argnames="k")(jnp.eye(2), items, k=2)
    >>> ids.tolist()
    [[1, 0], [0, 1]]
    """
    count = items.shape[0]
    kept = min(k, count)
    if queries.shape[0] == 0 or kept == 0:
        return _fill(jnp.zeros((queries.shape[0], 0), queries.dtype), None, k)
    items, block = _fit(items, block)
    groups = block // GROUP

    def merge(
        number: Int[Array, ""], best: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        maxima, members, first = best  # (Q, kept), (Q, kept, GROUP), (Q, kept)
        scores, start = _score_block(queries, items, count, number, block, exclude)
        fresh = scores.reshape(-1, groups, GROUP)
        # What is kept has lower ids and stands first: `top_k` gives ties to the lowest position.
        maxima, chosen = lax.top_k(jnp.concatenate([maxima, fresh.max(axis=2)], axis=1), kept)
        old = jnp.minimum(chosen, kept - 1)
        new = jnp.maximum(chosen - kept, 0)
        is_new = chosen >= kept
        members = jnp.where(
            is_new[:, :, None],
            jnp.take_along_axis(fresh, new[:, :, None], axis=1),
            jnp.take_along_axis(members, old[:, :, None], axis=1),
        )
        first = jnp.where(is_new, start + new * GROUP, jnp.take_along_axis(first, old, axis=1))
        return maxima, members, first

    rows = queries.shape[0]
    nothing = -jnp.inf
    none = (
        jnp.full((rows, kept), nothing, queries.dtype),
        jnp.full((rows, kept, GROUP), nothing, queries.dtype),
        jnp.zeros((rows, kept), jnp.int32),
    )
    _, members, first = lax.fori_loop(0, -(-count // block), merge, none)
    # By id again: groups stand in the order of their maxima, which says nothing of other members.
    order = jnp.argsort(first, axis=1)
    first = jnp.take_along_axis(first, order, axis=1)
    members = jnp.take_along_axis(members, order[:, :, None], axis=1)
    scores, place = lax.top_k(members.reshape(rows, kept * GROUP), kept)
    ids = jnp.take_along_axis(first, place // GROUP, axis=1) + place % GROUP
    return _fill(scores, ids, k)


def rank(
    queries: Float[Array, "Q D"],
    items: Float[Array, "N D"],
    targets: Int[Array, " Q"],
    exclude: Int[Array, "Q X"] | None = None,
    block: int = BLOCK,
) -> Int[Array, " Q"]:
    """How many items stand before each query's target in the order of `topk`: int32 [Q], 0 = first.

    An item stands before the target if its score is higher, or equal with a lower id. Ids in
    `exclude` are not counted; the target keeps its place even if it is among them. The first pass
    reads the target's score out of its own block's product, so that its bits are those of `topk`.

    >>> items = jnp.array([[0.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    >>> jax.jit(rank)(jnp.eye(2), items, jnp.array([0, 2])).tolist()
    [1, 2]
    """
    count = items.shape[0]
    if queries.shape[0] == 0 or count == 0:
        return jnp.zeros(queries.shape[0], jnp.int32)
    items, block = _fit(items, block)
    targets = targets.astype(jnp.int32)

    def read(number: Int[Array, ""], own: Float[Array, " Q"]) -> Float[Array, " Q"]:
        scores, start = _score_block(queries, items, count, number, block, None)
        column = jnp.clip(targets - start, 0, block - 1)
        here = jnp.take_along_axis(scores, column[:, None], axis=1)[:, 0]
        return jnp.where(targets // block == number, here, own)

    blocks = -(-count // block)
    own = lax.fori_loop(0, blocks, read, jnp.full(queries.shape[0], -jnp.inf, queries.dtype))

    def add(number: Int[Array, ""], before: Int[Array, " Q"]) -> Int[Array, " Q"]:
        scores, start = _score_block(queries, items, count, number, block, exclude)
        ids = start + jnp.arange(block, dtype=jnp.int32)
        is_lower_id = ids[None, :] < targets[:, None]
        is_before = (scores > own[:, None]) | ((scores == own[:, None]) & is_lower_id)
        return before + jnp.sum(is_before, axis=1, dtype=jnp.int32)

    return lax.fori_loop(0, blocks, add, jnp.zeros(queries.shape[0], jnp.int32))


def _fit(items: Float[Array, "N D"], block: int) -> tuple[Float[Array, "M D"], int]:
    """Items padded to one block at least, and the block rounded up to whole groups."""
    block = -(-min(block, items.shape[0]) // _SMALLEST_BLOCK) * _SMALLEST_BLOCK
    missing = max(0, block - items.shape[0])
    return jnp.pad(items, ((0, missing), (0, 0))), block


def _score_block(
    queries: Float[Array, "Q D"],
    items: Float[Array, "M D"],
    count: int,
    number: Int[Array, ""],
    block: int,
    exclude: Int[Array, "Q X"] | None,
) -> tuple[Float[Array, "Q block"], Int[Array, ""]]:
    """Scores [Q, block] of block `number` and the id of its first item.

    The last block is moved back to end with the items, so that it needs no padded copy; items that
    it shares with the block before, padding and excluded items score -inf.
    """
    begin = (number * block).astype(jnp.int32)
    start = jnp.minimum(begin, items.shape[0] - block)
    scores = dot_scores(queries, lax.dynamic_slice_in_dim(items, start, block))
    ids = start + jnp.arange(block, dtype=jnp.int32)
    admissible = (ids >= begin) & (ids < count)
    scores = jnp.where(admissible[None, :], scores, -jnp.inf)
    if exclude is not None:
        column = exclude.astype(jnp.int32) - start
        column = jnp.where(column >= 0, column, block)  # negative columns would count from the end
        row = jnp.arange(queries.shape[0], dtype=jnp.int32)[:, None]
        scores = scores.at[row, column].set(-jnp.inf, mode="drop")
    return scores, start


def _fill(
    scores: Float[Array, "Q kept"], ids: Int[Array, "Q kept"] | None, k: int
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """Widen to k places; a place with score -inf holds no item and gets the id -1."""
    if ids is None:
        ids = jnp.zeros(scores.shape, jnp.int32)
    missing = ((0, 0), (0, k - scores.shape[1]))
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    ids = jnp.pad(ids.astype(jnp.int32), missing, constant_values=-1)
    return scores, jnp.where(scores == -jnp.inf, -1, ids)
