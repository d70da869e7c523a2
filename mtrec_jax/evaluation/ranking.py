"""Ranks and best items of whoever can score the catalogue.

Items are catalogue indexes 0 .. N - 1, that is item id - `types.FIRST`. Queries are positions of
an evaluation set, numbered from 0; they are scored in blocks, so that nobody holds [Q, N].
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from mtrec_jax.baselines import Scorer
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.kernels.constrained import Picks, Quotas
from mtrec_jax.types import Lists

CELLS = 1 << 24  # scores that are held at once
PART = 1 << 20  # of them that are put in order at once


def target_ranks(
    scorer: Scorer, targets: Int[np.ndarray, " Q"], exclude: Lists | None, items: int
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

    >>> from mtrec_jax.baselines.popularity import Counts
    >>> target_ranks(Counts(np.array([5, 9, 7])), np.array([0, 2]), None, items=3)
    array([2, 1])
    """
    return ranks_and_lists(scorer, targets, exclude, 0, items)[0]


def ranks_and_lists(
    scorer: Scorer,
    targets: Int[np.ndarray, " Q"],
    exclude: Lists | None,
    k: int,
    items: int,
    mask: Bool[np.ndarray, " N"] | None = None,
) -> tuple[Int64[np.ndarray, " Q"], Int64[np.ndarray, "Q K"]]:
    """`target_ranks`, and the indexes that `top_items` gives, of scores that are asked for once;
    with a `mask` among some of the items alone.

    >>> from mtrec_jax.baselines.popularity import Counts
    >>> ranks_and_lists(Counts(np.array([5, 9, 7])), np.array([0]), None, 2, items=3)
    (array([2]), array([[1, 2]]))
    """
    if exclude is not None and len(exclude) != len(targets):
        raise DataError(
            f"{len(exclude)} lists in exclude for {len(targets)} queries; pass one for each"
        )
    if len(targets) and not 0 <= targets.min() <= targets.max() < items:
        raise DataError(
            f"targets {targets.min()} .. {targets.max()} are not all in the catalogue 0 .. "
            f"{items - 1}; pass item id - 2, and leave out unknown items"
        )
    ranks = np.zeros(len(targets), np.int64)
    lists = np.full((len(targets), k), -1, np.int64)
    for queries in _blocks(np.arange(len(targets)), items):
        scores, target = _scores(scorer, queries, items), targets[queries][:, None]
        if mask is not None:
            scores = np.where(mask, scores, np.float32(-np.inf))
        own, hidden = np.take_along_axis(scores, target, axis=1), _excluded(exclude, queries, items)
        ahead = (scores > own) | ((scores == own) & (np.arange(items) < target))
        ahead[hidden] = False
        ranks[queries] = np.count_nonzero(ahead, axis=1)
        if k:
            best, found = _best(scores, hidden, k)
            lists[queries, : found.shape[1]] = np.where(best > -np.inf, found, -1)
    return ranks, lists


def top_items(
    scorer: Scorer,
    queries: Int[np.ndarray, " Q"],
    k: int,
    exclude: Lists | None,
    items: int,
    mask: Bool[np.ndarray, " N"] | None = None,
    among: list[np.ndarray] | None = None,
    quotas: Quotas | None = None,
) -> tuple[Float32[np.ndarray, "Q K"], Int64[np.ndarray, "Q K"]]:
    """The k best items of each query: (scores, catalogue indexes), best first, ties lowest index.

    Args:
      queries: positions of the evaluation set; `exclude[q]` belongs to query q.
      exclude: as in `target_ranks`.
      items: N.
      mask: which items may be recommended to anybody.
      among: of each query the catalogue indexes that it may get; None: all.
      quotas: how many items of a group a list may hold, taken greedily.

    Returns:
      Scores and indexes; -inf and -1 where fewer than k items can be recommended (a score of -inf
      says that an item cannot).

    Raises:
      ConfigError: k is below 1.
      DataError: a query has no excluded list, or the scorer returns nan or a wrong shape.

    >>> from mtrec_jax.baselines.popularity import Counts
    >>> seen = Lists(np.array([1]), np.array([0, 1]))  # query 0 has seen item 1
    >>> top_items(Counts(np.array([5, 9, 7])), np.array([0]), 2, seen, items=3)[1]
    array([[2, 0]])
    """
    if k < 1:
        raise ConfigError(f"top_items: k must be 1 or more, not {k}")
    if exclude is not None and len(queries) and queries.max() >= len(exclude):
        raise DataError(f"query {queries.max()} has no list among the {len(exclude)} of exclude")
    best = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    start = 0
    for block in _blocks(queries, items):
        scores, hidden = _scores(scorer, block, items), _excluded(exclude, block, items)
        if mask is not None or among is not None or quotas is not None:
            scores = scores.copy()  # may be a read-only view
            scores[hidden] = -np.inf
            if mask is not None:
                scores[:, ~mask] = -np.inf
            if among is not None:
                for own, query in zip(scores, block, strict=True):
                    own[np.setdiff1d(np.arange(items), among[query])] = -np.inf
            if quotas is not None:
                _keep_within(quotas, scores, k)
        found = _best(scores, hidden, k)
        there = slice(start, start + len(block)), slice(0, found[1].shape[1])
        best[there], ids[there] = found
        start += len(block)
    return best, np.where(best > -np.inf, ids, -1)


def _best(
    scores: Float32[np.ndarray, "q N"], hidden: tuple[np.ndarray, np.ndarray], k: int
) -> tuple[Float32[np.ndarray, "q K"], Int64[np.ndarray, "q K"]]:
    """The k best scores of each row and their places, equal ones by place; hidden ones are -inf.

    Score and place make one whole number, whose largest ones are found without sorting all.
    """
    items = scores.shape[1]
    k, size = min(k, items), max(PART // max(items, 1), 1)
    scores = scores + np.float32(0)  # a copy, without -0, which would stand behind 0
    scores[hidden] = -np.inf
    order = np.empty((len(scores), k), np.int64)
    for start in range(0, len(scores), size):
        bits = scores[start : start + size].view(np.int32)
        rising = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
        keys = rising << 32 | np.arange(items - 1, -1, -1)
        keys.partition(items - k, axis=1)
        best = np.sort(keys[:, items - k :], axis=1)[:, ::-1]
        order[start : start + size] = items - 1 - (best & 0xFFFFFFFF)
    return np.take_along_axis(scores, order, axis=1), order


def _keep_within(quotas: Quotas, scores: np.ndarray, k: int) -> None:
    """What is beyond the first k within quotas scores -inf from here on."""
    for own in scores:
        order = np.argsort(-own, kind="stable")
        pick, good = Picks(quotas, k), order[own[order] > -np.inf]
        pick.take(own[good], good)
        own[np.setdiff1d(good, pick.places)] = -np.inf


def _blocks(queries: Int[np.ndarray, " Q"], items: int) -> Iterator[Int[np.ndarray, " q"]]:
    size = max(CELLS // max(items, 1), 1)
    for start in range(0, len(queries), size):
        yield queries[start : start + size]


def _excluded(
    exclude: Lists | None, queries: Int[np.ndarray, " q"], items: int
) -> tuple[np.ndarray, np.ndarray]:
    """(place in the block, item) of what does not count, without what is outside the catalogue."""
    lists = [] if exclude is None else [exclude[q] for q in queries]
    rows = np.repeat(np.arange(len(lists)), [len(values) for values in lists])
    values = np.concatenate([np.zeros(0, np.int64), *lists]).astype(np.int64)
    known = (values >= 0) & (values < items)
    return rows.astype(np.int64)[known], values[known]


def _scores(
    scorer: Scorer, queries: Int[np.ndarray, " q"], items: int
) -> Float32[np.ndarray, "q N"]:
    """One block of scores, checked: a nan would compare as worse than everything, silently."""
    scores = np.asarray(scorer.scores(queries), np.float32)
    name = f"{type(scorer).__name__}.scores"
    if scores.shape != (len(queries), items):
        raise DataError(
            f"{name} has shape {scores.shape} for {len(queries)} queries and {items} items; return "
            "[queries, items]"
        )
    if np.isnan(scores.max(initial=-np.inf)):  # max hands a nan on
        row = int(np.isnan(scores).any(axis=1).argmax())
        raise DataError(
            f"{name}: a score of query {queries[row]} is not a number; look for a diverged model "
            "or nan features"
        )
    return scores
