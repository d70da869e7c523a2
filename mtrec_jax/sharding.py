"""The device mesh, and which array is split over which of its axes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.errors import ConfigError
from mtrec_jax.types import Batch, PyTree, TrainState

AXES = ("data", "table")
AnyMesh = Mesh | AbstractMesh  # of devices, or of their number alone
ROW_MULTIPLE = 128  # tables are rounded up to this many rows, so that they divide over the shards


def make_mesh(shape: tuple[int, int] = (0, 1)) -> Mesh:
    """A mesh with axes ("data", "table"); 0 stands for all devices that are left.

    Raises:
      ConfigError: the devices at hand do not fill the shape.

    >>> make_mesh((1, 1)).shape["data"]
    1
    """
    data, table = check_mesh(shape, jax.device_count())
    if jax.process_count() > 1 and data * table != jax.device_count():
        raise ConfigError(
            f"train.mesh: {list(shape)} makes {data * table} devices; with several processes it "
            f"has to take all {jax.device_count()} of them: [0, 1] splits batches, [1, 0] tables"
        )
    devices = np.asarray(jax.devices()[: data * table]).reshape(data, table)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def check_mesh(shape: tuple[int, int], available: int) -> tuple[int, int]:
    """The shape over so many devices, with those that are left in the place of 0.

    Raises:
      ConfigError: the devices do not fill it, or tables do not divide over it.

    >>> check_mesh((0, 2), 8)
    (4, 2)
    """
    data, table = mesh_shape(shape, available)
    if min(data, table) < 1 or data * table > available:
        raise ConfigError(
            f"train.mesh: {list(shape)} needs {data * table} devices, there are {available}; "
            "[0, 1] takes all there are, [1, 1] takes one"
        )
    if ROW_MULTIPLE % table:
        raise ConfigError(
            f"train.mesh: {table} table shards; tables have {ROW_MULTIPLE} equal parts, so that 1, "
            "2, 4 ... 128 shards are possible"
        )
    return data, table


def mesh_shape(shape: tuple[int, int], devices: int) -> tuple[int, int]:
    """The shape with all devices that are left, at least one, in the place of 0.

    Raises:
      ConfigError: 0 stands twice.

    >>> mesh_shape((0, 2), 8)
    (4, 2)
    """
    data, table = shape
    if max(shape) < 1:
        raise ConfigError(f"train.mesh: {list(shape)}: 0, all that are left, can stand once only")
    left = max(1, devices // max(shape))
    return data or left, table or left


def check_batch_size(batch_size: int, mesh: AnyMesh, parts: int = 1) -> None:
    """Raise `ConfigError` unless a batch, or each of its parts, divides over all devices."""
    if batch_size % (parts * mesh.size) and parts > 1:
        raise ConfigError(
            f"train.batch_size, train.accumulate: {batch_size} does not divide into {parts} parts "
            f"over {mesh.size} devices; use a multiple of {parts * mesh.size}, or fewer parts"
        )
    if batch_size % mesh.size:
        raise ConfigError(
            f"train.batch_size: {batch_size} does not divide over {mesh.size} devices; "
            f"use a multiple of {mesh.size}, or fewer devices (one trains with train.mesh = [1, 1])"
        )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Split a batch of NumPy arrays over all devices along its first axis.

    Several processes pass the same batch; each places what belongs to its own devices.
    """
    if jax.process_count() == 1:
        return put_own(batch, mesh)
    places = own_places(mesh, len(batch.user))
    return put_own(jax.tree.map(lambda array: array[places], batch), mesh)


def put_own(batch: Batch, mesh: Mesh) -> Batch:
    """One batch over all devices, of which each process passes an equal part."""
    host = batch._replace(row=None)  # source rows are the host's alone
    if jax.process_count() == 1:
        return _splitter(mesh)(host)
    split = NamedSharding(mesh, P(AXES))
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(split, np.ascontiguousarray(array)),
        host,
    )


def own_places(mesh: Mesh, size: int) -> np.ndarray:
    """Which examples of a batch belong to this process's devices, ascending."""
    parts = NamedSharding(mesh, P(AXES)).addressable_devices_indices_map((size,)).values()
    return np.sort(np.concatenate([np.arange(size)[part] for part in parts if part is not None]))


def own_part(tree: PyTree, mesh: Mesh) -> PyTree:
    """This process's examples of arrays that are split like a batch, on its first device."""
    if mesh.size == 1:
        return tree
    device = jax.local_devices()[0]

    def joined(array: jax.Array) -> jax.Array:
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return jnp.concatenate([jax.device_put(shard.data, device) for shard in shards])

    return jax.tree.map(joined, tree)


def own_copy(tree: PyTree, mesh: Mesh) -> PyTree:
    """Arrays that every device holds whole, as they are on the first device of this process."""
    return tree if mesh.size == 1 else jax.tree.map(lambda array: array.addressable_data(0), tree)


def replicated(tree: PyTree, mesh: Mesh) -> PyTree:
    """The same arrays, whole on every device; in `jax.jit`."""
    return jax.lax.with_sharding_constraint(tree, whole_on(mesh))


def cut_examples(tree: PyTree, parts: int, mesh: Mesh) -> PyTree:
    """Arrays [B, ...] that are split over all devices -> [parts, B / parts, ...]; in `jax.jit`.

    Every device cuts what it has, so that nothing is sent: its examples are in part 0, 1, ...
    """

    def cut(array: jax.Array) -> jax.Array:
        rest, size = array.shape[1:], array.shape[0] // (parts * mesh.size)
        array = jnp.swapaxes(array.reshape(mesh.size, parts, size, *rest), 0, 1)
        array = array.reshape(parts, mesh.size * size, *rest)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(None, AXES)))

    return jax.tree.map(cut, tree)


def joined_examples(tree: PyTree, mesh: Mesh) -> PyTree:
    """The way back from `cut_examples`: [parts, B / parts, ...] -> [B, ...]; in `jax.jit`."""

    def join(array: jax.Array) -> jax.Array:
        parts, rest = array.shape[0], array.shape[2:]
        array = array.reshape(parts, mesh.size, array.shape[1] // mesh.size, *rest)
        array = jnp.swapaxes(array, 0, 1).reshape(-1, *rest)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, P(AXES)))

    return jax.tree.map(join, tree)


@functools.cache
def _splitter(mesh: Mesh) -> Callable[[Batch], Batch]:
    """The identity: the fastest way to a device for many small arrays (a third of device_put)."""
    split = NamedSharding(mesh, P(AXES))
    return jax.jit(lambda batch: batch, in_shardings=split, out_shardings=split)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Place every leaf whole on every device."""
    return jax.device_put(tree, whole_on(mesh))


def whole_on(mesh: AnyMesh) -> NamedSharding:
    """Every device has all of an array."""
    return NamedSharding(mesh, P())


def by_row_on(mesh: AnyMesh) -> NamedSharding:
    """Tables: rows are split over "table"."""
    return NamedSharding(mesh, P("table"))


def state_shardings(state: TrainState, mesh: AnyMesh) -> TrainState:
    """Shardings of a state: sparse tables and their slots by row over "table", the rest whole."""
    whole, by_row = whole_on(mesh), by_row_on(mesh)

    def fill(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda _: sharding, tree)

    filled = TrainState(*(fill(part, whole) for part in state))
    return filled._replace(
        tables=fill(state.tables, by_row),
        slots=fill(state.slots, by_row),
        scratch=fill(state.scratch, by_row),
    )
