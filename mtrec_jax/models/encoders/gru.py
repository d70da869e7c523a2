"""Gated recurrent units over the user's history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.encoders.contract import Behaviour, EncoderSizes
from mtrec_jax.models.layers import dropout, layer_norm, linear


@dataclass(frozen=True, kw_only=True)
class GRU:
    """`[model.encoder] kind = "gru"`: gated recurrent units (Cho et al., EMNLP 2014), as GRU4Rec
    has them over sessions (Hidasi et al., ICLR 2016)."""

    kind: Literal["gru"] = "gru"
    layers: Annotated[int, Field(ge=1)] = 1
    hidden: Annotated[int, Field(ge=0)] = 0  # 0: as wide as the model

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> GRULayers:
        """The encoder."""
        return GRULayers(sizes, self, dtype=dtype, rngs=rngs)


class GRULayers(nnx.Module):
    """Layers of units one above the other, and a projection to the width of the model."""

    def __init__(self, sizes: EncoderSizes, options: GRU, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, hidden, self.rate = sizes.width, options.hidden or sizes.width, sizes.dropout
        self.layers = nnx.List(
            [
                Units(hidden if number else width, hidden, dtype=dtype, rngs=rngs)
                for number in range(options.layers)
            ]
        )
        self.output = linear(hidden, width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(self, past: Behaviour, key: jax.Array | None) -> jax.Array:
        keys = [None] * (len(self.layers) + 1)
        if key is not None:
            keys = list(jax.random.split(key, len(self.layers) + 1))
        x = dropout(past.tokens, self.rate, keys[0])
        for layer, layer_key in zip(self.layers, keys[1:], strict=True):
            x = dropout(layer(x), self.rate, layer_key)
        return self.norm(self.output(x))


class Units(nnx.Module):
    """One layer: [B, S, in] -> [B, S, H], each state of the token and the state before it.

    z, r = sigmoid(W x + U h), n = tanh(V x + r * (V' h + b)), h = (1 - z) n + z h. What the tokens
    say is one product before the loop over them.
    """

    def __init__(self, inputs: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.of_token = linear(inputs, 3 * hidden, dtype=dtype, rngs=rngs)
        self.of_state = linear(hidden, 3 * hidden, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        of_tokens = jnp.moveaxis(self.of_token(tokens), 1, 0)  # (S, B, 3H)
        kernel, bias = self.of_state.kernel[...], self.of_state.bias[...]

        def step(state: jax.Array, of_token: jax.Array) -> tuple[jax.Array, jax.Array]:
            before, now = state @ kernel + bias[None], jnp.split(of_token, 3, axis=-1)
            update, reset, new = jnp.split(before, 3, axis=-1)
            update = jax.nn.sigmoid(update + now[0])
            new = jnp.tanh(jax.nn.sigmoid(reset + now[1]) * new + now[2])
            state = new + update * (state - new)
            return state, state

        start = jnp.zeros((tokens.shape[0], kernel.shape[0]), of_tokens.dtype)
        return jnp.moveaxis(jax.lax.scan(step, start, of_tokens)[1], 0, 1)
