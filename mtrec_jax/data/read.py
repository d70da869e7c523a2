"""Raw files and in-memory tables as blocks of Arrow rows, numbered by their place in the source.

A source row is a data line of the files, 0-based, one file after the other: blank and malformed
lines have a number too, so that a row number always leads back to a line.
"""

from __future__ import annotations

import bisect
import contextlib
import csv
import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.config import Files
from mtrec_jax.data import cells, lines
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

_GROUP = 1 << 20  # rows of a row group of the staged files
_BATCH = 1 << 26  # bytes of a Parquet file that are decoded at a time
_PACKED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Staged:
    """A raw table as Parquet files of text columns (or lists of text) and `_row`."""

    name: str
    parts: tuple[Path, ...]
    columns: tuple[str, ...]  # after `Files.rename`, without `_row`
    places: tuple[tuple[int, str, int], ...]  # (first row, file, line of that row) of every file
    rows: int  # data rows read: malformed ones too, blank lines not
    next_row: int
    bad: int  # malformed rows
    malformed: Path  # Parquet: row, reason, text (its first 200 characters)
    digests: tuple[str, ...]  # SHA-256 of each file's bytes as they are stored, or of the table

    def place(self, row: int) -> str:
        """Where a source row is, in words."""
        first, file, line = self.places[bisect.bisect([p[0] for p in self.places], row) - 1]
        return f"row {row} ({file} line {row - first + line})" if file else f"row {row}"

    def files(self) -> str:
        """The names of the files, for messages."""
        return ", ".join(file for _, file, _ in self.places if file) or f"table '{self.name}'"


class _File(NamedTuple):
    path: str  # "": the table in memory
    system: Any  # fsspec file system of a URL, or None
    name: str  # for messages about rows


def stage(
    name: str, files: Files, base: Path, table: Any, first_row: int, to: Path, public: str
) -> Staged:
    """Write files, or the in-memory `table` when there is one, as Parquet of text to folder `to`.

    Args:
      name: of the raw table, for messages and file names.
      files: which files of which format; paths are relative to `base`.
      base: the folder of the raw data.
      table: a pandas, Polars or Arrow table, or None.
      first_row: number of the first row.
      to: a folder, made where it is missing.
      public: the name by which `mtrec data` fetches the files, or "".

    Raises:
      DataError: a file is missing, empty, unreadable, or its columns differ from the first file's;
        every line is malformed; or `to` cannot be written.
    """
    found = [_File("", None, "")] if table is not None else _find(name, files, base, public)
    good = _Parts(to, f"{name}_{first_row}")
    wrong = _Parts(to / "malformed", f"{name}_{first_row}")
    wrong.write(cells.malformed([]))
    header = files.format in ("csv", "tsv", "atomic") and not files.header
    places, digests, rows, bad, row = [], [], 0, 0, first_row
    names: list[str] = []
    for file in found:
        hasher, before = hashlib.sha256(), row
        place = file.path or f"table '{name}'"
        places.append((row, file.name, 2 if header else 1))
        own: dict[str, None] = {}
        if file.path:
            blocks = _file_blocks(file, files, row, hasher)
        else:
            blocks = _table_blocks(table, name, row, hasher)
        for block in blocks:
            renamed = [files.rename.get(n, n) for n in block.rows.column_names]
            own |= dict.fromkeys(n for n in renamed if n != ROW)
            lines.check_names(list(own), place)
            rows, bad = rows + len(block.rows) + len(block.bad), bad + len(block.bad)
            row = block.next_row
            good.write(block.rows.rename_columns(renamed))
            wrong.write(block.bad)
        if row == before:
            raise DataError(f"{place} is empty: there is no row of data in it")
        digests.append(hasher.hexdigest())
        _same_columns(list(own), names or list(own), place, found[0].path, files.format)
        names += [n for n in own if n not in names]
    source = ", ".join(dict.fromkeys(file.path for file in found)) or f"table '{name}'"
    if not rows:
        raise DataError(f"{name}: no row of data in {source}")
    parts, (malformed,) = good.close(), wrong.close()
    if bad == rows:
        shown = [text[:80] for text in pq.read_table(malformed)["text"][:EXAMPLES].to_pylist()]
        raise DataError(
            f"{name}: every line of {source} is malformed, e.g. {shown}. Check format, separator "
            f"and header of data.{name}"
        )
    lines.check_names(names, source)
    columns = tuple(names)
    digest = tuple(digests)
    return Staged(name, parts, columns, tuple(places), rows, row, bad, malformed, digest)


def _same_columns(own: list[str], first: list[str], place: str, other: str, kind: str) -> None:
    """Files of one table have the same columns; JSON lines leave out what is missing."""
    missing, more = sorted(set(first) - set(own)), sorted(set(own) - set(first))
    if (missing or more) and (kind != "jsonl" or not set(first) & set(own)):
        differ = [f"it lacks {', '.join(missing)}"] * bool(missing)
        differ += [f"it has {', '.join(more)} besides"] * bool(more)
        raise DataError(
            f"{place} has other columns than {other}: {' and '.join(differ)}. The files of one "
            "table need the same columns; stage other files as another table, or mend the header"
        )


class _Parts:
    """Parquet files that grow block by block; a new column or a first list begins a new file."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.paths: list[Path] = []
        self.types: dict[str, pa.DataType] = {}
        self.writer: Any = None

    def write(self, table: pa.Table) -> None:
        """Append rows; columns that they lack are missing."""
        types = dict(self.types)
        for field in table.schema:
            if pa.types.is_list(field.type) or field.name not in types:
                types[field.name] = field.type
        if len(table) or not self.paths:
            with self._writing():
                if types != self.types or self.writer is None:
                    self._finish()
                    self.types = types
                    self.paths.append(self.folder / f"{self.stem}_{len(self.paths)}.parquet")
                    self.writer = self._writer(self.paths[-1])
                self.writer.write_table(_aligned(table, self.types), row_group_size=_GROUP)

    def close(self) -> tuple[Path, ...]:
        """The finished files, all with the same columns."""
        with self._writing():
            self._finish()
            for path in self.paths[:-1]:
                old = path.with_suffix(".old")
                path.rename(old)
                with self._writer(path) as writer, pq.ParquetFile(old) as part:
                    for group in range(part.num_row_groups):
                        writer.write_table(_aligned(part.read_row_group(group), self.types))
                old.unlink()
        return tuple(self.paths)

    def _finish(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.writer = None

    def _writer(self, path: Path) -> Any:
        schema = pa.schema(list(self.types.items()))
        return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise DataError(
                f"{self.folder} cannot be written: {error}. Preparation needs room for about the "
                "size of the raw data there: free some, or choose another `out`"
            ) from error


def _aligned(table: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    columns = []
    for name, kind in types.items():
        if name not in table.column_names:
            columns.append(pa.nulls(len(table), kind))
        elif table[name].type == kind:
            columns.append(table[name])
        else:  # text among lists: a list of one
            text = table[name].to_pylist()
            columns.append(pa.array([None if t is None else [t] for t in text], kind))
    return pa.table(columns, schema=pa.schema(list(types.items())))


def _find(name: str, files: Files, base: Path, public: str) -> list[_File]:
    """The files of a table in order; globs give sorted names.

    Raises:
      DataError: there is no such file, it is a folder, or it is named twice.
    """
    mark = lines.separator(files)
    if any(letter in mark for letter in '\n\r"'):
        raise DataError(f"data.{name}.separator: {mark!r} holds a quote or a line end; use another")
    found: list[tuple[str, Any]] = []
    for pattern in files.files:
        try:
            found += _match_url(pattern) if "://" in pattern else _match(pattern, base, public)
        except DataError:
            raise
        except ImportError as error:
            raise DataError(f"{pattern}: {error} (pip install s3fs or gcsfs)") from error
        except Exception as error:
            raise DataError(
                f"{pattern} cannot be looked up: {error}. Check its name and your access to it"
            ) from error
    names = Counter(path.rpartition("/")[2] for path, _ in found)
    for path, times in Counter(path for path, _ in found).items():
        if times > 1:
            raise DataError(f"data.{name}.files: {path} is named twice; every file is read once")
    return [
        _File(path, system, short if names[short := path.rpartition("/")[2]] == 1 else path)
        for path, system in found
    ]


def _match(pattern: str, base: Path, public: str) -> list[tuple[str, Any]]:
    path = base / pattern
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the files in it, e.g. '{pattern}/*.parquet'")
    if path.is_file():
        return [(str(path), None)]
    hint = f" Fetch the data with: mtrec data {public}" if public else ""
    if not any(letter in pattern for letter in "*?["):
        raise DataError(f"{path}: there is no such file.{hint}")
    paths = sorted(base / file for file in glob.glob(pattern, root_dir=base, recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise DataError(f"no file in {base} matches '{pattern}'.{hint}")
    return [(str(path), None) for path in paths]


def _match_url(url: str) -> list[tuple[str, Any]]:
    import fsspec

    system, path = fsspec.url_to_fs(url)
    if any(letter in url for letter in "*?["):
        paths = sorted(p for p in system.glob(path) if system.isfile(p))
        if not paths:
            raise DataError(f"no file matches '{url}'")
    elif system.isfile(path):
        paths = [path]
    elif system.isdir(path):
        raise DataError(f"{url} is a folder; name the files in it, e.g. '{url}/*.parquet'")
    else:
        raise DataError(f"{url}: there is no such file")
    return [(system.unstrip_protocol(path), system) for path in paths]


def _open(file: _File) -> Any:
    return file.system.open(file.path, "rb") if file.system else open(file.path, "rb")


def _file_blocks(file: _File, files: Files, first_row: int, hasher: Any) -> Iterator[lines.Block]:
    """Blocks of one file; the hash of its bytes is complete at the end.

    Raises:
      DataError: whatever goes wrong while it is read.
    """
    packed = _PACKED.get(Path(file.path).suffix) if files.format != "parquet" else None
    row, kind = first_row, packed or ("Parquet" if files.format == "parquet" else "text")
    try:
        with _open(file) as raw:
            if files.format == "parquet":
                while data := raw.read(_BYTES):
                    hasher.update(data)
                raw.seek(0)
                blocks = _parquet_blocks(raw, first_row)
            else:
                stream: Any = _Hashed(raw, hasher)
                if packed:
                    stream = pa.CompressedInputStream(pa.PythonFile(stream, "r"), packed)
                blocks = lines.text_blocks(stream, files, file.path, first_row)
            for block in blocks:
                yield block
                row = block.next_row
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{file.path} may not be read; check its permissions") from error
    except Exception as error:  # of Arrow, fsspec or a cloud's library
        after = f" after row {row - 1}" if row > first_row else ""
        raise DataError(
            f"{file.path} cannot be read as {kind}{after}: {error}. Check that it is whole, and "
            "that its name and `format` say what it is"
        ) from error


class _Hashed:
    """A file to be read once from start to end, whose bytes are hashed on the way."""

    closed = False

    def __init__(self, file: Any, hasher: Any) -> None:
        self.file, self.hasher = file, hasher

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self.file.read(size)
        self.hasher.update(data)
        return data

    def readable(self) -> bool:
        """As Arrow asks."""
        return True

    def close(self) -> None:
        """The file is closed by who opened it."""


def _parquet_blocks(raw: Any, first_row: int) -> Iterator[lines.Block]:
    part = pq.ParquetFile(raw, page_checksum_verification=True)
    lines.check_names(part.schema_arrow.names, "a Parquet file")
    size = sum(part.metadata.row_group(n).total_byte_size for n in range(part.num_row_groups))
    batch = _BATCH // (size // max(1, part.metadata.num_rows) + 1)
    for rows in part.iter_batches(min(max(batch, 256), _ROWS)):
        yield _typed_block(pa.Table.from_batches([rows]), first_row)
        first_row += len(rows)


def _table_blocks(
    table: Any, name: str, first_row: int, hasher: Any
) -> Iterator[lines.Block]:
    try:
        if isinstance(table, pa.Table):
            arrow = table
        elif hasattr(table, "iloc"):  # pandas, whose index is no column
            arrow = pa.Table.from_pandas(table, preserve_index=False)
        else:
            arrow = pa.table(table)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            f"table '{name}' ({type(table).__name__}) cannot be read: {error}. Pass a pandas, "
            "Polars or Arrow table whose columns have one type each"
        ) from error
    lines.check_names(arrow.column_names, f"table '{name}'")
    for start in range(0, len(arrow), _ROWS):
        block = _typed_block(arrow.slice(start, _ROWS), first_row + start)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, block.rows.schema) as writer:
            writer.write_table(block.rows)
        hasher.update(sink.getvalue())
        yield block


def _typed_block(table: pa.Table, first_row: int) -> lines.Block:
    """Typed columns as text; a row with a cell that is no text is malformed."""
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        chunks = [cells.as_text(chunk) for chunk in column.chunks]
        kind = chunks[0].type if chunks else pa.string()
        columns[name] = pa.chunked_array(chunks, kind).combine_chunks()
    wrong: dict[int, tuple[str, str]] = {}
    for column in columns.values():
        wrong = cells.broken(column) | wrong
    numbers = np.arange(first_row, first_row + len(table))
    rows = pa.table(columns | {ROW: pa.array(numbers)})
    if wrong:
        rows = rows.filter(pa.array(~np.isin(np.arange(len(table)), list(wrong))))
    bad = cells.malformed([(first_row + n, *why) for n, why in wrong.items()])
    return lines.Block(rows, bad, first_row + len(table))
