"""What a loss of the retrieval is given, and how it stays small."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

LOGITS = 1 << 22  # of positions with negatives that exist at once on a device, 16 MB


class Compared(NamedTuple):
    """Positions, what follows each of them, and the negatives that all of them share.

    Vectors are of unit length. A negative that is the positive itself does not count.
    """

    users: jax.Array  # [B, P, D]
    positives: jax.Array  # [B, P, D]
    negatives: jax.Array  # [n, D]
    positive_ids: jax.Array  # [B, P]
    negative_ids: jax.Array  # [n]
    log_expected: jax.Array  # [n]: log of how often each is expected among the n
    scale: jax.Array | float  # of the cosine: 1 over the temperature
    weights: jax.Array  # [B, P]
    items: int  # of the catalogue that may be drawn
    shown: jax.Array | None  # [B, P, P]: whether p was also shown candidate p', and chose another


class Loss(Protocol):
    """Options of a loss."""

    def loss(self, compared: Compared) -> jax.Array:
        """The weighted sum of the losses of the positions, []."""


def tile_size(compared: Compared) -> int:
    """How many positions of each example are taken at once: a divisor of P."""
    (batch, length), negatives = compared.positive_ids.shape, len(compared.negative_ids)
    most = max(1, LOGITS * jax.device_count() // max(1, batch * negatives))
    return max(n for n in range(1, length + 1) if length % n == 0 and n <= most)


def tiled(array: jax.Array, size: int) -> jax.Array:
    """[B, P, ...] as [P / size, B, size, ...]; tiles are of positions, as examples may be split
    over devices."""
    batch, length = array.shape[:2]
    parts = array.reshape(batch, length // size, size, *array.shape[2:])
    return jnp.moveaxis(parts, 1, 0)


Pointwise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def over_pairs(compared: Compared, losses: Pointwise) -> jax.Array:
    """Weighted sum of `losses(positive cosine [...], negative cosines [..., n], which count
    [..., n]) -> [...]`.

    Cosines with negatives exist for a few positions at a time, and are made again on the way back.
    """
    size = tile_size(compared)
    own = jnp.sum(compared.users * compared.positives, axis=-1)
    there = compared.log_expected < jnp.inf
    listed = compared.negative_ids.reshape(1, 1, -1)

    @jax.checkpoint
    def one(tile: tuple[jax.Array, ...]) -> jax.Array:
        users, own, ids, weights = tile
        others = jnp.einsum("...d,nd->...n", users, compared.negatives)
        counts = (ids[..., None] != listed) & there.reshape(listed.shape)
        return jnp.sum(losses(own, others, counts.astype(others.dtype)) * weights)

    parts = compared.users, own, compared.positive_ids, compared.weights
    return jnp.sum(jax.lax.map(one, tuple(tiled(part, size) for part in parts)))
