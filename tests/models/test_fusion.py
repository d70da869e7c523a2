"""The fused order: a convex weighting of the tasks that cannot disturb them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.models.fusion import AttentionFusion

N, CONTEXT, TASKS, HIDDEN = 9, 4, 3, 5


@pytest.fixture
def fusion() -> AttentionFusion:
    return AttentionFusion(CONTEXT, TASKS, HIDDEN, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def _inputs() -> tuple[jax.Array, list[jax.Array | None], list[jax.Array]]:
    keys = jax.random.split(jax.random.key(1), 5)
    hidden = [None, *(jax.random.normal(k, (N, HIDDEN)) for k in keys[:2])]  # retrieval: no tower
    scores = [3 * jax.random.normal(k, (N,)) for k in jax.random.split(keys[2], TASKS)]
    return jax.random.normal(keys[3], (N, CONTEXT)), hidden, scores


def test_fused_score_is_the_weighted_mean_of_the_calibrated_scores(fusion: AttentionFusion) -> None:
    context, hidden, scores = _inputs()
    fusion.gain[...] = jnp.array([-2.0, 0.3, 4.0])
    fusion.bias[...] = jnp.array([0.5, -1.0, 2.0])
    fused, weights = fusion(context, hidden, scores)
    assert weights.shape == (N, TASKS)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (weights > 0).all()
    assert np.ptp(weights, axis=0).min() > 1e-3  # another user, another weighting
    gain = np.log1p(np.exp([-2.0, 0.3, 4.0]))
    calibrated = gain * np.stack(scores, axis=1) + np.array([0.5, -1.0, 2.0])
    np.testing.assert_allclose(fused, (np.asarray(weights) * calibrated).sum(axis=1), rtol=1e-5)


def test_initial_gains_are_one(fusion: AttentionFusion) -> None:
    context, hidden, scores = _inputs()
    fused, weights = fusion(context, hidden, scores)
    np.testing.assert_allclose(fused, (weights * jnp.stack(scores, 1)).sum(axis=1), rtol=1e-3)


def test_gain_is_positive_whatever_was_learned(fusion: AttentionFusion) -> None:
    fusion.gain[...] = jnp.full((TASKS,), -5.0)
    context, hidden, scores = _inputs()
    before, _ = fusion(context, hidden, scores)
    for t in range(TASKS):
        better = [score + 10 * (i == t) for i, score in enumerate(scores)]
        assert (fusion(context, hidden, better)[0] > before).all()


def test_no_gradient_reaches_the_tasks(fusion: AttentionFusion) -> None:
    graph, state = nnx.split(fusion)

    def total(inputs: tuple, state: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state)(*inputs)[0] ** 2)

    to_inputs, to_fusion = jax.jit(jax.grad(total, argnums=(0, 1)))(_inputs(), state)
    for gradient in jax.tree.leaves(to_inputs):
        np.testing.assert_array_equal(gradient, 0)
    for gradient in jax.tree.leaves(to_fusion):
        assert np.abs(gradient).max() > 0
