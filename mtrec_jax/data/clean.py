"""The first stage of preparation: raw tables to a folder of clean, ordered events.

It depends on the split only where bounds are fitted on training rows or files say what is judged,
so that folds, transfers and searches over one log share it. A folder is used again where the bytes
of the raw files, the configuration and its own files are what they were; else it is made anew.

```
cleaned.json          Notes below, as JSON; written last
events/*.parquet      in the order (user, time, row): row int64, part int8 (0 events, 1 test files,
                      2 validation files), user, item string, time float64, label_<task>,
                      reference_<task>, feature_<feature>: raw cells (or lists) of what stands in
                      the events; bounds, duplicates, bots and the core have been seen to
users/                one row a user who has events: user, column_<column>
items/                one row an item that has events, or is new: its table alone has it
queries/              row, user, time, text
ties/                 row, user, friend
equal/                row, first: rows that are equal to another one in every raw column, and the
                      first such row; only where duplicates stay
quarantine.parquet    every raw row that was removed: row int64, source string, file string, line
                      int64, reason string, evidence string
```
A table that the experiment does not declare has no folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from mtrec_jax.arguments import a_path, instance, one_of
from mtrec_jax.config import Experiment
from mtrec_jax.data import read
from mtrec_jax.data.dataset import Rule, configuration
from mtrec_jax.data.engine import Engine, Name, count, open_engine
from mtrec_jax.data.engine import rows as rows_of
from mtrec_jax.data.features.clock import Clock
from mtrec_jax.data.read import EXAMPLES, ROW, Staged
from mtrec_jax.data.rules import (
    Bounds,
    check_bad_fraction,
    counted,
    equal_rows,
    fits_bounds,
    missing_labels,
    usable_events,
)
from mtrec_jax.data.schema import check_times, columns_of
from mtrec_jax.data.social import clean_queries, clean_ties
from mtrec_jax.data.sources import EVENTS, Source, all_names, read_sources, tables_of
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import check

Say = Callable[[str], None]
FORMAT = 2
_LATER = ("public", "history_length", "positions", "hide_ties", "past", "seed", "reference")
_REMOVED = ["row", "reason", "evidence"]
QUARANTINE = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("reason", pa.string()),
        ("evidence", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What a cleaned folder says about itself."""

    format: int
    fingerprint: str  # 16 hex digits over format, configuration and contents of the raw files
    digests: dict[str, tuple[str, ...]]  # {raw table: SHA-256 of each of its files}
    places: dict[str, tuple[tuple[int, str, int], ...]]  # {raw table: (first row, file, its line)}
    events: int
    dropped: int  # well-formed rows of the first source of events that are not among them
    quarantined: int
    rules: tuple[Rule, ...]
    bounds: dict[str, Bounds]  # fitted, of clean.values
    until: float | None  # seconds: when the first row that lay in the future no longer does
    files: dict[str, str]  # {file of the folder: SHA-256}

    @property
    def first_rows(self) -> int:
        """Rows of the first source of events, whose numbers are below those of the others."""
        others = [self.places[name][0][0] for name in EVENTS[1:] if name in self.places]
        return min(others, default=2**62)

    def place(self, row: int) -> str:
        """Where a row of the events is, in words."""
        starts = [place for name in EVENTS for place in self.places.get(name, ())]
        return read.place_of(starts, row)


@dataclass(frozen=True)
class Cleaned:
    """An opened cleaned folder."""

    folder: Path
    notes: Notes

    def table(self, engine: Engine, name: str) -> Any:
        """The Ibis table "events", "users", "items", "queries", "ties" or "equal"; None without."""
        folder = self.folder / name
        return engine.read(folder) if folder.is_dir() else None


def clean(
    experiment: Experiment,
    data: str | Path | None,
    out: str | Path,
    tables: Mapping[str, Any] | None = None,
    progress: Say | None = None,
    engine: Name = "duckdb",
    memory: str = "",
    master: str = "local[*]",
) -> Cleaned:
    """The clean events of raw tables in the folder `out`, which is used again where it is theirs.

    The folder appears whole or not at all.

    Args:
      experiment: what the columns mean, and what to make of them.
      data, tables, progress, engine, memory, master: as `prepare` takes them.
      out: the folder to use or to write.

    Raises:
      ConfigError, DataError: as `prepare`.
    """
    data, tables = check_arguments(experiment, data, tables, engine, memory, master)
    out = a_path("out", out)
    beside = out.with_name(f"{out.name}.work")
    with appears_whole(beside) as work, open_engine(work, engine, memory, master) as opened:
        return clean_with(opened, experiment, data, out, tables, progress or (lambda text: None))


def open_cleaned(folder: str | Path) -> Cleaned:
    """Open a folder that `clean` has written.

    Raises:
      DataError: the folder is missing, unfinished, or of another format.
    """
    path = a_path("folder", folder) / "cleaned.json"
    try:
        notes = pydantic.TypeAdapter(Notes).validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError) as error:
        raise DataError(f"{folder} is no cleaned folder: {error}. Clean anew") from error
    if notes.format != FORMAT:
        raise DataError(f"{path}: format {notes.format}, this version reads {FORMAT}: clean anew")
    return Cleaned(Path(folder), notes)


def check_arguments(
    experiment: Experiment,
    data: str | Path | None,
    tables: Mapping[str, Any] | None,
    engine: str,
    memory: str,
    master: str,
) -> tuple[Path | None, Mapping[str, Any]]:
    """The folder of the raw data and the tables in memory, or an error that names the argument."""
    instance("experiment", experiment, Experiment, "pass what load_experiment gives")
    data = None if data is None else a_path("data", data)
    if not isinstance(tables, Mapping | None):
        kind = type(tables).__name__
        raise DataError(f"tables: a {kind}; pass a mapping such as {{'events': table}}")
    check(experiment)
    if experiment.left_out:
        raise ConfigError(
            f"experiment '{experiment.name}': its tasks are chosen from others (left_out = "
            f"{list(experiment.left_out)}). Prepare all that is declared, without a list as tasks "
            "(load_experiment(…, choose=False)); training chooses from the folder"
        )
    for name, text in (("memory", memory), ("master", master)):
        instance(name, text, str, "such as memory='4GB', master='local[*]'")
    one_of("engine", engine, ("duckdb", "spark"))
    return data, tables or {}


def clean_with(
    engine: Engine,
    experiment: Experiment,
    data: Path | None,
    out: Path,
    tables: Mapping[str, Any],
    say: Say,
) -> Cleaned:
    """As `clean`, in an engine that is open."""
    started = time.perf_counter()
    check_own(out, "cleaned.json", "a cleaned folder")
    found = _usable(experiment, data, out, tables)
    if found is None:
        sources = read_sources(engine, experiment, data, tables, say)
        with appears_whole(out) as partial:
            notes = _clean(engine, experiment, sources, partial)
            put_in_place(partial, out)
        found = Cleaned(out, notes)
    else:
        say(f"clean events of {out} are used again ({found.notes.fingerprint})")
    say(f"clean: {found.notes.events:,} events in {time.perf_counter() - started:.1f} s")
    return found


def check_own(out: Path, mark: str, what: str) -> None:
    """Raise `DataError` where `out` exists and is not what a new one would replace, or has a
    backslash, which engines take for their own."""
    if os.sep != "\\" and "\\" in str(out.absolute()):
        raise DataError(f"{out.absolute()}: a backslash in the path; name another folder")
    foreign = out.is_dir() and any(out.iterdir()) and not (out / mark).is_file()
    if out.is_file() or foreign:
        raise DataError(
            f"{out} exists and is no {what.partition(' ')[2]} (no {mark}), so it is not replaced. "
            "Name another folder, or remove it"
        )


@contextlib.contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, until `put_in_place`; nothing of it stays."""
    partial = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    is_new = not partial.parent.exists()
    try:
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:  # raw files that cannot be read have errors of their own
        raise DataError(
            f"{out} cannot be written: {error}. Free room on that disk, check its permissions, or "
            "name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):  # something is in it
                partial.parent.rmdir()


def put_in_place(partial: Path, out: Path) -> None:
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


def fingerprint(
    experiment: Experiment, digests: Mapping[str, Iterable[str]], until: float | None
) -> str:
    """16 hex digits over all that the clean events of raw files depend on; `until` is that of
    their `Notes`."""
    e, config = experiment, configuration(experiment)
    given = ("kind", "test_files", "validation_files") if e.split.kind == "files" else ()
    known = {
        "format": FORMAT,
        "data": {k: v for k, v in config["data"].items() if k not in _LATER},
        "clean": config["clean"],
        "split": {k: v for k, v in config["split"].items() if fits_bounds(e) or k in given},
        "tasks": {
            n: {k: v for k, v in t.items() if k not in ("where", "duration")}
            for n, t in config["tasks"].items()
        },
        "features": {
            n: [*f.origin(n, e.data), isinstance(f, Clock) and f.kind]
            for n, f in e.features.items()
        },
        "files": {name: list(found) for name, found in digests.items()},
        **({"until": until} if e.clean.latest == "now" and until is not None else {}),
    }  # fmt: skip
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _usable(
    experiment: Experiment, data: Path | None, out: Path, tables: Mapping[str, Any]
) -> Cleaned | None:
    """The folder `out` where it holds, unharmed, what cleaning would make now; else None."""
    if not (out / "cleaned.json").is_file():
        return None
    try:
        found = open_cleaned(out)
        first = {name: places[0][0] for name, places in found.notes.places.items()}
        digests = digests_of(experiment, data, tables, first)
        same = found.notes.fingerprint == fingerprint(experiment, digests, found.notes.until)
        if experiment.clean.latest == "now" and found.notes.until is not None:
            same &= time.time() < found.notes.until
        return found if same and _digests_of(out) == found.notes.files else None
    except (OSError, KeyError, DataError):
        return None  # whatever is wrong has its message when the files are read


def digests_of(
    experiment: Experiment,
    data: Path | None,
    tables: Mapping[str, Any],
    first: Mapping[str, int] | None = None,
) -> dict[str, tuple[str, ...]]:
    """{raw table: SHA-256 of each of its files} as they are now; `first` are its first rows."""
    found = {}
    for name, files in tables_of(experiment, tables).items():
        columns = columns_of(experiment, "events" if name in EVENTS else name)
        found[name] = read.digests(
            name,
            files,
            data or Path(),
            tables.get(name),
            first[name] if first else 0,
            experiment.data.public,
            all_names(experiment, name, columns),
        )
    return found


def _digests_of(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "cleaned.json":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found


def _clean(
    engine: Engine, experiment: Experiment, sources: dict[str, Source], folder: Path
) -> Notes:
    """Write all files of the folder."""
    events, rules, removed, bounds = usable_events(engine, experiment, sources)
    order = [name for name in ("user", "time", "row") if name in events.columns]
    events = engine.keep("events", events.order_by(order))
    if not (kept := engine.size("events")):
        report = "\n".join(f"  {rule.rule}: {rule.rows:,}" for rule in rules)
        raise DataError(f"no event is left after cleaning:\n{report}\nLower the limits in [clean]")
    rules += missing_labels(events, experiment)
    if experiment.data.time:
        rules += check_times(events, experiment.data.time_unit)
    for key in ("user", "item"):
        if key in events.columns:
            engine.keep(f"{key}_ids", events.select(key).distinct())
            rules += _clean_side(engine, experiment, key, sources.get(f"{key}s"))
    rules += clean_queries(engine, experiment, sources.get("queries"))
    rules += clean_ties(engine, experiment, sources.get("ties"))
    until = _first_late(engine, [name for name in (*EVENTS, "queries") if name in sources])
    for name in sources:
        engine.forget(f"typed_{name}")
    staged = [sources[name].staged for name in EVENTS if name in sources]
    raw = [sources[name].table for name in EVENTS if name in sources]
    tables = ["events", *(name for name in sources if name not in EVENTS)]
    if len(raw) > 1 or experiment.clean.duplicates == "keep":
        names = [n for n in raw[0].columns if n != ROW and all(n in t.columns for t in raw)]
        equal_rows(engine, raw, names)
        tables.append("equal")
    quarantined = _write_quarantine(folder / "quarantine.parquet", engine, sources, removed)
    for name, source in sources.items():
        engine.forget(f"raw_{name}_{source.staged.places[0][0]}")
    main = int(events.filter(events.part == 0).count().to_pyarrow().as_py()) if raw[1:] else kept
    for name in tables:
        if (engine.folder / name).is_dir():
            shutil.move(engine.folder / name, folder / name)
    digests = {name: source.staged.digests for name, source in sources.items()}
    notes = Notes(
        format=FORMAT,
        fingerprint=fingerprint(experiment, digests, until),
        digests=digests,
        places={name: source.staged.places for name, source in sources.items()},
        events=kept,
        dropped=staged[0].rows - staged[0].bad - main,
        quarantined=quarantined,
        rules=tuple(rules),
        bounds=bounds,
        until=until,
        files=_digests_of(folder),
    )
    text = json.dumps(dataclasses.asdict(notes), indent=1, ensure_ascii=False)
    (folder / "cleaned.json").write_text(text + "\n", encoding="utf-8")
    return notes


def _first_late(engine: Engine, names: list[str]) -> float | None:
    """The first time after `clean.latest` of these raw tables."""
    first = []
    for name in names:
        table = engine.read(engine.folder / f"typed_{name}")
        if "time" in table.columns:
            problem = table["reason" if name == "queries" else "problem"]
            late = table.filter(problem.endswith("time after clean.latest"))
            first += [found["time"] for found in rows_of(late.agg(time=late.time.min()))]
    return min((time for time in first if time is not None), default=None)


def _clean_side(
    engine: Engine, experiment: Experiment, key: str, source: Source | None
) -> list[Rule]:
    """Keep the first row of every user or item that has events as the table "users" or "items",
    and of every item that has never had any; what the report says of the others.

    Raises:
      DataError: too many lines are malformed, or no id of the events is in the table.
    """
    if source is None:
        return []
    rules = check_bad_fraction(experiment.clean, source.staged)
    raw, raw_key = source.table, getattr(experiment.data, key)
    nth = ibis.row_number().over(ibis.window(group_by=raw[raw_key], order_by=raw[ROW]))
    raw = raw.mutate(_nth=nth)
    unused = raw.filter(raw[raw_key].isnull() | (raw["_nth"] > 0))
    keyless = unused[raw_key].isnull()
    reason = ibis.ifelse(keyless, f"missing {key}", "row of an id already seen")
    unused = unused.select(row=unused[ROW], reason=reason, evidence=unused[raw_key])
    unused = engine.keep(f"removed_{key}s", unused)
    rules += counted(unused, source.staged, f"{key}s: ")
    columns = columns_of(experiment, f"{key}s", keys=False)
    first = raw.filter(raw[raw_key].notnull() & (raw["_nth"] == 0))
    first = first.select(**{key: first[raw_key]}, **{f"column_{c}": first[c] for c in columns})
    ids = engine.read(engine.folder / f"{key}_ids")
    absent = engine.keep("absent", ids.anti_join(first, key))
    if n := engine.size("absent"):
        shown = tuple(repr(r[key]) for r in rows_of(absent.order_by(key).limit(EXAMPLES)))
        if n == engine.size(f"{key}_ids"):
            there = rows_of(first.order_by(key).select(key).limit(EXAMPLES))
            raise DataError(
                f"none of the {n:,} {key}s of the events has a row in the table of {key}s "
                f"({source.staged.files()}): {', '.join(shown)} are not among "
                f"{', '.join(repr(r[key]) for r in there) or 'no ids'} … Ids are compared "
                "as text, with case and leading zeros; write them alike"
            )
        rules.append(Rule(rule=f"{key}s without a row in {key}s", rows=n, examples=shown))
    return rules + _keep_side(engine, key, first, ids)


def _keep_side(engine: Engine, key: str, first: Any, ids: Any) -> list[Rule]:
    """Keep the rows of the ids that have events as the table "users" or "items", and of new items.

    An item whose events cleaning has removed is not new: a rule has put it out.
    """
    kept, without = first.semi_join(ids, key), first.anti_join(ids, key)
    unused = {f"{key}s without events (left out)": without}
    if key == "item":
        raw = [engine.folder / f"typed_{name}" for name in EVENTS]
        met = [engine.read(folder).select(key) for folder in raw if folder.is_dir()]
        seen = (ibis.union(*met) if len(met) > 1 else met[0]).distinct()
        new, gone = without.anti_join(seen, key), without.semi_join(seen, key)
        kept = first.anti_join(gone, key)
        unused = {
            "new items, without events (kept, they never train)": new,
            "items whose events were all removed (left out)": gone,
        }
    rules = []
    for rule, found in unused.items():
        if n := count(found):
            shown = tuple(repr(r[key]) for r in rows_of(found.order_by(key).limit(EXAMPLES)))
            rules.append(Rule(rule=rule, rows=n, examples=shown))
    engine.keep(f"{key}s", kept.order_by(key))
    return rules


def _write_quarantine(
    path: Path, engine: Engine, sources: dict[str, Source], removed: list[str]
) -> int:
    """Write the removed rows of all sources, with file and line, in the order of source and row.

    Args:
      path: the Parquet file; columns as in QUARANTINE.
      engine: has the tables of removed rows.
      sources: tell where a row number is, and have the malformed lines.
      removed: names of the engine's tables of removed rows of events.

    Returns:
      The number of rows.
    """
    written = 0
    with pq.ParquetWriter(path, QUARANTINE) as writer:
        for name, source in sources.items():
            staged = source.staged
            tables = removed if name in EVENTS else [f"removed_{name}"]
            parts = [engine.read(engine.folder / table) for table in tables if engine.size(table)]
            parts = [part.select(_REMOVED) for part in parts]
            if staged.bad:
                lines = engine.read(staged.malformed.parent)
                reason = ibis.literal("malformed line (").concat(lines.reason, ")")
                parts.append(lines.select("row", reason=reason, evidence=lines.text))
            if not parts:
                continue
            found = ibis.union(*parts) if len(parts) > 1 else parts[0]
            found = found.filter(found.row.between(staged.places[0][0], staged.next_row - 1))
            engine.keep("quarantined", found.order_by("row"))
            for batch in engine.batches("quarantined"):
                writer.write_table(_with_places(batch, staged))
                written += len(batch)
    engine.forget("quarantined")
    return written


def _with_places(table: pa.Table, staged: Staged) -> pa.Table:
    row = table["row"].to_numpy()
    first = np.array([p[0] for p in staged.places])
    which = np.searchsorted(first, row, side="right") - 1
    line = row - first[which] + np.array([p[2] for p in staged.places])[which]
    columns = {
        "row": row - (0 if staged.name in EVENTS else first[0]),
        "source": pa.array([staged.name] * len(row), pa.string()),
        "file": pa.array([p[1] for p in staged.places], pa.string()).take(pa.array(which)),
        "line": line,
        "reason": table["reason"],
        "evidence": table["evidence"],
    }
    return pa.table(columns).cast(QUARANTINE)
