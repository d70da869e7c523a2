"""Events leave the engine, encoded, in the order in which they are written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Experiment
from mtrec_jax.data import examples, features
from mtrec_jax.data.dataset import SPLITS, TaskField
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.schema import count

_SLICE = 1 << 18  # rows that leave the engine at a time


def event_log(
    backend: Any,
    events: Any,
    experiment: Experiment,
    history: list[Encoding],
    tasks: dict[str, TaskField],
) -> examples.Log:
    """All events in the order (user, time, source row), encoded."""
    order = ["user_id", *(["time"] if experiment.data.time else []), "row"]
    position = ibis.row_number().over(ibis.window(order_by=order))
    table = backend.create_table("log", events.mutate(position=position).order_by("position"))
    parts: list[dict[str, np.ndarray]] = []
    for part in _slices(table, count(table)):
        arrays = {
            "user": part["user_id"].to_numpy().astype(np.int32),
            "split": part["split"].to_numpy(),
            "row": part["row"].to_numpy(),
            "time": part["time"].to_numpy() if experiment.data.time else np.zeros(len(part)),
        }
        if experiment.data.item:
            arrays["event_item"] = part["item_id"].to_numpy().astype(np.int32)
        for encoding in history:
            ids = features.encode(encoding, one_array(part[f"feature_{encoding.name}"]))
            arrays[f"event_{encoding.name}"] = ids[:, 0]
        if experiment.data.kind == "sequences":
            arrays |= _targets(part, experiment, tasks)
        parts.append(arrays)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
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
    data = experiment.data
    most = data.positions or data.history_length
    positions = {"train": most}
    for split, name in enumerate(SPLITS[1:], 1):
        positions[name] = max(1, min(most, examples.longest(log, split)))
    context = {"context_ids": encoded[0], "context_numbers": encoded[1]}
    streams = {
        name: examples.sequence_examples(
            log, context, split, positions[name], data.history_length, data.hide_ties, data.seed
        )
        for split, name in enumerate(SPLITS)
    }
    return positions, streams


def row_streams(
    backend: Any,
    events: Any,
    experiment: Experiment,
    context: list[Encoding],
    tasks: dict[str, TaskField],
    sizes: dict[str, int],
) -> dict[str, Iterator[dict[str, np.ndarray]]]:
    """Rows in seeded random order, encoded part by part."""
    order = [examples.mix(events["row"], experiment.data.seed), events["row"]]
    position = ibis.row_number().over(ibis.window(group_by="split", order_by=order))
    ordered = events.mutate(position=position).order_by("split", "position")
    table = backend.create_table("ordered", ordered)

    def stream(split: int, rows: int) -> Iterator[dict[str, np.ndarray]]:
        chosen = table.filter(table["split"] == split)
        parts = _slices(chosen, rows) if rows else iter([chosen.limit(0).to_pyarrow()])
        for part in parts:
            ids, numbers = features.encode_all(context, feature_cells(part), len(part))
            yield {
                "user": part["user_id"].to_numpy().astype(np.int32),
                "context_ids": ids,
                "context_numbers": numbers,
                "cutoff": np.zeros((len(part), 1), np.int32),
                "candidate": part["item_id"].to_numpy().astype(np.int32)[:, None],
                **{n: v[:, None] for n, v in _targets(part, experiment, tasks).items()},
                "row": part["row"].to_numpy()[:, None],
            }

    return {name: stream(split, sizes[name]) for split, name in enumerate(SPLITS)}


def _slices(table: Any, rows: int) -> Iterator[pa.Table]:
    """The `rows` rows of an engine's table in the order of its column `position`, part by part."""
    for start in range(0, rows, _SLICE):
        inside = (table["position"] >= start) & (table["position"] < start + _SLICE)
        yield table.filter(inside).order_by("position").to_pyarrow()


def feature_cells(table: pa.Table) -> dict[str, pa.Array]:
    """The feature columns of events by the feature's name."""
    prefix = "feature_"
    names = [name for name in table.column_names if name.startswith(prefix)]
    return {name.removeprefix(prefix): one_array(table[name]) for name in names}
