"""Numbers as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.numbers.contract import NumberSizes


@dataclass(frozen=True, kw_only=True)
class PlainNumbers:
    """`[model.numbers] kind = "plain"`."""

    kind: Literal["plain"] = "plain"

    def make(self, sizes: NumberSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Plain:
        """The module."""
        return Plain(sizes)


class Plain(nnx.Module):
    """They stay as they are: O = C."""

    def __init__(self, sizes: NumberSizes):
        self.outputs, self.fields = sum(sizes.slots), 0

    def __call__(self, numbers: jax.Array) -> jax.Array:
        return numbers
