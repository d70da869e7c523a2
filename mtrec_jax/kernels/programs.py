"""The compiled programs behind an `ItemIndex`, on one device or over a mesh.

On one device, the scores of a chunk of queries with all items stand in memory that is used again
and again: on a CPU, fresh pages cost more than the products. Catalogues of which not even a few
queries fit there, and shards, are streamed block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mtrec_jax.kernels import arithmetic, candidates, streaming
from mtrec_jax.kernels.blocks import Admissible, Items, Plan, at_once, make_plan
from mtrec_jax.kernels.constrained import NEVER
from mtrec_jax.kernels.placing import all_axes

_CHUNK = 256  # queries of one program at most; a power of two
_MEMORY = 1 << 27  # bytes of scores that are made at once
_FEWEST = 16  # queries of a chunk for which that pays off; with less, blocks are streamed
_MAXIMA = 1 << 25  # of groups in one streaming program, 128 MB


class Memory:
    """Arrays for scores, given back to be written over."""

    def __init__(self) -> None:
        self._idle: dict[Any, jax.Array] = {}  # each of its steps is atomic: threads may share it

    def take(self, shape: tuple[int, ...], dtype: Any, where: jax.Array) -> jax.Array:
        """An array of this shape on the device of `where`; what is in it is left."""
        found = self._idle.pop((shape, dtype), None)
        return jnp.zeros(shape, dtype, device=where.sharding) if found is None else found

    def give(self, array: jax.Array) -> None:
        """Keep the array for later, and not more than `_MEMORY` in all."""
        kept = sum(other.nbytes for other in list(self._idle.values()))
        if kept + array.nbytes > _MEMORY:
            self._idle.clear()
        self._idle[array.shape, array.dtype] = array


@functools.partial(jax.jit, static_argnames=("dtype", "metric"))
def prepared(
    vectors: jax.Array, dtype: np.dtype, metric: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries as they are multiplied; the first row with a number that is not finite or -1; and a
    bound of their norms, in which no square overflows or vanishes."""
    rows = vectors.astype(dtype)
    is_bad = ~jnp.all(jnp.isfinite(rows), axis=1)  # a maximum may lose NaN
    first = jnp.where(jnp.any(is_bad), jnp.argmax(is_bad), -1)
    if metric == "cosine":
        return arithmetic.normalise(rows), first, jnp.ones((), dtype)
    largest = jnp.max(jnp.abs(rows), axis=1, initial=0)
    scaled = rows / jnp.where(largest > 0, largest, 1)[:, None]
    norms = largest * jnp.sqrt(jnp.sum(scaled * scaled, axis=1))
    return rows, first, jnp.max(norms, initial=0) * 1.001


def chunks(
    rows: int, items: Items, group: int, mesh: Mesh | None, kept: int = 1
) -> Iterator[slice]:
    """Which queries go through a program together, if `kept` items of each are scored anew."""
    count = max(len(items.vectors), 1)
    most = _MEMORY // (4 * count)
    if mesh is not None or most < _FEWEST:
        most = _MAXIMA * group // count
    size = min(_CHUNK, 1 << max(most.bit_length() - 1, 3))
    room = max(_MEMORY // (4 * max(items.vectors.shape[1], 1) * max(kept, 1)), 1)
    size = min(size, 1 << (room.bit_length() - 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


# --- One device

_scores = jax.jit(at_once, static_argnums=3, donate_argnums=4, keep_unused=True)
_candidates = jax.jit(streaming.candidates, static_argnums=(2, 4))
_settled = jax.jit(streaming.settled, static_argnums=(2, 5))
_rank = jax.jit(streaming.rank)  # in blocks: it goes over the scores several times


def _plan(rows: jax.Array, items: Items, group: int) -> Plan | None:
    """The plan of one block, if all can be one without a copy of the items or of the scores."""
    count, vectors = len(items.vectors), items.vectors
    fits = len(rows) * count * rows.dtype.itemsize <= _MEMORY and count % group == 0
    if fits and vectors.dtype == rows.dtype and len(vectors.devices()) == 1:
        return make_plan(len(rows), count, group, count)
    return None


def _topk(
    memory: Memory, rows: jax.Array, items: Items, k: int, may: Admissible
) -> tuple[jax.Array, jax.Array]:
    count = len(items.vectors)
    if not count:
        return streaming.topk(rows, items, k)
    plan = _plan(rows, items, streaming.group_size(min(k, count)))
    if plan is None:
        return _settled(rows, items, k, _candidates(rows, items, k, may), may)
    scores = memory.take((plan.block, len(rows)), rows.dtype, items.vectors)
    scores = _scores(rows, items, may, plan, scores)
    found = _candidates(rows, items, k, may, count, scores)
    answer = _settled(rows, items, k, found, may, count, scores)
    memory.give(scores)
    return answer


# --- Pairs of a query and an item

PIECES = (1024, 4096, 16_384)  # pairs of a program


def pair_scores(
    mesh: Mesh | None,
    rows: jax.Array,
    items: Items,
    query: np.ndarray,
    item: np.ndarray,
    exact: bool,
) -> np.ndarray:
    """Scores [E] of pairs on the host, rough or exact, in programs of a few sizes."""
    size = next((size for size in PIECES if size >= len(query)), PIECES[-1])
    run, found = _pairs if mesh is None else _pairs_over(mesh), []
    for start in range(0, len(query), size):
        part = np.zeros((2, size), np.int32)
        pairs = query[start : start + size], item[start : start + size]
        part[:, : len(pairs[0])] = pairs
        found.append(run(rows, items, part, exact))
    scores = [np.zeros(0, rows.dtype), *map(np.asarray, found)]
    return np.concatenate(scores)[: len(query)]


def _score_pairs(rows: jax.Array, items: Items, pairs: jax.Array, exact: bool) -> jax.Array:
    how = candidates.exact_scores if exact else candidates.rough_scores
    return how(rows.at[pairs[0]].get(mode="promise_in_bounds"), items, pairs[1][:, None])[:, 0]


_pairs = jax.jit(_score_pairs, static_argnums=3)


@functools.cache
def _pairs_over(mesh: Mesh) -> Callable[..., Any]:
    axes = all_axes(mesh)

    def shard(exact: bool, rows: Any, items: Items, pairs: jax.Array) -> jax.Array:
        size = items.vectors.shape[0]
        local = pairs[1] - lax.axis_index(axes) * size
        here = (local >= 0) & (local < size)
        own = jnp.stack([pairs[0], jnp.where(here, local, 0)])
        return lax.psum(jnp.where(here, _score_pairs(rows, items, own, exact), 0), axes)

    def scores(rows: jax.Array, given: Items, pairs: jax.Array, exact: bool) -> Any:
        specs = (P(), Items(P(axes), P(axes), P()), P())  # type: ignore[arg-type]
        part = functools.partial(shard, exact)
        run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return run(rows, given, pairs)

    return jax.jit(scores, static_argnums=3)


# --- A mesh


def program(mesh: Mesh | None, what: str, memory: Memory) -> Callable[..., Any]:
    """Compiled "topk" or "rank" of (queries, items, k or targets, admissible)."""
    if mesh is None:
        return functools.partial(_topk, memory) if what == "topk" else _rank
    return _over(mesh, what)


@functools.cache
def _over(mesh: Mesh, what: str) -> Callable[..., Any]:
    axes = all_axes(mesh)
    items = Items(P(axes), P(axes), P())  # type: ignore[arg-type]
    admissible = Admissible(P(), P(), P(None, axes), P(), P())  # type: ignore[arg-type]
    shard = functools.partial(jax.shard_map, mesh=mesh, out_specs=P(), check_vma=False)
    if what == "rank":
        specs = (P(), items, P(), admissible)
        return jax.jit(shard(functools.partial(_shard_rank, axes), in_specs=specs))

    def topk(rows: jax.Array, given: Items, k: int, may: Admissible) -> Any:
        part = functools.partial(_shard_topk, axes, k)
        return shard(part, in_specs=(P(), items, admissible))(rows, given, may)

    return jax.jit(topk, static_argnums=2)


def _shard_topk(axes: Any, k: int, rows: Any, items: Items, admissible: Admissible) -> Any:
    """The best of this shard's items, exchanged and merged."""
    first = lax.axis_index(axes) * items.vectors.shape[0]
    scores, ids = streaming.topk(rows, items, k, _shifted(admissible, first))
    ids = jnp.where(ids < 0, NEVER, ids + first)
    scores, ids = (lax.all_gather(a, axes, axis=1, tiled=True) for a in (scores, ids))
    scores, ids = candidates.ordered(scores, ids, k)
    return scores, jnp.where(scores == -jnp.inf, -1, ids)


def _shard_rank(
    axes: Any, rows: Any, items: Items, targets: jax.Array, admissible: Admissible
) -> jax.Array:
    size = items.vectors.shape[0]
    first = lax.axis_index(axes) * size
    local = targets - first
    here = (local >= 0) & (local < size)
    own = candidates.exact_scores(rows, items, jnp.clip(local, 0, size - 1)[:, None])[:, 0]
    own = lax.psum(jnp.where(here, own, 0), axes)
    return lax.psum(streaming.rank(rows, items, local, _shifted(admissible, first), own=own), axes)


def _shifted(admissible: Admissible, first: jax.Array) -> Admissible:
    """Lists of ids as seen from the shard that begins with the item `first`."""
    exclude, entries, stop = admissible.exclude, admissible.entries, admissible.stop
    return admissible._replace(
        stop=None if stop is None else stop - first,
        exclude=None if exclude is None else exclude - first,
        entries=None if entries is None else entries - jnp.stack([first, 0])[:, None],
    )
