"""Text formats (CSV, TSV, RecBole atomic files, JSON lines) as blocks of text columns.

Lines are judged in bulk: which have the right number of cells is counted, regular ones are
cut by Arrow's CSV reader, and the odd ones by Python's. Every line has a number, the blank and
malformed ones too, so that a row number always leads back to a line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mtrec_jax.config import Files
from mtrec_jax.data.cells import LARGE, LARGEST, NOT_UTF8, NUL, SHOWN, malformed, tidy
from mtrec_jax.errors import DataError

ROW = "_row"
FEW, MANY, NO_OBJECT = "too few cells", "too many cells", "no JSON object"
OPEN = "unclosed quote (text over several lines needs Parquet or JSON lines)"
_BYTES = 1 << 24  # read at a time; a longer line is malformed
_COLUMNS = 10_000
_FOREIGN = {  # first bytes of a file that is no text in UTF-8
    b"\xff\xfe": "UTF-16 text; convert it, e.g. with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16 text; convert it, e.g. with `iconv -f UTF-16 -t UTF-8`",
    b"\x1f\x8b": "packed by gzip; give its name the ending .gz",
    b"\x28\xb5\x2f\xfd": "packed by zstd; give its name the ending .zst",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "a Parquet file; declare format = 'parquet'",
}


class Block(NamedTuple):
    """A part of a source."""

    rows: pa.Table  # columns of text or lists of text, and `_row`
    bad: pa.Table  # malformed lines: row, reason, text
    next_row: int  # number of the row after this block


def separator(files: Files) -> str:
    """What stands between two cells of a text table."""
    return files.separator or ("\t" if files.format in ("tsv", "atomic") else ",")


def text_blocks(stream: Any, files: Files, place: str, first_row: int) -> Iterator[Block]:
    """Blocks of one text file, whose first data line is number `first_row`.

    Raises:
      DataError: the file is something else, or its header is unusable.
      OSError: from `stream`.
    """
    names, row = list(files.header), first_row
    for data, long in _chunks(stream, place):
        if files.format == "jsonl":
            yield _json_block(data, long, row)
        else:
            if not names:
                head, _, data = data.partition(b"\n")
                names = _header(head, long, separator(files), place)
            if row == first_row:
                _check_header(names, files, place)
            if not data:
                continue
            yield _csv_block(data, long, files, names, row)
        row += data.count(b"\n")


def _chunks(stream: Any, place: str) -> Iterator[tuple[bytes, bool]]:
    """Whole lines that end in "\\n"; or (True) the beginning of one that is longer than a read."""
    rest, head, first = b"", b"", True
    while read := stream.read(_BYTES):
        data = rest + read
        if first:
            for magic, what in _FOREIGN.items():
                if data.startswith(magic):
                    raise DataError(f"{place} is {what}")
            data, first = data.removeprefix(b"\xef\xbb\xbf"), False
        if head:  # of a line that is too long: find its end
            end = re.search(rb"\r?\n|\r(?!\Z)", data)
            rest = data[-1:]
            if not end:
                continue
            yield head, True
            head, data = b"", data[end.end() :]
        cut = max(data.rfind(b"\n"), data.rfind(b"\r", 0, -1)) + 1
        rest = data[cut:]
        if cut:
            yield _line_ends(data[:cut]), False
        if len(rest) > _BYTES:
            head, rest = _line_ends(rest[: 4 * SHOWN]) + b"\n", rest[-1:]
    if head:
        yield head, True
    elif rest:
        yield _line_ends(rest).removesuffix(b"\n") + b"\n", False


def _line_ends(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data


def check_names(names: list[str], place: str) -> None:
    """Names that every engine can tell apart: SQL knows no upper and lower case.

    Raises:
      DataError: a name occurs twice, is empty or unprintable, or there are too many.
    """
    if len(names) > _COLUMNS:
        raise DataError(f"{place} has {len(names):,} columns; at most {_COLUMNS:,} can be read")
    taken = {ROW}
    for name in names:
        if not name or min(name) < " ":
            raise DataError(f"{place}: {name!r} cannot name a column; rename it in the raw data")
        if name.lower() in taken:
            raise DataError(
                f"{place}: the column name '{name}' is taken already (upper and lower case are "
                "the same); rename it in the raw data"
            )
        taken.add(name.lower())


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


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _header(line: bytes, long: bool, separator: str, place: str) -> list[str]:
    """Column names of the first line; one without a name is called by its number."""
    if long or not _is_utf8(line) or b"\0" in line:
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


class _Lines(NamedTuple):
    """Lines of a block with what is wrong with them: "" (good), "blank" or a reason."""

    text: pa.StringArray  # "\n" included
    starts: np.ndarray
    problem: np.ndarray


def _judge(data: bytes, long: bool) -> _Lines:
    """What can be said of lines without knowing their format."""
    raw = np.frombuffer(data, np.uint8)
    valid = _is_utf8(data)
    if not valid:
        whole, data = data, data.decode(errors="replace").encode()
        raw = np.frombuffer(data, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(raw == ord("\n")) + 1]).astype(np.int32)
    count = len(starts) - 1
    text = pa.StringArray.from_buffers(count, pa.py_buffer(starts), pa.py_buffer(data))
    problem = np.full(count, LARGE if long else "", object)
    blank = np.flatnonzero(raw[starts[:-1]] <= ord(" "))
    lengths = pc.binary_length(pc.ascii_trim_whitespace(text.take(pa.array(blank))))
    problem[blank[lengths.to_numpy() == 0]] = "blank"
    if b"\0" in data:
        problem[_contains(text, "\0")] = NUL
    if not valid:
        lines = whole.split(b"\n")
        for line in np.flatnonzero(_contains(text, "\ufffd")):
            if not _is_utf8(lines[line]):
                problem[line] = NOT_UTF8
    return _Lines(text, starts, problem)


def _contains(lines: pa.StringArray, text: str) -> np.ndarray:
    return pc.match_substring(lines, text).to_numpy(zero_copy_only=False)


def _bad(lines: _Lines, first_row: int) -> pa.Table:
    wrong = [int(i) for i in np.flatnonzero(lines.problem) if lines.problem[i] != "blank"]
    return malformed(
        [(first_row + i, lines.problem[i], lines.text[i].as_py().rstrip("\n")) for i in wrong]
    )


def _csv_block(data: bytes, long: bool, files: Files, names: list[str], first_row: int) -> Block:
    mark, count = separator(files), data.count(b"\n")
    simple = len(mark) == 1 and mark.isascii() and len(names) > 1
    if simple and not long and b'"' not in data and b"\0" not in data and _is_utf8(data):
        try:
            table = _read_csv(data, mark, names)
        except pa.ArrowInvalid:
            table = None
        if table is not None and len(table) == count and not _large(table):
            return _block(table, np.arange(count), files, first_row, malformed([]), count)

    lines = _judge(data, long)
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
    return _block(table, rows, files, first_row, _bad(lines, first_row), count)


def _irregular(lines: pa.StringArray, separator: str) -> np.ndarray:
    """Lines with quotes that are not exactly around whole cells: Python's reader knows more."""
    quoted = _contains(lines, '"') if len(separator) == 1 else np.zeros(len(lines), bool)
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
    """The same for a separator of several characters, or a single column."""
    cells = pc.split_pattern(lines, separator).flatten()
    width = len(names)
    each = [cells.take(pa.array(np.arange(n, len(cells), width))) for n in range(width)]
    return pa.table(each, names=names)


def _cut_odd(
    lines: _Lines, where: np.ndarray, separator: str, names: list[str]
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


def _json_block(data: bytes, long: bool, first_row: int) -> Block:
    """Numbers keep the text of the file; the columns are the keys of these lines."""
    lines = _judge(data, long)
    rows: list[int] = []
    records: list[dict[str, Any]] = []
    types: dict[str, pa.DataType] = {}
    texts = lines.text.to_pylist()
    for line in np.flatnonzero(lines.problem == "").tolist():
        try:
            record = {key: _json_cell(cell) for key, cell in _JSON.decode(texts[line]).items()}
        except (ValueError, RecursionError, AttributeError):
            lines.problem[line] = NO_OBJECT
            continue
        if problem := _json_problem(record, texts[line]):
            lines.problem[line] = problem
            continue
        for key, cell in record.items():
            if isinstance(cell, list):
                types[key] = pa.list_(pa.string())
            else:
                types.setdefault(key, pa.string())
        records.append(record)
        rows.append(line)
    columns = {}
    for key, kind in types.items():
        cells = [record.get(key) for record in records]
        if kind == pa.string():
            columns[key] = tidy(pa.array(cells, kind))
        else:
            listed = [c if c is None or isinstance(c, list) else [c] for c in cells]
            columns[key] = pa.array(listed, kind)
    columns[ROW] = pa.array(np.array(rows, np.int64) + first_row)
    return Block(pa.table(columns), _bad(lines, first_row), first_row + len(texts))


def _constant(text: str) -> str | None:
    return None if text == "NaN" else text


_JSON = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=_constant)


def _json_cell(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [_json_text(v) for v in value]
    return json.dumps(value, ensure_ascii=False)


def _json_text(value: Any) -> str | None:
    """An element of a list."""
    text = value if value is None or isinstance(value, str) else json.dumps(value)
    return (text.strip() or None) if text is not None else None


def _json_problem(record: dict[str, Any], line: str) -> str:
    r"""Only escapes (\u0000, half a surrogate pair) or length can spoil a line that parsed."""
    if "\\u" not in line and len(line) <= LARGEST:
        return ""
    cells = [*record, *(c for v in record.values() for c in (v if isinstance(v, list) else [v]))]
    for cell in filter(None, cells):
        if "\0" in cell:
            return NUL
        try:
            if len(cell.encode()) > LARGEST:
                return LARGE
        except UnicodeEncodeError:
            return NOT_UTF8
    return ""
