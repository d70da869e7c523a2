"""Balancing methods against their papers, on cases worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.balance import BALANCERS, Balancer, Gradients, Pullback
from mtrec_jax.balance.cagrad import CAGrad, worst_weights
from mtrec_jax.balance.contract import Weights, beside
from mtrec_jax.balance.dbmtl import DBMTL
from mtrec_jax.balance.dwa import DWA
from mtrec_jax.balance.famo import FAMO
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

    def pullback(weights: Weights) -> Gradients:
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

    return np.asarray(jax.lax.scan(step, balancer.init(()), length=steps)[1])


def given(gradients: Any, losses: Any) -> Pullback:
    """Of tasks with these gradients [T, D] at the shared part, and heads of one number each."""

    def pullback(weights: Weights) -> Gradients:
        weights = jnp.asarray(weights)
        shared = weights @ jnp.asarray(np.asarray(gradients), weights.dtype)
        return Gradients(jnp.asarray(losses, weights.dtype), weights, shared, {"row": shared * 2})

    return pullback


def compiled(balancer: Balancer, gradients: Any) -> Any:
    """`combine` of losses, observed, state and a key, as one program."""

    @jax.jit
    def run(losses: Any, observed: Any, state: Any, key: jax.Array = KEY) -> Any:
        pulled = given(gradients, losses)
        return balancer.combine(pulled, jnp.asarray(observed), state, key)

    return run


@pytest.mark.parametrize("kind", BALANCERS)
def test_all_begin_with_the_declared_weights(kind: str) -> None:
    """At the heads, which belong to a task each: what is done about shared parts is another
    matter; two methods divide by the loss, and begin with the declared share of what they give.
    The losses are handed through, and the program may be compiled."""
    balancer = BALANCERS[kind]().make(DECLARED)

    @jax.jit
    def run() -> tuple[Gradients, Any]:
        return balancer.combine(pullback_of(TO_SHARED), SEEN, balancer.init(()), KEY)

    found, state = run()
    np.testing.assert_array_equal(found.losses, LOSSES)
    start = np.asarray(DECLARED)
    if kind in ("famo", "dbmtl"):
        start = start / LOSSES
    if kind == "famo":
        start = start * DECLARED.sum() / start.sum()
    np.testing.assert_allclose(found.heads["a"], start @ TO_HEADS, rtol=1e-6)
    if kind not in ("pcgrad", "cagrad", "dbmtl"):
        np.testing.assert_allclose(_shared(found), start @ TO_SHARED, rtol=1e-6)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, balancer.init(())
    )
    assert all(jax.tree.leaves(same))
    assert balancer.in_parts == (kind in ("static", "uncertainty", "dwa"))


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_task_without_weight_or_without_labels_changes_nothing_for_the_others(kind: str) -> None:
    """The first is switched off, the last never observed: the two in between are balanced as if
    they were alone, and nothing of the others is in what is learned."""
    gradients = np.array([[3.0, -2.0], [1.0, 0.5], [-1.0, 2.0], [0.0, 0.0]])
    four = BALANCERS[kind]().make(jnp.array([0.0, 1.0, 0.5, 2.0]))
    two = BALANCERS[kind]().make(jnp.array([1.0, 0.5]))
    run, run_alone = compiled(four, gradients), compiled(two, gradients[1:3])
    state, alone = four.init(()), two.init(())
    for losses in ([7.0, 2.0, 1.0, 0.0], [9.0, 1.0, 0.9, 0.0], [5.0, 0.8, 0.9, 0.0]):
        found, state = run(losses, [True, True, True, False], state)
        expected, alone = run_alone(losses[1:3], [True, True], alone)
    assert float(found.heads[0]) == 0
    np.testing.assert_allclose(found.heads[1:3], expected.heads, rtol=1e-5)
    np.testing.assert_allclose(found.shared, expected.shared, rtol=1e-4)
    np.testing.assert_allclose(found.carried["row"], 2 * found.shared, rtol=1e-5)


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_loss_of_no_task_keeps_its_weight_and_is_not_balanced(kind: str) -> None:
    """Two tasks beside a hinge that falls to 0, as AITM's calibrator does: the tasks learn what
    they learn without it, and its gradient is added with a weight of 1 in every step, whatever its
    loss and though it is unobserved in the last."""
    gradients = np.array([[1.0, 0.5], [-1.0, 2.0], [0.25, 8.0]])
    alone = BALANCERS[kind]().make(jnp.array([1.0, 0.5]))
    run = compiled(beside(alone, 1), gradients)
    run_alone = compiled(alone, gradients[:2])
    state, state_alone = alone.init(()), alone.init(())
    for losses in ([2.0, 1.0, 0.5], [1.0, 0.9, 1e-6], [0.8, 0.9, 0.0]):
        found, state = run(losses, [True, True, losses[-1] > 0], state)
        expected, state_alone = run_alone(losses[:2], [True, True], state_alone)
        np.testing.assert_allclose(found.losses, losses)
        np.testing.assert_allclose(found.heads, [*expected.heads, 1.0], rtol=1e-5)
        total = np.asarray(expected.shared) + gradients[2]
        np.testing.assert_allclose(found.shared, total, rtol=1e-5)
        np.testing.assert_allclose(found.carried["row"], 2 * total, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, state_alone)


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_single_task_is_left_as_it_is(kind: str) -> None:
    """But for CAGrad, whose d is (1 + c) g then, and DB-MTL, which learns from log L."""
    balancer = BALANCERS[kind]().make(jnp.array([2.0]))
    state = balancer.init(())
    factor = {"cagrad": 1.4, "dbmtl": 1 / 0.5}.get(kind, 1.0)
    run = compiled(balancer, np.array([[3.0, 4.0]]))
    for _ in range(2):
        found, state = run([0.5], [True], state)
    if kind != "uncertainty":
        np.testing.assert_allclose(found.shared, [6 * factor, 8 * factor], rtol=1e-5)
    assert np.isfinite(np.asarray(found.shared)).all()


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_batch_without_any_label_teaches_nothing_and_keeps_what_is_known(kind: str) -> None:
    balancer = BALANCERS[kind]().make(jnp.array([1.0, 2.0]))
    start = balancer.init(())
    _, state = compiled(balancer, [[1.0, 0.0], [-1.0, 2.0]])([0.5, 2.0], [True, True], start)
    found, after = compiled(balancer, np.zeros((2, 2)))([0.0, 0.0], [False, False], state)
    np.testing.assert_array_equal(found.shared, np.zeros(2))
    if kind != "dwa":  # which counts the steps of its window
        jax.tree.map(np.testing.assert_array_equal, after, state)


# --- Static


def test_static_weights_are_the_declared_ones_whatever_the_losses() -> None:
    found = _weights_over(Static().make(DECLARED), 5)
    np.testing.assert_allclose(found, np.tile(DECLARED, (5, 1)), rtol=1e-6)


# --- Uncertainty, Kendall et al. 2018


def test_uncertainty_learns_variances_that_do_not_know_the_declared_weights() -> None:
    """By hand: d/ds of exp(-s) L + s at s = 0 is 1 - L = 0.9, -3, 0, so that s = -0.1 times these,
    whatever the weights 1, 0.5 and 2, and the next weights are w exp(-s)."""
    balancer = Uncertainty(learning_rate=0.1).make(DECLARED)
    _, state = balancer.combine(pullback_of(TO_SHARED), SEEN, balancer.init(()), KEY)
    np.testing.assert_allclose(state, [-0.09, 0.3, 0.0], atol=1e-7)
    found, _ = balancer.combine(pullback_of(TO_SHARED), SEEN, state, KEY)
    weights = [np.exp(0.09), 0.5 * np.exp(-0.3), 2.0]
    np.testing.assert_allclose(_shared(found), weights @ TO_SHARED, rtol=1e-6)


def test_uncertainty_starts_at_the_declared_weights_and_tends_to_weight_over_loss() -> None:
    weights = _weights_over(Uncertainty().make(DECLARED), 3_000)
    np.testing.assert_allclose(weights[0], DECLARED, rtol=1e-6)
    np.testing.assert_allclose(weights[-1], DECLARED / LOSSES, rtol=1e-4)
    # monotone on the way: up where the loss is below 1, down where it is above
    assert (np.diff(weights[:, 0]) >= -1e-5).all()
    assert (np.diff(weights[:, 1]) <= 1e-5).all()


def test_uncertainty_follows_a_rare_task_to_its_small_loss_and_no_further_than_its_bound() -> None:
    """Cross-entropies of 1e-3, as of one purchase in ten thousand, reach w / L; one of 1e-6 has the
    weight of the bound, w exp(10)."""
    losses = jnp.array([1e-3, 1e-6, 1.0])

    def step(state: Any, _: None) -> tuple[Any, jax.Array]:
        found, state = balancer.combine(pullback_of(TO_SHARED, losses), SEEN, state, KEY)
        return state, found.heads["a"] / jnp.array([1.0, 10.0, 100.0])

    balancer = Uncertainty().make(DECLARED)
    weights = jax.lax.scan(step, balancer.init(()), length=1_000)[1][-1]
    np.testing.assert_allclose(weights, [1e3, 0.5 * np.exp(10), 2], rtol=1e-3)


def test_uncertainty_stays_finite_whatever_the_losses() -> None:
    balancer = Uncertainty(learning_rate=10.0).make(DECLARED)
    extreme = pullback_of(TO_SHARED, jnp.array([0.0, 0.0, 1e12]))
    _, state = balancer.combine(extreme, SEEN, balancer.init(()), KEY)
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


def _pcgrad(to_shared: np.ndarray, keys: Any = None, declared: Any = None) -> np.ndarray:
    """With a key, or with each of several [n]: [D], or [n, D]."""
    declared = jnp.ones(len(to_shared)) if declared is None else declared
    balancer, seen = PCGrad().make(declared), jnp.ones(len(to_shared), bool)

    def of(key: jax.Array) -> jax.Array:
        pulled = given(to_shared, jnp.ones(len(to_shared)))
        return balancer.combine(pulled, seen, (), key)[0].shared

    return np.asarray(jax.jit(of)(KEY) if keys is None else jax.jit(jax.vmap(of))(keys))


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
    found = _pcgrad(by_hand, jax.random.split(KEY, 40))
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

    def pullback(weights: Weights) -> Gradients:
        return Gradients(jnp.array([2.0, 8.0]), (), weights @ jnp.asarray(gradients, jnp.float32))

    seen = jnp.array([True, True])
    balancer = GradNorm(alpha=1.5, learning_rate=0.1).make(jnp.ones(2))
    found, state = balancer.combine(pullback, seen, balancer.init(()), KEY)
    np.testing.assert_allclose(found.shared, gradients.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(state.weights, [0.625, 1.375], rtol=1e-6)
    np.testing.assert_array_equal(state.first, [2.0, 8.0])
    found, _ = balancer.combine(pullback, seen, state, KEY)
    np.testing.assert_allclose(found.shared, [0.625, 1.375] @ gradients, rtol=1e-6)


def test_gradnorm_gives_a_slow_task_more_weight() -> None:
    """Equal norms; the first task has halved its loss, the second has not moved."""

    def pullback(weights: Weights) -> Gradients:
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

    def pullback(weights: Weights) -> Gradients:
        losses = jnp.array([2.0, 0.0, 8.0])
        return Gradients(losses, (), weights @ jnp.asarray(gradients, jnp.float32))

    balancer = GradNorm(learning_rate=0.1).make(jnp.ones(3))
    _, state = balancer.combine(pullback, observed, balancer.init(()), KEY)
    np.testing.assert_allclose(state.weights, [0.625, 1.0, 1.375], rtol=1e-6)
    np.testing.assert_array_equal(state.first, [2.0, 0.0, 8.0])
    _, state = balancer.combine(pullback, jnp.array([False] * 3), state, KEY)
    np.testing.assert_allclose(state.weights, [0.625, 1.0, 1.375], rtol=1e-6)


def test_gradnorm_leaves_out_a_task_that_is_switched_off() -> None:
    """The others move as if it were not there: w = (0.5, 1.1) as above, scaled to their sum, 2."""
    gradients = np.array([[3.0, 4.0], [6.0, 8.0], [0.0, 1.0]])

    def pullback(weights: Weights) -> Gradients:
        losses = jnp.array([2.0, 5.0, 8.0])
        return Gradients(losses, (), weights @ jnp.asarray(gradients, jnp.float32))

    balancer = GradNorm(learning_rate=0.1).make(jnp.array([1.0, 0.0, 1.0]))
    _, state = balancer.combine(pullback, jnp.array([True] * 3), balancer.init(()), KEY)
    np.testing.assert_allclose(state.weights, [0.625, 0.0, 1.375], rtol=1e-6)


def test_gradnorm_keeps_weights_above_zero() -> None:
    def pullback(weights: Weights) -> Gradients:
        return Gradients(jnp.ones(2), (), weights * jnp.array([1e6, 1.0]))

    balancer = GradNorm().make(jnp.ones(2))
    _, state = balancer.combine(pullback, jnp.array([True, True]), balancer.init(()), KEY)
    assert (np.asarray(state.weights) > 0).all()
    np.testing.assert_allclose(jnp.sum(state.weights), 2.0, rtol=1e-6)


# --- Dynamic weight average, Liu et al. 2019


def test_dwa_weighs_by_the_ratio_of_the_last_two_windows() -> None:
    """Windows of two steps, with means (2, 4), (1, 4) and (1, 2): in the first two windows the
    ratios are 1. In the third r = (1/2, 1), in the fourth (1, 1/2); with a temperature of 2 the
    factors are 2 exp(1/4) / (exp(1/4) + exp(1/2)) = 0.8756 and 1.1244, and the other way round."""
    balancer = DWA(window=2, temperature=2.0).make(jnp.array([1.0, 3.0]))
    state, seen = balancer.init(()), jnp.array([True, True])
    losses = [(1, 5), (3, 3), (0.5, 4), (1.5, 4), (1, 3), (1, 1), (1, 1)]
    run, found = compiled(balancer, np.eye(2)), []
    for one in losses:
        gradients, state = run(one, seen, state)
        found.append(np.asarray(gradients.shared))
    third, fourth = (0.875647, 3 * 1.124353), (1.124353, 3 * 0.875647)
    np.testing.assert_allclose(found, [(1, 3)] * 4 + [third] * 2 + [fourth], rtol=1e-5)


def test_dwa_takes_means_over_the_steps_in_which_a_task_is_observed() -> None:
    """The second task is observed in the first window and once in the third. In between it keeps
    its ratio of 1; then the ratio is 1 / 4, as its mean before was 4."""
    balancer = DWA(window=2).make(jnp.ones(2))
    state = balancer.init(())
    run, seen = compiled(balancer, np.eye(2)), [(1, 1), (1, 1), (1, 0), (1, 0), (1, 0), (1, 1)]
    for both, losses in zip(seen, [(1, 3), (1, 5), (1, 0), (1, 0), (1, 0), (1, 1)], strict=True):
        _, state = run(losses, np.array(both, bool), state)
        if int(state.step) == 0:
            ratio = np.asarray(state.ratio)
    np.testing.assert_allclose(ratio, [1.0, 0.25], rtol=1e-6)


# --- FAMO, Liu et al. 2023


def test_famo_weighs_by_the_loss_and_moves_weight_to_what_has_fallen_least() -> None:
    """Losses (1/2, 2): z = (1/2, 1/2), z / L = (1, 1/4), with a sum of 2: (1.6, 0.4).

    Then (1/4, 2): the first has halved, d = (log 2, 0), J' d = z (d - z . d) = (+, -) log(2) / 4,
    and the first step of Adam is the rate times the sign: xi = (-0.1, 0.1).
    """
    balancer = FAMO(learning_rate=0.1, decay=0.0).make(jnp.ones(2))
    run, seen = compiled(balancer, np.eye(2)), [True, True]
    found, state = run([0.5, 2.0], seen, balancer.init(()))
    np.testing.assert_allclose(found.shared, [1.6, 0.4], rtol=1e-6)
    np.testing.assert_array_equal(state.logits, [0.0, 0.0])
    found, state = run([0.25, 2.0], seen, state)
    np.testing.assert_allclose(state.logits, [-0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(state.first, 0.1 * np.log(2) / 4 * np.array([1, -1]), rtol=1e-5)
    per_loss = np.exp([-0.1, 0.1]) / [0.25, 2.0]
    np.testing.assert_allclose(found.shared, 2 * per_loss / per_loss.sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.heads, found.shared)


def test_famo_of_three_tasks_over_many_steps_is_algorithm_1() -> None:
    """With the declared weights (1, 2, 1) as the first z and the losses of the next step as those
    after this one; the decay pulls back to them, and Adam makes the step."""
    declared, rate, decay = np.array([1.0, 2.0, 1.0]), 0.05, 0.01
    losses = np.exp(np.random.default_rng(3).normal(size=(6, 3)))
    balancer = FAMO(learning_rate=rate, decay=decay).make(jnp.asarray(declared))
    state, logits, run = balancer.init(()), np.zeros(3), compiled(balancer, np.eye(3))
    first, second = np.zeros(3), np.zeros(3)
    for step, now in enumerate(losses):
        if step:
            z = declared * np.exp(logits) / (declared * np.exp(logits)).sum()
            jacobian = np.diag(z) - np.outer(z, z)
            slope = jacobian.T @ (np.log(losses[step - 1]) - np.log(now)) + decay * logits
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            hat = first / (1 - 0.9**step), second / (1 - 0.999**step)
            logits = logits - rate * hat[0] / (np.sqrt(hat[1]) + 1e-8)
        found, state = run(now.astype(np.float32), SEEN, state)
        z = declared * np.exp(logits) / now
        np.testing.assert_allclose(found.shared, 4 * z / z.sum(), rtol=1e-4)
    assert np.abs(logits).min() > 0.01


def test_famo_compares_a_task_with_when_it_was_last_observed() -> None:
    balancer = FAMO(learning_rate=0.1, decay=0.0).make(jnp.ones(2))
    run, state = compiled(balancer, np.eye(2)), balancer.init(())
    seen = [(True, True), (True, False), (True, True)]
    for both, losses in zip(seen, [(1.0, 4.0), (1.0, 0.0), (1.0, 2.0)], strict=True):
        found, state = run(losses, both, state)
        if not both[1]:
            np.testing.assert_allclose(found.shared, [1.0, 0.0], rtol=1e-6)
    # the second task has halved since the first step: d = (0, log 2), J' d = (-, +) log(2) / 4
    assert float(state.logits[0]) > 0 > float(state.logits[1])
    np.testing.assert_allclose(state.first[1], 0.1 * np.log(2) / 4, rtol=1e-5)


# --- CAGrad, Liu et al. 2021


def _cagrad(gradients: np.ndarray, c: float, declared: Any = None) -> np.ndarray:
    ones = np.ones(len(gradients))
    balancer = CAGrad(c=c).make(jnp.asarray(ones if declared is None else declared))
    return np.asarray(compiled(balancer, gradients)(ones, ones > 0, ())[0].shared)


def test_cagrad_by_hand() -> None:
    """g1 = (1, 0), g2 = (0, 2), c = 1/2: g0 = (1, 2), radius sqrt(5) / 2. The first gains less
    wherever d is in the ball, so w = (1, 0) and d = g0 + radius (1, 0).

    g1 = (1, 1), g2 = (-1, 1): by symmetry w = (1/2, 1/2), and d = (1 + c) g0 = (0, 3).
    """
    found = _cagrad(np.array([[1.0, 0.0], [0.0, 2.0]]), 0.5)
    np.testing.assert_allclose(found, [1 + 5**0.5 / 2, 2.0], rtol=1e-6)
    found = _cagrad(np.array([[1.0, 1.0], [-1.0, 1.0]]), 0.5)
    np.testing.assert_allclose(found, [0.0, 3.0], atol=1e-6)
    # declared weights belong to the gradients
    weighted = _cagrad(np.array([[1.0, 0.0], [0.0, 1.0]]), 0.5, [1.0, 2.0])
    np.testing.assert_allclose(weighted, [1 + 5**0.5 / 2, 2.0], rtol=1e-6)


def test_cagrad_without_room_is_the_static_sum() -> None:
    np.testing.assert_allclose(_cagrad(TO_SHARED, 0.0), TO_SHARED.sum(axis=0), rtol=1e-6)


@pytest.mark.parametrize("tasks", [2, 4, 6])
def test_cagrad_finds_the_direction_whose_worst_task_gains_most(tasks: int) -> None:
    """No d in the ball gives the worst task more than any w gives the dual: where the two are
    equal, both are the best."""
    rng, solve = np.random.default_rng(tasks), jax.jit(worst_weights)
    for c in (0.2, 0.4, 0.8, 0.4, 0.4):
        scales = 10 ** rng.uniform(-1, 1, (tasks, 1))
        gradients = rng.normal(size=(tasks, 12)) * scales + rng.normal(size=12)
        total = gradients.sum(axis=0)
        radius = c * np.linalg.norm(total)
        gram = jnp.asarray(gradients @ gradients.T, jnp.float32)
        w = np.asarray(solve(gram, jnp.float32(radius), jnp.ones(tasks, bool)))
        np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)
        assert w.min() >= 0
        mixed = w @ gradients
        direction = total + radius * mixed / np.linalg.norm(mixed)
        dual = mixed @ total + radius * np.linalg.norm(mixed)
        assert (gradients @ direction).min() >= dual - 2e-3 * (total @ total)


def test_cagrad_is_finite_where_the_tasks_only_contradict_each_other() -> None:
    found = _cagrad(np.array([[1.0, 0.0], [-1.0, 0.0]]), 0.4)
    np.testing.assert_allclose(found, [0.0, 0.0], atol=1e-6)


# --- DB-MTL, Lin et al. 2023


def test_dbmtl_scales_every_gradient_to_the_longest_of_the_logarithms() -> None:
    """g = (3, 4) and (0, 1), L = (1/2, 2): those of log L are (6, 8), of length 10, and (0, 1/2).
    Both become 10 long: (6, 8) + (0, 10). The heads learn from log L: 1 / L = 2 and 1/2.

    Then L = (1, 1/2), lengths 5 and 2; averages of half and half (10 + 5) / 2 = 7.5 and (1/2 + 2) /
    2 = 1.25: (3, 4) stays, and (0, 2) becomes six times as long.
    """
    balancer = DBMTL(beta=0.5).make(jnp.ones(2))
    run, seen = compiled(balancer, np.array([[3.0, 4.0], [0.0, 1.0]])), [True, True]
    found, state = run([0.5, 2.0], seen, balancer.init(()))
    np.testing.assert_allclose(found.shared, [6.0, 18.0], rtol=1e-6)
    np.testing.assert_allclose(found.heads, [2.0, 0.5], rtol=1e-6)
    found, state = run([1.0, 0.5], seen, state)
    np.testing.assert_allclose(state.norms, [7.5, 1.25], rtol=1e-6)
    np.testing.assert_allclose(found.shared, [3.0, 4.0 + 12.0], rtol=1e-6)
    # A task that is not observed keeps its average and lengthens nobody's gradient.
    found, state = run([1.0, 0.5], [False, True], state)
    np.testing.assert_allclose(state.norms, [7.5, (1.25 + 2) / 2], rtol=1e-6)
    np.testing.assert_allclose(found.shared, [0.0, 2 * 1.0], rtol=1e-6)


def test_dbmtl_at_the_parameters_learns_from_averages_of_gradients() -> None:
    """Algorithm 1 with beta = 1/2 and averages that begin at 0, in two steps whose gradients of log
    L are (6, 8), (0, 1/2), then (0, 4), (2, 0): m = (3, 4), (0, 1/4), of lengths 5, 1/4; then
    (1.5, 4), (1, 1/8). Rows learn from the gradients of the batch, twice these here."""
    balancer = DBMTL(beta=0.5, at="parameters").make(jnp.array([1.0, 3.0]))
    assert balancer.at == "parameters"
    state, seen = balancer.init(jnp.zeros(2)), [True, True]
    first = compiled(balancer, [[3.0, 4.0], [0.0, 1.0]])
    found, state = first([0.5, 2.0], seen, state)
    np.testing.assert_allclose(found.shared, [3.0, 4.0 + 3 * 5.0], rtol=1e-6)
    second = compiled(balancer, [[0.0, 4.0], [1.0, 0.0]])
    found, state = second([1.0, 0.5], seen, state)
    averages = np.array([[1.5, 4.0], [1.0, 0.125]])
    lengths = np.linalg.norm(averages, axis=1)
    factors = np.array([1.0, 3.0]) * lengths.max() / lengths
    np.testing.assert_allclose(state.gradients, averages, rtol=1e-6)
    np.testing.assert_allclose(found.shared, factors @ averages, rtol=1e-6)
    rows = factors @ np.array([[0.0, 8.0], [4.0, 0.0]])
    np.testing.assert_allclose(found.carried["row"], rows, rtol=1e-6)
    found, state = second([1.0, 0.5], [False, True], state)
    np.testing.assert_allclose(state.gradients, [averages[0], [1.5, 0.0625]], rtol=1e-6)
