"""A causal Transformer over the user's history."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.layers import dropout, unit_length


class Block(nnx.Module):
    """Pre-norm self-attention and feed-forward: [B, S, D] -> [B, S, D]."""

    def __init__(self, width: int, heads: int, rate: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=dtype, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.heads, self.rate = heads, rate
        self.norm_attention, self.norm_hidden = norm(), norm()
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.output = linear(width, width)
        self.up, self.down = linear(width, 2 * width), linear(2 * width, width)

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


class Transformer(nnx.Module):
    """Tokens in time order to states: [B, S, D] -> [B, S, D]; state s sees tokens 0..s.

    Self-attentive sequential recommendation (Kang & McAuley, ICDM 2018), pre-norm.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        length: int,
        rate: float,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.rate = rate
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (length, width), dtype))
        self.blocks = nnx.List(
            [Block(width, heads, rate, dtype=dtype, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, param_dtype=dtype, rngs=rngs)

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


class TargetAttention(nnx.Module):
    """What happened at past events that resemble the candidate (DIN, Zhou et al., KDD 2018).

    A candidate [B, P, D] looks at the first `cutoff` [B, P] of the events [B, L, D] by cosine, at a
    learned sharpness, and takes the mean of their outcomes [B, L, D]: [B, P, D], zero without any.
    """

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = nnx.Linear(width, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
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
        self.project = nnx.Linear(width, width, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.fading = nnx.Param(jnp.full((), -4.0, dtype))

    def __call__(self, words: jax.Array, searched: jax.Array, cutoff: jax.Array) -> jax.Array:
        places = jnp.where(searched, jnp.arange(words.shape[1]) + 1, 0)
        last = jnp.pad(jax.lax.cummax(places, axis=1), ((0, 0), (1, 0)))  # (B, 1 + L); 0: none
        place = jnp.take_along_axis(last, cutoff, axis=1)
        found = jnp.take_along_axis(words, jnp.maximum(place - 1, 0)[..., None], axis=1)
        strength = jnp.exp(-jax.nn.softplus(self.fading[...]) * (cutoff - place))
        strength = jnp.where(place > 0, strength, 0) * words.shape[2] ** 0.5
        return self.project(found * strength[..., None].astype(words.dtype))
