"""How long does an exact cosine top-k over a catalogue take, and beside what?

All get the same float32 unit vectors with the catalogue where they like it: ours is an `ItemIndex`;
the line "raw" is `cosine_topk`, which makes an index of the NumPy array in each call. "bound" is no
contestant: the bare products, in blocks, without anything of them being kept. faiss, torch: where
they are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.specs import QUICK_SCORING, SHOP_SCORING, Scoring

SHAPES = (SHOP_SCORING, QUICK_SCORING)
Call = Callable[[], tuple[Any, Any]]  # scores, ids: [Q, K]
_BLOCK, _GROUP = 4096, 16


class Problem(NamedTuple):
    """Unit vectors [Q, D] and [N, D], and the number of results."""

    queries: np.ndarray
    items: np.ndarray
    k: int


def problem(shape: Scoring) -> Problem:
    """Seeded random unit vectors."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((shape.queries + shape.items, shape.width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Problem(vectors[: shape.queries], vectors[shape.queries :], shape.results)


def check(problem: Problem, answer: tuple[Any, Any]) -> None:
    """The true scores of the returned ids are the true best scores, for a few queries."""
    scores, ids = (np.asarray(part)[:4] for part in answer)
    exact = problem.queries[:4].astype(np.float64) @ problem.items.astype(np.float64).T
    best = -np.sort(-exact, axis=1)[:, : problem.k]
    np.testing.assert_allclose(np.take_along_axis(exact, ids, axis=1), best, atol=1e-6)
    np.testing.assert_allclose(scores, best, atol=1e-5)


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores [Q, K] of each row, best first, and their columns."""
    columns = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:]
    kept = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-kept, axis=1)
    return np.take_along_axis(kept, order, 1), np.take_along_axis(columns, order, 1)


def _numpy_blocked(problem: Problem) -> Call:
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
        groups = _best(np.concatenate(maxima, axis=1), k)[1]
        first = groups // stride * _BLOCK + groups % stride
        ids = (first[:, :, None] + np.arange(_GROUP) * stride).reshape(len(queries), -1)
        scores = (padded[ids] @ queries[:, :, None])[:, :, 0]
        scores, columns = _best(np.where(ids < count, scores, -np.inf), k)
        return scores, np.take_along_axis(ids, columns, axis=1)

    return call


def _index(problem: Problem) -> Call:
    from mtrec_jax.kernels import ItemIndex  # here, as it weighs nothing in the other processes

    index = ItemIndex(problem.items)
    return lambda: index.search(problem.queries, problem.k)


def _cosine_topk(problem: Problem) -> Call:
    from mtrec_jax.kernels import cosine_topk

    return lambda: cosine_topk(problem.queries, problem.items, problem.k)


def _bound(problem: Problem) -> Call:
    import jax

    @jax.jit
    def products(queries: jax.Array, items: jax.Array) -> jax.Array:
        blocks = len(items) // _BLOCK

        def add(number: jax.Array, total: jax.Array) -> jax.Array:
            block = jax.lax.dynamic_slice_in_dim(items, number * _BLOCK, _BLOCK)
            return total + (block @ queries.T)[0]

        return jax.lax.fori_loop(0, blocks, add, jax.numpy.zeros(len(queries)))

    queries, items = jax.device_put(problem[:2])
    answer = _index(problem)()  # for the check, which wants one

    def call() -> tuple[Any, Any]:
        products(queries, items).block_until_ready()
        return answer

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
    return lambda: torch.topk(queries @ items.T, problem.k)


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _index,
    "mtrec_jax raw": _cosine_topk,
    "bound": _bound,
    "numpy argpartition": lambda problem: lambda: _best(problem[0] @ problem[1].T, problem[2]),
    "numpy blocked": _numpy_blocked,
    "scikit-learn": _scikit_learn,
    "faiss": _faiss,
    "torch": _torch,
}
