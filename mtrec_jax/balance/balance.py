"""Task balancing: weights of the tasks' losses, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtrec_jax.types import PyTree


class Balancer(NamedTuple):
    """Pure functions `init() -> state`, `weights(state) -> weights` and
    `learn(state, losses, observed) -> state`.

    Losses, weights and observed are [T]; a task without any label in the batch is not observed. A
    step's weights are known before its losses, as its batch may come in parts.
    """

    init: Callable[[], PyTree]
    weights: Callable[[PyTree], jax.Array]
    learn: Callable[[PyTree, jax.Array, jax.Array], PyTree]


def static(initial: Float[Array, " T"]) -> Balancer:
    """The declared weights, always: the baseline that balancing methods have to beat.

    >>> static(jnp.array([1.0, 2.0])).weights(()).tolist()
    [1.0, 2.0]
    """
    return Balancer(
        init=lambda: (),
        weights=lambda state: initial,
        learn=lambda state, losses, observed: state,
    )


def uncertainty(initial: Float[Array, " T"], learning_rate: float = 0.02) -> Balancer:
    """Homoscedastic uncertainty weighting (Kendall, Gal & Cipolla, CVPR 2018).

    Minimises sum_t w_t (exp(-s_t) L_t + s_t) over the log-variances s_t as well; their gradient is
    known, w_t (1 - exp(-s_t) L_t), so that they are updated here, by plain gradient descent. The
    weight of task t is w_t exp(-s_t), which tends to w_t / L_t; s_t rests while t is not observed.
    """

    def init() -> PyTree:
        return jnp.zeros_like(initial)

    def weights(log_variance: PyTree) -> jax.Array:
        return initial * jnp.exp(-log_variance)

    def learn(log_variance: PyTree, losses: jax.Array, observed: jax.Array) -> PyTree:
        moved = log_variance - learning_rate * (1 - jnp.exp(-log_variance) * losses)
        return jnp.where(observed, jnp.clip(moved, -6, 6), log_variance)

    return Balancer(init, weights, learn)
