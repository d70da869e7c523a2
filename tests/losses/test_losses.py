"""Losses of tasks and of the fused order against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from mtrec_jax.losses.fusion import chosen_position, hardest, listwise, utility
from mtrec_jax.losses.tasks import TaskField, head_of
from mtrec_jax.sharding import make_mesh


def test_regression_is_the_squared_error_of_the_standardised_label() -> None:
    learned = TaskField(mean=10.0, std=4.0)
    logits, labels = jnp.array([[0.0, 1.0, -0.5]]), jnp.array([[10.0, 2.0, 12.0]])
    found = head_of("regression").loss(logits, labels, learned)
    np.testing.assert_allclose(found, [[0.0, 9.0, 1.0]])


def test_binary_and_multiclass_are_the_negative_log_likelihood() -> None:
    p = np.array([[0.9, 0.2]])
    logits = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    found = head_of("binary").loss(logits, jnp.array([[1.0, 0.0]]), TaskField())
    np.testing.assert_allclose(found, -np.log([[0.9, 0.8]]), rtol=1e-5)
    classes = np.array([[[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]])
    found = head_of("multiclass").loss(
        jnp.asarray(np.log(classes) + 3, jnp.float32),
        jnp.array([[1.0, 2.0]]),
        TaskField(classes=("a", "b", "c")),
    )
    np.testing.assert_allclose(found, -np.log([[0.2, 0.5]]), rtol=1e-5)


def test_worth_of_a_label_outside_its_sample_space_is_zero() -> None:
    """No purchase without a click, whatever stands in the label; unseen positions do not count."""
    labels = {"click": jnp.array([[1.0, 1.0, 0.0, 1.0]]), "buy": jnp.array([[1.0, 0.0, 1.0, 1.0]])}
    mask = {"click": jnp.array([[1.0, 1.0, 1.0, 0.0]]), "buy": jnp.array([[1.0, 1.0, 0.0, 0.0]])}
    worth, seen = utility({"click": 1.0, "buy": 3.0}, labels, mask)
    np.testing.assert_allclose(worth, [[1.0, 0.25, 0.0, 0.0]])
    np.testing.assert_allclose(seen, [[1.0, 1.0, 1.0, 0.0]])


def test_the_fusion_learns_at_a_random_position_of_those_with_a_weight() -> None:
    weight = jnp.array([[0.0, 0.5, 1.0], [0.0, 0.0, 0.2], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])

    def chosen(key: jax.Array) -> jax.Array:
        return chosen_position(weight, jax.random.uniform(key, weight.shape))[:, 0]

    found = np.asarray(jax.vmap(chosen)(jax.random.split(jax.random.key(0), 400)))
    assert (found[:, 1] == 2).all()
    assert (found[:, 2] == 0).all()
    share = np.mean(found[:, 0] == 1)  # whatever the weights: they weigh the loss
    assert set(found[:, 0]) == {1, 2}
    assert abs(share - 0.5) < 5 * 0.5 / 20


def test_the_hardest_negatives_are_those_with_the_highest_cosine() -> None:
    """By hand, of unit vectors at 0, 60, 90 and 180 degrees from the user: cosines 1, 1/2, 0, -1.
    The first is the target itself. Of 3 negatives beside it, all are taken; a target at 120
    degrees (-1/2) lies above the lowest of them, one at 180 is not brought beside a single -1/2."""
    mesh = make_mesh((1, 1))
    user = jnp.array([[2.0, 0.0]])
    negatives = jnp.array([[3.0, 0.0], [1.0, 3**0.5], [0.0, 1.0], [-1.0, 0.0]])
    ids = jnp.array([7, 8, 9, 10])
    target, low = jnp.array([[-1.0, 3**0.5]]), jnp.array([[-1.0, 0.0]])
    run = jax.jit(lambda t, t_id, n, n_id: hardest(user, t, t_id, n, n_id, mesh))
    places, kept = run(target, jnp.array([[11]]), negatives, ids)
    assert (places.tolist(), kept.tolist()) == ([[0, 1, 2, 3]], [1.0])
    places, kept = run(negatives[:1], jnp.array([[7]]), negatives, ids)
    assert places.tolist()[0][:3] == [1, 2, 3]  # it is no negative of itself
    places, kept = run(low, jnp.array([[11]]), target, jnp.array([12]))
    assert kept.tolist() == [0.0]


def test_listwise_is_a_softmax_over_the_target_and_the_others_but_itself() -> None:
    """By hand: scores log 1, log 2, log 5 give the target 1/8; with the last left out 1/3."""
    fused = jnp.log(jnp.array([[1.0, 2.0, 5.0]] * 2))
    ids = jnp.array([[4, 5, 6], [4, 5, 4]])
    for weight, expected in (([1.0, 0.0], np.log(8)), ([0.0, 2.0], 2 * np.log(3))):
        found = listwise(fused, ids, jnp.array(weight))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    gradient = jax.grad(lambda f: listwise(f, ids, jnp.ones(2)))(fused)
    assert gradient[1, 2] == 0
    assert np.isfinite(np.asarray(gradient)).all()
