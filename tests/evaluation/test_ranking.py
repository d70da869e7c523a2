"""Ranks and recommendations against sorting everything, for any blocks, ties and exclusions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.baselines import Scorer
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation import ranking
from mtrec_jax.evaluation.ranking import ranks_and_lists, target_ranks, top_items
from mtrec_jax.types import Lists


@dataclass(frozen=True)
class Table:
    """Scores from a matrix, and a diary of what was asked."""

    table: np.ndarray  # [Q, N]
    asked: list[list[int]] = field(default_factory=list)

    def scores(self, queries: np.ndarray) -> np.ndarray:
        self.asked.append(queries.tolist())
        return self.table[queries]


def _lists(lists: list[list[int]]) -> Lists:
    offsets = np.cumsum([0, *map(len, lists)])
    return Lists(np.array([value for part in lists for value in part], np.int64), offsets)


def _sorted_items(scores: np.ndarray, excluded: list[int]) -> list[int]:
    """Admissible items of one query: by score, then by index."""
    return sorted(set(range(len(scores))) - set(excluded), key=lambda item: (-scores[item], item))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]], int]:
    queries, items = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = np.array([-np.inf, -1, 0, 0.5, 2], np.float32)  # few, so that ties abound
    scores = levels[generator.integers(0, len(levels), (queries, items))]
    targets = generator.integers(0, items, queries)
    lists = [  # repeated values, values outside the catalogue, and the target itself
        generator.integers(-2, items + 2, generator.integers(0, 8)).tolist() for _ in range(queries)
    ]
    return scores, targets, lists, draw(st.integers(1, 40))


@settings(deadline=None)
@given(cases())
def test_ranks_equal_full_sorting(case: tuple) -> None:
    scores, targets, lists, cells = case
    for exclude, excluded in ((_lists(lists), lists), (None, [[] for _ in lists])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "CELLS", cells)
            found = target_ranks(Table(scores), targets, exclude, scores.shape[1])
        expected = [
            _sorted_items(row, [e for e in out if e != target]).index(target)
            for row, target, out in zip(scores, targets, excluded, strict=True)
        ]
        np.testing.assert_array_equal(found, np.array(expected, np.int64))


@settings(deadline=None)
@given(cases(), st.integers(1, 12))
def test_top_items_equal_full_sorting(case: tuple, k: int) -> None:
    scores, _, lists, cells = case
    queries = np.arange(len(scores))[::-1].copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CELLS", cells)
        best, ids = top_items(Table(scores), queries, k, _lists(lists), scores.shape[1])
    for position, query in enumerate(queries):
        order = _sorted_items(scores[query], lists[query])
        order = [item for item in order if scores[query, item] > -np.inf][:k]
        padding = k - len(order)
        assert ids[position].tolist() == order + [-1] * padding
        assert best[position].tolist() == scores[query, order].tolist() + [-np.inf] * padding


def test_queries_are_asked_for_in_blocks_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    table = Table(generator.random((10, 100)).astype(np.float32))
    assert isinstance(table, Scorer)
    monkeypatch.setattr(ranking, "CELLS", 400)
    target_ranks(table, generator.integers(0, 100, 10), None, 100)
    assert table.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_ranks_and_lists_among_some_items_alone() -> None:
    scorer, among = Table(np.array([[5.0, 4, 3, 2, 1]])), np.array([False, True, True, False, True])
    ranks, lists = ranks_and_lists(scorer, np.array([2]), _lists([[1]]), 3, 5, among)
    assert (ranks.tolist(), lists.tolist()) == ([0], [[2, 4, -1]])


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
    with pytest.raises(DataError, match=r"Table.scores has shape \(2, 3\) for 2 .* 4 items"):
        target_ranks(table, np.array([0, 1]), None, 4)
    diverged = Table(np.array([[0, 1, 2], [0, np.nan, 2]], np.float32))
    with pytest.raises(
        DataError, match="score of query 1 is not a number; look for a diverged model"
    ):
        target_ranks(diverged, np.array([0, 0]), None, 3)
