"""More weight for the tasks whose losses have lately fallen least.

Liu, Johns & Davison 2019, "End-to-End Multi-Task Learning with Attention", CVPR, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import Field

from mtrec_jax.balance.contract import Balancer, Gradients, Pullback
from mtrec_jax.types import PyTree


class State(NamedTuple):
    """What dynamic weight average keeps between steps."""

    total: Float[Array, " T"]  # of the losses in this window
    observed: Float[Array, " T"]  # steps of it in which the task was observed
    mean: Float[Array, " T"]  # of the last window with observations; 0: none yet
    ratio: Float[Array, " T"]  # that mean over the one before it; 1 until there are two
    step: Int[Array, ""]  # of this window


@dataclass(frozen=True, kw_only=True)
class DWA:
    """`[train.balance] kind = "dwa"`: dynamic weight average.

    The weight of task t is its declared one times K exp(r_t / temperature) / sum of the exp(r_i /
    temperature) over the K tasks that are not switched off, where r_t is its mean loss in the last
    window of steps over that in the window before, and 1 in the first two. In the paper a window is
    an epoch. A task that was not observed in a window keeps its ratio.
    """

    kind: Literal["dwa"] = "dwa"
    window: Annotated[int, Field(ge=1)] = 200  # steps over which losses are averaged
    temperature: Annotated[float, Field(gt=0)] = 2.0  # larger: weights more alike

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: State, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            found = pullback(initial * factors(state.ratio, initial > 0, self.temperature))
            total = state.total + jnp.where(observed, found.losses, 0)
            count = state.observed + observed
            mean = jnp.where(count > 0, total / jnp.maximum(count, 1), state.mean)
            known = (state.mean > 0) & (count > 0)
            ratio = jnp.where(known, mean / jnp.where(known, state.mean, 1), state.ratio)
            nothing = jnp.zeros_like(total)
            full = State(nothing, nothing, mean, ratio, jnp.zeros_like(state.step))
            more = State(total, count, state.mean, state.ratio, state.step + 1)
            ends = more.step == self.window
            return found, jax.tree.map(lambda a, b: jnp.where(ends, a, b), full, more)

        def init(params: PyTree) -> State:
            zeros = jnp.zeros_like(initial)
            return State(zeros, zeros, zeros, jnp.ones_like(initial), jnp.zeros((), jnp.int32))

        return Balancer(init, combine, in_parts=True)


def factors(ratio: Float[Array, " T"], active: jax.Array, temperature: float) -> Float[Array, " T"]:
    """K exp(ratio / temperature), divided by their sum, of the K active tasks; 0 for others.

    >>> factors(jnp.array([1.0, 1.0, 5.0]), jnp.array([True, True, False]), 2.0).tolist()
    [1.0, 1.0, 0.0]
    """
    return jnp.sum(active) * jax.nn.softmax(ratio / temperature, where=active)
