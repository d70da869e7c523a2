"""Dot products of all pairs of fields, as in DLRM (Naumov et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.models.interactions.contract import InteractionSizes


@dataclass(frozen=True, kw_only=True)
class Dot:
    """`[model.interaction] kind = "dot"`."""

    kind: Literal["dot"] = "dot"

    def make(self, sizes: InteractionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> DotProducts:
        """The interaction."""
        return DotProducts(sizes)


class DotProducts(nnx.Module):
    """x, and the products of each field with each one before it, divided by the root of D so that
    they are of the size of x: [n, I + F (F - 1) / 2]."""

    def __init__(self, sizes: InteractionSizes):
        self.outputs = sizes.inputs + sizes.fields * (sizes.fields - 1) // 2

    def __call__(self, x: jax.Array, fields: jax.Array) -> jax.Array:
        n, count, width = fields.shape
        products = jnp.einsum("nfd,ngd->nfg", fields, fields) * width**-0.5
        row, column = np.tril_indices(count, -1)
        pairs = products.reshape(n, -1)[:, row * count + column]
        return jnp.concatenate([x, pairs], axis=-1)
