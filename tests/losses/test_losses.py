"""Losses against closed forms: the full softmax, unbiasedness, and where nothing was observed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.kernels.softmax import softmax_loss
from mtrec_jax.losses import retrieval
from mtrec_jax.losses.fusion import chosen_position, hardest, listwise, utility
from mtrec_jax.losses.retrieval import sample_negatives, sampled_softmax
from mtrec_jax.losses.tasks import TaskField, head_of
from mtrec_jax.models.model import make_catalogue
from mtrec_jax.sharding import make_mesh
from mtrec_jax.types import FIRST, Catalogue

B, P, D, N, TEMPERATURE = 2, 3, 5, 10, 0.5
_RNG = np.random.default_rng(0)
USERS = jnp.asarray(_RNG.normal(size=(B, P, D)), jnp.float32)
VECTORS = jnp.asarray(_RNG.normal(size=(N + FIRST, D)), jnp.float32)
POSITIVES = jnp.asarray(_RNG.integers(FIRST, N + FIRST, (B, P)), jnp.int32)


def _catalogue(counts: np.ndarray, power: float) -> Catalogue:
    nothing = {"ids": np.zeros((N + 2, 0), np.int32), "numbers": np.zeros((N + 2, 0), np.float32)}
    return make_catalogue(nothing, counts, N, power, "float32")


UNIFORM = _catalogue(np.arange(1, N + 1), 0.0)
POPULAR = _catalogue(np.arange(1, N + 1) ** 2, 0.75)


def _scores() -> np.ndarray:
    """Cosine over temperature of every position and item id: [B, P, N + 2]."""
    users, items = np.asarray(USERS, np.float64), np.asarray(VECTORS, np.float64)
    users /= np.linalg.norm(users, axis=-1, keepdims=True)
    items /= np.linalg.norm(items, axis=-1, keepdims=True)
    return users @ items.T / TEMPERATURE


ONES = jnp.ones((B, P))


def _losses(*given: Any) -> jax.Array:
    """The loss of each position: by how much its weight changes the sum."""
    found: jax.Array = jax.grad(sampled_softmax, argnums=7)(*given, ONES)
    return found


@jax.jit
def _loss(negatives: jax.Array, catalogue: Catalogue) -> jax.Array:
    found = VECTORS[negatives], negatives, catalogue, TEMPERATURE
    return _losses(USERS, VECTORS[POSITIVES], POSITIVES, *found)


def test_every_item_once_is_the_full_softmax() -> None:
    scores = _scores()
    partition = np.log(np.exp(scores[..., FIRST:]).sum(axis=-1))
    positive = np.take_along_axis(scores, np.asarray(POSITIVES)[..., None], axis=-1)[..., 0]
    found = _loss(jnp.arange(FIRST, N + FIRST), UNIFORM)
    np.testing.assert_allclose(found, partition - positive, rtol=1e-5)


def test_positions_come_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position at a time, as where logits would not fit: the losses stay with their places."""
    negatives = jnp.arange(FIRST, N + FIRST)
    given = VECTORS[POSITIVES], POSITIVES, VECTORS[negatives], negatives, UNIFORM, TEMPERATURE
    scores = _scores()
    positive = np.take_along_axis(scores, np.asarray(POSITIVES)[..., None], axis=-1)[..., 0]
    expected = np.log(np.exp(scores[..., FIRST:]).sum(axis=-1)) - positive
    weights = jnp.asarray(_RNG.random((B, P)), jnp.float32)
    tiles: list[tuple[int, ...]] = []

    def noting(queries: Any, *more: Any) -> Any:
        tiles.append(queries.shape[:2])
        return softmax_loss(queries, *more)

    monkeypatch.setattr(retrieval, "softmax_loss", noting)
    for most, shape in ((retrieval.LOGITS, (1, P)), (1, (P, 1))):
        monkeypatch.setattr(retrieval, "LOGITS", most)
        np.testing.assert_allclose(_losses(USERS, *given), expected, rtol=1e-5)
        total = sampled_softmax(USERS, *given, weights)
        np.testing.assert_allclose(total, (expected * np.asarray(weights)).sum(), rtol=1e-5)
        assert tiles.pop() == tiles.pop() == shape


@pytest.mark.parametrize("catalogue", [UNIFORM, POPULAR], ids=["uniform", "popularity"])
def test_partition_estimate_is_unbiased(catalogue: Catalogue) -> None:
    """Mean of exp(loss + positive score) over draws is Z; without logQ it is far from it."""

    def partition(key: jax.Array) -> jax.Array:
        return jnp.exp(_loss(sample_negatives(catalogue, 16, key), catalogue))

    draws = 4_000
    found = np.asarray(jax.jit(jax.vmap(partition))(jax.random.split(jax.random.key(1), draws)))
    scores = _scores()
    positive = np.take_along_axis(scores, np.asarray(POSITIVES)[..., None], axis=-1)
    true = np.exp(scores[..., FIRST:] - positive).sum(axis=-1)
    error = found.std(axis=0) / np.sqrt(draws)
    assert (error < 0.02 * true).all()  # sharp enough to see a wrong sign or an uncounted hit
    assert (np.abs(found.mean(axis=0) - true) < 4.5 * error).all()


def test_logq_makes_a_popular_negative_count_for_less() -> None:
    negative = jnp.array([int(POSITIVES.max()) + 1 if POSITIVES.max() <= N else FIRST])
    log_probability = np.full(N + FIRST, np.log(0.2), np.float32)
    rare = POPULAR._replace(log_probability=log_probability)
    popular = POPULAR._replace(log_probability=log_probability + np.float32(np.log(4)))
    positive = jnp.take_along_axis(jnp.asarray(_scores()), POSITIVES[..., None], axis=-1)[..., 0]

    def others(catalogue: Catalogue) -> np.ndarray:
        return np.asarray(jnp.exp(positive) * (jnp.exp(_loss(negative, catalogue)) - 1))

    hit = np.asarray(POSITIVES) == int(negative[0])
    expected = np.exp(_scores()[..., int(negative[0])]) / 0.2
    np.testing.assert_allclose(others(rare)[~hit], expected[~hit], rtol=1e-4)
    np.testing.assert_allclose(others(popular)[~hit], expected[~hit] / 4, rtol=1e-4)


def test_a_negative_that_is_the_positive_does_not_count() -> None:
    negatives = jnp.array([2, 3, 5, 5])
    double = UNIFORM._replace(log_probability=UNIFORM.log_probability + np.float32(np.log(2)))
    ids = jnp.full((B, P), 5, jnp.int32)
    shape = (USERS, VECTORS[ids], ids)
    with_hits = _losses(*shape, VECTORS[negatives], negatives, UNIFORM, TEMPERATURE)
    without = _losses(*shape, VECTORS[negatives[:2]], negatives[:2], double, TEMPERATURE)
    np.testing.assert_allclose(with_hits, without, rtol=1e-6)


def test_nothing_but_hits_is_a_loss_of_zero_without_gradient() -> None:
    ids = jnp.full((B, P), 4, jnp.int32)
    negatives = jnp.full(3, 4, jnp.int32)

    def total(users: jax.Array, vectors: jax.Array) -> jax.Array:
        taken = vectors[ids], ids, vectors[negatives], negatives
        return sampled_softmax(users, *taken, POPULAR, TEMPERATURE, ONES)

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(USERS, VECTORS)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_padding_and_extreme_scores_stay_finite() -> None:
    """A zero vector for the positive, and a temperature that overflows a plain exp."""
    negatives = jnp.arange(FIRST, N + FIRST)

    def total(users: jax.Array, vectors: jax.Array) -> jax.Array:
        taken = vectors[POSITIVES] * 0, POSITIVES, vectors[negatives], negatives
        return sampled_softmax(users, *taken, POPULAR, 1e-3, ONES)

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(USERS, VECTORS)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)


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
