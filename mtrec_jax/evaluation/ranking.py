"""Where deep models and baselines meet: whoever can score blocks of the catalogue is measured.

Items are catalogue indexes 0 .. N - 1, that is item id - `types.FIRST`. Queries are positions of
an evaluation set, numbered from 0. Scores of one [query block, item block] are the largest thing
in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int64

from mtrec_jax.baselines.contract import Scorer
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import Lists


class _Pairs(NamedTuple):
    """Excluded (query, item) pairs of a block of queries, in the order of their items."""

    rows: np.ndarray  # position in the block of queries
    items: np.ndarray

    def inside(self, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns of the block `part`) of the pairs that fall into it."""
        low, high = np.searchsorted(self.items, (part.start, part.stop))
        return self.rows[low:high], self.items[low:high] - part.start


def target_ranks(
    scorer: Scorer,
    targets: Int[np.ndarray, " Q"],
    exclude: Lists | None,
    items: int,
    query_block: int = 512,
    item_block: int = 8192,
) -> Int64[np.ndarray, " Q"]:
    """Rank (0 = first) of each query's target among the items it may be shown.

    rank = how many admissible items have a higher score, or an equal score and a lower index. The
    target is admissible even when it is in the excluded list (a repeated purchase).

    Args:
      scorer: asked for queries 0 .. Q - 1.
      targets: catalogue index of the relevant item of each query.
      exclude: per query the catalogue indexes that do not count, such as the items already seen;
        values outside 0 .. N - 1 mean nothing. None: nothing is excluded.
      items: N.

    Raises:
      DataError: a target is outside the catalogue, `exclude` has not one list per query, or the
        scorer returns nan or a wrong shape.

    >>> from mtrec_jax.baselines.contract import SameForEveryone
    >>> popular = SameForEveryone(np.array([5, 9, 7], np.float32))
    >>> target_ranks(popular, np.array([0, 2]), None, items=3)
    array([2, 1])
    """
    _check(query_block, item_block, exclude, len(targets))
    if len(targets) and not 0 <= targets.min() <= targets.max() < items:
        raise DataError(
            f"targets {targets.min()} .. {targets.max()} are not all in the catalogue 0 .. "
            f"{items - 1}; pass item id - 2, and leave out unknown items"
        )
    ranks = np.zeros(len(targets), np.int64)
    # Neighbouring targets lie in one item block, which then need not be scored twice.
    order = np.argsort(targets, kind="stable")
    for start in range(0, len(order), query_block):
        queries = order[start : start + query_block]
        target = targets[queries]
        pairs = _excluded_pairs(exclude, queries, items)
        other = pairs.items != target[pairs.rows]
        pairs = _Pairs(pairs.rows[other], pairs.items[other])
        ranks[queries] = _block_ranks(scorer, queries, target, pairs, items, item_block)
    return ranks


def top_items(
    scorer: Scorer,
    queries: Int[np.ndarray, " Q"],
    k: int,
    exclude: Lists | None,
    items: int,
    query_block: int = 512,
    item_block: int = 8192,
) -> tuple[Float32[np.ndarray, "Q K"], Int64[np.ndarray, "Q K"]]:
    """The k best items of each query: (scores, catalogue indexes), best first, ties lowest index.

    Args:
      queries: positions of the evaluation set; `exclude[q]` belongs to query q.
      exclude: as in `target_ranks`.
      items: N.

    Returns:
      Scores and indexes; -inf and -1 where fewer than k items can be recommended (a score of -inf
      says that an item cannot).

    Raises:
      ConfigError: k is below 1.
      DataError: a query has no excluded list, or the scorer returns nan or a wrong shape.

    >>> from mtrec_jax.baselines.contract import SameForEveryone
    >>> popular = SameForEveryone(np.array([5, 9, 7], np.float32))
    >>> seen = Lists(np.array([1]), np.array([0, 1]))  # query 0 has seen item 1
    >>> top_items(popular, np.array([0]), 2, seen, items=3)[1]
    array([[2, 0]])
    """
    if k < 1:
        raise ConfigError(f"top_items: k must be 1 or more, not {k}")
    _check(query_block, item_block, exclude, None)
    if exclude is not None and len(queries) and queries.max() >= len(exclude):
        raise DataError(f"query {queries.max()} has no list among the {len(exclude)} of exclude")
    all_scores = np.full((len(queries), k), -np.inf, np.float32)
    all_ids = np.full((len(queries), k), -1, np.int64)
    for start in range(0, len(queries), query_block):
        block = queries[start : start + query_block]
        pairs = _excluded_pairs(exclude, block, items)
        best_scores = np.zeros((len(block), 0), np.float32)
        best_ids = np.zeros((len(block), 0), np.int64)
        for part in _slices(items, item_block):
            scores = _scores(scorer, block, part).copy()  # (q, n); may be a read-only view
            scores[pairs.inside(part)] = -np.inf
            ids = np.broadcast_to(np.arange(part.start, part.stop), scores.shape)
            # Earlier blocks go first, so that the first of equals has the lowest index.
            scores = np.concatenate((best_scores, scores), axis=1)
            ids = np.concatenate((best_ids, ids), axis=1)
            columns = _first_best(scores, k)
            best_scores = np.take_along_axis(scores, columns, axis=1)
            best_ids = np.take_along_axis(ids, columns, axis=1)
        found = slice(0, best_ids.shape[1])
        all_scores[start : start + query_block, found] = best_scores
        all_ids[start : start + query_block, found] = np.where(best_scores > -np.inf, best_ids, -1)
    return all_scores, all_ids


def _block_ranks(
    scorer: Scorer,
    queries: Int[np.ndarray, " q"],
    target: Int[np.ndarray, " q"],
    pairs: _Pairs,
    items: int,
    item_block: int,
) -> Int64[np.ndarray, " q"]:
    """Ranks for one block of queries.

    The target's score is read from the very block in which its rivals are counted: a score that
    was computed in another shape may differ in the last bit, and break or make a tie.
    """
    parts = list(_slices(items, item_block))
    part_of = target // item_block
    wanted = np.zeros((len(queries), 1), np.float32)
    for number in np.unique(part_of):
        kept_number, kept = number, _scores(scorer, queries, parts[number])
        inside = np.flatnonzero(part_of == number)
        wanted[inside, 0] = kept[inside, target[inside] - parts[number].start]
    ranks = np.zeros(len(queries), np.int64)
    for number, part in enumerate(parts):
        scores = kept if number == kept_number else _scores(scorer, queries, part)
        ahead = scores == wanted
        ahead &= np.arange(part.start, part.stop) < target[:, None]
        ahead |= scores > wanted
        ahead[pairs.inside(part)] = False
        ranks += np.count_nonzero(ahead, axis=1)
    return ranks


def _excluded_pairs(exclude: Lists | None, queries: Int[np.ndarray, " q"], items: int) -> _Pairs:
    """The lists of some queries as pairs sorted by item, without what is outside the catalogue."""
    if exclude is None:
        return _Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64))
    first, after = exclude.offsets[queries], exclude.offsets[queries + 1]
    length = after - first
    before = np.cumsum(length) - length
    position = np.arange(length.sum()) + np.repeat(first - before, length)
    rows = np.repeat(np.arange(len(queries)), length)
    values = exclude.values[position]
    known = np.flatnonzero((values >= 0) & (values < items))
    order = known[np.argsort(values[known], kind="stable")]
    return _Pairs(rows[order], values[order])


def _first_best(scores: Float32[np.ndarray, "q n"], k: int) -> Int[np.ndarray, "q K"]:
    """Columns of the min(k, n) largest scores of each row, sorted; of equals the first columns."""
    rows, width = scores.shape
    columns = np.broadcast_to(np.arange(width), scores.shape)
    if width > k:
        last = np.partition(scores, width - k, axis=1)[:, width - k, None]  # the k-th largest
        above, equal = scores > last, scores == last
        spare = k - np.count_nonzero(above, axis=1, keepdims=True)
        keep = above | (equal & (np.cumsum(equal, axis=1) <= spare))
        columns = np.nonzero(keep)[1].reshape(rows, k)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _scores(scorer: Scorer, queries: np.ndarray, part: slice) -> Float32[np.ndarray, "q n"]:
    """One block of scores, checked: a nan would compare as worse than everything, silently."""
    scores = np.asarray(scorer.block(queries, part), np.float32)
    if scores.shape != (len(queries), part.stop - part.start):
        raise DataError(
            f"{type(scorer).__name__}.block gave scores of shape {scores.shape} for {len(queries)} "
            f"queries and {part.stop - part.start} items; return [queries, items]"
        )
    if np.isnan(scores.max()):  # max hands a nan on
        row = int(np.isnan(scores).any(axis=1).argmax())
        raise DataError(
            f"{type(scorer).__name__}.block gave a score that is not a number for query "
            f"{queries[row]}; look for a diverged model or nan features"
        )
    return scores


def _slices(items: int, item_block: int) -> Iterator[slice]:
    for start in range(0, items, item_block):
        yield slice(start, min(start + item_block, items))


def _check(query_block: int, item_block: int, exclude: Lists | None, queries: int | None) -> None:
    if query_block < 1 or item_block < 1:
        raise ConfigError(f"query_block {query_block}, item_block {item_block}: must be 1 or more")
    if exclude is not None and queries is not None and len(exclude) != queries:
        raise DataError(f"{len(exclude)} lists in exclude for {queries} queries; pass one for each")
