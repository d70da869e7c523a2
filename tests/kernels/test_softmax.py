"""The softmax loss in tiles and blocks against optax on the whole matrix of logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtrec_jax.errors import DataError
from mtrec_jax.kernels import softmax, streaming_softmax_loss

B, N, D = 50, 37, 6
_RNG = np.random.default_rng(0)
QUERIES = jnp.asarray(_RNG.normal(size=(B, D)), jnp.float32)
ITEMS = jnp.asarray(_RNG.normal(size=(N, D)), jnp.float32)
BIAS = jnp.asarray(_RNG.normal(size=N), jnp.float32)
TARGETS = jnp.asarray(_RNG.integers(0, N, B), jnp.int32)
WEIGHTS = jnp.asarray(_RNG.random(B), jnp.float32).at[3].set(0)


def _whole(queries: Any, items: Any, bias: Any, weights: Any) -> jax.Array:
    logits = queries @ items.T + bias[None]
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS))


def _streamed(queries: Any, items: Any, bias: Any, weights: Any) -> jax.Array:
    return streaming_softmax_loss(queries, items, TARGETS, bias, weights)


@pytest.mark.parametrize(("logits", "block"), [(1 << 22, 4096), (7 * 16, 16), (1, 10), (64, 36)])
def test_value_and_every_gradient(monkeypatch: Any, logits: int, block: int) -> None:
    """In one block, in blocks of which the last overlaps, and with a padded last tile."""
    monkeypatch.setattr(softmax, "_LOGITS", logits)
    monkeypatch.setattr(softmax, "_BLOCK", block)
    given = QUERIES, ITEMS, BIAS, WEIGHTS
    (one, whole), (other, streamed) = (
        # the loss may be a part of anything
        jax.jit(jax.value_and_grad(lambda a, f=f: -2.5 * f(*a)))(given)
        for f in (_whole, _streamed)
    )
    np.testing.assert_allclose(other, one, rtol=1e-5)
    for one, other in zip(streamed, whole, strict=True):
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


def test_without_weights_it_is_the_mean() -> None:
    found = streaming_softmax_loss(QUERIES, ITEMS, TARGETS, BIAS)
    np.testing.assert_allclose(found, _whole(QUERIES, ITEMS, BIAS, jnp.full(B, 1 / B)), rtol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    """exp overflows float32 beyond 88."""
    found = jax.jit(jax.value_and_grad(streaming_softmax_loss, argnums=(0, 1)))(
        1e3 * QUERIES, ITEMS, TARGETS
    )
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(found))


def test_items_in_fewer_bits_get_gradients_in_them() -> None:
    items = ITEMS.astype(jnp.bfloat16)
    gradient = jax.jit(jax.grad(streaming_softmax_loss, argnums=1))(QUERIES, items, TARGETS)
    whole = jax.jit(jax.grad(_whole, argnums=1))(
        QUERIES, items.astype(jnp.float32), jnp.zeros(N), jnp.full(B, 1 / B)
    )
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(jnp.float32), whole, atol=1e-3)


def test_memory_is_that_of_a_tile_and_a_block() -> None:
    """25,600 queries by 3,416 items: the matrix of logits has 350 MB."""
    shape: Any = jax.ShapeDtypeStruct
    queries, items = shape((25_600, 64), jnp.float32), shape((3_416, 64), jnp.float32)
    program = jax.jit(jax.value_and_grad(streaming_softmax_loss, argnums=(0, 1)))
    lowered = program.lower(queries, items, shape((25_600,), jnp.int32))
    memory: Any = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 3 * 4 * softmax._LOGITS


def test_one_device_and_eight_have_the_same_gradients() -> None:
    """Queries split over devices by an axis that is not looped over."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    queries, ids = QUERIES[:48].reshape(6, 8, D), TARGETS[:48].reshape(6, 8)
    own = jnp.zeros((6, 8))

    def loss(queries: jax.Array, items: jax.Array, own: jax.Array) -> jax.Array:
        numbers = jnp.arange(N, dtype=jnp.int32)
        return softmax.softmax_loss(queries, items, numbers, ids, own, BIAS, own + 1)

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    one = program(queries, ITEMS, own)
    many = program(jax.device_put(queries, split), ITEMS, jax.device_put(own, split))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match=r"bias: shape \(3,\); \(37,\) is needed"):
        softmax._check(QUERIES, ITEMS, TARGETS, BIAS[:3], None)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int16])
def test_targets_of_any_integer_type(dtype: type) -> None:
    """Ids beyond the type, and the one that marks what two blocks share, must not be hit."""
    rng = np.random.default_rng(0)
    queries, items = (rng.normal(size=(n, 4)).astype(np.float32) for n in (6, 5000))
    targets = np.array([0, 1, 2, 0, 200, 255])
    gradient = jax.jit(jax.grad(streaming_softmax_loss, argnums=1))
    expected = gradient(queries, items, targets.astype(np.int32))
    found = gradient(queries, items, targets.astype(dtype))
    np.testing.assert_array_equal(found, expected)
