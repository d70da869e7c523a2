"""The direction near the mean gradient under which the worst task still gains most.

Liu et al. 2021, "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from pydantic import Field

from mtrec_jax.balance.contract import (
    At,
    Balancer,
    Gradients,
    Pullback,
    each_alone,
    gram_of,
    with_shares,
)
from mtrec_jax.types import PyTree


@dataclass(frozen=True, kw_only=True)
class CAGrad:
    """`[train.balance] kind = "cagrad"`.

    Of all d with |d - g_0| <= c |g_0| the one whose smallest g_t . d is largest: with the weights w
    on the simplex that minimise g_w . g_0 + c |g_0| |g_w|, g_w = sum_t w_t g_t, it is
    d = g_0 + c |g_0| g_w / |g_w|. Here g_0 is the sum of the weighted gradients instead of their
    mean, so that c = 0 is the static weighting: d is T times the paper's, and not scaled down by
    1 + c^2 as in its authors' code. Tasks that are not observed have no part. The paper takes the
    gradients at the shared parameters (`at = "parameters"`).
    """

    kind: Literal["cagrad"] = "cagrad"
    c: Annotated[float, Field(ge=0, lt=1)] = 0.4  # how far from the mean gradient
    at: At = "representation"

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: PyTree, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            alone = each_alone(pullback, initial)
            gram = gram_of(alone)
            radius = self.c * jnp.sqrt(jnp.maximum(jnp.sum(gram), 0))
            w = worst_weights(gram, radius, observed & (initial > 0))
            # Where the tasks cannot all gain, g_w is nothing but rounding: it is left short.
            square = jnp.maximum(w @ gram @ w, 1e-6 * jnp.trace(gram))
            shares = 1 + radius * w * jax.lax.rsqrt(jnp.maximum(square, 1e-30))
            return with_shares(pullback, initial, alone, shares), state

        return Balancer(lambda params: (), combine, at=self.at)


def worst_weights(
    gram: Float[Array, "T T"], radius: Float[Array, ""], active: Bool[Array, " T"]
) -> Float[Array, " T"]:
    """The w on the simplex of active tasks that minimise w . G 1 + radius sqrt(w . G w).

    Weight moves from one task to another, as much as is best, which has a closed form; the two are
    those with the largest gain to second order. Five moves a task: one is exact for two tasks, and
    for up to four the objective is within 1e-6 of |g_0|^2 of the least one. With more tasks than
    dimensions of the gradients it may end a few percent above it.

    Args:
      gram: G, inner products of the tasks' gradients.
      radius: c |g_0|.
      active: tasks that may have weight; if none is, all weights are 0.

    >>> gram, radius = jnp.array([[1.0, 0.0], [0.0, 4.0]]), jnp.array(0.5 * 5**0.5)  # c = 1/2
    >>> worst_weights(gram, radius, jnp.array([True, True])).round(3).tolist()
    [1.0, 0.0]
    """
    tasks, tiny = len(gram), 1e-30
    towards = jnp.sum(gram, axis=1)  # g_t . g_0
    diagonal = jnp.diagonal(gram)

    def move(_: jax.Array, w: jax.Array) -> jax.Array:
        inner = gram @ w  # g_t . g_w
        square = jnp.maximum(w @ inner, 0)
        slope = towards + radius * inner * jax.lax.rsqrt(jnp.maximum(square, tiny))
        i = jnp.argmin(jnp.where(active, slope, jnp.inf))
        rise = jnp.where(w > 0, slope - slope[i], 0)
        apart = jnp.maximum(gram[i, i] + diagonal - 2 * gram[i], 0)  # |g_i - g_j|^2
        j = jnp.argmax(jnp.where(rise > 0, rise**2 / jnp.maximum(apart, tiny), 0))
        # Along w + x (e_i - e_j) the objective is a x + radius sqrt(square + 2 b x + apart x^2).
        a, b, c = towards[i] - towards[j], inner[i] - inner[j], apart[j]
        bend = radius**2 * c - a**2
        rest = jnp.maximum(square * c - b**2, 0) / jnp.where(bend > 0, bend, 1)
        least = (-a * jnp.sqrt(rest) - b) / jnp.maximum(c, tiny)
        x = jnp.where(bend > 0, least, jnp.where(a < 0, jnp.inf, -jnp.inf))
        x = jnp.where((rise[j] > 0) & (c > tiny), jnp.clip(x, -w[i], w[j]), 0)
        return w.at[i].add(x).at[j].add(-x)

    start = active / jnp.maximum(jnp.sum(active), 1).astype(gram.dtype)
    return jax.lax.fori_loop(0, 1 if tasks == 2 else 5 * tasks, move, start) if tasks > 1 else start
