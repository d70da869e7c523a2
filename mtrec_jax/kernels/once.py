"""A catalogue of NumPy that is searched once: read in blocks where it lies, and nothing is kept.

An index costs several passes over the catalogue, which one search does not pay back. Here a block
is multiplied, and its norms are taken, while it is in cache; maxima of groups of items are left.
At least k items score as much as the k-th largest maximum of a query. So what is further below it
than twice the bound of rounding is not in the answer, and the rest is scored pair by pair, as lists
of ids are (`mtrec_jax.kernels.constrained`). Shapes do not depend on N: another catalogue compiles
nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtrec_jax.kernels import candidates, checks, constrained, programs, streaming
from mtrec_jax.kernels.blocks import Items
from mtrec_jax.kernels.constrained import Pairs
from mtrec_jax.kernels.placing import EXTREME

BLOCK = 4096  # items
_QUERIES, _RESULTS = 256, 128  # at most; more results are found faster on the device
_MAXIMA = 1 << 25  # at most, 128 MB
_PAIRS = 64  # that are scored anew, a result: with more, many items score alike


def serves(queries: np.ndarray, items: np.ndarray, k: int) -> bool:
    """Whether `topk` takes such a problem: on a CPU, of a size that it is made for."""
    maxima = len(queries) * len(items) // streaming.group_size(k)
    return (
        items.dtype == np.float32
        and checks.score_dtype(queries.dtype) == np.float32
        and jax.default_backend() == "cpu"
        and len(items) >= BLOCK
        and 0 < len(queries) <= _QUERIES
        and k <= _RESULTS
        and maxima <= _MAXIMA
    )


def topk(
    queries: np.ndarray, items: np.ndarray, k: int, metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores and indices [Q, k]; None where an index has to look: rows that are zero, not finite
    or of an extreme length, and catalogues of which many items score alike.

    Raises:
      DataError: NaN or infinity in a query, or dot products that overflow.
    """
    rows, longest = _ready(queries, metric)
    size = streaming.group_size(k)
    found = _maxima(rows, items, size, metric)
    if found is None:
        return None
    maxima, squares = found[0][: len(queries)], found[1]
    largest = 1.0
    if metric == "dot":
        norm = float(np.sqrt(squares.max())) * 1.001
        largest = checks.largest_product(longest, norm, np.dtype(np.float32))
    error = float(candidates.error_bound(rows, Items(rows, None, largest)))
    kth = np.partition(maxima, maxima.shape[1] - k, axis=1)[:, -k]
    query, group = np.nonzero(maxima >= kth[:, None].astype(np.float64) - 2 * error)
    if len(query) > _PAIRS * k * len(queries) // size:
        return None
    item = (group[:, None] * size + np.arange(size)).ravel()
    query = np.repeat(query, size)[item < len(items)]
    item = item[item < len(items)]
    scale = 1 / np.sqrt(squares) if metric == "cosine" else None
    host = np.asarray(rows)

    def score(query: np.ndarray, item: np.ndarray, exact: bool) -> np.ndarray:
        if exact:
            return _exact(rows, items, query, item, metric)
        rough = np.einsum("ed,ed->e", host[query], items[item])
        return rough if scale is None else rough * scale[item]

    return constrained.best_pairs(Pairs(score, error), query, item, k, len(queries), None)


def _ready(queries: np.ndarray, metric: str) -> tuple[jax.Array, float]:
    """Queries as they are multiplied, filled up to a power of two, and a bound of their norms."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is named
        host = queries.astype(np.float32)
    size = 1 << (len(host) - 1).bit_length()
    host = np.concatenate([host, np.repeat(host[-1:], size - len(host), axis=0)])
    rows, *told = programs.prepared(host, np.dtype(np.float32), metric)
    first_bad, longest = jax.device_get(told)
    if first_bad >= 0:
        raise checks.not_finite("queries", int(first_bad), np.dtype(np.float32))
    return rows, float(longest)


def _maxima(
    rows: jax.Array, items: np.ndarray, size: int, metric: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Largest rough score of each group [Q, G], and squares of norms [N]; None for odd rows."""
    count, waiting, found = len(items), [], []
    for start in range(0, count, BLOCK):
        block = items[start : start + BLOCK]
        real = len(block)
        if real < BLOCK:  # the last item again
            block = np.concatenate([block, np.repeat(block[-1:], BLOCK - real, axis=0)])
        waiting.append(_block(block, rows, np.int32(real), size, metric))
        if len(waiting) > 1:  # the next block is handed over while this one is multiplied
            found.append(jax.device_get(waiting.pop(0)))
    found += jax.device_get(waiting)
    if any(odd for *_, odd in found):
        return None
    squares = np.concatenate([squares for _, squares, _ in found])[:count]
    return np.concatenate([maxima for maxima, *_ in found], axis=1), squares


@functools.partial(jax.jit, static_argnames=("size", "metric"))
def _block(
    items: jax.Array, rows: jax.Array, real: jax.Array, size: int, metric: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maxima of groups [Q, B / size], squares of norms [B], and whether one of these is odd."""
    squares = jnp.sum(items * items, axis=1)
    odd = ~jnp.all((squares > 1 / EXTREME**2) & (squares < EXTREME**2))
    numbers = (((1,), (1,)), ((), ()))
    scores = lax.dot_general(items, rows, numbers, precision=lax.Precision.HIGHEST)
    if metric == "cosine":
        scores = scores * lax.rsqrt(squares)[:, None]
    place = jnp.arange(len(items), dtype=jnp.int32)
    scores = jnp.where((place < real)[:, None], scores, -jnp.inf)
    return scores.reshape(-1, size, len(rows)).max(axis=1).T, squares, odd


def _exact(
    rows: jax.Array, items: np.ndarray, query: np.ndarray, item: np.ndarray, metric: str
) -> np.ndarray:
    """The scores [E] that are returned, in programs of a few sizes."""
    size = next((size for size in programs.PIECES if size >= len(query)), programs.PIECES[-1])
    found = [np.zeros(0, np.float32)]
    for start in range(0, len(query), size):
        part = items[item[start : start + size]]
        its = np.zeros(size, np.int32)
        its[: len(part)] = query[start : start + size]
        part = np.concatenate([part, np.zeros((size - len(part), items.shape[1]), np.float32)])
        found.append(np.asarray(_scored(rows, its, part, metric)))
    return np.concatenate(found)[: len(query)]


@functools.partial(jax.jit, static_argnames="metric")
def _scored(rows: jax.Array, query: jax.Array, vectors: jax.Array, metric: str) -> jax.Array:
    scale = jnp.ones(len(vectors), vectors.dtype) if metric == "cosine" else None
    ids = jnp.arange(len(vectors), dtype=jnp.int32)[:, None]
    return candidates.exact_scores(rows[query], Items(vectors, scale), ids)[:, 0]
