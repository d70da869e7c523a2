"""How long does it take to rank each user's target among all items that the user has not seen?

Users and items as many as in MovieLens 1M, each user with a list of seen items. "numpy" multiplies
and counts, "numpy sort" and "torch" sort all scores and look the target up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Ranking(NamedTuple):
    """One rank a user."""

    users: int  # Q
    items: int  # N
    width: int  # D
    seen: int  # X, on average


class Problem(NamedTuple):
    """Unit vectors [Q, D], [N, D], targets [Q], seen items [Q, X] filled up with -1."""

    users: np.ndarray
    items: np.ndarray
    targets: np.ndarray
    seen: np.ndarray


CASES = {"quick": (Ranking(604, 3_416, 64, 165),), "table": (Ranking(6_040, 3_416, 64, 165),)}
BLAS = ("numpy", "numpy sort")
BOUNDS: tuple[str, ...] = ()

Call = Callable[[], np.ndarray]  # ranks [Q], 0 is the first


def problem(case: Ranking) -> Problem:
    """Seeded vectors; the number of seen items is geometric, as few users have seen very many."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((case.users + case.items, case.width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    targets = rng.integers(0, case.items, case.users)
    lengths = np.minimum(rng.geometric(1 / case.seen, case.users), case.items // 2)
    seen = np.full((case.users, lengths.max()), -1)
    for user, length in enumerate(lengths):
        others = rng.choice(case.items - 1, length, replace=False)
        seen[user, :length] = others + (others >= targets[user])
    return Problem(vectors[: case.users], vectors[case.users :], targets, seen)


def check(problem: Problem, ranks: np.ndarray) -> None:
    """Equal to sorting in float64, except where scores are closer than float32 can tell."""
    scores = problem.users.astype(np.float64) @ problem.items.T.astype(np.float64)
    _hide(scores, problem.seen)
    own = np.take_along_axis(scores, problem.targets[:, None], axis=1)
    close = (np.abs(scores - own) < 1e-6).sum(axis=1) - 1
    order = np.argsort(-scores, axis=1, kind="stable")
    exact = np.argmax(order == problem.targets[:, None], axis=1)
    assert (np.abs(ranks - exact) <= close).all()
    assert (ranks == exact).mean() > 0.99


def _hide(scores: np.ndarray, seen: np.ndarray) -> None:
    user, place = np.nonzero(seen >= 0)
    scores[user, seen[user, place]] = -np.inf


def _ours(problem: Problem) -> Call:
    from mtrec_jax.kernels import ItemIndex

    index = ItemIndex(problem.items)
    return lambda: index.rank(problem.users, problem.targets, exclude=problem.seen)


def _numpy(problem: Problem) -> Call:
    def call() -> np.ndarray:
        scores = problem.users @ problem.items.T
        _hide(scores, problem.seen)
        own = np.take_along_axis(scores, problem.targets[:, None], axis=1)
        return (scores > own).sum(axis=1)

    return call


def _numpy_sort(problem: Problem) -> Call:
    def call() -> np.ndarray:
        scores = problem.users @ problem.items.T
        _hide(scores, problem.seen)
        order = np.argsort(-scores, axis=1)
        return np.argmax(order == problem.targets[:, None], axis=1)

    return call


def _torch(problem: Problem) -> Call:
    torch = importlib.import_module("torch")
    users, items, targets = (torch.from_numpy(np.asarray(a)) for a in problem[:3])
    rows, columns = np.nonzero(problem.seen >= 0)
    pairs = torch.from_numpy(rows), torch.from_numpy(problem.seen[rows, columns])

    def call() -> Any:
        scores = users @ items.T
        scores[pairs] = -torch.inf
        order = torch.argsort(scores, dim=1, descending=True)
        return (order == targets[:, None]).int().argmax(dim=1).numpy()

    return call


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _ours,
    "numpy": _numpy,
    "numpy sort": _numpy_sort,
    "torch": _torch,
}
