"""What an event's past says: the gap since the user's last event, and counts and rates so far.

Sums are sums of integers, which are exact in any order, so that every engine gives equal numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.engine import Engine, rows
from mtrec_jax.data.examples import VISIBLE, mix
from mtrec_jax.data.features import Gap, PastCount, PastRate, one_array

FOLDS = 5
IN_TIME = ("leave_one_out", "time", "user_ratio", "user_holdout", "files")  # of a split's kinds


def add(engine: Engine, events: Any, experiment: Experiment) -> Any:
    """Events with the numbers `feature_<name>` of all features of kind gap, past_count, past_rate.

    Counts and rates are about the events with the same `feature_<name>`, which is the value of the
    feature's column before. With a split in time, what is strictly earlier counts: for training
    events other training events, for validation and test what `VISIBLE` says of `data.past`. With
    other splits training events count whenever they happened, and for a training event only those
    outside its own one of five folds. Gaps are to earlier events of these splits, whatever the
    split.

    Args:
      engine: where the events are.
      events: Ibis table with row, split, label_* and feature_*; user and time where they are used.
      experiment: its features, split, past and seed.
    """
    columns: dict[str, Any] = {}
    for name, feature in experiment.features.items():
        if isinstance(feature, Gap):
            columns[f"feature_{name}"] = events.time - _last(events, experiment)
        elif isinstance(feature, PastCount):
            columns[f"feature_{name}"] = _so_far(events, experiment, name)
    return engine.keep("past", events.mutate(**columns)) if columns else events


def _last(events: Any, experiment: Experiment) -> Any:
    """The time of the user's last event before, among those that an event may know of."""
    order = [events.time, events.row]
    before = ibis.rows_window(preceding=(None, 1), group_by=events.user, order_by=order)

    def known(splits: tuple[int, ...]) -> Any:
        there = events.split.isin(splits)
        return ibis.ifelse(there, events.time, ibis.null("float64")).max().over(before)

    return _by_split(events.split, experiment.data.past, known)


def _by_split(split: Any, past: str, known: Callable[[tuple[int, ...]], Any]) -> Any:
    """For each event what it may know, given the splits of the events that it may know of."""
    train, judged, test = map(known, VISIBLE[past])
    return ibis.cases((split == 0, train), (split == 2, test), else_=judged)


def final(events: Any, experiment: Experiment) -> dict[str, pa.Table]:
    """What new requests are told: {feature: table of value and number}, from the training events.

    The number is a count, a rate, or the time of a user's last event; that of the null value is
    for values without training events.

    Args:
      events: as `add` takes them, not as it gives them back.
      experiment: its features of the request are meant.
    """
    found: dict[str, pa.Table] = {}
    train = events.filter(events.split == 0)
    for name, feature in experiment.features.items():
        if feature.on != "request":
            continue
        if isinstance(feature, Gap):
            table, other = train.group_by(value="user").agg(number=train.time.max()), None
        elif isinstance(feature, PastCount):
            units = _units(events, experiment, name)
            one, amount = _measure(train, units)
            groups = train.group_by(value=train[f"feature_{name}"])
            groups = groups.agg(n=one.sum(), total=amount.sum())
            table = groups.select("value", number=_number(groups.n, groups.total, units))
            other = units.prior if isinstance(feature, PastRate) else 0.0
        else:
            continue
        known = table.filter(table.value.notnull()).to_pyarrow().sort_by("value")
        rest = pa.table({"value": [None], "number": [other]}, schema=known.schema)
        found[name] = pa.concat_tables([known, rest])
    return found


def look_up(new: pa.Table, prepared: Prepared, experiment: Experiment) -> pa.Table:
    """New requests with what `final` knows of them in the place of the values of past features."""
    for name, feature in experiment.features.items():
        if feature.on != "request" or not feature.looks_back:
            continue
        table = pq.read_table(prepared.folder / "past" / f"{name}.parquet")
        value, number = one_array(table["value"]), one_array(table["number"])
        gap = isinstance(feature, Gap)
        cells = one_array(new["user" if gap else f"feature_{name}"])
        place = pc.index_in(cells, value_set=value.slice(0, len(value) - 1))
        numbers = number.take(pc.fill_null(place, len(value) - 1))
        if gap:
            numbers = pa.array(_gaps(cells, new["time"].to_numpy(), numbers), from_pandas=True)
        else:
            numbers = pc.if_else(cells.is_valid(), numbers, pa.scalar(None, pa.float64()))
        columns = [c for c in new.column_names if c != f"feature_{name}"]
        new = new.select(columns).append_column(f"feature_{name}", numbers)
    return new


def _gaps(users: pa.Array, time: np.ndarray, last: pa.Array) -> np.ndarray:
    """Seconds since the user's event before, among the new ones and the `last` known; nan: none."""
    codes = pc.fill_null(users.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    order = np.lexsort((np.arange(len(time)), time, codes))
    before = np.full(len(time), np.nan)
    same = np.diff(codes[order]) == 0
    before[order[1:][same]] = time[order[:-1][same]]
    known = last.to_numpy(zero_copy_only=False)
    before = np.fmax(before, np.where(known <= time, known, np.nan))
    return np.where(codes >= 0, time - before, np.nan)


class _Units(NamedTuple):
    label: str  # column; "" for counts
    scale: float  # labels are counted in units of 1 / scale, a power of two
    prior: float
    smoothing: float


def _units(events: Any, experiment: Experiment, name: str) -> _Units:
    """The finest units in which every sum of labels is an exact float64; and the training mean."""
    feature = experiment.features[name]
    if not isinstance(feature, PastRate):
        return _Units("", 1.0, 0.0, 0.0)
    label = events[f"label_{feature.label}"]
    [found] = rows(events.agg(n=label.count(), top=label.abs().max()))
    bound = (found["top"] or 1.0) * (found["n"] + feature.smoothing + 1)
    units = _Units(f"label_{feature.label}", 2.0 ** (52 - math.ceil(math.log2(bound))), 0.0, 0.0)
    train = events.filter(events.split == 0)
    one, amount = _measure(train, units)
    [found] = rows(train.agg(n=one.sum(), total=amount.sum()))
    prior = found["total"] / found["n"] / units.scale if found["n"] else 0.0
    return units._replace(prior=prior, smoothing=feature.smoothing)


def _measure(events: Any, units: _Units) -> tuple[Any, Any]:
    """What an event adds to a count and, in units, to a sum of labels."""
    if not units.label:
        one = events.row.notnull().cast("int64")
        return one, one
    label = events[units.label].cast("float64")
    amount = (label * units.scale + 0.5).floor().cast("int64").fill_null(0)
    return label.notnull().cast("int64"), amount


def _number(n: Any, total: Any, units: _Units) -> Any:
    """The count, or the smoothed mean; NULL for the mean of nothing."""
    n = n.cast("float64")
    if not units.label:
        return n
    prior = ibis.literal(round(units.prior * units.smoothing * units.scale), "int64")
    return (total + prior).cast("float64") / ((n + units.smoothing) * units.scale).nullif(0)


def _so_far(events: Any, experiment: Experiment, name: str) -> Any:
    """A count or a rate for every event, from the events that it may know of."""
    units = _units(events, experiment, name)
    one, amount = _measure(events, units)
    key, split, data = events[f"feature_{name}"], events.split, experiment.data
    windows = experiment.split.by == "time"
    in_time = bool(data.time or data.user) and (windows or experiment.split.kind in IN_TIME)
    if in_time:
        time = events.time if data.time else events.row
        wide = ibis.range_window(following=0, group_by=key, order_by=time)
        narrow = ibis.window(group_by=[key, time])  # its own moment
    else:
        wide = ibis.window(group_by=key)
        fold = mix(events.row, data.seed) % FOLDS
        narrow = ibis.window(group_by=[key, fold])

    def known(value: Any, splits: tuple[int, ...], without: Any = True) -> Any:
        counted = ibis.ifelse(split.isin(splits), value, 0)
        mine = counted.sum().over(narrow)
        return counted.sum().over(wide) - ibis.ifelse(without, mine, 0)

    def seen(value: Any) -> Any:
        if not in_time:
            return known(value, (0,), split == 0)
        if (windows or experiment.split.kind == "time") and data.past == "rolling":
            return known(value, (0, 1, 2, 3))  # no later split has an earlier event
        return _by_split(split, data.past, functools.partial(known, value))

    number = _number(seen(one), seen(amount), units)
    return ibis.ifelse(key.notnull(), number, ibis.null("float64"))
