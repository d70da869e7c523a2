"""Which items may be shown, and how many of a kind, from ids of any origin."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_path, a_whole_number, one_of, shown
from mtrec_jax.data.dataset import Prepared, described, to_arrays
from mtrec_jax.data.features.categorical import Categorical
from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.kernels.constrained import NO_LIMIT, Quotas
from mtrec_jax.serving.requests import not_there, raw_text, raw_texts
from mtrec_jax.types import FIRST

Ids = Iterable[Any] | os.PathLike | None
Allowed = Ids | Mapping[Any, Ids]  # of all users, or of each
AtMost = Mapping[str, int] | None
UnknownItems = Literal["ignore", "error"]
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Filters:
    """What `allowed` and `blocked` leave of a catalogue."""

    mask: np.ndarray  # [N] bool
    own: dict[str, np.ndarray] | None  # of each user catalogue indexes, ascending; None: of nobody
    ignored: dict[str, list[str]]  # {"allowed" or "blocked": different ids that are no items of it}


def read_filters(
    prepared: Prepared, allowed: Allowed, blocked: Ids, unknown_items: UnknownItems
) -> Filters:
    """The mask of raw item ids, and the lists of users, from lists or files.

    Raises:
      ConfigError: `unknown_items` is neither of the two.
      DataError: a text instead of a list of ids; no item is left; with unknown_items="error", an
        id that is not in the catalogue.
    """
    one_of("unknown_items", unknown_items, ("ignore", "error"))
    mask, unknown, own = np.ones(prepared.manifest.items, bool), dict[str, list[str]](), None
    if isinstance(allowed, Mapping):
        own, unknown["allowed"] = _lists(prepared, allowed, unknown_items)
    elif allowed is not None:
        found, unknown["allowed"] = _known(prepared, "allowed", allowed, unknown_items)
        mask[:] = False
        mask[found] = True
    if blocked is not None:
        found, unknown["blocked"] = _known(prepared, "blocked", blocked, unknown_items)
        mask[found] = False
    if not mask.any():
        strange = [raw for some in unknown.values() for raw in some]
        more = f" (not in the catalogue: {named(strange)})" if strange else ""
        raise DataError(f"the filters allowed and blocked leave no item{more}")
    return Filters(mask, own, {name: strange for name, strange in unknown.items() if strange})


def _lists(
    prepared: Prepared, allowed: Mapping[Any, Ids], unknown_items: UnknownItems
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Catalogue indexes of each user's list, and the different ids that are not in it."""
    own, unknown = dict[str, np.ndarray](), dict[str, None]()
    for user, ids in allowed.items():
        found: Any = range(prepared.manifest.items)
        if ids is not None:
            found, strange = _known(prepared, f"allowed[{user!r}]", ids, unknown_items)
            unknown |= dict.fromkeys(strange)
        own[raw_text(user)] = np.sort(np.array(found, np.int64))
    return own, list(unknown)


def read_quotas(prepared: Prepared, at_most: AtMost) -> Quotas | None:
    """How many items of a value of a column a list may hold; None: any number.

    Raises:
      ConfigError: no such feature of items, or one without categories.
      DataError: a quota that is no number from 0 on.
    """
    if not at_most:
        return None
    if not isinstance(at_most, Mapping):
        raise ConfigError(f"at_most: {shown(at_most)}; pass a mapping such as {{'genre': 2}}")
    declared = described(prepared).features
    fields = [field.name for field in prepared.manifest.item_ids]
    fields = [name for name in fields if isinstance(declared[name], Categorical)]
    columns, quotas, count = [], list[int](), prepared.manifest.items
    for name, most in at_most.items():
        if name not in fields:
            raise ConfigError(
                f"at_most: '{name}' is no categorical or multi_valued feature of items."
                f"{nearest(str(name), fields)} There are {', '.join(fields) or 'none'}"
            )
        most = a_whole_number(f"at_most[{name!r}]", most, 0, count, "the items of the catalogue")
        ids = to_arrays(prepared.items.select([f"item_{name}"]).slice(0, count))[f"item_{name}"]
        ids = ids.reshape(count, -1).astype(np.int64)
        columns.append(np.where(ids > 0, ids - 1 + len(quotas), -1))
        quotas += [most] * int(ids.max(initial=0))
    groups = np.concatenate(columns, axis=1).astype(np.int32)
    return Quotas(groups, np.array([*quotas, NO_LIMIT], np.int64))


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


def read_lists(prepared: Prepared, path: str | os.PathLike) -> dict[str, list[str]]:
    """Raw item ids of each user of a file.

    Args:
      prepared: what its columns of users and items are called.
      path: a .csv, .tsv, .jsonl or .parquet file with these columns.

    Raises:
      DataError: the file is missing or cannot be read, or has no such columns.
    """
    from mtrec_jax.data.new_rows import read_columns  # loads an engine

    data = described(prepared).data
    table = read_columns(described(prepared), a_path("path", path), [data.user, data.item])
    found: dict[str, list[str]] = {}
    for user, item in zip(*(column.to_pylist() for column in table.columns), strict=True):
        found.setdefault(user, []).append(item)
    return found


def lists_of(users: Iterable[str], own: dict[str, np.ndarray] | None) -> list[np.ndarray] | None:
    """The lists of users, where there are any.

    Raises:
      DataError: a user has none.
    """
    if own is None:
        return None
    if missing := [user for user in users if user not in own]:
        raise DataError(
            f"allowed: no list for user {missing[0]!r}; give each user one, or None for the whole "
            "catalogue"
        )
    return [own[user] for user in users]
