"""Raw logs to the prepared folder: clean, split, index, encode, write (format: `data.dataset`)."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from mtrec_jax.config import Experiment
from mtrec_jax.data import clean, describe, examples, features
from mtrec_jax.data.dataset import (
    FORMAT,
    SPLITS,
    IdField,
    Manifest,
    NumberField,
    Prepared,
    Rule,
    open_prepared,
)
from mtrec_jax.data.encode import event_log, feature_cells, row_streams, sequence_streams
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.fit import fit_events, fit_side, fit_tasks
from mtrec_jax.data.index import side_table, with_ids
from mtrec_jax.data.read import ROW, check_columns
from mtrec_jax.data.schema import (
    Source,
    count,
    engine,
    event_columns,
    read_source,
    read_sources,
    typed,
)
from mtrec_jax.data.split import split_events
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, UNKNOWN

Say = Callable[[str], None]


def prepare(
    experiment: Experiment,
    data: str | Path | None,
    out: str | Path,
    tables: dict[str, Any] | None = None,
    progress: Say | None = None,
    accept: Callable[[Manifest], None] | None = None,
) -> Prepared:
    """Clean, split, index and encode raw tables, and write them as the folder `out`.

    The folder appears whole or not at all. An older prepared folder of that name is replaced.

    Args:
      experiment: what the columns mean, and what to make of them.
      data: folder of the raw files; may be None when every table is given.
      out: the folder to write.
      tables: in-memory pandas, Polars or Arrow tables, in the place of files:
        {"events": ..., "items": ..., "users": ..., "test": ...}; "test" for `split.test_files`.
      progress: called with a line of text as the work goes on.
      accept: called with the new manifest before `out` is replaced; if it raises, `out` stays.

    Returns:
      The opened folder.

    Raises:
      DataError: a file, column, row or label is not what the experiment says, or nothing is left,
        or `out` holds something else. The message names the place and the remedy.
      ConfigError: the experiment asks for something that cannot be prepared.
    """
    out = Path(out)
    describe.check(experiment)
    foreign = out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file()
    if out.is_file() or foreign:
        raise DataError(
            f"{out} exists and is no prepared folder (no manifest.json), so it is not replaced. "
            "Name another folder, or remove it"
        )
    partial = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "vocabularies").mkdir(parents=True)
        with engine(partial / "work") as backend:
            say = progress or (lambda text: None)
            sources = read_sources(backend, experiment, data, tables or {}, say)
            manifest = _build(backend, experiment, sources, partial, say)
        shutil.rmtree(partial / "work", ignore_errors=True)
        manifest.save(partial)
        if accept:
            accept(manifest)
        _put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_prepared(out)


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename the finished folder to its name; an older one is moved aside first, then removed."""
    old = partial.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _build(
    backend: Any, experiment: Experiment, sources: dict[str, Source], folder: Path, say: Say
) -> Manifest:
    """Everything between the raw tables and the manifest; writes all other files."""
    data = experiment.data
    events, rules = _clean(backend, experiment, sources)
    events = backend.create_table("split", split_events(events, experiment))
    found = events.group_by("split").agg(n=events.count()).to_pyarrow().to_pylist()
    sizes = dict.fromkeys(SPLITS, 0) | {SPLITS[r["split"]]: r["n"] for r in found}
    describe.check_splits(experiment, sizes)
    say("split: " + ", ".join(f"{name} {n:,}" for name, n in sizes.items()) + " events")
    tasks, task_rules = fit_tasks(events, experiment)
    users, user_rules = side_table(backend, experiment, events, "user", sources.get("users"))
    items, item_rules = side_table(backend, experiment, events, "item", sources.get("items"))
    item, item_cells = fit_side(experiment, items, "item", "item")
    on_users: list[Encoding] = []
    user_cells: dict[str, pa.Array] = {}
    if data.kind == "sequences":
        on_users, user_cells = fit_side(experiment, users, "user", "context")
    on_events, unreadable = fit_events(events, experiment)
    rules += [*task_rules, *user_rules, *item_rules, *unreadable]
    for encoding in (*on_users, *item, *on_events):
        if encoding.feature.kind != "numeric":
            vocabulary = pa.table({"value": encoding.values, "count": encoding.counts})
            pq.write_table(vocabulary, folder / "vocabularies" / f"{encoding.name}.parquet")
    _write_items(folder, experiment, items, features.encode_all(item, item_cells, len(items)))
    say(f"index: {len(users):,} users, {len(items):,} items")

    events = with_ids(backend, events)
    user_arrays = features.encode_all(on_users, user_cells, len(users))
    history = on_events if data.kind == "sequences" else []
    total = sum(sizes.values())
    log = event_log(events, total, experiment, history, tasks) if data.user else None
    _write_users(folder, experiment, users, user_arrays, log)
    if data.kind == "sequences":
        assert log is not None
        positions, streams = sequence_streams(experiment, log, user_arrays)
    else:
        positions = dict.fromkeys(SPLITS, 1)
        streams = row_streams(events, total, experiment, on_events, tasks)
    written = {}
    for name, stream in streams.items():
        written[name] = examples.write_examples(folder / f"{name}.parquet", stream)
        say(f"{name}: {written[name][0]:,} examples, {written[name][1]:,} targets")
    context = on_users if data.kind == "sequences" else on_events
    digests = [digest for source in sources.values() for digest in source.digests]
    return Manifest(
        format=FORMAT,
        name=experiment.name,
        kind=data.kind,
        protocol=describe.protocol(experiment, len(users), len(items), total),
        fingerprint=describe.fingerprint(experiment, digests),
        config=describe.configuration(experiment),
        users=len(users),
        items=len(items),
        trained_items=pc.sum(pc.greater(items["count"], 0)).as_py() or 0,
        events=total,
        history_length=data.history_length if data.kind == "sequences" else 0,
        examples={name: n for name, (n, _) in written.items()},
        positions=positions,
        targets={name: n for name, (_, n) in written.items()},
        context_ids=_id_fields(context),
        context_numbers=_number_fields(context),
        item_ids=_id_fields(item),
        item_numbers=_number_fields(item),
        history=_id_fields(history),
        tasks=tasks,
        report=tuple(rules),
    )


def _id_fields(encodings: list[Encoding]) -> tuple[IdField, ...]:
    return tuple(e.field for e in encodings if isinstance(e.field, IdField))


def _number_fields(encodings: list[Encoding]) -> tuple[NumberField, ...]:
    return tuple(e.field for e in encodings if isinstance(e.field, NumberField))


def _clean(
    backend: Any, experiment: Experiment, sources: dict[str, Source]
) -> tuple[Any, list[Rule]]:
    """All usable events with their `part` (1: of the test files), labels in their sample space."""
    parts, rules = [], []
    for part, name in enumerate(n for n in ("events", "test") if n in sources):
        good, found = clean.clean_source(backend, experiment, sources[name])
        parts.append(good.mutate(part=ibis.literal(part, "int8")))
        rules += found
    events = parts[0] if len(parts) == 1 else parts[0].union(parts[1])
    events, found = clean.k_core(backend, events, experiment.clean)
    rules += found
    if not count(events):
        report = "\n".join(f"  {rule.rule}: {rule.rows:,}" for rule in rules)
        raise DataError(f"no event is left after cleaning:\n{report}\nLower the limits in [clean]")
    rules += clean.missing_labels(events, experiment)
    return clean.sample_spaces(events, experiment), rules


def _write_items(
    folder: Path, experiment: Experiment, items: pa.Table, encoded: tuple[np.ndarray, np.ndarray]
) -> None:
    title = f"column_{experiment.data.title}"
    titles = items[title] if title in items.column_names else pa.nulls(len(items), pa.string())
    columns = {
        "id": one_array(items["item"]),
        "title": pc.fill_null(one_array(titles), ""),
        "count": items["count"].to_numpy(),
        "item_ids": encoded[0],
        "item_numbers": encoded[1],
    }
    pq.write_table(examples.to_table(columns), folder / "items.parquet")


def _write_users(
    folder: Path,
    experiment: Experiment,
    users: pa.Table,
    encoded: tuple[np.ndarray, np.ndarray],
    log: examples.Log | None,
) -> None:
    columns = {"id": one_array(users["user"])}
    if experiment.data.kind == "sequences":
        columns |= {"context_ids": encoded[0], "context_numbers": encoded[1]}
    if log is not None:
        offsets = pa.array(log.offsets(len(users)), pa.int32())
        lists = {f"event_{field}": ids for field, ids in log.events.items()} | {"split": log.split}
        columns |= {n: pa.ListArray.from_arrays(offsets, pa.array(v)) for n, v in lists.items()}
    pq.write_table(examples.to_table(columns), folder / "users.parquet")


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
    with tempfile.TemporaryDirectory() as work, engine(Path(work)) as backend:
        source = _read_new(backend, experiment, table, event_columns(experiment))
        rows = typed(experiment, source, labels=False).order_by("row").to_pyarrow()
    encodings = _stored_encodings(prepared, experiment)
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
    with tempfile.TemporaryDirectory() as work, engine(Path(work)) as backend:
        source = _read_new(backend, experiment, table, dict.fromkeys(columns, "asked for"))
        return source.table.order_by(ROW).select(*columns).to_pyarrow()


def _read_new(backend: Any, experiment: Experiment, table: Any, columns: dict[str, str]) -> Source:
    """Raw rows of which none may be left out."""
    path = Path(table) if isinstance(table, (str, os.PathLike)) else None
    files = dataclasses.replace(experiment.data.events, files=(str(path),) if path else ())
    source = read_source(backend, "rows", files, Path(), None if path else table, 0, "")
    if source.bad:
        raise DataError(
            f"{path}: {source.bad:,} malformed lines, so that results could not be told apart: "
            f"{'; '.join(source.examples)}"
        )
    check_columns("rows", list(source.columns), columns, source.files())
    return source


def _stored_encodings(prepared: Prepared, experiment: Experiment) -> list[Encoding]:
    scales = {field.name: field for field in prepared.manifest.context_numbers}
    encodings = []
    for name, feature in experiment.features.items():
        if feature.on == "context" and name in scales:
            nothing, scale = pa.array([], pa.string()), scales[name]
            encodings.append(Encoding(name, feature, nothing, np.zeros(0), scale.mean, scale.std))
        elif feature.on == "context":
            table = prepared.vocabulary(name)
            counts = table["count"].to_numpy()
            encodings.append(Encoding(name, feature, one_array(table["value"]), counts))
    return encodings


def _stored_ids(rows: pa.Table, key: str, known: pa.Table) -> np.ndarray:
    if key not in rows.column_names:
        return np.zeros(len(rows), np.int32)
    raw = one_array(rows[key])
    found = pc.fill_null(pc.index_in(raw, value_set=one_array(known["id"])), UNKNOWN - FIRST)
    return np.where(raw.is_valid(), found.to_numpy() + FIRST, 0).astype(np.int32)
