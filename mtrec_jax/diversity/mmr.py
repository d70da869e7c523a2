"""Maximal marginal relevance: the next item is worth much and unlike every item before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from mtrec_jax.diversity.contract import best_left, cosines


@dataclass(frozen=True, kw_only=True)
class Mmr:
    """`kind = "mmr"`: takes one item after the other, each time the one with the highest

    trade * relevance - (1 - trade) * the highest cosine with an item that is taken already

    (Carbonell and Goldstein, "The use of MMR, diversity-based reranking", SIGIR 1998). With
    `trade` = 1 lists are in the plain order.
    """

    kind: Literal["mmr"] = "mmr"
    trade: Annotated[float, Field(ge=0, le=1)] = 0.7  # what relevance weighs; 1: all

    def choose(
        self,
        relevance: Float[np.ndarray, "B C"],
        vectors: Float[np.ndarray, "B C D"],
        real: Bool[np.ndarray, "B C"],
        k: int,
    ) -> Int[np.ndarray, "B K"]:
        """As `contract.Diversifier` says; k times B x C x D products."""
        taken, found = np.zeros(real.shape, bool), np.empty((len(real), k), np.int64)
        gain, nearest = self.trade * relevance, np.full(real.shape, -np.inf)
        for place in range(k):
            found[:, place] = best_left(gain, real, taken)
            nearest = np.maximum(nearest, cosines(vectors, found[:, place]))
            gain = self.trade * relevance - (1 - self.trade) * nearest
        return found
