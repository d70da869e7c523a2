"""Shapes that tests and benchmarks share, so that what is timed is also what is checked."""

from __future__ import annotations

from typing import NamedTuple


class Scoring(NamedTuple):
    """One cosine top-k problem."""

    queries: int  # Q
    items: int  # N
    width: int  # D
    results: int  # K
    excluded: int = 0  # X


SMALL_SCORING = (
    Scoring(queries=1, items=1, width=1, results=1),
    Scoring(queries=3, items=7, width=5, results=10, excluded=2),
    Scoring(queries=17, items=1_000, width=33, results=20, excluded=13),
    Scoring(queries=5, items=9_001, width=64, results=10, excluded=1),
    Scoring(queries=300, items=500, width=8, results=3, excluded=4),
)
QUICK_SCORING = Scoring(queries=64, items=20_000, width=64, results=10)
SHOP_SCORING = Scoring(queries=256, items=200_000, width=64, results=10)
