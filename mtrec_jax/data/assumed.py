"""What preparation would say of data that is not there: for plans, from table sizes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtrec_jax.config import Experiment, table_of
from mtrec_jax.data.dataset import (
    FIELDS,
    FORMAT,
    IdField,
    Manifest,
    NumberField,
    SplitInfo,
    TaskField,
    grouped,
)
from mtrec_jax.data.features import Feature, Text
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
    chosen = {n: f for n, f in experiment.features.items() if not isinstance(f, Text)}
    sizes = {n: rows.get(n) or f.room or _room(experiment, n) for n, f in chosen.items()}
    missing = [name for name, size in sizes.items() if not size]
    missing += [name for name in classes if name not in rows]
    items = rows.get("item", _room(experiment, "item")) if data.item else 0
    missing += ["item"] * (bool(data.item) and not items)
    if missing:
        raise ConfigError(
            f"the sizes of {', '.join(missing)} are not known without prepared data: give them, "
            f"as in --rows {missing[0]}=1e6, or name a prepared folder with --prepared"
        )
    roles = ("context", "request", "item", "history")
    fields: dict[str, list[IdField | NumberField]] = {role: [] for role in roles}
    for name, feature in chosen.items():
        fields[feature.on].append(_field(name, feature, sizes[name]))
    positions = (data.positions or data.length) if data.length else 1
    return Manifest(
        format=FORMAT,
        name=experiment.name,
        protocol="assumed from table sizes",
        fingerprint="0" * 16,
        cleaned="0" * 16,
        config={},
        users=0,
        items=items,
        trained_items=items,
        events=0,
        quarantined=0,
        split=SplitInfo(kind=experiment.split.kind, seed=0, sizes={}, fingerprint="0" * 16),
        history_length=data.length,
        examples={"train": 0},
        positions={"train": positions},
        targets={"train": 0},
        **grouped(fields),
        tasks={
            name: TaskField(classes=tuple(map(str, range(rows.get(name, 0)))))
            for name in experiment.tasks
        },
    )


def resized(manifest: Manifest, rows: Mapping[str, int]) -> Manifest:
    """A manifest with other table sizes.

    Raises:
      ConfigError: a size belongs to nothing.
    """
    groups = {name: getattr(manifest, name) for name in FIELDS if not name.endswith("numbers")}
    known = [field.name for fields in groups.values() for field in fields]
    _check_names(rows, ["item"] * bool(manifest.items) + known)
    changed = {
        name: tuple(
            dataclasses.replace(f, size=FIRST + rows[f.name]) if f.name in rows else f
            for f in fields
        )
        for name, fields in groups.items()
    }
    if "item" in rows:
        changed |= {"items": rows["item"], "trained_items": rows["item"], "item_values": 0}
    return dataclasses.replace(manifest, **changed)


def batch_shapes(experiment: Experiment, manifest: Manifest, size: int) -> Batch:
    """Shapes and types of a training batch of `size` examples, as devices hold it."""
    m, positions, length = manifest, manifest.positions["train"], manifest.history_length
    dtype, whole = jnp.dtype(experiment.train.precision), jnp.dtype("int32")

    def array(*shape: int, of: jnp.dtype = dtype) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), of)

    def inputs(ids: Fields, numbers: tuple[NumberField, ...], *shape: int) -> dict[str, Any]:
        found = {"ids": array(*shape, _slots(ids), of=whole)} if ids else {}
        return found | ({"numbers": array(*shape, _slots(numbers))} if numbers else {})

    events = {"item": array(length, of=whole)} if length else {}
    per_task = {name: array(positions) for name in m.tasks}
    return Batch(
        context=inputs(m.context_ids, m.context_numbers),
        request=inputs(m.request_ids, m.request_numbers, positions),
        events=events | inputs(m.history, (), length),
        cutoff=array(positions, of=whole),
        candidate=array(positions, of=whole),
        labels=per_task,
        mask=dict(per_task),
        user=array(of=whole),
        weight=array(positions),
        row=None,
    )


def _slots(fields: Sequence[IdField | NumberField]) -> int:
    return sum(field.slots for field in fields)


def catalogue_shapes(experiment: Experiment, manifest: Manifest) -> Catalogue:
    """Shapes and types of the catalogue, which every device holds whole."""
    items, dtype = manifest.items + FIRST, jnp.dtype(experiment.train.precision)
    ids, numbers = _slots(manifest.item_ids), _slots(manifest.item_numbers)
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


def _room(experiment: Experiment, name: str) -> int:
    """Values that a table has room for, where the configuration says so."""
    table = table_of(experiment, name)
    return table.hash_rows or table.capacity


def _field(name: str, feature: Feature, values: int) -> IdField | NumberField:
    if feature.gives_numbers:
        return NumberField(name=name, mean=0.0, std=1.0, slots=values + (feature.impute == "own"))
    return IdField(name=name, size=FIRST + values, slots=getattr(feature, "max_values", 1))
