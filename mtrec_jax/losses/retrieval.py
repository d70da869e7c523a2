"""What teaches the two towers: the retrieval of the next item among sampled ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtrec_jax.kernels.softmax import softmax_loss
from mtrec_jax.models.layers import unit_length
from mtrec_jax.types import FIRST, Catalogue

LOGITS = 1 << 22  # of the retrieval softmax that exist at once on a device, 16 MB


def sampled_softmax(
    users: Float[Array, "B P D"],
    positives: Float[Array, "B P D"],
    positive_ids: Int[Array, "B P"],
    negatives: Float[Array, "n D"],
    negative_ids: Int[Array, " n"],
    catalogue: Catalogue,
    temperature: float,
    weights: Float[Array, "B P"],
) -> Float[Array, ""]:
    """Softmax cross-entropy of the cosine with shared sampled negatives and logQ correction.

    The partition function is estimated by importance sampling: with n negatives drawn with
    probability q, Z = exp(s+) + sum_j exp(s_j - log(n q_j)) over the negatives that are not the
    positive itself (Bengio & Senecal 2008; Yi et al., RecSys 2019). Logits exist for a few
    positions at a time, never as B·P·n. Returns the weighted sum of the positions' losses.
    """
    u, v = unit_length(users) / temperature, unit_length(negatives)
    positive = jnp.sum(u * unit_length(positives), axis=-1)
    log_expected = jnp.asarray(catalogue.log_probability)[negative_ids]
    log_expected = log_expected + jnp.log(jnp.asarray(len(negative_ids), u.dtype))
    # Tiles are of positions, as examples may be split over devices.
    batch, length = positive.shape
    most = LOGITS * jax.device_count() // (batch * len(negative_ids))
    some = max(n for n in range(1, length + 1) if length % n == 0 and n <= max(1, most))

    def tiled(array: Array) -> Array:
        return jnp.moveaxis(array, 1, 0).reshape(-1, some, batch, *array.shape[2:])

    return softmax_loss(
        tiled(u),
        v,
        negative_ids,
        tiled(positive_ids),
        tiled(positive),
        -log_expected,
        tiled(weights),
    )


def sample_negatives(catalogue: Catalogue, count: int, key: jax.Array) -> jax.Array:
    """`count` item ids drawn with replacement from the catalogue's sampling distribution."""
    # Whole 32-bit numbers: float32 has too few levels for a catalogue of millions.
    drawn = jnp.minimum(jax.random.bits(key, (count,), jnp.uint32), jnp.uint32(2**32 - 2))
    found = jnp.searchsorted(jnp.asarray(catalogue.cumulative), drawn, side="right")
    return jnp.maximum(found, FIRST).astype(jnp.int32)
