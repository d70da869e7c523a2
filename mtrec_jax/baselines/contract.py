"""What a baseline is fitted on, and what a fitted one can do.

A baseline is a frozen dataclass of options with a `kind` and `fit(interactions) -> fitted`. What
is fitted ranks, predicts, or both: evaluation and `evaluation.ranking.top_items` ask it which.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int, Shaped

from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, Lists


class Interactions(NamedTuple):
    """The training split, one entry each. Ids: 0 padding, 1 unknown, real ids from 2."""

    users: np.ndarray  # [n] ids
    items: np.ndarray  # [n] ids
    liked: np.ndarray  # [n] bool: what the retrieval task is to find
    labels: dict[str, np.ndarray]  # {task: [n]} of binary and regression tasks, nan where none is
    kinds: dict[str, str]  # {task: "binary" or "regression"}
    n_users: int
    n_items: int


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
