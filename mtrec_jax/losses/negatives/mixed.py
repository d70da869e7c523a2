"""Negatives of the batch together with items that hardly anybody takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.losses.negatives.batch import first_gaps, log_frequency, with_gaps
from mtrec_jax.losses.negatives.contract import Drawn, Pool, State, from_batch, uniform

Count = Annotated[int, Field(ge=2)]


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """`[train.negatives] kind = "mixed"`: one part from the batch, the rest uniform (Yang et al.,
    WWW 2020). Either part may draw any item, and its expected number is the sum over both."""

    kind: Literal["mixed"] = "mixed"
    count: Count = 512
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the batch
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of the moving averages of the gaps
    power = 1.0

    def start(self, items: int) -> State:
        """No gap was seen yet."""
        return first_gaps(items)

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """Both parts with replacement."""
        one, other = jax.random.split(key)
        count = min(self.count - 1, max(1, round(self.share * self.count)))
        taken = from_batch(pool, count, one)
        state = with_gaps(state, pool, self.rate)
        rest = uniform(pool, self.count - count, other)
        ids = jnp.concatenate([taken, rest.ids])
        of_batch = log_frequency(state, pool, ids) + jnp.log(float(count))
        expected = jnp.logaddexp(of_batch, jnp.full(len(ids), rest.log_expected[0]))
        return Drawn(ids, jnp.where(ids > 0, expected, jnp.inf)), state
