"""Pointwise attention with the distance of events in places and in time."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.kernels.attention import blocks
from mtrec_jax.models.encoders.contract import Behaviour, EncoderSizes
from mtrec_jax.models.encoders.stack import Stack, split
from mtrec_jax.models.encoders.transformer import Compute, check_heads, joined_heads, split_heads
from mtrec_jax.models.layers import constant, dropout, layer_norm, linear

BUCKETS = 64  # of the logarithm of seconds: e^(0.301 * 64) are seven years
_STEP = 0.301


@dataclass(frozen=True, kw_only=True)
class HSTU:
    """`[model.encoder] kind = "hstu"`: hierarchical sequential transduction units (Zhai et al.,
    ICML 2024): attention weights are SiLU of scores over the length, not a softmax, and a gate
    takes the place of the feed-forward layers. With a history feature of kind "moment", scores
    have a part for how long before each other two events were; with one of the request as well, for
    how long before the query, which follows the event, the other event was. Where one of the two
    times is missing, they are taken for the same.
    """

    kind: Literal["hstu"] = "hstu"
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 1
    deep: bool = False  # as of kind "transformer"
    compute: Compute = "same"
    compares_times: ClassVar[bool] = True

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> HSTULayers:
        """The encoder.

        Raises:
          ConfigError: the width does not divide by the heads.
        """
        check_heads(sizes, self.heads)
        return HSTULayers(sizes, self, dtype=dtype, rngs=rngs)


class HSTULayers(nnx.Module):
    """Units one above the other: [B, S, D] -> [B, S, D]; state s sees tokens 0..s."""

    def __init__(self, sizes: EncoderSizes, options: HSTU, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.rate = sizes.dropout
        made = [Unit(sizes, options, dtype=dtype, rngs=rngs) for _ in range(options.layers)]
        self.units = Stack(made, options.deep)
        self.norm = layer_norm(sizes.width, dtype=dtype, rngs=rngs)

    def __call__(self, past: Behaviour, key: jax.Array | None) -> jax.Array:
        first, others = split(key, self.units.count)
        x = dropout(past.tokens, self.rate, first)
        return self.norm(self.units(x, others, lambda unit, x, key: unit(x, past, key)))


class Unit(nnx.Module):
    """u, v, q, k = SiLU(W norm(x)), then x + W' (norm(m) * u), where m_i = sum over j up to i of
    SiLU(q_i . k_j + p(i - j) + t(time between i and j)) v_j / S; the time of i is that of the query
    after it, where this is known."""

    def __init__(self, sizes: EncoderSizes, options: HSTU, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, self.rate, self.heads = sizes.width, sizes.dropout, options.heads
        self.length = sizes.length
        self.norm_inputs = layer_norm(width, dtype=dtype, rngs=rngs)
        self.norm_mixed = layer_norm(width, dtype=dtype, rngs=rngs)
        compute = None if options.compute == "same" else jnp.dtype(options.compute)
        made = functools.partial(linear, dtype=dtype, rngs=rngs, compute=compute)
        self.inputs, self.output = made(width, 4 * width), made(width, width)
        zeros = constant(0.0)
        self.by_place = nnx.Param(zeros(None, (sizes.length,), dtype))
        self.by_time = nnx.Param(zeros(None, (BUCKETS,), dtype))

    def __call__(self, x: jax.Array, past: Behaviour, key: jax.Array | None) -> jax.Array:
        every = jax.nn.silu(self.inputs(self.norm_inputs(x)))
        gate, *parts = jnp.split(every, 4, axis=-1)
        value, query, keys = (split_heads(part, self.heads) for part in parts)
        mixed = joined_heads(self._mixed(query, keys, value, past), self.heads)
        gated = self.output(self.norm_mixed(mixed) * gate.astype(x.dtype)).astype(x.dtype)
        return x + dropout(gated, self.rate, key)

    def _mixed(
        self, query: jax.Array, keys: jax.Array, value: jax.Array, past: Behaviour
    ) -> jax.Array:
        """Block by block of queries, whose weights are made again on the way back."""
        block, found = jax.checkpoint(self._block, static_argnums=(4,)), []
        asked = past.moments if past.asked is None else past.asked
        for own, seen, _ in blocks(query.shape[1]):
            times = None
            if asked is not None and past.moments is not None:
                times = asked[:, own], past.moments[:, seen]
            given = query[:, own], keys[:, seen], value[:, seen], times
            found.append(block(*given, own.start))
        return jnp.concatenate(found, axis=1)

    def _block(
        self,
        query: jax.Array,
        keys: jax.Array,
        value: jax.Array,
        times: tuple[jax.Array, jax.Array] | None,
        start: int,
    ) -> jax.Array:
        wide = jnp.promote_types(query.dtype, jnp.float32)  # products are summed in 32 bits
        scores = jnp.einsum("nid,njd->nij", query, keys, preferred_element_type=wide)
        back = start + jnp.arange(query.shape[1])[:, None] - jnp.arange(keys.shape[1])[None]
        scores = scores + jnp.asarray(self.by_place[...])[jnp.maximum(back, 0)][None]
        if times is not None:
            known = (times[0] > 0)[:, :, None] & (times[1] > 0)[:, None]
            apart = jnp.where(known, times[0][:, :, None] - times[1][:, None], 0)
            of_pair = jnp.asarray(self.by_time[...])[buckets(apart)]
            scores = scores + jnp.repeat(of_pair, self.heads, axis=0)
        weights = jnp.where((back >= 0)[None], jax.nn.silu(scores) / self.length, 0)
        weights = weights.astype(value.dtype)
        return jnp.einsum("nij,njd->nid", weights, value, preferred_element_type=wide)


def buckets(seconds: jax.Array) -> jax.Array:
    """The bucket of a time in seconds, by its logarithm.

    >>> buckets(jnp.array([0, 1, 60, 86_400])).tolist()
    [0, 0, 13, 37]
    """
    logarithm = jnp.log(jnp.maximum(jnp.abs(seconds), 1).astype(jnp.float32)) / _STEP
    return jnp.minimum(logarithm.astype(jnp.int32), BUCKETS - 1)
