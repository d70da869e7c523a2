"""What preparation would say of data that is not there: for plans, from table sizes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mtrec_jax.config import Experiment, Feature
from mtrec_jax.data.dataset import FORMAT, IdField, Manifest, NumberField, SplitInfo, TaskField
from mtrec_jax.data.features import CLOCK, PAST
from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.types import FIRST, Batch, Catalogue

Fields = tuple[IdField, ...]


def assumed_manifest(experiment: Experiment, rows: Mapping[str, int]) -> Manifest:
    """The manifest of an experiment whose data has not been prepared.

    Args:
      experiment: says which features, tasks and positions there are.
      rows: {feature: values of its vocabulary}, "item": trained items, and for a multiclass task
        its classes. What the configuration fixes (hashed, binned, hours, capacities) need not be
        named.

    Raises:
      ConfigError: a size is missing, or belongs to nothing.
    """
    data = experiment.data
    classes = [name for name, task in experiment.tasks.items() if task.kind == "multiclass"]
    _check_names(rows, ["item"] * bool(data.item) + [*experiment.features, *classes])
    chosen = {n: f for n, f in experiment.features.items() if f.kind != "text"}
    missing = [n for n, f in chosen.items() if n not in rows and _size(f) == 0]
    missing += [name for name in classes if name not in rows]
    items = rows.get("item", experiment.model.item_capacity) if data.item else 0
    missing += ["item"] * (bool(data.item) and not items)
    if missing:
        raise ConfigError(
            f"the sizes of {', '.join(missing)} are not known without prepared data: give them, "
            f"as in --rows {missing[0]}=1e6, or name a prepared folder with --prepared"
        )
    fields: dict[str, list[IdField | NumberField]] = {"context": [], "item": [], "history": []}
    for name, feature in chosen.items():
        fields[feature.on].append(_field(name, feature, rows.get(name, 0)))
    ids = {on: tuple(f for f in found if isinstance(f, IdField)) for on, found in fields.items()}
    numbers = {on: tuple(f for f in x if isinstance(f, NumberField)) for on, x in fields.items()}
    sequences = data.kind == "sequences"
    positions = (data.positions or data.history_length) if sequences else 1
    return Manifest(
        format=FORMAT,
        name=experiment.name,
        kind=data.kind,
        protocol="assumed from table sizes",
        fingerprint="0" * 16,
        config={},
        users=0,
        items=items,
        trained_items=items,
        events=0,
        quarantined=0,
        split=SplitInfo(kind=experiment.split.kind, seed=0, sizes={}, fingerprint="0" * 16),
        history_length=data.history_length if sequences else 0,
        examples={"train": 0},
        positions={"train": positions},
        targets={"train": 0},
        context_ids=ids["context"],
        context_numbers=numbers["context"],
        item_ids=ids["item"],
        item_numbers=numbers["item"],
        history=ids["history"],
        tasks={
            name: TaskField(classes=tuple(map(str, range(rows.get(name, 0)))))
            for name in experiment.tasks
        },
    )


def resized(manifest: Manifest, experiment: Experiment, rows: Mapping[str, int]) -> Manifest:
    """A manifest with other table sizes, and with the placements of the experiment.

    Raises:
      ConfigError: a size belongs to nothing.
    """
    fields = (*manifest.context_ids, *manifest.item_ids, *manifest.history)
    _check_names(rows, ["item"] * bool(manifest.items) + [field.name for field in fields])

    def changed(fields: Fields) -> Fields:
        return tuple(
            dataclasses.replace(
                field,
                size=FIRST + rows[field.name] if field.name in rows else field.size,
                placement=experiment.features[field.name].placement
                if field.name in experiment.features
                else field.placement,
            )
            for field in fields
        )

    return dataclasses.replace(
        manifest,
        items=rows.get("item", manifest.items),
        trained_items=rows.get("item", manifest.trained_items),
        item_values=0 if "item" in rows else manifest.item_values,
        context_ids=changed(manifest.context_ids),
        item_ids=changed(manifest.item_ids),
        history=changed(manifest.history),
    )


def batch_shapes(experiment: Experiment, manifest: Manifest, size: int) -> Batch:
    """Shapes and types of a training batch of `size` examples, as devices hold it."""
    positions, length = manifest.positions["train"], manifest.history_length
    dtype = jnp.dtype(experiment.train.precision)

    def array(*shape: int, of: jnp.dtype = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), of)

    whole = jnp.dtype("int32")
    ids = sum(f.slots for f in manifest.context_ids)
    numbers = sum(f.slots for f in manifest.context_numbers)
    context = {"ids": array(ids, of=whole)} if ids else {}
    context |= {"numbers": array(numbers)} if numbers else {}
    columns = ("item", *(c for f in manifest.history for c in f.columns)) if length else ()
    per_task = {name: array(positions) for name in experiment.tasks}
    return Batch(
        context=context,  # type: ignore[arg-type]
        events={name: array(length, of=whole) for name in columns},  # type: ignore[misc]
        cutoff=array(positions, of=whole),  # type: ignore[arg-type]
        candidate=array(positions, of=whole),  # type: ignore[arg-type]
        labels=per_task,  # type: ignore[arg-type]
        mask=dict(per_task),  # type: ignore[arg-type]
        user=array(of=whole),  # type: ignore[arg-type]
        weight=array(positions),  # type: ignore[arg-type]
        row=array(positions, of=whole),  # type: ignore[arg-type]
    )


def catalogue_shapes(experiment: Experiment, manifest: Manifest) -> Catalogue:
    """Shapes and types of the catalogue, which every device holds whole."""
    items, dtype = manifest.items + FIRST, jnp.dtype(experiment.train.precision)
    ids = sum(f.slots for f in manifest.item_ids)
    numbers = sum(f.slots for f in manifest.item_numbers)
    return Catalogue(
        ids=jax.ShapeDtypeStruct((items, ids), jnp.int32),  # type: ignore[arg-type]
        numbers=jax.ShapeDtypeStruct((items, numbers), dtype),  # type: ignore[arg-type]
        row=jax.ShapeDtypeStruct((items,), jnp.int32),  # type: ignore[arg-type]
        cumulative=jax.ShapeDtypeStruct((items,), jnp.uint32),  # type: ignore[arg-type]
        log_probability=jax.ShapeDtypeStruct((items,), dtype),  # type: ignore[arg-type]
    )


def _check_names(rows: Mapping[str, int], known: list[str]) -> None:
    for name, size in rows.items():
        if name not in known:
            raise ConfigError(
                f"--rows {name}: no such table; there are {', '.join(known)}.{nearest(name, known)}"
            )
        if size < 1:
            raise ConfigError(f"--rows {name}={size}: at least one row")


def _size(feature: Feature) -> int:
    """Values that the configuration alone tells, or has room for; 0: it does not."""
    if feature.kind == "hashed":
        return feature.buckets + (feature.impute == "own")
    if feature.kind in CLOCK:
        return CLOCK[feature.kind]
    counts = feature.kind in PAST and feature.on == "context"
    if counts or feature.kind == "numeric":
        return 1
    if feature.kind in ("binned", "piecewise", "gap", *PAST):
        return feature.bins
    return feature.hash_rows or feature.capacity


def _field(name: str, feature: Feature, values: int) -> IdField | NumberField:
    values = values or _size(feature)
    is_number = feature.kind in ("numeric", "piecewise", "friends_taste")
    if is_number or (feature.kind in PAST and feature.on == "context"):
        slots = values + (feature.impute == "own" and feature.kind != "friends_taste")
        return NumberField(name=name, mean=0.0, std=1.0, slots=slots)
    return IdField(
        name=name,
        size=FIRST + values,
        slots=feature.max_values if feature.kind in ("multi_valued", "ties") else 1,
        placement=feature.placement,
        capacity=feature.capacity,
        hash_rows=feature.hash_rows,
        hash_functions=feature.hash_functions if feature.hash_rows else 0,
    )
