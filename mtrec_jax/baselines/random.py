"""Items in no order at all, another one for each query: what every list has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float32, Int
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions
from mtrec_jax.types import Lists


@dataclass(frozen=True, kw_only=True)
class Random:
    """`kind = "random"`: scores that are drawn anew for each query, the same in each evaluation."""

    kind: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0)] = 0

    def fit(self, interactions: Interactions) -> Drawn:
        """Nothing is learned."""
        return Drawn(interactions.n_items, self.seed)


@dataclass(frozen=True)
class Drawn:
    """Scores between 0 and 1.

    >>> found = Drawn(items=3, seed=0).scores(np.array([0, 1]))
    >>> found.shape, bool((found[0] == found[1]).any())
    ((2, 3), False)
    """

    items: int
    seed: int

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Drawn:
        """Itself: neither users nor histories change anything."""
        return self

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Those of each query's number."""
        drawn = [np.random.default_rng([self.seed, q]).random(self.items) for q in queries]
        return np.array(drawn, np.float32).reshape(len(queries), self.items)
