"""The hour and the weekday of a time, UTC; or the time itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.data.features.base import Codes, Counts, Encoding, Feature
from mtrec_jax.data.features.categorical import IMPUTES, ids_of, look_up, ranked, with_vocabulary

OF_EVENTS = "users and items have no time; events have"


@dataclass(frozen=True, kw_only=True)
class Clock(Feature):
    """A time by the clock, every value an id; without a `column`, of the time of the event."""

    places: ClassVar[tuple[str, ...]] = ("request", "history")
    because = OF_EVENTS
    imputes = IMPUTES
    computed = True
    seconds: ClassVar[int]  # that a value lasts
    values: ClassVar[int]
    first = 0  # value at the beginning of 1970

    @property
    def room(self) -> int:
        """The values."""
        return self.values

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """How often each value occurs."""
        table, fill, missing = ranked(self, cells, counts)
        columns = (column.to_pylist() for column in table.columns)
        found = dict(zip(*columns, strict=True))
        known = [str(v) for v in range(self.values)] + [""] * ("" in found)
        table = pa.table({"value": known, "count_sum": [found.get(v, 0) for v in known]})
        return with_vocabulary(name, self, table, fill, missing)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """An id for each cell "0", "1", …"""
        return ids_of(encoding, cells, look_up)

    def origin(self, name: str, data: Any) -> tuple[str, str]:
        """Its column of the events, or their time."""
        return "events", self.column or data.time

    def of(self, time: float | None) -> int | None:
        """The value of a time in seconds.

        >>> Weekday(on="request").of(0.0), Hour(on="request").of(7200.5)
        (3, 2)
        """
        if time is None:
            return None
        return int(time // self.seconds + self.first) % self.values

    def problems(self, name: str, data: Any) -> Iterator[str]:
        """A time is needed."""
        yield from super().problems(name, data)
        if not (self.column or data.time):
            yield ": needs data.time, or a column"


@dataclass(frozen=True, kw_only=True)
class Hour(Clock):
    """0 to 23."""

    kind: Literal["hour"] = "hour"
    seconds = 3600
    values = 24


@dataclass(frozen=True, kw_only=True)
class Weekday(Clock):
    """0 (Monday) to 6."""

    kind: Literal["weekday"] = "weekday"
    seconds = 86_400
    values = 7
    first = 3  # a Thursday


@dataclass(frozen=True, kw_only=True)
class Moment(Clock):
    """The second itself, for encoders that ask how long apart events are; it has no table.

    Of the history: when each event was. Of the request: when the answer is wanted, which makes the
    time of the query known to the retrieval, and its scores those of a league of their own.
    Seconds are counted from 1990 on, and begin anew after 68 years.
    """

    kind: Literal["moment"] = "moment"

    places: ClassVar[tuple[str, ...]] = ("history", "request")
    because = "it is no number that a tower could read: encoders compare the times of events"
    imputes = ("none",)
    looked_up = False
    seconds = 1
    values = 2**31
    first = -631_152_000  # 1990

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Nothing is learned."""
        return Encoding(name, self)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """The second; 0 where the time is missing."""
        return pc.fill_null(pc.cast(cells, pa.int32()), 0).to_numpy(zero_copy_only=False)[:, None]
