"""The most popular items for everyone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int

from mtrec_jax.data.dataset import Lists
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST


@dataclass(frozen=True)
class Popularity:
    """How often each catalogue item occurs in the training interactions."""

    counts: np.ndarray  # [N] int64


@dataclass(frozen=True)
class SameForEveryone:
    """A scorer without personalization."""

    scores: np.ndarray  # [N] float32

    def block(self, queries: Int[np.ndarray, " q"], items: slice) -> Float32[np.ndarray, "q n"]:
        """The same scores for each query."""
        scores = self.scores[items]
        return np.broadcast_to(scores, (len(queries), len(scores)))


def fit(items: Int[np.ndarray, " n"], n_items: int) -> Popularity:
    """Count the training interactions of each item.

    Args:
      items: item ids of the interactions; padding and unknown are not counted.
      n_items: N, the size of the catalogue.

    Raises:
      DataError: an id is beyond `n_items`.

    >>> fit(np.array([2, 4, 4, 1, 0]), n_items=3).counts
    array([1, 0, 2])
    """
    index = items[items >= FIRST] - FIRST
    if len(index) and index.max() >= n_items:
        raise DataError(
            f"popularity: item id {index.max() + FIRST} is beyond n_items = {n_items}; pass it as "
            "in the manifest"
        )
    return Popularity(np.bincount(index, minlength=n_items))


def scorer(model: Popularity, histories: Lists | None = None) -> SameForEveryone:
    """Score by count; histories change nothing.

    >>> scorer(Popularity(np.array([1, 0, 2]))).block(np.array([0]), slice(1, 3))
    array([[0., 2.]], dtype=float32)
    """
    return SameForEveryone(model.counts.astype(np.float32))
