"""Balancing methods against their papers, on cases worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.balance import BALANCERS, Balancer, Gradients, Pullback
from mtrec_jax.balance.gradnorm import GradNorm, State, weight_gradient
from mtrec_jax.balance.pcgrad import PCGrad, projected
from mtrec_jax.balance.static import Static
from mtrec_jax.balance.uncertainty import Uncertainty

KEY = jax.random.key(0)
DECLARED = jnp.array([1.0, 0.5, 2.0])
LOSSES = jnp.array([0.1, 4.0, 1.0])
SEEN = jnp.array([True, True, True])
# gradients of three tasks at a shared representation of two arrays, and at heads of their own
TO_SHARED = np.array([[1.0, 0.0, 2.0], [-1.0, 2.0, 0.0], [0.5, -1.0, -2.0]])
TO_HEADS = np.diag([1.0, 10.0, 100.0])


def pullback_of(to_shared: np.ndarray, losses: Any = LOSSES) -> Pullback:
    """Linear in the weights, as every backward pass is."""

    def pullback(weights: jax.Array) -> Gradients:
        shared, heads = weights @ jnp.asarray(to_shared), weights @ jnp.asarray(TO_HEADS)
        return Gradients(jnp.asarray(losses), {"a": heads}, (shared[:1], shared[1:]))

    return pullback


def _shared(found: Gradients) -> np.ndarray:
    return np.concatenate(jax.tree.leaves(found.shared))


def _weights_over(balancer: Balancer, steps: int) -> np.ndarray:
    """The weights of each step, read off the heads' gradients."""

    def step(state: Any, _: None) -> tuple[Any, jax.Array]:
        found, state = balancer.combine(pullback_of(TO_SHARED), SEEN, state, KEY)
        return state, found.heads["a"] / jnp.array([1.0, 10.0, 100.0])

    return np.asarray(jax.lax.scan(step, balancer.init(), length=steps)[1])


@pytest.mark.parametrize("kind", BALANCERS)
def test_all_begin_with_the_declared_weights(kind: str) -> None:
    """At the heads, which belong to a task each: what is done about shared parts is another
    matter. The losses are handed through, and the program may be compiled."""
    balancer = BALANCERS[kind]().make(DECLARED)

    @jax.jit
    def run() -> tuple[Gradients, Any]:
        return balancer.combine(pullback_of(TO_SHARED), SEEN, balancer.init(), KEY)

    found, state = run()
    np.testing.assert_array_equal(found.losses, LOSSES)
    np.testing.assert_allclose(found.heads["a"], DECLARED @ TO_HEADS, rtol=1e-6)
    if kind != "pcgrad":
        np.testing.assert_allclose(_shared(found), DECLARED @ TO_SHARED, rtol=1e-6)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, balancer.init()
    )
    assert all(jax.tree.leaves(same))
    assert balancer.in_parts == (kind in ("static", "uncertainty"))


# --- Static


def test_static_weights_are_the_declared_ones_whatever_the_losses() -> None:
    found = _weights_over(Static().make(DECLARED), 5)
    np.testing.assert_allclose(found, np.tile(DECLARED, (5, 1)), rtol=1e-6)


# --- Uncertainty, Kendall et al. 2018


def test_uncertainty_descends_its_objective_with_the_weight_on_the_variance_too() -> None:
    """By hand: d/ds of w (exp(-s) L + s) at s = 0 is w (1 - L) = 0.9, -1.5, 0, so that
    s = -0.1 times these, and the next weights are w exp(-s)."""
    balancer = Uncertainty(learning_rate=0.1).make(DECLARED)
    _, state = balancer.combine(pullback_of(TO_SHARED), SEEN, balancer.init(), KEY)
    np.testing.assert_allclose(state, [-0.09, 0.15, 0.0], atol=1e-7)
    found, _ = balancer.combine(pullback_of(TO_SHARED), SEEN, state, KEY)
    weights = [np.exp(0.09), 0.5 * np.exp(-0.15), 2.0]
    np.testing.assert_allclose(_shared(found), weights @ TO_SHARED, rtol=1e-6)


def test_uncertainty_starts_at_the_declared_weights_and_tends_to_weight_over_loss() -> None:
    weights = _weights_over(Uncertainty().make(DECLARED), 3_000)
    np.testing.assert_allclose(weights[0], DECLARED, rtol=1e-6)
    np.testing.assert_allclose(weights[-1], DECLARED / LOSSES, rtol=1e-4)
    # monotone on the way: up where the loss is below 1, down where it is above
    assert (np.diff(weights[:, 0]) >= -1e-5).all()
    assert (np.diff(weights[:, 1]) <= 1e-5).all()


def test_uncertainty_stays_finite_whatever_the_losses() -> None:
    balancer = Uncertainty(learning_rate=10.0).make(DECLARED)
    extreme = pullback_of(TO_SHARED, jnp.array([0.0, 0.0, 1e12]))
    _, state = balancer.combine(extreme, SEEN, balancer.init(), KEY)
    found, state = balancer.combine(extreme, SEEN, state, KEY)
    assert np.isfinite(_shared(found)).all()
    assert np.isfinite(np.asarray(state)).all()


def test_a_task_without_labels_in_the_batch_keeps_its_uncertainty() -> None:
    observed, state = jnp.array([True, False, True]), jnp.array([0.5, 0.5, 0.5])
    given = pullback_of(TO_SHARED, jnp.array([0.5, 0.0, 0.5]))
    _, moved = Uncertainty().make(DECLARED).combine(given, observed, state, KEY)
    assert float(moved[1]) == 0.5
    assert float(moved[0]) != 0.5


# --- PCGrad, Yu et al. 2020


def surgery(gradients: np.ndarray, orders: list[list[int]]) -> np.ndarray:
    """Algorithm 1: each g_i, minus its projections on the *original* g_j, in the given order."""
    projections = []
    for i, order in enumerate(orders):
        own = gradients[i].copy()
        for j in order:
            inner = own @ gradients[j]
            if j != i and inner < 0:
                own -= inner / (gradients[j] @ gradients[j]) * gradients[j]
        projections.append(own)
    return np.sum(projections, axis=0)


def _pcgrad(to_shared: np.ndarray, key: jax.Array = KEY, declared: Any = None) -> np.ndarray:
    declared = jnp.ones(len(to_shared)) if declared is None else declared
    balancer = PCGrad().make(declared)

    def pullback(weights: jax.Array) -> Gradients:
        return Gradients(weights, (), weights @ jnp.asarray(to_shared, jnp.float32))

    seen = jnp.ones(len(to_shared), bool)
    return np.asarray(balancer.combine(pullback, seen, balancer.init(), key)[0].shared)


def test_pcgrad_of_two_tasks_by_hand() -> None:
    """g1 = (1, 0), g2 = (-1, sqrt 3): g1 . g2 = -1, |g1|^2 = 1, |g2|^2 = 4.

    g1' = g1 + 1/4 g2 = (3/4, sqrt(3)/4), g2' = g2 + g1 = (0, sqrt 3).
    """
    root = 3**0.5
    found = _pcgrad(np.array([[1.0, 0.0], [-1.0, root]]))
    np.testing.assert_allclose(found, [0.75, 1.25 * root], rtol=1e-6)
    # declared weights belong to the gradients: with w = (1, 2), g2 is twice as long.
    # g1 . g2 = -2, |g2|^2 = 16: g1' = g1 + 1/8 (2 g2) as before, g2' = 2 g2 + 2 g1
    found = _pcgrad(np.array([[1.0, 0.0], [-1.0, root]]), declared=jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(found, [0.75, 2.25 * root], rtol=1e-6)


def test_pcgrad_leaves_gradients_that_agree_as_they_are() -> None:
    agreeing = np.array([[1.0, 0.0], [1.0, 3.0], [0.0, 2.0]])  # the last is at right angles
    np.testing.assert_allclose(_pcgrad(agreeing), agreeing.sum(axis=0), rtol=1e-6)


def test_pcgrad_of_a_gradient_of_zero_is_finite() -> None:
    found = _pcgrad(np.array([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]))
    np.testing.assert_allclose(found, [0.0, 0.0], atol=1e-6)  # the two cancel to the last bit


def test_pcgrad_of_three_tasks_in_every_order() -> None:
    """g1 = (1, 0), g2 = (-1, 1), g3 = (-1, -1): both others conflict with g1, and g2 . g3 = 0.

    g1' is (0, 0) in either order: g1 + 1/2 g2 = (1/2, 1/2), whose product with g3 is -1, + 1/2 g3.
    g2' in the order (3, 1): g2 + g1 = (0, 1). In the order (1, 3) that is asked next: its product
    with g3 is -1, and (0, 1) + 1/2 g3 = (-1/2, 1/2). g3' likewise: (0, -1) or (-1/2, -1/2).
    """
    by_hand = np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]])
    sums = {(0.0, 0.0), (-0.5, 0.5), (-0.5, -0.5), (-1.0, 0.0)}
    found = [_pcgrad(by_hand, jax.random.key(seed)) for seed in range(40)]
    assert {tuple((np.round(one, 5) + 0).tolist()) for one in found} == sums


def test_pcgrad_projects_against_the_original_gradients_of_the_others() -> None:
    """Against those that are projected already the sum would be another one."""
    gradients = np.array([[1.0, 0.0], [-1.0, 0.5], [0.3, -2.0]])
    mixing = np.asarray(projected(jnp.asarray(gradients @ gradients.T, jnp.float32), KEY))
    own = [[[a, b], [b, a]] for a, b in ((1, 2), (0, 2), (0, 1))]
    possible = [surgery(gradients, list(orders)) for orders in itertools.product(*own)]
    assert np.abs(np.array(possible) - mixing @ gradients).max(axis=1).min() < 1e-5

    def against_projected() -> np.ndarray:
        changed = gradients.copy()
        for i, j in itertools.permutations(range(3), 2):
            inner = changed[i] @ changed[j]
            if inner < 0:
                changed[i] -= inner / (changed[j] @ changed[j]) * changed[j]
        return changed.sum(axis=0)

    assert np.abs(np.array(possible) - against_projected()).max(axis=1).min() > 1e-2


# --- GradNorm, Chen et al. 2018


def test_gradnorm_targets_differ_by_task() -> None:
    """w = (1, 2, 1), G = (3, 4, 5), mean 4; L / L(0) = 1/2, 1, 3/2, mean 1, so r is the same.

    With alpha = 2 the targets are 4 r^2 = 1, 4, 9, and G - target = 2, 0, -4: the slopes are
    +G1 / w1 = 3, 0 at the target itself, and -G3 / w3 = -5.
    """
    weights, norms = jnp.array([1.0, 2.0, 1.0]), jnp.array([3.0, 4.0, 5.0])
    losses, first = jnp.array([1.0, 2.0, 3.0]), jnp.full(3, 2.0)
    found = weight_gradient(weights, norms, losses, first, SEEN, 2.0)
    np.testing.assert_allclose(found, [3.0, 0.0, -5.0], atol=1e-6)
    # alpha = 0 asks for equal norms: targets 4, 4, 4
    found = weight_gradient(weights, norms, losses, first, SEEN, 0.0)
    np.testing.assert_allclose(found, [-3.0, 0.0, 5.0], atol=1e-6)
    # one that is observed alone is its own mean: it stands at its target
    found = weight_gradient(weights, norms, losses, first, jnp.array([False, True, False]), 2.0)
    np.testing.assert_array_equal(found, np.zeros(3))


def test_gradnorm_moves_the_weights_and_scales_them_to_the_declared_sum() -> None:
    """Two tasks, g = (3, 4) of length 5 and (0, 1): w = (1, 1), G = (5, 1), mean 3; the first
    losses are these, so r = 1 and both targets are 3. Slopes +5 and -1; with a rate of 0.1
    w = (0.5, 1.1), times 2 / 1.6: (0.625, 1.375). The step itself still has the old weights."""
    gradients = np.array([[3.0, 4.0], [0.0, 1.0]])

    def pullback(weights: jax.Array) -> Gradients:
        return Gradients(jnp.array([2.0, 8.0]), (), weights @ jnp.asarray(gradients, jnp.float32))

    seen = jnp.array([True, True])
    balancer = GradNorm(alpha=1.5, learning_rate=0.1).make(jnp.ones(2))
    found, state = balancer.combine(pullback, seen, balancer.init(), KEY)
    np.testing.assert_allclose(found.shared, gradients.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(state.weights, [0.625, 1.375], rtol=1e-6)
    np.testing.assert_array_equal(state.first, [2.0, 8.0])
    found, _ = balancer.combine(pullback, seen, state, KEY)
    np.testing.assert_allclose(found.shared, [0.625, 1.375] @ gradients, rtol=1e-6)


def test_gradnorm_gives_a_slow_task_more_weight() -> None:
    """Equal norms; the first task has halved its loss, the second has not moved."""

    def pullback(weights: jax.Array) -> Gradients:
        return Gradients(jnp.array([1.0, 2.0]), (), weights * jnp.ones(2))

    state = State(jnp.ones(2), jnp.array([2.0, 2.0]))
    balancer = GradNorm().make(jnp.ones(2))
    seen = jnp.array([True, True])
    for _ in range(3):
        _, state = balancer.combine(pullback, seen, state, KEY)
    assert state.weights[1] > 1.05 > 0.95 > state.weights[0]
    np.testing.assert_allclose(jnp.sum(state.weights), 2.0, rtol=1e-6)
    np.testing.assert_array_equal(state.first, [2.0, 2.0])  # the first losses stay


def test_gradnorm_lets_tasks_rest_that_are_not_observed() -> None:
    """The middle one keeps its weight, has no part in the means, and its first loss is still to
    come. Of the others G = (5, 1), mean 3, r = 1: slopes 5, -1; with a rate of 0.1 w = (0.5, 1.1),
    scaled to what is left of the declared sum, 3 - 1 = 2."""
    gradients = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    observed = jnp.array([True, False, True])

    def pullback(weights: jax.Array) -> Gradients:
        losses = jnp.array([2.0, 0.0, 8.0])
        return Gradients(losses, (), weights @ jnp.asarray(gradients, jnp.float32))

    balancer = GradNorm(learning_rate=0.1).make(jnp.ones(3))
    _, state = balancer.combine(pullback, observed, balancer.init(), KEY)
    np.testing.assert_allclose(state.weights, [0.625, 1.0, 1.375], rtol=1e-6)
    np.testing.assert_array_equal(state.first, [2.0, 0.0, 8.0])
    _, state = balancer.combine(pullback, jnp.array([False] * 3), state, KEY)
    np.testing.assert_allclose(state.weights, [0.625, 1.0, 1.375], rtol=1e-6)


def test_gradnorm_leaves_out_a_task_that_is_switched_off() -> None:
    """The others move as if it were not there: w = (0.5, 1.1) as above, scaled to their sum, 2."""
    gradients = np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])

    def pullback(weights: jax.Array) -> Gradients:
        losses = jnp.array([2.0, 5.0, 8.0])
        return Gradients(losses, (), weights @ jnp.asarray(gradients, jnp.float32))

    balancer = GradNorm(learning_rate=0.1).make(jnp.array([1.0, 0.0, 1.0]))
    _, state = balancer.combine(pullback, jnp.array([True] * 3), balancer.init(), KEY)
    np.testing.assert_allclose(state.weights, [0.625, 0.0, 1.375], rtol=1e-6)


def test_gradnorm_keeps_weights_above_zero() -> None:
    def pullback(weights: jax.Array) -> Gradients:
        return Gradients(jnp.ones(2), (), weights * jnp.array([1e6, 1.0]))

    balancer = GradNorm().make(jnp.ones(2))
    _, state = balancer.combine(pullback, jnp.array([True, True]), balancer.init(), KEY)
    assert (np.asarray(state.weights) > 0).all()
    np.testing.assert_allclose(jnp.sum(state.weights), 2.0, rtol=1e-6)
