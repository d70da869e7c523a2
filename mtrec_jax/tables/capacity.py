"""Buffers of the exchange of rows, measured on a run's first batches instead of assumed.

Popular ids repeat, so a batch has far fewer distinct ids than places, and how many depends on the
data alone. Buffers that are too small cost further rounds and change no result, so a few batches
are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mtrec_jax import processes
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.tables.exchange import Buffers, BuffersOf, demand
from mtrec_jax.tables.layout import DENSE, Layout
from mtrec_jax.tables.lookup import Ids, find, flat
from mtrec_jax.types import Batch

BATCHES = 4  # of a run, which are measured


def first_batches(source: BatchSource) -> list[Batch]:
    """The batches that are measured: the run's first, of one epoch."""
    return [source[s] for s in range(min(BATCHES, source.batches_per_epoch))]


def measured_buffers(
    layout: Layout,
    ids: Callable[[Batch, jax.Array], Ids],
    batches: Iterable[Batch],
    mesh: Mesh | AbstractMesh,
    seed: int,
) -> BuffersOf:
    """Buffers in which the busiest exchange of the batches takes one round, and a little more.

    Args:
      layout: of the tables.
      ids: tells what a batch looks up: (batch, key of its negatives) -> {group: ids}.
      batches: whole batches, before they are split over devices; one device computes.
      mesh: with the axes "data" and "table"; its devices need not be there.
      seed: of the sampled negatives.

    Returns:
      {stack: buffers} of the sparse stacks; {} on one table shard.
    """
    shards = mesh.shape["table"]
    most: dict[str, tuple[int, int]] = {}
    if shards == 1:
        return {}
    key = jax.random.key(seed, impl="rbg")
    found_of = jax.jit(lambda batch, key: find(layout, ids(batch, key)))
    for number, batch in enumerate(batches):
        found = found_of(batch._replace(row=None), jax.random.fold_in(key, number))
        for stack, by_group in found.items():
            if stack == DENSE:
                continue
            wanted, rows = flat(by_group, mesh.size), layout.rows[stack]
            sent = int(demand(wanted, rows, mesh).max())
            distinct = np.unique(np.asarray(wanted))
            owners = distinct[distinct >= 0] // (rows // shards)
            touched = int(np.bincount(owners, minlength=shards).max())
            before = most.get(stack, (0, 0))
            most[stack] = max(before[0], sent), max(before[1], touched)
    return {stack: Buffers(_with_margin(p), _with_margin(w)) for stack, (p, w) in most.items()}


def _with_margin(count: int) -> int:
    """Half a standard deviation of a count above the highest that was seen, in any process: all
    have to compile the same program."""
    count = processes.largest(count)
    return max(1, count + math.ceil(math.sqrt(count) / 2))
