"""Exact scoring of queries against a catalogue: scores, the k best, the rank of a target.

Cosine is dot(q, x) / (|q| |x|), and 0 where a vector is zero: [1, 2, 3] and [4, 5, 6] have 0.974632
(0.8165, found in a popular article, is wrong). The functions check their arguments, so they take
concrete arrays; inside `jax.jit` use `mtrec_jax.kernels.streaming`.

What is promised. Nothing is sampled or skipped. Scores are computed in float32, or in float64 if
`jax_enable_x64` is on and an input is float64, whatever the default matmul precision; they may
exceed 1 by rounding. A score depends on its two vectors alone and has the very bits of
`mtrec_jax.kernels.reference`, tested on CPUs, as long as no product of two numbers is so small
(1e-30 in float32) that XLA takes a part of it for zero; parallel vectors with exact entries tie
exactly. Dot products that could overflow are an error. The order is (score descending, index
ascending), and `target_rank` counts in it, so the rank of the j-th result is j. So scores, indices
and ranks are the same for any batch of queries, block and number of devices.
Only `cosine_scores`, which returns the whole matrix, is one plain matrix product, and may differ in
the last bits.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from mtrec_jax.kernels import arithmetic, checks, once, reference
from mtrec_jax.kernels.index import ItemIndex
from mtrec_jax.types import Array

IMPLEMENTATIONS = ("xla", "reference")


def cosine_scores(queries: Array, items: Array) -> Float[jax.Array, "Q N"]:
    """Cosine [Q, N] of every query [Q, D] with every item [N, D]; holds all of [Q, N].

    Raises:
      DataError: wrong axes, widths that differ, a dtype that is no number, NaN or infinity.

    >>> round(float(cosine_scores(np.array([[1, 2, 3]]), np.array([[4, 5, 6]]))[0, 0]), 6)
    0.974632
    """
    checks.matrix("items", items, "[N, D]")
    checks.queries(queries, items.shape)
    dtype = checks.score_dtype(queries.dtype, items.dtype)
    rows = checks.finite("queries", queries, dtype), checks.finite("items", items, dtype)
    return _products(_normalise(rows[0]), _normalise(rows[1]))


_normalise = jax.jit(arithmetic.normalise)


@jax.jit
def _products(queries: jax.Array, items: jax.Array) -> jax.Array:
    numbers = (((1,), (1,)), ((), ()))
    return lax.dot_general(queries, items, numbers, precision=lax.Precision.HIGHEST)


def cosine_topk(
    queries: Array,
    items: Array,
    k: int,
    exclude: Array | None = None,
    implementation: str = "xla",
    allowed: Array | None = None,
    group: Array | None = None,
    among: Any = None,
    groups: Array | None = None,
    at_most: Any = None,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """The k items with the highest cosine per query: scores [Q, K] and int32 indices [Q, K].

    [Q, N] is never held: at most 128 MB of scores at a time. A catalogue that is searched more than
    once belongs into an `ItemIndex`, which pays for its norms and checks once.

    Args:
      queries: [Q, D] and
      items: [N, D], floating or integer; Q and N may be 0.
      k: results per query. Places that no admissible item can fill, as with k > N, hold score -inf
        and index -1.
      exclude: [Q, X] item indices that a query must not get, padded with -1; repeats are allowed.
      implementation: "xla", or "reference" for the NumPy specification, which holds [Q, N].
      allowed: [N] booleans, which items may be found; or [G, N], one row a group of queries.
      group: [Q], which row of `allowed` holds for a query.
      among: a list of item indices for each query, outside of which nothing is found; and
      groups, at_most: how many items of a group a query may get; all as in `ItemIndex.search`.

    Raises:
      DataError: wrong axes, widths that differ, a dtype that is no number, NaN or infinity, an
        index outside -1 .. N-1, not one list a query, groups that are not numbered from 0 on.
      ConfigError: k or a quota is not such a number, or an unknown implementation.

    >>> items = np.array([[1, 0], [1, 1], [2, 2], [0, 1]])
    >>> scores, indices = cosine_topk(np.array([[2, 2]]), items, k=3)
    >>> indices.tolist(), scores.round(3).tolist()
    ([[1, 2, 0]], [[1.0, 1.0, 0.707...]])
    >>> cosine_topk(np.array([[2, 2]]), items, k=2, exclude=np.array([[1, -1]]))[1].tolist()
    [[2, 0]]
    """
    return _topk(
        "cosine", queries, items, k, exclude, implementation, allowed, group, among, groups, at_most
    )


def dot_topk(
    queries: Array,
    items: Array,
    k: int,
    exclude: Array | None = None,
    implementation: str = "xla",
    allowed: Array | None = None,
    group: Array | None = None,
    among: Any = None,
    groups: Array | None = None,
    at_most: Any = None,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """The k items with the highest dot product per query; all else as in `cosine_topk`.

    >>> items = np.array([[1, 0], [1, 1], [2, 2], [0, 1]])
    >>> scores, indices = dot_topk(np.array([[2, 2]]), items, k=2)
    >>> indices.tolist(), scores.tolist()
    ([[2, 1]], [[8.0, 4.0]])
    """
    return _topk(
        "dot", queries, items, k, exclude, implementation, allowed, group, among, groups, at_most
    )


def _topk(
    metric: Any,
    queries: Array,
    items: Array,
    k: int,
    exclude: Array | None,
    implementation: str,
    allowed: Array | None,
    group: Array | None,
    among: Any,
    groups: Array | None,
    at_most: Any,
) -> tuple[np.ndarray, np.ndarray]:
    checks.matrix("queries", queries, "[Q, D]")
    checks.one_of("implementation", implementation, IMPLEMENTATIONS)
    if implementation == "xla":
        checks.matrix("items", items, "[N, D]")
        checks.queries(queries, items.shape)
        k, given = checks.positive(k), (exclude, allowed, group, among, groups, at_most)
        free = all(limit is None for limit in given)
        if free and isinstance(items, np.ndarray) and once.serves(np.asarray(queries), items, k):
            found = once.topk(np.asarray(queries), items, k, metric)
            if found is not None:
                return found
        index = ItemIndex(items, metric=metric)
        return index.search(queries, k, exclude, allowed, group, among, groups, at_most)
    checks.matrix("items", items, "[N, D]")
    checks.queries(queries, items.shape)
    k, dtype = checks.positive(k), checks.score_dtype(queries.dtype, items.dtype)
    rows = checks.finite("queries", queries, dtype), checks.finite("items", items, dtype)
    admissible = np.ones((len(queries), len(items)), bool)
    if exclude is not None:
        checks.concrete("exclude", exclude)
        width = exclude.shape[1] if exclude.ndim == 2 else -1
        ids = checks.indices("exclude", exclude, (len(queries), width), -1, len(items))
        admissible[np.nonzero(ids >= 0)[0], ids[ids >= 0]] = False
    masks, which = checks.masks(allowed, group, len(queries), len(items))
    if masks is not None:
        admissible &= masks[0] if which is None else masks[which]
    if among is not None:
        listed = np.zeros_like(admissible)
        for row, ids in enumerate(checks.id_lists("among", among, len(queries))):
            whole = ids.astype(int) if not ids.size else ids
            own = checks.indices(f"among[{row}]", whole, whole.shape, -1, len(items))
            listed[row, own[own >= 0]] = True
        admissible &= listed
    quotas = checks.quotas(groups, at_most, len(items))
    limits = () if quotas is None else (quotas.groups, quotas.most)
    return reference.topk(reference.scores(rows[0], rows[1], metric), k, admissible, *limits)


def target_rank(
    queries: Array,
    items: Array,
    targets: Array,
    exclude: Array | None = None,
    allowed: Array | None = None,
    group: Array | None = None,
) -> Int[np.ndarray, " Q"]:
    """How many admissible items stand before each query's target: int32 [Q], 0 = first.

    The order is that of `cosine_topk`: higher score, or equal score and lower index. The target
    itself is never excluded. From this rank r follow HR@k = [r < k], NDCG@k = [r < k] / log2(r + 2)
    and MRR = 1 / (r + 1) without sorting the catalogue.

    Args:
      queries: [Q, D] and
      items: [N, D] as in `cosine_topk`.
      targets: [Q] item indices 0 .. N-1.
      exclude: [Q, X] item indices that do not count, padded with -1.
      allowed: [N] booleans, which items count; or [G, N], one row a group of queries.
      group: [Q], which row of `allowed` holds for a query.

    Raises:
      DataError: as `cosine_topk`, or a target outside 0 .. N-1.

    >>> items = np.array([[1, 0], [1, 1], [2, 2], [0, 1]])
    >>> target_rank(np.array([[2, 2], [2, 2]]), items, np.array([1, 3])).tolist()
    [0, 3]
    """
    checks.matrix("queries", queries, "[Q, D]")
    return ItemIndex(items).rank(queries, targets, exclude, allowed, group)
