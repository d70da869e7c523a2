"""The files of a prepared folder, but for the manifest and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.config import Experiment
from mtrec_jax.data import examples
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.fit import text_columns


def write_examples(
    folder: Path, streams: dict[str, Iterator[dict[str, np.ndarray]]], say: Callable[[str], None]
) -> dict[str, tuple[int, int]]:
    """Write the examples of each split; returns how many there are, and how many targets."""
    written = {}
    for name, stream in streams.items():
        written[name] = examples.write_examples(folder / f"{name}.parquet", stream)
        say(f"{name}: {written[name][0]:,} examples, {written[name][1]:,} targets")
    return written


def write_vocabularies(folder: Path, encodings: list[Encoding], items: pa.Array | None) -> None:
    """Write the values of the features, and those of the items' own table where they are given."""
    if items is not None:
        pq.write_table(pa.table({"value": items}), folder / "item_vocabulary.parquet")
    for encoding in encodings:
        if len(encoding.values):
            vocabulary = pa.table({"value": encoding.values, "count": encoding.counts})
            pq.write_table(vocabulary, folder / "vocabularies" / f"{encoding.name}.parquet")


def write_items(
    folder: Path, experiment: Experiment, items: pa.Table, encoded: tuple[np.ndarray, np.ndarray]
) -> None:
    """Write the catalogue: items in the order of their ids, with ids and numbers of features."""
    title = f"column_{experiment.data.title}"
    titles = items[title] if title in items.column_names else pa.nulls(len(items), pa.string())
    columns = {
        "id": one_array(items["item"]),
        "title": pc.fill_null(one_array(titles), ""),
        "count": items["count"].to_numpy(),
        "item_ids": encoded[0],
        "item_numbers": encoded[1],
        **text_columns(experiment, items, "item"),
    }
    pq.write_table(examples.to_table(columns), folder / "items.parquet")


def write_users(
    folder: Path,
    experiment: Experiment,
    users: pa.Table,
    encoded: tuple[np.ndarray, np.ndarray],
    log: examples.Log | None,
) -> None:
    """Write the users in the order of their ids, with their events in time order."""
    columns = {"id": one_array(users["user"])}
    if experiment.data.kind == "sequences":
        columns |= {"context_ids": encoded[0], "context_numbers": encoded[1]}
        columns |= text_columns(experiment, users, "context")
    if log is not None:
        offsets = pa.array(log.offsets(len(users)), pa.int32())
        lists = {f"event_{field}": ids for field, ids in log.events.items()} | {"split": log.split}
        columns |= {n: pa.ListArray.from_arrays(offsets, pa.array(v)) for n, v in lists.items()}
    pq.write_table(examples.to_table(columns), folder / "users.parquet")
