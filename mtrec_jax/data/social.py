"""Searches and friends: queries join the histories, ties become lists of friends, and a feature
says how friends have responded so far, by the values of an item column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32, Int

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared, Rule, TaskField
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.examples import QUERY, VISIBLE, Log, Numbers
from mtrec_jax.data.features import Categorical, Encoding, FriendsTaste, Ties, one_array
from mtrec_jax.data.growth import earlier
from mtrec_jax.data.read import ROW
from mtrec_jax.data.rules import bad_lines, check_bad_fraction, counted
from mtrec_jax.data.schema import bound, query_features, seconds
from mtrec_jax.data.sources import Source
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, UNKNOWN, Lists

_WORK = 1 << 21  # friends' events and numbers of one block of users: bounds the memory to ~0.3 GB


# --- Raw searches and ties, cleaned


def clean_queries(engine: Engine, experiment: Experiment, source: Source | None) -> list[Rule]:
    """Keep the usable queries as the table "queries": row, user, time, text.

    Args:
      engine: has the table "user_ids" of the users of the events.
      experiment: names the columns.
      source: the raw queries, if there are any.

    Raises:
      DataError: too many lines are malformed.
    """
    if source is None:
        return []
    data, clean, raw = experiment.data, experiment.clean, source.table
    text, time = raw[data.time], seconds(raw[data.time], data.time_unit)
    typed = raw.select(row=raw[ROW], user=raw[data.user], time=time, text=raw[data.query], at=text)
    people = engine.read(engine.folder / "user_ids").mutate(known=ibis.literal(True))
    typed = typed.left_join(people, "user").drop("user_right")
    null = ibis.null("string")
    problems = [
        (typed.user.isnull(), "query: missing user", null),
        (typed.text.isnull(), "query: missing text", null),
        (typed["at"].isnull(), "query: missing time", null),
        (typed.time.isnull(), "query: malformed time", typed["at"]),
    ]
    if (earliest := bound(clean.earliest, "clean.earliest")) is not None:
        problems.append((typed.time < earliest, "query: time before clean.earliest", typed["at"]))
    if (latest := bound(clean.latest, "clean.latest")) is not None:
        problems.append((typed.time > latest, "query: time after clean.latest", typed["at"]))
    problems.append((typed.known.isnull(), "query: user without events", typed.user))
    good, rules = _without(engine, experiment, source, typed, problems)
    engine.keep("queries", good.select("row", "user", "time", "text").order_by("row"))
    return rules


def clean_ties(engine: Engine, experiment: Experiment, source: Source | None) -> list[Rule]:
    """Keep the usable ties as the table "ties": row, user, friend.

    A tie counts once, from its user to its friend; both must have events.

    Raises:
      DataError: too many lines are malformed.
    """
    if source is None:
        return []
    data, raw = experiment.data, source.table
    ties = raw.select(row=raw[ROW], user=raw[data.user], friend=raw[data.friend])
    people = engine.read(engine.folder / "user_ids").mutate(known=ibis.literal(True))
    ties = ties.left_join(people, "user").drop("user_right")
    people = people.select(friend="user", friend_known="known")
    ties = ties.left_join(people, "friend").drop("friend_right")
    nth = ibis.row_number().over(ibis.window(group_by=["user", "friend"], order_by="row"))
    ties = ties.mutate(nth=nth)
    null = ibis.null("string")
    problems = [
        (ties.user.isnull() | ties.friend.isnull(), "tie: missing user or friend", null),
        (ties.user == ties.friend, "tie: to oneself", ties.user),
        (ties.nth > 0, "tie: repeated", null),
        (ties.known.isnull(), "tie: user without events", ties.user),
        (ties.friend_known.isnull(), "tie: friend without events", ties.friend),
    ]
    good, rules = _without(engine, experiment, source, ties, problems)
    engine.keep("ties", good.select("row", "user", "friend").order_by("row"))
    return rules


def _without(
    engine: Engine,
    experiment: Experiment,
    source: Source,
    typed: Any,
    problems: list[tuple[Any, str, Any]],
) -> tuple[Any, list[Rule]]:
    """Rows without any of the problems (where, reason, evidence), and what was removed."""
    name, null = source.staged.name, ibis.null("string")
    typed = typed.mutate(
        reason=ibis.cases(*((where, reason) for where, reason, _ in problems), else_=null),
        evidence=ibis.cases(*((where, text) for where, _, text in problems), else_=null),
    )
    typed = engine.keep(f"typed_{name}", typed)
    bad = typed.filter(typed.reason.notnull()).select("row", "reason", "evidence")
    bad = engine.keep(f"removed_{name}", bad)
    rules = [Rule(rule=f"{name}: rows read", rows=source.staged.rows), *bad_lines(source.staged)]
    rules += counted(bad, source.staged)
    check_bad_fraction(experiment.clean, source.staged, rules)
    return typed.filter(typed.reason.isnull()).drop("reason", "evidence"), rules


# --- Searches among the events, and lists of friends


def split_queries(queries: Any, events: Any, experiment: Experiment) -> Any:
    """Clean queries as row, user, time, split and feature_*.

    Their split is 0 where a training target sees them, before the user's last training event, so
    that features can be learned from these; in the log it is QUERY for all.
    """
    last = ibis.ifelse(events.split == 0, events.time, ibis.null("float64")).max()
    people = events.group_by("user").agg(last=last)
    typed = queries.left_join(people, "user").drop("user_right")
    seen = ibis.ifelse(typed.time < typed["last"], 0, QUERY).fill_null(QUERY)
    texts = {f"feature_{name}": typed.text for name in query_features(experiment)}
    return typed.select("row", "user", "time", split=seen, **texts)


def with_queries(engine: Engine, events: Any, queries: Any) -> Any:
    """Events with ids, and any queries among them: unknown items, no labels, split QUERY."""
    if queries is None:
        return events
    index = engine.read(engine.folder / "user_index").select("user", user_id="id")
    found = queries.inner_join(index, "user").drop("user")
    found = found.mutate(item_id=ibis.literal(UNKNOWN), split=ibis.literal(QUERY))
    texts = [name for name in found.columns if name.startswith("feature_")]
    events = events.mutate(**{name: ibis.null("string") for name in texts})
    columns = {
        name: (found[name] if name in found.columns else ibis.null(kind)).cast(kind)
        for name, kind in events.schema().items()
    }
    return events.union(found.select(**columns))


def friend_lists(ties: Any, users: pa.Table, experiment: Experiment) -> tuple[Lists, pa.Table]:
    """The friends of each user, as user indexes in the order of the ties; and the users, in the
    order of their ids, with a column for each feature of kind "ties"."""
    names, table = one_array(users["user"]), ties.order_by("row").to_pyarrow()
    owner, friend = (
        pc.index_in(one_array(table[key]), value_set=names).to_numpy() for key in ("user", "friend")
    )
    order = np.argsort(owner, kind="stable")
    offsets = np.searchsorted(owner[order], np.arange(len(users) + 1))
    friends = Lists(friend[order].astype(np.int32), offsets)
    columns = [f.column or name for name, f in experiment.features.items() if isinstance(f, Ties)]
    if columns:
        named = names.take(pa.array(friends.values))
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), named)
        for column in columns:
            users = users.append_column(f"column_{column}", lists)
    return friends, users


# --- What friends have liked so far


class Tastes(NamedTuple):
    """The fitted features of kind "friends_taste", and their numbers at any moment."""

    encodings: list[Encoding]
    numbers: Numbers
    of_users: dict[str, np.ndarray]  # {context_<feature>: [U, V]}: as of the end of the log


def fit_tastes(
    experiment: Experiment,
    log: Log | None,
    friends: Lists | None,
    items: pa.Table,
    tasks: dict[str, TaskField],
    base: Prepared | None = None,
) -> Tastes | None:
    """Learn the features of kind "friends_taste": their values, and the scale of their numbers.

    The values are the most frequent ones in the training events. A number is divided by the
    standard deviation of what users' friends have shown by the end of the training events; it is
    not centred, so that 0 remains to know nothing. None without a log, or without ties. What `base`
    has learned stays what it is.

    Raises:
      DataError: an item has several values, or none is frequent enough.
    """
    if log is None or friends is None:
        return None
    encodings, problems = [], []
    begins, everyone = log.offsets(len(friends)), np.arange(len(friends))
    end = np.full(len(friends), np.inf)
    for name, feature in experiment.features.items():
        if not isinstance(feature, FriendsTaste):
            continue
        column = feature.column or name
        cells = one_array(items["item" if column == experiment.data.item else f"column_{column}"])
        if pa.types.is_list(cells.type):
            raise DataError(f"feature '{name}': items have several values of '{column}', not one")
        plain = Categorical(column=column, min_count=feature.min_count)
        counts = items["count"].to_numpy()
        ranked = plain.fit(name, cells.filter(pa.array(counts > 0)), counts[counts > 0])
        old = earlier(base, name)
        values = old.values if old else ranked.values[: feature.bins]
        number = pc.fill_null(pc.index_in(cells, value_set=values), -1).to_numpy()
        events = Responses(
            begins,
            log.time,
            log.split,
            log.events["item"],
            log.targets[f"label_{feature.label}"],
            np.concatenate([np.full(FIRST, -1), number]),
        )
        shape = (len(values), tasks[feature.label].mean, feature.smoothing)
        known = friends_taste(friends, events, everyone, end, (0,), *shape)
        std = old.std if old else float(known.std()) or 1.0
        often = old.counts if old else ranked.counts[: feature.bins]
        encodings.append(Encoding(name, feature, values, often, slots=len(values), std=std))
        problems.append((events, shape))

    def numbers(user: np.ndarray, at: np.ndarray, splits: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {
            f"context_{encoding.name}": friends_taste(friends, events, user, at, splits, *shape)
            / np.float32(encoding.std)
            for encoding, (events, shape) in zip(encodings, problems, strict=True)
        }

    return Tastes(encodings, numbers, numbers(everyone, end, VISIBLE["rolling"][2]))


class Responses(NamedTuple):
    """Labelled events, user by user; an event says nothing where its value or label is missing."""

    begins: np.ndarray  # [U + 1]: the events of user u are begins[u] .. begins[u + 1] - 1
    time: np.ndarray  # [n] float64
    split: np.ndarray  # [n] int8
    item: np.ndarray  # [n] item ids
    label: np.ndarray  # [n] NaN: missing
    value_of: np.ndarray  # [N + 2]: by item id the value's number 0 .. V - 1, or -1


def friends_taste(
    friends: Lists,
    responses: Responses,
    user: Int[np.ndarray, " e"],
    at: Float[np.ndarray, " e"],
    splits: tuple[int, ...],
    values: int,
    mean: float,
    smoothing: float,
) -> Float32[np.ndarray, "e V"]:
    """What friends liked more, or less, than everybody: a number for each value.

    For user u at time t and value v it is (S + smoothing * mean) / (n + smoothing) - mean, where n
    and S count and sum the labels of the events of u's friends at items with value v, strictly
    before t. Without such events it is 0.

    Args:
      friends: a list of distinct user indexes for each user.
      responses: the events, of which those of `splits` count.
      user, at: user index and moment of each example.
      splits: whose events count.
      values: V.
      mean: the overall mean of the label.
      smoothing: how many events the overall mean stands for.

    >>> events = Responses(np.array([0, 0, 2]), np.array([1.0, 2.0]), np.zeros(2, np.int8),
    ...     np.array([2, 2]), np.array([1.0, 1.0]), np.array([-1, -1, 0]))
    >>> friends = Lists(np.array([1]), np.array([0, 1, 1]))
    >>> at = np.array([1.0, 2.0, 3.0])  # nothing, one event and two are earlier
    >>> friends_taste(friends, events, np.zeros(3, int), at, (0,), 1, mean=0.5, smoothing=1.0)
    array([[0.        ],
           [0.25      ],
           [0.33333334]], dtype=float32)
    """
    found = np.zeros((len(user), values), np.float32)
    order = np.lexsort((at, user))
    ends = np.cumsum(np.bincount(user, minlength=len(friends)))
    for start, stop in _blocks(friends, responses.begins, np.diff(ends, prepend=0) * values):
        examples = order[ends[start - 1] if start else 0 : ends[stop - 1]]
        if not len(examples):
            continue
        who, event = _friends_events(friends, responses.begins, start, stop)
        value = responses.value_of[responses.item[event]]
        label = np.asarray(responses.label[event], np.float64)
        known = (value >= 0) & ~np.isnan(label) & np.isin(responses.split[event], splits)
        who, event, value, label = (a[known] for a in (who, event, value, label))
        # Moment m of an example lies after an event when m is at least the event's `moment`.
        moments, m = np.unique(at[examples], return_inverse=True)
        moment = np.searchsorted(moments, responses.time[event], side="right")
        keys = user[examples] * (len(moments) + 1) + m
        first = np.searchsorted(keys, who * (len(moments) + 1) + moment)  # example that sees it
        seen = first < len(examples)
        seen[seen] = user[examples[first[seen]]] == who[seen]
        cell = first[seen] * values + value[seen]
        before = np.searchsorted(user[examples], user[examples])  # the user's first example
        n = _so_far(cell, None, before, values)
        above = _so_far(cell, label[seen] - mean, before, values)
        found[examples] = above / np.maximum(n + smoothing, 1e-12)
    return found


def _so_far(
    cell: np.ndarray, weights: np.ndarray | None, before: np.ndarray, values: int
) -> Float[np.ndarray, "e V"]:
    """What the cells add to each example and to the same user's later ones."""
    new = np.bincount(cell, weights, minlength=len(before) * values).reshape(-1, values)
    total = np.concatenate([np.zeros((1, values)), np.cumsum(new, axis=0)])
    return total[1:] - total[before]


def _friends_events(
    friends: Lists, begins: np.ndarray, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Users start .. stop - 1 and the events of their friends, a pair each."""
    who = np.repeat(np.arange(start, stop), np.diff(friends.offsets[start : stop + 1]))
    friend = friends.values[friends.offsets[start] : friends.offsets[stop]]
    sizes = begins[friend + 1] - begins[friend]
    shift = np.repeat(begins[friend] - (np.cumsum(sizes) - sizes), sizes)
    return np.repeat(who, sizes), np.arange(len(shift)) + shift


def _blocks(
    friends: Lists, begins: np.ndarray, numbers: Int[np.ndarray, " U"]
) -> Iterator[tuple[int, int]]:
    """Runs of users whose friends' events and own numbers are about `_WORK` together."""
    events = np.concatenate([[0], np.cumsum(np.diff(begins)[friends.values])])
    work = np.cumsum(np.diff(events[friends.offsets]) + numbers)
    start = 0
    while start < len(work):
        done = work[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(work, done + _WORK, side="right")))
        yield start, stop
        start = stop
