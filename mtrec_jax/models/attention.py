"""What the past says about one candidate or one moment, beside the encoder's state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.layers import linear, unit_length


class TargetAttention(nnx.Module):
    """What happened at past events that resemble the candidate (DIN, Zhou et al., KDD 2018).

    A candidate [B, P, D] looks at the first `cutoff` [B, P] of the events [B, L, D] by cosine, at a
    learned sharpness, and takes the mean of their outcomes [B, L, D]: [B, P, D], zero without any.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = linear(width, width, dtype=dtype, rngs=rngs)
        self.log_sharpness = nnx.Param(jnp.full((), 2.0, dtype))

    def __call__(
        self, candidates: jax.Array, events: jax.Array, outcomes: jax.Array, cutoff: jax.Array
    ) -> jax.Array:
        wanted, known = (unit_length(self.project(x)) for x in (candidates, events))
        cosine = jnp.einsum("bpd,bld->bpl", wanted, known)
        visible = jnp.arange(events.shape[1])[None, None] < cutoff[..., None]
        sharpness = jnp.exp(self.log_sharpness[...])
        # cosines are at most 1, so the exponent is bounded without a pass for the maximum
        weights = jnp.where(visible, jnp.exp(sharpness * (cosine - 1)), 0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.einsum("bpl,bld->bpd", weights, outcomes) / jnp.maximum(total, 1e-12)


class LastSearch(nnx.Module):
    """What the user looked for last, as a part of the user's state.

    Of the events' words [B, L, D], those of the last one that was `searched` [B, L] before each
    `cutoff` [B, P], faded with the number of events since: [B, P, D], the projection of zero
    without one.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = linear(width, width, dtype=dtype, rngs=rngs)
        self.fading = nnx.Param(jnp.full((), -4.0, dtype))

    def __call__(self, words: jax.Array, searched: jax.Array, cutoff: jax.Array) -> jax.Array:
        places = jnp.where(searched, jnp.arange(words.shape[1]) + 1, 0)
        last = jnp.pad(jax.lax.cummax(places, axis=1), ((0, 0), (1, 0)))  # (B, 1 + L); 0: none
        place = jnp.take_along_axis(last, cutoff, axis=1)
        found = jnp.take_along_axis(words, jnp.maximum(place - 1, 0)[..., None], axis=1)
        strength = jnp.exp(-jax.nn.softplus(self.fading[...]) * (cutoff - place))
        strength = jnp.where(place > 0, strength, 0) * words.shape[2] ** 0.5
        return self.project(found * strength[..., None].astype(words.dtype))
