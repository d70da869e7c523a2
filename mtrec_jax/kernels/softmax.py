"""Softmax losses over many items, with their gradients, without the matrix of their logits.

Queries come in tiles and items in blocks: the logits of a tile and a block are made, reduced to a
running log-sum-exp (Milakov & Gimelshein 2018) and forgotten. Where the loss is differentiated, the
same pass makes the gradients, as the weight of each query is known: where all items are one block,
logits and their exponentials are made only once (Hsu et al. 2024; Wijmans et al., ICLR 2025, make
them again). Beyond inputs and gradients, memory is that of one tile by one block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from mtrec_jax.errors import DataError

_LOGITS = 1 << 22  # of a tile and a block, 16 MB
_BLOCK = 4096  # items of a block at most


def streaming_softmax_loss(
    queries: Float[Array, "B D"],
    items: Float[Array, "N D"],
    targets: Integer[Array, " B"],
    bias: Float[Array, " N"] | None = None,
    weights: Float[Array, " B"] | None = None,
) -> Float[Array, ""]:
    """Cross-entropy of the softmax over all items, to be used in `jax.jit` and `jax.grad`.

    The logit of an item is queries @ items.T + bias. Divide the queries by a temperature first; a
    bias of -log q corrects for items that were sampled with probability q (logQ). Products take the
    matmul precision that JAX is set to.

    Args:
      queries: [B, D].
      items: [N, D].
      targets: [B] rows of `items`, in 0 .. N-1; not checked, as values are unknown in `jax.jit`.
      bias: [N], what is added to each item's logits.
      weights: [B], how much each query's loss counts; 1/B by default, which makes the mean.

    Returns:
      The weighted sum of the losses; differentiable by queries, items, bias and weights.

    Raises:
      DataError: shapes that do not fit, or no items.

    >>> loss, gradient = jax.jit(jax.value_and_grad(streaming_softmax_loss))(
    ...     jnp.eye(2), 3 * jnp.eye(2), jnp.array([0, 1]))
    >>> round(float(loss), 4), gradient.round(4).tolist()
    (0.0486, [[-0.071..., 0.071...], [0.071..., -0.071...]])
    """
    queries, items, targets = (jnp.asarray(a) for a in (queries, items, targets))
    _check(queries, items, targets, bias, weights)
    rows = len(queries)
    weights = jnp.full(rows, 1 / max(rows, 1), queries.dtype) if weights is None else weights
    block = min(len(items), _BLOCK)
    size = max(1, min(rows, min(_LOGITS, max(_LOGITS // 4, rows * block // 4)) // block))

    def tiled(array: Array) -> Array:
        padding = ((0, -rows % size), *((0, 0),) * (array.ndim - 1))
        return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])

    targets = targets.astype(jnp.int32)
    numbers = jnp.arange(len(items), dtype=jnp.int32)
    return softmax_loss(tiled(queries), items, numbers, tiled(targets), None, bias, tiled(weights))


def softmax_loss(
    queries: Float[Array, "T *R D"],
    items: Float[Array, "N D"],
    item_ids: Int[Array, " N"],
    target_ids: Int[Array, "T *R"],
    target_logits: Float[Array, "T *R"] | None,
    bias: Float[Array, " N"] | None,
    weights: Float[Array, "T *R"],
) -> Float[Array, ""]:
    """Weighted sum of softmax losses; the first axis of the queries is looped over.

    Batches may be split over devices by a later axis. With `target_logits` the items are negatives:
    those that are the target itself are left out and its given logit takes part in their place.
    Without, `item_ids` are 0 .. N-1 and the target is one of the items.

    >>> zeros, ids = jnp.zeros((1, 2, 4)), jnp.array([7, 8, 9])
    >>> target_ids, own, weights = jnp.array([[7, 1]]), jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]])
    >>> loss = softmax_loss(zeros, jnp.zeros((3, 4)), ids, target_ids, own, None, weights)
    >>> round(float(jnp.exp(loss)), 4)  # one of four that are equally probable
    4.0
    """
    bias = jnp.zeros(len(items), queries.dtype) if bias is None else bias
    # As matrices: of more axes, XLA copies the transposes that gradients are summed from.
    queries = queries.reshape(len(queries), -1, queries.shape[-1])
    flat = [None if a is None else a.reshape(len(a), -1) for a in (target_logits, weights)]
    ids = item_ids, target_ids.reshape(len(target_ids), -1)
    return _loss(queries, items, bias, flat[0], flat[1], ids)


def _check(queries: Any, items: Any, targets: Any, bias: Any, weights: Any) -> None:
    fits = queries.ndim == items.ndim == 2 and queries.shape[1] == items.shape[1]
    if not fits or targets.shape != queries.shape[:1]:
        shapes = f"queries {queries.shape}, items {items.shape}, targets {targets.shape}"
        raise DataError(f"{shapes}: [B, D], [N, D] and [B] are needed")
    for name, given, needed in (("bias", bias, items), ("weights", weights, queries)):
        if given is not None and given.shape != needed.shape[:1]:
            raise DataError(f"{name}: shape {given.shape}; {needed.shape[:1]} is needed")
    kinds = (queries.dtype, jnp.floating), (items.dtype, jnp.floating), (targets.dtype, jnp.integer)
    wide = jnp.promote_types(queries.dtype, items.dtype)
    if not all(jnp.issubdtype(*kind) for kind in kinds) or wide != queries.dtype:
        names = f"queries {queries.dtype}, items {items.dtype}, targets {targets.dtype}"
        raise DataError(
            f"{names}: floating queries, items of no more bits, and integers are needed"
        )
    if not len(items):
        raise DataError("items: there are none, so no query has a target")


class _Catalogue(NamedTuple):
    items: Array
    bias: Array
    ids: Array

    def block(self, number: Any, size: int) -> tuple[_Catalogue, Array | int]:
        """Items of a block and the first of them; the last block is moved back to end with all.

        What it shares with the one before gets the bias -inf, and the id of no item.
        """
        if size == len(self.items):
            return self, 0
        first = jnp.minimum(number * size, len(self.items) - size)
        items, bias, ids = (lax.dynamic_slice_in_dim(array, first, size) for array in self)
        again = first + jnp.arange(size, dtype=jnp.int32) < number * size
        ids = jnp.where(again, jnp.iinfo(ids.dtype).min, ids)
        return _Catalogue(items, jnp.where(again, -jnp.inf, bias), ids), first


class _Tile(NamedTuple):
    queries: Float[Array, "R D"]
    target_ids: Int[Array, " R"]
    own: Float[Array, " R"]  # logit of the target
    weights: Float[Array, " R"]


@jax.custom_vjp
def _loss(
    queries: Array,
    items: Array,
    bias: Array,
    target_logits: Array | None,
    weights: Array,
    ids: tuple[Array, Array],
) -> Array:
    catalogue, tiles = _tiles(queries, items, bias, target_logits, weights, ids)

    def one(tile: _Tile) -> Array:
        largest, total = _normaliser(tile, catalogue, target_logits is None)
        return jnp.sum(tile.weights * (largest + jnp.log(total) - tile.own))

    return jnp.sum(lax.map(one, tiles))


def _forward(
    queries: Array,
    items: Array,
    bias: Array,
    target_logits: Array | None,
    weights: Array,
    ids: tuple[Array, Array],
) -> tuple[Array, Any]:
    catalogue, tiles = _tiles(queries, items, bias, target_logits, weights, ids)
    is_item = target_logits is None
    size, count = _blocks(queries, items)

    def one(sums: tuple[Array, Array], tile: _Tile) -> tuple[Any, Any]:
        def add(number: Any, carry: Any, largest: Array, total: Array) -> Any:
            to_queries, to_items, to_bias = carry
            block, first = catalogue.block(number, size)
            logits, hit = _logits(tile, block, is_item)
            probability = jnp.exp(logits - largest[..., None]) * (1 / total)[..., None]
            gradient = (probability - hit if is_item else probability) * tile.weights[..., None]
            to_queries += gradient @ block.items.astype(logits.dtype)
            parts = gradient.T @ tile.queries, jnp.sum(gradient, axis=0)
            return to_queries, *(
                lax.dynamic_update_slice_in_dim(
                    whole, lax.dynamic_slice_in_dim(whole, first, size) + part, first, 0
                )
                for whole, part in zip((to_items, to_bias), parts, strict=True)
            )

        largest, total = _normaliser(tile, catalogue, is_item)
        start = jnp.zeros_like(tile.queries), *sums
        to_queries, *sums = _over_blocks(count, lambda n, c: add(n, c, largest, total), start)
        losses = largest + jnp.log(total) - tile.own
        to_own = (jnp.exp(tile.own - largest) / total - 1) * tile.weights
        return tuple(sums), (to_queries, to_own, losses)

    none = jnp.zeros(items.shape, queries.dtype), jnp.zeros(bias.shape, queries.dtype)
    (to_items, to_bias), (to_queries, to_own, losses) = lax.scan(one, none, tiles)
    gradients = (
        to_queries,
        to_items.astype(items.dtype),
        to_bias.astype(bias.dtype),
        None if is_item else to_own.astype(queries.dtype),
        losses,
    )
    return jnp.sum(losses * weights), (gradients, ids)


def _backward(kept: Any, factor: Array) -> tuple[Any, ...]:
    gradients, ids = kept
    scaled = jax.tree.map(lambda part: part * factor.astype(part.dtype), gradients)
    return *scaled, jax.tree.map(lambda array: np.zeros(array.shape, jax.dtypes.float0), ids)


_loss.defvjp(_forward, _backward)


def _tiles(
    queries: Array,
    items: Array,
    bias: Array,
    target_logits: Array | None,
    weights: Array,
    ids: tuple[Array, Array],
) -> tuple[_Catalogue, _Tile]:
    """All items; and all tiles, along the first axis."""
    item_ids, target_ids = ids
    if target_logits is None:
        vectors = items.at[target_ids].get(mode="promise_in_bounds")
        target_logits = jnp.sum(queries * vectors, axis=-1) + bias[target_ids]
    return _Catalogue(items, bias, item_ids), _Tile(queries, target_ids, target_logits, weights)


def _blocks(queries: Array, items: Array) -> tuple[int, int]:
    """Items of a block, and the number of blocks."""
    rows = max(1, queries.shape[1])
    size = min(len(items), _BLOCK, max(64, 4 * _LOGITS // rows))
    return size, -(-len(items) // size)


def _over_blocks(count: int, add: Any, start: Any) -> Any:
    if count == 1:  # not worth a loop, in which XLA would make the logits of both passes
        return add(0, start)
    return lax.fori_loop(jnp.int32(0), jnp.int32(count), add, start)


def _normaliser(tile: _Tile, catalogue: _Catalogue, is_item: bool) -> tuple[Array, Array]:
    """Largest logit, and the sum of all exp(logit - largest)."""
    size, count = _blocks(tile.queries[None], catalogue.items)

    def add(number: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        largest, total = carry
        logits, _ = _logits(tile, catalogue.block(number, size)[0], is_item)
        higher = jnp.maximum(largest, jnp.max(logits, axis=-1))
        here = jnp.sum(jnp.exp(logits - higher[..., None]), axis=-1)
        return higher, total * jnp.exp(largest - higher) + here

    # The target's logit is finite, so the largest never is -inf.
    start = tile.own, jnp.zeros_like(tile.own) if is_item else jnp.ones_like(tile.own)
    return _over_blocks(count, add, start)


def _logits(tile: _Tile, block: _Catalogue, is_item: bool) -> tuple[Array, Array]:
    """Logits [R, n] of a tile with a block, and which of them are of the target."""
    found = tile.queries @ block.items.astype(tile.queries.dtype).T + block.bias[None]
    hit = tile.target_ids[:, None] == block.ids[None]
    return (found if is_item else jnp.where(hit, -jnp.inf, found)), hit
