"""What negatives are drawn from, and how often each item is expected among them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mtrec_jax.types import FIRST, Array, Catalogue

State = dict[str, jax.Array]  # what a way to draw remembers from step to step; {}: nothing


class Pool(NamedTuple):
    """What may be drawn: the trained items, ids FIRST .. FIRST + trained - 1, and the batch."""

    catalogue: Catalogue
    trained: int
    positives: jax.Array  # [B, P] ids
    there: jax.Array  # [B, P] 1 where a position has a next item


class Drawn(NamedTuple):
    """Items, with replacement or each of them once."""

    ids: jax.Array  # [n]
    log_expected: jax.Array  # [n]: log of how often each is expected among the n; inf: none there


class Negatives(Protocol):
    """Options of a way to draw negatives: `count`, and a power, to which of how often training is
    to find an item its probability in the catalogue is proportional.

    Some have also `size(trained)`, the number of items that are drawn where this is not `count`;
    `start(items)`, the state before the first step for a catalogue of N items; and `kept(compared,
    key)`, what the loss is given of them once their vectors are known.
    """

    @property
    def power(self) -> float:
        """0: all trained items alike."""

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """The negatives of a step, and the state after it."""


def size_of(negatives: Any, trained: int) -> int:
    """n: how many items are drawn, whose rows a step looks up."""
    size: int = negatives.size(trained) if hasattr(negatives, "size") else negatives.count
    return size


def state_before(negatives: Any, items: int) -> State:
    """The state before the first step."""
    state: State = negatives.start(items) if hasattr(negatives, "start") else {}
    return state


def items_drawn(probability: Array, count: int, key: jax.Array) -> jax.Array:
    """`count` ids drawn with replacement; `probability` is a distribution function by item id,
    times 2^32, as in `Catalogue.cumulative`."""
    # Whole 32-bit numbers: float32 has too few levels for a catalogue of millions.
    drawn = jnp.minimum(jax.random.bits(key, (count,), jnp.uint32), jnp.uint32(2**32 - 2))
    found = jnp.searchsorted(jnp.asarray(probability), drawn, side="right")
    return jnp.maximum(found, FIRST).astype(jnp.int32)


def popular(pool: Pool, count: int, key: jax.Array) -> Drawn:
    """Items by the catalogue's own probabilities."""
    ids = items_drawn(pool.catalogue.cumulative, count, key)
    log_probability = jnp.asarray(pool.catalogue.log_probability)[ids]
    return Drawn(ids, log_probability + jnp.log(jnp.asarray(count, log_probability.dtype)))


def uniform(pool: Pool, count: int, key: jax.Array) -> Drawn:
    """Trained items, each as probable as the others."""
    ids = jax.random.randint(key, (count,), FIRST, FIRST + pool.trained)
    dtype = jnp.asarray(pool.catalogue.log_probability).dtype
    return Drawn(ids, jnp.full(count, jnp.log(count / pool.trained), dtype))


def from_batch(pool: Pool, count: int, key: jax.Array) -> jax.Array:
    """The next items of positions of the batch, each position as probable as the others; PAD where
    the batch has none."""
    flat, there = pool.positives.reshape(-1), pool.there.reshape(-1)
    total = jnp.cumsum(jnp.asarray(there > 0, jnp.int32))
    drawn = jax.random.randint(key, (count,), 0, jnp.maximum(total[-1], 1))
    place = jnp.searchsorted(total, drawn, side="right")
    return jnp.where(total[-1] > 0, flat[jnp.minimum(place, len(flat) - 1)], 0)
