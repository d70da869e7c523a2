"""New raw rows, encoded with what an earlier preparation has learned."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from mtrec_jax.config import Experiment
from mtrec_jax.data import features, past
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.encode import feature_cells
from mtrec_jax.data.engine import Engine, open_engine
from mtrec_jax.data.features import one_array
from mtrec_jax.data.read import EXAMPLES, ROW, check_columns
from mtrec_jax.data.schema import typed
from mtrec_jax.data.sources import Source, event_columns, open_source
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, UNKNOWN


def encode_rows(prepared: Prepared, table: Any) -> dict[str, np.ndarray]:
    """Encode new raw rows of a `rows` data set with the vocabularies and scales of a folder.

    Args:
      prepared: a folder of kind "rows".
      table: a file in the format of `data.events`, or an in-memory table; labels may be absent.

    Returns:
      In the order of the input: {"context_ids" [n, M], "context_numbers" [n, C], "candidate"
      [n, 1] (0: missing or no item column, 1: unknown), "user" [n] (likewise)}.

    Raises:
      DataError: the folder holds sequences, a column is missing, or a line is malformed.
    """
    manifest = prepared.manifest
    if manifest.kind != "rows":
        raise DataError(
            f"{prepared.folder} holds sequences: its raw rows cannot be encoded one by one"
        )
    values = {"name": manifest.name, **manifest.config}
    experiment = pydantic.TypeAdapter(Experiment).validate_python(values)
    with tempfile.TemporaryDirectory() as work, open_engine(Path(work)) as opened:
        source = _read_new(opened, experiment, table, event_columns(experiment))
        rows = typed(experiment, source.table, labels=False).order_by("row").to_pyarrow()
    rows = past.look_up(rows, prepared, experiment)
    context = [name for name, feature in experiment.features.items() if feature.on == "context"]
    encodings = [features.restore(prepared, name) for name in context]
    context_ids, context_numbers = features.encode_all(encodings, feature_cells(rows), len(rows))
    return {
        "context_ids": context_ids,
        "context_numbers": context_numbers,
        "candidate": _stored_ids(rows, "item", prepared.items)[:, None],
        "user": _stored_ids(rows, "user", prepared.users),
    }


def read_columns(experiment: Experiment, table: Any, columns: Sequence[str]) -> pa.Table:
    """Columns of new raw rows as text, in the order of the input; missing cells are null.

    Args:
      experiment: its `data.events` says the format.
      table: a file in that format, or an in-memory table.
      columns: which columns, by the names used in the experiment.

    Raises:
      DataError: a column is missing, or a line is malformed.
    """
    with tempfile.TemporaryDirectory() as work, open_engine(Path(work)) as opened:
        source = _read_new(opened, experiment, table, dict.fromkeys(columns, "asked for"))
        return source.table.order_by(ROW).select(*columns).to_pyarrow()


def _read_new(
    opened: Engine, experiment: Experiment, table: Any, columns: dict[str, str]
) -> Source:
    """Raw rows of which none may be left out."""
    path = Path(table) if isinstance(table, (str, os.PathLike)) else None
    files = dataclasses.replace(experiment.data.events, files=(str(path),) if path else ())
    source = open_source(opened, experiment, "rows", files, Path(), None if path else table, 0)
    staged = source.staged
    if staged.bad:
        bad = pq.read_table(staged.malformed).sort_by("row").slice(0, EXAMPLES).to_pylist()
        shown = "; ".join(f"{staged.place(r['row'])}: {r['text'][:80]!r}" for r in bad)
        raise DataError(
            f"{path}: {staged.bad:,} malformed lines, so that results could not be told apart: "
            f"{shown}"
        )
    check_columns("rows", [c for c in source.table.columns if c != ROW], columns, staged.files())
    return source


def _stored_ids(rows: pa.Table, key: str, known: pa.Table) -> np.ndarray:
    if key not in rows.column_names:
        return np.zeros(len(rows), np.int32)
    raw = one_array(rows[key])
    found = pc.fill_null(pc.index_in(raw, value_set=one_array(known["id"])), UNKNOWN - FIRST)
    return np.where(raw.is_valid(), found.to_numpy() + FIRST, 0).astype(np.int32)
