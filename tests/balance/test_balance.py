"""Task weights: declared ones stay, uncertainty finds the reciprocal of the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mtrec_jax.balance.balance import Balancer, static, uncertainty

DECLARED = jnp.array([1.0, 0.5, 2.0])
LOSSES = jnp.array([0.1, 4.0, 1.0])
SEEN = jnp.array([True, True, True])


def _after(balancer: Balancer, steps: int) -> np.ndarray:
    def step(state: object, _: None) -> tuple[object, jax.Array]:
        return balancer.learn(state, LOSSES, SEEN), balancer.weights(state)

    return np.asarray(jax.lax.scan(step, balancer.init(), length=steps)[1])


def test_static_weights_are_the_declared_ones_whatever_the_losses() -> None:
    np.testing.assert_array_equal(_after(static(DECLARED), 5), np.tile(DECLARED, (5, 1)))


def test_uncertainty_starts_at_the_declared_weights_and_tends_to_weight_over_loss() -> None:
    weights = _after(uncertainty(DECLARED), 2_000)
    np.testing.assert_allclose(weights[0], DECLARED)
    np.testing.assert_allclose(weights[-1], DECLARED / LOSSES, rtol=1e-4)
    # monotone on the way: up where the loss is below 1, down where it is above
    assert (np.diff(weights[:, 0]) >= -1e-5).all()
    assert (np.diff(weights[:, 1]) <= 1e-5).all()


def test_uncertainty_stays_finite_for_a_task_that_is_never_observed() -> None:
    balancer = uncertainty(DECLARED, learning_rate=10.0)
    state = balancer.learn(jnp.zeros(3), jnp.array([0.0, 0.0, 1e12]), SEEN)
    assert np.isfinite(np.asarray(balancer.weights(state))).all()
    assert np.isfinite(np.exp(np.asarray(state))).all()


def test_a_task_without_labels_in_the_batch_keeps_its_uncertainty() -> None:
    observed = jnp.array([True, False, True])
    state = jnp.array([0.5, 0.5, 0.5])
    moved = uncertainty(DECLARED).learn(state, jnp.array([0.5, 0.0, 0.5]), observed)
    assert float(moved[1]) == 0.5
    assert float(moved[0]) != 0.5
