"""Top-k among lists of ids, and with at most so many items of a group: exact, and never short.

A list is scored pair by pair, at the cost of its length. The products are rough at first; whatever
may belong to the answer, within a bound of their rounding, is scored anew by `arithmetic.dot`.

Quotas are taken greedily: down the order of scores, an item is left out if its group is full. Where
each item has one group at most, the admissible lists are the independent sets of a partition
matroid, truncated at k. The greedy list then has the highest sum of scores, and even the highest
score at every place (Gale, 1968, "Optimal assignments in an ordered set"). Items in several groups
are no matroid: the list is the greedy one all the same, and another may have a higher sum.

Cutting the k best down to the quotas would leave lists short. Here a query whose list is short is
asked again among the items that are left: those that are not in it, in groups that are not full.
The best of these belongs to its list, so k rounds suffice at most, and few are needed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mtrec_jax.types import Lists

NEVER = np.iinfo(np.int32).max  # the id of no item
NO_LIMIT = np.iinfo(np.int64).max  # the quota of a group that has none
_LONG, _SHORT = 32, 1024  # longer lists than one item in 32 are masks, up to 1024 ids never
_MASKS = 1 << 27  # bytes of masks at a time
_FIRST, _LATER = 1024, 4096  # results a query in the first round and in the others, or k
_FEWEST = 8  # masks, so that few programs are compiled

Found = tuple[np.ndarray, np.ndarray]  # scores [Q, K], and rows of items, -1 where there is none


class Asked(NamedTuple):
    """Queries and what each may get; ids are rows of items here."""

    queries: np.ndarray  # [Q, D]
    exclude: np.ndarray | None = None  # [Q, X], `NEVER` where nothing stands
    masks: np.ndarray | None = None  # [G, N]
    group: np.ndarray | None = None  # [Q], which row of `masks`; None: the first

    def mask(self, row: int, count: int) -> np.ndarray:
        """Which of all items one query may get."""
        mask = np.ones(count, bool)
        if self.masks is not None:
            mask[:] = self.masks[0 if self.group is None else self.group[row]]
        if self.exclude is not None:
            mask[self.exclude[row][self.exclude[row] != NEVER]] = False
        return mask

    def may(self, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Which pairs of a query and an item are admissible."""
        good = np.ones(len(item), bool)
        if self.masks is not None:
            good &= self.masks[0 if self.group is None else self.group[query], item]
        if self.exclude is not None and self.exclude.size:
            rows = np.arange(len(self.exclude))[:, None]
            pairs = _packed(query, item)
            out = np.sort(_packed(rows, self.exclude).ravel())
            place = np.minimum(np.searchsorted(out, pairs), len(out) - 1)
            good &= out[place] != pairs
        return good


class Quotas(NamedTuple):
    """How many items of a group a list may hold."""

    groups: np.ndarray  # [N, S] of each item, -1 where there is none
    most: np.ndarray  # [G + 1]: the last one, which -1 points to, is more than there are items

    def open(self, closed: Any = ()) -> np.ndarray:
        """Items [N] of which no group is among the closed ones, or has a quota of 0."""
        is_open = self.most > 0
        is_open[list(closed)] = False
        found = is_open[self.groups[:, 0]]
        for slot in range(1, self.groups.shape[1]):
            found &= is_open[self.groups[:, slot]]
        return found


class Pairs(NamedTuple):
    """How pairs of a query and an item are scored."""

    score: Callable[[np.ndarray, np.ndarray, bool], np.ndarray]  # of (query, item, exact?), [E]
    error: float  # how far a score that is not exact may be off


class Picks:
    """The list of one query, as far as it is known."""

    def __init__(self, quotas: Quotas, k: int):
        self._quotas, self._k = quotas, k
        self._room: dict[int, int] = {}  # by group
        self.closed: set[int] = set(np.flatnonzero(quotas.most <= 0).tolist())  # that are full
        self.scores: list[float] = []
        self.places: list[int] = []

    def left(self) -> np.ndarray:
        """Items [N] that can still join the list."""
        good = self._quotas.open(self.closed)
        good[self.places] = False
        return good

    @property
    def is_full(self) -> bool:
        """Whether there are k."""
        return len(self.places) == self._k

    def take(self, scores: np.ndarray, places: np.ndarray) -> None:
        """Go on with candidates, best first; a place of -1 is none."""
        values = self._quotas.groups[places].tolist()
        for score, place, groups in zip(scores.tolist(), places.tolist(), values, strict=True):
            if self.is_full or place < 0:
                return
            if not self.closed.isdisjoint(groups):
                continue
            self.scores.append(score)
            self.places.append(place)
            for group in set(groups):  # an item counts once, however often its group stands there
                if group >= 0:
                    room = self._room.get(group, int(self._quotas.most[group])) - 1
                    self._room[group] = room
                    if room <= 0:
                        self.closed.add(group)


def best(
    top: Callable[[Asked, int], Found], asked: Asked, k: int, quotas: Quotas | None, count: int
) -> Found:
    """The k best of `count` items for each query, as `top` finds them, within quotas."""
    if quotas is None:
        return top(asked, k)
    picks = [Picks(quotas, k) for _ in asked.queries]
    is_open, limited = quotas.open(), asked
    if not is_open.all():
        masks = is_open[None] if asked.masks is None else asked.masks & is_open
        limited = asked._replace(masks=masks)
    width = min(max(k, min(4 * k, _FIRST)), count)
    scores, places = top(limited, width)
    for row, pick in enumerate(picks):
        pick.take(scores[row], places[row])
    short = [row for row, pick in enumerate(picks) if not pick.is_full and places[row, -1] >= 0]
    short = [] if width == count else short
    width = min(max(k, min(16 * k, _LATER)), count)
    while short:
        last, short = short, []
        for part in _parts(last, count):
            masks = (asked.mask(row, count) & picks[row].left() for row in part)
            more, places = top(_masked(asked.queries[part], masks, count), width)
            for row, *found in zip(part, more, places, strict=True):
                picks[row].take(*found)
                if not picks[row].is_full and found[1][-1] >= 0:
                    short.append(row)
    return _listed([(pick.scores, pick.places) for pick in picks], k, scores.dtype)


def among(
    top: Callable[[Asked, int], Found],
    pairs: Pairs,
    asked: Asked,
    k: int,
    lists: Lists,
    quotas: Quotas | None,
    count: int,
) -> Found:
    """The k best of each query's own list, whose ids ascend; `top` as in `best`."""
    lengths = np.diff(lists.offsets)
    is_long = lengths > max(count // _LONG, _SHORT)
    query = np.repeat(np.arange(len(lengths)), lengths)
    query, item = (array[~is_long[query]] for array in (query, lists.values))
    good = asked.may(query, item)
    if quotas is not None:
        good &= quotas.open()[item]
    query, item = query[good], item[good]
    scores, places = best_pairs(pairs, query, item, k, len(lengths), quotas)
    for part in _parts(np.flatnonzero(is_long).tolist(), count):
        masks = (asked.mask(row, count) & _mask(lists[row], count) for row in part)
        one = _masked(asked.queries[part], masks, count)
        found = best(top, one, min(k, count), quotas, count)
        for whole, array in zip((scores, places), found, strict=True):
            whole[part, : min(k, count)] = array
    return scores, places


def best_pairs(
    pairs: Pairs,
    query: np.ndarray,
    item: np.ndarray,
    k: int,
    queries: int,
    quotas: Quotas | None,
) -> Found:
    """The k best of each query among pairs [E], by ascending query and then item."""
    if quotas is None:
        rough = pairs.score(query, item, False)
        good = _may_be_best(rough, query, k, queries, 2 * pairs.error)
        query, item = query[good], item[good]
    exact = pairs.score(query, item, True)
    answers: list[tuple[Any, Any]] = []
    for start, stop in itertools.pairwise(np.searchsorted(query, np.arange(queries + 1))):
        own, ids = exact[start:stop], item[start:stop]
        order = np.argsort(-own, kind="stable")
        if quotas is None:
            answers.append((own[order[:k]], ids[order[:k]]))
        else:
            pick = Picks(quotas, k)
            pick.take(own[order], ids[order])
            answers.append((pick.scores, pick.places))
    return _listed(answers, k, exact.dtype)


def _may_be_best(
    rough: np.ndarray, query: np.ndarray, k: int, queries: int, error: float
) -> np.ndarray:
    """Pairs that can be among the k best of their query; equal queries stand together."""
    good = np.ones(len(rough), bool)
    bounds = np.searchsorted(query, np.arange(queries + 1))
    for start, stop in itertools.pairwise(bounds):
        if stop - start > k:
            own = rough[start:stop]
            kth = np.partition(own, stop - start - k)[stop - start - k]
            good[start:stop] = own >= float(kth) - error
    return good


def _parts(rows: list[int], count: int) -> Iterator[list[int]]:
    """Rows of which each has a mask of its own, as many as are held at a time."""
    size = max(_MASKS // max(count, 1), 1)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _masked(queries: np.ndarray, masks: Iterator[np.ndarray], count: int) -> Asked:
    """Queries with a mask each; these are filled up, so that few programs are compiled."""
    size = 1 << (max(len(queries), _FEWEST) - 1).bit_length()
    whole = np.zeros((size, count), bool)
    for row, mask in enumerate(masks):
        whole[row] = mask
    return Asked(queries, None, whole, np.arange(len(queries), dtype=np.int32))


def _mask(ids: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[ids] = True
    return mask


def _listed(answers: list[tuple[Any, Any]], k: int, dtype: np.dtype) -> Found:
    """Lists of any length up to k as arrays [Q, k]."""
    scores = np.full((len(answers), k), -np.inf, dtype)
    places = np.full((len(answers), k), -1, np.int32)
    for row, (own, ids) in enumerate(answers):
        scores[row, : len(own)], places[row, : len(ids)] = own, ids
    return scores, places


def _packed(query: np.ndarray, item: np.ndarray) -> np.ndarray:
    return query.astype(np.int64) << 32 | item.astype(np.int64)
