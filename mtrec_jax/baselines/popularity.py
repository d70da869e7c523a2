"""The most popular items for everyone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float32, Int
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, Lists

DAY = 86_400  # seconds


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """`kind = "popularity"`: how often each item is liked in the training split.

    With `days`, in the last so many days before the last event of that split: what is popular
    changes, and is a harder rival where a split is in time (Ji et al., "A re-visit of the
    popularity baseline in recommender systems", SIGIR 2020).
    """

    kind: Literal["popularity"] = "popularity"
    days: Annotated[float, Field(ge=0)] = 0.0  # 0: all of the training split

    def fit(self, interactions: Interactions) -> Counts:
        """Count; padding and unknown items are left out.

        Raises:
          DataError: an id is beyond the catalogue, or `days` is asked of data without a time.
        """
        check_ids(self.kind, interactions)
        counted = interactions.liked
        if self.days:
            if interactions.times is None:
                raise DataError(
                    f"popularity: days = {self.days:g} needs the times of the interactions, and "
                    "there are none; declare data.time and prepare anew, or take days = 0"
                )
            times = interactions.times.astype(np.float64)
            counted = counted & (times > times.max(initial=-np.inf) - self.days * DAY)
        items = interactions.items[counted]
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
