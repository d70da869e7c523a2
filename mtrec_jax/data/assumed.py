"""What preparation would say of data that is not there: for plans, from table sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mtrec_jax.arguments import argument
from mtrec_jax.config import Experiment, table_of
from mtrec_jax.data.dataset import (
    FIELDS,
    FORMAT,
    IdField,
    Manifest,
    NumberField,
    SplitInfo,
    grouped,
)
from mtrec_jax.data.features import Feature, Text
from mtrec_jax.data.pipeline import to_batch
from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.losses.tasks import TaskField, labelled
from mtrec_jax.types import FIRST, Batch


def assumed_manifest(experiment: Experiment, rows: Mapping[str, int]) -> Manifest:
    """The manifest of an experiment whose data has not been prepared, as far as shapes need it.

    Args:
      experiment: says which features, tasks and positions there are.
      rows: {feature: values}, "item": trained items, and for a multiclass or ordinal task its
        classes. What the configuration fixes (hashed, binned, hours, capacities) need not be named.

    Raises:
      ConfigError: a size is missing, or belongs to nothing.
    """
    length, has_items = experiment.data.length, bool(experiment.data.item)
    several = labelled("classes", "levels")
    classes = [name for name, task in experiment.tasks.items() if task.kind in several]
    chosen = {n: f for n, f in experiment.features.items() if not isinstance(f, Text) or f.encoder}
    _check_names(rows, [*["item"] * has_items, *chosen, *classes])
    rooms = {name: feature.room for name, feature in chosen.items()}
    rooms |= dict.fromkeys(["item"] * has_items + classes, 0)
    for name, room in rooms.items():
        table = table_of(experiment, name)
        rooms[name] = rows.get(name) or room or table.hash_rows or table.capacity
    if missing := [name for name, size in rooms.items() if not size]:
        raise ConfigError(
            f"the sizes of {', '.join(missing)} are not known without prepared data: give them, "
            f"as in {argument('rows')} {missing[0]}=1e6, or name a prepared folder: "
            f"{argument('prepared')}"
        )
    fields: dict[str, list[IdField | NumberField]] = {}
    for name, feature in chosen.items():
        fields.setdefault(feature.on, []).append(_field(name, feature, rooms[name]))
    unknown, given = "0" * 16, dict[str, Any](grouped(fields))
    return Manifest(
        format=FORMAT,
        name=experiment.name,
        protocol="assumed from table sizes",
        fingerprint=unknown,
        cleaned=unknown,
        config={},
        users=0,
        items=rooms.get("item", 0),
        trained_items=rooms.get("item", 0),
        events=0,
        quarantined=0,
        split=SplitInfo(kind=experiment.split.kind, seed=0, sizes={}, fingerprint=unknown),
        history_length=length,
        positions={"train": (experiment.data.positions or length) if length else 1},
        examples={"train": 0},
        targets={"train": 0},
        **given,
        tasks={
            name: TaskField(
                classes=tuple(map(str, range(rooms[name] if name in classes else 0))),
                quantiles=((0.0, 1.0),) * (FIRST + rooms[task.duration] if task.duration else 0),
            )
            for name, task in experiment.tasks.items()
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
    changed: dict[str, Any] = {
        group: tuple(replace(f, size=FIRST + rows[f.name]) if f.name in rows else f for f in of)
        for group, of in groups.items()
    }
    if "item" in rows:
        changed |= {"items": rows["item"], "trained_items": rows["item"], "item_values": 0}
    return replace(manifest, **changed)


def _check_names(rows: Mapping[str, int], known: list[str]) -> None:
    for name, size in rows.items():
        if name not in known:
            raise ConfigError(
                f"{argument('rows')} {name}: no such table; there are {', '.join(known)}."
                f"{nearest(name, known)}"
            )
        if size < 1:
            raise ConfigError(f"{argument('rows')} {name}={size}: at least one row")


def _field(name: str, feature: Feature, values: int) -> IdField | NumberField:
    if feature.gives_numbers:
        return NumberField(name=name, mean=0.0, std=1.0, slots=values + (feature.impute == "own"))
    size = FIRST + values if feature.looked_up else 0
    return IdField(name=name, size=size, slots=getattr(feature, "max_values", 1))


def batch_shapes(experiment: Experiment, manifest: Manifest) -> Batch:
    """Shapes and types of a training batch, as devices hold it."""
    m, config = manifest, experiment.train
    positions, length = m.positions["train"], m.history_length
    sizes = {"user": 1, "event_item": length}
    sizes |= dict.fromkeys(["row", "cutoff", "candidate"], positions)
    sizes |= {f"label_{task}": positions for task in m.tasks}
    sizes |= {f"context_{f.name}": f.slots for f in m.context_ids + m.context_numbers}
    sizes |= {f"request_{f.name}": positions * f.slots for f in m.request_ids + m.request_numbers}
    sizes |= {f"event_{f.name}": length * f.slots for f in m.history}
    one = {name: np.zeros((1, size), np.int32) for name, size in sizes.items()}
    one["user"] = one["user"][:, 0]
    return jax.tree.map(
        lambda part: jax.ShapeDtypeStruct((config.batch_size, *part.shape[1:]), part.dtype),
        to_batch(one, m, config.precision)._replace(row=None),
    )
