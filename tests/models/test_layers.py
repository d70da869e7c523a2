"""Dropout and unit length: what training leans on without looking."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.models.layers import dropout, unit_length
from mtrec_jax.sharding import make_mesh

ENTRIES = (400, 300)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_zeroes_at_its_rate_and_rescales_the_rest(rate: float) -> None:
    dropped = np.asarray(dropout(jnp.ones(ENTRIES), rate, jax.random.key(3)))
    np.testing.assert_allclose(dropped[dropped != 0], 1 / (1 - rate), rtol=1e-6)
    for axis in (None, 0, 1):  # rows and columns alike: the mask has no stripes
        fraction = np.mean(dropped == 0, axis=axis)
        count = dropped.size / fraction.size
        assert np.abs(fraction - rate).max() < 5 * np.sqrt(rate * (1 - rate) / count)


def test_dropout_without_key_or_rate_is_the_identity() -> None:
    x = jnp.arange(6.0)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_is_reproducible_by_key_and_independent_between_keys() -> None:
    def kept(seed: int) -> np.ndarray:
        return np.asarray(dropout(jnp.ones(ENTRIES), 0.5, jax.random.key(seed, impl="rbg"))) > 0

    np.testing.assert_array_equal(kept(1), kept(1))
    masks = [kept(seed) for seed in range(4)]
    neighbours = [(m[:-1], m[1:]) for m in masks] + [(m[:, :-1], m[:, 1:]) for m in masks]
    for a, b in [*itertools.combinations(masks, 2), *neighbours]:
        assert abs(np.mean(a == b) - 0.5) < 5 * 0.5 / np.sqrt(a.size)


def test_dropout_mask_does_not_depend_on_the_sharding() -> None:
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    run = jax.jit(lambda x, key: dropout(x, 0.3, key))
    key = jax.random.key(5, impl="rbg")
    whole = np.asarray(run(x, key))
    mesh = make_mesh((4, 2))
    for spec in (P(("data", "table")), P("table", "data"), P(None, "data")):
        split = run(jax.device_put(x, NamedSharding(mesh, spec)), key)
        np.testing.assert_array_equal(np.asarray(split), whole)


def test_unit_length_divides_by_the_norm() -> None:
    found = unit_length(jnp.array([[3.0, 4.0], [0.0, -2.0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.0, -1.0]], atol=1e-6)


def test_unit_length_at_zero_is_zero_with_a_finite_gradient() -> None:
    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(unit_length(x) * jnp.arange(1.0, 4.0))

    value, gradient = jax.value_and_grad(total)(jnp.zeros(3))
    assert value == 0
    assert np.isfinite(np.asarray(gradient)).all()
