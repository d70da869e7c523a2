"""What a baseline is fitted on, and what a fitted one can do.

A baseline is a frozen dataclass of options with a `kind` and `fit(interactions) -> fitted`. What
is fitted ranks, predicts, or both: evaluation and `evaluation.ranking.top_items` ask it which. Some
also know which items, or users, are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Int64, Shaped

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import FIRST, PAD, Lists

_CELLS = 1 << 24  # similarities that are held at once


class Interactions(NamedTuple):
    """The training split, one entry each. Ids: 0 padding, 1 unknown, real ids from 2."""

    users: np.ndarray  # [n] ids
    items: np.ndarray  # [n] ids
    liked: np.ndarray  # [n] bool: what the retrieval task is to find
    labels: dict[str, np.ndarray]  # {task: [n]} of binary and regression tasks, nan where none is
    kinds: dict[str, str]  # {task: "binary" or "regression"}
    n_users: int
    n_items: int
    times: np.ndarray | None = None  # [n] seconds; None: the data has no time


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores queries, numbered from 0, against the whole catalogue."""

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Scores by catalogue index, that is item id - 2; larger is better."""


@runtime_checkable
class Ranks(Protocol):
    """A fitted baseline that puts the catalogue in order."""

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Scorer:
        """Of queries by these users, with the item ids of each query's past."""


@runtime_checkable
class Predicts(Protocol):
    """A fitted baseline that says what the label of a pair will be."""

    def predict(
        self, task: str, users: Int[np.ndarray, " n"], items: Int[np.ndarray, " n"]
    ) -> Shaped[np.ndarray, " n"] | None:
        """Probabilities or values of pairs of ids; None: it says nothing about this task."""


@runtime_checkable
class SimilarItems(Protocol):
    """A fitted baseline that knows which items are alike."""

    def similar_items(
        self, items: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k items most like each: (scores, item ids), as `most_similar` gives them."""


@runtime_checkable
class SimilarUsers(Protocol):
    """A fitted baseline that knows which users are alike."""

    def similar_users(
        self, users: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k users most like each: (scores, user ids), as `most_similar` gives them."""


def most_similar(
    what: str,
    rows: Callable[[np.ndarray], np.ndarray],
    ids: Int[np.ndarray, " n"],
    k: int,
    size: int,
) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
    """The k most similar of each id: (scores, ids), best first, ties by the lower id, never itself.

    Args:
      what: "item" or "user", for messages.
      rows: similarities `[m, size]` of indexes `[m]`, that is ids - 2; -inf where there is none.
      ids: padding and unknown ids are like nothing.
      k: how many.
      size: of the catalogue, or of the users.

    Returns:
      Scores and ids; -inf and 0, which is padding, where there are fewer than k.

    Raises:
      ConfigError: k is below 1.
      DataError: an id is beyond the users or items.

    >>> table = np.array([[1.0, 0.5, 0.5], [0.5, 1, -np.inf], [0.5, -np.inf, 1]], np.float32)
    >>> most_similar("item", lambda which: table[which], np.array([2, 3, 1]), 2, 3)[1]
    array([[3, 4],
           [2, 0],
           [0, 0]])
    """
    if k < 1:
        raise ConfigError(f"similar_{what}s: k must be 1 or more, not {k}")
    if len(ids) and not 0 <= ids.min() <= ids.max() < size + FIRST:
        raise DataError(
            f"similar_{what}s: ids {ids.min()} .. {ids.max()} go beyond 0 .. {size + FIRST - 1}; "
            f"pass {what} ids of the data that was fitted"
        )
    scores = np.full((len(ids), k), -np.inf, np.float32)
    found = np.full((len(ids), k), PAD, np.int64)
    known, block = np.flatnonzero(ids >= FIRST), max(_CELLS // max(size, 1), 1)
    for start in range(0, len(known), block):
        places = known[start : start + block]
        which = ids[places].astype(np.int64) - FIRST
        alike = np.array(rows(which), np.float32)
        alike[np.arange(len(which)), which] = -np.inf
        order = np.argsort(-alike, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(alike, order, axis=1)
        there = places[:, None], np.arange(order.shape[1])[None]
        scores[there] = best
        found[there] = np.where(best > -np.inf, order + FIRST, PAD)
    return scores, found


def check_ids(baseline: str, interactions: Interactions) -> None:
    """Raise `DataError` for an id beyond `n_users` or `n_items`."""
    sides = (
        ("user", interactions.users, interactions.n_users),
        ("item", interactions.items, interactions.n_items),
    )
    for name, ids, size in sides:
        if len(ids) and not 0 <= ids.min() <= ids.max() < size + FIRST:
            raise DataError(
                f"{baseline}: {name} ids {ids.min()} .. {ids.max()} go beyond 0 .. "
                f"{size + FIRST - 1}; pass n_{name}s as in the manifest"
            )
