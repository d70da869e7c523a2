"""The device mesh, and which array is split over which of its axes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.errors import ConfigError
from mtrec_jax.types import Batch, PyTree, TrainState

AXES = ("data", "table")
ROW_MULTIPLE = 128  # tables are rounded up to this many rows, so that they divide over the shards


def make_mesh(shape: tuple[int, int] = (0, 1)) -> Mesh:
    """A mesh with axes ("data", "table"); 0 stands for all devices that are left.

    Raises:
      ConfigError: the devices at hand do not fill the shape.

    >>> make_mesh((1, 1)).shape["data"]
    1
    """
    data, table = shape
    available = jax.device_count()
    left = max(1, available // max(data, table, 1))
    data, table = data or left, table or left
    if min(data, table) < 1 or data * table > available:
        raise ConfigError(
            f"train.mesh: {list(shape)} needs {data * table} devices, there are {available}; "
            "[0, 1] takes all there are, [1, 1] takes one"
        )
    if ROW_MULTIPLE % table:
        raise ConfigError(f"train.mesh: {table} table shards do not divide {ROW_MULTIPLE} rows")
    devices = np.asarray(jax.devices()[: data * table]).reshape(data, table)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise `ConfigError` unless a batch divides over all devices of the mesh."""
    if batch_size % mesh.size:
        raise ConfigError(
            f"train.batch_size: {batch_size} does not divide over {mesh.size} devices; "
            f"use a multiple of {mesh.size}, or fewer devices with train.mesh = [1, 1]"
        )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Split a batch of NumPy arrays over all devices along its first axis."""
    host = batch._replace(row=batch.row.astype(np.int32))  # devices hold 32-bit integers
    return _splitter(mesh)(host)


@functools.cache
def _splitter(mesh: Mesh) -> Callable[[Batch], Batch]:
    """The identity: the fastest way to a device for many small arrays (a third of device_put)."""
    split = NamedSharding(mesh, P(AXES))
    return jax.jit(lambda batch: batch, in_shardings=split, out_shardings=split)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Place every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def model_shardings(
    params: PyTree, tables: dict[str, Any], mesh: Mesh
) -> tuple[PyTree, dict[str, Any]]:
    """Abstract parameters and sparse tables with the shardings that they have in a state."""

    def place(x: Any, split: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, split))

    by_row = jax.tree.map(lambda x: place(x, P("table")), tables)
    return jax.tree.map(lambda x: place(x, P()), params), by_row


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of a state: sparse tables and their slots by row over "table", the rest whole."""
    whole, by_row = NamedSharding(mesh, P()), NamedSharding(mesh, P("table"))

    def fill(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda _: sharding, tree)

    filled = TrainState(*(fill(part, whole) for part in state))
    return filled._replace(
        tables=fill(state.tables, by_row),
        slots=fill(state.slots, by_row),
        scratch=fill(state.scratch, by_row),
    )
