"""A linear layer and ReLU for each feature of numbers (Gorishniy et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.models.layers import linear
from mtrec_jax.models.numbers.contract import NumberSizes


@dataclass(frozen=True, kw_only=True)
class LinearNumbers:
    """`[model.numbers] kind = "linear"`: of `piecewise` features the paper's Q-LR, of plain numbers
    its LR."""

    kind: Literal["linear"] = "linear"

    def make(self, sizes: NumberSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> EmbeddedNumbers:
        """The module."""
        return EmbeddedNumbers(sizes.slots, sizes.width, dtype=dtype, rngs=rngs)


class EmbeddedNumbers(nnx.Module):
    """ReLU(x_j W_j + b_j) of each feature j, x_j [..., S_j] its numbers: [..., F D]."""

    def __init__(self, slots: Sequence[int], width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fields, self.outputs = len(slots), len(slots) * width
        self.ends = tuple(int(end) for end in np.cumsum(slots))
        self.layers = nnx.List([linear(s, width, dtype=dtype, rngs=rngs) for s in slots])

    def __call__(self, numbers: jax.Array) -> jax.Array:
        parts = jnp.split(numbers, self.ends[:-1], axis=-1)
        found = [jax.nn.relu(layer(x)) for layer, x in zip(self.layers, parts, strict=True)]
        return jnp.concatenate(found, axis=-1)
