"""Determinantal point process: the list whose items span the most, weighed by their relevance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from mtrec_jax.diversity.contract import best_left, cosines

FLAT = 1e-6  # squared distances from what is taken already, below which nothing is left of an item


@dataclass(frozen=True, kw_only=True)
class Dpp:
    """`kind = "dpp"`: takes one item after the other, each time the one that adds most to

    trade * sum of relevance + (1 - trade) * log det S,

    S being (1 + cosine) / 2 of the items of the list, so that opposites are most unlike: the greedy
    search for the most probable list of a determinantal point process, by Cholesky factors that
    grow by a row an item (Chen, Zhang and Zhou, "Fast greedy MAP inference for determinantal point
    process to improve recommendation diversity", NeurIPS 2018, algorithm 1, whose trade-off theta
    is `trade`). Unlike MMR it sees what several items together leave of another. With `trade` = 1
    lists are in the plain order.

    An item of which nothing is left, as all of it lies in the span of the list, adds log `FLAT`:
    where no other is there, lists go on by relevance.
    """

    kind: Literal["dpp"] = "dpp"
    trade: Annotated[float, Field(ge=0, le=1)] = 0.7  # what relevance weighs; 1: all

    def choose(
        self,
        relevance: Float[np.ndarray, "B C"],
        vectors: Float[np.ndarray, "B C D"],
        real: Bool[np.ndarray, "B C"],
        k: int,
    ) -> Int[np.ndarray, "B K"]:
        """As `contract.Diversifier` says; k times B x C x (D + k) products."""
        taken, found = np.zeros(real.shape, bool), np.empty((len(real), k), np.int64)
        users, left = np.arange(len(real)), np.ones(real.shape)  # squared distances
        factors = np.zeros((*real.shape, k))  # rows of the Cholesky factor
        for place in range(k):
            gain = self.trade * relevance + (1 - self.trade) * np.log(np.maximum(left, FLAT))
            found[:, place] = best = best_left(gain, real, taken)
            projected = cosines(factors, best)
            scale = np.sqrt(np.maximum(left[users, best], FLAT))[:, None]
            factors[..., place] = ((1 + cosines(vectors, best)) / 2 - projected) / scale
            left = left - factors[..., place] ** 2
        return found
