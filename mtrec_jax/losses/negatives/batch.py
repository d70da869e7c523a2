"""Negatives that are the next items of others: of this batch, or of the last few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.losses.negatives.contract import Drawn, Pool, State, from_batch
from mtrec_jax.types import FIRST

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class FromBatch:
    """`[train.negatives] kind = "batch"`: next items of positions of the same batch, which follow
    the popularity of the stream. How often each is expected is estimated from how far apart it is a
    next item in the stream (Yi et al., RecSys 2019), and begins with the training counts."""

    kind: Literal["batch"] = "batch"
    count: Count = 512
    rate: Rate = 0.05  # of the moving averages of the gaps
    power = 1.0

    def start(self, items: int) -> State:
        """No gap was seen yet."""
        return first_gaps(items)

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """Positions with replacement."""
        ids = from_batch(pool, self.count, key)
        state = with_gaps(state, pool, self.rate)
        return Drawn(ids, log_frequency(state, pool, ids) + jnp.log(float(self.count))), state


@dataclass(frozen=True, kw_only=True)
class Queue:
    """`[train.negatives] kind = "queue"`: next items of this batch and of batches before it (Wang
    et al., SIGIR 2021). Their vectors are looked up anew, so that none is out of date."""

    kind: Literal["queue"] = "queue"
    count: Count = 2048
    batches: Count = 4  # each of which brings an equal part
    rate: Rate = 0.05  # of the moving averages of the gaps
    power = 1.0

    @property
    def _fresh(self) -> int:
        return self.count // self.batches

    def start(self, items: int) -> State:
        """An empty queue."""
        return first_gaps(items) | {"queue": jnp.zeros(self.count, jnp.int32)}

    def draw(self, pool: Pool, state: State, key: jax.Array) -> tuple[Drawn, State]:
        """The oldest part makes room for positions of this batch, drawn with replacement."""
        fresh = from_batch(pool, self._fresh, key)
        ids = jnp.concatenate([fresh, state["queue"][: -self._fresh]])
        state = with_gaps(state, pool, self.rate) | {"queue": ids}
        filled = jnp.maximum(jnp.sum(ids > 0), 1).astype(jnp.float32)
        return Drawn(ids, log_frequency(state, pool, ids) + jnp.log(filled)), state


def first_gaps(items: int) -> State:
    """Of an item: how many next items there were when it came last, and the mean number of them
    from one time that it comes to the next."""
    size = items + FIRST
    return {
        "met": jnp.zeros((), jnp.uint32),
        "last": jnp.zeros(size, jnp.uint32),
        "gap": jnp.zeros(size, jnp.float32),
    }


def with_gaps(state: State, pool: Pool, rate: float) -> State:
    """The moving averages after the next items of a batch. An item that comes c times has c gaps,
    all of the same length; one that comes for the first time takes that of its training count."""
    ids = jnp.sort(jnp.where(pool.there > 0, pool.positives, 0).reshape(-1))
    times = jnp.searchsorted(ids, ids, side="right") - jnp.searchsorted(ids, ids)
    now = state["met"] + jnp.sum(ids > 0).astype(jnp.uint32)  # wraps around, as differences do
    before = jnp.where(state["gap"][ids] > 0, state["gap"][ids], _counted_gap(pool, ids))
    gap = (now - state["last"][ids]).astype(jnp.float32) / times
    left = (1 - rate) ** times.astype(jnp.float32)
    mean = jnp.where(state["gap"][ids] > 0, left * before + (1 - left) * gap, before)
    mean = jnp.where(ids > 0, mean, 0)  # of padding there is none
    return state | {
        "met": now,
        "last": state["last"].at[ids].set(now),
        "gap": state["gap"].at[ids].set(mean),
    }


def log_frequency(state: State, pool: Pool, ids: jax.Array) -> jax.Array:
    """Log of the share of the draws that are these items; inf of padding, which nobody draws."""
    gap = jnp.where(state["gap"][ids] > 0, state["gap"][ids], _counted_gap(pool, ids))
    return jnp.where(ids > 0, -jnp.log(gap), jnp.inf)


def _counted_gap(pool: Pool, ids: jax.Array) -> jax.Array:
    """The gap that follows from the training counts."""
    return jnp.exp(-jnp.asarray(pool.catalogue.log_probability, jnp.float32)[ids])
