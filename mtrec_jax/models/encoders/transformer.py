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
from mtrec_jax.kernels.attention import causal_attention, padded_attention
from mtrec_jax.models.encoders.contract import Behaviour, EncoderSizes
from mtrec_jax.models.encoders.stack import Stack, split
from mtrec_jax.models.layers import dropout, layer_norm, linear, normal, product

Compute = Literal["same", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """`[model.encoder] kind = "transformer"`: self-attentive sequential recommendation (SASRec,
    Kang & McAuley, ICDM 2018), pre-norm."""

    kind: Literal["transformer"] = "transformer"
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 1
    expansion: Annotated[int, Field(ge=1)] = 2  # of the hidden layer behind the attention
    deep: bool = False  # layers as a loop, which keeps their inputs and computes each once more
    compute: Compute = "same"  # of products; "bfloat16": on accelerators faster, weights stay

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CausalTransformer:
        """The encoder.

        Raises:
          ConfigError: the width does not divide by the heads.
        """
        check_heads(sizes, self.heads)
        return CausalTransformer(sizes, self, dtype=dtype, rngs=rngs)


def check_heads(sizes: EncoderSizes, heads: int) -> None:
    """Raise `ConfigError` for a width that the heads do not divide."""
    if sizes.width % heads:
        raise ConfigError(
            f"model.width: {sizes.width} is no multiple of model.encoder.heads = {heads}"
        )


class Block(nnx.Module):
    """Pre-norm self-attention and feed-forward: [B, S, D] -> [B, S, D]."""

    def __init__(
        self, sizes: EncoderSizes, options: Transformer, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        compute = None if options.compute == "same" else jnp.dtype(options.compute)
        made = functools.partial(linear, dtype=dtype, rngs=rngs, compute=compute)
        width, hidden = sizes.width, options.expansion * sizes.width
        self.heads, self.rate = options.heads, sizes.dropout
        self.norm_attention = layer_norm(width, dtype=dtype, rngs=rngs)
        self.norm_hidden = layer_norm(width, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value = (made(width, width) for _ in range(3))
        self.output = made(width, width)
        self.up, self.down = made(width, hidden), made(hidden, width)

    def attention(self, x: jax.Array, known: jax.Array | None) -> jax.Array:
        """Self-attention of x [B, S, D]: causal, or of all that is `known` [B, S]."""
        width = x.shape[-1]
        every = product(x.reshape(-1, width), (self.query, self.key, self.value))
        parts = jnp.split(every.reshape(*x.shape[:-1], 3 * width), 3, axis=-1)
        q, k, v = (split_heads(part, self.heads) for part in parts)
        if known is None:
            mixed = causal_attention(q, k, v)
        else:
            mixed = padded_attention(q, k, v, jnp.repeat(known, self.heads, axis=0))
        return self.output(joined_heads(mixed, self.heads))

    def __call__(
        self, x: jax.Array, key: jax.Array | None, known: jax.Array | None = None
    ) -> jax.Array:
        # Dropping attention weights as well doubles the cost of attention on CPUs, for no gain.
        keys = (None, None) if key is None else jax.random.split(key)
        mixed = self.attention(self.norm_attention(x), known).astype(x.dtype)
        x = x + dropout(mixed, self.rate, keys[0])
        hidden = jax.nn.relu(self.up(self.norm_hidden(x)))
        return x + dropout(self.down(hidden).astype(x.dtype), self.rate, keys[1])


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Heads join the batch axis: [B, S, D] -> [B * heads, S, D / heads]."""
    b, s, d = x.shape
    if heads == 1:
        return x
    by_head = x.reshape(b, s, heads, d // heads)
    return jnp.moveaxis(by_head, 2, 1).reshape(b * heads, s, d // heads)


def joined_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B * heads, S, D / heads] -> [B, S, D]."""
    n, s, d = x.shape
    if heads == 1:
        return x
    return jnp.moveaxis(x.reshape(n // heads, heads, s, d), 1, 2).reshape(n // heads, s, heads * d)


class CausalTransformer(nnx.Module):
    """Tokens in time order to states: [B, S, D] -> [B, S, D]; state s sees tokens 0..s."""

    def __init__(
        self, sizes: EncoderSizes, options: Transformer, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.rate = sizes.dropout
        self.positions = nnx.Param(normal(rngs, (sizes.length, sizes.width), 0.02, dtype))
        made = [Block(sizes, options, dtype=dtype, rngs=rngs) for _ in range(options.layers)]
        self.blocks = Stack(made, options.deep)
        self.norm = layer_norm(sizes.width, dtype=dtype, rngs=rngs)

    def __call__(self, past: Behaviour, key: jax.Array | None) -> jax.Array:
        first, others = split(key, self.blocks.count)
        places = self.positions[...][None, : past.tokens.shape[1]]
        x = dropout(past.tokens + places, self.rate, first)
        return self.norm(self.blocks(x, others, lambda block, x, key: block(x, key)))
