"""Groups of items with the highest rough scores, their members, and the exact scores of these."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtrec_jax.kernels import arithmetic
from mtrec_jax.kernels.blocks import Admissible, Items, Plan, starts

EXACT = 1024  # items of a block that is scored by `arithmetic.dot`


def largest(values: Float[Array, "n Q"], kept: int) -> tuple[Array, Array]:
    """The `kept` largest of each column, [Q, kept], and their places, found from coarse to fine.

    A place beyond `values` stands for nothing.
    """
    levels, folds = [values], []
    while levels[-1].shape[0] > max(4 * kept, 64) * 2:
        last = levels[-1]
        fold = 16 if last.shape[0] > max(4 * kept, 64) * 16 else 4
        missing = -last.shape[0] % fold
        last = jnp.pad(last, ((0, missing), (0, 0)), constant_values=-jnp.inf)
        levels.append(last.reshape(-1, fold, last.shape[1]).max(axis=1))
        folds.append(fold)
    top, chosen = lax.top_k(levels[-1].T, min(kept, levels[-1].shape[0]))
    column = jnp.arange(values.shape[1])[:, None]
    for level, fold in zip(reversed(levels[:-1]), reversed(folds), strict=True):
        place = chosen[:, :, None] * fold + jnp.arange(fold)[None, None, :]
        flat = place.reshape(len(chosen), -1)
        inside = level.at[flat, column].get(mode="fill", fill_value=-jnp.inf)
        top, where = top_of_groups(inside.reshape(place.shape), kept)
        # The place of a maximum stands in its group as well, as -inf.
        nothing = level.shape[0]
        chosen = jnp.where(top == -jnp.inf, nothing, jnp.take_along_axis(flat, where, axis=1))
    return top, chosen


def top_of_groups(values: Float[Array, "Q C G"], kept: int) -> tuple[Array, Array]:
    """`lax.top_k` of the flattened groups.

    It keeps a heap, and what it costs is what enters the heap; so the maxima of the groups come
    first, and there is little left that exceeds them.
    """
    rows, groups, size = values.shape
    first = jnp.argmax(values, axis=2)
    is_first = jnp.arange(size)[None, None, :] == first[:, :, None]
    rest = jnp.where(is_first, -jnp.inf, values).reshape(rows, -1)
    top, where = lax.top_k(
        jnp.concatenate([jnp.max(values, axis=2), rest], axis=1), min(kept, groups * size)
    )
    firsts = first + jnp.arange(groups)[None, :] * size
    among = jnp.take_along_axis(firsts, jnp.minimum(where, groups - 1), axis=1)
    return top, jnp.where(where < groups, among, where - groups)


def members(chosen: Int[Array, "Q C"], plan: Plan) -> tuple[Array, Array]:
    """Ids [Q, C * group] of the items of groups, and which of them are real."""
    number, local = chosen // plan.each, chosen % plan.each
    ids = (starts(number, plan) + local * plan.group)[:, :, None]
    ids = ids + jnp.arange(plan.group)[None, None, :]
    real = (ids >= (number * plan.block)[:, :, None]) & (ids < plan.items)
    real &= (chosen < plan.groups)[:, :, None]
    ids = jnp.minimum(ids, plan.items - 1)
    return ids.reshape(len(ids), -1).astype(jnp.int32), real.reshape(len(ids), -1)


def is_admissible(ids: Int[Array, "Q C"], admissible: Admissible) -> Bool[Array, "Q C"]:
    """Which ids a query may get."""
    good = jnp.ones(ids.shape, bool) if admissible.stop is None else ids < admissible.stop
    if admissible.allowed is not None:
        group = jnp.zeros(len(ids), jnp.int32) if admissible.group is None else admissible.group
        good &= admissible.allowed[group[:, None], ids]
    if admissible.exclude is not None:
        place = jax.vmap(jnp.searchsorted)(admissible.exclude, ids)
        found = admissible.exclude.at[jnp.arange(len(ids))[:, None], place].get(
            mode="fill", fill_value=-1
        )
        good &= found != ids
    return good


def of_one(admissible: Admissible, row: Array) -> Admissible:
    """What one query may get, as lists and masks of a single row."""
    exclude, _, allowed, group, stop = admissible
    return Admissible(
        exclude=None if exclude is None else exclude[row][None],
        allowed=None
        if allowed is None
        else (allowed[:1] if group is None else allowed[group[row]][None]),
        stop=stop,
    )


def _vectors(items: Items, ids: Array, dtype: Any) -> Array:
    """The vectors of ids, of length 1 where scores are cosines."""
    vectors = items.vectors
    if (
        len(vectors) == 1
    ):  # with a single choice, XLA would see one row, and divide it in its own way
        vectors = jnp.pad(vectors, ((0, 1), (0, 0)))
    rows = vectors.at[ids].get(mode="promise_in_bounds").astype(dtype)
    return rows if items.scale is None else arithmetic.normalise(rows)


def exact_scores(queries: Array, items: Items, ids: Int[Array, "Q C"]) -> Float[Array, "Q C"]:
    """The scores that are returned and compared."""
    return arithmetic.dot(_vectors(items, ids, queries.dtype), queries[:, None, :])


def rough_scores(queries: Array, items: Items, ids: Int[Array, "Q C"]) -> Float[Array, "Q C"]:
    """Scores in an order of summation that is of no account, where it is fast."""
    rows = items.vectors.at[ids].get(mode="promise_in_bounds").astype(queries.dtype)
    found = arithmetic.tree(rows * queries[:, None, :])
    return found if items.scale is None else found * items.scale[ids]


def exact_block(
    query: Array, items: Items, admissible: Admissible, number: Array
) -> tuple[Array, Array]:
    """Scores of a block of items with one query, -inf where they are not admissible; and ids."""
    count = items.vectors.shape[0]
    size = min(EXACT, count)
    first = jnp.minimum(number * size, count - size)
    ids = first + jnp.arange(size, dtype=jnp.int32)
    scores = arithmetic.dot(_vectors(items, ids, query.dtype), query[None, :])
    good = (ids >= number * size) & is_admissible(ids[None], admissible)[0]
    return jnp.where(good, scores, -jnp.inf), ids


def error_bound(queries: Array, items: Items) -> Float[Array, ""]:
    """How far a rough score may be from the score: a bound for any order of summation."""
    limits, width = jnp.finfo(queries.dtype), queries.shape[1]
    # What is below the smallest normal number may be taken for zero, in a factor or a product.
    vanishing = 4 * width * float(limits.tiny)
    relative = (width + 16) * float(limits.eps)
    return jnp.asarray(relative * items.largest + vanishing, queries.dtype)


def ordered(scores: Array, ids: Array, kept: int) -> tuple[Array, Array]:
    """The first `kept` by (score descending, id ascending)."""
    negative, ids = lax.sort((-scores, ids), dimension=1, num_keys=2)
    return -negative[:, :kept], ids[:, :kept]


def filled(scores: Array, ids: Array, k: int) -> tuple[Array, Array]:
    """Widen to k places; a place with score -inf holds no item and gets the id -1."""
    missing = ((0, 0), (0, k - scores.shape[1]))
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    ids = jnp.pad(ids.astype(jnp.int32), missing, constant_values=-1)
    return scores, jnp.where(scores == -jnp.inf, -1, ids)
