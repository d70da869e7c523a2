"""Events leave the engine, encoded, in the order in which they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.config import Experiment
from mtrec_jax.data import examples, features
from mtrec_jax.data.dataset import SPLITS, IdField, TaskField
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.schema import query_features
from mtrec_jax.errors import DataError


def event_log(
    engine: Engine,
    events: Any,
    rows: int,
    experiment: Experiment,
    history: list[Encoding],
    tasks: dict[str, TaskField],
) -> examples.Log:
    """All `rows` events in the order (user, time, source row), encoded.

    The engine sorts; the encoded columns are files of its folder that are mapped into memory, so
    that a log may be larger than memory.
    """
    data = experiment.data
    if not data.time:
        events = events.mutate(time=events.row.cast("float64"))
    needed = [
        *("user_id", "item_id", "time", "row", "split"),
        *(f"feature_{e.name}" for e in history),
    ]
    needed += _target_columns(experiment) if data.kind == "sequences" else []
    engine.keep("ordered", events.select(needed).order_by("user_id", "time", "row"))
    if data.kind == "sequences":  # otherwise the events are read once more, as rows
        _forget(engine)
    searched = query_features(experiment)

    def encoded(part: pa.Table) -> dict[str, np.ndarray]:
        arrays = {name: part[name].to_numpy() for name in ("split", "row")}
        arrays["split"] = arrays["split"].astype(np.int8)
        arrays["user"] = part["user_id"].to_numpy().astype(np.int32)
        arrays["time"] = part["time"].to_numpy()
        if data.item:
            arrays["event_item"] = part["item_id"].to_numpy().astype(np.int32)
        for encoding in history:
            ids = features.encode(encoding, one_array(part[f"feature_{encoding.name}"]))
            # a search has no outcome, and nothing else a text, whatever missing values become
            ids[(arrays["split"] == examples.QUERY) != (encoding.name in searched)] = 0
            assert isinstance(encoding.field, IdField)
            for slot, column in enumerate(encoding.field.columns):
                arrays[f"event_{column}"] = ids[:, slot]
        return arrays | (_targets(part, experiment, tasks) if data.kind == "sequences" else {})

    whole: dict[str, np.ndarray] = {}
    done = 0
    for part in engine.batches("ordered"):
        for name, array in encoded(part).items():
            if name not in whole:
                shape = (rows, *array.shape[1:])
                whole[name] = mapped(engine.folder / f"{name}.array", shape, array.dtype)
            whole[name][done : done + len(part)] = array
        done += len(part)
    engine.forget("ordered")
    fields = {n.removeprefix("event_"): v for n, v in whole.items() if n.startswith("event_")}
    targets = {n: v for n, v in whole.items() if n.startswith(("label_", "reference_"))}
    return examples.Log(whole["user"], whole["split"], whole["row"], whole["time"], fields, targets)


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array in a file that is mapped into memory; its room on the disk is reserved.

    Raises:
      DataError: the disk has too little room.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise DataError(
            f"{path.parent}: no room for {size >> 20:,} MB of working files ({error.strerror}). "
            "Free some, or prepare to a folder on another disk"
        ) from error
    return np.memmap(path, dtype, "r+", shape=shape)


def _forget(engine: Engine) -> None:
    """Remove the tables of events that have been sorted, and so copied."""
    for name in ("split", "past"):
        engine.forget(name)


def _target_columns(experiment: Experiment) -> list[str]:
    """The columns that `_targets` reads."""
    references = [f"reference_{name}" for name, task in experiment.tasks.items() if task.reference]
    return [*(f"label_{name}" for name in experiment.tasks), *references]


def _targets(
    table: pa.Table, experiment: Experiment, tasks: dict[str, TaskField]
) -> dict[str, np.ndarray]:
    """Labels and references `[n]` as float32, NaN where there is none."""
    arrays = {}
    for name, task in experiment.tasks.items():
        labels = table[f"label_{name}"]
        if task.kind == "multiclass":
            classes = pa.array(tasks[name].classes, pa.string())
            labels = pc.cast(pc.index_in(labels, value_set=classes), pa.float64())
        arrays[f"label_{name}"] = labels.to_numpy().astype(np.float32)
        if task.reference:
            arrays[f"reference_{name}"] = table[f"reference_{name}"].to_numpy().astype(np.float32)
    return arrays


def sequence_streams(
    experiment: Experiment,
    log: examples.Log,
    encoded: tuple[np.ndarray, np.ndarray],
    numbers: examples.Numbers | None = None,
    check: examples.Check | None = None,
) -> tuple[dict[str, int], dict[str, Iterator[dict[str, np.ndarray]]]]:
    """P and the examples of each split, a chunk of a user's targets each, BLOCK at a time.

    `encoded` holds the context ids and numbers of all users; `numbers` are added to an example's.
    """
    data = experiment.data
    most = data.positions or data.history_length
    # Targets that are judged stand alone, so that each sees as much of the past as when serving.
    positions = {"train": most, "validation": 1, "test": 1}
    context = {"context_ids": encoded[0], "context_numbers": encoded[1]}
    streams = {
        name: examples.sequence_examples(
            log,
            context,
            split,
            positions[name],
            data.history_length,
            data.hide_ties,
            data.seed,
            numbers,
            check,
        )
        for split, name in enumerate(SPLITS)
    }
    return positions, streams


def row_streams(
    engine: Engine,
    events: Any,
    experiment: Experiment,
    context: list[Encoding],
    tasks: dict[str, TaskField],
) -> dict[str, Iterator[dict[str, np.ndarray]]]:
    """Examples of each split, of one row each, in seeded random order, many at a time."""
    needed = ["user_id", "item_id", "row", "split", *(f"feature_{e.name}" for e in context)]
    mixed = events.select(*needed, *_target_columns(experiment))
    mixed = mixed.mutate(mixed=examples.mix(mixed.row, experiment.data.seed))
    engine.keep("mixed", mixed.order_by("split", "mixed", "row").drop("mixed"))
    _forget(engine)

    def encoded(part: pa.Table) -> dict[str, np.ndarray]:
        ids, numbers = features.encode_all(context, feature_cells(part), len(part))
        return {
            "user": part["user_id"].to_numpy().astype(np.int32),
            "context_ids": ids,
            "context_numbers": numbers,
            "cutoff": np.zeros((len(part), 1), np.int32),
            "candidate": part["item_id"].to_numpy().astype(np.int32)[:, None],
            **{n: v[:, None] for n, v in _targets(part, experiment, tasks).items()},
            "row": part["row"].to_numpy()[:, None],
        }

    def stream(split: int) -> Iterator[dict[str, np.ndarray]]:
        for part in _of_split(engine.folder / "mixed", split):
            yield encoded(part)

    return {name: stream(split) for split, name in enumerate(SPLITS)}


def _of_split(folder: Path, split: int) -> Iterator[pa.Table]:
    """The rows of a split of a table that is sorted by split, so that few groups have two."""
    for path in sorted(folder.glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            inside = pc.equal(file.read_row_group(group, columns=["split"])["split"], split)
            if pc.any(inside).as_py():
                yield file.read_row_group(group).replace_schema_metadata(None).filter(inside)


def feature_cells(table: pa.Table) -> dict[str, pa.Array]:
    """The feature columns of events by the feature's name."""
    prefix = "feature_"
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): one_array(table[name]) for name in names}
