"""The most popular items for everyone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int

from mtrec_jax.baselines.contract import Interactions, check_ids
from mtrec_jax.types import FIRST, Lists


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """`kind = "popularity"`: how often each item is liked in the training split."""

    kind: Literal["popularity"] = "popularity"

    def fit(self, interactions: Interactions) -> Counts:
        """Count; padding and unknown items are left out.

        Raises:
          DataError: an id is beyond the catalogue.
        """
        check_ids(self.kind, interactions)
        items = interactions.items[interactions.liked]
        return Counts(np.bincount(items, minlength=interactions.n_items + FIRST)[FIRST:])


@dataclass(frozen=True)
class Counts:
    """One score an item, the same for each query.

    >>> Counts(np.array([1, 0, 2])).scores(np.array([0, 1]))
    array([[1., 0., 2.],
           [1., 0., 2.]], dtype=float32)
    """

    counts: np.ndarray  # [N] by catalogue index

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Counts:
        """Itself: neither users nor histories change anything."""
        return self

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """The counts, a row a query."""
        return np.broadcast_to(self.counts.astype(np.float32), (len(queries), len(self.counts)))
