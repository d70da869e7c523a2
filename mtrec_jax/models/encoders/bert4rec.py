"""A Transformer that sees both ways, and learns to fill in events that are hidden from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.encoders.contract import Behaviour, EncoderSizes
from mtrec_jax.models.encoders.stack import Stack, split
from mtrec_jax.models.encoders.transformer import Block, Compute, Transformer, check_heads
from mtrec_jax.models.layers import dropout, layer_norm, normal, sinusoids


@dataclass(frozen=True, kw_only=True)
class BERT4Rec:
    """`[model.encoder] kind = "bert4rec"`: in training a `share` of the positions' own events is
    hidden, and these positions alone are learned; every other event of the history is seen, later
    ones too. In answers the one event after the history is hidden (Sun et al., CIKM 2019). Blocks
    are those of the kind "transformer". Embeddings of positions begin as sinusoids of the size of a
    token: a hidden event has nothing else to find its neighbours by, and small random ones take
    thousands of steps to grow.
    """

    kind: Literal["bert4rec"] = "bert4rec"
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 1
    expansion: Annotated[int, Field(ge=1)] = 2
    deep: bool = False  # as of kind "transformer"
    compute: Compute = "same"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MaskedTransformer:
        """The encoder.

        Raises:
          ConfigError: the width does not divide by the heads.
        """
        check_heads(sizes, self.heads)
        return MaskedTransformer(sizes, self, dtype=dtype, rngs=rngs)


class MaskedTransformer(nnx.Module):
    """States at the places of hidden events. Place 0 is the start token, and place 1 + c that of
    the event that follows c others."""

    def __init__(self, sizes: EncoderSizes, options: BERT4Rec, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.rate, width = sizes.dropout, sizes.width
        like = Transformer(
            heads=options.heads, expansion=options.expansion, compute=options.compute
        )
        self.hidden = nnx.Param(normal(rngs, (width,), 0.02, dtype))
        self.positions = nnx.Param(sinusoids((sizes.length + 1, width), dtype))
        made = [Block(sizes, like, dtype=dtype, rngs=rngs) for _ in range(options.layers)]
        self.blocks = Stack(made, options.deep)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def at(
        self,
        past: Behaviour,
        cutoff: jax.Array,
        masked: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """States [B, P, D] of positions that follow `cutoff` [B, P] events.

        With `masked` [B, L + 1], events that are hidden, all positions share a pass; else each has
        one in which the event that follows, and those after it, are hidden.
        """
        b, p = cutoff.shape
        tokens = jnp.pad(past.tokens, ((0, 0), (0, 1), (0, 0)))
        known = jnp.pad(past.known, ((0, 0), (0, 1)))
        if masked is None:
            tokens, known = (jnp.repeat(part, p, axis=0) for part in (tokens, known))
            cutoff = cutoff.reshape(b * p, 1)
            places = jnp.arange(tokens.shape[1])[None]
            hidden = places == 1 + cutoff
            known = known & (places <= cutoff)
        else:
            hidden = jnp.pad(masked, ((0, 0), (1, 0)))
        states = self._filled(
            jnp.where(hidden[..., None], self.hidden[...], tokens), known | hidden, key
        )
        found = jax.vmap(lambda seen, cutoff: seen[1 + cutoff])(states, cutoff)
        return found.reshape(b, p, -1)

    def _filled(self, tokens: jax.Array, known: jax.Array, key: jax.Array | None) -> jax.Array:
        first, others = split(key, self.blocks.count)
        places = self.positions[...][None, : tokens.shape[1]]
        x = dropout(tokens + places, self.rate, first)
        return self.norm(self.blocks(x, others, lambda block, x, key: block(x, key, known)))
