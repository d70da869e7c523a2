"""Attention across tasks: weights of the tasks that depend on the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from mtrec_jax.models.fusions.contract import FusionSizes, in_columns, log_probability
from mtrec_jax.models.layers import constant, linear, normal
from mtrec_jax.types import Fusing


@dataclass(frozen=True, kw_only=True)
class Attention:
    """`[model.fusion] kind = "attention"`: the user's state asks, each task of the utility answers
    with a key made of its identity and its hidden vector, and the softmax over tasks weighs their
    calibrated probabilities. The declared worths are its prior: it begins as `weighted`, and learns
    for whom a task is to count for more.
    """

    kind: Literal["attention"] = "attention"
    size: Annotated[int, Field(ge=1)] = 16  # of queries and keys
    learns: ClassVar[bool] = True

    def make(self, sizes: FusionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> AttentionFusion:
        """The fusion."""
        return AttentionFusion(self, sizes, dtype=dtype, rngs=rngs)


class AttentionFusion(nnx.Module):
    """m = sum_t a_t p(path_t), a = softmax(log worth + query . key): the expected worth, scaled to
    [0, 1] and weighed anew. fused = log m / (1 - m), or with a root its score + log m.

    All inputs are cut off from the gradient, so the fusion learns its declared objective without
    disturbing the tasks that it fuses.
    """

    def __init__(self, options: Attention, sizes: FusionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        terms = sizes.utility.terms
        self.tasks, self.utility = sizes.tasks, sizes.utility
        self.prior = tuple(np.log([term.worth for term in terms]).tolist())
        self.query = linear(sizes.state, options.size, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(
            sizes.hidden,
            options.size,
            dtype=dtype,
            param_dtype=dtype,
            use_bias=False,
            kernel_init=constant(0.0),
            rngs=rngs,
        )
        self.identity = nnx.Param(normal(rngs, (len(terms), options.size), 0.02, dtype))

    def __call__(self, given: Fusing) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and weights of the tasks [n, T]."""
        state, hidden, scores, _ = jax.lax.stop_gradient(given)
        query = self.query(state) * self.identity[...].shape[1] ** -0.5
        asked, logs = [], []
        for t, term in enumerate(self.utility.terms):
            own = self.identity[...][t][None]
            key = self.key(hidden[term.task]) + own if term.task in hidden else own
            asked.append(self.prior[t] + jnp.sum(query * key, axis=-1))
            logs.append(log_probability(scores, term.path))
        weights = jax.nn.log_softmax(jnp.stack(asked, axis=-1), axis=-1)
        log_m = jax.nn.logsumexp(weights + jnp.stack(logs, axis=-1), axis=-1)
        root, share = self.utility.root, jnp.exp(weights)
        # a probability of 1 in its last bit has finite log-odds
        odds = log_m - jnp.log(-jnp.expm1(jnp.minimum(log_m, -1e-7)))
        fused = scores[root] + log_m if root else odds
        named = {term.task: share[:, t] for t, term in enumerate(self.utility.terms)}
        return fused, in_columns(self.tasks, named)
