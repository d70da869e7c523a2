"""Vocabularies that begin with those of an earlier prepared folder.

A model that was trained on that folder goes on with the new one: known values keep their ids, new
ones follow, and what turns numbers into inputs (bins, scales, classes) stays as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from mtrec_jax.arguments import argument
from mtrec_jax.config import Experiment, to_dict
from mtrec_jax.data import features
from mtrec_jax.data.dataset import Prepared, TaskField, extensions_of, open_prepared
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import FIRST

_MAY_CHANGE = ("min_count",)  # without another meaning of an id


def open_base(folder: str | Path, experiment: Experiment) -> Prepared:
    """The folder whose vocabularies are to grow.

    Raises:
      DataError: it is no prepared folder.
      ConfigError: the experiment gives a feature or a task of that name another meaning.
    """
    base = open_prepared(folder, extensions_of(experiment))
    config, problems = base.manifest.config, []
    for name, feature in experiment.features.items():
        if name in config["features"]:
            problems += otherwise(f"features.{name}", config["features"][name], to_dict(feature))
    for name, task in experiment.tasks.items():
        kind = config["tasks"].get(name, {}).get("kind", task.kind)
        if kind != task.kind:
            problems.append(f"tasks.{name}.kind: {kind!r} there, {task.kind!r} here")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:8])
        raise ConfigError(
            f"{folder} cannot grow to experiment '{experiment.name}', which means something else:\n"
            f"{shown}\nName the folder of the same features, or prepare without "
            f"{argument('grow_from')}"
        )
    return base


def otherwise(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """How a feature of another folder differs from the same one here, where ids would mean
    something else."""
    return [
        f"{key}.{name}: {there.get(name)!r} there, {value!r} here"
        for name, value in here.items()
        if name not in _MAY_CHANGE and there.get(name) != value
    ]


def grown(
    base: Prepared | None, fresh: Encoding, cells: pa.Array, counts: Int[np.ndarray, " n"]
) -> Encoding:
    """A feature that was fitted on these cells as the continuation of the same one in `base`."""
    old = earlier(base, fresh.name)
    if old is None:
        return fresh
    missing = old.missing if old.missing >= FIRST else fresh.missing
    if fresh.is_number:
        same = {"values": old.values, "counts": old.counts, "mean": old.mean, "std": old.std}
        return dataclasses.replace(fresh, **same, missing=old.missing, slots=old.slots)
    if fresh.size:  # no vocabulary
        return dataclasses.replace(fresh, missing=missing, size=max(fresh.size, old.size))
    grows = fresh.feature.grows
    found = fresh.values if grows else fresh.values.filter(pc.equal(fresh.values, ""))
    new = found.filter(pc.invert(pc.is_in(found, value_set=old.values)))
    values = pa.concat_arrays([old.values, new])
    if missing >= FIRST and missing != old.missing:  # the id that its value has now
        missing = FIRST + pc.index(values, fresh.values[missing - FIRST]).as_py()
    merged = dataclasses.replace(fresh, values=values, missing=missing)
    ids = features.encode(merged, cells)
    often = np.bincount(ids.reshape(-1), np.repeat(counts, ids.shape[1]), FIRST + len(values))
    return dataclasses.replace(merged, counts=often[FIRST:].astype(np.int64))


def earlier(base: Prepared | None, name: str) -> Encoding | None:
    """The feature of this name as `base` has learned it; None where there is none."""
    if base is None or name not in base.manifest.config["features"]:
        return None
    return features.restore(base, name)


def earlier_task(base: Prepared | None, name: str) -> TaskField | None:
    """What `base` has learned about the task of this name; None where it has no such task."""
    return base.manifest.tasks.get(name) if base else None


def item_vocabulary(base: Prepared | None, items: pa.Table) -> pa.Array | None:
    """Raw ids of the rows of the items' own table: those of `base`, then those that train now.

    Args:
      base: the folder that grows; None: the trained items have their ids as rows, and the result
        is None.
      items: the items in the order of their ids, with `item` and `count`.
    """
    if base is None:
        return None
    old = one_array(base.item_vocabulary)
    trained = one_array(items.filter(pc.greater(items["count"], 0))["item"])
    new = trained.filter(pc.invert(pc.is_in(trained, value_set=old)))
    return pa.concat_arrays([old.cast(new.type), new])


def summary(base: Prepared, items: pa.Table, encodings: list[Encoding]) -> str:
    """One line on what has become of the values of `base`.

    Args:
      base: the folder that grows.
      items: as `item_vocabulary` takes them.
      encodings: the features, grown.

    Raises:
      DataError: none of its values trains here.
    """
    found = {}
    if len(items):
        trained = one_array(items.filter(pc.greater(items["count"], 0))["item"])
        known = pc.sum(pc.is_in(trained, value_set=one_array(base.item_vocabulary))).as_py() or 0
        found["items"] = known, len(trained) - known
    for encoding in encodings:
        old = earlier(base, encoding.name)
        if old is not None and encoding.feature.grows:
            known = int(np.count_nonzero(encoding.counts[: len(old.values)]))
            found[encoding.name] = known, len(encoding.values) - len(old.values)
    shown = ", ".join(
        f"{name} {known:,} known, {new:,} new" for name, (known, new) in found.items()
    )
    if found and not any(known for known, _ in found.values()):
        raise DataError(
            f"none of the values that {base.folder} knows trains here ({shown}). Name the folder "
            f"that these data continue, or prepare without {argument('grow_from')}"
        )
    return f"continues {base.folder}: {shown}"
