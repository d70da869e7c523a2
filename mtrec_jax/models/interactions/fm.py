"""The second-order term of factorization machines (Rendle, ICDM 2010)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.interactions.contract import InteractionSizes


@dataclass(frozen=True, kw_only=True)
class FM:
    """`[model.interaction] kind = "fm"`."""

    kind: Literal["fm"] = "fm"

    def make(self, sizes: InteractionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> SecondOrder:
        """The interaction."""
        return SecondOrder(sizes)


class SecondOrder(nnx.Module):
    """x, and the products of all pairs of fields, added up dimension by dimension (bi-interaction
    pooling, He & Chua, SIGIR 2017), whose sum over the D dimensions is Rendle's term: [n, I + D].

    Sum over f < g of v_f v_g = ((sum of v)^2 - sum of v^2) / 2: F D products instead of F^2 D. They
    are divided by F, so that they are of the size of x however many fields there are.
    """

    def __init__(self, sizes: InteractionSizes):
        self.outputs = sizes.inputs + sizes.width

    def __call__(self, x: jax.Array, fields: jax.Array) -> jax.Array:
        total, squares = jnp.sum(fields, axis=1), jnp.sum(jnp.square(fields), axis=1)
        pairs = (jnp.square(total) - squares) / (2 * max(1, fields.shape[1]))
        return jnp.concatenate([x, pairs], axis=-1)
