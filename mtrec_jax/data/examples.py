"""Encoded events to the examples of the prepared folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from mtrec_jax.data.dataset import BLOCK, fixed_size
from mtrec_jax.types import FIRST

MODULUS = 1 << 31
SHOWN = 3  # the split of events that are seen in histories, and neither train nor judge
QUERY = 4  # the split of searches among the events: they have no label, and everybody sees them
# by a target's split: the splits of its history
VISIBLE = ((0, QUERY), (0, 1, SHOWN, QUERY), (0, 1, 2, SHOWN, QUERY))


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
    """All events, sorted by (user, time, source row); arrays `[n]`, one entry an event."""

    user: np.ndarray  # int32 ids from FIRST on
    split: np.ndarray  # int8: 0 train, 1 validation, 2 test, 3 shown, 4 a query
    row: np.ndarray  # int64 source row
    time: np.ndarray  # float64 seconds
    events: dict[str, np.ndarray]  # {field: int32 ids}: "item" and every history feature
    targets: dict[str, np.ndarray]  # {label_<task>, reference_<task>: float32}

    def offsets(self, users: int) -> Int[np.ndarray, " n"]:
        """Where each user's events begin, and the end: user id u owns `offsets[u - FIRST:][:2]`."""
        # ids of the log's own type, or all of it would be copied
        return np.searchsorted(self.user, np.arange(users + 1, dtype=self.user.dtype) + FIRST)


# User indexes and moments [e], and the splits that may be seen -> context numbers [e, C].
Numbers = Callable[[np.ndarray, np.ndarray, tuple[int, ...]], np.ndarray]
# Places in the log of events [n, L] (-1: none), cutoffs [n, P], places of targets [n, P].
Check = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def sequence_examples(
    log: Log,
    context: dict[str, np.ndarray],
    split: int,
    positions: int,
    history_length: int,
    hide_ties: bool,
    seed: int,
    numbers: Numbers | None = None,
    check: Check | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Examples of a split in seeded random order, BLOCK at a time, as columns `[n, ...]`.

    The targets of a user are cut from the end into chunks of P = `positions`. A chunk sees the
    last L = `history_length` events before its last target: position p may look at the first
    `cutoff[p]` of them. Histories of training hold training events only, those of validation no
    test events (`VISIBLE`), wherever a split has put them in time.

    Args:
      log: all events.
      context: {"context_ids": [U, M], "context_numbers": [U, C]} of all users.
      split: 0 train, 1 validation, 2 test.
      positions: P, at most L.
      history_length: L.
      hide_ties: a position does not see events of its own timestamp.
      seed: of the order.
      numbers: more context numbers, which depend on the time of an example's first target.
      check: raises an error for examples that are not as they should be.
    """
    targets = _places(log.split == split)
    new, sizes = _chunks(log.user[targets], positions)
    order = np.argsort(mix(np.arange(len(new)), seed), kind="stable")
    begins = log.offsets(int(log.user.max(initial=FIRST)) - FIRST + 1)
    if numbers is not None:
        of_chunks = targets[new]
        more = numbers(log.user[of_chunks] - FIRST, log.time[of_chunks], VISIBLE[split])
    kept, earlier = visible_events(log.split, split)
    # a target looks back on what is before this event
    seen_from = _first_of_ties(log)[targets] if hide_ties else targets
    for start in range(0, max(len(order), 1), BLOCK):
        chosen = order[start : start + BLOCK]
        there = np.arange(positions) < sizes[chosen, None]  # [n, P]
        place = np.where(there, new[chosen, None] + np.arange(positions), 0)
        target = targets[place] if len(targets) else place
        last = targets[new[chosen] + sizes[chosen] - 1]
        user, end = log.user[last], earlier[last]
        base = np.maximum(earlier[begins[user - FIRST]], end - history_length)
        token = base[:, None] + np.arange(history_length)  # [n, L]
        seen = token < end[:, None]
        token = kept[np.where(seen, token, 0)] if len(kept) else token
        before = earlier[seen_from[place]] if len(targets) else place
        cutoff = np.where(there, np.maximum(before - base[:, None], 0), 0)
        if check is not None:
            check(np.where(seen, token, -1), cutoff, np.where(there, target, -1))
        found = {name: array[user - FIRST] for name, array in context.items()}
        if numbers is not None:
            own = [found["context_numbers"], more[chosen]]
            found["context_numbers"] = np.concatenate(own, axis=1)
        yield {
            "user": user.astype(np.int32),
            **found,
            **{f"event_{f}": np.where(seen, ids[token], 0) for f, ids in log.events.items()},
            "cutoff": cutoff.astype(np.int32),
            "candidate": np.where(there, log.events["item"][target], 0).astype(np.int32),
            **{n: np.where(there, v[target], np.float32(np.nan)) for n, v in log.targets.items()},
            "row": np.where(there, log.row[target], -1),
        }


def visible_events(
    splits: Int[np.ndarray, " n"], split: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " n+1"]]:
    """The events that targets of a split may see, and how many of them come before each event.

    >>> kept, earlier = visible_events(np.array([0, 1, 0, 2]), 0)
    >>> kept.tolist(), earlier.tolist()
    ([0, 2], [0, 1, 1, 2, 2])
    """
    visible = np.isin(splits, VISIBLE[split])
    earlier = np.zeros(len(visible) + 1, _place_type(len(visible)))
    np.cumsum(visible, dtype=earlier.dtype, out=earlier[1:])
    return _places(visible), earlier


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
