"""Buffers of the exchange of rows, measured on a run's first batches instead of assumed.

Popular ids repeat, so a batch has far fewer distinct ids than places, and how many depends on the
data alone. Buffers that are too small cost further rounds and change no result, so a few batches
are enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from mtrec_jax import processes
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.models.model import Model
from mtrec_jax.tables.exchange import Buffers, demand
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import BuffersOf, flat
from mtrec_jax.types import Batch, Catalogue

BATCHES = 4  # of a run, which are measured


def first_batches(source: BatchSource) -> list[Batch]:
    """The batches that are measured: the run's first, of one epoch."""
    return [source[s] for s in range(min(BATCHES, source.batches_per_epoch))]


def measured_buffers(
    model: Model,
    catalogue: Catalogue,
    batches: Iterable[Batch],
    mesh: Mesh | AbstractMesh,
    rows: dict[str, int],
    seed: int,
) -> BuffersOf:
    """Buffers in which the busiest exchange of the batches takes one round, and a little more.

    Args:
      model: tells which rows a batch touches.
      catalogue: NumPy arrays; everything is computed on one device.
      batches: whole batches, before they are split over devices.
      mesh: with the axes "data" and "table"; its devices need not be there.
      rows: {stack: V}, as `network.make_plan` lays them out.
      seed: of the sampled negatives.

    Returns:
      {stack: buffers} of the stacks that are updated row by row; {} on one table shard.
    """
    shards = mesh.shape["table"]
    most: dict[str, tuple[int, int]] = {}
    if shards == 1:
        return {}
    key = jax.random.key(seed, impl="rbg")
    look_up = jax.jit(model.lookups)
    for number, batch in enumerate(batches):
        host = batch._replace(row=batch.row.astype(np.int32))  # devices hold 32-bit integers
        found = look_up(host, catalogue, jax.random.fold_in(key, number)).addresses
        for stack, by_role in found.items():
            if stack == DENSE:
                continue
            ids = flat(by_role, mesh.size)
            sent = int(demand(ids, rows[stack], mesh).max())
            distinct = np.unique(np.asarray(ids))
            owners = distinct[distinct >= 0] // (rows[stack] // shards)
            touched = int(np.bincount(owners, minlength=shards).max())
            before = most.get(stack, (0, 0))
            most[stack] = max(before[0], sent), max(before[1], touched)
    return {stack: Buffers(_with_margin(p), _with_margin(w)) for stack, (p, w) in most.items()}


def _with_margin(count: int) -> int:
    """Half a standard deviation of a count above the highest that was seen, in any process: all
    have to compile the same program."""
    count = processes.largest(count)
    return max(1, count + math.ceil(math.sqrt(count) / 2))
