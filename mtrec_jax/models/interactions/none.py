"""No interaction: the towers read the inputs as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.interactions.contract import InteractionSizes


@dataclass(frozen=True, kw_only=True)
class NoInteraction:
    """`[model.interaction] kind = "none"`."""

    kind: Literal["none"] = "none"

    def make(self, sizes: InteractionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Same:
        """The interaction."""
        return Same(sizes.inputs)


class Same(nnx.Module):
    """x as it is."""

    def __init__(self, inputs: int):
        self.outputs = inputs

    def __call__(self, x: jax.Array, fields: jax.Array) -> jax.Array:
        return x
