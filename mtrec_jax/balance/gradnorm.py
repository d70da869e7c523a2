"""Weights under which all tasks train at similar rates.

Chen et al. 2018, "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
Networks", ICML.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from pydantic import Field

from mtrec_jax.balance.contract import At, Balancer, Gradients, Pullback, dot, each_alone
from mtrec_jax.types import PyTree


class State(NamedTuple):
    """What GradNorm keeps between steps."""

    weights: Float[Array, " T"]
    first: Float[Array, " T"]  # each task's first loss; 0: not observed yet


@dataclass(frozen=True, kw_only=True)
class GradNorm:
    """`[train.balance] kind = "gradnorm"`.

    With G_t = |w_t dL_t| the norm of a task's weighted gradient, and r_t = (L_t / L_t(0)) / mean of
    these its relative inverse training rate, the weights descend along sum_t |G_t - mean(G) r_t^a|,
    whose targets mean(G) r_t^a are constants, one a task. Afterwards they are scaled to the sum of
    the declared ones. Tasks that are not observed rest, and have no part in the means. The paper
    takes the norms at the last shared layer: at the shared representation a step takes a backward
    pass through the towers for each task; `at = "parameters"` takes them at all shared ones.
    """

    kind: Literal["gradnorm"] = "gradnorm"
    alpha: Annotated[float, Field(ge=0)] = 1.5  # a: how strongly slow tasks are pulled along
    learning_rate: Annotated[float, Field(gt=0)] = 0.025  # of the weights
    at: At = "representation"

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights, which are where it starts."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: State, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            observed &= initial > 0  # a task that is switched off has no part in the means
            alone, found = each_alone(pullback, state.weights), pullback(state.weights)
            losses = found.losses
            norms = jnp.stack([jnp.sqrt(dot(part.shared, part.shared)) for part in alone])
            first = jnp.where((state.first == 0) & observed, losses, state.first)
            slope = weight_gradient(state.weights, norms, losses, first, observed, self.alpha)
            moved = jnp.maximum(state.weights - self.learning_rate * slope, 1e-3)
            rest = jnp.sum(jnp.where(observed, 0, state.weights))  # of tasks that keep theirs
            scale = (jnp.sum(initial) - rest) / jnp.sum(jnp.where(observed, moved, 1e-30))
            weights = jnp.where(observed, moved * scale, state.weights)
            return found, State(weights, first)

        def init(params: PyTree) -> State:
            return State(initial * 1, jnp.zeros_like(initial))

        return Balancer(init, combine, at=self.at)


def weight_gradient(
    weights: Float[Array, " T"],
    norms: Float[Array, " T"],
    losses: Float[Array, " T"],
    first: Float[Array, " T"],
    observed: Bool[Array, " T"],
    alpha: float,
) -> Float[Array, " T"]:
    """Gradient of sum_t |G_t - target_t| with respect to the weights; 0 where not observed.

    Args:
      weights: w.
      norms: G_t = w_t |dL_t|.
      losses, first: L_t now and at first.
      observed: which tasks count.
      alpha: exponent of the relative inverse training rates.
    """
    count = jnp.maximum(jnp.sum(observed), 1)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(observed, values, 0)) / count

    ratio = losses / jnp.where(first > 0, first, 1)
    rate = ratio / jnp.maximum(mean(ratio), 1e-30)
    target = mean(norms) * rate**alpha
    per_weight = norms / jnp.maximum(weights, 1e-30)
    return jnp.where(observed, jnp.sign(norms - target) * per_weight, 0)
