"""Raw logs to the prepared folder: clean, split, index, encode, write (format: `data.dataset`)."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.arguments import a_path, instance, one_of
from mtrec_jax.config import Experiment
from mtrec_jax.data import clean, describe, examples, features, guards, past, report
from mtrec_jax.data.bounds import Bounds
from mtrec_jax.data.dataset import (
    FORMAT,
    SPLITS,
    IdField,
    Lists,
    Manifest,
    NumberField,
    Prepared,
    Rule,
    SplitInfo,
    Summary,
    TaskField,
    open_prepared,
)
from mtrec_jax.data.encode import event_log, row_streams, sequence_streams
from mtrec_jax.data.engine import Engine, Name, count, open_engine
from mtrec_jax.data.features import Encoding
from mtrec_jax.data.fit import fit_events, fit_side, fit_tasks, values_report
from mtrec_jax.data.growth import item_vocabulary, open_base, summary
from mtrec_jax.data.index import side_table, with_ids
from mtrec_jax.data.schema import check_times
from mtrec_jax.data.social import fit_tastes
from mtrec_jax.data.social_tables import friend_lists, read_queries, with_queries
from mtrec_jax.data.sources import EVENTS, Source, read_sources
from mtrec_jax.data.split import describe_split
from mtrec_jax.data.twins import row_in_two_splits
from mtrec_jax.data.write import write_examples, write_items, write_users, write_vocabularies
from mtrec_jax.errors import DataError

Say = Callable[[str], None]


def prepare(
    experiment: Experiment,
    data: str | Path | None,
    out: str | Path,
    tables: dict[str, Any] | None = None,
    progress: Say | None = None,
    engine: Name = "duckdb",
    memory: str = "",
    master: str = "local[*]",
    accept: Callable[[Manifest], None] | None = None,
    grow_from: str | Path | None = None,
) -> Prepared:
    """Clean, split, index and encode raw tables, and write them as the folder `out`.

    The folder appears whole or not at all. An older prepared folder of that name is replaced.

    Args:
      experiment: what the columns mean, and what to make of them.
      data: folder of the raw files; may be None when every table is given.
      out: the folder to write.
      tables: in-memory pandas, Polars or Arrow tables, in the place of files:
        {"events": ..., "items": ..., "users": ..., "test": ..., "validation": ...,
        "queries": ..., "ties": ...}; "test" and "validation" are the ones of split.kind = "files".
      progress: called with a line of text as the work goes on.
      engine: "duckdb", or "spark" (the extra mtrec_jax[spark]); both give the same folder.
      memory: most memory of the engine, such as "4GB"; by default a quarter of the machine's.
      master: of Spark; a cluster must see the folders `data` and `out`.
      accept: called with the new manifest before `out` is replaced; if it raises, `out` stays.
      grow_from: a prepared folder of the same features, whose vocabularies these begin with, so
        that known values keep their ids; its bins, scales and classes stay as they are.

    Returns:
      The opened folder.

    Raises:
      DataError: a file, column, row or label is not what the experiment says, or nothing is left,
        or `out` holds something else. The message names the place and the remedy.
      ConfigError: the experiment asks for something that cannot be prepared.
    """
    instance("experiment", experiment, Experiment, "pass what load_experiment gives")
    out = a_path("out", out)
    data = None if data is None else a_path("data", data)
    if not isinstance(tables, Mapping | None):
        kind = type(tables).__name__
        raise DataError(f"tables: a {kind}; pass a mapping such as {{'events': table}}")
    describe.check(experiment)
    for name, text in (("memory", memory), ("master", master)):
        instance(name, text, str, "such as memory='4GB', master='local[*]'")
    one_of("engine", engine, ("duckdb", "spark"))
    foreign = out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file()
    if out.is_file() or foreign:
        raise DataError(
            f"{out} exists and is no prepared folder (no manifest.json), so it is not replaced. "
            "Name another folder, or remove it"
        )
    base = None if grow_from is None else open_base(grow_from, experiment)
    partial = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (partial / "vocabularies").mkdir(parents=True)
        with open_engine(partial / "work", engine, memory, master) as opened:
            say = progress or (lambda text: None)
            sources = read_sources(opened, experiment, data, tables or {}, say)
            manifest = _build(opened, experiment, sources, partial, say, base)
        shutil.rmtree(partial / "work", ignore_errors=True)
        report.write_report(Prepared(partial, manifest), partial / "report.html")
        manifest.save(partial)
        if accept:
            accept(manifest)
        _put_in_place(partial, out)
    except OSError as error:  # raw files that cannot be read have errors of their own
        raise DataError(
            f"{out} cannot be written: {error}. Free room on that disk, check its permissions, or "
            "prepare to another folder"
        ) from error
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


class _Cleaned(NamedTuple):
    """What the raw tables have become: clean, split, guarded, indexed."""

    events: Any  # ibis table with its split
    queries: Any  # ibis table of searches, or None
    users: pa.Table  # in the order of their ids, with their columns and training events
    items: pa.Table
    friends: Lists | None
    split: SplitInfo
    tasks: dict[str, TaskField]
    summary: Summary
    rules: list[Rule]
    bounds: dict[str, Bounds]  # fitted, of clean.values
    quarantined: int


class _Fitted(NamedTuple):
    """Features fitted on the training rows, and what is encoded already."""

    users: list[Encoding]
    items: list[Encoding]
    events: list[Encoding]  # of the history, or of rows
    user_arrays: tuple[np.ndarray, np.ndarray]  # ids [U, M], numbers [U, C]
    item_arrays: tuple[np.ndarray, np.ndarray]


def _build(
    engine: Engine,
    experiment: Experiment,
    sources: dict[str, Source],
    folder: Path,
    say: Say,
    base: Prepared | None,
) -> Manifest:
    """Everything between the raw tables and the manifest; writes all other files."""
    data = experiment.data
    cleaned = _clean(engine, experiment, sources, folder, say, base)
    events, fitted = _fit(engine, experiment, cleaned, folder, base)
    say(f"index: {len(cleaned.users):,} users, {len(cleaned.items):,} items")
    write_items(folder, experiment, cleaned.items, fitted.item_arrays)
    if data.kind == "sequences":
        context, positions, streams = _sequences(
            engine, experiment, cleaned, fitted, events, folder, base
        )
    else:
        context, positions = fitted.events, dict.fromkeys(SPLITS, 1)
        log = _log(engine, experiment, cleaned, [], events) if data.user else None
        write_users(folder, experiment, cleaned.users, fitted.user_arrays, log)
        streams = row_streams(engine, events, experiment, fitted.events, cleaned.tasks)
    written = write_examples(folder, streams, say)
    history = fitted.events if data.kind == "sequences" else []
    own, encodings = item_vocabulary(base, cleaned.items), [*fitted.items, *context, *history]
    write_vocabularies(folder, encodings, own)
    if base:
        say(summary(base, cleaned.items, encodings))
    digests = [digest for source in sources.values() for digest in source.staged.digests]
    continues = base.manifest.fingerprint if base else ""
    users, items, total = len(cleaned.users), len(cleaned.items), sum(cleaned.split.sizes.values())
    return Manifest(
        format=FORMAT,
        name=experiment.name,
        kind=data.kind,
        protocol=describe.protocol(experiment, users, items, total),
        fingerprint=describe.fingerprint(experiment, digests + [continues] * bool(base)),
        config=describe.configuration(experiment),
        users=users,
        items=items,
        trained_items=pc.sum(pc.greater(cleaned.items["count"], 0)).as_py() or 0,
        events=total,
        quarantined=cleaned.quarantined,
        split=cleaned.split,
        history_length=data.history_length if data.kind == "sequences" else 0,
        examples={name: n for name, (n, _) in written.items()},
        positions=positions,
        targets={name: n for name, (_, n) in written.items()},
        context_ids=_id_fields(context),
        context_numbers=_number_fields(context),
        item_ids=_id_fields(fitted.items),
        item_numbers=_number_fields(fitted.items),
        history=_id_fields(history),
        tasks=cleaned.tasks,
        report=(*cleaned.rules, *values_report(encodings)),
        bounds=cleaned.bounds,
        summary=cleaned.summary,
        continues=continues,
        item_values=0 if own is None else len(own),
        event_files=sources["events"].staged.digests,
    )


def _clean(
    engine: Engine,
    experiment: Experiment,
    sources: dict[str, Source],
    folder: Path,
    say: Say,
    base: Prepared | None,
) -> _Cleaned:
    """Clean and split the raw tables, give ids, and stop on leaks before anything is fitted."""
    events, rules, removed, bounds = clean.clean_events(engine, experiment, sources)
    if experiment.data.time:
        rules += check_times(events, experiment.data.time_unit)
    split = describe_split(events, experiment)
    describe.check_splits(experiment, split.sizes)
    say("split: " + ", ".join(f"{name} {n:,}" for name, n in split.sizes.items()) + " events")
    tasks, task_rules, labels = fit_tasks(events, experiment, base)
    users, user_rules = side_table(engine, experiment, events, "user", sources.get("users"))
    items, item_rules = side_table(engine, experiment, events, "item", sources.get("items"))
    queries, query_rules = read_queries(engine, experiment, sources.get("queries"), events)
    friends, users, tie_rules = friend_lists(engine, experiment, sources.get("ties"), users)
    quarantined = _quarantine(engine, sources, removed, folder, events)
    _guard(experiment, sources, events, {"user": users, "item": items})
    for name in sources.keys() & set(EVENTS):  # nothing reads them from here
        engine.forget(f"raw_{name}_{sources[name].staged.places[0][0]}")
    rules += [*task_rules, *user_rules, *item_rules, *query_rules, *tie_rules]
    summary = report.summarize(events, labels)
    return _Cleaned(
        events, queries, users, items, friends, split, tasks, summary, rules, bounds, quarantined
    )


def _fit(
    engine: Engine, experiment: Experiment, cleaned: _Cleaned, folder: Path, base: Prepared | None
) -> tuple[Any, _Fitted]:
    """Learn the features, and give the events with ids, searches and counts of the past."""
    users: list[Encoding] = []
    user_cells: dict[str, pa.Array] = {}
    if experiment.data.kind == "sequences":
        users, user_cells = fit_side(experiment, cleaned.users, "user", "context", base)
    items, item_cells = fit_side(experiment, cleaned.items, "item", "item", base)
    for name, table in past.final(cleaned.events, experiment).items():  # for new rows
        (folder / "past").mkdir(exist_ok=True)
        pq.write_table(table, folder / "past" / f"{name}.parquet")
    events = past.add(engine, cleaned.events, experiment)
    on_events = fit_events(events, experiment, base)
    if cleaned.queries is not None:
        on_events += fit_events(cleaned.queries, experiment, base)
    events = with_queries(engine, with_ids(engine, events), cleaned.queries)
    return events, _Fitted(
        users,
        items,
        on_events,
        features.encode_all(users, user_cells, len(cleaned.users)),
        features.encode_all(items, item_cells, len(cleaned.items)),
    )


def _log(
    engine: Engine, experiment: Experiment, cleaned: _Cleaned, history: list[Encoding], events: Any
) -> examples.Log:
    """Events and searches, encoded, user by user in time order."""
    total = sum(cleaned.split.sizes.values())
    total += count(cleaned.queries) if cleaned.queries is not None else 0
    return event_log(engine, events, total, experiment, history, cleaned.tasks)


def _sequences(
    engine: Engine,
    experiment: Experiment,
    cleaned: _Cleaned,
    fitted: _Fitted,
    events: Any,
    folder: Path,
    base: Prepared | None,
) -> tuple[list[Encoding], dict[str, int], dict[str, Iterator[dict[str, np.ndarray]]]]:
    """Context features, positions and examples of users' histories; writes the users."""
    log = _log(engine, experiment, cleaned, fitted.events, events)
    guards.next_event_known(log, experiment)
    tastes = fit_tastes(experiment, log, cleaned.friends, cleaned.items, cleaned.tasks, base)
    ids, numbers = fitted.user_arrays
    at_end = np.concatenate([numbers, tastes.of_users], axis=1) if tastes else numbers
    write_users(folder, experiment, cleaned.users, (ids, at_end), log)
    names, hide_ties = cleaned.users["user"], experiment.data.hide_ties
    guards.log_out_of_order(log, names)
    check = functools.partial(guards.future_in_history, log, hide_ties, names)
    at_targets = tastes.numbers if tastes else None
    streams = sequence_streams(experiment, log, fitted.user_arrays, at_targets, check)
    return [*fitted.users, *(tastes.encodings if tastes else [])], *streams


def _id_fields(encodings: list[Encoding]) -> tuple[IdField, ...]:
    return tuple(e.field for e in encodings if isinstance(e.field, IdField))


def _number_fields(encodings: list[Encoding]) -> tuple[NumberField, ...]:
    return tuple(e.field for e in encodings if isinstance(e.field, NumberField))


def _guard(
    experiment: Experiment, sources: dict[str, Source], events: Any, sides: dict[str, pa.Table]
) -> None:
    """Stop on what gives answers away before anything is fitted."""

    def place(row: int) -> str:
        return max(staged, key=lambda s: (s.places[0][0] <= row, s.places[0][0])).place(row)

    staged = [sources[name].staged for name in EVENTS if name in sources]
    raw = [sources[name].table for name in EVENTS if name in sources]
    row_in_two_splits(raw, events, experiment, place)
    guards.determined_labels(events, sides, experiment)
    guards.statistics_of_everything(sides, events, experiment)


def _quarantine(
    engine: Engine, sources: dict[str, Source], removed: list[str], folder: Path, events: Any
) -> int:
    """Write `quarantine.parquet`; every row that was read is in it or among the events."""
    written = clean.write_quarantine(folder / "quarantine.parquet", engine, sources, removed)
    staged = [sources[name].staged for name in EVENTS if name in sources]
    kept, read = count(events), sum(s.rows for s in staged)
    gone = sum(engine.size(name) for name in removed) + sum(s.bad for s in staged)
    if kept + gone != read:
        raise AssertionError(f"{read:,} rows read, {kept:,} kept, {gone:,} removed")
    return written
