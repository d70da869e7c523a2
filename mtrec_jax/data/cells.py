"""Cells as text: every column of every source becomes trimmed text, or lists of such text.

Text is what all sources have in common, so that the same log gives the same data whatever file or
table it comes in, and whatever engine goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.errors import DataError

YEAR_2200 = 7_258_118_400  # seconds: later times are most likely of another unit
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


def readable(schema: pa.Schema, named: Collection[str], place: str) -> list[str]:
    """The columns of a typed table that are read: those that the configuration names, and others,
    by which duplicates are told, if they are no binary data.

    Raises:
      DataError: a column in `named` has a type that has no meaning as text.
    """
    found = []
    for field in schema:
        problem = _unreadable(field.type)
        if problem and field.name in named:
            raise DataError(f"{place}: column '{field.name}' {problem}")
        if not problem and (field.name in named or not _is_binary(field.type)):
            found.append(field.name)
    return found


def _unreadable(kind: pa.DataType) -> str:
    """What is wrong with a type, and the remedy; "" for a known one, which alone is converted."""
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "pandas.period":
            return (
                "holds pandas Periods, which would become their ordinal numbers. Convert it with "
                ".dt.to_timestamp()"
            )
        if kind.extension_name in ("arrow.uuid", "arrow.json", "arrow.bool8"):
            return ""
    elif pa.types.is_duration(kind):
        return "holds durations, which have no unit as numbers. Convert it with .dt.total_seconds()"
    elif pa.types.is_dictionary(kind) or _is_list(kind):
        return _unreadable(kind.value_type)
    elif pa.types.is_struct(kind):
        return next(filter(None, (_unreadable(field.type) for field in kind)), "")
    elif pa.types.is_map(kind):
        return _unreadable(kind.key_type) or _unreadable(kind.item_type)
    elif _is_binary(kind) or any(is_kind(kind) for is_kind in _KNOWN):
        return ""
    return f"is of the Arrow type {kind}, which is not read. Make it text, numbers or timestamps"


_KNOWN = (
    pa.types.is_null,
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_timestamp,
)


def _is_binary(kind: pa.DataType) -> bool:
    checks = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(check(kind) for check in checks)


def as_text(column: pa.Array) -> pa.Array:
    """A column of a `readable` type as text, or as lists of text.

    Whole floats have no ".0", NaN is missing, times are ISO 8601 (UTC, with a Z, where the type
    has a time zone), UUIDs have their hyphens, and what is nested is JSON.

    >>> as_text(pa.array([2.0, 0.5, float("nan")])).to_pylist()
    ['2', '0.5', None]
    """
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        stored = column.storage
        return _uuid_text(stored) if kind.extension_name == "arrow.uuid" else as_text(stored)
    if pa.types.is_dictionary(kind):  # the values first: few kernels know dictionaries of views
        return as_text(column.dictionary).take(column.indices)
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


def _uuid_text(stored: pa.FixedSizeBinaryArray) -> pa.StringArray:
    """UUIDs as Python writes them: 00112233-4455-6677-8899-aabbccddeeff."""
    n, letters = len(stored), np.frombuffer(b"0123456789abcdef", np.uint8)
    raw = np.frombuffer(stored.buffers()[1], np.uint8)[16 * stored.offset :][: 16 * n]
    digits = letters[np.stack([raw >> 4, raw & 15], axis=1)].reshape(n, 32)
    text = np.insert(digits, [8, 12, 16, 20], ord("-"), axis=1)
    offsets = np.arange(n + 1, dtype=np.int32) * 36
    found = pa.StringArray.from_buffers(n, pa.py_buffer(offsets), pa.py_buffer(text))
    return pc.if_else(stored.is_valid(), found, pa.scalar(None, pa.string()))


def _is_list(kind: pa.DataType) -> bool:
    checks = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
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
    if _is_binary(kind):
        return _unchecked(column.cast(pa.binary()), pa.string())
    return column.cast(pa.string())


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
