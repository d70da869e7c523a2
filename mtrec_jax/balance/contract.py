"""What a balancing method is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtrec_jax.types import PyTree


class Gradients(NamedTuple):
    """The gradient of a weighted sum of the tasks' losses.

    `shared` is the gradient at the shared representation, a pytree of arrays: what the encoders
    hand to the towers and to the retrieval loss (`types.Shared`). `heads` is that of the dense
    parameters behind it. Both are linear in the weights; nothing has gone through the encoders yet.
    """

    losses: jax.Array  # [T] unweighted
    heads: PyTree
    shared: PyTree


Pullback = Callable[[jax.Array], Gradients]  # weights [T] -> gradients: one backward pass


class Balancer(NamedTuple):
    """Pure functions `init() -> state` and
    `combine(pullback, observed, state, key) -> (gradients, state)`.

    `observed` [T] is false for a task without any label in the batch, whose loss is 0. `key` is of
    the step. A method that calls `pullback` once, with weights that do not depend on its losses,
    can be used for a batch in parts (`train.accumulate`): `in_parts`.
    """

    init: Callable[[], PyTree]
    combine: Callable[[Pullback, jax.Array, PyTree, jax.Array], tuple[Gradients, PyTree]]
    in_parts: bool = False


def each_alone(pullback: Pullback, weights: jax.Array) -> list[Gradients]:
    """The gradients of each task by itself, with its weight: T backward passes."""
    return [pullback(jnp.where(jnp.arange(len(weights)) == t, w, 0)) for t, w in enumerate(weights)]


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product of two pytrees of arrays, in float32 or better."""
    parts = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))
