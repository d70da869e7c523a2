"""What baselines are fitted on, and what a fitted one can do.

A baseline is a frozen dataclass of options with a `kind` and `fit(train) -> fitted`. What is fitted
has one or both of

    scorer(users [Q], histories) -> Scorer       it ranks items: scores of blocks of the catalogue
    predict(users [n], items [n]) -> {task: [n]} it predicts tasks: probability of 1, or a number

and is measured where it has them. Users and items are ids: 0 padding, 1 unknown, real ones from 2.
Scores are by catalogue index, that is item id - 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, Lists


@dataclass(frozen=True)
class Interactions:
    """The targets of the training split.

    Raises:
      DataError: an id is beyond the sizes.
    """

    users: np.ndarray  # [n] ids
    items: np.ndarray  # [n] ids
    n_users: int  # real users
    n_items: int  # N
    positive: np.ndarray | None = None  # [n] bool: of the retrieval task; None: all
    labels: dict[str, np.ndarray] = field(default_factory=dict)  # {task: [n], nan: none}
    kinds: dict[str, str] = field(default_factory=dict)  # {task: "binary" or "regression"}

    def __post_init__(self) -> None:
        for name, ids, size in (
            ("user", self.users, self.n_users),
            ("item", self.items, self.n_items),
        ):
            if len(ids) and not 0 <= ids.min() <= ids.max() < size + FIRST:
                raise DataError(
                    f"baselines: {name} ids {ids.min()} .. {ids.max()} go beyond 0 .. "
                    f"{size + FIRST - 1}; pass n_{name}s as in the manifest"
                )

    @property
    def liked(self) -> tuple[np.ndarray, np.ndarray]:
        """(users, items) of the positives of retrieval."""
        if self.positive is None:
            return self.users, self.items
        return self.users[self.positive], self.items[self.positive]


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores some queries against a stretch of the catalogue."""

    def block(self, queries: Int[np.ndarray, " q"], items: slice) -> Float32[np.ndarray, "q n"]:
        """Scores of the items `items.start .. items.stop - 1`, larger is better.

        The same arguments must give the same bits; different blocks may round differently.
        """


@runtime_checkable
class Ranks(Protocol):
    """A fitted baseline that puts items in order."""

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Scorer:
        """Scores for queries: users, and the item ids that each has met, in any order."""


@runtime_checkable
class Predicts(Protocol):
    """A fitted baseline that predicts labels."""

    def predict(
        self, users: Int[np.ndarray, " n"], items: Int[np.ndarray, " n"]
    ) -> dict[str, np.ndarray]:
        """{task: predictions [n]} of the tasks that it knows."""


@runtime_checkable
class Baseline(Protocol):
    """Options of a baseline."""

    kind: Any

    def fit(self, train: Interactions) -> Ranks | Predicts:
        """The fitted baseline."""


@dataclass(frozen=True)
class SameForEveryone:
    """A scorer without personalization."""

    scores: np.ndarray  # [N] float32

    def block(self, queries: Int[np.ndarray, " q"], items: slice) -> Float32[np.ndarray, "q n"]:
        """The same scores for each query."""
        scores = self.scores[items]
        return np.broadcast_to(scores, (len(queries), len(scores)))
