"""Raw files and in-memory tables as blocks of Arrow rows, numbered by their place in the source.

A source row is a data line of the files, 0-based, one file after the other: blank and malformed
lines have a number too, so that a row number always leads back to a line.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.config import Files
from mtrec_jax.errors import DataError, nearest

ROW = "_row"
QUOTE = '"'
EXAMPLES = 3  # rows that a report or an error shows
_BYTES = 1 << 24  # of a text file, read at a time
_ROWS = 1 << 17  # of a Parquet file


class Block(NamedTuple):
    """A part of a source, in any order of rows within it: every row has its number in `_row`."""

    lines: (
        Any  # Arrow table or None: "line" and "_row": text that is still to be cut at the separator
    )
    rows: Any  # Arrow table: the columns and "_row"
    bad: int  # malformed lines
    examples: tuple[tuple[int, str], ...]  # (row, text) of the first of them
    next_row: int  # number of the row after this block


def separator(files: Files) -> str:
    """What stands between two cells of a text table."""
    return files.separator or ("\t" if files.format in ("tsv", "atomic") else ",")


def csv_columns(path: Path, files: Files) -> list[str]:
    """Column names of a CSV file: declared, or from its first line.

    Raises:
      DataError: the file is empty, or a name occurs twice.
    """
    names = list(files.header)
    if not names:
        with path.open("rb") as file:
            first = file.readline().decode("utf-8-sig", errors="replace")
        if not first.strip():
            raise DataError(f"{path} is empty: its first line should name the columns")
        names = [name.strip() for name in _cut(first.rstrip("\r\n"), separator(files))]
    _check_names(names, str(path))
    return names


def blocks(path: Path, files: Files, names: list[str], first_row: int) -> Iterator[Block]:
    """Blocks of one file; `names` are the columns of a CSV file, unused otherwise.

    Raises:
      DataError: a Parquet file cannot be read.
    """
    if files.format == "csv":
        yield from _csv_blocks(path, files, names, first_row)
    elif files.format == "jsonl":
        yield from _json_blocks(path, first_row)
    else:
        try:
            for batch in pq.ParquetFile(path).iter_batches(_ROWS):
                yield _numbered(pa.Table.from_batches([batch]), first_row)
                first_row += len(batch)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def table_block(table: Any, name: str, first_row: int) -> Block:
    """An in-memory pandas, Polars or Arrow table as one block.

    Raises:
      DataError: `table` is none of these, or a column mixes types.
    """
    try:
        if isinstance(table, pa.Table):
            arrow = table
        elif hasattr(table, "iloc"):  # pandas, whose index is no column
            arrow = pa.Table.from_pandas(table, preserve_index=False)
        else:
            arrow = pa.table(table)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
        raise DataError(
            f"table '{name}' ({type(table).__name__}) cannot be read: {error}. Pass a pandas, "
            "Polars or Arrow table whose columns have one type each"
        ) from error
    return _numbered(arrow, first_row)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def table_digest(table: pa.Table) -> str:
    """SHA-256 of a table's Arrow IPC bytes, whatever its chunks and metadata."""
    hasher = hashlib.sha256()
    sink = pa.BufferOutputStream()
    plain = table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, plain.schema) as writer:
        writer.write_table(plain)
    hasher.update(sink.getvalue())
    return hasher.hexdigest()


def check_columns(name: str, have: list[str], needed: dict[str, str], place: str) -> None:
    """Raise `DataError` for the first of `needed` {column: what for} that a table lacks."""
    for column, purpose in needed.items():
        if column not in have:
            raise DataError(
                f"{name}: no column '{column}' ({purpose}) in {place}.{nearest(column, have)} "
                f"Columns: {', '.join(have)}"
            )


def _check_names(names: list[str], place: str) -> None:
    """SQL engines do not tell upper from lower case in a name."""
    taken = {ROW}
    for name in names:
        if name.lower() in taken:
            raise DataError(
                f"{place}: the column name '{name}' is taken already (upper and lower case are "
                "the same); rename it in the raw data"
            )
        taken.add(name.lower())


def _numbered(table: pa.Table, first_row: int) -> Block:
    """Rows with their numbers, of types that every engine knows."""
    _check_names(table.column_names, "the raw table")
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        columns[name] = column.cast(_plain_type(column.type))
    columns[ROW] = pa.array(np.arange(first_row, first_row + len(table)))
    return Block(None, pa.table(columns), 0, (), first_row + len(table))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(_plain_type(kind.value_type))
    return kind


def _lines(path: Path) -> Iterator[tuple[int, pa.StringArray, pa.BooleanArray]]:
    """(number of the first, lines without their ends, which of them are UTF-8), block by block."""
    number, rest = 0, b""
    with path.open("rb") as file:
        while True:
            read = file.read(_BYTES)
            data = rest + read
            if not data:
                return
            cut = data.rfind(b"\n") + 1 if read else len(data)
            data, rest = data[:cut], data[cut:]
            if not data:
                continue
            if number == 0:
                data = data.removeprefix(b"\xef\xbb\xbf")
            try:
                data.decode()
                whole = True
            except UnicodeDecodeError:
                data = data.decode(errors="replace").encode()
                whole = False
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
            if not len(ends) or ends[-1] < len(data):
                ends = np.append(ends, len(data))
            offsets = np.concatenate([[0], ends]).astype(np.int32)
            lines = pa.StringArray.from_buffers(
                len(ends), pa.py_buffer(offsets), pa.py_buffer(data)
            )
            lines = pc.ascii_rtrim(lines, "\r\n")
            valid = np.ones(len(lines), bool) if whole else ~_contains(lines, "�")
            yield number, lines, pa.array(valid)
            number += len(lines)


def _csv_blocks(path: Path, files: Files, names: list[str], first_row: int) -> Iterator[Block]:
    """Lines without quotes go on as text, to be cut by the engine; the few others are cut here."""
    header = 0 if files.header else 1
    types = pa.schema([*((name, pa.string()) for name in names), (ROW, pa.int64())])
    for number, lines, valid in _lines(path):
        rows = np.arange(number, number + len(lines)) - header + first_row
        there = np.asarray(pc.greater(pc.binary_length(pc.utf8_trim_whitespace(lines)), 0))
        there &= rows >= first_row  # not the header
        utf8 = valid.to_numpy(zero_copy_only=False)
        quoted = (
            _contains(lines, QUOTE) if len(separator(files)) == 1 else np.zeros(len(lines), bool)
        )
        plain = there & utf8 & ~quoted
        found: list[tuple[str | int, ...]] = []
        bad = [(int(r), t) for r, t in _pick(rows, lines, there & ~utf8)]
        for row, line in _pick(rows, lines, there & utf8 & quoted):
            cells = _cut(line, separator(files))
            if len(cells) == len(names):
                found.append((*cells, row))
            else:
                bad.append((row, line))
        columns = zip(*found, strict=True) if found else ([] for _ in types)
        yield Block(
            pa.table(
                {
                    "line": _trim_cells(lines.filter(pa.array(plain)), separator(files)),
                    ROW: rows[plain],
                }
            ),
            pa.table(
                [pa.array(c, f.type) for c, f in zip(columns, types, strict=True)], schema=types
            ),
            len(bad),
            tuple(sorted(bad)[:EXAMPLES]),
            int(rows[-1]) + 1,
        )


def _json_blocks(path: Path, first_row: int) -> Iterator[Block]:
    """Numbers keep the text of the file; the columns are the keys of the first block."""
    types: dict[str, pa.DataType] = {}
    for number, lines, _ in _lines(path):
        found, rows, bad = [], [], []
        for row, line in enumerate(lines.to_pylist(), first_row + number):
            if not line.strip():
                continue
            try:
                value = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                found.append(value)
                rows.append(row)
            else:
                bad.append((row, line))
        if number == 0:
            for record in found:
                for key, value in record.items():
                    listed = isinstance(value, list)
                    if listed or key not in types:
                        types[key] = pa.list_(pa.string()) if listed else pa.string()
        columns = {
            key: pa.array([_json_cell(record.get(key), kind) for record in found], kind)
            for key, kind in types.items()
        }
        columns[ROW] = pa.array(rows, pa.int64())
        next_row = first_row + number + len(lines)
        yield Block(None, pa.table(columns), len(bad), tuple(bad[:EXAMPLES]), next_row)


def _json_cell(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_list(kind):
        return [_json_cell(v, pa.string()) for v in (value if isinstance(value, list) else [value])]
    return value.strip() if isinstance(value, str) else json.dumps(value)


def _cut(line: str, separator: str) -> list[str]:
    """The trimmed cells of one CSV line; a quoted cell ends on its line."""
    if len(separator) != 1:
        return [cell.strip() for cell in line.split(separator)]
    try:
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=separator != " "))
    except (csv.Error, StopIteration):
        return []
    return [cell.strip() for cell in cells]


def _trim_cells(lines: pa.StringArray, separator: str) -> pa.StringArray:
    """Lines without blanks around their cells: far cheaper here than cell by cell in the engine."""
    blanks = "".join(blank for blank in " \t" if blank not in separator)
    around = [pattern for blank in blanks for pattern in (blank + separator, separator + blank)]
    while any(pc.any(pc.match_substring(lines, pattern)).as_py() for pattern in around):
        for pattern in around:
            lines = pc.replace_substring(lines, pattern, separator)
    return pc.utf8_trim(lines, blanks) if blanks else lines


def _contains(lines: pa.StringArray, text: str) -> np.ndarray:
    return pc.match_substring(lines, text).to_numpy(zero_copy_only=False)


def _pick(rows: np.ndarray, lines: pa.StringArray, mask: np.ndarray) -> list[tuple[int, str]]:
    chosen = lines.filter(pa.array(mask)).to_pylist() if mask.any() else []
    return list(zip(rows[mask].tolist(), chosen, strict=True))
