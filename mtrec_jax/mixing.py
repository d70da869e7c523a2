"""Pseudo-random bits of places: the mask of a dropout, the rounding of a bfloat16 row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt32


def mixed_bits(shape: tuple[int, ...], key: Key[Array, ""]) -> UInt32[Array, "..."]:
    """One 32-bit number an entry: a multiply-xorshift mix of its flat index and the key.

    It is computed where it is used, which on CPUs is many times faster than drawing random bits
    into memory, and it does not depend on how an array is split over devices.

    >>> mixed_bits((2, 3), jax.random.key(0)).shape
    (2, 3)
    """
    seed = jax.random.bits(key, (2,), jnp.uint32)
    index = jnp.full(shape, seed[0])
    stride = 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
        index = index + seed[1]
    return index ^ (index >> 15)
