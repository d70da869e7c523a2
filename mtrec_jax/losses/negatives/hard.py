"""Negatives that are drawn again by their scores, so that most of them are hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.losses.negatives.contract import Drawn, Pool, State, uniform
from mtrec_jax.losses.retrieval.contract import Compared

POSITIONS = 256  # whose scores say what is hard
EASY = 0.1  # of the draws regard no score, so that no item's share is too small to correct for

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Hard:
    """`[train.negatives] kind = "hard"`: of a uniform `pool`, `count` are drawn again by the
    probability that the batch's users give them, which their logQ contains (importance resampling,
    Chen et al., NeurIPS 2022)."""

    kind: Literal["hard"] = "hard"
    count: Count = 512
    pool: Count = 4096
    power = 0.0

    def size(self, trained: int) -> int:
        """The pool, whose vectors are all needed."""
        return self.pool

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """The pool, with replacement."""
        return uniform(pool, self.pool, key), state

    def kept(self, compared: Compared, key: jax.Array) -> Compared:
        """`count` of the pool, with replacement."""
        share = jax.lax.stop_gradient(self._shares(compared, key))
        cumulative = jnp.cumsum(share)
        levels = jax.random.uniform(jax.random.fold_in(key, 1), (self.count,), share.dtype)
        place = jnp.searchsorted(cumulative, levels * cumulative[-1], side="right")
        place = jnp.minimum(place, len(share) - 1)
        expected = compared.log_expected[place] + jnp.log(share[place] * self.count)
        return compared._replace(
            negatives=compared.negatives[place],
            negative_ids=compared.negative_ids[place],
            log_expected=expected,
        )

    def _shares(self, compared: Compared, key: jax.Array) -> jax.Array:
        """The probability of each of the pool [m]: the mean over some positions."""
        users = compared.users.reshape(-1, compared.users.shape[-1])
        weights = compared.weights.reshape(-1)
        some = jax.random.randint(key, (POSITIONS,), 0, len(users))
        logits = users[some] @ compared.negatives.T * compared.scale - compared.log_expected[None]
        heard = (weights[some] > 0).astype(logits.dtype)
        mean = heard @ jax.nn.softmax(logits, axis=-1) / jnp.maximum(jnp.sum(heard), 1)
        even = 1 / logits.shape[-1]
        return (1 - EASY) * jnp.where(jnp.sum(heard) > 0, mean, even) + EASY * even
