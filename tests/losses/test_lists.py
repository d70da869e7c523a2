"""Pairwise and listwise losses on lists worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.losses.lists import LISTS, listwise, pairwise

SCORES = np.array([[1.0, -0.5, 2.0, 0.5], [0.3, 0.1, 0.0, 9.0]], np.float32)
LABELS = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
THERE = np.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]], np.float32)
ALL = np.ones((2, 4, 4), np.float32)


def _lost(low: float, high: float) -> float:
    return float(np.log1p(np.exp(low - high)))


def test_pairwise_is_the_mean_of_the_pairs_of_a_list() -> None:
    """Burges et al. 2005: two clicks (1 and 1/2) against two others (-1/2 and 2); nobody clicked in
    the other list."""
    found = jax.jit(pairwise)(*map(jnp.asarray, (SCORES, LABELS, THERE, ALL)))
    pairs = [_lost(low, high) for high in (1.0, 0.5) for low in (-0.5, 2.0)]
    np.testing.assert_allclose(found, [[float(np.mean(pairs))] * 4, [0.0] * 4], rtol=1e-5)


def test_listwise_is_a_softmax_over_the_list() -> None:
    """Bruch et al. 2019: -log of each click's share, on average; what is not there has none."""
    found = jax.jit(listwise)(*map(jnp.asarray, (SCORES, LABELS, THERE, ALL)))
    shares = np.exp(SCORES[0]) / np.exp(SCORES[0]).sum()
    np.testing.assert_allclose(found, [[-np.log(shares[[0, 3]]).mean()] * 4, [0] * 4], rtol=1e-5)
    graded = np.array([[3.0, 0.0, 0.0, 1.0]] * 2, np.float32)
    found = jax.jit(listwise)(*map(jnp.asarray, (SCORES, graded, THERE, ALL)))
    expected = -(3 * np.log(shares[0]) + np.log(shares[3])) / 4
    np.testing.assert_allclose(found[0], [expected] * 4, rtol=1e-5)


def test_pairs_are_of_any_order_of_numbers_and_of_one_list() -> None:
    """Stars 5, 3, 1 and 3, the first two shown at one time and the last two at another: one pair
    in each, 5 over 3 and 3 over 1."""
    labels = np.array([[5.0, 3.0, 1.0, 3.0]], np.float32)
    time = np.array([0, 0, 1, 1])
    together = (time[:, None] == time[None]).astype(np.float32)[None]
    given = SCORES[:1], labels, THERE[:1], together
    found = jax.jit(pairwise)(*map(jnp.asarray, given))
    first, second = _lost(-0.5, 1.0), _lost(2.0, 0.5)
    np.testing.assert_allclose(found, [[first, first, second, second]], rtol=1e-5)
    shares = [np.exp(s) / np.exp(s).sum() for s in (SCORES[0, :2], SCORES[0, 2:])]
    found = jax.jit(listwise)(*map(jnp.asarray, given))
    expected = [
        -(labels[0, 2 * n : 2 * n + 2] @ np.log(shares[n])) / c for n, c in ((0, 8), (1, 4))
    ]
    np.testing.assert_allclose(found, [np.repeat(expected, 2)], rtol=1e-5)


@pytest.mark.parametrize("loss", LISTS)
def test_a_weight_counts_examples(loss: str) -> None:
    """An example of weight 2 is two of weight 1; one of weight 0, whatever it says, is none. So are
    the gradients."""

    def total(scores: Any, labels: Any, weight: Any) -> jax.Array:
        n = len(weight)
        one = (jnp.asarray(x, jnp.float32)[None] for x in (scores, labels, weight))
        scores, labels, weight = one
        return jnp.sum(LISTS[loss](scores, labels, weight, jnp.ones((1, n, n))) * weight)

    run = jax.jit(jax.value_and_grad(total))
    scores, labels = np.array([0.4, -1.0, 2.0, 0.1]), np.array([1.0, 0.0, 1.0, 0.0])
    value, gradient = run(scores, labels, np.array([2.0, 1.0, 0.0, 3.0]))
    places = np.array([0, 0, 1, 3, 3, 3])
    again, parts = run(scores[places], labels[places], np.ones(6))
    np.testing.assert_allclose(value, again, rtol=1e-5)
    np.testing.assert_allclose(gradient, np.bincount(places, parts, 4), rtol=1e-4, atol=1e-6)
    assert gradient[2] == 0
    empty, nothing = run(scores, labels, np.zeros(4))
    assert empty == 0
    np.testing.assert_array_equal(nothing, 0)
