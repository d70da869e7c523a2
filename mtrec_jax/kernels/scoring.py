"""Exact cosine scoring of queries against a catalogue: scores, the k best, the rank of a target.

The functions check their arguments, so they take concrete arrays; inside `jax.jit` use
`mtrec_jax.kernels.streaming`. Cosine is dot(q, x) / (|q| |x|), and 0 where a vector is zero:
[1, 2, 3] and [4, 5, 6] have 0.974632 (0.8165, found in a popular article, is wrong).

What is promised. Scores are computed in float32, or in float64 if `jax_enable_x64` is on and an
input is float64, whatever platform and default matmul precision; they may exceed 1 by rounding.
`cosine_topk` is exact: nothing is sampled or skipped, and the order is (score descending, index
ascending) of the very scores it returns. Parallel vectors with exact entries tie exactly.
`target_rank` counts in that same order, so the rank of the j-th result is j. Queries are processed
in chunks of 256, fewer are padded to 8, 16, 32 .. 256, so that few programs are compiled; another
chunk size, block size or device may round a score differently by a few units in the last place and
swap items that are this close, and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.kernels import reference, streaming
from mtrec_jax.types import Array

IMPLEMENTATIONS = ("xla", "reference")
_CHUNK = 256  # queries per program
_SMALLEST_CHUNK = 8  # a product with one row is another routine, which rounds differently

_topk = jax.jit(streaming.topk, static_argnames=("k", "block"))
_rank = jax.jit(streaming.rank, static_argnames="block")
_dot_scores = jax.jit(streaming.dot_scores)


def cosine_scores(queries: Array, items: Array) -> Float[jax.Array, "Q N"]:
    """Cosine [Q, N] of every query [Q, D] with every item [N, D]; holds all of [Q, N].

    Raises:
      DataError: wrong axes, widths that differ, a dtype that is no number, NaN or infinity.

    >>> round(float(cosine_scores(np.array([[1, 2, 3]]), np.array([[4, 5, 6]]))[0, 0]), 6)
    0.974632
    """
    queries, items = _matrices(queries, items)
    dtype = _score_dtype(queries, items)
    return _dot_scores(_unit(queries, "queries", dtype), _unit(items, "items", dtype))


def cosine_topk(
    queries: Array,
    items: Array,
    k: int,
    exclude: Array | None = None,
    implementation: str = "xla",
) -> tuple[Float[jax.Array, "Q K"], Int[jax.Array, "Q K"]]:
    """The k items with the highest cosine per query: scores [Q, K] and int32 indices [Q, K].

    Items are streamed in blocks; [Q, N] is never held. Pass the catalogue as a jax array if it is
    used more than once: a NumPy array is copied to the device by each call.

    Args:
      queries: [Q, D] and
      items: [N, D], floating or integer; Q and N may be 0.
      k: results per query. Places that no admissible item can fill, as with k > N, hold score -inf
        and index -1.
      exclude: [Q, X] item indices that a query must not get, padded with -1; repeats are allowed.
      implementation: "xla", or "reference" for the NumPy specification, which holds [Q, N].

    Raises:
      DataError: wrong axes, widths that differ, a dtype that is no number, NaN or infinity, an
        excluded index outside -1 .. N-1.
      ConfigError: k below 1, or an unknown implementation.

    >>> items = np.array([[1, 0], [1, 1], [2, 2], [0, 1]])
    >>> scores, indices = cosine_topk(np.array([[2, 2]]), items, k=3)
    >>> indices.tolist(), scores.round(3).tolist()
    ([[1, 2, 0]], [[1.0, 1.0, 0.707...]])
    >>> cosine_topk(np.array([[2, 2]]), items, k=2, exclude=np.array([[1, -1]]))[1].tolist()
    [[2, 0]]
    """
    queries, items = _matrices(queries, items)
    k = _positive(k)
    excluded = _excluded(exclude, len(queries), len(items))
    dtype = _score_dtype(queries, items)
    unit_items = _unit(items, "items", dtype)
    if implementation == "reference":
        _unit(queries, "queries", dtype)  # for its check
        rows = (np.asarray(queries, dtype), np.asarray(items, dtype))
        all_scores, all_ids = reference.cosine_topk(*rows, k, excluded)
        return jnp.asarray(all_scores, dtype), jnp.asarray(all_ids)
    if implementation != "xla":
        raise ConfigError(
            f"no implementation '{implementation}': use one of {', '.join(IMPLEMENTATIONS)}."
            f"{nearest(str(implementation), IMPLEMENTATIONS)}"
        )
    parts = [
        _topk(
            _unit(_padded(queries, chunk, 0), "queries", dtype, chunk.start),
            unit_items,
            k,
            None if excluded is None else _padded(excluded, chunk, -1),
        )
        for chunk in _chunks(len(queries))
    ]
    scores = [np.zeros((0, k), dtype), *(part[0] for part in parts)]
    ids = [np.zeros((0, k), np.int32), *(part[1] for part in parts)]
    return _joined(scores, len(queries)), _joined(ids, len(queries))


def target_rank(
    queries: Array, items: Array, targets: Array, exclude: Array | None = None
) -> Int[jax.Array, " Q"]:
    """How many admissible items stand before each query's target: int32 [Q], 0 = first.

    The order is that of `cosine_topk`: higher score, or equal score and lower index. The target
    itself is never excluded. From this rank r follow HR@k = [r < k], NDCG@k = [r < k] / log2(r + 2)
    and MRR = 1 / (r + 1) without sorting the catalogue.

    Args:
      queries: [Q, D] and
      items: [N, D] as in `cosine_topk`.
      targets: [Q] item indices 0 .. N-1.
      exclude: [Q, X] item indices that do not count, padded with -1.

    Raises:
      DataError: as `cosine_topk`, or a target outside 0 .. N-1.

    >>> items = np.array([[1, 0], [1, 1], [2, 2], [0, 1]])
    >>> target_rank(np.array([[2, 2], [2, 2]]), items, np.array([1, 3])).tolist()
    [0, 3]
    """
    queries, items = _matrices(queries, items)
    excluded = _excluded(exclude, len(queries), len(items))
    wanted = _indices(targets, "targets", (len(queries),), 0, len(items))
    dtype = _score_dtype(queries, items)
    unit_items = _unit(items, "items", dtype)
    parts = [
        _rank(
            _unit(_padded(queries, chunk, 0), "queries", dtype, chunk.start),
            unit_items,
            _padded(wanted, chunk, 0),
            None if excluded is None else _padded(excluded, chunk, -1),
        )
        for chunk in _chunks(len(queries))
    ]
    return _joined([np.zeros(0, np.int32), *parts], len(queries))


def _matrices(queries: Array, items: Array) -> tuple[np.ndarray, Array]:
    """Check axes, widths, dtypes. Queries come back on the host, where padding compiles nothing."""
    for name, vectors in (("queries", queries), ("items", items)):
        _check_concrete(vectors, name)
        axes = "[Q, D]" if name == "queries" else "[N, D]"
        if vectors.ndim != 2:
            raise DataError(
                f"{name} must have two axes {axes}, but its shape is {vectors.shape}; "
                "a single vector is vector[None, :]"
            )
        is_number = any(jnp.issubdtype(vectors.dtype, kind) for kind in (jnp.floating, jnp.integer))
        if not is_number:
            raise DataError(
                f"{name} has dtype {vectors.dtype}; convert it to a floating or integer one"
            )
    if queries.shape[1] != items.shape[1]:
        raise DataError(
            f"queries {queries.shape} and items {items.shape} differ in width: both need the same "
            "second axis D"
        )
    return np.asarray(queries), items


def _check_concrete(array: Array, name: str) -> None:
    if not isinstance(array, Array):
        raise DataError(
            f"{name} is a {type(array).__name__}; pass a NumPy or JAX array, e.g. "
            f"np.asarray({name})"
        )
    if isinstance(array, jax.core.Tracer):
        raise DataError(
            f"{name} is traced, and its values cannot be checked; inside jax.jit call "
            "mtrec_jax.kernels.streaming on normalised vectors"
        )


def _positive(k: int) -> int:
    if isinstance(k, bool) or not hasattr(k, "__index__") or operator.index(k) < 1:
        raise ConfigError(f"k is {k!r}; it must be an integer of at least 1")
    return operator.index(k)


def _score_dtype(queries: Array, items: Array) -> np.dtype:
    wide = jnp.promote_types(jnp.promote_types(queries.dtype, items.dtype), jnp.float32)
    return np.dtype(jax.dtypes.canonicalize_dtype(wide))


def _unit(
    vectors: Array, name: str, dtype: np.dtype, first_row: int = 0
) -> Float[jax.Array, "n D"]:
    """Normalised rows [n, D]; raises for the first that is not finite, counted from first_row."""
    if isinstance(vectors, np.ndarray):
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, reported below
            vectors = vectors.astype(dtype, copy=False)
    unit, row = _normalise(vectors, dtype)
    if (bad := int(row)) >= 0:
        raise DataError(
            f"{name} row {first_row + bad} holds NaN or a number that is infinite in {dtype}; "
            "remove the row or replace it by zeros (cosine 0 with everything)"
        )
    return unit


@jax.jit(static_argnames="dtype")
def _normalise(
    vectors: jax.Array, dtype: np.dtype
) -> tuple[Float[jax.Array, "n D"], Int[jax.Array, ""]]:
    """Unit rows, and the first row with a number that is not finite or -1."""
    rows = vectors.astype(dtype)
    is_bad = ~jnp.isfinite(jnp.max(jnp.abs(rows), axis=1, initial=0))  # max passes NaN on
    first = jnp.argmax(is_bad) if len(rows) else jnp.array(-1)
    return streaming.normalise(rows), jnp.where(jnp.any(is_bad), first, -1)


def _excluded(exclude: Array | None, rows: int, count: int) -> Int[np.ndarray, "Q X"] | None:
    """Checked exclude lists with X padded to a power of two, or None where there are none."""
    if exclude is None:
        return None
    _check_concrete(exclude, "exclude")
    width = exclude.shape[1] if exclude.ndim == 2 else -1
    ids = _indices(exclude, "exclude", (rows, width), -1, count)
    padding = (1 << (width - 1).bit_length()) - width if width else 0
    return np.pad(ids, ((0, 0), (0, padding)), constant_values=-1) if width else None


def _indices(
    ids: Array, name: str, shape: tuple[int, ...], lowest: int, count: int
) -> Int[np.ndarray, " ..."]:
    """Item indices on the host as int32, of the given shape, in lowest .. count-1."""
    _check_concrete(ids, name)
    values = np.asarray(ids)
    if values.shape != shape or not np.issubdtype(values.dtype, np.integer):
        wanted = "[Q, X]" if len(shape) == 2 else "[Q]"
        raise DataError(
            f"{name} must hold integers {wanted} with Q={shape[0]}, one per query, but has shape "
            f"{values.shape} and dtype {values.dtype}"
        )
    is_bad = (values < lowest) | (values >= count)
    if is_bad.any():
        place = tuple(int(i) for i in np.argwhere(is_bad)[0])
        padding = ", or -1 for padding" if lowest < 0 else ""
        raise DataError(
            f"{name}{list(place)} is {values[place]}, but there are {count} items: use indices "
            f"0 .. {count - 1}{padding}"
        )
    return values.astype(np.int32)


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK))


def _padded(rows: np.ndarray, chunk: slice, value: int) -> np.ndarray:
    """Rows of the chunk, filled up to a full chunk or, if it is the only one, a power of two."""
    part = rows[chunk]
    size = max(_SMALLEST_CHUNK, 1 << (len(part) - 1).bit_length()) if chunk.start == 0 else _CHUNK
    full = np.full((size, *rows.shape[1:]), value, rows.dtype)
    full[: len(part)] = part
    return full


def _joined(parts: list[Array], rows: int) -> jax.Array:
    """Chunks joined, padding cut off; on the host, as a slice on the device compiles for each Q."""
    return jnp.asarray(np.concatenate([np.asarray(part) for part in parts])[:rows])
