"""Weights that follow each task's own noise.

Kendall, Gal & Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from mtrec_jax.balance.contract import Balancer, Gradients, Pullback
from mtrec_jax.types import PyTree


@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """`[train.balance] kind = "uncertainty"`: minimises sum_t w_t (exp(-s_t) L_t + s_t).

    The log-variances s_t are learned by plain gradient descent: their gradient is known, it is
    w_t (1 - exp(-s_t) L_t). The weight of task t is w_t exp(-s_t), which tends to w_t / L_t. s_t
    rests while t is not observed.
    """

    kind: Literal["uncertainty"] = "uncertainty"
    learning_rate: Annotated[float, Field(gt=0)] = 0.02  # of the log-variances

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: PyTree, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            found = pullback(initial * jnp.exp(-state))
            gradient = initial * (1 - jnp.exp(-state) * found.losses)
            moved = jnp.clip(state - self.learning_rate * gradient, -6, 6)
            return found, jnp.where(observed, moved, state)

        return Balancer(init=lambda: jnp.zeros_like(initial), combine=combine, in_parts=True)
