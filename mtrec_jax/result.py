"""A table of answers that reads well on a terminal and in a notebook, and saves itself."""

from __future__ import annotations

import contextlib
import html
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtrec_jax.arguments import a_path
from mtrec_jax.errors import DataError

SHOWN = 20  # rows that a repr shows
TEXT_WIDTH = 36  # characters of a text column
SUFFIXES = (".csv", ".jsonl", ".parquet")


class Result:
    """Named columns of equal length; `result["item"]` is a list, `result.table` the Arrow table.

    `result.ignored` counts different ids of filters and histories that no item of the catalogue
    has, {"blocked": 2}. `result.order` says of recommendations which order they are in, and what
    the declared utility is.
    """

    def __init__(self, table: pa.Table, ignored: Mapping[str, int] | None = None, order: str = ""):
        self.table, self.ignored, self.order = table, dict(ignored or {}), order

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, a dict each."""
        return iter(self.table.to_pylist())

    def __getitem__(self, column: str) -> list[Any]:
        if column not in self.table.column_names:
            raise KeyError(f"{column!r}; there are {', '.join(self.table.column_names)}")
        return self.table.column(column).to_pylist()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.table.column_names)

    def to_pandas(self) -> Any:
        """A pandas DataFrame (needs pandas)."""
        return self.table.to_pandas()

    def save(self, path: str | Path) -> None:
        """Write to a .csv, .jsonl or .parquet file.

        Raises:
          DataError: another suffix, or the file cannot be written.
        """
        save_tables([self.table], path)

    def rich(self, shown_rows: int = SHOWN) -> Table:
        """The first rows as a rich table."""
        shown = Table(box=None, pad_edge=False)
        for name in self.columns:
            text = pa.types.is_string(self.table.schema.field(name).type)
            widest = self._widest(name)  # numbers are never cut, texts beyond TEXT_WIDTH are
            shown.add_column(
                Text(name),
                justify="left" if text else "right",
                no_wrap=True,
                overflow="ellipsis",
                min_width=min(14, widest) if text else widest,
                max_width=TEXT_WIDTH if text else None,
            )
        for row in self.table.slice(0, shown_rows).to_pylist():
            shown.add_row(*(Text(_cell(v)) for v in row.values()))
        more = len(self) - shown_rows
        notes = [f"{more:,} more rows"] if more > 0 else []
        notes += [f"{name}: {n:,} ids are not in the catalogue" for name, n in self.ignored.items()]
        shown.caption = "; ".join([*notes, *([self.order] if self.order else [])]) or None
        return shown

    def _widest(self, column: str) -> int:
        values = self.table.column(column).slice(0, SHOWN).to_pylist()
        return max([len(column), *(len(_cell(value)) for value in values)])

    def __repr__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160).print(self.rich())
        return text.getvalue().rstrip()

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(n)}</th>" for n in self.columns)
        rows = self.table.slice(0, SHOWN).to_pylist()
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(v))}</td>" for v in row.values()) + "</tr>"
            for row in rows
        )
        notes = [f"{len(self) - SHOWN:,} more rows"] if len(self) > SHOWN else []
        text = html.escape("; ".join([*notes, *([self.order] if self.order else [])]))
        more = f"<caption>{text}</caption>" if text else ""
        return f"<table>{more}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def print_recommendations(result: Result) -> None:
    """Print the answer of `recommend` to standard output, a table a user."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    is_new, known = result["new"], result["known"]
    places: dict[str, list[int]] = {}
    for place, user in enumerate(result["user"]):
        places.setdefault(user, []).append(place)
    left_out = ["user", "known"]
    if max(map(len, result["item"]), default=0) > 16:  # long ids crowd out the titles
        left_out += ["item"]  # files have them
    short = result.table.drop_columns(left_out)
    short = short.rename_columns([n.replace("weight ", "w. ") for n in short.column_names])
    for user, own in places.items():
        table = short.take(own)
        if not any(is_new[place] for place in own):
            table = table.drop_columns(["new"])
        note = "" if known[own[0]] else "  (unknown user: the most popular items)"
        console.print(Text.assemble((user, "bold"), note))
        console.print(Result(table).rich())
    if result.order:
        console.print(Text(result.order))


def save_tables(tables: Iterable[pa.Table], path: str | Path) -> int:
    """Write Arrow tables of one schema one after the other; returns the number of rows.

    The file appears whole or not at all.

    Raises:
      DataError: a suffix other than .csv, .jsonl and .parquet, or the file cannot be written.
    """
    path = a_path("path", path)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the file name must end in {', '.join(SUFFIXES)}")
    partial = path.with_name(path.name + ".partial")
    rows = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            for table in _written(file, path.suffix, tables):
                rows += table.num_rows
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):  # the folder may not be there either
            partial.unlink()
    return rows


def _written(file: Any, suffix: str, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    writer: Any = None
    for table in tables:
        if suffix == ".jsonl":
            for row in table.to_pylist():
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        else:
            if writer is None:
                make = pq.ParquetWriter if suffix == ".parquet" else pa.csv.CSVWriter
                writer = make(file, table.schema)
            writer.write_table(_in_lines(table) if suffix == ".csv" else table)
        yield table
    if writer is not None:
        writer.close()


def _in_lines(table: pa.Table) -> pa.Table:
    """With line breaks in texts as spaces: a row a line, as most readers of csv want it."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            flat = pc.replace_substring_regex(table[place], r"\s*[\r\n]+\s*", " ")
            table = table.set_column(place, field, flat)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
