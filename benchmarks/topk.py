"""How long does an exact cosine top-k over a catalogue take, and beside what?

All get the same float32 unit vectors, with the catalogue where they like it: ours is an
`ItemIndex`; "mtrec_jax raw" is `cosine_topk`, and "numpy raw" NumPy, which get the array anew in
each call and normalise it.
The bounds keep nothing of what they compute: the bare products in NumPy and in XLA, whole or in
blocks, whichever is faster. For few queries they take as long as reading the catalogue once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import contest
from tests.specs import QUICK_SCORING, Scoring

_TABLE = (
    Scoring(queries=256, items=200_000, width=64, results=10),
    Scoring(queries=256, items=200_000, width=64, results=100),
    Scoring(queries=64, items=1_000_000, width=64, results=10),
    Scoring(queries=8, items=1_000_000, width=64, results=10),
    Scoring(queries=1, items=1_000_000, width=64, results=10),
)
CASES = {
    "quick": (QUICK_SCORING,),
    "table": _TABLE,
    "width32": tuple(case._replace(width=32) for case in _TABLE),
    "width128": tuple(case._replace(width=128) for case in _TABLE),
    "items": tuple(_TABLE[0]._replace(items=n) for n in (3_000, 10_000, 50_000, 1_000_000)),
    "queries": tuple(_TABLE[0]._replace(queries=q) for q in (1, 8, 64, 1024)),
    "results": tuple(_TABLE[0]._replace(results=k) for k in (1, 1000)),
    "small": tuple(_TABLE[2]._replace(items=n) for n in (3_000, 10_000, 200_000)),
    "long": (Scoring(queries=64, items=200_000, width=64, results=1000),),
}
BLAS = (
    "numpy argpartition",
    "numpy raw",
    "numpy blocked",
    "scikit-learn",
    "faiss",
    "implicit",
    "bound numpy",
)
BOUNDS = ("bound numpy", "bound xla")

Call = Callable[[], tuple[Any, Any]]  # scores, ids: [Q, K]
_BLOCKS, _BLOCK, _GROUP = (4096, 16_384), 4096, 16


class Problem(NamedTuple):
    """Unit vectors [Q, D] and [N, D], and the number of results."""

    queries: np.ndarray
    items: np.ndarray
    k: int


def problem(case: Scoring) -> Problem:
    """Seeded random unit vectors."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((case.queries + case.items, case.width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Problem(vectors[: case.queries], vectors[case.queries :], case.results)


def check(problem: Problem, answer: tuple[Any, Any] | None) -> None:
    """The true scores of the returned ids are the true best scores, for queries from all over."""
    if answer is None:  # a bound, which answers nothing
        return
    rows = np.unique(np.linspace(0, len(problem.queries) - 1, 8).astype(int))
    scores, ids = (np.asarray(part)[rows] for part in answer)
    assert all(len(set(row)) == problem.k for row in ids.tolist())
    exact = problem.queries[rows].astype(np.float64) @ problem.items.astype(np.float64).T
    best = -np.sort(-exact, axis=1)[:, : problem.k]
    np.testing.assert_allclose(np.take_along_axis(exact, ids, axis=1), best, atol=1e-6)
    np.testing.assert_allclose(scores, best, atol=1e-5)


# --- Ours


def _index(problem: Problem) -> Call:
    from mtrec_jax.kernels import ItemIndex  # here, as it weighs nothing in the other processes

    index = ItemIndex(problem.items)
    return lambda: index.search(problem.queries, problem.k)


def _cosine_topk(problem: Problem) -> Call:
    from mtrec_jax.kernels import cosine_topk

    return lambda: cosine_topk(problem.queries, problem.items, problem.k)


# --- Theirs


def best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores [Q, K] of each row, best first, and their columns."""
    columns = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
    kept = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-kept, axis=1)
    return np.take_along_axis(kept, order, 1), np.take_along_axis(columns, order, 1)


def _numpy_argpartition(problem: Problem) -> Call:
    queries, items, k = problem
    scores = np.zeros((len(queries), len(items)), np.float32)  # used again: no fresh pages a call
    return lambda: best(np.matmul(queries, items.T, out=scores), k)


def _numpy_raw(problem: Problem) -> Call:
    """All of the job, as `cosine_topk` does it."""
    queries, items, k = problem

    def call() -> tuple[np.ndarray, np.ndarray]:
        units = [a / np.linalg.norm(a, axis=1, keepdims=True) for a in (queries, items)]
        return best(units[0] @ units[1].T, k)

    return call


def _numpy_blocked(problem: Problem) -> Call:
    """Multiply by blocks, keep the maxima of groups, score the members of the best groups anew."""
    queries, items, k = problem
    count = len(items)
    padded = np.pad(items, ((0, -count % _BLOCK), (0, 0)))
    stride = _BLOCK // _GROUP  # a group is every 256th item: this maximum runs along whole rows

    def call() -> tuple[np.ndarray, np.ndarray]:
        maxima = []
        for start in range(0, count, _BLOCK):
            scores = queries @ padded[start : start + _BLOCK].T
            scores[:, max(0, count - start) :] = -np.inf
            maxima.append(scores.reshape(-1, _GROUP, stride).max(axis=1))
        every = np.concatenate(maxima, axis=1)
        groups = best(every, min(k, every.shape[1]))[1]
        first = groups // stride * _BLOCK + groups % stride
        ids = (first[:, :, None] + np.arange(_GROUP) * stride).reshape(len(queries), -1)
        scores = (padded[ids] @ queries[:, :, None])[:, :, 0]
        scores, columns = best(np.where(ids < count, scores, -np.inf), k)
        return scores, np.take_along_axis(ids, columns, axis=1)

    return call


def _scikit_learn(problem: Problem) -> Call:
    search = importlib.import_module("sklearn.neighbors").NearestNeighbors
    index = search(n_neighbors=problem.k, algorithm="brute").fit(problem.items)

    def call() -> tuple[np.ndarray, np.ndarray]:
        distances, ids = index.kneighbors(problem.queries)
        return 1 - distances**2 / 2, ids  # |q - x|^2 = 2 - 2 cos

    return call


def _faiss(problem: Problem) -> Call:
    index = importlib.import_module("faiss").IndexFlatIP(problem.items.shape[1])
    index.add(problem.items)
    return lambda: index.search(problem.queries, problem.k)


def _torch(problem: Problem) -> Call:
    torch = importlib.import_module("torch")
    queries, items = torch.from_numpy(problem.queries), torch.from_numpy(problem.items)
    scores = torch.zeros(len(queries), len(items))  # used again, as NumPy's

    def call() -> tuple[Any, Any]:
        return torch.topk(torch.matmul(queries, items.T, out=scores), problem.k)

    return call


def _implicit(problem: Problem) -> Call:
    topk = importlib.import_module("implicit.cpu.topk").topk

    def call() -> tuple[np.ndarray, np.ndarray]:
        ids, scores = topk(problem.items, problem.queries, problem.k)
        return scores, ids

    return call


# --- Bounds


def _bound_numpy(problem: Problem) -> Call:
    queries, items, _ = problem
    whole = np.zeros((len(queries), len(items)), np.float32)

    def blocked(size: int) -> None:
        part = whole.reshape(-1)[: len(queries) * size].reshape(len(queries), -1)
        for start in range(0, len(items) - size + 1, size):
            np.matmul(queries, items[start : start + size].T, out=part)

    sizes = [size for size in _BLOCKS if size < len(items)] + [len(items)]
    return contest.fastest({f"blocks of {n}": functools.partial(blocked, n) for n in sizes})


def _bound_xla(problem: Problem) -> Call:
    import jax

    from mtrec_jax.kernels.placing import in_large_pages

    def dot(queries: jax.Array, items: jax.Array) -> jax.Array:
        return jax.lax.dot_general(items, queries, (((1,), (1,)), ((), ())))

    # Into memory that is used again, as in `bound numpy`.
    whole = jax.jit(lambda q, x, memory: dot(q, x), donate_argnums=2, keep_unused=True)

    def blocked(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
        @jax.jit
        def products(queries: jax.Array, items: jax.Array) -> jax.Array:
            def add(number: jax.Array, total: jax.Array) -> jax.Array:
                block = jax.lax.dynamic_slice_in_dim(items, number * size, size)
                return total + dot(queries, block)[0]

            start = jax.numpy.zeros(len(queries))
            return jax.lax.fori_loop(0, len(items) // size, add, start)

        return products

    queries, items = jax.device_put(problem.queries), in_large_pages(problem.items)
    memory = [jax.numpy.zeros((len(items), len(queries)))]
    programs = {f"blocks of {n}": blocked(n) for n in _BLOCKS if n < len(problem.items)}

    def at_once() -> None:
        memory[0] = whole(queries, items, memory[0]).block_until_ready()

    def run(name: str) -> None:
        programs[name](queries, items).block_until_ready()

    blocks = {name: functools.partial(run, name) for name in programs}
    return contest.fastest({"whole": at_once, **blocks})


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _index,
    "mtrec_jax raw": _cosine_topk,
    "numpy argpartition": _numpy_argpartition,
    "numpy raw": _numpy_raw,
    "numpy blocked": _numpy_blocked,
    "torch": _torch,
    "faiss": _faiss,
    "scikit-learn": _scikit_learn,
    "implicit": _implicit,
    "bound numpy": _bound_numpy,
    "bound xla": _bound_xla,
}
BEFORE = {name: CONTESTANTS[name] for name in ("mtrec_jax", "mtrec_jax raw")}
