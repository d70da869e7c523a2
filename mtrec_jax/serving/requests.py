"""Requests to batches: raw user ids, fresh histories and raw rows as the model wants them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_list, shown
from mtrec_jax.config import Experiment
from mtrec_jax.data import features
from mtrec_jax.data.cells import as_text
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.features import Encoding
from mtrec_jax.data.new_rows import encode_requests
from mtrec_jax.data.schema import columns_of
from mtrec_jax.errors import DataError, nearest
from mtrec_jax.models.serve import pad_rows
from mtrec_jax.types import FIRST, UNKNOWN, Batch, Lists

BATCH = 256  # requests in a batch

History = Sequence[str] | Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Requests:
    """Encoded requests: what the model needs, and what must not be recommended."""

    batch: Batch
    known: np.ndarray  # [n] bool: whose user is in the data
    seen: Lists  # item ids of the histories
    items: np.ndarray  # [n] item ids that the requests name themselves; 0: none


class Encoder:
    """Encodes requests for one prepared folder; lists and vocabularies are read once."""

    def __init__(self, experiment: Experiment, prepared: Prepared):
        self.prepared, self._experiment = prepared, experiment
        self._dtype = experiment.train.precision
        self._lists: dict[str, Lists] = {}
        self._features: dict[str, Encoding] = {}

    def users(
        self,
        users: list[str],
        histories: Sequence[History] | None = None,
        moments: dict[str, np.ndarray] | None = None,
    ) -> Requests:
        """Users, at most BATCH, to a batch of exactly BATCH examples of one position.

        Args:
          users: raw ids.
          histories: instead of the stored ones.
          moments: request features [n, ...], as `moments` gives them.
        """
        ids = np.array([self.prepared.user_ids.get(u, UNKNOWN) for u in users], np.int32)
        if histories is None:
            past = [self._stored(user) for user in ids]
        else:
            past = [self._encode_history(h, f"histories[{i}]") for i, h in enumerate(histories)]
        return self._requests(ids, past, moments or self.moments([{}] * len(users)))

    def rows(self, arrays: dict[str, np.ndarray]) -> Requests:
        """What `encode_requests` gives, at most BATCH rows, with the histories of their users."""
        ids = arrays["user"]
        past = [self._stored(user) for user in ids]
        return self._requests(ids, past, arrays, arrays["candidate"][:, 0])

    def moments(self, raw: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Request features of moments {column of the events: raw value}; absent ones are missing.

        Raises:
          DataError: a column that no request feature reads, or a cell that is no number where one
            is needed.
        """
        manifest = self.prepared.manifest
        fields = (*manifest.request_ids, *manifest.request_numbers)
        columns = list(columns_of(self._experiment, "events", outcomes=False))
        for moment in raw:
            for name in moment:
                if not fields or name not in columns:
                    known = f"; there are {', '.join(columns)}" if fields else ": there are none"
                    raise DataError(f"request: no feature of the moment reads {name!r}{known}")
        if not fields:
            return {}
        if not any(raw):
            return {name: np.repeat(a, len(raw), axis=0) for name, a in self._no_moment.items()}
        cells = {c: [raw_text(moment.get(c)) or None for moment in raw] for c in columns}
        return encode_requests(
            self.prepared, pa.table(cells, pa.schema([(c, pa.string()) for c in columns]))
        )

    @functools.cached_property
    def _no_moment(self) -> dict[str, np.ndarray]:
        columns = list(columns_of(self._experiment, "events", outcomes=False))
        nothing = pa.table({c: pa.array([None], pa.string()) for c in columns})
        return encode_requests(self.prepared, nothing)

    def _requests(
        self,
        ids: np.ndarray,
        past: list[dict[str, np.ndarray]],
        moments: Mapping[str, np.ndarray],
        items: np.ndarray | None = None,
    ) -> Requests:
        manifest, n = self.prepared.manifest, len(ids)
        length, known = manifest.history_length, ids >= FIRST
        events = {}
        cutoff = np.array([[min(len(p["item"]), length)] for p in past], np.int32).reshape(n, 1)
        for name in past[0] if past and length else ():
            shape = (n, length, *past[0][name].shape[1:])
            events[name] = np.zeros(shape, np.int32)
            for i, (count,) in enumerate(cutoff):
                events[name][i, :count] = past[i][name][len(past[i][name]) - count :]
        lengths = np.cumsum([0, *(len(p["item"]) for p in past)])
        seen = np.concatenate([np.zeros(0, np.int32), *(p["item"] for p in past)])
        request = {
            part: moments[f"request_{part}"][:, None]
            for part in ("ids", "numbers")
            if getattr(manifest, f"request_{part}")
        }
        batch = self._padded(self._context(ids), request, events, cutoff, ids)
        named = np.zeros(n, np.int32) if items is None else items
        return Requests(batch, known, Lists(seen, lengths), named)

    def _context(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Context features of users; one who is not in the data has the trained unknown ones."""
        known = (ids >= FIRST)[:, None]
        found = {}
        for part, of_users in self._contexts.items():
            unknown = np.zeros(of_users.shape[1], of_users.dtype)
            if part == "ids":
                slots = [field.slots for field in self.prepared.manifest.context_ids]
                unknown[np.cumsum([0, *slots[:-1]])] = UNKNOWN
            chosen = of_users[np.maximum(ids - FIRST, 0)]
            found[part] = np.where(known, chosen, unknown)
        return found

    def _stored(self, user: int | np.integer) -> dict[str, np.ndarray]:
        """The stored history of a user id: "item" [e], "ids" [e, M]; empty where there is none."""
        fields = self.prepared.manifest.history
        nothing = np.zeros(0, np.int32)
        if not self.prepared.manifest.history_length:
            return {"item": nothing}
        there = user >= FIRST
        item = self._list("event_item")[user - FIRST] if there else nothing
        if not fields:
            return {"item": item}
        parts = [
            self._list(f"event_{f.name}")[user - FIRST].reshape(len(item), -1)
            if there
            else np.zeros((0, f.slots), np.int32)
            for f in fields
        ]
        return {"item": item, "ids": np.concatenate(parts, axis=1)}

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

    def _padded(
        self,
        context: dict[str, np.ndarray],
        request: dict[str, np.ndarray],
        events: dict[str, np.ndarray],
        cutoff: np.ndarray,
        user: np.ndarray,
    ) -> Batch:
        def padded(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            kinds = {"numbers": self._dtype, "ids": "int32", "item": "int32"}
            return {name: pad_rows(a.astype(kinds[name]), BATCH) for name, a in parts.items()}

        one = np.zeros((BATCH, 1), np.int32)
        return Batch(
            context=padded(context),
            request=padded(request),
            events=padded(events),
            cutoff=pad_rows(cutoff, BATCH),
            candidate=one,
            labels={},
            mask={},
            user=pad_rows(user, BATCH),
            weight=np.ones((BATCH, 1), self._dtype),
            row=None,
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
        ids = np.full(len(shown), UNKNOWN, np.int32)
        ids[shown] = self.item_ids(items, name)
        parts = []
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
            codes = features.encode(encoding, cells).astype(np.int32)
            searched = queries and (encoding.feature.column or field.name) == data["query"]
            codes[shown == searched] = 0  # as in preparation
            parts.append(codes)
        return {"item": ids, "ids": np.concatenate(parts, axis=1)} if parts else {"item": ids}

    def _feature(self, name: str) -> Encoding:
        """A feature of the history, as it was fitted."""
        if name not in self._features:
            self._features[name] = features.restore(self.prepared, name)
        return self._features[name]

    @functools.cached_property
    def _contexts(self) -> dict[str, np.ndarray]:
        """Context features of all users: "ids" [U, M], "numbers" [U, C]."""
        return self.prepared.user_context()

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
