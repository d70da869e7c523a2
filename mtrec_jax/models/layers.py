"""Small layers that the encoders and the towers share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, UInt32


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zero each entry with probability `rate`, rescale the rest; `key=None` leaves x as it is.

    The mask is a hash of the entry's place and the key. It is computed where it is used, which on a
    CPU is many times faster than drawing random bits into memory, and it does not depend on how x
    is split over devices.
    """
    if key is None or rate == 0:
        return x
    seed = jax.random.bits(key, (2,), jnp.uint32)
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(_hash(x.shape, seed) >= threshold, x / (1 - rate), 0)


def unit_length(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors divided by their L2 norm; the zero vector stays zero, with a finite gradient.

    For training; `kernels` normalise with more care for the last bit.
    """
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


def _hash(shape: tuple[int, ...], seed: UInt32[Array, "2"]) -> UInt32[Array, "..."]:
    """One 32-bit number an entry: a multiply-xorshift mix of its flat index and the seed."""
    index = jnp.full(shape, seed[0])
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
        index = index + seed[1]
    return index ^ (index >> 15)


class MLP(nnx.Module):
    """Dense layers with SiLU between them: [..., in] -> [..., hidden[-1]], activated at the end."""

    def __init__(self, inputs: int, hidden: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes = [inputs, *hidden]
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, dtype=dtype, param_dtype=dtype, rngs=rngs)
                for a, b in itertools.pairwise(sizes)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jax.nn.silu(layer(x))
        return x


class Experts(nnx.Module):
    """E independent MLPs on one input: [n, in] -> E times [n, hidden[-1]].

    Each expert's output is normalised, which keeps experts from collapsing into one (HoME, Wang et
    al. 2024). Experts are a list of plain matrix products: batched products of small matrices are
    slow on CPUs.
    """

    def __init__(
        self, count: int, inputs: int, hidden: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.mlps = nnx.List([MLP(inputs, hidden, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.norms = nnx.List(
            [
                nnx.RMSNorm(hidden[-1], dtype=dtype, param_dtype=dtype, rngs=rngs)
                for _ in range(count)
            ]
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        return [norm(mlp(x)) for mlp, norm in zip(self.mlps, self.norms, strict=True)]


def mix(weights: Float[Array, "n E"], experts: list[Float[Array, "n H"]]) -> Float[Array, "n H"]:
    """Weighted sum of the experts' outputs, example by example."""
    return sum((weights[:, e, None] * h for e, h in enumerate(experts)), jnp.zeros_like(experts[0]))
