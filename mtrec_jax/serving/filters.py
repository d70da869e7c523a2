"""Which items may be shown: ids of any origin to one mask over the catalogue."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_path, one_of
from mtrec_jax.data.dataset import Prepared, described
from mtrec_jax.errors import DataError
from mtrec_jax.serving.requests import not_there, raw_texts
from mtrec_jax.types import FIRST

Ids = Iterable[Any] | os.PathLike | None
UnknownItems = Literal["ignore", "error"]
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Filters:
    """What `allowed` and `blocked` leave of a catalogue."""

    mask: np.ndarray  # [N] bool
    ignored: dict[str, list[str]]  # {"allowed" or "blocked": different ids that are no items of it}


def read_filters(
    prepared: Prepared, allowed: Ids, blocked: Ids, unknown_items: UnknownItems
) -> Filters:
    """The mask of raw item ids, from lists or files.

    Raises:
      ConfigError: `unknown_items` is neither of the two.
      DataError: a text instead of a list of ids; no item is left; with unknown_items="error", an
        id that is not in the catalogue.
    """
    one_of("unknown_items", unknown_items, ("ignore", "error"))
    mask, ignored = np.ones(prepared.manifest.items, bool), dict[str, list[str]]()
    for name, ids in (("allowed", allowed), ("blocked", blocked)):
        if ids is None:
            continue
        found, ignored[name] = _known(prepared, name, ids, unknown_items)
        if name == "allowed":
            mask[:] = False
        mask[found] = name == "allowed"
    if not mask.any():
        unknown = [raw for some in ignored.values() for raw in some]
        more = f" (not in the catalogue: {named(unknown)})" if unknown else ""
        raise DataError(f"the filters allowed and blocked leave no item{more}")
    return Filters(mask, {name: unknown for name, unknown in ignored.items() if unknown})


def named(ids: list[str]) -> str:
    """Ids for a message.

    >>> named(["a", "b", "c", "d"])
    "4 ids, 'a', 'b', 'c', …"
    """
    more = ", …" if len(ids) > 3 else ""
    return f"{len(ids):,} id{'s' * (len(ids) > 1)}, {', '.join(map(repr, ids[:3]))}{more}"


def _known(
    prepared: Prepared, name: str, ids: Ids, unknown_items: UnknownItems
) -> tuple[list[int], list[str]]:
    """Catalogue indexes of ids, and the different ones that are not in the catalogue."""
    assert ids is not None
    if isinstance(ids, str):
        raise DataError(
            f"{name}: {ids!r} is one text; pass a list of ids, or Path({ids!r}) of a file"
        )
    given = read_ids(prepared, ids) if isinstance(ids, os.PathLike) else ids
    different = dict.fromkeys(raw_texts(name, given))
    unknown = [raw for raw in different if raw not in prepared.item_ids]
    if unknown and set(different) <= {"true", "false"}:
        raise DataError(f"{name}: these are truth values; pass ids, such as items.id[mask]")
    if unknown and unknown_items == "error":
        raise not_there(prepared, name, unknown[0])
    known = [prepared.item_ids[raw] - FIRST for raw in different if raw in prepared.item_ids]
    return known, unknown


def read_ids(prepared: Prepared, path: str | os.PathLike) -> list[str]:
    """Raw item ids of a file.

    Args:
      prepared: what its column of items is called.
      path: a .csv, .tsv, .jsonl or .parquet file (the first three also .gz or .zst) with that
        column; any other file holds an id a line.

    Raises:
      DataError: the file is missing or cannot be read, or has no such column.
    """
    path = a_path("path", path)
    name = Path(path.name.lower().removesuffix(".gz").removesuffix(".zst"))
    if name.suffix not in _TABLES:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        return [line.strip() for line in lines if line.strip()]
    from mtrec_jax.data.new_rows import read_columns  # loads an engine

    experiment = described(prepared)
    column: pa.ChunkedArray = read_columns(experiment, path, [experiment.data.item])[0]
    return [raw for raw in column.to_pylist() if raw]
