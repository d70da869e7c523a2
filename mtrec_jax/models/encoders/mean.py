"""The mean of the user's events, whatever their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.encoders.contract import Behaviour, EncoderSizes
from mtrec_jax.models.layers import MLP, MaybeHidden, dropout, layer_norm, linear


@dataclass(frozen=True, kw_only=True)
class Mean:
    """`[model.encoder] kind = "mean"`: the mean of the tokens so far through dense layers
    (Covington et al., RecSys 2016, "Deep neural networks for YouTube recommendations")."""

    kind: Literal["mean"] = "mean"
    hidden: MaybeHidden = (128,)

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MeanLayers:
        """The encoder."""
        return MeanLayers(sizes, self, dtype=dtype, rngs=rngs)


class MeanLayers(nnx.Module):
    """State s is of the start token and the mean of the s events so far."""

    def __init__(self, sizes: EncoderSizes, options: Mean, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, self.rate = sizes.width, sizes.dropout
        self.layers = MLP(2 * width, options.hidden, dtype=dtype, rngs=rngs)
        last = options.hidden[-1] if options.hidden else 2 * width
        self.output = linear(last, width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(self, past: Behaviour, key: jax.Array | None) -> jax.Array:
        tokens = dropout(past.tokens, self.rate, key)
        events = jnp.where(past.known[..., None], tokens, 0).at[:, 0].set(0)
        count = jnp.maximum(jnp.cumsum(past.known, axis=1) - 1, 1).astype(tokens.dtype)
        mean = jnp.cumsum(events, axis=1) / count[..., None]
        start = jnp.broadcast_to(tokens[:, :1], tokens.shape)
        return self.norm(self.output(self.layers(jnp.concatenate([start, mean], axis=-1))))
