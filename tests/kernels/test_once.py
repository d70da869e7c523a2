"""A catalogue that is searched once: the bits of the reference, and the index for what is odd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mtrec_jax.errors import DataError
from mtrec_jax.kernels import cosine_topk, dot_topk, once

RNG = np.random.default_rng(0)
COUNT = 2 * once.BLOCK + 809  # the last block is not full, nor its last group
ITEMS = RNG.normal(size=(COUNT, 16)).astype(np.float32)
QUERIES = np.concatenate([RNG.normal(size=(4, 16)), ITEMS[-1:]]).astype(np.float32)
METRICS: dict[str, Any] = {"cosine": cosine_topk, "dot": dot_topk}


@pytest.mark.parametrize("metric", METRICS)
def test_as_the_reference_to_the_last_bit(metric: str) -> None:
    assert once.serves(QUERIES, ITEMS, 10)
    found = once.topk(QUERIES, ITEMS, 10, metric)
    assert found is not None
    expected = METRICS[metric](QUERIES, ITEMS, 10, implementation="reference")
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1].dtype == np.int32
    assert (metric == "dot") | (found[1][4, 0] == COUNT - 1)


def test_close_scores_are_settled_by_their_bits() -> None:
    """Scores within the rounding of products, and pairs of rows that tie."""
    items = (1 + 2e-2 * ITEMS).astype(np.float32)
    items[5000:5040] = items[:40]
    found = once.topk(items[:5], items, 10, "cosine")
    expected = cosine_topk(items[:5], items, 10, implementation="reference")
    assert found is not None
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1][0, :2].tolist() == [0, 5000]


@pytest.mark.slow
def test_odd_catalogues_are_left_to_an_index() -> None:
    for row, value in ((COUNT - 1, 0), (3, 1e20)):
        items = ITEMS.copy()
        items[row] = value
        assert once.topk(QUERIES, items, 10, "cosine") is None
    assert once.topk(QUERIES, np.ones_like(ITEMS), 10, "cosine") is None  # all score the same
    assert cosine_topk(QUERIES[:1], np.ones_like(ITEMS), 3)[1].tolist() == [[0, 1, 2]]
    for other in (ITEMS.astype(np.float16), ITEMS[: once.BLOCK - 1]):
        assert not once.serves(QUERIES, other, 10)


def test_what_is_not_finite_is_named() -> None:
    queries, items = QUERIES.copy(), ITEMS.copy()
    queries[2, 0] = np.nan
    with pytest.raises(DataError, match="queries row 2 holds NaN"):
        cosine_topk(queries, ITEMS, 3)
    far = QUERIES.astype(np.float64)
    far[1, 1] = 1e200
    with pytest.raises(DataError, match=r"queries row 1 holds .* infinite in float32"):
        cosine_topk(far, ITEMS, 3)
    items[7, 3] = np.inf
    with pytest.raises(DataError, match="items row 7 holds NaN"):
        cosine_topk(QUERIES, items, 3)
    with pytest.raises(DataError, match="overflow float32; divide one of them"):
        dot_topk(QUERIES * np.float32(1e30), ITEMS * np.float32(1e10), 3)
