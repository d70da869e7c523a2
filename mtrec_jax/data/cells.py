"""Cells as text: every column of every source becomes trimmed text, or lists of such text.

Text is what all sources have in common, so that the same log gives the same data whatever file or
table it comes in, and whatever engine goes on with it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LARGEST = 1 << 17  # bytes of a cell
NOT_UTF8, NUL, LARGE = "not UTF-8", "NUL byte", "cell too large"
MALFORMED = pa.schema([("row", pa.int64()), ("reason", pa.string()), ("text", pa.string())])
SHOWN = 200  # characters of a malformed line that are kept
_WHOLE = 2.0**53  # floats below it are written as integers where they are whole


def tidy(text: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Text without white space around it; "" is missing. What is not UTF-8 stays as it is."""
    try:
        text = pc.utf8_trim_whitespace(text)
    except pa.ArrowInvalid:
        data = _unchecked(text, pa.binary())
        valid = pa.array([_reason(v) != NOT_UTF8 for v in data.to_pylist()])
        trimmed = pc.utf8_trim_whitespace(data.filter(valid).cast(pa.string())).cast(pa.binary())
        text = _unchecked(pc.replace_with_mask(data, valid, trimmed), pa.string())
    return pc.if_else(pc.equal(pc.binary_length(text), 0), pa.scalar(None, text.type), text)


def as_text(column: pa.Array) -> pa.Array:
    """A column of any type as text, or as lists of text.

    Whole floats have no ".0", NaN is missing, times are ISO 8601 (UTC, with a Z, where the type
    has a time zone), and what is nested is JSON.

    >>> as_text(pa.array([2.0, 0.5, float("nan")])).to_pylist()
    ['2', '0.5', None]
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return as_text(column.storage)
    if pa.types.is_dictionary(kind):
        return as_text(column.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return as_text(pc.run_end_decode(column))
    if _is_list(kind):
        column = column.cast(pa.large_list(kind.value_type))
        sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        values = as_text(column.flatten())
        if _is_list(values.type):
            values = pa.array([v if v is None else json.dumps(v) for v in values.to_pylist()])
        mask = column.is_null() if column.null_count else None
        return pa.ListArray.from_arrays(pa.array(offsets), values.cast(pa.string()), mask=mask)
    return tidy(_scalar_text(column))


def _is_list(kind: pa.DataType) -> bool:
    checks = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(check(kind) for check in checks)


def _scalar_text(column: pa.Array) -> pa.StringArray:
    kind = column.type
    if pa.types.is_floating(kind):
        return _float_text(column.cast(pa.float32()) if kind == pa.float16() else column)
    if pa.types.is_timestamp(kind):
        text = column.cast(pa.timestamp(kind.unit)).cast(pa.string())  # the same instant in UTC
        text = pc.replace_substring_regex(text, r"(:\d\d)\.0+$", r"\1")
        return pc.binary_join_element_wise(text, "Z", "") if kind.tz else text
    if pa.types.is_nested(kind):
        values = column.to_pylist()
        text = [v if v is None else json.dumps(v, default=str, ensure_ascii=False) for v in values]
        return pa.array(text, pa.string())
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return _unchecked(column.cast(pa.binary()), pa.string())
    if pa.types.is_fixed_size_binary(kind):
        return _unchecked(column.cast(pa.binary()), pa.string())
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.array([v if v is None else str(v) for v in column.to_pylist()], pa.string())


def _unchecked(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The same bytes as text, UTF-8 or not: `broken` finds out."""
    return pa.Array.from_buffers(kind, len(column), column.buffers(), offset=column.offset)


def _float_text(column: pa.Array) -> pa.StringArray:
    column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    whole = pc.and_(pc.equal(pc.trunc(column), column), pc.less(pc.abs(column), _WHOLE))
    integers = pc.if_else(whole, column, pa.scalar(0, column.type)).cast(pa.int64())
    return pc.if_else(whole, integers.cast(pa.string()), column.cast(pa.string()))


def broken(column: pa.Array) -> dict[int, tuple[str, str]]:
    """{row: (reason, text)} of text, or lists of text, that no engine should see."""
    if pa.types.is_list(column.type):
        rows = pc.list_parent_indices(column)
        found = broken(column.flatten())
        return {rows[index].as_py(): why for index, why in found.items()}
    suspects: set[int] = set()
    data = _unchecked(column, pa.binary())
    try:
        data.cast(pa.string())
    except pa.ArrowInvalid:
        suspects.update(i for i, v in enumerate(data.to_pylist()) if _reason(v) == NOT_UTF8)
    for mask in (pc.match_substring(data, b"\0"), pc.greater(pc.binary_length(data), LARGEST)):
        if pc.any(mask).as_py():
            suspects.update(pc.indices_nonzero(mask).to_pylist())
    cells = {index: data[index].as_py() for index in suspects}
    return {i: (_reason(c) or "", c[:SHOWN].decode(errors="replace")) for i, c in cells.items()}


def _reason(cell: bytes | None) -> str | None:
    try:
        text = (cell or b"").decode()
    except UnicodeDecodeError:
        return NOT_UTF8
    return NUL if "\0" in text else LARGE if cell and len(cell) > LARGEST else None


def malformed(found: list[tuple[int, str, str]]) -> pa.Table:
    """(row, reason, text) as a table in the order of the rows."""
    rows = sorted((row, reason, text[:SHOWN]) for row, reason, text in found)
    columns: Any = zip(*rows, strict=True) if rows else ((), (), ())
    arrays = [pa.array(c, f.type) for c, f in zip(columns, MALFORMED, strict=True)]
    return pa.table(arrays, schema=MALFORMED)
