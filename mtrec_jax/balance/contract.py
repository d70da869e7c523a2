"""What a balancing method is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtrec_jax.types import PyTree

At = Literal["representation", "parameters"]  # where the gradients of tasks are compared


class Gradients(NamedTuple):
    """The gradient of a weighted sum of the tasks' losses, linear in the weights.

    With `Balancer.at = "representation"`, `shared` is the gradient at the shared representation, a
    pytree of arrays: what the encoders hand to the towers and to the retrieval loss
    (`types.Shared`), and `heads` that of the dense parameters behind it; nothing has gone through
    the encoders yet. With `"parameters"`, `shared` is that of the dense parameters that several
    losses depend on, in the structure of all of them with zeros for the others, `heads` that of the
    others, and `carried` that of the looked-up rows: it takes the shares of `shared`, but is
    compared with nothing.
    """

    losses: jax.Array  # [T] unweighted
    heads: PyTree
    shared: PyTree
    carried: PyTree = ()


# Of the losses [T]. Those in a NumPy array are known when the program is made: where they are 0,
# nothing is computed that belongs to that task alone.
Weights = jax.Array | np.ndarray
Pullback = Callable[[Weights], Gradients]  # one backward pass


class Balancer(NamedTuple):
    """Pure functions `init(params) -> state` and
    `combine(pullback, observed, state, key) -> (gradients, state)`.

    `params` are the dense parameters, for states of their shapes. `observed` [T] is false for a
    task without any label in the batch, whose loss is 0. `key` is of the step. A method that calls
    `pullback` once, with weights that do not depend on its losses, and gives what that gives, can
    be used for a batch in parts (`train.accumulate`): `in_parts`. `at` says where
    `Gradients.shared` is taken.
    """

    init: Callable[[PyTree], PyTree]
    combine: Callable[[Pullback, jax.Array, PyTree, jax.Array], tuple[Gradients, PyTree]]
    in_parts: bool = False
    at: At = "representation"


def beside(balancer: Balancer, extra: int) -> Balancer:
    """The balancer of T tasks, for T losses and `extra` more behind them that are of no task: these
    are not balanced, and weigh 1 in every step.

    They ride in the one pass of a method that can be used in parts, and else have one of their own.
    """
    if not extra:
        return balancer

    def combine(
        pullback: Pullback, observed: jax.Array, state: PyTree, key: jax.Array
    ) -> tuple[Gradients, PyTree]:
        def riding(weights: Weights) -> Gradients:
            found = pullback(jnp.append(weights, jnp.ones(extra, weights.dtype)))
            heads = found.heads, found.losses[-extra:]
            return found._replace(losses=found.losses[:-extra], heads=heads)

        def of_tasks(weights: Weights) -> Gradients:
            whole = np if isinstance(weights, np.ndarray) else jnp
            found = pullback(whole.append(weights, whole.zeros(extra, weights.dtype)))
            return found._replace(losses=found.losses[:-extra])

        given = observed[:-extra], state, key
        if balancer.in_parts:
            found, state = balancer.combine(riding, *given)
            heads, losses = found.heads
            return found._replace(losses=jnp.append(found.losses, losses), heads=heads), state
        found, state = balancer.combine(of_tasks, *given)
        own = pullback(np.append(np.zeros(len(observed) - extra), np.ones(extra)))
        total = jax.tree.map(jnp.add, tuple(found)[1:], tuple(own)[1:])
        return Gradients(own.losses, *total), state

    return balancer._replace(combine=combine)


def losses_of(pullback: Pullback, like: jax.Array) -> jax.Array:
    """The losses [T] before the weights are known; nothing of this pass but they is computed."""
    return pullback(jnp.zeros_like(like)).losses


def each_alone(pullback: Pullback, weights: jax.Array) -> list[Gradients]:
    """The gradients of each task by itself, with its weight: T backward passes."""
    alone = [pullback(one) for one in np.eye(len(weights))]

    def weighted(part: Gradients, weight: jax.Array) -> Gradients:
        def times(gradient: jax.Array) -> jax.Array:
            return gradient * weight.astype(gradient.dtype)

        return Gradients(part.losses, *jax.tree.map(times, tuple(part)[1:]))

    return list(map(weighted, alone, weights))


def with_shares(
    pullback: Pullback, weights: jax.Array, alone: list[Gradients], shares: jax.Array
) -> Gradients:
    """`weights` [T] for the heads, and `shares` [T] of the tasks' own gradients for the rest.

    The heads come from a pass of their own, so that those of `alone`, the larger part of its work,
    are not computed.
    """
    shared, carried = (
        jax.tree.map(
            lambda *parts: sum(share * part for share, part in zip(shares, parts, strict=True)),
            *(getattr(part, name) for part in alone),
        )
        for name in ("shared", "carried")
    )
    found = pullback(weights)
    return Gradients(found.losses, found.heads, shared, carried)


def gram_of(alone: list[Gradients]) -> jax.Array:
    """Inner products [T, T] of the tasks' gradients."""
    shared = [part.shared for part in alone]
    found = [[dot(a, b) for b in shared[: i + 1]] for i, a in enumerate(shared)]
    tasks = range(len(shared))
    return jnp.stack([jnp.stack([found[max(i, j)][min(i, j)] for j in tasks]) for i in tasks])


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product of two pytrees of arrays, in float32 or better."""
    parts = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(parts), jnp.zeros(()))
