"""Events leave the engine, encoded, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Experiment
from mtrec_jax.data import examples, features
from mtrec_jax.data.dataset import BLOCK, SPLITS, TaskField
from mtrec_jax.data.features import Encoding, one_array

_SLICE = 1 << 18  # rows that leave the engine at a time


def event_log(
    events: Any,
    rows: int,
    experiment: Experiment,
    history: list[Encoding],
    tasks: dict[str, TaskField],
) -> examples.Log:
    """All `rows` events in the order (user, time, source row), encoded."""
    data = experiment.data

    def encoded(part: pa.Table) -> dict[str, np.ndarray]:
        arrays = {name: part[name].to_numpy() for name in ("split", "row")}
        arrays["user"] = part["user_id"].to_numpy().astype(np.int32)
        arrays["time"] = part["time"].to_numpy() if data.time else np.zeros(len(part))
        if data.item:
            arrays["event_item"] = part["item_id"].to_numpy().astype(np.int32)
        for encoding in history:
            ids = features.encode(encoding, one_array(part[f"feature_{encoding.name}"]))
            arrays[f"event_{encoding.name}"] = ids[:, 0]
        return arrays | (_targets(part, experiment, tasks) if data.kind == "sequences" else {})

    whole = _pull(events, rows, encoded)
    order = np.lexsort((whole["row"], whole["time"], whole["user"]))
    whole = {name: array[order] for name, array in whole.items()}
    fields = {n.removeprefix("event_"): v for n, v in whole.items() if n.startswith("event_")}
    targets = {n: v for n, v in whole.items() if n.startswith(("label_", "reference_"))}
    return examples.Log(whole["user"], whole["split"], whole["row"], whole["time"], fields, targets)


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
    experiment: Experiment, log: examples.Log, encoded: tuple[np.ndarray, np.ndarray]
) -> tuple[dict[str, int], dict[str, Iterator[dict[str, np.ndarray]]]]:
    """P and the examples of each split, a chunk of a user's targets each, BLOCK at a time."""
    data = experiment.data
    most = data.positions or data.history_length
    # Targets that are judged stand alone, so that each sees as much of the past as when serving.
    positions = {"train": most, "validation": 1, "test": 1}
    context = {"context_ids": encoded[0], "context_numbers": encoded[1]}
    streams = {
        name: examples.sequence_examples(
            log, context, split, positions[name], data.history_length, data.hide_ties, data.seed
        )
        for split, name in enumerate(SPLITS)
    }
    return positions, streams


def row_streams(
    events: Any,
    rows: int,
    experiment: Experiment,
    context: list[Encoding],
    tasks: dict[str, TaskField],
) -> dict[str, Iterator[dict[str, np.ndarray]]]:
    """Examples of each split, of one row each, in seeded random order, BLOCK at a time."""

    def encoded(part: pa.Table) -> dict[str, np.ndarray]:
        ids, numbers = features.encode_all(context, feature_cells(part), len(part))
        return {
            "split": part["split"].to_numpy(),
            "user": part["user_id"].to_numpy().astype(np.int32),
            "context_ids": ids,
            "context_numbers": numbers,
            "cutoff": np.zeros((len(part), 1), np.int32),
            "candidate": part["item_id"].to_numpy().astype(np.int32)[:, None],
            **{n: v[:, None] for n, v in _targets(part, experiment, tasks).items()},
            "row": part["row"].to_numpy()[:, None],
        }

    whole = _pull(events, rows, encoded)
    splits, row = whole.pop("split"), whole["row"][:, 0]
    order = np.lexsort((row, examples.mix(row, experiment.data.seed)))

    def stream(split: int) -> Iterator[dict[str, np.ndarray]]:
        chosen = order[splits[order] == split]
        for start in range(0, max(len(chosen), 1), BLOCK):
            part = chosen[start : start + BLOCK]
            yield {name: array[part] for name, array in whole.items()}

    return {name: stream(split) for split, name in enumerate(SPLITS)}


def _pull(
    events: Any, rows: int, encoded: Callable[[pa.Table], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """All `rows` events as encoded columns, in any order; their text is held slice by slice."""
    whole: dict[str, np.ndarray] = {}
    done, last = 0, events["row"].max().to_pyarrow().as_py()
    for start in range(0, last + 1, _SLICE):
        inside = (events["row"] >= start) & (events["row"] < start + _SLICE)
        part = events.filter(inside).to_pyarrow()
        if not len(part):
            continue
        for name, array in encoded(part).items():
            if name not in whole:
                whole[name] = np.empty((rows, *array.shape[1:]), array.dtype)
            whole[name][done : done + len(part)] = array
        done += len(part)
    return whole


def feature_cells(table: pa.Table) -> dict[str, pa.Array]:
    """The feature columns of events by the feature's name."""
    prefix = "feature_"
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): one_array(table[name]) for name in names}
