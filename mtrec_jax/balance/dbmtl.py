"""Losses of one scale by their logarithm, gradients of one length by the longest.

Lin et al. 2023, "Dual-Balancing for Multi-Task Learning" (DB-MTL), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from mtrec_jax.balance.contract import (
    At,
    Balancer,
    Gradients,
    Pullback,
    dot,
    each_alone,
    losses_of,
    with_shares,
)
from mtrec_jax.types import PyTree

_LEAST = 1e-8  # of a loss or a norm that is divided by


class State(NamedTuple):
    """What DB-MTL keeps between steps."""

    norms: Float[Array, " T"] | None  # moving averages, at the representation; 0: not observed yet
    gradients: tuple[PyTree, ...]  # moving averages of each task, at the parameters


@dataclass(frozen=True, kw_only=True)
class DBMTL:
    """`[train.balance] kind = "dbmtl"`.

    Each task's own part of the network learns from log L_t, whose gradient is that of L_t divided
    by L_t. Of the shared part's gradients of these, moving averages m_t are kept, and it learns
    from sum_t w_t max_i |m_i| m_t / |m_t|, with the declared weights w (1 in the paper). That is
    the paper's rule, `at = "parameters"`, which keeps T copies of the dense parameters; rows of
    sparse tables learn from the gradients of this batch by the same factors. At the representation,
    where gradients of one batch have no counterpart in the next, the averages are those of their
    norms: a task's gradient is scaled by max_i n_i / n_t. Tasks that are not observed rest.
    """

    kind: Literal["dbmtl"] = "dbmtl"
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of the moving averages
    at: At = "representation"

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""
        beta = self.beta

        def combine(
            pullback: Pullback, observed: jax.Array, state: State, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            observed &= initial > 0
            per_loss = jnp.where(observed, 1 / jnp.maximum(losses_of(pullback, initial), _LEAST), 0)
            alone = each_alone(pullback, per_loss)
            if state.norms is not None:
                now = _norms(alone)
                known = jnp.where(state.norms > 0, beta * state.norms + (1 - beta) * now, now)
                norms = jnp.where(observed, known, state.norms)
                state = State(norms, ())
            else:
                state, alone = _averaged(state, alone, observed, beta)
                norms = _norms(alone)
            longest = jnp.max(jnp.where(observed, norms, 0))
            shares = jnp.where(observed, initial * longest / jnp.maximum(norms, _LEAST), 0)
            return with_shares(pullback, initial * per_loss, alone, shares), state

        def init(params: PyTree) -> State:
            if self.at == "representation":
                return State(jnp.zeros_like(initial), ())
            zeros = tuple(jax.tree.map(jnp.zeros_like, params) for _ in initial)
            return State(None, zeros)

        return Balancer(init, combine, at=self.at)


def _norms(alone: list[Gradients]) -> Float[Array, " T"]:
    return jnp.sqrt(jnp.stack([dot(part.shared, part.shared) for part in alone]))


def _averaged(
    state: State, alone: list[Gradients], observed: jax.Array, beta: float
) -> tuple[State, list[Gradients]]:
    """The moving averages, and the tasks' gradients with them in the place of their own."""

    def average(before: PyTree, part: Gradients, seen: jax.Array) -> PyTree:
        def one(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(seen, beta * old + (1 - beta) * new, old)

        return jax.tree.map(one, before, part.shared)

    kept = tuple(map(average, state.gradients, alone, observed))
    replaced = [part._replace(shared=mean) for part, mean in zip(alone, kept, strict=True)]
    return State(state.norms, kept), replaced
