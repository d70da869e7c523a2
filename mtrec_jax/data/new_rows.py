"""New requests, encoded with what an earlier preparation has learned."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.arguments import argument
from mtrec_jax.config import Experiment, Files
from mtrec_jax.data import features, past
from mtrec_jax.data.cells import YEAR_2200
from mtrec_jax.data.dataset import (
    NEWER,
    SHOWN,
    Prepared,
    SplitInfo,
    described,
    is_one,
    to_arrays,
)
from mtrec_jax.data.engine import Engine, open_engine
from mtrec_jax.data.features import one_array
from mtrec_jax.data.newer import as_column
from mtrec_jax.data.read import EXAMPLES, ROW, Staged, check_columns
from mtrec_jax.data.rules import with_bounds
from mtrec_jax.data.schema import check_times, columns_of, query_features, typed, value_rules
from mtrec_jax.data.sources import Source, check_single, open_source
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import FIRST, UNKNOWN, Lists


def encode_requests(
    prepared: Prepared, table: Any, unread: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Encode new raw rows, a request each, with the vocabularies and scales of a folder.

    Args:
      prepared: the folder, or the view of one; its features on = "request" are encoded.
      table: a file, or an in-memory table, with the columns of these features, and of the user and
        the item where the data has them. The suffix .csv, .tsv, .jsonl or .parquet (before .gz or
        .zst) says the format, otherwise `data.events` does.
      unread: features that need no column; they are missing in every row.

    Returns:
      In the order of the input: {"request_ids" [n, M], "request_numbers" [n, C], "candidate" [n, 1]
      (0: missing or no item column, 1: unknown), "user" [n] (likewise)}.

    Raises:
      DataError: a column is missing, a line is malformed, a cell is no number or time where one is
        needed, or the times are of another unit.
    """
    manifest, declared = prepared.manifest, described(prepared)
    read = {name: of for name, of in declared.features.items() if name not in unread}
    experiment = dataclasses.replace(declared, features=read)
    needed = columns_of(experiment, "events", outcomes=False)
    with tempfile.TemporaryDirectory() as work, open_engine(Path(work)) as opened:
        source = _read_new(opened, experiment, table, needed)
        cleaned = with_bounds(experiment, manifest.bounds)
        asked = typed(cleaned, source.table, labels=False)
        if "time" in asked.columns:
            _check_unit(asked, experiment)
        rows = asked.order_by("row").to_pyarrow()
    _check_cells(experiment, source.staged, rows)
    rows = past.look_up(rows, prepared, experiment)
    names = [name for name, feature in declared.features.items() if feature.on == "request"]
    encodings = [features.restore(prepared, name) for name in names]
    cells = dict.fromkeys(unread, pa.nulls(len(rows), pa.string())) | _feature_cells(rows)
    ids, numbers = features.encode_all(encodings, cells, len(rows))
    return {
        "request_ids": ids,
        "request_numbers": numbers,
        "candidate": _stored_ids(rows, "item", prepared.items)[:, None],
        "user": _stored_ids(rows, "user", prepared.users),
    }


def with_events(prepared: Prepared, table: Any) -> Prepared:
    """A folder whose users have met more: new events, after the stored ones of each user.

    Args:
      prepared: the folder, or the view of one.
      table: a file, or an in-memory table, a row an event, with the columns of user, item, time and
        the features of the history. Events of a user are taken in the order of time, then of rows.

    Returns:
      The view with these histories. Users who were not there have them alone, and the unknown value
      of each context feature; items that were not there, and such values, are unknown. Where the
      data have searches, which stand in histories as the unknown item, events of items that were
      not there are left out.

    Warns:
      UserWarning: events of users who were there are not later than the last stored one.

    Raises:
      ConfigError: the data has no users or no items, or features that look back on the whole log.
      DataError: as `encode_requests`; or an event without user, item or time.
    """
    experiment = _of_histories(prepared)
    have = columns_of(_without_rules(experiment), "events")
    with tempfile.TemporaryDirectory() as work, open_engine(Path(work)) as opened:
        source = _read_new(opened, experiment, table, have, "events")
        cleaned, _ = value_rules(experiment, source.table, removes=False)
        events = typed(_without_rules(experiment), cleaned)
        if experiment.data.time:
            _check_unit(events, experiment)
        rows = events.order_by("row").to_pyarrow()
        did = _behaviours(prepared, cleaned)
    _check_cells(experiment, source.staged, rows)
    _check_keys(source.staged, rows)
    users = one_array(rows["user"])
    names = pa.array(prepared.user_names, pa.string())
    new = users.filter(pc.invert(pc.is_in(users, value_set=names))).unique()
    owner = pc.index_in(users, value_set=pa.concat_arrays([names, new])).to_numpy()
    has_time = "time" in rows.column_names
    time = rows["time"].to_numpy() if has_time else np.zeros(len(rows))
    split = prepared.manifest.split
    if has_time and len(rows):
        had = np.diff(prepared.user_lists("event_item").offsets)
        sizes = np.concatenate([had, np.zeros(len(new), had.dtype)])
        split = _later(split, time, sizes[owner] > 0)
    order = np.lexsort((np.arange(len(rows)), time, owner))
    events = {"event_item": _stored_ids(rows, "item", prepared.items)[:, None]}
    if experiment.data.queries:
        order = order[events["event_item"][order, 0] != UNKNOWN]
    searched = query_features(experiment)
    for field in prepared.manifest.history:
        if field.name in searched:  # nobody searched in these events
            events[f"event_{field.name}"] = np.zeros((len(rows), field.slots), np.int32)
        else:
            cells = one_array(rows[f"feature_{field.name}"])
            codes = features.encode(features.restore(prepared, field.name), cells)
            events[f"event_{field.name}"] = codes
    events["split"] = np.full((len(rows), 1), SHOWN, np.int8)
    columns = _with_users(prepared, new)
    stored = {name: prepared.user_lists(name) for name in events}
    for task, codes in did.items():
        events[f"did_{task}"] = codes
        offsets = stored["event_item"].offsets
        stored[f"did_{task}"] = Lists(prepared.behaviour(task), offsets)
    for name, codes in events.items():
        columns[name] = _appended(stored[name], codes[order], owner[order], len(new))
    manifest = dataclasses.replace(
        prepared.manifest,
        split=split,
        users=prepared.manifest.users + len(new),
        events=prepared.manifest.events + len(order),
    )
    replaced = prepared.replaced | {"users": pa.table(columns)}
    return dataclasses.replace(prepared, manifest=manifest, replaced=replaced)


def with_users(prepared: Prepared, table: Any) -> Prepared:
    """A folder with other features of its users, and with new users, who have met nothing yet.

    Args:
      prepared: the folder, or the view of one.
      table: a file, or an in-memory table, a row a user, with the columns of the user and of the
        context features. Values that the model has never seen are unknown.

    Raises:
      ConfigError: the data has no users.
      DataError: a missing column, a row without a user, a user twice, or a cell that is no number
        where one is needed.
    """
    experiment, fields = described(prepared), {f.name for f in prepared.manifest.fields}
    user = experiment.data.user
    if not user:
        raise ConfigError("users: these data have none")
    asked = {
        name: feature.column or name
        for name, feature in experiment.features.items()
        if feature.on == "context" and feature.fitted and name in fields
    }
    if not asked:
        raise ConfigError("users: the model has no features of users (on = 'context') to know by")
    if experiment.data.users:  # its format and names, and not those of the events
        data = dataclasses.replace(experiment.data, events=experiment.data.users, derive={})
        experiment = dataclasses.replace(experiment, data=data)
    rows = read_columns(experiment, table, list(dict.fromkeys([user, *asked.values()])), "users")
    given = one_array(rows[user])
    if given.null_count or len(given.unique()) < len(given):
        twice = [c for c in given.value_counts().to_pylist() if c["counts"] > 1]
        what = f"{twice[0]['values']!r} has several" if twice else "one names no user"
        raise DataError(f"users: a row for each user is needed, and {what}")
    names = pa.array(prepared.user_names, pa.string())
    new = given.filter(pc.invert(pc.is_in(given, value_set=names)))
    place = pc.index_in(given, value_set=pa.concat_arrays([names, new])).to_numpy()
    columns: dict[str, Any] = _with_users(prepared, new)
    for name, column in asked.items():
        encoding, cells = features.restore(prepared, name), one_array(rows[column])
        if (bad := np.flatnonzero(features.unreadable(encoding.feature, cells))).size:
            raise DataError(f"users: {column} = {cells[int(bad[0])].as_py()!r} is no number")
        codes = to_arrays(pa.table({name: columns[f"context_{name}"]}))[name]
        codes = codes.reshape(len(codes), -1).copy()
        codes[place] = features.encode(encoding, cells)
        columns[f"context_{name}"] = as_column(codes)
    nobody = np.zeros(0, np.int64)
    for name in prepared.users.column_names:
        if name == "split" or name.startswith(("event_", "did_")):
            stored = prepared.user_lists(name)
            slots = stored.values.shape[1] if stored.values.ndim > 1 else 1
            none = np.zeros((0, slots), stored.values.dtype)
            columns[name] = _appended(stored, none, nobody, len(new))
    more = prepared.manifest.users + len(new)
    manifest = dataclasses.replace(prepared.manifest, users=more)
    replaced = prepared.replaced | {"users": pa.table(columns)}
    return dataclasses.replace(prepared, manifest=manifest, replaced=replaced)


def _behaviours(prepared: Prepared, events: Any) -> dict[str, np.ndarray]:
    """{binary task that may make an item seen: whether each new event did [n, 1]}; True where its
    column is not there."""
    declared = described(prepared).tasks
    columns = {name: task.column or name for name, task in declared.items()}
    there = sorted({column for column in columns.values() if column in events.columns})
    texts = events.order_by(ROW).select(ROW, *there).to_pyarrow()
    found = {}
    for name in prepared.behaviours:
        ones, task = np.ones((len(texts), 1), bool), declared.get(name)
        if task and columns[name] in there:
            cells = texts[columns[name]].to_pylist()
            ones = np.array([[is_one(task, cell or "")] for cell in cells], bool).reshape(-1, 1)
        found[name] = ones
    return found


def _of_histories(prepared: Prepared) -> Experiment:
    """What the folder was prepared with, as far as it concerns histories."""
    experiment = described(prepared)
    if not (experiment.data.user and experiment.data.item):
        raise ConfigError("events: these data have no users, or no items, so no histories")
    if back := [name for name, f in experiment.features.items() if f.looks_back]:
        raise ConfigError(
            f"events: {', '.join(back)} look back on the whole log. Prepare the newer log with "
            f"{argument('grow_from')} {prepared.folder}, and pass that folder as prepared"
        )
    clean = dataclasses.replace(experiment.clean, earliest="", latest="")
    experiment = dataclasses.replace(
        experiment,
        tasks={},
        clean=dataclasses.replace(clean, duplicate_columns=()),
        features={n: f for n, f in experiment.features.items() if f.on == "history"},
    )
    return with_bounds(experiment, prepared.manifest.bounds)


def _later(split: SplitInfo, time: np.ndarray, have_more: np.ndarray) -> SplitInfo:
    """With the times of more events; warns of those that may be stored already.

    Args:
      split: of the events so far.
      time: [n] seconds of the new ones.
      have_more: [n] whether events of the same user are stored.
    """
    ends = [end for _, end in split.times.values() if end < YEAR_2200]
    last = max(ends, default=-np.inf)
    if again := int((have_more & (time <= last)).sum()):
        day = str(np.datetime64(int(last), "s")).replace("T", " ")
        warnings.warn(
            f"events: {again:,} of {len(time):,} are not later than the last stored one ({day}, "
            f"{last:.0f}). Pass only what is not stored yet: an event that is given again counts "
            "twice",
            stacklevel=4,
        )
    begin, end = split.times.get(NEWER, (np.inf, -np.inf))
    span = min(begin, float(time.min())), max(end, float(time.max()))
    return dataclasses.replace(split, times=split.times | {NEWER: span})


def _without_rules(experiment: Experiment) -> Experiment:
    """Without rules about values, and without what derives columns, which are there by now."""
    clean = dataclasses.replace(experiment.clean, values={})
    data = dataclasses.replace(experiment.data, derive={})
    return dataclasses.replace(experiment, clean=clean, data=data)


def _check_unit(events: Any, experiment: Experiment) -> None:
    unit = experiment.data.time_unit
    check_times(events, unit, f"Write them in '{unit}'")


def _check_keys(staged: Staged, rows: pa.Table) -> None:
    wrong = rows.filter(rows["problem"].is_valid()).slice(0, 1).to_pylist()
    if wrong:
        raise DataError(f"events: {staged.place(wrong[0]['row'])}: {wrong[0]['problem']}")


def _with_users(prepared: Prepared, new: pa.Array) -> dict[str, pa.Array]:
    """The columns of users that are no lists of events, with new users who are known by id only."""
    fields = {f"context_{f.name}": f for f in prepared.manifest.fields}
    columns = {}
    for name in prepared.users.column_names:
        stored = one_array(prepared.users[name])
        if name == "id":
            more = new.cast(stored.type)
        elif name in fields:
            codes = np.repeat(features.unknown_codes(prepared, fields[name]), len(new), axis=0)
            more = as_column(codes).cast(stored.type)
        elif name.startswith("text_"):
            more = pa.nulls(len(new), stored.type)
        else:
            continue
        columns[name] = pa.concat_arrays([stored, more])
    return columns


def _appended(stored: Lists, codes: np.ndarray, owner: np.ndarray, new: int) -> pa.LargeListArray:
    """Lists of codes, with more at the end of those of each owner; `owner` [n] is sorted.

    `new` owners have had none.
    """
    sizes = np.concatenate([np.diff(stored.offsets), np.zeros(new, np.int64)])
    more = np.bincount(owner, minlength=len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes + more)])
    old = stored.values.reshape(len(stored.values), codes.shape[1])
    found = np.empty((offsets[-1], codes.shape[1]), old.dtype)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    found[np.arange(len(old)) + np.repeat(offsets[:-1] - begins[:-1], sizes)] = old
    nth = np.arange(len(owner)) - np.searchsorted(owner, owner)
    found[(offsets[:-1] + sizes)[owner] + nth] = codes
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), as_column(found))


def _feature_cells(table: pa.Table) -> dict[str, pa.Array]:
    """The feature columns of events by the feature's name."""
    names = [name for name in table.column_names if name.startswith("feature_")]
    return {name.removeprefix("feature_"): one_array(table[name]) for name in names}


def read_columns(
    experiment: Experiment, table: Any, columns: Sequence[str], what: str = "rows"
) -> pa.Table:
    """Columns of new raw rows as text, in the order of the input; missing cells are null.

    Args:
      experiment: its `data.events` says the format, unless the file's suffix does.
      table: a file, or an in-memory table.
      columns: which columns, by the names used in the experiment.
      what: the argument that the table is, for messages.

    Raises:
      DataError: a column is missing, or a line is malformed.
    """
    with tempfile.TemporaryDirectory() as work, open_engine(Path(work)) as opened:
        purposes = columns_of(experiment, "events")
        needed = {column: purposes.get(column, "asked for") for column in columns}
        source = _read_new(opened, experiment, table, needed, what)
        return source.table.order_by(ROW).select(*columns).to_pyarrow()


def _read_new(
    opened: Engine,
    experiment: Experiment,
    table: Any,
    columns: dict[str, str],
    what: str = "rows",
) -> Source:
    """Raw rows of which none may be left out."""
    given = isinstance(table, (str, os.PathLike))
    path = os.fspath(table) if given else what
    errors: list[tuple[int, DataError]] = []
    for files in _formats(path if given else "", experiment.data.events):
        shutil.rmtree(opened.folder / "raw_rows_0", ignore_errors=True)  # of the format before
        have: list[str] = []
        try:
            source = open_source(
                opened, experiment, "rows", files, Path(), None if given else table, 0, columns
            )
            have = [c for c in source.table.columns if c != ROW]
            check_columns(path, have, columns, source.staged.files())
            check_single(experiment, "rows", source)
            break
        except DataError as error:
            errors.append((len(set(have) & set(columns)), error))
    else:
        raise max(reversed(errors), key=lambda found: found[0])[1]  # of the format that fits best
    staged = source.staged
    if staged.bad:
        bad = pq.read_table(staged.malformed).sort_by("row").slice(0, EXAMPLES).to_pylist()
        shown = "; ".join(f"{staged.place(r['row'])}: {r['text'][:80]!r}" for r in bad)
        raise DataError(
            f"{path}: {staged.bad:,} malformed lines, and none may be left out, as answers "
            f"stand in the order of the rows: {shown}. A cell of several lines needs Parquet or "
            "JSON lines"
        )
    return source


def _check_cells(experiment: Experiment, staged: Staged, rows: pa.Table) -> None:
    """Raise `DataError` for the first cell that would silently count as missing."""
    cells = _feature_cells(rows)
    for name, values in cells.items():
        feature = experiment.features[name]
        wrong = np.flatnonzero(features.unreadable(feature, values)).tolist()
        if wrong:
            place = staged.place(rows["row"][wrong[0]].as_py())
            more = f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
            raise DataError(
                f"{place}: column '{feature.column or name}' holds {values[wrong[0]].as_py()!r}"
                f"{more}, but feature '{name}' needs a number. Mend the cell, or leave it empty "
                "where the number is missing"
            )
    times = pc.equal(rows["problem"], "malformed time")
    if pc.any(times).as_py():
        first = rows.filter(times).slice(0, 1).to_pylist()[0]
        raise DataError(
            f"{staged.place(first['row'])}: column '{experiment.data.time}' holds "
            f"{first['evidence']!r}, which is no time. Write Unix {experiment.data.time_unit} or "
            "ISO 8601"
        )


def _formats(path: str, events: Files) -> Iterator[Files]:
    """What a file of new rows may be: what its suffix says, with the names of the columns in it;
    or of the training files' format, separator and header. In memory (""): only the renaming."""
    as_events = dataclasses.replace(events, files=(path,) if path else ())
    name = Path(path.lower().removesuffix(".gz").removesuffix(".zst"))
    kind: Any = name.suffix.removeprefix(".")
    if kind not in ("csv", "tsv", "jsonl", "parquet"):
        yield as_events
        return
    plain = Files(files=(path,), format=kind, rename=events.rename)
    yield plain
    delimited = ("csv", "tsv", "atomic")
    if kind in delimited and events.format in delimited and plain != as_events:
        yield as_events


def _stored_ids(rows: pa.Table, key: str, known: pa.Table) -> np.ndarray:
    if key not in rows.column_names:
        return np.zeros(len(rows), np.int32)
    raw = one_array(rows[key])
    found = pc.fill_null(pc.index_in(raw, value_set=one_array(known["id"])), UNKNOWN - FIRST)
    return np.where(raw.is_valid(), found.to_numpy() + FIRST, 0).astype(np.int32)
