"""Universal hash functions of ids, in 32-bit integers that are the same on every device.

h(x) = ((a x + b) mod p) mod m with the prime p = 2^31 - 1 (Carter & Wegman 1979): two ids share a
row with a probability of 1/m. With k functions an id has k rows, and two ids seldom share them all:
Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning"; Svenstrup et al. 2017,
"Hash Embeddings for Efficient Word Representations", here without their weights of importance.
"""

from __future__ import annotations

import hashlib

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from mtrec_jax.types import FIRST, PAD, UNKNOWN

PRIME = 2**31 - 1


def hash_rows(
    ids: Int[Array, "... M"], owner: str, rows: int, functions: int
) -> Int[Array, "... N"]:
    """Rows of ids in a table of `rows` rows after those of padding and unknown: N = M functions.

    The rows of an id stand side by side. Padding has none (0), unknown has its own row (1) once.

    Args:
      ids: local ids below 2^31 - 1.
      owner: whose ids they are; every owner has functions of its own.
      rows: m, of each function.
      functions: k.

    >>> hash_rows(jnp.array([0, 1, 2, 3]), "context.user", 100, 2).tolist()
    [0, 0, 1, 0, 35, 11, 48, 14]
    """
    found = []
    for function in range(functions):
        a, b = coefficients(owner, function)
        row = affine(ids.astype(jnp.uint32), a, b) % jnp.uint32(rows) + jnp.uint32(FIRST)
        special = jnp.where(ids == UNKNOWN, UNKNOWN if function == 0 else PAD, PAD)
        found.append(jnp.where(ids < FIRST, special, row.astype(ids.dtype)))
    return jnp.stack(found, axis=-1).reshape(*ids.shape[:-1], ids.shape[-1] * functions)


def coefficients(owner: str, function: int) -> tuple[int, int]:
    """a in 1 .. p - 1 and b in 0 .. p - 1 of a function, by its name alone."""
    digest = hashlib.sha256(f"{owner} {function}".encode()).digest()
    a, b = (int.from_bytes(digest[start : start + 8], "little") for start in (0, 8))
    return 1 + a % (PRIME - 1), b % PRIME


def affine(x: UInt32[Array, "..."], a: int, b: int) -> UInt32[Array, "..."]:
    """(a x + b) mod 2^31 - 1 of numbers below 2^31, in 32 bits.

    The factors are cut into halves of 16 bits; as 2^31 = 1 modulo the prime, what lies above 31
    bits is added below. No sum is above 2^32 - 2.

    >>> int(affine(jnp.array(2**31 - 2, jnp.uint32), 12345, 678)) == (12345 * -1 + 678) % PRIME
    True
    """
    low, high = x & 0xFFFF, x >> 16
    a_low, a_high = jnp.uint32(a & 0xFFFF), jnp.uint32(a >> 16)
    middle = a_low * high + a_high * low  # times 2^16
    parts = (a_high * high << 1, middle >> 15, (middle & 0x7FFF) << 16, a_low * low, jnp.uint32(b))
    total = jnp.zeros_like(x)
    for part in parts:
        total = _folded(total + _folded(part))
    return jnp.where(total == PRIME, 0, total)


def _folded(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The same number modulo 2^31 - 1, at most 2^31 - 1 where it is below 2^32 - 1."""
    return (x & PRIME) + (x >> 31)
