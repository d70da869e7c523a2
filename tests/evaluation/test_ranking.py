"""Ranks and recommendations against sorting everything, for any blocks, ties and exclusions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.baselines import Scorer
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation.ranking import target_ranks, top_items
from mtrec_jax.types import Lists


@dataclass(frozen=True)
class Table:
    """Scores from a matrix, and a diary of what was asked."""

    scores: np.ndarray  # [Q, N]
    asked: list[tuple[int, int]] = field(default_factory=list)

    def block(self, queries: np.ndarray, items: slice) -> np.ndarray:
        found = self.scores[queries, items]
        self.asked.append((len(queries), items.stop - items.start))
        return found


def _lists(lists: list[list[int]]) -> Lists:
    offsets = np.cumsum([0, *map(len, lists)])
    return Lists(np.array([value for part in lists for value in part], np.int64), offsets)


def _sorted_items(scores: np.ndarray, excluded: list[int]) -> list[int]:
    """Admissible items of one query: by score, then by index."""
    return sorted(set(range(len(scores))) - set(excluded), key=lambda item: (-scores[item], item))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]], int, int]:
    queries, items = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = np.array([-np.inf, -1, 0, 0.5, 2], np.float32)  # few, so that ties abound
    scores = levels[generator.integers(0, len(levels), (queries, items))]
    targets = generator.integers(0, items, queries)
    lists = [  # repeated values, values outside the catalogue, and the target itself
        generator.integers(-2, items + 2, generator.integers(0, 8)).tolist() for _ in range(queries)
    ]
    return scores, targets, lists, draw(st.integers(1, 4)), draw(st.integers(1, 10))


@settings(deadline=None)
@given(cases())
def test_ranks_equal_full_sorting(case: tuple) -> None:
    scores, targets, lists, query_block, item_block = case
    items = scores.shape[1]
    blocks = {"query_block": query_block, "item_block": item_block}
    for exclude, excluded in ((_lists(lists), lists), (None, [[] for _ in lists])):
        found = target_ranks(Table(scores), targets, exclude, items, **blocks)
        expected = [
            _sorted_items(row, [e for e in out if e != target]).index(target)
            for row, target, out in zip(scores, targets, excluded, strict=True)
        ]
        np.testing.assert_array_equal(found, np.array(expected, np.int64))


@settings(deadline=None)
@given(cases(), st.integers(1, 12))
def test_top_items_equal_full_sorting(case: tuple, k: int) -> None:
    scores, _, lists, query_block, item_block = case
    items = scores.shape[1]
    queries = np.arange(len(scores))[::-1].copy()
    best, ids = top_items(Table(scores), queries, k, _lists(lists), items, query_block, item_block)
    for position, query in enumerate(queries):
        order = _sorted_items(scores[query], lists[query])
        order = [item for item in order if scores[query, item] > -np.inf][:k]
        padding = k - len(order)
        assert ids[position].tolist() == order + [-1] * padding
        assert best[position].tolist() == scores[query, order].tolist() + [-np.inf] * padding


def test_only_blocks_are_asked_for_and_few_of_them_twice() -> None:
    generator = np.random.default_rng(0)
    table = Table(generator.random((64, 100)).astype(np.float32))
    assert isinstance(table, Scorer)
    target_ranks(table, generator.integers(0, 100, 64), None, 100, query_block=8, item_block=25)
    assert max(table.asked) == (8, 25)
    assert len(table.asked) <= 8 * 4 + 3  # every block once, and once more where targets straddle
    whole = Table(table.scores)
    target_ranks(whole, generator.integers(0, 100, 64), None, 100)
    assert whole.asked == [(64, 100)]


def test_target_in_the_excluded_list_still_counts() -> None:
    scores = np.array([[3, 2, 1]], np.float32)
    seen = Lists(np.array([0, 1, 2]), np.array([0, 3]))
    assert target_ranks(Table(scores), np.array([2]), seen, 3).tolist() == [0]


def test_errors_say_what_is_wrong() -> None:
    table = Table(np.zeros((2, 3), np.float32))
    with pytest.raises(DataError, match=r"targets 0 \.\. 3 are not all in the catalogue 0 \.\. 2"):
        target_ranks(table, np.array([0, 3]), None, 3)
    with pytest.raises(DataError, match="1 lists in exclude for 2 queries"):
        target_ranks(table, np.array([0, 1]), _lists([[0]]), 3)
    with pytest.raises(DataError, match="query 1 has no list among the 1 of exclude"):
        top_items(table, np.array([0, 1]), 1, _lists([[0]]), 3)
    with pytest.raises(ConfigError, match="k must be 1 or more, not 0"):
        top_items(table, np.array([0]), 0, None, 3)
    with pytest.raises(ConfigError, match="item_block 0: must be 1 or more"):
        target_ranks(table, np.array([0]), None, 3, item_block=0)
    with pytest.raises(
        DataError, match=r"Table.block gave scores of shape \(2, 3\) for 2 .* 4 items"
    ):
        target_ranks(table, np.array([0, 1]), None, 4)
    diverged = Table(np.array([[0, 1, 2], [0, np.nan, 2]], np.float32))
    with pytest.raises(DataError, match="not a number for query 1; look for a diverged model"):
        target_ranks(diverged, np.array([0, 0]), None, 3)
