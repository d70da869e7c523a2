"""Items in no order at all, another one for each user: what every list has to beat."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float32, Int
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions
from mtrec_jax.types import Lists


@dataclass(frozen=True, kw_only=True)
class Random:
    """`kind = "random"`: scores that are drawn for each user, the same in each evaluation."""

    kind: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0)] = 0

    def fit(self, interactions: Interactions) -> Drawn:
        """Nothing is learned."""
        return Drawn(interactions.n_items, self.seed)


@dataclass(frozen=True)
class Drawn:
    """Scores between 0 and 1.

    >>> found = Drawn(items=3, seed=0).scorer(np.array([2, 3, 2]), None).scores(np.arange(3))
    >>> bool((found[0] == found[1]).any()), bool((found[0] == found[2]).all())
    (False, True)
    """

    items: int
    seed: int
    users: np.ndarray | None = None  # [Q] ids of the queries

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists | None) -> Drawn:
        """The same of some queries: a user has one order, and whoever is not known that of 1."""
        return replace(self, users=users)

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Those of each query's user."""
        assert self.users is not None
        drawn = [np.random.default_rng([self.seed, int(self.users[q])]) for q in queries]
        found = [generator.random(self.items) for generator in drawn]
        return np.array(found, np.float32).reshape(len(queries), self.items)
