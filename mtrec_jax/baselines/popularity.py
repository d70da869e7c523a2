"""The most popular items for everyone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mtrec_jax.baselines.contract import Interactions, SameForEveryone
from mtrec_jax.types import FIRST, Lists


@dataclass(frozen=True, kw_only=True)
class Popularity:
    """Items by how often they occur in the training interactions."""

    kind: Literal["popularity"] = "popularity"

    def fit(self, train: Interactions) -> Counts:
        """Count the interactions of each item; padding and unknown are not counted.

        >>> items = np.array([2, 4, 4, 1, 0])
        >>> Popularity().fit(Interactions(items * 0, items, 0, 3)).items
        array([1, 0, 2])
        """
        _, items = train.liked
        return Counts(np.bincount(items[items >= FIRST] - FIRST, minlength=train.n_items))


@dataclass(frozen=True)
class Counts:
    """How often each catalogue item occurs."""

    items: np.ndarray  # [N] int64

    def scorer(self, users: np.ndarray, histories: Lists) -> SameForEveryone:
        """Score by count; users and histories change nothing."""
        return SameForEveryone(self.items.astype(np.float32))
