"""The fused order: a convex weighting of the tasks that cannot disturb them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.models.fusion import AttentionFusion
from mtrec_jax.types import Fusing

N, STATE, HIDDEN = 9, 4, 5
TASKS = ("next", "click", "buy")


@pytest.fixture
def fusion() -> AttentionFusion:
    return AttentionFusion(STATE, TASKS, HIDDEN, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def _given() -> Fusing:
    keys = jax.random.split(jax.random.key(1), 6)
    hidden = {t: jax.random.normal(k, (N, HIDDEN)) for t, k in zip(TASKS[1:], keys, strict=False)}
    scores = {t: 3 * jax.random.normal(k, (N,)) for t, k in zip(TASKS, keys[2:], strict=False)}
    return Fusing(jax.random.normal(keys[5], (N, STATE)), hidden, scores)  # retrieval: no tower


def _stacked(scores: dict[str, jax.Array]) -> np.ndarray:
    return np.stack([scores[task] for task in TASKS], axis=1)


def test_fused_score_is_the_weighted_mean_of_the_calibrated_scores(fusion: AttentionFusion) -> None:
    given = _given()
    fusion.gain[...] = jnp.array([-2.0, 0.3, 4.0])
    fusion.bias[...] = jnp.array([0.5, -1.0, 2.0])
    fused, weights = fusion(given)
    assert weights.shape == (N, 3)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (weights > 0).all()
    assert np.ptp(weights, axis=0).min() > 1e-3  # another user, another weighting
    gain = np.log1p(np.exp([-2.0, 0.3, 4.0]))
    calibrated = gain * _stacked(given.scores) + np.array([0.5, -1.0, 2.0])
    np.testing.assert_allclose(fused, (np.asarray(weights) * calibrated).sum(axis=1), rtol=1e-5)


def test_initial_gains_are_one(fusion: AttentionFusion) -> None:
    given = _given()
    fused, weights = fusion(given)
    np.testing.assert_allclose(fused, (weights * _stacked(given.scores)).sum(axis=1), rtol=1e-3)


def test_gain_is_positive_whatever_was_learned(fusion: AttentionFusion) -> None:
    fusion.gain[...] = jnp.full((3,), -5.0)
    given = _given()
    before, _ = fusion(given)
    for task in TASKS:
        better = given.scores | {task: given.scores[task] + 10}
        assert (fusion(given._replace(scores=better))[0] > before).all()


def test_no_gradient_reaches_the_tasks(fusion: AttentionFusion) -> None:
    graph, state = nnx.split(fusion)

    def total(given: Fusing, state: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state)(given)[0] ** 2)

    to_given, to_fusion = jax.jit(jax.grad(total, argnums=(0, 1)))(_given(), state)
    for gradient in jax.tree.leaves(to_given):
        np.testing.assert_array_equal(gradient, 0)
    for gradient in jax.tree.leaves(to_fusion):
        assert np.abs(gradient).max() > 0
