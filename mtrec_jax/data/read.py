"""Raw files and in-memory tables, staged as Parquet files of text that engines go on with.

A source row is a data line of the files, 0-based, one file after the other: blank and malformed
lines have a number too, so that a row number always leads back to a line.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_jax.config import Files
from mtrec_jax.data import cells, delimited, lines
from mtrec_jax.data.lines import ROW
from mtrec_jax.data.locate import File, Hashed, find_files, open_file
from mtrec_jax.errors import DataError, nearest

EXAMPLES = 3  # rows that a report or an error shows
_BYTES = 1 << 24  # read at a time
_ROWS = 1 << 17  # of a Parquet file or a table, staged at a time
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
        return place_of(self.places, row)

    def files(self) -> str:
        """The names of the files, for messages."""
        return ", ".join(file for _, file, _ in self.places if file) or f"table '{self.name}'"


def place_of(places: Sequence[tuple[int, str, int]], row: int) -> str:
    """Where a source row is, in words, by the first row of every file."""
    first, file, line = places[bisect.bisect([p[0] for p in places], row) - 1]
    return f"row {row} ({file} line {row - first + line})" if file else f"row {row}"


def shortened(text: str) -> str:
    """A text for a message, cut where a damaged file has made it long."""
    return text if len(text) <= 2000 else f"{text[:2000]} …"


def check_columns(name: str, have: list[str], needed: dict[str, str], place: str) -> None:
    """Raise `DataError` for the first of `needed` {column: what for} that a table lacks."""
    for column, purpose in needed.items():
        if column not in have:
            hint = ". Check the separator" if len(have) == 1 else ""
            raise DataError(
                f"{name}: no column '{column}' ({purpose}) in {place}.{nearest(column, have)} "
                f"Columns: {shortened(', '.join(have))}{hint}"
            )


def stage(
    name: str,
    files: Files,
    base: Path,
    table: Any,
    first_row: int,
    to: Path,
    public: str,
    needed: Collection[str],
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
      needed: columns that each file must have if another one has them; a file may lack others.
        Of typed tables the others serve to tell duplicates: no cell of them spoils a row.

    Raises:
      DataError: a file is missing, empty, unreadable, or lacks a needed column that another file
        has, or has one of a type that cannot be text; every line is malformed; or `to` cannot be
        written.
    """
    mark = delimited.separator(files)
    if any(letter in mark for letter in '\n\r"'):
        raise DataError(f"data.{name}.separator: {mark!r} holds a quote or a line end; use another")
    found = [File("", None, "")] if table is not None else find_files(name, files, base, public)
    good = _Parts(to, f"{name}_{first_row}")
    wrong = _Parts(to / "malformed", f"{name}_{first_row}")
    wrong.write(cells.malformed([]))
    header = files.format in ("csv", "tsv", "atomic") and not files.header
    named = _named(files, needed)
    places, digests, rows, bad, row = [], [], 0, 0, first_row
    names: list[str] = []
    for file in found:
        hasher, before = hashlib.sha256(), row
        place = file.path or f"table '{name}'"
        places.append((row, file.name, 2 if header else 1))
        own: dict[str, None] = {}
        if file.path:
            blocks = _file_blocks(file, files, row, hasher, named)
        else:
            blocks = _table_blocks(table, name, row, hasher, named)
        for block in blocks:
            renamed = [files.rename.get(n, n) for n in block.rows.column_names]
            lines.check_names([n for n in renamed if n != ROW], place)
            own |= dict.fromkeys(n for n in renamed if n != ROW)
            rows, bad = rows + len(block.rows) + len(block.bad), bad + len(block.bad)
            row = block.next_row
            good.write(block.rows.rename_columns(renamed))
            wrong.write(block.bad)
        if row == before:
            raise DataError(
                f"{place} is empty: there is no row of data in it. Check that it was written to "
                "the end, or leave it out: in the list of files, or by a pattern such as [!_]*.csv"
            )
        digests.append(hasher.hexdigest())
        jsonl = files.format == "jsonl" and bool(set(own) & set(names))
        if own and not jsonl:  # JSON lines leave out what is missing, and may all be malformed
            _check_drift(set(own), set(names or own), needed, place, found[0].path)
        names += [n for n in own if n not in names]
    source = ", ".join(dict.fromkeys(file.path for file in found)) or f"table '{name}'"
    _check_rename(name, files, names, source)
    if not rows:
        raise DataError(f"{name}: no row of data in {source}. Name files that hold some")
    parts, (malformed,) = good.close(), wrong.close()
    if bad == rows:
        first = pq.read_table(malformed).slice(0, EXAMPLES).to_pylist()
        shown = ", ".join(f"{r['text'][:80]!r} ({r['reason']})" for r in first)
        declared = f"data.{'events' if name in ('rows', 'test', 'validation') else name}"
        typed = table is not None or files.format == "parquet"
        raise DataError(
            f"{name}: every line of {source} is malformed, e.g. {shown}. "
            + (
                "Leave out the column that is no text, or convert it"
                if typed
                else f"Check format, separator and header of {declared}"
            )
        )
    lines.check_names(names, source)
    columns = tuple(names)
    digest = tuple(digests)
    return Staged(name, parts, columns, tuple(places), rows, row, bad, malformed, digest)


def _named(files: Files, needed: Collection[str]) -> set[str]:
    """The columns that the configuration names, as they are called in the source."""
    return {*needed, *files.rename}


def digests(
    name: str,
    files: Files,
    base: Path,
    table: Any,
    first_row: int,
    public: str,
    needed: Collection[str],
) -> tuple[str, ...]:
    """`Staged.digests` of the files, or of the in-memory `table`, without staging them."""
    if table is not None:
        hasher = hashlib.sha256()
        for _ in _table_blocks(table, name, first_row, hasher, _named(files, needed)):
            pass
        return (hasher.hexdigest(),)
    found = []
    for file in find_files(name, files, base, public):
        with open_file(file) as raw:
            hasher = hashlib.sha256()
            while data := raw.read(_BYTES):
                hasher.update(data)
            found.append(hasher.hexdigest())
    return tuple(found)


def _check_rename(name: str, files: Files, names: list[str], source: str) -> None:
    for old, new in files.rename.items():
        if names and new not in names:
            raise DataError(
                f"data.{name}.rename: there is no column '{old}' in {source}.{nearest(old, names)} "
                f"Columns: {', '.join(names)}"
            )


def _check_drift(
    own: set[str], before: set[str], needed: Collection[str], place: str, other: str
) -> None:
    """Stop where a file lacks what another one has, if that matters or if they have nothing in
    common; what is only here or only there and nobody asks for is missing in the other one."""
    missing, more = sorted(before - own), sorted(own - before)
    if own & before and not {*missing, *more} & set(needed):
        return
    differ = [f"it lacks {', '.join(missing)}"] * bool(missing)
    differ += [f"it has {', '.join(more)} besides"] * bool(more)
    raise DataError(
        f"{place} has other columns than {other}: {' and '.join(differ)}. All files of a table "
        "need the columns that the configuration names; mend the header, or `rename` them"
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


def _file_blocks(
    file: File, files: Files, first_row: int, hasher: Any, named: set[str]
) -> Iterator[lines.Block]:
    """Blocks of one file; the hash of its bytes is complete at the end.

    Raises:
      DataError: whatever goes wrong while it is read.
    """
    packed = _PACKED.get(Path(file.path).suffix) if files.format != "parquet" else None
    row, kind = first_row, packed or ("Parquet" if files.format == "parquet" else "text")
    foreign: Any = (OSError, pa.ArrowException)
    if file.system or kind == "Parquet":  # a cloud's library, or what damage makes of metadata
        foreign = Exception
    try:
        with open_file(file) as raw:
            if files.format == "parquet":
                while data := raw.read(_BYTES):
                    hasher.update(data)
                raw.seek(0)
                blocks = _parquet_blocks(raw, file.path, first_row, named)
            else:
                stream: Any = Hashed(raw, hasher)
                if packed:
                    stream = pa.CompressedInputStream(pa.PythonFile(stream, "r"), packed)
                if files.format == "jsonl":
                    blocks = lines.json_blocks(stream, file.path, first_row, named)
                else:
                    blocks = delimited.blocks(stream, files, file.path, first_row)
            for block in blocks:
                yield block
                row = block.next_row
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{file.path} may not be read; check its permissions") from error
    except foreign as error:
        after = f" after row {row - 1}" if row > first_row else ""
        raise DataError(
            f"{file.path} cannot be read as {kind}{after}: {error}. Check that it is whole, and "
            "that its name and `format` say what it is"
        ) from error


def _parquet_blocks(raw: Any, place: str, first_row: int, named: set[str]) -> Iterator[lines.Block]:
    part = pq.ParquetFile(raw, page_checksum_verification=True)
    lines.check_names(part.schema_arrow.names, place)
    columns = cells.readable(part.schema_arrow, named, place)
    size = 0
    for group in map(part.metadata.row_group, range(part.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in columns:
                size += column.total_uncompressed_size
    batch = _BATCH // (size // max(1, part.metadata.num_rows) + 1)
    for rows in part.iter_batches(min(max(batch, 256), _ROWS), columns=columns):
        yield _typed_block(pa.Table.from_batches([rows]).select(columns), first_row, named)
        first_row += len(rows)


def _table_blocks(
    table: Any, name: str, first_row: int, hasher: Any, named: set[str]
) -> Iterator[lines.Block]:
    arrow = _arrow_table(table, name, named)
    lines.check_names(arrow.column_names, f"table '{name}'")
    arrow = arrow.select(cells.readable(arrow.schema, named, f"table '{name}'"))
    for start in range(0, len(arrow), _ROWS):
        block = _typed_block(arrow.slice(start, _ROWS), first_row + start, named)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, block.rows.schema) as writer:
            writer.write_table(block.rows)
        hasher.update(sink.getvalue())
        yield block


# {(package, class): the call that makes a table of it}
_CALLS = {
    ("pyspark", "DataFrame"): "{}.toPandas()",
    ("polars", "LazyFrame"): "{}.collect()",
    ("datasets", "Dataset"): "{}.to_pandas()",
    ("datasets", "DatasetDict"): "{}['train'].to_pandas()",
    ("dask", "DataFrame"): "{}.compute()",
    ("pandas", "Series"): "{}.reset_index()",
    ("numpy", "ndarray"): "pandas.DataFrame({})",
    ("numpy", "recarray"): "pandas.DataFrame({})",
    ("builtins", "list"): "pandas.DataFrame({})",
    ("builtins", "tuple"): "pandas.DataFrame({})",
}


def _arrow_table(table: Any, name: str, named: set[str]) -> pa.Table:
    """A table in memory as an Arrow table.

    Raises:
      DataError: it is something else, with the call that makes a table of it, or a column of
        `named` has cells of several types.
    """
    kind = type(table)
    if call := _CALLS.get((kind.__module__.partition(".")[0], kind.__name__)):
        raise DataError(
            f"table '{name}' is a {kind.__module__}.{kind.__name__}, which is not read as it is: "
            f"pass {call.format(name)}"
        )
    try:
        if hasattr(table, "iloc"):  # pandas, whose index is no column
            if any(label is not None for label in table.index.names):
                table = table.reset_index()  # unless it has a name
            return _of_pandas(table, name, named)
        return table if isinstance(table, pa.Table) else pa.table(table)
    except _NO_TYPE as error:
        raise DataError(
            f"table '{name}' ({kind.__name__}) cannot be read: {error}. Pass a pandas, "
            "Polars or Arrow table whose columns have one type each"
        ) from error


_NO_TYPE = (pa.ArrowException, TypeError, ValueError, OverflowError)  # of Arrow's conversions


def _of_pandas(table: Any, name: str, named: set[str]) -> pa.Table:
    """A pandas table without the columns that Arrow has no type for and nobody names."""
    if twice := list(table.columns[table.columns.duplicated()]):
        raise DataError(
            f"table '{name}' has several columns named '{twice[0]}'; rename them, or keep the "
            "first: df.loc[:, ~df.columns.duplicated()]"
        )
    try:
        return pa.Table.from_pandas(table, preserve_index=False)
    except _NO_TYPE:  # some column; found below
        columns = {}
    for label in table.columns:
        try:
            columns[label] = _column(table[label])
        except _NO_TYPE as error:
            if str(label) in named:
                kinds = ", ".join(sorted({type(cell).__name__ for cell in table[label].dropna()}))
                raise DataError(
                    f"table '{name}': column '{label}' cannot be read: its cells are of type "
                    f"{kinds} ({error}). Make them texts: df[{label!r}] = df[{label!r}].astype(str)"
                ) from error
    return pa.Table.from_arrays([*columns.values()], names=[str(label) for label in columns])


def _column(series: Any) -> pa.Array | pa.ChunkedArray:
    """A column of pandas; one of texts and whole numbers is texts, as all ids are."""
    try:
        return pa.Array.from_pandas(series)
    except _NO_TYPE:
        cells = series.astype(object)
        for cell in cells[cells.notna()]:
            if isinstance(cell, bool) or not isinstance(cell, str | Integral):
                raise
        return pa.Array.from_pandas(cells.map(str, na_action="ignore"), type=pa.string())


def _typed_block(table: pa.Table, first_row: int, named: set[str]) -> lines.Block:
    """Typed columns as text; a row with a named cell that is no text is malformed, and such a cell
    of another column is missing."""
    columns = {}
    wrong: dict[int, tuple[str, str]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        chunks = [cells.as_text(chunk) for chunk in column.chunks]
        text = pa.chunked_array(chunks, chunks[0].type if chunks else pa.string()).combine_chunks()
        found = cells.broken(text)
        if found and name not in named:
            mask = np.isin(np.arange(len(text)), list(found))
            text = text.take(pa.array(np.arange(len(text)), mask=mask))
        elif found:
            wrong = found | wrong
        columns[name] = text
    numbers = np.arange(first_row, first_row + len(table))
    rows = pa.table(columns | {ROW: pa.array(numbers)})
    if wrong:
        rows = rows.filter(pa.array(~np.isin(np.arange(len(table)), list(wrong))))
    bad = cells.malformed([(first_row + n, *why) for n, why in wrong.items()])
    return lines.Block(rows, bad, first_row + len(table))
