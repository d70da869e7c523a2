"""Unit vectors and dot products whose bits depend on the two vectors alone.

A matrix product adds in an order that depends on its shape, its place in the matrix and the device.
The streams use it to find candidates; the scores that are returned, and compared, are made here:
each factor is split into two halves of its digits, so that every product is exact and it makes no
difference whether a compiler fuses it with the addition after it, and the products are added as a
balanced tree. `mtrec_jax.kernels.reference` does the same in NumPy, bit for bit.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Digits of the lower half of a number, the bits of its mantissa that are cleared in the upper half.
LOWER_BITS = {"float32": 12, "float64": 27}


def dot(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Float[Array, " ..."]:
    """Dot products over the last axis, the others broadcast; the same bits wherever they are made.

    The error is below (log2 D + 6) u |a| |b| with the unit roundoff u; no overflow is caught.

    >>> float(dot(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])))
    11.0
    """
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    middle = tree(a_high * b_low) + tree(a_low * b_high)
    found = tree(a_high * b_high) + (middle + tree(a_low * b_low))
    return jnp.where(found == 0, 0, found)  # without a sign, which sorting would see


def _halves(
    x: Float[Array, "... D"],
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """The number rounded to its first digits, and the rest; together exactly the number."""
    bits = LOWER_BITS[str(x.dtype)]
    whole = jnp.int32 if x.dtype == jnp.float32 else jnp.int64
    half, mask = jnp.array(1 << (bits - 1), whole), jnp.array(-1 << bits, whole)
    rounded = (lax.bitcast_convert_type(x, whole) + half) & mask
    high = lax.bitcast_convert_type(rounded, x.dtype)
    return high, x - high


def tree(x: Float[Array, "... D"]) -> Float[Array, " ..."]:
    """The sum over the last axis: the second half is added to the first until one is left."""
    width = x.shape[-1]
    if width == 0:
        return jnp.zeros(x.shape[:-1], x.dtype)
    full = 1 << (width - 1).bit_length()
    if full != width:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, full - width)])
    while full > 1:
        full //= 2
        x = x[..., :full] + x[..., full:]
    return x[..., 0]


def normalise(vectors: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Rows [..., D] divided by their L2 norm; a zero row stays zero.

    Rows are first divided by their largest magnitude, so that squares neither overflow nor vanish
    and parallel rows such as [1, 2] and [3, 6] become equal to the last bit. A row whose largest
    magnitude is below the smallest normal number counts as zero.

    >>> normalise(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6..., 0.8...], [0.0, 0.0]]
    """
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True, initial=0)
    is_zero = largest < jnp.finfo(vectors.dtype).tiny
    safe = jnp.where(is_zero, 1, vectors)
    # Neither maximum changes its second part, but XLA would multiply with the reciprocal of a
    # divisor that is broadcast, which rounds parallel rows apart.
    scaled = lax.optimization_barrier(safe / jnp.maximum(jnp.abs(safe), largest))
    norm = lax.optimization_barrier(jnp.sqrt(dot(scaled, scaled)))[..., None]
    return jnp.where(is_zero, 0, scaled / jnp.maximum(jnp.abs(scaled), norm))
