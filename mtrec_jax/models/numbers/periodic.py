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


@dataclass(frozen=True, kw_only=True)
class PeriodicNumbers:
    """`[model.numbers] kind = "periodic"`: the paper's PLR. `piecewise` codes and what friends
    like are embedded as `linear` does."""

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
        k, self.slots, self.coded = options.frequencies, sizes.slots, sizes.coded
        shape = len(sizes.coded) - sum(sizes.coded), k
        self.frequencies = nnx.Param(normal(rngs, shape, options.sigma, dtype))
        each = zip(sizes.slots, sizes.coded, strict=True)
        wide = [s if coded else s - 1 + 2 * k for s, coded in each]
        self.embedded = EmbeddedNumbers(wide, sizes.width, dtype=dtype, rngs=rngs)
        self.outputs, self.fields = self.embedded.outputs, self.embedded.fields

    def __call__(self, numbers: jax.Array) -> jax.Array:
        parts, number = [], 0
        split = jnp.split(numbers, np.cumsum(self.slots)[:-1], axis=-1)
        for x, coded in zip(split, self.coded, strict=True):
            if not coded:
                v = 2 * jnp.pi * (x[..., :1] @ self.frequencies[...][number][None])
                x = jnp.concatenate([jnp.sin(v), jnp.cos(v), x[..., 1:]], axis=-1)
                number += 1
            parts.append(x)
        return self.embedded(jnp.concatenate(parts, axis=-1))
