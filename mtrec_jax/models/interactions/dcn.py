"""Deep and cross network, version 2 (Wang et al., WWW 2021): bounded-degree crosses of inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.interactions.contract import InteractionSizes
from mtrec_jax.models.layers import lecun_normal, linear


@dataclass(frozen=True, kw_only=True)
class DCN:
    """`[model.interaction] kind = "dcn"`: cross layers, and the towers behind them (the paper's
    stacked structure)."""

    kind: Literal["dcn"] = "dcn"
    layers: Annotated[int, Field(ge=1)] = 2
    rank: Annotated[int, Field(ge=0)] = 0  # of the weights, U V^T; 0: they are full

    def make(self, sizes: InteractionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CrossNetwork:
        """The interaction."""
        return CrossNetwork(sizes.inputs, self.layers, self.rank, dtype=dtype, rngs=rngs)


class CrossNetwork(nnx.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, entry by entry: [n, I] -> [n, I].

    With a rank r, W = U V^T of [I, r] each: 2 I r products a layer instead of I^2.
    """

    def __init__(self, inputs: int, layers: int, rank: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.outputs = inputs
        narrow = [
            nnx.Param(lecun_normal(rngs.params(), (inputs, rank), dtype))
            for _ in range(layers * (rank > 0))
        ]
        self.narrow = nnx.List(narrow)
        self.cross = nnx.List(
            [linear(rank or inputs, inputs, dtype=dtype, rngs=rngs) for _ in range(layers)]
        )

    def __call__(self, x: jax.Array, fields: jax.Array) -> jax.Array:
        first = x
        for number, cross in enumerate(self.cross):
            low = x @ self.narrow[number][...] if self.narrow else x
            x = first * cross(low) + x
        return x
