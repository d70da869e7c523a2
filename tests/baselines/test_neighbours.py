"""Weighted neighbours of items and users, by hand and beside dense computations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.baselines import Interactions, SimilarItems, SimilarUsers, neighbours
from mtrec_jax.baselines.item_knn import ItemKnn
from mtrec_jax.baselines.user_knn import UserKnn
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import FIRST, Lists


def liked(seen: Any) -> Interactions:
    """The log of a matrix [U, N] of likes."""
    seen = np.asarray(seen)
    users, items = (side + FIRST for side in np.nonzero(seen))
    likes = np.ones(len(users), bool)
    return Interactions(users, items, likes, {}, {}, *seen.shape)


def rows_of(seen: Any) -> Lists:
    """The rows of a matrix of likes as histories of item ids."""
    seen = np.asarray(seen)
    return Lists(np.nonzero(seen)[1] + FIRST, np.append(0, np.cumsum(seen.sum(1))))


SMALL = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]])  # items have 3, 2, 1 users


def test_shrinkage_by_hand() -> None:
    similarity = ItemKnn(shrinkage=3.0).fit(liked(SMALL)).similarity.toarray()
    expected = np.zeros((3, 3))
    expected[0, 1] = expected[1, 0] = 2 / np.sqrt(3 * 2) * 2 / (2 + 3)
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(3 * 1) * 1 / (1 + 3)
    expected[1, 2] = expected[2, 1] = 1 / np.sqrt(2 * 1) * 1 / (1 + 3)
    np.testing.assert_allclose(similarity, expected, rtol=1e-6)


def test_tfidf_by_hand() -> None:
    similarity = ItemKnn(weights="tfidf", shrinkage=1.0).fit(liked(SMALL)).similarity.toarray()
    weight = np.log(4 / np.array([3, 2, 1]))  # three items, of which the users like 3, 2, 1
    rows = SMALL.T * weight
    norm = np.linalg.norm(rows, axis=1)
    assert similarity[0, 1] == pytest.approx(rows[0] @ rows[1] / norm[0] / norm[1] * 2 / 3)
    assert similarity[1, 2] == pytest.approx(rows[1] @ rows[2] / norm[1] / norm[2] * 1 / 2)


def test_bm25_by_hand() -> None:
    similarity = ItemKnn(weights="bm25").fit(liked(SMALL)).similarity.toarray()
    having = np.array([3, 2, 1])  # items of each user, and users of each item
    weight = np.log(1 + (3 - having + 0.5) / (having + 0.5))
    saturation = 2.2 / (1 + 1.2 * (0.25 + 0.75 * having / 2))  # a mean of 2 users an item
    rows = SMALL.T * weight * saturation[:, None]
    assert similarity[0, 1] == pytest.approx(rows[0] @ rows[1], rel=1e-6)
    assert similarity[1, 2] == pytest.approx(rows[1] @ rows[2], rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["binary", "tfidf", "bm25"]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([1, 40, 1 << 25]),
)
def test_users_equal_a_dense_computation_in_any_blocks(
    seed: int, weights: neighbours.Weights, shrinkage: float, work: int
) -> None:
    """Neighbours and scores, of training histories and of others."""
    random = np.random.default_rng(seed)
    seen, asked = random.random((9, 8)) < 0.4, random.random((9, 8)) < 0.4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_WORK", work)
        options = UserKnn(neighbours=3, weights=weights, shrinkage=shrinkage)
        fitted = options.fit(liked(seen))
        users = np.arange(9) + FIRST
        trained = fitted.scorer(users, rows_of(seen)).scores(np.arange(9))
        others = fitted.scorer(users, rows_of(asked)).scores(np.arange(9))

    having = seen.sum(0)
    weight = np.ones(8)
    if weights == "tfidf":
        weight = np.log(10 / np.maximum(having, 1))
    elif weights == "bm25":
        weight = np.log(1 + (9 - having + 0.5) / (having + 0.5))

    def weighted(rows: np.ndarray) -> np.ndarray:
        length = rows.sum(1, keepdims=True) / max(seen.sum() / 9, 1e-9)
        if weights == "bm25":
            return rows * weight * 2.2 / (1 + 1.2 * (0.25 + 0.75 * length))
        return (
            rows * weight / np.maximum(np.linalg.norm(rows * weight, axis=1, keepdims=True), 1e-9)
        )

    for rows, found in ((seen, trained), (asked, others)):
        common = rows.astype(float) @ seen.T
        similar = weighted(rows) @ weighted(seen).T
        if shrinkage:
            similar = similar * common / (common + shrinkage)
        np.fill_diagonal(similar, 0)
        # what comes fourth may be equal to the third but for rounding: leave such rows out
        ordered = -np.sort(-similar, axis=1)
        clear = (ordered[:, 2] - ordered[:, 3] > 1e-5) | (ordered[:, 2] < 1e-9)
        last = np.maximum(ordered[:, 2:3], 1e-12)
        expected = np.where(similar >= last - 1e-6, similar, 0) @ seen
        np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-4, atol=1e-5)


def test_nobody_is_a_neighbour_of_their_own() -> None:
    """Whoever asks with more than the training history would be their own nearest user."""
    seen = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    fitted = UserKnn(neighbours=1).fit(liked(seen))
    history = Lists(np.array([2, 3, 5, 2, 3, 5]), np.array([0, 3, 6]))  # items 0, 1, 3
    own, stranger = fitted.scorer(np.array([2, 1]), history).scores(np.array([0, 1]))
    near = 1 / np.sqrt(3 * 2)
    np.testing.assert_allclose(own, [near, 0, near, 0, 0], rtol=1e-6)  # of 1 and 2 the lower one
    np.testing.assert_allclose(stranger, 2 * near * seen[0], rtol=1e-6)


def test_similar_items_and_users() -> None:
    items, users = ItemKnn().fit(liked(SMALL)), UserKnn(neighbours=1).fit(liked(SMALL))
    assert isinstance(items, SimilarItems)
    assert isinstance(users, SimilarUsers)
    scores, ids = items.similar_items(np.array([4, 2, 1, 0]), 3)
    assert ids.tolist() == [[3, 2, 0], [3, 4, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(scores[0], [1 / np.sqrt(2), 1 / np.sqrt(3), -np.inf], rtol=1e-6)
    assert users.similar_users(np.array([2, 4]), 2)[1].tolist() == [[3, 0], [3, 0]]  # one is kept
    equal = UserKnn().fit(liked(np.ones((4, 2))))
    assert equal.similar_users(np.array([3]), 2)[1].tolist() == [[2, 4]]  # ties: the lower id
    with pytest.raises(DataError, match=r"similar_items: ids 5 \.\. 5 go beyond 0 \.\. 4"):
        items.similar_items(np.array([5]), 1)
    with pytest.raises(ConfigError, match="similar_users: k must be 1 or more, not 0"):
        users.similar_users(np.array([2]), 0)
