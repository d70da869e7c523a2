"""No fusion: the plain mean of all tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.fusions.contract import FusionSizes
from mtrec_jax.types import Fusing


@dataclass(frozen=True, kw_only=True)
class NoFusion:
    """`[model.fusion] kind = "none"`: the mean of all tasks, each between 0 and 1. It knows nothing
    of any worth: for models whose order nobody asks for.
    """

    kind: Literal["none"] = "none"
    learns: ClassVar[bool] = False

    def make(self, sizes: FusionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MeanFusion:
        """The fusion."""
        return MeanFusion(sizes)


class MeanFusion(nnx.Module):
    """The mean of `Fusing.units`."""

    def __init__(self, sizes: FusionSizes):
        self.tasks = sizes.tasks

    def __call__(self, given: Fusing) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and equal weights [n, T]."""
        stacked = jnp.stack([given.units[task] for task in self.tasks], axis=-1)
        weights = jnp.full(stacked.shape, 1 / stacked.shape[1], stacked.dtype)
        return jnp.sum(weights * stacked, axis=-1), weights
