"""How a user's friends have responded so far, by the values of an item column."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Float32, Int

from mtrec_jax.config import Experiment
from mtrec_jax.data import features
from mtrec_jax.data.dataset import Lists, Prepared, TaskField
from mtrec_jax.data.examples import VISIBLE, Log, Numbers
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.growth import earlier
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST

_WORK = 1 << 21  # friends' events and numbers of one block of users: bounds the memory to ~0.3 GB


class Tastes(NamedTuple):
    """The fitted features of kind "friends_taste", and their numbers at any moment."""

    encodings: list[Encoding]
    numbers: Numbers
    of_users: np.ndarray  # [U, C]: as of the end of the log


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
        if feature.kind != "friends_taste":
            continue
        column = feature.column or name
        cells = one_array(items["item" if column == experiment.data.item else f"column_{column}"])
        if pa.types.is_list(cells.type):
            raise DataError(f"feature '{name}': items have several values of '{column}', not one")
        plain, counts = dataclasses.replace(feature, kind="categorical"), items["count"].to_numpy()
        ranked = features.fit(name, plain, cells.filter(pa.array(counts > 0)), counts[counts > 0])
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
        encodings.append(Encoding(name, feature, values, often, std=std))
        problems.append((events, shape))

    def numbers(user: np.ndarray, at: np.ndarray, splits: tuple[int, ...]) -> np.ndarray:
        found = [
            friends_taste(friends, events, user, at, splits, *shape) / np.float32(encoding.std)
            for encoding, (events, shape) in zip(encodings, problems, strict=True)
        ]
        return np.concatenate([np.zeros((len(user), 0), np.float32), *found], axis=1)

    return Tastes(encodings, numbers, numbers(everyone, end, VISIBLE[-1]))


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
