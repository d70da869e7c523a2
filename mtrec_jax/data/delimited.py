"""CSV, TSV and RecBole atomic files as blocks of text columns.

Lines are judged in bulk: which have the right number of cells is counted, regular ones are cut by
Arrow's CSV reader, and the odd ones by Python's.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mtrec_jax.config import Files
from mtrec_jax.data.cells import LARGE, LARGEST, malformed, tidy
from mtrec_jax.data.lines import (
    ROW,
    Block,
    Lines,
    bad_lines,
    check_names,
    chunks,
    contains,
    is_utf8,
    judge,
)
from mtrec_jax.errors import DataError

FEW, MANY = "too few cells", "too many cells"
OPEN = "unclosed quote (text over several lines needs Parquet or JSON lines)"


def separator(files: Files) -> str:
    """What stands between two cells of a text table."""
    return files.separator or ("\t" if files.format in ("tsv", "atomic") else ",")


def blocks(stream: Any, files: Files, place: str, first_row: int) -> Iterator[Block]:
    """Blocks of one delimited file, whose first data line is row `first_row`.

    Raises:
      DataError: the file is something else, or its header is unusable.
      OSError: from `stream`.
    """
    names, row = list(files.header), first_row
    for data, long in chunks(stream, place):
        if not names:
            head, _, data = data.partition(b"\n")
            names = _header(head, long, separator(files), place)
        if row == first_row:
            _check_header(names, files, place)
        if data:
            block = _block_of_lines(data, long, files, names, row)
            row = block.next_row
            yield block


def _check_header(names: list[str], files: Files, place: str) -> None:
    check_names(names, place)
    if files.format != "atomic":
        return
    for name in names:
        if name.partition(":")[2] not in ("token", "token_seq", "float", "float_seq"):
            raise DataError(
                f"{place}: the header of an atomic file says name:type for each column, with type "
                f"token, token_seq, float or float_seq, and here it says '{name}'"
            )
    check_names([name.partition(":")[0] for name in names], place)


def _header(line: bytes, long: bool, separator: str, place: str) -> list[str]:
    """Column names of the first line; one without a name is called by its number."""
    if long or not is_utf8(line) or b"\0" in line:
        why = "too long" if long else "not UTF-8 text"
        raise DataError(
            f"{place} line 1 is {why}, but should name the columns. Check the format of the file"
        )
    if not line.strip():
        raise DataError(
            f"{place} is empty: its first line should name the columns (or declare `header`)"
        )
    cells = _quoted([line.decode()], separator)[0] if len(separator) == 1 else None
    if isinstance(cells, str):
        raise DataError(f"{place} line 1: {cells}; it should name the columns")
    names = cells if cells is not None else line.decode().split(separator)
    return [name.strip() or f"column_{n}" for n, name in enumerate(names, 1)]


def _block_of_lines(
    data: bytes, long: bool, files: Files, names: list[str], first_row: int
) -> Block:
    mark, count = separator(files), data.count(b"\n")
    simple = len(mark) == 1 and mark.isascii()
    if (
        simple
        and len(names) > 1
        and not long
        and b'"' not in data
        and b"\0" not in data
        and is_utf8(data)
    ):
        try:
            table = _read_csv(data, mark, names)
        except pa.ArrowInvalid:
            table = None
        if table is not None and len(table) == count and not _large(table):
            return _block(table, np.arange(count), files, first_row, malformed([]), count)

    lines = judge(data, long)
    for line in np.flatnonzero(np.diff(lines.starts) > LARGEST):
        if max(len(cell.encode()) for cell in lines.text[line].as_py().split(mark)) > LARGEST:
            lines.problem[line] = LARGE
    seps = pc.count_substring(lines.text, mark).to_numpy()
    lines.problem[(lines.problem == "blank") & (seps > 0)] = ""
    good = lines.problem == ""
    odd = good & _irregular(lines.text, mark)
    rows = np.flatnonzero(good & ~odd)
    regular = lines.text.take(pa.array(rows))
    found = _cells(regular, mark, seps[rows])
    lines.problem[rows[found < len(names)]] = FEW
    lines.problem[rows[found > len(names)]] = MANY
    whole = found == len(names)
    rows, regular = rows[whole], regular.filter(pa.array(whole))
    if simple and len(rows):
        size = pc.sum(pc.binary_length(regular)).as_py()
        table = _read_csv(regular.buffers()[2][:size], mark, names)
    else:
        table = _split(regular, mark, names)
    if odd.any():
        more, where = _cut_odd(lines, np.flatnonzero(odd), mark, names)
        rows = np.concatenate([rows, where])
        order = np.argsort(rows)
        table, rows = pa.concat_tables([table, more]).take(pa.array(order)), rows[order]
    return _block(table, rows, files, first_row, bad_lines(lines, first_row), count)


def _irregular(lines: pa.StringArray, separator: str) -> np.ndarray:
    """Lines with quotes that are not exactly around whole cells: Python's reader knows more."""
    quoted = contains(lines, '"') if len(separator) == 1 else np.zeros(len(lines), bool)
    if not separator.isascii() or not quoted.any():
        return quoted
    cell = rf'(?:[^"\x{ord(separator):02x}\n]*|"(?:[^"\n]|"")*")'
    pattern = rf"^{cell}(?:\x{ord(separator):02x}{cell})*\n$"
    where = np.flatnonzero(quoted)
    fits = pc.match_substring_regex(lines.take(pa.array(where)), pattern)
    quoted[where] = ~fits.to_numpy(zero_copy_only=False)
    return quoted


def _cells(lines: pa.StringArray, separator: str, separators: np.ndarray) -> np.ndarray:
    """Number of cells of each line: separators between quotes do not count."""
    if len(separator) != 1 or not len(lines) or not pc.any(pc.match_substring(lines, '"')).as_py():
        return separators + 1
    ends = np.frombuffer(lines.buffers()[1], np.int32)[: len(lines) + 1]
    raw = np.frombuffer(lines.buffers()[2], np.uint8)[: ends[-1]]
    inside = np.logical_xor.accumulate(raw == ord('"'))
    outside = (raw == ord(separator)) & ~inside
    return np.add.reduceat(outside, ends[:-1], dtype=np.int32) + 1


def _block(
    table: pa.Table, rows: np.ndarray, files: Files, first_row: int, bad: pa.Table, count: int
) -> Block:
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        text = tidy(column)
        if files.format == "atomic":
            name, _, kind = name.partition(":")
            text = pc.ascii_split_whitespace(text) if kind.endswith("_seq") else text
        columns[name] = text
    columns[ROW] = pa.array(rows + first_row, pa.int64())
    return Block(pa.table(columns), bad, first_row + count)


def _read_csv(data: bytes | pa.Buffer, separator: str, names: list[str]) -> pa.Table:
    """Regular lines, all with the right number of cells."""
    return pa.csv.read_csv(
        pa.BufferReader(data),
        pa.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
        pa.csv.ParseOptions(delimiter=separator, newlines_in_values=False),
        pa.csv.ConvertOptions(
            check_utf8=False,
            column_types=dict.fromkeys(names, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _large(table: pa.Table) -> bool:
    return any((pc.max(pc.binary_length(c)).as_py() or 0) > LARGEST for c in table.columns)


def _split(lines: pa.StringArray, separator: str, names: list[str]) -> pa.Table:
    """The same for a separator that Arrow does not know."""
    cells = pc.split_pattern(lines, separator).flatten()
    width = len(names)
    each = [cells.take(pa.array(np.arange(n, len(cells), width))) for n in range(width)]
    return pa.table(each, names=names)


def _cut_odd(
    lines: Lines, where: np.ndarray, separator: str, names: list[str]
) -> tuple[pa.Table, np.ndarray]:
    """Irregular lines as a table, and which they are; the others get their `problem`."""
    texts = lines.text.take(pa.array(where)).to_pylist()
    kept, good = [], []
    found = _quoted([text.removesuffix("\n") for text in texts], separator)
    for line, cells in zip(where.tolist(), found, strict=True):
        if not isinstance(cells, str) and len(cells) == len(names):
            kept.append(cells)
            good.append(line)
        elif isinstance(cells, str):
            lines.problem[line] = cells
        else:
            lines.problem[line] = FEW if len(cells) < len(names) else MANY
    columns = zip(*kept, strict=True) if kept else ((),) * len(names)
    table = pa.table([pa.array(c, pa.string()) for c in columns], names=names)
    return table, np.array(good, np.int64)


def _quoted(lines: list[str], separator: str) -> list[list[str] | str]:
    """The cells of each line, or what is wrong with it; a quoted cell ends on its line."""

    def cut(part: list[str]) -> list[list[str]]:
        after = [*part, "x"]  # a quote that is still open would swallow it
        return list(csv.reader(after, delimiter=separator, skipinitialspace=separator != " "))

    try:
        found = cut(lines)
        if len(found) == len(lines) + 1:
            return [*found[:-1]]
    except csv.Error:
        pass
    if len(lines) == 1:
        return [LARGE if len(lines[0]) > LARGEST else OPEN]
    return [_quoted([line], separator)[0] for line in lines]
