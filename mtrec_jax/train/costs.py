"""What a training step takes on each device: memory, bytes through the network, arithmetic.

Everything follows from shapes; nothing of a table's size is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtrec_jax.config import Experiment
from mtrec_jax.data.assumed import batch_shapes, catalogue_shapes, resized
from mtrec_jax.data.dataset import IdField, Manifest
from mtrec_jax.models.model import make_model
from mtrec_jax.sharding import ROW_MULTIPLE, make_mesh
from mtrec_jax.tables.exchange import Buffers
from mtrec_jax.tables.layout import DENSE, computed_dtype, rule_of, update_rows
from mtrec_jax.tables.lookup import BuffersOf
from mtrec_jax.tables.update import apply_rows, row_update
from mtrec_jax.train.loop import STEPS_IN_FLIGHT
from mtrec_jax.train.step import make_step, row_rules
from mtrec_jax.types import FIRST, PyTree, TrainState

Shaped = jax.Array | jax.ShapeDtypeStruct
_FEW = ROW_MULTIPLE - FIRST  # values of a table when only what goes on beside it is of interest


class Moved(NamedTuple):
    """One collective of a step."""

    what: str
    how: Literal["all-to-all", "all-gather", "all-reduce"]
    over: int  # devices that take part in it
    size: int  # bytes of its result on each device

    @property
    def sent(self) -> float:
        """Bytes that a device sends, by the ring algorithms."""
        passes = 2 if self.how == "all-reduce" else 1
        return passes * self.size * (self.over - 1) / self.over


class Work(NamedTuple):
    """What one device does in a step, by XLA's own account of the compiled program."""

    temporary: int  # bytes of working memory
    accessed: float  # bytes read and written
    flops: float


def state_shapes(experiment: Experiment, manifest: Manifest) -> TrainState:
    """Shapes and types of a run's whole state."""
    model = make_model(experiment, manifest)
    return make_step(experiment, manifest, model, make_mesh((1, 1)), 1).abstract


def stored_bytes(
    experiment: Experiment, manifest: Manifest, state: TrainState, devices: int, shards: int
) -> dict[str, int]:
    """Bytes that lie on each device for the whole run, and of its parts of batches, by what it is.

    Args:
      experiment: its batch size is meant.
      manifest: of the data.
      state: from `state_shapes` of these.
      devices: in all.
      shards: of the tables that are updated row by row.
    """
    batch = batch_shapes(experiment, manifest, experiment.train.batch_size)
    whole = ("balance", "key", "step", "sums", "rounds", "bad")
    return {
        "tables": size_of(state.tables) // shards,
        "slots": size_of(state.slots) // shards,
        "scratch": size_of(state.scratch) // shards,
        "dense parameters": size_of(state.params),
        "their optimizer": size_of(state.optimizer)
        + sum(size_of(getattr(state, part)) for part in whole),
        "catalogue": size_of(catalogue_shapes(experiment, manifest)),
        "batches": STEPS_IN_FLIGHT * size_of(batch) // devices,
    }


def size_of(tree: PyTree) -> int:
    """Bytes of all arrays, or of shapes and types.

    >>> size_of(jax.ShapeDtypeStruct((2, 3), "float32"))
    24
    """
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def work_of_share(experiment: Experiment, manifest: Manifest, devices: int) -> Work:
    """Compile the step on one device for its share of the batch, with small tables.

    What the exchange of rows adds is not in it.
    """
    share = max(1, experiment.train.batch_size // devices)
    train = dataclasses.replace(experiment.train, batch_size=share, mesh=(1, 1))
    experiment = dataclasses.replace(experiment, train=train)
    experiment, small = _with_small_tables(experiment, manifest)
    model = make_model(experiment, small)
    step = make_step(experiment, small, model, make_mesh((1, 1)), 1)
    batch = batch_shapes(experiment, small, share)
    catalogue = catalogue_shapes(experiment, small)
    compiled = step.update.lower(step.abstract, batch, catalogue).compile()  # type: ignore[attr-defined]
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    return Work(
        memory.temp_size_in_bytes,
        costs.get("bytes accessed", 0.0),
        costs.get("flops", 0.0),
    )


def places_of_batch(experiment: Experiment, manifest: Manifest) -> dict[str, int]:
    """{stack: ids of a whole batch, repeated or not}, of the stacks that are updated row by row."""
    addresses, parts = _looked_up(experiment, manifest), experiment.train.accumulate
    return {
        stack: parts * sum(address.size for address in by_role.values())
        for stack, by_role in addresses.items()
        if stack != DENSE
    }


def _looked_up(experiment: Experiment, manifest: Manifest) -> PyTree:
    """{stack: {role: shape and type of its addresses}}, of a part of an accumulated batch."""
    train = experiment.train
    batch = batch_shapes(experiment, manifest, train.batch_size // train.accumulate)
    catalogue, key = catalogue_shapes(experiment, manifest), jax.random.key(0, impl="rbg")
    looked = jax.eval_shape(make_model(experiment, manifest).lookups, batch, catalogue, key)
    return looked.addresses


def moved_by_step(
    experiment: Experiment,
    manifest: Manifest,
    state: TrainState,
    buffers: BuffersOf,
    mesh: tuple[int, int],
) -> list[Moved]:
    """The collectives of a step in which each exchange of rows takes one round.

    A step that takes its batch in parts exchanges rows once, all else once for each part.

    Args:
      experiment, manifest: of the run.
      state: from `state_shapes` of these.
      buffers: of each stack that is split.
      mesh: devices on ("data", "table").
    """
    devices, parts, found = mesh[0] * mesh[1], experiment.train.accumulate, list[Moved]()
    if devices == 1:
        return found
    for stack, sizes in buffers.items():
        found += exchange_of_rows(sizes, state.tables[stack], mesh)
    if mesh[1] == 1:  # every device updates its own copy, with the gradients of all
        for stack, places in places_of_batch(experiment, manifest).items():
            width = state.tables[stack].shape[1]
            each = computed_dtype(state.tables[stack]).itemsize
            found.append(Moved(f"ids, {stack}", "all-gather", devices, 4 * places))
            found.append(Moved(f"gradients, {stack}", "all-gather", devices, each * width * places))
    retrieves = any(task.kind == "retrieval" for task in experiment.tasks.values())
    each = experiment.model.width * jnp.dtype(experiment.train.precision).itemsize
    if manifest.items and experiment.model.item_placement == DENSE:
        size = parts * (manifest.items + FIRST) * each
        found.append(Moved("item vectors", "all-gather", devices, size))
        found.append(Moved("their gradients", "all-reduce", devices, 2 * size))
    elif retrieves:
        size = parts * experiment.train.negatives * each
        found.append(Moved("negatives", "all-gather", devices, size))
        found.append(Moved("their gradients", "all-reduce", devices, size))
    dense = size_of(state.params)
    roles = _looked_up(experiment, manifest).get(DENSE, {})
    if roles:  # each role's gradient is summed by itself
        dense += (len(roles) - 1) * size_of(state.params[DENSE])
    found.append(Moved("dense gradients", "all-reduce", devices, parts * dense))
    return found


def exchange_of_rows(sizes: Buffers, table: Shaped, mesh: tuple[int, int]) -> list[Moved]:
    """The collectives of one round of `exchange.look_up` and `exchange.update`.

    Args:
      sizes: of the buffers.
      table: [V, D], or its shape and type.
      mesh: devices on ("data", "table").
    """
    replicas, shards = mesh
    places, width = shards * sizes.places, table.shape[1]
    row, gradient = width * table.dtype.itemsize, width * computed_dtype(table).itemsize
    found = [
        Moved("ids out", "all-to-all", shards, 4 * places),
        Moved("rows back", "all-to-all", shards, (row + 4) * places),
        Moved("gradients back", "all-to-all", shards, (gradient + 4) * places),
    ]
    if replicas > 1:
        found.append(Moved("ids to replicas", "all-gather", replicas, 4 * places * replicas))
        found.append(Moved("sum over data", "all-reduce", replicas, gradient * sizes.window))
    return found


def working_memory(
    experiment: Experiment,
    manifest: Manifest,
    state: TrainState,
    buffers: BuffersOf,
    mesh: tuple[int, int],
    work: Work,
) -> int:
    """Bytes that come and go in a step on each device: the larger of two moments.

    In the backward pass, what XLA counts for one device, the sums of the dense gradients and what
    the lookups remember; in the update of the rows, their gradients and the exchange's buffers.
    """
    devices = mesh[0] * mesh[1]
    if devices == 1:
        return work.temporary
    places = places_of_batch(experiment, manifest)
    backward, update = work.temporary + size_of(state.params), 0
    if mesh[1] == 1:  # every device holds the ids and gradients of all places
        for stack, count in places.items():
            each = 4 + state.tables[stack].shape[1] * computed_dtype(state.tables[stack]).itemsize
            moment = count * each + _update_memory(experiment, state, stack, count, True)
            update = max(update, moment)
    for stack, sizes in buffers.items():
        table = state.tables[stack]
        own, rows = places[stack] // devices, table.shape[0]
        gradient = table.shape[1] * computed_dtype(table).itemsize
        ranks = 4 * own * mesh[1]  # how many ids of each owner come before an id
        backward += 4 * (3 * own + min(places[stack], rows // mesh[1]))
        sent = own * gradient + 2 * mesh[1] * sizes.places * (gradient + 4) + ranks
        updated = _update_memory(experiment, state, stack, sizes.window, False)
        update = max(update, gradient * (own + sizes.window) + max(sent, updated))
    return max(backward, update)


def _update_memory(
    experiment: Experiment, state: TrainState, stack: str, count: int, repeated: bool
) -> int:
    """Working memory of the update of a stack's rows, by XLA: `count` ids, distinct or not."""
    rule = row_rules(experiment.train)[rule_of(stack)]

    def update(
        table: Array, slots: PyTree, scratch: Array, ids: Array, grads: Array, key: Array
    ) -> PyTree:
        if repeated:
            return apply_rows(rule, table, slots, scratch, ids, grads, 0.1, key)
        change = row_update(rule, 0.1, key, table.dtype)
        return update_rows(change, table, slots, ids, grads), scratch

    parts = state.tables[stack], state.slots[stack], state.scratch[stack]
    few = jax.tree.map(lambda x: jax.ShapeDtypeStruct((_FEW, *x.shape[1:]), x.dtype), parts)
    ids = jax.ShapeDtypeStruct((count,), jnp.int32)
    grads = jax.ShapeDtypeStruct((count, parts[0].shape[1]), computed_dtype(parts[0]))
    program = jax.jit(update, donate_argnums=(0, 1, 2)).lower(*few, ids, grads, state.key)
    memory = program.compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def _with_small_tables(experiment: Experiment, manifest: Manifest) -> tuple[Experiment, Manifest]:
    """Tables that are updated row by row get a few rows, and with them the catalogue: XLA takes a
    lookup for a read of everything."""

    def small(fields: tuple[IdField, ...]) -> tuple[IdField, ...]:
        return tuple(
            f
            if f.placement == DENSE
            else dataclasses.replace(
                f, size=min(f.size, FIRST + _FEW), capacity=0, hash_rows=min(f.hash_rows, _FEW)
            )
            for f in fields
        )

    made = resized(manifest, experiment, {})  # with the placements of the experiment
    made = dataclasses.replace(
        made,
        context_ids=small(made.context_ids),
        item_ids=small(made.item_ids),
        history=small(made.history),
    )
    if experiment.model.item_placement == DENSE:
        return experiment, made
    items = min(_FEW, made.item_values or made.trained_items)
    model = dataclasses.replace(experiment.model, item_capacity=0)
    made = dataclasses.replace(made, items=items, trained_items=items, item_values=0)
    return dataclasses.replace(experiment, model=model), made
