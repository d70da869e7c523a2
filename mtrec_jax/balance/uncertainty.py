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

_BOUND = 10.0  # of the log-variances


@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """`[train.balance] kind = "uncertainty"`: each task's log-variance s_t minimises
    exp(-s_t) L_t + s_t, and the network sum_t w_t exp(-s_t) L_t.

    The log-variances are learned by plain gradient descent: their gradient is known, it is
    1 - exp(-s_t) L_t. So the weight of task t is w_t exp(-s_t), which tends to w_t / L_t. The
    declared weight w_t is a factor of it alone: how noisy a task is does not depend on how much it
    matters, and all variances are learned at one speed. The paper's objectives, exp(-s) L / 2 +
    s / 2 of a regression and exp(-s) L + s / 2 of a classification, both tend to half of these
    weights. s_t rests while t is not observed, and stays between -10 and 10: of a loss beyond
    5e-5 and 2e4 the weight is that of the bound, so that one batch cannot silence a task for long.
    """

    kind: Literal["uncertainty"] = "uncertainty"
    learning_rate: Annotated[float, Field(gt=0)] = 0.02  # of the log-variances

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: PyTree, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            found = pullback(initial * jnp.exp(-state))
            gradient = 1 - jnp.exp(-state) * found.losses
            moved = jnp.clip(state - self.learning_rate * gradient, -_BOUND, _BOUND)
            return found, jnp.where(observed, moved, state)

        return Balancer(lambda params: jnp.zeros_like(initial), combine, in_parts=True)
