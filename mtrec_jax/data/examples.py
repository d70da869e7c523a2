"""Events leave the engine in order, encoded, and become the examples of the prepared folder."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from mtrec_jax.config import Experiment
from mtrec_jax.data import features
from mtrec_jax.data.dataset import (
    BLOCK,
    SHOWN,
    SPLITS,
    Prepared,
    fixed_size,
    to_arrays,
)
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.features import Encoding, one_array
from mtrec_jax.data.schema import query_features
from mtrec_jax.errors import DataError
from mtrec_jax.losses.tasks import TaskField, class_numbers, labelled
from mtrec_jax.types import FIRST, Lists

MODULUS = 1 << 31
QUERY = 4  # the split of searches among the events: they have no label, and everybody sees them
# {data.past: by a target's split: the splits of what it may know of what was before it}
VISIBLE = {
    "rolling": ((0,), (0, 1, SHOWN), (0, 1, 2, SHOWN)),
    "frozen": ((0,), (0, SHOWN), (0, 1, SHOWN)),
}


def mix(value: Any, seed: int) -> Any:
    """A seeded pseudo-random number in [0, 2^31) for every integer >= 0, distinct below 2^31.

    Shifts, xor and odd multipliers modulo 2^31, each a bijection, as in the finalizers of
    Murmur-like hashes. Nothing overflows 64 bits, so that Python, NumPy and every SQL engine
    (an Ibis column as `value`) agree.

    >>> [mix(row, seed=0) for row in range(3)]
    [732942174, 973177735, 830369232]
    """

    def scramble(x: Any) -> Any:
        x = (x ^ (x >> 16)) * 0x21F0AAAD % MODULUS
        x = (x ^ (x >> 15)) * 0x735A2D97 % MODULUS
        return x ^ (x >> 15)

    start = scramble((seed + 1) % MODULUS)
    return scramble((scramble((value + value // MODULUS) % MODULUS) + start) % MODULUS)


@dataclass(frozen=True)
class Log:
    """All events, sorted by (user, time, source row), or without users in the mixed order of
    examples; arrays `[n, ...]`, one entry an event."""

    user: np.ndarray  # int32 ids from FIRST on; 0 without users
    split: np.ndarray  # int8: 0 train, 1 validation, 2 test, 3 shown, 4 a query
    row: np.ndarray  # int64 source row
    time: np.ndarray  # float64 seconds
    events: dict[str, np.ndarray]  # {field: int32 ids [n], or [n, S]}: "item", history features
    targets: dict[str, np.ndarray]  # {label_<task>, reference_<task>, weight_<task>: float32}
    request: dict[str, np.ndarray]  # {request_<feature>: int32 ids or float32 numbers}

    def offsets(self, users: int) -> Int[np.ndarray, " n"]:
        """Where each user's events begin, and the end: user id u owns `offsets[u - FIRST:][:2]`."""
        # ids of the log's own type, or all of it would be copied
        return np.searchsorted(self.user, np.arange(users + 1, dtype=self.user.dtype) + FIRST)


def event_log(
    engine: Engine,
    events: Any,
    rows: int,
    experiment: Experiment,
    encodings: Sequence[Encoding],
    tasks: dict[str, TaskField],
) -> Log:
    """All `rows` events in the order of the log, encoded.

    The engine sorts; the encoded columns are files of its folder that are mapped into memory, so
    that a log may be larger than memory.

    Args:
      engine: where the events are; its tables "split" and "past" are removed on the way.
      events: Ibis table with user_id, item_id, row, split, label_*, reference_*, feature_*, and the
        time if there is one.
      rows: how many there are.
      experiment: what the columns mean.
      encodings: the fitted features of the history and of the request.
      tasks: the classes of the labels.
    """
    data = experiment.data
    if not data.time:
        events = events.mutate(time=events.row.cast("float64"))
    order: tuple[Any, ...] = ("user_id", "time", "row")
    if not data.user:
        order = (mix(events.row, data.seed), "row")
    needed = ["user_id", "item_id", "time", "row", "split", *_target_columns(experiment)]
    needed += [f"feature_{e.name}" for e in encodings]
    engine.keep("ordered", events.order_by(*order).select(needed))
    for name in ("split", "past"):  # they have been sorted, and so copied
        engine.forget(name)

    whole: dict[str, np.ndarray] = {}
    done = 0
    for part in engine.batches("ordered"):
        for name, array in _encoded(part, experiment, encodings, tasks).items():
            if name not in whole:
                shape = (rows, *array.shape[1:])
                whole[name] = mapped(engine.folder / f"{name}.array", shape, array.dtype)
            whole[name][done : done + len(part)] = array
        done += len(part)
    engine.forget("ordered")
    fields = {n.removeprefix("event_"): v for n, v in whole.items() if n.startswith("event_")}
    targets = {n: v for n, v in whole.items() if n.startswith(("label_", "reference_", "weight_"))}
    request = {n: v for n, v in whole.items() if n.startswith("request_")}
    user, split, row, time = (whole[name] for name in ("user", "split", "row", "time"))
    return Log(user, split, row, time, fields, targets, request)


def _encoded(
    part: pa.Table,
    experiment: Experiment,
    encodings: Sequence[Encoding],
    tasks: dict[str, TaskField],
) -> dict[str, np.ndarray]:
    """The columns of a log from some of its events, in their order."""
    searched = query_features(experiment)
    arrays = {name: part[name].to_numpy() for name in ("split", "row", "time")}
    arrays["split"] = arrays["split"].astype(np.int8)
    arrays["user"] = part["user_id"].to_numpy().astype(np.int32)
    arrays["event_item"] = part["item_id"].to_numpy().astype(np.int32)
    for encoding in encodings:
        values = features.encode(encoding, one_array(part[f"feature_{encoding.name}"]))
        role = "request" if encoding.feature.on == "request" else "event"
        if role == "event" and encoding.feature.looked_up:
            # a search has no outcome, and nothing else a text, whatever a missing value becomes
            values[(arrays["split"] == QUERY) != (encoding.name in searched)] = 0
        arrays[f"{role}_{encoding.name}"] = one_column(values)
    return arrays | _targets(part, experiment, tasks)


def one_column(array: np.ndarray) -> np.ndarray:
    """`[n, 1]` as `[n]`; what is wider stays."""
    return array[:, 0] if array.shape[1] == 1 else array


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array in a file that is mapped into memory; its room on the disk is reserved.

    Raises:
      DataError: the disk has too little room.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        raise DataError(
            f"{path.parent}: no room for {size >> 20:,} MB of working files ({error.strerror}). "
            "Free some, or prepare to a folder on another disk"
        ) from error
    return np.memmap(path, dtype, "r+", shape=shape)


def _target_columns(experiment: Experiment) -> list[str]:
    """The columns that `_targets` reads."""
    tasks = experiment.tasks.items()
    references = [f"reference_{name}" for name, task in tasks if task.reference]
    weights = [f"weight_{name}" for name, task in tasks if task.weight_column]
    return [*(f"label_{name}" for name in experiment.tasks), *references, *weights]


def _targets(
    table: pa.Table, experiment: Experiment, tasks: dict[str, TaskField]
) -> dict[str, np.ndarray]:
    """Labels, references and weights `[n]` as float32, NaN where there is none."""
    arrays = {}
    for name, task in experiment.tasks.items():
        labels = table[f"label_{name}"]
        if task.kind in labelled("classes"):
            classes = pa.array(tasks[name].classes, pa.string())
            labels = pc.cast(pc.index_in(labels, value_set=classes), pa.float64())
        elif task.kind in labelled("levels"):
            numbers = pa.array(class_numbers(tasks[name].classes))
            known = pc.is_in(labels, value_set=numbers)
            labels = pc.if_else(known, labels, pa.scalar(None, pa.float64()))
        arrays[f"label_{name}"] = labels.to_numpy().astype(np.float32)
        for column, declared in (("reference", task.reference), ("weight", task.weight_column)):
            if declared:
                values = table[f"{column}_{name}"].to_numpy()
                arrays[f"{column}_{name}"] = values.astype(np.float32)
    return arrays


# User indexes [e], times [e], and the splits that may be seen -> {context_<feature>: [e, S]}.
Numbers = Callable[[np.ndarray, np.ndarray, tuple[int, ...]], dict[str, np.ndarray]]


def sequence_examples(
    log: Log,
    context: dict[str, np.ndarray],
    split: int,
    positions: int,
    history_length: int,
    hide_ties: bool = False,
    seed: int = 0,
    past: Literal["rolling", "frozen"] = "rolling",
    numbers: Numbers | None = None,
    timed: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """Examples of a split in seeded random order, BLOCK at a time, as columns `[n, ...]`.

    The targets of a user are cut from the end into chunks of P = `positions`. A chunk sees the
    last L = `history_length` events before its last target: position p may look at the first
    `cutoff[p]` of them. Histories of training hold training events only, those of validation no
    test events, those of a frozen past none of their target's own split (`VISIBLE`), wherever a
    split has put them in time. With L = 0 every target is an example of its own.

    Args:
      log: all events.
      context: {context_<feature>: [U, ...]} of all users.
      split: 0 train, 1 validation, 2 test.
      positions: P, at most L; 1 where L is 0.
      history_length: L.
      hide_ties: a position does not see events of its own timestamp.
      seed: of the order.
      past: which splits are visible.
      numbers: more of the context, which depends on the time of an example's first target.
      timed: the log has a time, which is written.
    """
    targets, visible = _places(log.split == split), VISIBLE[past][split]
    if history_length:
        new, sizes = _chunks(log.user[targets], positions)
        order = np.argsort(mix(np.arange(len(new)), seed), kind="stable")
        look_back = _histories(log, targets, visible, history_length, hide_ties, past)
    else:
        new, sizes = np.arange(len(targets)), np.ones(len(targets), np.int64)
        order = np.argsort(mix(log.row[targets], seed), kind="stable")
        look_back = None
    more = (
        numbers(log.user[targets[new]] - FIRST, log.time[targets[new]], visible) if numbers else {}
    )
    for start in range(0, max(len(order), 1), BLOCK):
        chosen = order[start : start + BLOCK]
        there = np.arange(positions) < sizes[chosen, None]  # [n, P]
        place = np.where(there, new[chosen, None] + np.arange(positions), 0)
        target = targets[place] if len(targets) else place
        user = log.user[targets[new[chosen]]]
        past_of = look_back(new[chosen] + sizes[chosen] - 1, place, there) if look_back else {}
        yield {
            "user": user.astype(np.int32),
            **{name: array[user - FIRST] for name, array in context.items()},
            **{name: one_column(array[chosen]) for name, array in more.items()},
            **{n: one_column(_flat(array[target], there)) for n, array in log.request.items()},
            "cutoff": np.zeros(there.shape, np.int32),
            **past_of,
            "candidate": np.where(there, log.events["item"][target], 0).astype(np.int32),
            **{n: np.where(there, v[target], np.float32(np.nan)) for n, v in log.targets.items()},
            **({"time": np.where(there, log.time[target], np.nan)} if timed else {}),
            "row": np.where(there, log.row[target], -1),
        }


def _flat(array: np.ndarray, there: Bool[np.ndarray, "n p"]) -> np.ndarray:
    """`[n, P]` or `[n, P, S]` as `[n, P * S]`, 0 where nothing is there."""
    mask = there.reshape(*there.shape, *(1,) * (array.ndim - 2))
    found = np.where(mask, array, array.dtype.type(0))
    return found.reshape(len(array), math.prod(array.shape[1:]))


def _histories(
    log: Log,
    targets: np.ndarray,
    visible: tuple[int, ...],
    length: int,
    hide_ties: bool,
    past: str,
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]:
    """What looks back: (number of an example's last target [n], numbers of its targets [n, P],
    which of these there are) -> event_<field> [n, L * S], how many earlier events were skipped for
    them [n], and cutoff [n, P]."""
    begins = log.offsets(int(log.user.max(initial=FIRST)) - FIRST + 1)
    kept, earlier = visible_events(log.split, visible, log.user if past == "frozen" else None)
    # a target looks back on what is before this event
    seen_from = _first_of_ties(log)[targets] if hide_ties else targets

    def look_back(last: np.ndarray, place: np.ndarray, there: np.ndarray) -> dict[str, np.ndarray]:
        begin, end = earlier[begins[log.user[targets[last]] - FIRST]], earlier[seen_from[last]]
        base = np.maximum(begin, end - length)
        token = base[:, None] + np.arange(length)  # [n, L]
        seen = token < end[:, None]
        token = kept[np.where(seen, token, 0)] if len(kept) else np.zeros_like(token)
        before = earlier[seen_from[place]] if len(targets) else place
        cutoff = np.where(there, np.maximum(before - base[:, None], 0), 0)
        events = {f"event_{f}": _flat(ids[token], seen) for f, ids in log.events.items()}
        filled = np.maximum(seen.sum(axis=1), there.sum(axis=1)).astype(np.int32)
        return {
            "length": filled,
            "skipped": (base - begin).astype(np.int32),
            **events,
            "cutoff": cutoff.astype(np.int32),
        }

    return look_back


def past_items(
    prepared: Prepared, split: str, chosen: np.ndarray, wanted: np.ndarray | None = None
) -> Lists:
    """Item ids of the events before each chosen target, a list per target.

    An event that its split or `cutoff` hides from the model is hidden here too, but the history is
    not cut to the model's length.

    Args:
      prepared: the folder.
      split: of the targets.
      chosen: targets of the split, numbered from 0 in file order.
      wanted: [n] bool of all events in `users.parquet`, which of them count; None: all.
    """
    data, length = prepared.manifest.config["data"], prepared.manifest.history_length
    if not length:
        return Lists(np.empty(0, np.int32), np.zeros(len(chosen) + 1, np.int64))
    items, splits = prepared.user_lists("event_item"), prepared.user_lists("split").values
    columns = to_arrays(prepared.parquet(split).read(["user", "skipped", "cutoff", "row"]))
    owner = np.repeat(np.arange(len(items)), np.diff(items.offsets))
    frozen = owner if data["past"] == "frozen" else None
    kept, earlier = visible_events(splits, VISIBLE[data["past"]][SPLITS.index(split)], frozen)
    begin = earlier[items.offsets[columns["user"] - FIRST]]
    example, position = (axis[chosen] for axis in np.nonzero(columns["row"] >= 0))
    cutoff = columns["cutoff"][example, position]
    sizes = np.where(cutoff > 0, columns["skipped"][example] + cutoff, 0)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - begin[example], sizes)
    values = items.values[kept][places]
    if wanted is None:
        return Lists(values, offsets)
    counted = wanted[kept][places]
    return Lists(values[counted], np.concatenate([[0], np.cumsum(counted)])[offsets])


def visible_events(
    splits: Int[np.ndarray, " n"], visible: tuple[int, ...], user: np.ndarray | None = None
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n+1"]]:
    """The events that targets may see, and how many of them come before each event.

    Queries are seen by all; given each event's `user`, by those alone who see a later event of the
    same user, since a frozen past ends with its last event.

    >>> kept, earlier = visible_events(np.array([0, 1, 0, 2]), (0,))
    >>> kept.tolist(), earlier.tolist()
    ([0, 2], [0, 1, 1, 2, 2])
    """
    shown = np.isin(splits, visible)
    queries = _places(splits == QUERY)
    if user is not None and len(queries):
        events = np.append(_places(shown), -1)  # the user of place -1 is not asked for
        following = events[np.searchsorted(events[:-1], queries)]
        queries = queries[(following >= 0) & (user[following] == user[queries])]
    shown[queries] = True
    earlier = np.zeros(len(shown) + 1, _place_type(len(shown)))
    np.cumsum(shown, dtype=earlier.dtype, out=earlier[1:])
    return _places(shown), earlier


def _place_type(n: int) -> type[np.signedinteger[Any]]:
    """The smallest type for places among n events, since there is one for each event."""
    return np.int32 if n < MODULUS else np.int64


def _places(chosen: Bool[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    return np.flatnonzero(chosen).astype(_place_type(len(chosen)))


def _chunks(
    users: Int[np.ndarray, " n"], positions: int
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Where the chunks of each user's targets begin, and their sizes: cut from the user's end.

    >>> begins, sizes = _chunks(np.array([2, 2, 2, 2, 2, 5]), 2)
    >>> begins.tolist(), sizes.tolist()
    ([0, 1, 3, 5], [1, 2, 2, 1])
    """
    first = np.flatnonzero(np.append(True, users[1:] != users[:-1])[: len(users)])
    targets = np.diff(first, append=len(users))
    chunks = -(-targets // positions)
    last = np.cumsum(chunks)
    after = np.repeat(last, chunks) - np.arange(chunks.sum())  # chunks of the user from here on
    begins = np.repeat(first + targets, chunks) - after * positions
    begins = np.maximum(begins, np.repeat(first, chunks))
    return begins, np.diff(begins, append=len(users))


def _first_of_ties(log: Log) -> Int[np.ndarray, " n"]:
    """For each event the place of the first event of its user and time."""
    n = len(log.user)
    first = np.arange(n, dtype=_place_type(n))
    changes = (log.user[1:] != log.user[:-1]) | (log.time[1:] != log.time[:-1])
    first[1:][~changes] = 0
    return np.maximum.accumulate(first, out=first)


def write_examples(path: Path, blocks: Iterable[dict[str, np.ndarray]]) -> tuple[int, int]:
    """Write examples in row groups of BLOCK; returns how many examples, and targets, there are."""
    examples = targets = 0
    with contextlib.ExitStack() as stack:
        writer: Any = None
        rest: Any = None
        for arrays in blocks:
            examples += len(arrays["row"])
            targets += int((arrays["row"] >= 0).sum())
            table = to_table(arrays)
            if writer is None:
                writer = stack.enter_context(_writer(path, table.schema))
            rest = table if rest is None else pa.concat_tables([rest, table])
            whole = len(rest) // BLOCK * BLOCK
            if whole:
                writer.write_table(rest.slice(0, whole), row_group_size=BLOCK)
                rest = rest.slice(whole)
        if writer is not None and (len(rest) or not examples):
            writer.write_table(rest)  # an empty group still says which columns there are
    return examples, targets


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Byte planes make ids small under LZ4, which is faster to read than a dictionary of them."""
    return pq.ParquetWriter(
        path,
        schema,
        compression="lz4",
        use_byte_stream_split=True,
        use_dictionary=False,
        write_statistics=False,
    )


def to_table(arrays: dict[str, Any]) -> pa.Table:
    """Columns `[n]` or `[n, size]` as Arrow, fixed-size lists; columns of size 0 are left out."""
    columns = {}
    for name, array in arrays.items():
        if isinstance(array, pa.Array) or array.ndim == 1:
            columns[name] = pa.array(array)
        elif array.shape[1]:
            columns[name] = fixed_size(array)
    return pa.table(columns)
