"""The declared utility itself: a sum of calibrated probabilities, each times its worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.fusions.contract import FusionSizes, in_columns, log_probability
from mtrec_jax.types import Fusing


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """`[model.fusion] kind = "weighted"`: the expected worth of showing an item, by
    `model.fusion_objective`. Nothing is learned: what is right about it is right because the
    scores are calibrated.
    """

    kind: Literal["weighted"] = "weighted"
    learns: ClassVar[bool] = False

    def make(self, sizes: FusionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> WeightedFusion:
        """The fusion."""
        return WeightedFusion(sizes)


class WeightedFusion(nnx.Module):
    """fused = sum_t worth_t p(path_t), in units of worth; with a root its logarithm, up to a
    constant of the user. The weights are the shares of the terms."""

    def __init__(self, sizes: FusionSizes):
        self.tasks, self.utility = sizes.tasks, sizes.utility

    def __call__(self, given: Fusing) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and shares of the tasks [n, T]."""
        scores = jax.lax.stop_gradient(given.scores)
        terms = self.utility.terms
        parts = jnp.stack(
            [jnp.log(t.worth) + log_probability(scores, t.path) for t in terms], axis=-1
        )
        total, shares = jax.nn.logsumexp(parts, axis=-1), jax.nn.softmax(parts, axis=-1)
        root = self.utility.root
        fused = scores[root] + total if root else jnp.exp(total)
        return fused, in_columns(self.tasks, {t.task: shares[:, i] for i, t in enumerate(terms)})
