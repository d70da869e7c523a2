"""Before a run: where each table goes on the devices, and what a step will cost there.

    print_plan(plan(load_experiment("shop"), devices=8, prepared=open_prepared("prepared/shop")))

Nothing is allocated: what is stored follows from shapes, working memory and arithmetic from XLA's
account of the compiled step. What does not fit is refused, with the nearest change that fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh

from mtrec_jax.config import Experiment
from mtrec_jax.data.assumed import assumed_manifest, resized
from mtrec_jax.data.dataset import Manifest, Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.inference import load_catalogue
from mtrec_jax.models.model import make_model
from mtrec_jax.models.network import Plan as Layout
from mtrec_jax.models.network import make_plan
from mtrec_jax.planner_changes import changes, placements_of
from mtrec_jax.quantities import quantity_text
from mtrec_jax.sharding import AXES, ROW_MULTIPLE, check_batch_size, mesh_shape
from mtrec_jax.tables.capacity import first_batches, measured_buffers
from mtrec_jax.tables.exchange import Buffers, default_buffers
from mtrec_jax.tables.layout import DENSE, MOST_ROWS, Field
from mtrec_jax.train.costs import (
    Moved,
    Work,
    moved_by_step,
    places_of_batch,
    size_of,
    state_shapes,
    stored_bytes,
    work_of_share,
    working_memory,
)
from mtrec_jax.train.run import check_prepared
from mtrec_jax.types import TrainState


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device can do; the defaults are those of a large accelerator of 2021."""

    memory: float = 80e9  # bytes
    memory_bandwidth: float = 2e12  # bytes a second
    bandwidth: float = 25e9  # bytes a second, through the network
    latency: float = 1e-5  # seconds before a collective's first byte
    flops: float = 50e12  # a second, of float32 matrix products


@dataclass(frozen=True, kw_only=True)
class Table:
    """Where one embedding table goes."""

    owner: str
    stack: str
    rows: int
    per_device: int  # bytes: rows, slots and scratch
    why: str


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """What `plan` finds; bytes are those of one device."""

    experiment: Experiment
    mesh: tuple[int, int]  # devices on ("data", "table")
    device: Device
    tables: tuple[Table, ...]
    memory: dict[str, int]  # {what: bytes}
    moved: tuple[Moved, ...]  # the collectives of a step
    buffers: dict[str, Buffers]  # of the exchange, by stack
    measured: bool  # the buffers, on the run's first batches; otherwise all ids count as distinct
    seconds: dict[str, float]  # of a step, by "memory reads", "network" and "compute"

    @property
    def bytes(self) -> int:
        """Of a device's memory, in all."""
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        """Reads and arithmetic overlap, the network waits for both."""
        seconds = self.seconds
        return max(seconds["memory reads"], seconds["compute"]) + seconds["network"]

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])


def plan(
    experiment: Experiment,
    devices: int = 0,
    prepared: Prepared | None = None,
    rows: Mapping[str, int] | None = None,
    device: Device | None = None,
) -> DevicePlan:
    """Plan a run on devices that need not be here.

    Args:
      experiment: what is to be trained. `train.mesh` is taken as it is; at its default, tables are
        split over as few devices as their size allows.
      devices: how many there are; 0: those of this machine.
      prepared: data, whose first batches say how many ids are distinct.
      rows: {feature, or "item": values}, instead of those of the data; without prepared data, all
        that the configuration does not fix.
      device: memory and speeds of one device.

    Raises:
      ConfigError: it does not fit, and what would; or a size is missing, or the data were prepared
        otherwise (placements apart).

    >>> from mtrec_jax import load_experiment
    >>> small = ["train.batch_size=256", "model.towers=shared_bottom", "model.fusion=none"]
    >>> shop = load_experiment("shop", [*small, "model.item_placement=sparse"])
    >>> sizes = dict.fromkeys(["item", "segment", "age_group", "category", "brand"], 1000)
    >>> sizes |= dict.fromkeys(["click", "cart", "buy", "stars"], 2)
    >>> plan(shop, devices=8, rows=sizes).mesh
    (8, 1)
    """
    devices, device, rows = devices or jax.device_count(), device or Device(), rows or {}
    for name, size in rows.items():
        if size > MOST_ROWS:
            remedy = '; hash them into fewer (kind = "hashed", buckets = 1_000_000_000)'
            raise ConfigError(
                f"--rows {name}: {size:,} values are more than the {MOST_ROWS:,} that can have a "
                f"number{'' if name == 'item' else remedy}"
            )
    if prepared is None:
        manifest = assumed_manifest(experiment, rows)
    else:
        check_prepared(_placed_as(prepared, experiment), prepared)
        manifest = resized(prepared.manifest, experiment, rows)
        prepared = None if rows else prepared  # its batches say nothing of tables of other sizes
    train = experiment.train
    check_batch_size(train.batch_size, _mesh((devices, 1)), train.accumulate)
    work = work_of_share(experiment, manifest, devices)
    state = state_shapes(experiment, manifest)
    fixed = _fixed_mesh(experiment, devices)
    for shards in [fixed[1]] if fixed else _shard_counts(devices):
        mesh = (devices // shards, shards)
        needed = _rough(experiment, manifest, state, work, mesh)
        if needed <= device.memory:
            found = plan_on(experiment, manifest, prepared, state, work, mesh, device)
            needed = found.bytes
            if needed <= device.memory:
                return found
    raise ConfigError(_refusal(experiment, manifest, state, work, mesh, needed, device))


def _placed_as(prepared: Prepared, experiment: Experiment) -> Experiment:
    """The experiment with the placements that its data were prepared with."""
    stored = prepared.manifest.config.get("features", {})
    features = {
        name: dataclasses.replace(
            feature, placement=stored.get(name, {}).get("placement", feature.placement)
        )
        for name, feature in experiment.features.items()
    }
    return dataclasses.replace(experiment, features=features)


def plan_on(
    experiment: Experiment,
    manifest: Manifest,
    prepared: Prepared | None,
    state: TrainState,
    work: Work,
    mesh: tuple[int, int],
    device: Device,
) -> DevicePlan:
    """Everything about one mesh."""
    layout, shards = make_plan(experiment, manifest), mesh[1]
    check_placement(layout, state, shards)
    buffers = _buffers(experiment, manifest, prepared, layout, mesh)
    memory = stored_bytes(experiment, manifest, state, mesh[0] * shards, shards)
    memory["working memory"] = working_memory(experiment, manifest, state, buffers, mesh, work)
    moved = moved_by_step(experiment, manifest, state, buffers, mesh)
    touched = {s: size_of((state.tables[s], state.slots[s])) / layout.rows[s] for s in state.tables}
    places = places_of_batch(experiment, manifest)
    updated = sum(
        2 * each * (buffers[s].window if s in buffers else places[s]) for s, each in touched.items()
    )
    seconds = {
        "memory reads": (work.accessed + updated) / device.memory_bandwidth,
        "network": sum(m.sent / device.bandwidth + device.latency for m in moved),
        "compute": work.flops / device.flops,
    }
    return DevicePlan(
        experiment=experiment,
        mesh=mesh,
        device=device,
        tables=tuple(_tables(experiment, layout, state, shards)),
        memory=memory,
        moved=tuple(moved),
        buffers=buffers,
        measured=prepared is not None,
        seconds=seconds,
    )


def check_placement(layout: Layout, state: TrainState, shards: int) -> None:
    """Raise `AssertionError` unless every row of every table, and its slots, has exactly one place.

    Tables of a stack must not overlap or leave it, and a stack must divide over the shards with
    all of its slots.
    """
    for stack, rows in layout.rows.items():
        end = 0
        fields = [f for f in layout.fields.values() if f.stack == stack]
        for field in sorted(fields, key=lambda f: f.offset):
            assert field.offset == end, f"{field.owner} begins at row {field.offset}, not at {end}"
            end = field.offset + field.size
        assert end <= rows, f"{fields[-1].owner} ends at row {end} of {rows} of {stack}"
        if stack == DENSE:
            assert state.params[DENSE].shape[0] == rows
            continue
        parts = state.tables[stack], state.slots[stack], state.scratch[stack]
        assert rows % shards == 0, f"{rows} rows of {stack} over {shards} shards"
        assert {leaf.shape[0] for leaf in jax.tree.leaves(parts)} == {rows}, stack
    stacks = set(layout.rows) - {DENSE}
    assert stacks == set(state.tables) == set(state.slots) == set(state.scratch)


def _buffers(
    experiment: Experiment,
    manifest: Manifest,
    prepared: Prepared | None,
    layout: Layout,
    mesh: tuple[int, int],
) -> dict[str, Buffers]:
    """The buffers that training would use, or an upper bound where there are no batches."""
    abstract = _mesh(mesh)
    if mesh[1] == 1:
        return {}
    if prepared is None:
        places = places_of_batch(experiment, manifest)
        return {stack: default_buffers(ids, abstract) for stack, ids in places.items()}
    config = experiment.train
    source = BatchSource(prepared, "train", config.batch_size, config.seed, 1, config.precision)
    model, catalogue = make_model(experiment, manifest), load_catalogue(prepared, experiment)
    return measured_buffers(
        model, catalogue, first_batches(source), abstract, layout.rows, config.seed
    )


def _tables(
    experiment: Experiment, layout: Layout, state: TrainState, shards: int
) -> Iterator[Table]:
    for field in layout.fields.values():
        if field.stack == DENSE:
            copies = 1 + size_of(state.optimizer) // max(1, size_of(state.params))
            bytes_ = copies * field.size * state.params[DENSE].shape[1]
            bytes_ *= state.params[DENSE].dtype.itemsize
        else:
            parts = (state.tables, state.slots, state.scratch)
            whole = size_of([part[field.stack] for part in parts])
            bytes_ = whole * field.size // layout.rows[field.stack] // shards
        why = _why(experiment, field, shards)
        yield Table(
            owner=field.owner, stack=field.stack, rows=field.size, per_device=bytes_, why=why
        )


def _why(experiment: Experiment, field: Field, shards: int) -> str:
    if field.stack == DENSE:
        return f"dense: whole on every device, {experiment.train.optimizer}"
    if shards == 1:
        return "sparse: whole on every device, which has room"
    return f"sparse: by row over {shards} devices"


# --- What fits


def _mesh(shape: tuple[int, int]) -> AbstractMesh:
    return AbstractMesh(shape, AXES)


def _shard_counts(devices: int) -> list[int]:
    """Powers of two, as rows divide by them, that divide the devices."""
    return [s for s in (1, 2, 4, 8, 16, 32, 64, 128) if devices % s == 0 and ROW_MULTIPLE % s == 0]


def _fixed_mesh(experiment: Experiment, devices: int) -> tuple[int, int] | None:
    """The mesh that the configuration names; None where it leaves the choice."""
    if experiment.train.mesh == (0, 1):
        return None
    data, table = mesh_shape(experiment.train.mesh, devices)
    if data * table != devices or ROW_MULTIPLE % table:
        raise ConfigError(
            f"train.mesh: {list(experiment.train.mesh)} does not fill {devices} devices with "
            f"{' or '.join(map(str, _shard_counts(devices)))} table shards ({ROW_MULTIPLE} are the "
            f"most); such as [0,{_shard_counts(devices)[-1]}]"
        )
    return data, table


def _rough(
    experiment: Experiment,
    manifest: Manifest,
    state: TrainState,
    work: Work,
    mesh: tuple[int, int],
) -> int:
    """Bytes of a device, without the buffers of the exchange."""
    devices = mesh[0] * mesh[1]
    return sum(stored_bytes(experiment, manifest, state, devices, mesh[1]).values()) + (
        work.temporary
    )


def _refusal(
    experiment: Experiment,
    manifest: Manifest,
    state: TrainState,
    work: Work,
    mesh: tuple[int, int],
    needed: int,
    device: Device,
) -> str:
    """What does not fit, and the cheapest change that does."""
    devices = mesh[0] * mesh[1]
    parts = stored_bytes(experiment, manifest, state, devices, mesh[1])
    parts["working memory"] = needed - sum(parts.values())
    largest = max(parts, key=lambda part: parts[part])
    text = (
        f"{experiment.name} needs {quantity_text(needed)} on each of {devices} devices, which have "
        f"{quantity_text(device.memory)}; {quantity_text(parts[largest])} of it: {largest}. "
    )
    works = {placements_of(experiment): work}
    dense = 4 * size_of(state.params.get(DENSE, ()))  # with its gradient and moments
    for what, changed, count in changes(experiment, devices, dense > 0.05 * device.memory):
        sized = resized(manifest, changed, {})
        shapes = state if changed is experiment else state_shapes(changed, sized)
        placements = placements_of(changed)
        if placements not in works:  # a dense table has a gradient of its size
            works[placements] = work_of_share(changed, sized, devices)
        temporary = works[placements].temporary * devices // count
        share = work._replace(temporary=temporary)
        for shards in _shard_counts(count):
            new = (count // shards, shards)
            if _rough(changed, sized, shapes, share, new) > device.memory:
                continue
            bytes_ = plan_on(changed, sized, None, shapes, share, new, device).bytes
            if bytes_ <= device.memory:
                where = f"{what}train.mesh=[{new[0]},{new[1]}]"
                return f"{text}The nearest that fits: {where} ({quantity_text(bytes_)} on each)"
    if largest in ("working memory", "batches"):
        return text + "Nothing near fits: a smaller train.batch_size, train.accumulate"
    return (
        f"{text}Nothing near fits, over {ROW_MULTIPLE} table shards neither, which are the most: "
        "smaller tables (hash_rows), a smaller model.width"
    )
