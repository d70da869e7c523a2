"""Before a run: where each table goes on the devices, and what a step takes there.

    found = plan(load_experiment("shop"), devices=8, prepared=open_prepared("prepared/shop"))

The step is compiled as training compiles it, over virtual devices where there are too few, and
nothing is allocated: what is stored follows from shapes and shardings, working memory and what is
exchanged from XLA's account of the compiled program.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.arguments import bytes_text
from mtrec_jax.config import Experiment, table_of
from mtrec_jax.data.assumed import assumed_manifest, batch_shapes, resized
from mtrec_jax.data.dataset import Manifest, Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import ConfigError
from mtrec_jax.models.inputs import shared_name
from mtrec_jax.models.model import Model, make_catalogue, make_model
from mtrec_jax.models.serve import load_catalogue
from mtrec_jax.sharding import AXES, ROW_MULTIPLE, check_batch_size, check_mesh, make_mesh
from mtrec_jax.tables.exchange import Buffers, BuffersOf
from mtrec_jax.tables.layout import DENSE, Layout
from mtrec_jax.train.loop import exchange_buffers, steps_in_flight
from mtrec_jax.train.step import make_step
from mtrec_jax.types import FIRST, Catalogue, PyTree, TrainState


class Table(NamedTuple):
    """Where one embedding table goes."""

    name: str
    stack: str
    rows: int
    rule: str  # of its rows; where they are dense, train.optimizer
    split: int  # devices that it is split over; 1: each has all of it
    bytes: int  # of a device: rows, slots and scratch, or rows and the optimizer's moments


class Collective(NamedTuple):
    """All collectives of a step of one kind over as many devices."""

    how: str  # "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute"
    over: int  # devices that take part
    times: int
    size: int  # bytes of the results on a device

    @property
    def sent(self) -> float | int:
        """Bytes that a device sends, by the ring algorithms.

        >>> Collective("all-reduce", 4, 1, 100).sent
        150.0
        """
        if self.how == "collective-permute":
            return self.size
        passes = {"all-reduce": 2, "reduce-scatter": self.over}.get(self.how, 1)
        return passes * self.size * (self.over - 1) / self.over


class Compiled(NamedTuple):
    """XLA's account of a compiled step."""

    working: int  # bytes of a device beside its arguments
    collectives: tuple[Collective, ...]  # where each exchange of rows takes one round


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """What `plan` finds; bytes are those of one device."""

    experiment: Experiment
    mesh: tuple[int, int]  # devices on ("data", "table")
    device_memory: float | int
    tables: tuple[Table, ...]
    memory: dict[str, int]  # {what: bytes}
    collectives: tuple[Collective, ...]
    buffers: dict[str, Buffers]  # of the exchange by stack, measured on the run's first batches;
    # {}: no table is split, or there are no batches: all ids count as distinct

    @property
    def bytes(self) -> int:
        """Of a device's memory, in all."""
        return sum(self.memory.values())


def plan(
    experiment: Experiment,
    devices: int = 0,
    prepared: Prepared | None = None,
    rows: Mapping[str, int] | None = None,
    device_memory: float | int = 80e9,
) -> DevicePlan:
    """Plan a run on devices that need not be here.

    Where there are fewer here, a process with virtual ones compiles the step: a script calls this
    below `if __name__ == "__main__":`.

    Args:
      experiment: what is to be trained; `train.mesh` says how many devices share a table.
      devices: how many there are; 0: those of this machine.
      prepared: data; without `rows`, its first batches say how many ids are distinct.
      rows: {feature, or "item": values}, instead of those of the data; without prepared data, all
        that the configuration does not fix, and the classes of multiclass and ordinal tasks.
      device_memory: bytes of one device.

    Raises:
      ConfigError: it does not fit; or a size is missing, or the data were prepared otherwise.

    >>> from mtrec_jax import parse_experiment
    >>> clicks = parse_experiment({
    ...     "name": "clicks", "split": {"kind": "random"}, "data": {"history_length": 0},
    ...     "features": {"user": {"on": "request"}}, "tasks": {"click": {"kind": "binary"}},
    ...     "tables": {"user": {"update": "sparse"}}, "train": {"steps": 10, "mesh": [1, 1]},
    ...     "model": {"encoder": "none", "towers": "shared_bottom", "fusion": "none"}})
    >>> found = plan(clicks, devices=1, rows={"user": 1_000_000})
    >>> found.memory["tables"], found.tables[0].rule
    (256016384, 'lazy_adam')
    """
    rows = rows or {}
    mesh = check_mesh(experiment.train.mesh, devices or jax.device_count())
    abstract = AbstractMesh(mesh, AXES)
    check_batch_size(experiment.train.batch_size, abstract, experiment.train.accumulate)
    if prepared is None:
        manifest = assumed_manifest(experiment, rows)
    else:
        prepared = prepared.chosen(experiment)
        manifest = resized(prepared.manifest, rows)
    model = make_model(experiment, manifest)
    buffers = {} if prepared is None or rows else _measured(experiment, prepared, model, abstract)
    state = make_step(experiment, model, abstract, 1).abstract
    tables = tuple(_tables(experiment, model.layout, state, mesh[1]))
    memory = stored_bytes(experiment, manifest, state, math.prod(mesh))
    _check_fits(experiment, mesh, memory, tables, device_memory)
    compiled = _compiled(experiment, manifest, mesh, buffers)
    memory["working memory"] = compiled.working
    _check_fits(experiment, mesh, memory, tables, device_memory)
    return DevicePlan(
        experiment=experiment,
        mesh=mesh,
        device_memory=device_memory,
        tables=tables,
        memory=memory,
        collectives=compiled.collectives,
        buffers=buffers,
    )


def _measured(
    experiment: Experiment, prepared: Prepared, model: Model, mesh: AbstractMesh
) -> BuffersOf:
    """Buffers of the exchange as training would measure them on its first batches, which say
    nothing of tables of other sizes."""
    config = experiment.train
    source = BatchSource(prepared, "train", config.batch_size, config.seed, 1, config.precision)
    return exchange_buffers(model, load_catalogue(prepared, experiment), source, mesh, config.seed)


def stored_bytes(
    experiment: Experiment, manifest: Manifest, state: TrainState, devices: int
) -> dict[str, int]:
    """Bytes that lie on each device for the whole run, and of its parts of batches, by what it is.

    `state` has the shapes and shardings of a step's state.
    """
    batch = batch_shapes(experiment, manifest)
    rest = state._replace(tables=(), slots=(), scratch=(), params=())  # type: ignore[arg-type]
    return {
        "tables": _on_device(state.tables),
        "slots": _on_device(state.slots),
        "scratch": _on_device(state.scratch),
        "dense parameters": _on_device(state.params),
        "their optimizer": _on_device(rest),
        "catalogue": _on_device(catalogue_shapes(experiment, manifest)),
        "batches": steps_in_flight() * _on_device(batch) // devices,
    }


def catalogue_shapes(experiment: Experiment, manifest: Manifest) -> Catalogue:
    """Shapes and types of the catalogue, which every device holds whole."""
    ids = sum(field.slots for field in manifest.item_ids)
    numbers = sum(field.slots for field in manifest.item_numbers)
    one = {
        "ids": np.zeros((1 + FIRST, ids), np.int32),
        "numbers": np.zeros((1 + FIRST, numbers), np.int32),
    }
    made = make_catalogue(one, np.ones(1), 1, 0.0, experiment.train.precision)
    rows = manifest.items + FIRST
    shapes = [jax.ShapeDtypeStruct((rows, *part.shape[1:]), part.dtype) for part in made]
    return Catalogue(*shapes)  # type: ignore[arg-type]


def _on_device(tree: PyTree) -> int:
    """Bytes of all arrays, or of the parts of them that lie on each device."""
    shapes = (
        (leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape, leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def _tables(experiment: Experiment, layout: Layout, state: TrainState, shards: int) -> list[Table]:
    found = []
    for name, place in layout.places.items():
        stack, is_dense = place.stack, place.stack == DENSE
        if is_dense:
            copies = 1 + _on_device(state.optimizer) // _on_device(state.params)
            whole = copies * _on_device(state.params[DENSE])
        else:
            whole = _on_device([part[stack] for part in (state.tables, state.slots, state.scratch)])
        of = (
            experiment.train.optimizer if is_dense else table_of(experiment, shared_name(name)).rule
        )
        size = whole * place.size // layout.rows[stack]
        found.append(Table(name, stack, place.size, of, 1 if is_dense else shards, size))
    return found


def _check_fits(
    experiment: Experiment,
    mesh: tuple[int, int],
    memory: dict[str, int],
    tables: Sequence[Table],
    device_memory: float | int,
) -> None:
    """Raise `ConfigError` with the numbers, and with the settings that would change them."""
    needed, devices = sum(memory.values()), math.prod(mesh)
    if needed <= device_memory:
        return
    dense = [table for table in tables if table.stack == DENSE]
    largest = max(dense, key=lambda table: table.rows).name if dense else "NAME"
    of_rows = [f"more devices a table (train.mesh = {list(mesh)})"] * (mesh[1] < ROW_MULTIPLE)
    of_rows += ['train.row_precision = "bfloat16"'] * (experiment.train.row_precision == "same")
    of_rows += ["a rule with small slots (rowwise_adagrad, sgd)", "tables.NAME.hash_rows"]
    of_dense = f'tables.{largest}.update = "sparse", model.width'
    ways = {
        **dict.fromkeys(("tables", "slots", "scratch"), ", ".join(of_rows)),
        **dict.fromkeys(("dense parameters", "their optimizer"), of_dense),
        "catalogue": "fewer items or features of items, as each device has them all",
    }
    parts = ", ".join(f"{what} {bytes_text(size)}" for what, size in memory.items() if size)
    way = ways.get(max(memory, key=lambda part: memory[part]))
    raise ConfigError(
        f"{experiment.name} needs {bytes_text(needed)} on each of {devices} devices, which have "
        f"{bytes_text(device_memory)}: {parts}. What matters here: "
        f"{way or 'train.batch_size, train.accumulate, more devices'}"
    )


# --- The compiled step


def compiled_step(
    experiment: Experiment, manifest: Manifest, mesh: tuple[int, int], buffers: BuffersOf
) -> Compiled:
    """Compile the step of an experiment over devices that are here, and run nothing."""
    devices = make_mesh(mesh)
    step = make_step(experiment, make_model(experiment, manifest), devices, 1, None, buffers)

    def placed(tree: PyTree, spec: P) -> PyTree:
        where = NamedSharding(devices, spec)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)

    batch = placed(batch_shapes(experiment, manifest), P(AXES))
    catalogue = placed(catalogue_shapes(experiment, manifest), P())
    lowered = step.update.lower(step.abstract, batch, catalogue)  # type: ignore[attr-defined]
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return Compiled(
        int(memory.temp_size_in_bytes), collectives_in(compiled.as_text(), devices.size)
    )


def _compiled(
    experiment: Experiment, manifest: Manifest, mesh: tuple[int, int], buffers: BuffersOf
) -> Compiled:
    """`compiled_step`, in a process of its own with virtual devices where here are too few."""
    devices, given = math.prod(mesh), (experiment, manifest, mesh, buffers)
    if devices <= jax.device_count():
        return compiled_step(*given)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _use_virtual_devices, (devices,)) as pool:
        return pool.submit(compiled_step, *given).result()


def _use_virtual_devices(count: int) -> None:
    """Before JAX has looked for devices."""
    name = "--xla_force_host_platform_device_count"
    flags = re.sub(rf"{name}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    os.environ["XLA_FLAGS"] = f"{flags} {name}={count}"
    jax.config.update("jax_platforms", "cpu")


_COLLECTIVE = re.compile(
    r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\("
)


def collectives_in(program: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of a compiled program, of every kind together.

    The body of a loop counts as often as it runs where that is known, else once. Those over one
    device move nothing.

    >>> line = "%a = f32[8,2]{1,0} all-reduce(%b), replica_groups={{0,1},{2,3}}, to_apply=%add"
    >>> collectives_in(line, 4)
    (Collective(how='all-reduce', over=2, times=1, size=64),)
    """
    counted = re.findall(r'body=(%[^,]+),.*"known_trip_count":\{"n":"(\d+)"', program)
    runs, times = {body: int(n) for body, n in counted}, 1
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?(%\S+) \(", line):
            times = runs.get(header[1], 1)
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        result, how, starts = match.groups()
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        if starts and how in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :]  # what it is given comes first
        over = _group_size(line, devices)
        if over > 1:
            size = sum(_bytes_of(kind, _integers(shape)) for kind, shape in arrays)
            count, total = found.get((how, over), (0, 0))
            found[how, over] = count + times, total + times * size
    return tuple(Collective(*kind, *sums) for kind, sums in sorted(found.items()))


def _group_size(line: str, devices: int) -> int:
    """Devices that exchange with each other, in any of the ways in which XLA writes them.

    >>> known = "{{0,1},{2,3}}", "[2,4]<=[8]", "mesh['a'=2,'b'=4] {'b'}", "mesh['a'=8] {'a':(1)2}"
    >>> [_group_size(f"replica_groups={groups}", 8) for groups in (*known, "{}")]
    [2, 4, 4, 2, 8]
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(_integers(listed[1]))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(counted[2])
    if by_axis := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", by_axis[1]))
        axes = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", by_axis[2])  # a part of an axis has a size
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _bytes_of(kind: str, shape: list[int]) -> int:
    """Bytes of an array of "bf16", "s32", "pred" ..."""
    bits = re.search(r"\d+", kind)
    return math.prod(shape) * (int(bits[0]) // 8 if bits else 1)
