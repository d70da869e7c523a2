"""The second stage of preparation: clean events to the prepared folder (format: `data.dataset`).

Split, guard, give ids, fit what is learned from training events, encode, write.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.arguments import a_path
from mtrec_jax.config import Experiment
from mtrec_jax.data import describe, examples, features, guards, past, report
from mtrec_jax.data.clean import (
    Cleaned,
    Say,
    appears_whole,
    check_arguments,
    check_own,
    clean_with,
    digests_of,
    put_in_place,
)
from mtrec_jax.data.dataset import (
    FORMAT,
    SPLITS,
    Lists,
    Manifest,
    Prepared,
    Rule,
    SplitInfo,
    Summary,
    TaskField,
    configuration,
    extensions_of,
    grouped,
    open_prepared,
)
from mtrec_jax.data.engine import Engine, Name, count, open_engine
from mtrec_jax.data.examples import Log, event_log, one_column, sequence_examples, to_table
from mtrec_jax.data.features import Encoding, IdField, one_array
from mtrec_jax.data.fit import (
    fit_events,
    fit_side,
    fit_tasks,
    text_columns,
    values_report,
    with_quantiles,
)
from mtrec_jax.data.growth import item_vocabulary, open_base, summary
from mtrec_jax.data.rules import check_weights, sample_spaces
from mtrec_jax.data.social import Tastes, fit_tastes, friend_lists, split_queries, with_queries
from mtrec_jax.data.split import describe_split, split_events
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST


def prepare(
    experiment: Experiment,
    data: str | Path | None,
    out: str | Path,
    tables: Mapping[str, Any] | None = None,
    progress: Say | None = None,
    engine: Name = "duckdb",
    memory: str = "",
    master: str = "local[*]",
    accept: Callable[[Manifest], None] | None = None,
    grow_from: str | Path | None = None,
    cleaned: str | Path | None = None,
) -> Prepared:
    """Clean, split, index and encode raw tables into the folder `out`, and open it.

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
      master: of Spark; a cluster must see the folders `data`, `out` and `cleaned`.
      accept: called with the new manifest before `out` is replaced; if it raises, `out` stays.
      grow_from: a prepared folder of the same features, whose vocabularies these begin with, so
        that known values keep their ids; its bins, scales and classes stay as they are.
      cleaned: the folder of the clean events, which other splits of the same raw data use again;
        by default cleaned/NAME beside `out`, and a temporary one for tables in memory.

    Raises:
      DataError: a file, column, row or label is not what the experiment says, or nothing is left,
        or `out` holds something else. The message names the place and the remedy.
      ConfigError: the experiment asks for something that cannot be prepared.
    """
    out = a_path("out", out)
    data, tables = check_arguments(experiment, data, tables, engine, memory, master)
    check_own(out, "manifest.json", "a prepared folder")
    base = None if grow_from is None else open_base(grow_from, experiment)
    say, beside = progress or (lambda _: None), out.parent / "cleaned" / experiment.name
    with appears_whole(out) as partial:
        work = partial / "work"
        kept = a_path("cleaned", cleaned or (work / "cleaned" if tables else beside))
        with open_engine(work, engine, memory, master) as opened:
            source = clean_with(opened, experiment, data, kept, tables, say)
            started = time.perf_counter()
            manifest = _build(opened, experiment, source, partial, say, base)
            shutil.copyfile(source.folder / "quarantine.parquet", partial / "quarantine.parquet")
        shutil.rmtree(work, ignore_errors=True)
        report.write_report(Prepared(partial, manifest), partial / "report.html")
        manifest.save(partial)
        if accept:
            accept(manifest)
        put_in_place(partial, out)
        say(f"fit: {manifest.events:,} events in {time.perf_counter() - started:.1f} s")
    return open_prepared(out, extensions_of(experiment))


def up_to_date(
    experiment: Experiment,
    data: str | Path | None,
    out: str | Path,
    tables: Mapping[str, Any] | None = None,
) -> Prepared | None:
    """The folder `out` where it holds what `prepare` would make of the raw data now; else None.

    The bytes of the raw files are compared, and the configuration. A folder that continues another
    one stays what it is.

    Args:
      experiment, data, out, tables: as `prepare` takes them.
    """
    out = a_path("out", out)
    if experiment.clean.latest == "now":  # what lay in the future may do so no longer
        return None
    try:
        found = open_prepared(out, extensions_of(experiment))
        data = None if data is None else a_path("data", data)
        by_table = digests_of(experiment, data, tables or {})
    except (OSError, DataError):
        return None  # whatever is wrong has its message when the data are prepared
    digests = [digest for of_table in by_table.values() for digest in of_table]
    continues = found.manifest.continues
    now = describe.fingerprint(experiment, digests + [continues] * bool(continues))
    return found if found.manifest.fingerprint == now else None


class _Divided(NamedTuple):
    """Clean events with their split, and who is in them, in the order of their ids."""

    events: Any  # ibis table with its split
    queries: Any  # ibis table of searches, or None
    users: pa.Table  # with their columns and training events
    items: pa.Table  # the new ones, without events, behind
    new_items: int
    friends: Lists | None
    split: SplitInfo
    tasks: dict[str, TaskField]
    summary: Summary
    rules: list[Rule]
    leaks: list[str]  # what guards have found so far


class _Fitted(NamedTuple):
    """Features fitted on the training rows."""

    users: list[Encoding]
    items: list[Encoding]
    events: list[Encoding]  # of the history and of the request
    cells: dict[str, pa.Array]  # {feature of users or items: its cells}

    def encoded(self, of: list[Encoding]) -> dict[str, np.ndarray]:
        """{feature: ids or numbers [n] or [n, S]} of all users or items."""
        return {e.name: one_column(features.encode(e, self.cells[e.name])) for e in of}

    def groups(self, experiment: Experiment) -> dict[str, tuple[np.ndarray, int]]:
        """{feature of the items that is a task's duration: its ids, and how many there may be}."""
        named = {task.duration for task in experiment.tasks.values()}
        fields = {e.name: e.field for e in self.items if e.name in named}
        return {
            e.name: (self.encoded([e])[e.name], field.size)
            for e in self.items
            if isinstance(field := fields.get(e.name), IdField)
        }


def _build(
    engine: Engine,
    experiment: Experiment,
    cleaned: Cleaned,
    folder: Path,
    say: Say,
    base: Prepared | None,
) -> Manifest:
    """Everything between the clean events and the manifest; writes all other files."""
    notes = cleaned.notes
    divided = _divide(engine, experiment, cleaned, say, base)
    users, items = divided.users, divided.items
    events, fitted = _fit(engine, experiment, divided, folder, base)
    n = len(items) - divided.new_items
    new = f", and {divided.new_items:,} new ones" if divided.new_items else ""
    say(f"index: {len(users):,} users, {n:,} items{new}")
    _write_items(folder, experiment, items, fitted)
    rows = sum(divided.split.sizes.values())
    rows += count(divided.queries) if divided.queries is not None else 0
    log = event_log(engine, events, rows, experiment, fitted.events, divided.tasks)
    tasks = with_quantiles(divided.tasks, experiment, log, fitted.groups(experiment), base)
    leaks = divided.leaks + guards.leaks(lambda: guards.next_event_known(log, experiment))
    if leaks:
        raise DataError("\n".join(leaks))
    tastes = fit_tastes(experiment, log, divided.friends, items, divided.tasks, base)
    context = {f"context_{name}": ids for name, ids in fitted.encoded(fitted.users).items()}
    _write_users(folder, experiment, users, context | (tastes.of_users if tastes else {}), log)
    lengths = _lengths(log, experiment, len(users))
    positions, written = _write_examples(folder, experiment, log, context, tastes, lengths, say)
    on = {"context": [*fitted.users, *(tastes.encodings if tastes else [])], "item": fitted.items}
    for role in ("request", "history"):
        on[role] = [e for e in fitted.events if e.feature.on == role]
    encodings = [e for some in on.values() for e in some]
    own = item_vocabulary(base, items)
    _write_vocabularies(folder, encodings, own)
    if base:
        say(summary(base, items, encodings))
    digests = [digest for found in notes.digests.values() for digest in found]
    if experiment.clean.latest == "now":  # equal bytes give other events at another time
        digests.append(notes.fingerprint)
    continues = base.manifest.fingerprint if base else ""
    total = sum(divided.split.sizes.values())
    return Manifest(
        format=FORMAT,
        name=experiment.name,
        protocol=describe.protocol(experiment, len(users), n, total),
        fingerprint=describe.fingerprint(experiment, digests + [continues] * bool(base)),
        cleaned=notes.fingerprint,
        config=configuration(experiment),
        users=len(users),
        items=n,
        new_items=divided.new_items,
        trained_items=pc.sum(pc.greater(items["count"], 0)).as_py() or 0,
        events=total,
        quarantined=notes.quarantined,
        split=divided.split,
        history_length=lengths[0],
        examples={name: n for name, (n, _) in written.items()},
        positions=positions,
        targets={name: n for name, (_, n) in written.items()},
        **grouped({role: [e.field for e in some] for role, some in on.items()}),
        tasks=tasks,
        report=(*notes.rules, *divided.rules, *values_report(encodings)),
        bounds=notes.bounds,
        summary=divided.summary,
        continues=continues,
        item_values=0 if own is None else len(own),
        event_files=notes.digests["events"],
    )


def _divide(
    engine: Engine, experiment: Experiment, cleaned: Cleaned, say: Say, base: Prepared | None
) -> _Divided:
    """Split the clean events, give ids, and learn what the tasks are."""
    notes = cleaned.notes
    events = engine.keep("split", split_events(cleaned.table(engine, "events"), experiment))
    events = sample_spaces(events, experiment)
    split = describe_split(events, experiment)
    describe.check_splits(experiment, split.sizes)
    say("split: " + ", ".join(f"{name} {n:,}" for name, n in split.sizes.items()) + " events")
    check_weights(events, experiment, notes.place)
    tasks, rules, labels = fit_tasks(events, experiment, base)
    users, items = (
        _indexed(engine, events, key, cleaned.table(engine, f"{key}s")) for key in ("user", "item")
    )
    queries, friends = cleaned.table(engine, "queries"), None
    if queries is not None:
        queries = split_queries(queries, events, experiment)
    if (ties := cleaned.table(engine, "ties")) is not None:
        friends, users = friend_lists(ties, users, experiment)
    equal, sides = cleaned.table(engine, "equal"), {"user": users, "item": items}
    leaks = guards.leaks(
        lambda: guards.row_in_two_splits(
            equal, events, experiment, split.sizes, notes.dropped, notes.first_rows, notes.place
        ),
        lambda: guards.determined_labels(events, sides, experiment),
        lambda: guards.statistics_of_everything(sides, events, experiment),
        lambda: guards.tuned_on_held_back(experiment, notes.digests["events"], split.fingerprint),
    )
    told = report.summarize(events, labels)
    new = _new_items(engine, cleaned.table(engine, "items"), items)
    items = pa.concat_tables([items, new])
    return _Divided(
        events, queries, users, items, len(new), friends, split, tasks, told, rules, leaks
    )


def _indexed(engine: Engine, events: Any, key: str, side: Any) -> pa.Table:
    """All users or items of the events in the order of their ids, as an Arrow table of `key`, count
    (training events) and column_*; key, count and id are kept as the table `{key}_index`.

    Items are ordered by falling training count, so that trained ones come first, then by raw id;
    users by raw id.
    """
    if key not in events.columns:
        return pa.table({key: pa.array([], pa.string()), "count": pa.array([], pa.int64())})
    sizes = events.group_by(key).agg(count=events.count(where=events["split"] == 0))
    order = [ibis.desc("count"), key] if key == "item" else [key]
    number = ibis.row_number().over(ibis.window(order_by=order))
    table = index = engine.keep(f"{key}_index", sizes.mutate(id=(number + FIRST).cast("int64")))
    if side is not None:
        table = index.left_join(side, key).drop(f"{key}_right")
    return table.order_by("id").drop("id").to_pyarrow()


def _new_items(engine: Engine, side: Any, items: pa.Table) -> pa.Table:
    """The items that stand in their table alone, as `_indexed` gives those of the events."""
    if side is None or not len(items):
        return items.slice(0, 0)
    new = side.anti_join(engine.read(engine.folder / "item_index"), "item")
    table = new.mutate(count=ibis.literal(0, "int64")).order_by("item").to_pyarrow()
    return table.select(items.column_names).cast(items.schema)


def _with_ids(engine: Engine, events: Any) -> Any:
    """Events with user_id and item_id (0 where the data has none) in the place of user and item."""
    for key in ("user", "item"):
        if key in events.columns:
            index = engine.read(engine.folder / f"{key}_index")
            ids = index.select(key, **{f"{key}_id": "id"})
            events = events.inner_join(ids, key).drop(key)
        else:
            events = events.mutate(**{f"{key}_id": ibis.literal(0, "int64")})
    return events


def _fit(
    engine: Engine, experiment: Experiment, divided: _Divided, folder: Path, base: Prepared | None
) -> tuple[Any, _Fitted]:
    """Learn the features, and give the events with ids, searches and counts of the past."""
    users, user_cells = fit_side(experiment, divided.users, "user", "context", base)
    items, item_cells = fit_side(experiment, divided.items, "item", "item", base)
    for name, table in past.final(divided.events, experiment).items():  # for new requests
        (folder / "past").mkdir(exist_ok=True)
        pq.write_table(table, folder / "past" / f"{name}.parquet")
    events = past.add(engine, divided.events, experiment)
    on_events = fit_events(events, experiment, base)
    if divided.queries is not None:
        on_events += fit_events(divided.queries, experiment, base)
    events = with_queries(engine, _with_ids(engine, events), divided.queries)
    return events, _Fitted(users, items, on_events, user_cells | item_cells)


# --- The files of a prepared folder, but for the manifest and the report


def _write_items(folder: Path, experiment: Experiment, items: pa.Table, fitted: _Fitted) -> None:
    """Write the catalogue: items in the order of their ids."""
    title = f"column_{experiment.data.title}"
    titles = items[title] if title in items.column_names else pa.nulls(len(items), pa.string())
    columns = {
        "id": one_array(items["item"]),
        "title": pc.fill_null(one_array(titles), ""),
        "count": items["count"].to_numpy(),
        **{f"item_{name}": array for name, array in fitted.encoded(fitted.items).items()},
        **text_columns(experiment, items, "item"),
    }
    pq.write_table(to_table(columns), folder / "items.parquet")


def _write_users(
    folder: Path,
    experiment: Experiment,
    users: pa.Table,
    context: dict[str, np.ndarray],
    log: Log,
) -> None:
    """Write the users in the order of their ids, with their events in time order."""
    columns = {"id": one_array(users["user"]), **context}
    columns |= text_columns(experiment, users, "context")
    if experiment.data.user:
        offsets = pa.array(log.offsets(len(users)), pa.int64())  # of all events of the log
        lists = {f"event_{field}": ids for field, ids in log.events.items()}
        if not experiment.data.item:
            del lists["event_item"]
        for name, task in experiment.tasks.items():
            if task.kind == "binary":
                lists[f"did_{name}"] = log.targets[f"label_{name}"] == 1
        for name, values in {**lists, "split": log.split}.items():
            flat = pa.array(values) if values.ndim == 1 else examples.fixed_size(values)
            columns[name] = pa.LargeListArray.from_arrays(offsets, flat)
    pq.write_table(to_table(columns), folder / "users.parquet")


def _write_examples(
    folder: Path,
    experiment: Experiment,
    log: Log,
    context: dict[str, np.ndarray],
    tastes: Tastes | None,
    lengths: tuple[int, int],
    say: Say,
) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Write the examples of each split; returns P, and how many examples and targets there are."""
    data, (history_length, chunk) = experiment.data, lengths
    # Targets that are judged stand alone, so that each sees as much of the past as when serving.
    positions = dict.fromkeys(SPLITS, 1) | {"train": chunk}
    written = {}
    for split, name in enumerate(SPLITS):
        stream = sequence_examples(
            log,
            context,
            split,
            positions[name],
            history_length,
            data.hide_ties,
            data.seed,
            data.past,
            tastes.numbers if tastes else None,
            timed=bool(data.time),
        )
        written[name] = examples.write_examples(folder / f"{name}.parquet", stream)
        say(f"{name}: {written[name][0]:,} examples, {written[name][1]:,} targets")
    return positions, written


def _lengths(log: Log, experiment: Experiment, users: int) -> tuple[int, int]:
    """L and P of the data: no more of either is kept than its longest user fills."""
    data = experiment.data
    if not data.length:
        return 0, 1
    targets = np.bincount(log.user[log.split == 0], minlength=1).max()
    longest = np.diff(log.offsets(users)).max(initial=0)
    length = max(1, min(data.length, int(longest)))
    return length, max(1, min(data.positions or data.length, int(targets), length))


def _write_vocabularies(folder: Path, encodings: list[Encoding], items: pa.Array | None) -> None:
    """Write the values of the features, and those of the items' own table where they are given."""
    (folder / "vocabularies").mkdir()
    if items is not None:
        pq.write_table(pa.table({"value": items}), folder / "item_vocabulary.parquet")
    for encoding in encodings:
        if len(encoding.values):
            vocabulary = pa.table({"value": encoding.values, "count": encoding.counts})
            pq.write_table(vocabulary, folder / "vocabularies" / f"{encoding.name}.parquet")
