"""Raw tables in the engine: read as text, then cast to what the configuration says they mean.

From here to the split everything is an Ibis expression. SQL engines promise no order of rows, so
`_row`, the number of the row in its source, travels with every row and decides every tie.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ibis

from mtrec_jax.config import Experiment, Files, Task
from mtrec_jax.data import read
from mtrec_jax.data.features import NUMBER
from mtrec_jax.data.read import EXAMPLES, ROW, check_columns
from mtrec_jax.errors import ConfigError, DataError, nearest

LARGEST = 3.4e38  # of a 32-bit float
_TIMESTAMP = (
    r"^(\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?)(\.\d+)?(?:Z|([+-])(\d{2}):?(\d{2})?)?$"
)


@dataclass(frozen=True)
class Source:
    """A raw table in the engine: text columns (or lists of text) and `_row`."""

    name: str
    table: Any  # ibis table
    columns: tuple[str, ...]
    places: tuple[tuple[int, str, int], ...]  # (first row, file, line of that row) of every file
    rows: int  # read, malformed lines included
    next_row: int
    bad: int  # malformed lines
    examples: tuple[str, ...]
    digests: tuple[str, ...]

    def place(self, row: int) -> str:
        """Where a source row is, in words."""
        first, file, line = max(p for p in self.places if p[0] <= row)
        return f"row {row} ({file} line {row - first + line})" if file else f"row {row}"

    def files(self) -> str:
        """The names of the files, for messages."""
        return ", ".join(file for _, file, _ in self.places if file) or f"table '{self.name}'"


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Any]:
    """An Ibis backend whose working files stay in `folder`."""
    with warnings.catch_warnings():
        # Ibis 12 calls DuckDB 2 by names that are on their way out
        warnings.filterwarnings("ignore", "fetch_arrow_table", DeprecationWarning)
        backend = ibis.duckdb.connect(temp_directory=str(folder))
        backend.raw_sql("SET enable_progress_bar = false")
        try:
            yield backend
        finally:
            backend.disconnect()


def read_source(
    backend: Any, name: str, files: Files, data: Path, table: Any, first_row: int, public: str
) -> Source:
    """Read files, or the in-memory `table` when there is one, into a text table of the engine.

    Raises:
      DataError: a file is missing, empty, unreadable, or its columns differ from the first file's.
    """
    loaded = _Loaded((), 0, 0, (), first_row)
    target = f"{name}_{first_row}"
    places, digests = [], []
    if table is not None:
        block = read.table_block(table, name, first_row)
        loaded = _load(backend, target, iter([block]), loaded, name)
        places.append((first_row, "", 0))
        digests.append(read.table_digest(block.rows))
    for path in () if table is not None else (data / file for file in files.files):
        if not path.is_file():
            hint = f" Fetch the data with: mtrec data {public}" if public else ""
            raise DataError(f"{path}: there is no such file.{hint}")
        is_csv = files.format == "csv"
        names = read.csv_columns(path, files) if is_csv else []
        places.append((loaded.next_row, path.name, 2 if is_csv and not files.header else 1))
        stream = read.blocks(path, files, names, loaded.next_row)
        before, cut = loaded, (read.separator(files), names)
        loaded = _load(backend, target, stream, loaded, str(path), cut if is_csv else None)
        if loaded.next_row == before.next_row:
            raise DataError(f"{path} is empty: there is no row of data in it")
        digests.append(read.digest(path))
    if not loaded.rows:
        raise DataError(f"{name}: no row of data in {', '.join(files.files) or 'the table'}")
    if loaded.bad == loaded.rows:
        shown = [text[:80] for _, text in sorted(loaded.examples)[:EXAMPLES]]
        raise DataError(
            f"{name}: every line of {', '.join(files.files)} is malformed, e.g. {shown}. Check "
            f"format, separator and header of data.{name}"
        )
    raw = backend.table(target)
    trimmed = table is None and files.format != "parquet"
    renamed = {
        files.rename.get(n, n): _text(raw[n], table is not None, trimmed) for n in loaded.names
    }
    source = Source(
        name=name,
        table=raw.select(**renamed, **{ROW: raw[ROW]}),
        columns=tuple(renamed),
        places=tuple(places),
        rows=loaded.rows,
        next_row=loaded.next_row,
        bad=loaded.bad,
        examples=(),
        digests=tuple(digests),
    )
    shown = [f"{source.place(r)}: {text[:80]!r}" for r, text in sorted(loaded.examples)[:EXAMPLES]]
    return dataclasses.replace(source, examples=tuple(shown))


class _Loaded(NamedTuple):
    names: tuple[str, ...]
    rows: int  # malformed lines included
    bad: int
    examples: tuple[tuple[int, str], ...]
    next_row: int


def _load(
    backend: Any,
    target: str,
    stream: Iterator[read.Block],
    loaded: _Loaded,
    place: str,
    cut: tuple[str, list[str]] | None = None,  # separator and columns of lines still to be cut
) -> _Loaded:
    """Insert the blocks of one file into the table `target`, which the first block creates."""
    names, rows, bad, examples, next_row = loaded
    lines = f"{target}_lines"
    if cut is not None:
        backend.create_table(lines, schema=ibis.schema({"line": "string", ROW: "int64"}))
    for block in stream:
        if not names and len(block.rows.column_names) > 1:
            names = tuple(n for n in block.rows.column_names if n != ROW)
            backend.create_table(target, schema=ibis.Schema.from_pyarrow(block.rows.schema))
        needed = dict.fromkeys(names, "a column of the first file")
        check_columns(place, block.rows.column_names, needed, place)
        if names:
            backend.insert(target, block.rows.select([*names, ROW]))
        rows += len(block.rows) + block.bad
        if cut is not None:
            backend.insert(lines, block.lines)
            rows += len(block.lines)
        bad += block.bad
        examples += block.examples
        next_row = block.next_row
    if cut is not None and names:
        separator, columns = cut
        text = backend.table(lines)
        text = text.mutate(cells=text.line.split(separator))
        whole = text.cells.length() == len(columns)
        cells = {n: text.cells[columns.index(n)] for n in names}
        backend.insert(target, text.filter(whole).select(**cells, **{ROW: text[ROW]}))
        wrong = rows - bad - count(backend.table(target))
        if wrong:
            first = text.filter(~whole).order_by(ROW).limit(EXAMPLES).select(ROW, "line")
            examples += tuple((r[ROW], r["line"]) for r in first.to_pyarrow().to_pylist())
        bad += wrong
    if cut is not None:
        drop(backend, lines)
    return _Loaded(names, rows, bad, examples, next_row)


def _text(column: Any, nan_is_missing: bool, trimmed: bool) -> Any:
    """A column as trimmed text, or list of text; "" is missing; whole floats have no ".0"."""
    kind = column.type()
    if kind.is_array():
        return column.cast("array<string>")
    text = column if trimmed else column.cast("string").strip()
    if kind.is_floating():
        whole = (column.abs() < 1e15) & (column == column.floor())
        text = ibis.ifelse(whole, column.try_cast("int64").cast("string"), text)
        text = ibis.ifelse(column.isnan(), ibis.null("string"), text) if nan_is_missing else text
    return text.nullif("")


def number(text: Any) -> Any:
    """Text as a finite number that a 32-bit float can hold, NULL where it is none."""
    value = ibis.ifelse(text.re_search(NUMBER), text, ibis.null("string")).try_cast("float64")
    return ibis.ifelse(value.abs() <= LARGEST, value, ibis.null("float64"))


def seconds(text: Any) -> Any:
    """Unix seconds, or an ISO 8601 time (UTC where it names no zone), as a float; else NULL."""

    value = number(text)
    other = ibis.ifelse(value.isnull(), text, ibis.null("string"))  # few rows for the patterns

    def part(index: int) -> Any:
        return other.re_extract(_TIMESTAMP, index).nullif("")

    whole = part(1).replace("T", " ").try_cast("timestamp").epoch_seconds()
    offset = part(4).cast("int64") * 3600 + part(5).cast("int64").fill_null(0) * 60
    offset = ibis.ifelse(part(3) == "-", -offset, offset).fill_null(0)
    moment = whole + part(2).cast("float64").fill_null(0) - offset
    return value.fill_null(moment.cast("float64"))


def label(task: Task, text: Any) -> Any:
    """The label of a task from its column: a number, or text for multiclass; NULL if unreadable."""
    if task.kind == "multiclass":
        return text
    if task.equals is not None:
        return (text == task.equals.strip()).cast("float64")
    value = number(text)
    if task.at_least is not None:
        return (value >= task.at_least).cast("float64")
    if task.kind == "binary":
        word = text.lower()
        true, false = (value == 1) | (word == "true"), (value == 0) | (word == "false")
        return ibis.cases((true, 1.0), (false, 0.0), else_=ibis.null("float64"))
    return value


def event_columns(experiment: Experiment) -> dict[str, str]:
    """{column of the events: what for}, without the labels and references."""
    data = experiment.data
    keys = {"user": data.user, "item": data.item, "time": data.time}
    columns = {column: f"data.{key}" for key, column in keys.items() if column}
    for name, feature in experiment.features.items():
        if feature.on == "history" or (feature.on == "context" and data.kind == "rows"):
            columns.setdefault(feature.column or name, f"features.{name}")
    return columns


def label_columns(experiment: Experiment) -> dict[str, str]:
    """{column of the events: which label or reference it is}."""
    columns = {}
    for name, task in experiment.tasks.items():
        if task.kind != "retrieval":
            columns[task.column or name] = f"the label of task '{name}'"
        if task.reference:
            columns[task.reference] = f"tasks.{name}.reference"
    return columns


def typed(experiment: Experiment, source: Source, labels: bool = True) -> Any:
    """Events as row, user, item, time, label_*, reference_*, feature_*: one name a meaning.

    `problem` names the first rule that removes a row, `evidence` is the text that breaks it.
    """
    table, data = source.table, experiment.data
    columns: dict[str, Any] = {"row": table[ROW]}
    problems: list[tuple[Any, str, Any]] = []
    for key, column in (("user", data.user), ("item", data.item)):
        if column:
            columns[key] = table[column]
            problems.append((table[column].isnull(), f"missing {key}", ibis.null("string")))
    if data.time:
        text = table[data.time]
        columns["time"] = seconds(text)
        problems.append((text.isnull(), "missing time", ibis.null("string")))
        problems.append((columns["time"].isnull(), "malformed time", text))
    for name, task in experiment.tasks.items() if labels else ():
        if task.kind == "retrieval":
            columns[f"label_{name}"] = ibis.literal(1.0)
        else:
            text = table[task.column or name]
            columns[f"label_{name}"] = value = label(task, text)
            problems.append((text.notnull() & value.isnull(), f"malformed label of {name}", text))
        if task.reference:
            columns[f"reference_{name}"] = number(table[task.reference])
    for name, feature in experiment.features.items():
        if feature.on == "history" or (feature.on == "context" and data.kind == "rows"):
            columns[f"feature_{name}"] = table[feature.column or name]
    null = ibis.null("string")
    never = (ibis.literal(False), null, null)
    columns["problem"] = ibis.cases(*((c, rule) for c, rule, _ in [*problems, never]), else_=null)
    columns["evidence"] = ibis.cases(*((c, text) for c, _, text in [*problems, never]), else_=null)
    return table.select(**columns)


def count(table: Any) -> int:
    """Number of rows of a table expression."""
    return int(table.count().to_pyarrow().as_py())


def read_sources(
    backend: Any,
    experiment: Experiment,
    folder: str | Path | None,
    tables: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Source]:
    """The raw tables "events", "test" (of `split.test_files`), "items", "users", as declared.

    Raises:
      ConfigError: neither files nor a table for the events.
      DataError: an unknown table name, or a column that the experiment names is not there.
    """
    data = experiment.data
    for name in tables:
        if name not in ("events", "test", "items", "users"):
            hint = nearest(name, ("events", "test", "items", "users"))
            raise DataError(f"tables: no table is called '{name}'.{hint}")
    by_files = experiment.split.kind == "files"
    test = dataclasses.replace(data.events, files=experiment.split.test_files if by_files else ())
    declared: dict[str, Files | None] = {
        "events": data.events,
        "test": test,
        "items": data.items,
        "users": data.users,
    }
    columns = _needed_columns(experiment)
    sources: dict[str, Source] = {}
    for name, files in declared.items():
        table = tables.get(name) if name != "test" or by_files else None
        if table is None and not (files and files.files):
            if name == "events":
                raise ConfigError(
                    "data.events.files: needed, unless tables={'events': ...} is given"
                )
            continue
        if table is None and folder is None:
            raise DataError(f"{name}: pass the folder of its files as `data`")
        first_row = sources["events"].next_row if name == "test" else 0
        base = Path(folder) if folder is not None else Path()
        source = read_source(
            backend, name, files or Files(), base, table, first_row, public=data.public
        )
        check_columns(name, list(source.columns), columns[name], source.files())
        say(f"read {name}: {source.rows:,} rows")
        sources[name] = source
    for name, feature in experiment.features.items():
        side = {"item": "items", "context": "users"}.get(feature.on, "events")
        key = data.item if feature.on == "item" else data.user
        own = side == "events" or (side == "users" and data.kind == "rows")
        if not own and side not in sources and (feature.column or name) != key:
            raise DataError(
                f"feature '{name}' is a column of the {side} table, and there is none: declare "
                f"data.{side}, or pass tables={{'{side}': ...}}"
            )
    return sources


def side_columns(experiment: Experiment, side: str) -> dict[str, str]:
    """{column of the items or users table: what for}, without its key."""
    data, columns = experiment.data, {}
    on = "item" if side == "items" else "context"
    key = data.item if side == "items" else data.user
    if side == "items" and data.title:
        columns[data.title] = "data.title"
    for name, feature in experiment.features.items():
        if feature.on == on and (on == "item" or data.kind == "sequences"):
            columns.setdefault(feature.column or name, f"features.{name}")
    return {column: purpose for column, purpose in columns.items() if column != key}


def _needed_columns(experiment: Experiment) -> dict[str, dict[str, str]]:
    data = experiment.data
    events = event_columns(experiment) | label_columns(experiment)
    return {
        "events": events,
        "test": events,
        "items": {data.item: "data.item"} | side_columns(experiment, "items"),
        "users": {data.user: "data.user"} | side_columns(experiment, "users"),
    }


def drop(backend: Any, name: str) -> None:
    """Remove a table from the engine (Ibis 12 writes an invalid DROP with sqlglot 30)."""
    backend.raw_sql(f"DROP TABLE {name}")
