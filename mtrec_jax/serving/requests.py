"""Requests to batches: raw user ids, fresh histories and raw rows as the model wants them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_list, shown
from mtrec_jax.data import features
from mtrec_jax.data.cells import as_text
from mtrec_jax.data.dataset import Lists, Prepared, to_arrays
from mtrec_jax.data.features import Encoding
from mtrec_jax.errors import DataError, nearest
from mtrec_jax.evaluation.inference import pad_rows
from mtrec_jax.types import FIRST, UNKNOWN, Batch

BATCH = 256  # requests in a batch

History = Sequence[str] | Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Requests:
    """Encoded users: what the model needs, and what must not be recommended to them."""

    batch: Batch
    known: np.ndarray  # [n] bool
    seen: Lists  # item ids


class Encoder:
    """Encodes requests for one prepared folder; lists and vocabularies are read once."""

    def __init__(self, prepared: Prepared, dtype: str):
        self.prepared, self._dtype = prepared, dtype
        self._lists: dict[str, Lists] = {}
        self._features: dict[str, Encoding] = {}

    def users(self, users: list[str], histories: Sequence[History] | None) -> Requests:
        """Users to a batch of exactly BATCH examples of one position."""
        manifest, n = self.prepared.manifest, len(users)
        ids = np.array([self.prepared.user_ids.get(u, 1) for u in users], np.int32)
        known = ids >= FIRST
        fields = ["item", *(column for f in manifest.history for column in f.columns)]
        length = manifest.history_length
        events = {name: np.zeros((n, length), np.int32) for name in fields}
        cutoff = np.zeros((n, 1), np.int32)
        seen = []
        for i in range(n):
            if histories is not None:
                past = self._encode_history(histories[i], f"histories[{i}]")
            elif known[i]:
                past = {name: self._list(f"event_{name}")[ids[i] - FIRST] for name in fields}
            else:
                past = {name: np.zeros(0, np.int32) for name in fields}
            count = min(len(past["item"]), length)
            for name in fields:
                events[name][i, :count] = past[name][len(past[name]) - count :]
            cutoff[i] = count
            seen.append(past["item"])
        lengths = np.cumsum([0, *(len(s) for s in seen)])
        values = np.concatenate([np.zeros(0, np.int32), *seen])
        arrays = {}
        for name, array in self._contexts.items():
            chosen = array[np.maximum(ids - FIRST, 0)] if n else array[:0]
            arrays[name] = np.where(known[:, None], chosen, np.zeros((), array.dtype))
        batch = self._batch(arrays, events, cutoff, ids)
        return Requests(batch, known, Lists(values, lengths))

    def rows(self, arrays: dict[str, np.ndarray]) -> Requests:
        """Columns of `prepare.encode_rows`, at most BATCH rows, to a batch without histories."""
        n = len(arrays["user"])
        batch = self._batch(arrays, {}, np.zeros((n, 1), np.int32), arrays["user"])
        return Requests(batch, np.ones(n, bool), Lists(np.zeros(0, np.int32), np.zeros(n + 1, int)))

    def item_ids(self, items: Iterable[Any], name: str = "items") -> np.ndarray:
        """Ids [n] of raw item ids.

        Raises:
          DataError: an item is not in the catalogue, or `items` is a text.
        """
        found = []
        for raw in raw_texts(name, items):
            item = self.prepared.item_ids.get(raw)
            if item is None:
                hint = nearest(raw, list(self.prepared.item_ids)[:20_000])
                raise DataError(
                    f"item {raw!r} is not in the catalogue of {self.prepared.folder}.{hint}"
                )
            found.append(item)
        return np.array(found, np.int64)

    def _batch(
        self,
        arrays: dict[str, np.ndarray],
        events: dict[str, np.ndarray],
        cutoff: np.ndarray,
        user: np.ndarray,
    ) -> Batch:
        context = {}
        if self.prepared.manifest.context_ids:
            context["ids"] = pad_rows(arrays["context_ids"], BATCH)
        if self.prepared.manifest.context_numbers:
            context["numbers"] = pad_rows(arrays["context_numbers"].astype(self._dtype), BATCH)
        one = np.zeros((BATCH, 1), np.int32)
        return Batch(
            context=context,
            events={name: pad_rows(a, BATCH) for name, a in events.items()},
            cutoff=pad_rows(cutoff, BATCH),
            candidate=one,
            labels={},
            mask={},
            user=pad_rows(user, BATCH),
            weight=np.ones((BATCH, 1), self._dtype),
            row=one,
        )

    def _encode_history(self, history: History, name: str) -> dict[str, np.ndarray]:
        """Ids of each column of a history; where data has queries, an item of None is a search."""
        columns = history if isinstance(history, Mapping) else {"item": history}
        fields = {"item": None, **{f.name: f for f in self.prepared.manifest.history}}
        unknown = sorted(set(columns) - set(fields))
        if unknown or "item" not in columns:
            has = ", ".join(map(str, columns))
            raise DataError(f"history: has {has}; it may have {', '.join(fields)}")
        items = a_list(name, columns["item"])
        shown = np.ones(len(items), bool)
        data = self.prepared.manifest.config["data"]
        queries = "queries" in data
        if queries:
            shown = np.array([item is not None for item in items], bool)
            items = [item for item in items if item is not None]
        past = {"item": np.full(len(shown), UNKNOWN, np.int32)}
        past["item"][shown] = self.item_ids(items, name)
        for field in self.prepared.manifest.history:
            values = columns.get(field.name, [None] * len(shown))
            values = a_list(f"{name}, {field.name}", values)
            if len(values) != len(shown):
                raise DataError(
                    f"history: {len(values)} values of {field.name} for {len(shown)} items"
                )
            cells = pa.array([raw_text(v) or None for v in values], pa.string())
            encoding = self._feature(field.name)
            wrong = np.flatnonzero(features.unreadable(encoding.feature, cells))
            if len(wrong):
                raise DataError(
                    f"history: place {wrong[0]} of {field.name} holds "
                    f"{cells[int(wrong[0])].as_py()!r}, which is no number; None is a missing one"
                )
            ids = features.encode(encoding, cells).astype(np.int32)
            searched = queries and (encoding.feature.column or field.name) == data["query"]
            ids[shown == searched] = 0  # as in preparation
            past |= {column: ids[:, slot] for slot, column in enumerate(field.columns)}
        return past

    def _feature(self, name: str) -> Encoding:
        """A feature of the history, as it was fitted."""
        if name not in self._features:
            self._features[name] = features.restore(self.prepared, name)
        return self._features[name]

    @functools.cached_property
    def _contexts(self) -> dict[str, np.ndarray]:
        """Context features of all users."""
        users = self.prepared.users
        names = [n for n in ("context_ids", "context_numbers") if n in users.column_names]
        return to_arrays(users.select(names))

    def _list(self, column: str) -> Lists:
        if column not in self._lists:
            self._lists[column] = self.prepared.user_lists(column)
        return self._lists[column]


def raw_text(value: Any) -> str:
    """A value as preparation reads it from a table: trimmed, whole floats have no ".0"; a missing
    value is the empty text, which is no id.

    >>> [raw_text(value) for value in (7, 7.0, 7.5, True, " u7 ")]
    ['7', '7', '7.5', 'true', 'u7']
    """
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None or value != value:  # None, nan
        return ""
    if isinstance(value, float | np.floating):
        return str(as_text(pa.array([float(value)]))[0].as_py())
    text = str(value).lower() if isinstance(value, bool | np.bool_) else str(value)
    return text.strip(" \t\n\r\v\f")


def raw_texts(name: str, values: Iterable[Any]) -> list[str]:
    """`raw_text` of each value.

    Raises:
      DataError: `values` is no list, or a text, which would be taken letter by letter; or one of
        the values is itself a list.
    """
    found = a_list(name, values)
    for place, value in enumerate(found):
        check_id(f"{name}[{place}]", value)
    return [raw_text(value) for value in found]


def check_id(name: str, value: Any) -> None:
    """Raise `DataError` for a list, an array or a mapping in the place of an id."""
    if isinstance(value, list | tuple | set | Mapping) or getattr(value, "ndim", 0) > 0:
        raise DataError(f"{name}: {shown(value)} is no id; pass a text or a number")
