"""Losses against closed forms: the full softmax, unbiasedness, and where nothing was observed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.config import Task
from mtrec_jax.data.dataset import TaskField
from mtrec_jax.losses.tasks import sampled_softmax, task_loss, utility
from mtrec_jax.models.lookups import sample_negatives
from mtrec_jax.models.model import make_catalogue
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


def _loss(negatives: jax.Array, catalogue: Catalogue) -> jax.Array:
    found = VECTORS[negatives], negatives, catalogue, TEMPERATURE
    return _losses(USERS, VECTORS[POSITIVES], POSITIVES, *found)


def test_every_item_once_is_the_full_softmax() -> None:
    scores = _scores()
    partition = np.log(np.exp(scores[..., FIRST:]).sum(axis=-1))
    positive = np.take_along_axis(scores, np.asarray(POSITIVES)[..., None], axis=-1)[..., 0]
    found = _loss(jnp.arange(FIRST, N + FIRST), UNIFORM)
    np.testing.assert_allclose(found, partition - positive, rtol=1e-5)


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
    found = task_loss(Task(kind="regression"), learned, logits, labels)
    np.testing.assert_allclose(found, [[0.0, 9.0, 1.0]])


def test_binary_and_multiclass_are_the_negative_log_likelihood() -> None:
    p = np.array([[0.9, 0.2]])
    logits = jnp.asarray(np.log(p / (1 - p)), jnp.float32)
    found = task_loss(Task(kind="binary"), TaskField(), logits, jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(found, -np.log([[0.9, 0.8]]), rtol=1e-5)
    classes = np.array([[[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]])
    found = task_loss(
        Task(kind="multiclass"),
        TaskField(classes=("a", "b", "c")),
        jnp.asarray(np.log(classes) + 3, jnp.float32),
        jnp.array([[1.0, 2.0]]),
    )
    np.testing.assert_allclose(found, -np.log([[0.2, 0.5]]), rtol=1e-5)


def test_worth_of_a_label_outside_its_sample_space_is_zero() -> None:
    """No purchase without a click, whatever stands in the label; unseen positions do not count."""
    labels = {"click": jnp.array([[1.0, 1.0, 0.0, 1.0]]), "buy": jnp.array([[1.0, 0.0, 1.0, 1.0]])}
    mask = {"click": jnp.array([[1.0, 1.0, 1.0, 0.0]]), "buy": jnp.array([[1.0, 1.0, 0.0, 0.0]])}
    worth, seen = utility({"click": 1.0, "buy": 3.0}, labels, mask)
    np.testing.assert_allclose(worth, [[1.0, 0.25, 0.0, 0.0]])
    np.testing.assert_allclose(seen, [[1.0, 1.0, 1.0, 0.0]])
