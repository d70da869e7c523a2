"""Sines and cosines of numbers at trained frequencies (Gorishniy et al., NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from mtrec_jax.models.layers import normal
from mtrec_jax.models.numbers.contract import NumberSizes
from mtrec_jax.models.numbers.linear import EmbeddedNumbers

_CODED = 3  # numbers of a feature from which on they are a code, no number and a mark of missing


@dataclass(frozen=True, kw_only=True)
class PeriodicNumbers:
    """`[model.numbers] kind = "periodic"`: the paper's PLR. `piecewise` codes are embedded as
    `linear` does."""

    kind: Literal["periodic"] = "periodic"
    frequencies: Annotated[int, Field(ge=1)] = 16  # k, of each feature
    sigma: Annotated[float, Field(gt=0)] = 0.1  # standard deviation of the initial ones

    def make(self, sizes: NumberSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Periodic:
        """The module."""
        return Periodic(self, sizes, dtype=dtype, rngs=rngs)


class Periodic(nnx.Module):
    """[sin v, cos v], v = 2 pi c x with a vector c [k] a feature, then a linear layer and ReLU:
    [..., F D]. A mark of missing values stays as it is."""

    def __init__(
        self, options: PeriodicNumbers, sizes: NumberSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        k, self.slots = options.frequencies, sizes.slots
        shape = sum(s < _CODED for s in sizes.slots), k
        self.frequencies = nnx.Param(normal(rngs, shape, options.sigma, dtype))
        wide = [s - 1 + 2 * k if s < _CODED else s for s in sizes.slots]
        self.embedded = EmbeddedNumbers(wide, sizes.width, dtype=dtype, rngs=rngs)
        self.outputs, self.fields = self.embedded.outputs, self.embedded.fields

    def __call__(self, numbers: jax.Array) -> jax.Array:
        parts, number = [], 0
        for x in jnp.split(numbers, np.cumsum(self.slots)[:-1], axis=-1):
            if x.shape[-1] < _CODED:
                v = 2 * jnp.pi * (x[..., :1] @ self.frequencies[...][number][None])
                x = jnp.concatenate([jnp.sin(v), jnp.cos(v), x[..., 1:]], axis=-1)
                number += 1
            parts.append(x)
        return self.embedded(jnp.concatenate(parts, axis=-1))
