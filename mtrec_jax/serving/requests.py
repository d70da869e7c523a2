"""Requests to batches: raw user ids, fresh histories and moments as the model wants them."""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_list, shown
from mtrec_jax.data import features
from mtrec_jax.data.cells import YEAR_2200, as_text
from mtrec_jax.data.dataset import Prepared, described, is_one
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.features.clock import Clock, Moment
from mtrec_jax.errors import DataError, nearest
from mtrec_jax.evaluation.collect import counted_items
from mtrec_jax.models.serve import pad_rows
from mtrec_jax.types import FIRST, UNKNOWN, Batch, Lists

BATCH = 256  # requests in a batch
SIZES = (8, BATCH)  # what a batch is filled up to, so that few programs are compiled
FEW = 512  # as many are answered in small batches, which are compiled ahead; more in large ones

History = Sequence[Any] | Mapping[str, Sequence[Any]]
Moments = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None  # for all requests, or for each


@dataclass(frozen=True)
class Requests:
    """Encoded users: what the model needs, and what must not be recommended to them."""

    batch: Batch
    known: np.ndarray  # [n] bool
    seen: Lists  # item ids
    unknown: tuple[str, ...] = ()  # different ids of given histories that no item has


def portions(count: int, sizes: tuple[int, ...] = SIZES) -> Iterator[slice]:
    """Requests that make a batch; one of none where there are none.

    >>> [(part.start, part.stop) for part in portions(10)]
    [(0, 8), (8, 10)]
    >>> [(part.start, part.stop) for part in portions(600)]
    [(0, 256), (256, 512), (512, 600)]
    """
    size = sizes[0] if count <= FEW else sizes[-1]
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


class Encoder:
    """Encodes requests for one prepared folder; lists and vocabularies are read once."""

    def __init__(
        self,
        prepared: Prepared,
        dtype: str,
        sizes: tuple[int, ...] = SIZES,
        behaviours: tuple[str, ...] = (),  # binary tasks of which a 1 makes an item seen; (): any
    ):
        self.prepared, self._dtype, self.sizes = prepared, dtype, sizes
        self._behaviours = behaviours
        self._features: dict[str, Encoding] = {}
        self._experiment = described(prepared)

    def of(self, prepared: Prepared) -> Encoder:
        """The encoder of other data of the same features."""
        return Encoder(prepared, self._dtype, self.sizes, self._behaviours)

    def users(
        self,
        users: list[str],
        histories: Sequence[History] | None,
        request: Sequence[Mapping[str, Any]],
        items: list[str] | None = None,
    ) -> Requests:
        """Users at one moment each, at most BATCH, to a batch of one of a few sizes.

        Args:
          users: raw ids.
          histories: instead of the stored ones.
          request: what is known of the moment of each.
          items: the raw id of the one candidate of each, if there is one.
        """
        ids = np.array([self.prepared.user_ids.get(user, UNKNOWN) for user in users], np.int32)
        moments = self._moments(users, items, request)
        return self.rows({**moments, "user": ids}, histories)

    def rows(
        self, arrays: dict[str, np.ndarray], histories: Sequence[History] | None = None
    ) -> Requests:
        """Columns of `encode_requests`, at most BATCH rows, with the users' histories and context.

        A user who is not in the data has the unknown value of each context feature.
        """
        manifest, ids = self.prepared.manifest, arrays["user"].astype(np.int32)
        n, length, known = len(ids), manifest.history_length, ids >= FIRST
        fields = manifest.history if length else ()
        events = {f.name: np.zeros((n, length, f.slots), np.int32) for f in fields}
        events |= {"item": np.zeros((n, length), np.int32)} if length else {}
        cutoff = np.zeros((n, 1), np.int32)
        seen, unknown = [np.zeros(0, np.int32)] * n, dict[str, None]()
        for i in range(n):
            past: dict[str, np.ndarray] = {}
            if histories is not None:
                columns, strange = self._given(histories[i], f"histories[{i}]")
                unknown |= dict.fromkeys(strange)
                past = self._encode_history(columns, f"histories[{i}]")
                seen[i] = past["item"][self._counted(columns)]
            elif known[i]:
                past = {name: lists[ids[i] - FIRST] for name, lists in self._events.items()}
                seen[i] = self._seen[ids[i] - FIRST]
            if not length or not len(past.get("item", ())):
                continue
            cutoff[i] = count = min(len(past["item"]), length)
            for name, array in events.items():
                array[i, :count] = past[name][-count:].reshape(count, *array.shape[2:])
        found = {"item": events["item"]} if length else {}
        if looked_up := [events[f.name] for f in fields if f.size]:
            found["ids"] = np.concatenate(looked_up, axis=-1)
        for field in fields:
            if not field.size:
                found["moment"] = events[field.name][..., 0]
        request = {
            part: arrays[f"request_{part}"][:, None]
            for part in ("ids", "numbers")
            if getattr(manifest, f"request_{part}")
        }
        batch = self._batch(self._context(ids), request, found, cutoff, ids)
        offsets = np.cumsum([0, *map(len, seen)])
        lists = Lists(np.concatenate([np.zeros(0, np.int32), *seen]), offsets)
        return Requests(batch, known, lists, tuple(unknown))

    def _batch(
        self,
        context: dict[str, np.ndarray],
        request: dict[str, np.ndarray],
        events: dict[str, np.ndarray],
        cutoff: np.ndarray,
        user: np.ndarray,
    ) -> Batch:
        size = next(size for size in self.sizes if size >= len(user))

        def padded(parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            typed = {
                name: array.astype(self._dtype if name == "numbers" else np.int32)
                for name, array in parts.items()
            }
            return {name: pad_rows(array, size) for name, array in typed.items()}

        return Batch(
            context=padded(context),
            request=padded(request),
            events=padded(events),
            cutoff=pad_rows(cutoff, size),
            candidate=np.zeros((size, 1), np.int32),
            labels={},
            mask={},
            user=pad_rows(user, size),
            weight=np.ones((size, 1), self._dtype),
            row=None,
        )

    def _context(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Context features [n, ...] of users: of unknown ones the ids that stand for unknown."""
        found = {}
        for part, (stored, unknown) in self._contexts.items():
            rows = np.concatenate([unknown, stored])
            found[part] = rows[np.maximum(ids - UNKNOWN, 0)]
        return found

    @functools.cached_property
    def _contexts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{part: context features of all users [U, M], and of one who is not among them [1, M]}."""
        manifest, found = self.prepared.manifest, {}
        fields: dict[str, Sequence[Any]]
        fields = {"ids": manifest.context_ids, "numbers": manifest.context_numbers}
        for part, stored in self.prepared.user_context().items():
            codes = [features.unknown_codes(self.prepared, field) for field in fields[part]]
            found[part] = stored, np.concatenate(codes, axis=1).astype(stored.dtype)
        return found

    @functools.cached_property
    def _events(self) -> dict[str, Lists]:
        """What each user has met: items, and the history features where there are histories."""
        fields = self.prepared.manifest.history if self.prepared.manifest.history_length else ()
        found = {field.name: self.prepared.user_lists(f"event_{field.name}") for field in fields}
        return {"item": counted_items(self.prepared), **found}

    @functools.cached_property
    def _seen(self) -> Lists:
        """Items of each user's events that make them seen."""
        return counted_items(self.prepared, self._behaviours)

    @functools.cached_property
    def most_seen(self) -> int:
        """Most events of a user that make items seen."""
        return int(np.diff(self._seen.offsets).max(initial=0))

    def _counted(self, columns: dict[str, list[Any]]) -> np.ndarray:
        """Which events of a given history make their item seen: all but those whose columns say
        that no behaviour was there."""
        n = len(columns["item"])
        tasks, counted = self._experiment.tasks, np.full(n, not self._behaviours)
        for name in self._behaviours:
            column = tasks[name].column or name if name in tasks else name
            told = [
                field.name
                for field in self.prepared.manifest.history
                if (self._feature(field.name).feature.column or field.name) == column
                and field.name in columns
            ]
            if not told or name not in tasks:
                return np.ones(n, bool)
            texts = [raw_text(value) for value in columns[told[0]]]
            counted |= np.array([is_one(tasks[name], text) for text in texts], bool)
        return counted

    def empty(self, size: int) -> Requests:
        """A batch of strangers of whom nothing is known."""
        manifest = self.prepared.manifest
        slots = sum(field.slots for field in manifest.request_ids)
        width = sum(field.slots for field in manifest.request_numbers)
        numbers = np.zeros((size, width), np.float32)
        ids = np.zeros((size, slots), np.int32)
        user = np.full(size, UNKNOWN, np.int32)
        return self.rows({"user": user, "request_ids": ids, "request_numbers": numbers})

    def _moments(
        self, users: list[str], items: list[str] | None, given: Sequence[Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """Features of the moments of users, and of the items if there are any.

        Raises:
          DataError: a key that is no feature of the request and no column of one, or a cell that is
            no number where one is needed.
        """
        n, asked = len(users), self._asked
        columns = {name: column for name, (_, column) in asked.items()}
        data = self._experiment.data
        allowed = {*columns, *columns.values(), *([data.time] if data.time else [])}
        for moment in given:
            for key in moment:
                if key not in allowed:
                    raise DataError(
                        f"request: {key!r} is no feature on = 'request' of this data."
                        f"{nearest(str(key), allowed)} There are {', '.join(columns) or 'none'}"
                    )
        own: dict[str, list[Any]] = {data.user: users, data.item: items or [None] * n}
        rows: dict[str, pa.Array] = {
            "user": pa.array([user or None for user in users], pa.string())
        }
        if data.time:
            times = [seconds(moment.get(data.time), data.time_unit) for moment in given]
            rows["time"] = pa.array(times, pa.float64())
        for name, (encoding, column) in asked.items():
            values = [m.get(name, m.get(column)) for m in given]
            if column in own and not any(name in m or column in m for m in given):
                values = list(own[column])
            if isinstance(clock := encoding.feature, Clock):
                named = not isinstance(clock, Moment)  # by its own name an hour is an hour
                values = [
                    m[name]
                    if named and name in m
                    else clock.of(seconds(m.get(name, m.get(column)), data.time_unit))
                    for m in given
                ]
            rows[f"feature_{name}"] = self._cells(encoding, values)
        table = pa.table(rows)
        if any(encoding.feature.looks_back for encoding, _ in asked.values()):
            from mtrec_jax.data.past import look_up  # loads an engine

            table = look_up(table, self.prepared, self._experiment)
        cells = {name: one_array(table[f"feature_{name}"]) for name in asked}
        encodings = [encoding for encoding, _ in asked.values()]
        ids, numbers = features.encode_all(encodings, cells, n)
        return {"request_ids": ids, "request_numbers": numbers}

    def _cells(self, encoding: Encoding, values: list[Any]) -> pa.Array:
        """Values as cells of the raw data: text, or lists of it."""
        if any(isinstance(value, list | tuple) for value in values):
            lists = [v if isinstance(v, list | tuple) else [v] for v in values]
            return pa.array([[raw_text(v) for v in of] or None for of in lists])
        cells = pa.array([raw_text(value) or None for value in values], pa.string())
        wrong = np.flatnonzero(features.unreadable(encoding.feature, cells))
        if len(wrong):
            raise DataError(
                f"request: {encoding.name} = {cells[int(wrong[0])].as_py()!r} is no number; leave "
                "it out where it is missing"
            )
        return cells

    @functools.cached_property
    def _asked(self) -> dict[str, tuple[Encoding, str]]:
        """The features of the request, and the column of each."""
        declared = self._experiment.features
        return {
            name: (self._feature(name), feature.origin(name, self._experiment.data)[1])
            for name, feature in declared.items()
            if feature.on == "request" and feature.fitted
        }

    def _given(self, history: History, name: str) -> tuple[dict[str, list[Any]], list[str]]:
        """The columns of a history, and the ids in it that no item of the catalogue has.

        These are unknown items, as in stored histories. Where the data has searches, which are
        events without an item, they would be taken for one and are left out.
        """
        given = history if isinstance(history, Mapping) else {"item": history}
        fields = [field.name for field in self.prepared.manifest.history]
        names: dict[str, list[str]] = {}
        for field in fields:
            column = self._feature(field).feature.origin(field, self._experiment.data)[1]
            names.setdefault(column, []).append(field)
        names |= {field: [field] for field in ("item", *fields)}  # names go before columns
        known_here = "item" in given and all(key in names for key in given)
        if not known_here:
            has = ", ".join(map(str, given)) or "nothing"
            raise DataError(
                f"{name}: has {has}; it needs item, and may have {', '.join(fields) or 'no more'}"
            )
        columns = {"item": a_list(name, given["item"])}
        for key in given:
            for field in names[key] if key != "item" else ():
                if field in columns:
                    raise DataError(f"{name}: {field} is given twice, by its name and its column")
                columns[field] = a_list(f"{name}, {key}", given[key])
        raw, n = raw_texts(name, columns["item"]), len(columns["item"])
        for key, values in columns.items():
            if len(values) != n:
                raise DataError(f"{name}: {len(values)} values of {key} for {n} items")
        has_searches = "queries" in self.prepared.manifest.config["data"]
        known = [text in self.prepared.item_ids or (has_searches and not text) for text in raw]
        unknown = [text for text, is_known in zip(raw, known, strict=True) if not is_known]
        columns["item"] = raw
        if has_searches and unknown:
            columns = {key: list(itertools.compress(of, known)) for key, of in columns.items()}
        return columns, unknown

    def _encode_history(self, columns: dict[str, list[Any]], name: str) -> dict[str, np.ndarray]:
        """Ids of each column of a history; where data has queries, no item is a search."""
        items, data = columns["item"], self.prepared.manifest.config["data"]
        ids = [self.prepared.item_ids.get(raw, UNKNOWN) for raw in items]
        encoded, queries = {"item": np.array(ids, np.int32)}, "queries" in data
        searches = np.array([queries and not raw for raw in items], bool)
        for field in self.prepared.manifest.history:
            values = columns.get(field.name, [None] * len(items))
            if isinstance(feature := self._feature(field.name).feature, Moment):
                unit = self._experiment.data.time_unit
                where = f"{name}, {field.name}"
                values = [feature.of(seconds(value, unit, where)) for value in values]
            cells = pa.array([raw_text(v) or None for v in values], pa.string())
            encoding = self._feature(field.name)
            wrong = np.flatnonzero(features.unreadable(encoding.feature, cells))
            if len(wrong):
                raise DataError(
                    f"{name}: place {wrong[0]} of {field.name} holds "
                    f"{cells[int(wrong[0])].as_py()!r}, which is no number; None is a missing one"
                )
            codes = features.encode(encoding, cells).astype(np.int32)
            if encoding.feature.looked_up:  # as in preparation
                of_searches = queries and (encoding.feature.column or field.name) == data["query"]
                codes[searches != of_searches] = 0
            encoded[field.name] = codes
        return encoded

    def _feature(self, name: str) -> Encoding:
        """A feature of the history, as it was fitted."""
        if name not in self._features:
            self._features[name] = features.restore(self.prepared, name)
        return self._features[name]


def not_there(prepared: Prepared, name: str, item: str) -> DataError:
    """The error for an item that the argument `name` names and the catalogue lacks."""
    hint = nearest(item, list(prepared.item_ids)[:20_000])
    return DataError(f"{name}: item {item!r} is not in the catalogue of {prepared.folder}.{hint}")


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
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, float | np.floating):
        return str(as_text(pa.array([float(value)]))[0].as_py())
    text = str(value).lower() if isinstance(value, bool | np.bool_) else str(value)
    return text.strip(" \t\n\r\v\f")


def _is_nan(value: Any) -> bool:
    """Whether a value differs from itself; pandas' NA does not say."""
    try:
        return bool(value != value)
    except TypeError:
        return True


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


def seconds(time: Any, unit: str, where: str = "request") -> float | None:
    """A time, as a number in the unit of the data or as a datetime, in seconds; None: none.
    `where` opens the message of an error.

    >>> seconds(datetime.datetime(1970, 1, 2), "s"), seconds(5000, "ms")
    (86400.0, 5.0)
    """
    if time is None or _is_nan(time):  # also NaT, as columns of times have it
        return None
    if isinstance(time, str):
        try:
            time = datetime.datetime.fromisoformat(time)
        except ValueError:
            raise DataError(f"{where}: time {time!r} is neither ISO 8601 nor a number") from None
    if isinstance(time, datetime.datetime):
        utc = time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
        return utc.timestamp()
    if isinstance(time, bool) or not isinstance(time, int | float | np.number):
        raise DataError(f"{where}: time {shown(time)} is neither a number nor a datetime")
    found = float(time) / {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    if found > YEAR_2200:
        raise DataError(
            f"{where}: time {time} is after the year 2199 as Unix time in '{unit}'. Write it in "
            f"'{unit}', or as a datetime"
        )
    return found
