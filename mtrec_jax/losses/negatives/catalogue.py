"""Negatives from the whole catalogue of trained items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.losses.negatives.contract import Drawn, Pool, State, popular, uniform
from mtrec_jax.types import FIRST

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """`[train.negatives] kind = "uniform"`: every trained item is as probable as the others."""

    kind: Literal["uniform"] = "uniform"
    count: Count = 512
    power = 0.0

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """With replacement."""
        return uniform(pool, self.count, key), state


@dataclass(frozen=True, kw_only=True)
class Popular:
    """`[train.negatives] kind = "popular"`: in proportion to the `power` of how often
    an item is what the retrieval is to find in training."""

    kind: Literal["popular"] = "popular"
    count: Count = 512
    power: float = 0.75

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """With replacement."""
        return popular(pool, self.count, key), state


@dataclass(frozen=True, kw_only=True)
class AllItems:
    """`[train.negatives] kind = "all"`: each trained item once, so that the softmax is the full
    one. Its logits are made block by block and forgotten; memory grows with N as the table does."""

    kind: Literal["all"] = "all"
    power = 0.0

    def size(self, trained: int) -> int:
        """All of them."""
        return trained

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """Without chance."""
        ids = jnp.arange(FIRST, FIRST + pool.trained, dtype=jnp.int32)
        dtype = jnp.asarray(pool.catalogue.log_probability).dtype
        return Drawn(ids, jnp.zeros(pool.trained, dtype)), state
