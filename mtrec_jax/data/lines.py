"""Text files as numbered lines, and JSON lines as blocks of text columns.

Every line has a number, the blank and malformed ones too, so that a row number always leads back
to a line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.data.cells import LARGE, LARGEST, NOT_UTF8, NUL, SHOWN, malformed, tidy
from mtrec_jax.errors import DataError

ROW = "_row"
NO_OBJECT = "no JSON object"
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


def chunks(stream: Any, place: str) -> Iterator[tuple[bytes, bool]]:
    """Whole lines that end in "\\n"; or (True) the beginning of one that is longer than a read.

    Raises:
      DataError: the file is no text in UTF-8.
      OSError: from `stream`.
    """
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
            shown = rest[: 4 * SHOWN].decode(errors="ignore").encode()  # no part of a letter
            head, rest = _line_ends(shown) + b"\n", rest[-1:]
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
            raise DataError(
                f"{place}: {name[:80]!r} cannot name a column; check the separator, or rename it"
            )
        if name.lower() in taken:
            raise DataError(
                f"{place}: the column name '{name}' is taken already (upper and lower case are "
                "the same); rename it in the raw data"
            )
        taken.add(name.lower())


def is_utf8(data: bytes) -> bool:
    """Whether bytes are text in UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Lines(NamedTuple):
    """Lines of a block with what is wrong with them: "" (good), "blank" or a reason."""

    text: pa.StringArray  # "\n" included
    starts: np.ndarray
    problem: np.ndarray


def judge(data: bytes, long: bool) -> Lines:
    """What can be said of lines without knowing their format."""
    raw = np.frombuffer(data, np.uint8)
    valid = is_utf8(data)
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
        problem[contains(text, "\0")] = NUL
    if not valid:
        lines = whole.split(b"\n")
        for line in np.flatnonzero(contains(text, "\ufffd")):
            if not is_utf8(lines[line]):
                problem[line] = NOT_UTF8
    return Lines(text, starts, problem)


def contains(lines: pa.StringArray, text: str) -> np.ndarray:
    """[lines] bool: those that hold `text`."""
    return pc.match_substring(lines, text).to_numpy(zero_copy_only=False)


def bad_lines(lines: Lines, first_row: int) -> pa.Table:
    """The malformed lines: row, reason, text."""
    wrong = [int(i) for i in np.flatnonzero(lines.problem) if lines.problem[i] != "blank"]
    return malformed(
        [(first_row + i, lines.problem[i], lines.text[i].as_py().rstrip("\n")) for i in wrong]
    )


def json_blocks(stream: Any, place: str, first_row: int, named: Collection[str]) -> Iterator[Block]:
    """Blocks of JSON lines; the first line is row `first_row`, and each block has its own columns.

    A line is malformed where a cell of the `named` columns is no text; those of others are missing.

    Raises:
      DataError: the file is no text in UTF-8.
      OSError: from `stream`.
    """
    for data, long in chunks(stream, place):
        block = _json_block(data, long, first_row, named)
        first_row = block.next_row
        yield block


def _json_block(data: bytes, long: bool, first_row: int, named: Collection[str]) -> Block:
    """Numbers keep the text of the file; the columns are the keys of these lines."""
    lines = judge(data, long)
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
        if problem := _json_problem(record, texts[line], named):
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
    return Block(pa.table(columns), bad_lines(lines, first_row), first_row + len(texts))


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


def _json_problem(record: dict[str, Any], line: str, named: Collection[str]) -> str:
    r"""Only escapes (\u0000, half a surrogate pair) or length can spoil a line that parsed; what
    they spoil outside of the `named` columns is taken out of the record."""
    if "\\u" not in line and len(line) <= LARGEST:
        return ""
    for key, value in record.items():
        cells = value if isinstance(value, list) else [value]
        problem = next(filter(None, map(_cell_problem, cells)), "")
        if _cell_problem(key) or (problem and key in named):
            return _cell_problem(key) or problem
        if problem:
            record[key] = None
    return ""


def _cell_problem(cell: str | None) -> str:
    if not cell:
        return ""
    if "\0" in cell:
        return NUL
    try:
        return LARGE if len(cell.encode()) > LARGEST else ""
    except UnicodeEncodeError:
        return NOT_UTF8
