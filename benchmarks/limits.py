"""How long does an exact top-k within limits take, among lists of ids or within quotas of groups?

The catalogue is of float32 unit vectors. In the set "lists" each query has a list of its own; NumPy
gathers its vectors, multiplies and partitions. In the set "quotas" nine of ten items are by one
author; the others take the 10,000 best and cut them down, which is right here, but leaves lists
short elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import topk

_MOST = 2  # items of an author
_LONG = 10_000  # of a list that is cut down to the quotas


class Limited(NamedTuple):
    """One constrained cosine top-k problem."""

    queries: int
    items: int
    width: int
    results: int
    listed: int = 0  # ids in the list of each query; 0: quotas


CASES = {
    "quick": (Limited(64, 20_000, 64, 10, listed=1000), Limited(64, 20_000, 64, 10)),
    "lists": (Limited(64, 1_000_000, 64, 10, listed=1000),),
    "quotas": (Limited(64, 1_000_000, 64, 10),),
}
BLAS = ("numpy gather", "numpy and cut")
BOUNDS = ()

Call = Callable[[], tuple[Any, Any]]  # scores, ids: [Q, K]


class Problem(NamedTuple):
    """Unit vectors [Q, D] and [N, D], the number of results, and the limits."""

    queries: np.ndarray
    items: np.ndarray
    k: int
    lists: np.ndarray  # [Q, L] ids, or [Q, 0]
    authors: np.ndarray  # [N]


def problem(case: Limited) -> Problem:
    """Seeded random unit vectors, lists and authors."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((case.queries + case.items, case.width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists = rng.integers(0, case.items, (case.queries, case.listed))
    some = rng.integers(1, case.items // 100, case.items)
    authors = np.where(rng.random(case.items) < 0.9, 0, some)
    return Problem(vectors[: case.queries], vectors[case.queries :], case.results, lists, authors)


def check(problem: Problem, answer: tuple[Any, Any]) -> None:
    """The true scores of the returned ids are those of the best list, for queries from all over."""
    rows = np.unique(np.linspace(0, len(problem.queries) - 1, 8).astype(int))
    scores, ids = (np.asarray(part)[rows] for part in answer)
    exact = problem.queries[rows].astype(np.float64) @ problem.items.astype(np.float64).T
    for row, own in zip(rows, exact, strict=True):
        order = np.argsort(-own)
        if problem.lists.size:
            order = order[np.isin(order, problem.lists[row])]
        else:
            order = order[_within(problem.authors[order], problem.k)]
        place = int(np.flatnonzero(rows == row)[0])
        best = own[order[: problem.k]]
        np.testing.assert_allclose(own[ids[place]], best, atol=1e-6)
        np.testing.assert_allclose(scores[place], best, atol=1e-5)


def contestants(case: Limited) -> tuple[str, ...]:
    """Who answers this kind of question."""
    others = ("numpy gather",) if case.listed else ("mtrec_jax and cut", "numpy and cut")
    return ("mtrec_jax", *others)


def _within(authors: np.ndarray, k: int) -> list[int]:
    """Places of the first k items within the quotas."""
    counts, kept = Counter[int](), []
    for place, author in enumerate(authors.tolist()):
        if counts[author] < _MOST:
            counts[author] += 1
            kept.append(place)
            if len(kept) == k:
                break
    return kept


def _ours(problem: Problem) -> Call:
    from mtrec_jax.kernels import ItemIndex  # here, as it weighs nothing in the other processes

    index, limits = ItemIndex(problem.items), dict[str, Any]()
    if problem.lists.size:
        limits["among"] = list(problem.lists)
    else:
        limits |= {"groups": problem.authors, "at_most": _MOST}
    return lambda: index.search(problem.queries, problem.k, **limits)


def _numpy_gather(problem: Problem) -> Call:
    queries, items, k, lists, _ = problem

    def call() -> tuple[np.ndarray, np.ndarray]:
        ids = np.sort(lists, axis=1)
        scores = (items[ids] @ queries[:, :, None])[:, :, 0]
        scores[:, 1:][ids[:, 1:] == ids[:, :-1]] = -np.inf  # repeats
        scores, columns = topk.best(scores, k)
        return scores, np.take_along_axis(ids, columns, axis=1)

    return call


def _numpy_and_cut(problem: Problem) -> Call:
    queries, items, k, _, authors = problem
    scores = np.zeros((len(queries), len(items)), np.float32)

    def call() -> tuple[np.ndarray, np.ndarray]:
        return _cut(topk.best(np.matmul(queries, items.T, out=scores), _LONG), authors, k)

    return call


def _ours_and_cut(problem: Problem) -> Call:
    from mtrec_jax.kernels import ItemIndex

    index = ItemIndex(problem.items)
    return lambda: _cut(index.search(problem.queries, _LONG), problem.authors, problem.k)


def _cut(
    found: tuple[np.ndarray, np.ndarray], authors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    scores, ids = found
    places = np.array([_within(authors[row], k) for row in ids])
    return np.take_along_axis(scores, places, axis=1), np.take_along_axis(ids, places, axis=1)


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _ours,
    "mtrec_jax and cut": _ours_and_cut,
    "numpy gather": _numpy_gather,
    "numpy and cut": _numpy_and_cut,
}
