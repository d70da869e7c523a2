"""A causal Transformer over the user's history."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.encoders.contract import EncoderSizes
from mtrec_jax.models.layers import dropout, layer_norm, linear, normal


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """`[model.encoder] kind = "transformer"`: self-attentive sequential recommendation (Kang &
    McAuley, ICDM 2018), pre-norm."""

    kind: Literal["transformer"] = "transformer"
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 1

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CausalTransformer:
        """The encoder.

        Raises:
          ConfigError: the width does not divide by the heads.
        """
        if sizes.width % self.heads:
            raise ConfigError(
                f"model.width: {sizes.width} is no multiple of model.encoder.heads = {self.heads}"
            )
        return CausalTransformer(sizes, self.layers, self.heads, dtype=dtype, rngs=rngs)


class Block(nnx.Module):
    """Pre-norm self-attention and feed-forward: [B, S, D] -> [B, S, D]."""

    def __init__(self, width: int, heads: int, rate: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        made = functools.partial(linear, dtype=dtype, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return layer_norm(width, dtype=dtype, rngs=rngs)

        self.heads, self.rate = heads, rate
        self.norm_attention, self.norm_hidden = norm(), norm()
        self.query, self.key, self.value = (made(width, width) for _ in range(3))
        self.output = made(width, width)
        self.up, self.down = made(width, 2 * width), made(2 * width, width)

    def attention(self, x: jax.Array, causal: jax.Array) -> jax.Array:
        """Causal self-attention: x [B, S, D], causal [S, S] True where j may be seen from i."""
        b, s, d = x.shape
        q, k, v = (self._split(linear(x)) for linear in (self.query, self.key, self.value))
        scores = jnp.einsum("bid,bjd->bij", q, k) * (d // self.heads) ** -0.5
        scores = jnp.where(causal[None], scores, -jnp.inf)
        mixed = jnp.einsum("bij,bjd->bid", jax.nn.softmax(scores, axis=-1), v)
        mixed = jnp.moveaxis(mixed.reshape(b, self.heads, s, -1), 1, 2).reshape(b, s, d)
        return self.output(mixed)

    def _split(self, x: jax.Array) -> jax.Array:
        """Heads join the batch axis, [B, S, D] -> [B * heads, S, D / heads]: XLA's product is
        fastest on plain 3-D operands."""
        b, s, d = x.shape
        by_head = x.reshape(b, s, self.heads, d // self.heads)
        return jnp.moveaxis(by_head, 2, 1).reshape(b * self.heads, s, d // self.heads)

    def __call__(self, x: jax.Array, causal: jax.Array, key: jax.Array | None) -> jax.Array:
        # Dropping attention weights as well doubles the cost of attention on CPUs, for no gain.
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + dropout(self.attention(self.norm_attention(x), causal), self.rate, keys[0])
        hidden = jax.nn.relu(self.up(self.norm_hidden(x)))
        return x + dropout(self.down(hidden), self.rate, keys[1])


class CausalTransformer(nnx.Module):
    """Tokens in time order to states: [B, S, D] -> [B, S, D]; state s sees tokens 0..s."""

    def __init__(
        self, sizes: EncoderSizes, layers: int, heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        width, self.rate = sizes.width, sizes.dropout
        shape = sizes.length, width
        self.positions = nnx.Param(normal(rngs, shape, 0.02, dtype))
        self.blocks = nnx.List(
            [Block(width, heads, self.rate, dtype=dtype, rngs=rngs) for _ in range(layers)]
        )
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = [None] * (len(self.blocks) + 1)
        if key is not None:
            keys = list(jax.random.split(key, len(self.blocks) + 1))
        length = tokens.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        x = dropout(tokens + self.positions[...][None, :length], self.rate, keys[0])
        for block, block_key in zip(self.blocks, keys[1:], strict=True):
            x = block(x, causal, block_key)
        return self.norm(x)
