"""Gradients of tasks that point against each other lose the part that does.

Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", NeurIPS, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
class PCGrad:
    """`[train.balance] kind = "pcgrad"`.

    For each task i, and the other tasks j in random order: where g_i . g_j < 0, g_i loses its
    projection on g_j, (g_i . g_j / |g_j|^2) g_j, with g_j as it was at first. The sum of all is
    what the shared part learns. The paper takes the gradients at the shared parameters
    (`at = "parameters"`); at the shared representation a step takes a backward pass through the
    towers for each task, and one through the encoders.
    """

    kind: Literal["pcgrad"] = "pcgrad"
    at: At = "representation"

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: PyTree, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            alone = each_alone(pullback, initial)
            return with_shares(pullback, initial, alone, projected(gram_of(alone), key)), state

        return Balancer(lambda params: (), combine, at=self.at)


def projected(gram: Float[Array, "T T"], key: jax.Array) -> Float[Array, " T"]:
    """How often each task's own gradient is in the sum of the projected ones.

    Every projected gradient stays a combination of the tasks' own, so that inner products are all
    that is needed.

    Args:
      gram: inner products of the tasks' gradients.
      key: of the random orders.

    >>> gram = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # (1, 0) and (-1, sqrt 3)
    >>> projected(gram, jax.random.key(0)).tolist()
    [2.0, 1.25]
    """
    tasks = len(gram)

    def of_task(task: jax.Array, key: jax.Array) -> jax.Array:
        start = jnp.where(jnp.arange(tasks) == task, 1.0, 0.0).astype(gram.dtype)

        def against(own: jax.Array, other: jax.Array) -> tuple[jax.Array, None]:
            inner = jnp.minimum(own @ gram[other], 0)
            inner = jnp.where(other == task, 0, inner)
            share = inner / jnp.maximum(gram[other, other], 1e-30)
            return own.at[other].add(-share), None

        return jax.lax.scan(against, start, jax.random.permutation(key, tasks))[0]

    found = jax.vmap(of_task)(jnp.arange(tasks), jax.random.split(key, tasks))
    return jnp.sum(found, axis=0)
