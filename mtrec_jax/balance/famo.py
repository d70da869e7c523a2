"""Weights under which all losses fall at similar rates, at the cost of one backward pass.

Liu et al. 2023, "FAMO: Fast Adaptive Multitask Optimization", NeurIPS, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field

from mtrec_jax.balance.contract import Balancer, Gradients, Pullback, losses_of
from mtrec_jax.types import PyTree

_LEAST = 1e-8  # of a loss, before its logarithm is taken


class State(NamedTuple):
    """What FAMO keeps between steps."""

    logits: Float[Array, " T"]  # xi
    logs: Float[Array, " T"]  # of each task's loss when it was last observed
    seen: Bool[Array, " T"]  # whether it was
    first: Float[Array, " T"]  # moments of Adam
    second: Float[Array, " T"]
    steps: Int[Array, ""]  # that the logits have made


@dataclass(frozen=True, kw_only=True)
class FAMO:
    """`[train.balance] kind = "famo"`.

    With z the softmax of learned logits, times the declared weights, the weight of task t is
    c z_t / L_t, where c makes the sum of all that of the declared ones (1 in the paper). The logits
    descend along J' (log L - log L+) + decay * logits, with J the Jacobian of z: a loss that has
    fallen more than the others loses weight. As in the authors' code, Adam makes the step.

    What differs: L+ is the loss after the step. The paper's is of the same batch, for one more
    forward pass; here it is that of the next step's batch, which is there anyway. Their differences
    from batch to batch cancel from one step to the next, as each loss is the later one of a step
    and the earlier one of the next. Tasks that are not observed rest.
    """

    kind: Literal["famo"] = "famo"
    learning_rate: Annotated[float, Field(gt=0)] = 0.025  # of the logits
    decay: Annotated[float, Field(ge=0)] = 0.001  # gamma: back to the declared weights

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: State, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            observed &= initial > 0
            losses = losses_of(pullback, initial)
            logs = jnp.log(jnp.maximum(losses, _LEAST))
            compared = observed & state.seen
            slope = logit_gradient(initial, state.logits, state.logs - logs, compared)
            moved = self._moved(state, slope + self.decay * state.logits, compared)
            seen = state.seen | observed
            state = moved._replace(logs=jnp.where(observed, logs, state.logs), seen=seen)
            return pullback(task_weights(initial, state.logits, logs, observed)), state

        def init(params: PyTree) -> State:
            z = [jnp.zeros_like(initial) for _ in range(4)]
            never = jnp.zeros(initial.shape, bool)
            return State(z[0], z[1], never, z[2], z[3], jnp.zeros((), jnp.int32))

        return Balancer(init, combine)

    def _moved(self, state: State, gradient: jax.Array, which: jax.Array) -> State:
        """A step of Adam (Kingma & Ba 2015) of the logits of some tasks."""
        steps = state.steps + jnp.any(which)
        first = jnp.where(which, 0.9 * state.first + 0.1 * gradient, state.first)
        second = jnp.where(which, 0.999 * state.second + 0.001 * gradient**2, state.second)
        t = jnp.maximum(steps, 1).astype(gradient.dtype)
        step = first / (1 - 0.9**t) / (jnp.sqrt(second / (1 - 0.999**t)) + 1e-8)
        logits = jnp.where(which, state.logits - self.learning_rate * step, state.logits)
        return state._replace(logits=logits, first=first, second=second, steps=steps)


def shares(
    declared: Float[Array, " T"], logits: Float[Array, " T"], which: Bool[Array, " T"]
) -> Float[Array, " T"]:
    """z: the softmax of the logits times the declared weights, over some tasks; 0 for others.

    >>> shares(jnp.array([1.0, 1.0]), jnp.zeros(2), jnp.array([True, True])).tolist()
    [0.5, 0.5]
    """
    return jax.nn.softmax(logits + jnp.log(jnp.maximum(declared, 1e-30)), where=which)


def logit_gradient(
    declared: Float[Array, " T"],
    logits: Float[Array, " T"],
    fallen: Float[Array, " T"],
    which: Bool[Array, " T"],
) -> Float[Array, " T"]:
    """J' d with J the Jacobian of z and d = log L - log L+: z_t (d_t - sum_i z_i d_i)."""
    z = shares(declared, logits, which)
    fallen = jnp.where(which, fallen, 0)
    return z * (fallen - jnp.sum(z * fallen))


def task_weights(
    declared: Float[Array, " T"],
    logits: Float[Array, " T"],
    logs: Float[Array, " T"],
    which: Bool[Array, " T"],
) -> Float[Array, " T"]:
    """c z_t / L_t, with a sum of the declared weights; 0 for tasks that are not observed."""
    per_loss = shares(declared, logits, which) * jnp.exp(-logs)
    total = jnp.sum(jnp.where(which, declared, 0))
    return per_loss * total / jnp.maximum(jnp.sum(per_loss), 1e-30)
