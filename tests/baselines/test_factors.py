"""ALS and EASE beside the formulas of their papers, solved densely."""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np
import pytest

from mtrec_jax.baselines import Interactions, als
from mtrec_jax.baselines.als import Als
from mtrec_jax.baselines.ease import Ease, symmetric_inverse
from mtrec_jax.errors import ConfigError
from mtrec_jax.types import FIRST, Lists


def made_up(users: int, items: int, share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(3).random((users, items)) < share


def liked(seen: np.ndarray) -> Interactions:
    users, items = (side + FIRST for side in np.nonzero(seen))
    return Interactions(users, items, np.ones(len(users), bool), {}, {}, *seen.shape)


def histories(seen: np.ndarray) -> Lists:
    return Lists(np.nonzero(seen)[1] + FIRST, np.append(0, np.cumsum(seen.sum(1))))


def dense_rows(seen: np.ndarray, other: np.ndarray, options: Als) -> np.ndarray:
    """The systems of Rendle et al. (2022), one row after the other."""
    found = np.zeros((len(seen), other.shape[1]))
    for row, likes in enumerate(seen):
        theirs = other[likes].astype(np.float64)
        weight = (likes.sum() + options.unobserved * len(likes)) ** options.frequency
        matrix = theirs.T @ theirs + options.unobserved * other.T.astype(np.float64) @ other
        matrix += options.regularization * weight * np.eye(other.shape[1])
        found[row] = np.linalg.solve(matrix, theirs.sum(0)) if likes.any() else 0
    return found


# ---- ALS


@pytest.mark.parametrize("small_blocks", [False, True])
def test_als_users_solve_the_systems_of_the_paper(
    monkeypatch: pytest.MonkeyPatch, small_blocks: bool
) -> None:
    """With many steps each half of an epoch is exact; blocks may be cut anywhere."""
    if small_blocks:
        monkeypatch.setattr(als, "_CELLS", 2)
        monkeypatch.setattr(als, "_PIECES", 2)
        monkeypatch.setattr(als, "_ROWS", 3)
    seen = made_up(11, 9)
    seen[4] = False  # a user without likes
    seen[5] = True  # more pieces than a small block has
    seen[:, 2] = False  # an item that nobody likes
    options = Als(factors=4, epochs=2, unobserved=0.2, regularization=0.05, frequency=0.7, steps=60)
    fitted = options.fit(liked(seen))
    expected = dense_rows(seen, fitted.items[FIRST:], options)
    np.testing.assert_allclose(fitted.users[FIRST:], expected, rtol=2e-3, atol=1e-5)
    assert not fitted.users[:FIRST].any()
    assert not fitted.items[[0, 1, 2 + FIRST]].any()
    assert not fitted.users[4 + FIRST].any()

    # a history of nobody's, one of a user's with repeats and unknown ids, and an empty one
    asked = np.stack([np.arange(9) < 4, seen[0], np.zeros(9, bool)])
    first, second = np.flatnonzero(asked[0]) + FIRST, np.flatnonzero(asked[1]) + FIRST
    asked[0, 2] = False  # it was not trained, and says nothing
    odd = np.concatenate([second, second[:1], [0, 1, 99]])
    lists = Lists(
        np.concatenate([first, odd]), np.array([0, len(first), *[len(first) + len(odd)] * 2])
    )
    vectors = options.fold_in(fitted.items, lists)
    expected = dense_rows(asked, fitted.items[FIRST:], options)
    np.testing.assert_allclose(vectors, expected, rtol=1e-3, atol=1e-5)
    assert not options.fold_in(fitted.items, Lists(np.array([1]), np.array([0, 0, 1]))).any()
    scores = fitted.scorer(np.array([2, 3, 1]), lists).scores(np.array([1]))
    np.testing.assert_allclose(
        scores[0], expected[1] @ fitted.items[FIRST:].T, rtol=1e-3, atol=1e-5
    )


def test_als_on_many_devices_is_als_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(als, "_ROWS", 4)  # ten blocks of users on eight devices
    seen, options = made_up(40, 30), Als(factors=6, epochs=3)
    many = options.fit(liked(seen))
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    alone = options.fit(liked(seen))
    np.testing.assert_allclose(many.users, alone.users, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(many.items, alone.items, rtol=1e-4, atol=1e-6)


def test_als_lowers_its_objective_with_the_default_steps() -> None:
    seen = made_up(40, 30)

    def objective(epochs: int) -> float:
        options = Als(factors=6, epochs=epochs, unobserved=0.3, regularization=0.01)
        fitted = options.fit(liked(seen))
        users, items = fitted.users[FIRST:], fitted.items[FIRST:]
        product = users @ items.T
        loss = ((1 - product)[seen] ** 2).sum() + options.unobserved * (product**2).sum()
        for side, likes in ((users, seen), (items, seen.T)):
            weight = likes.sum(1) + options.unobserved * likes.shape[1]
            loss += options.regularization * (weight * (side**2).sum(1)).sum()
        return float(loss)

    found = [objective(epochs) for epochs in (1, 2, 4, 8, 16)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < seen.sum()  # that of zeros


def test_als_similar_ids_are_those_of_the_same_community() -> None:
    seen = np.kron(np.eye(2), np.ones((5, 4))) > 0
    seen[np.arange(10), np.arange(10) % 4 + 4 * (np.arange(10) >= 5)] = False
    fitted = Als(factors=2, regularization=0.001).fit(liked(seen))
    scores, ids = fitted.similar_items(np.array([2, 9]), 3)
    assert [set(row) for row in ids.tolist()] == [{3, 4, 5}, {6, 7, 8}]
    assert np.all(np.diff(scores, axis=1) <= 0)
    _, users = fitted.similar_users(np.array([2]), 9)
    assert set(users[0, :4].tolist()) == {3, 4, 5, 6}
    unit = fitted.users[FIRST:] / np.linalg.norm(fitted.users[FIRST:], axis=1, keepdims=True)
    np.testing.assert_allclose(
        fitted.similar_users(np.array([2]), 1)[0][0, 0], (unit[1:5] @ unit[0]).max(), rtol=1e-5
    )


def test_als_seeds_differ() -> None:
    seen = made_up(8, 6)
    one, other = (Als(factors=2, epochs=1, seed=seed).fit(liked(seen)).users for seed in (0, 1))
    assert not np.allclose(one, other)


# ---- EASE


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_ease_weights_are_those_of_the_paper(precision: Literal["float32", "float64"]) -> None:
    seen = made_up(20, 7)
    fitted = Ease(regularization=2.0, precision=precision).fit(liked(seen))
    inverse = np.linalg.inv(seen.T.astype(float) @ seen + 2 * np.eye(7))
    expected = np.eye(7) - inverse / np.diag(inverse)
    np.testing.assert_allclose(fitted.weights, expected, atol=1e-5)
    assert fitted.weights.dtype == np.float32
    assert not np.diag(fitted.weights).any()
    scores = fitted.scorer(np.arange(20) + FIRST, histories(seen)).scores(np.array([3, 1]))
    np.testing.assert_allclose(scores, seen[[3, 1]] @ expected, atol=1e-5)


def test_ease_weights_minimise_what_the_paper_minimises() -> None:
    """No step in any direction that keeps the diagonal at zero lowers the regularised error."""
    seen = made_up(30, 5).astype(np.float64)
    weights = Ease(regularization=3.0, precision="float64").fit(liked(seen > 0)).weights
    gradient = 2 * (seen.T @ (seen @ weights - seen) + 3 * weights)
    np.fill_diagonal(gradient, 0)
    np.testing.assert_allclose(gradient, 0, atol=1e-4)


def test_ease_says_which_items_speak_for_which() -> None:
    seen = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]]) > 0
    fitted = Ease(regularization=1.0).fit(liked(seen))
    scores, ids = fitted.similar_items(np.array([2, 4]), 2)
    assert ids.tolist() == [[3, 0], [5, 0]]  # nothing speaks for the other community
    assert scores[0, 0] == fitted.weights[0, 1]


def test_inverse_of_more_than_a_block() -> None:
    random = np.random.default_rng(0).normal(size=(1030, 1030))
    matrix = random @ random.T + 1030 * np.eye(1030)
    expected = np.linalg.inv(matrix)
    found = symmetric_inverse(matrix)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    with pytest.raises(ConfigError, match="cannot be inverted in float64; raise regularization"):
        symmetric_inverse(-np.eye(3))


def test_ease_refuses_a_catalogue_that_is_too_large() -> None:
    seen = made_up(3, 12)
    with pytest.raises(
        ConfigError, match=r"ease: 12 items are more than most_items = 11; .*item_knn"
    ):
        Ease(most_items=11).fit(liked(seen))
