"""Universal hash functions: exact, in range, and colliding as often as promised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.tables.hashing import PRIME, affine, coefficients, hash_rows


def test_the_arithmetic_is_that_of_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    edges = [0, 1, 2, 0xFFFF, 0x10000, 0x7FFF_0000, PRIME - 2, PRIME - 1]
    x = np.concatenate([edges, rng.integers(0, PRIME, 500)])
    factors = [1, 0xFFFF, 0x10000, 0x7FFF_FFFE, *rng.integers(1, PRIME, 30).tolist()]
    for a in factors:
        for b in (0, 1, PRIME - 1, int(rng.integers(0, PRIME))):
            found = affine(jnp.asarray(x, jnp.uint32), a, b)
            assert found.tolist() == [(a * int(v) + b) % PRIME for v in x], (a, b)


def test_functions_belong_to_their_owner_and_never_change() -> None:
    assert coefficients("context.user", 0) == (1975325060, 121515860)
    many = {coefficients(owner, f) for owner in ("context.a", "item.a") for f in range(4)}
    assert len(many) == 8
    assert all(0 < a < PRIME and 0 <= b < PRIME for a, b in many)


@pytest.mark.parametrize("rows", [1, 2, 100, 128, 1_000_003, 2**31 - 3])
def test_rows_are_in_range_and_padding_and_unknown_are_apart(rows: int) -> None:
    ids = jnp.concatenate([jnp.arange(500), jnp.array([2**31 - 2, 2**30])]).astype(jnp.int32)
    found = np.asarray(hash_rows(ids[:, None], "context.user", rows, 3))
    assert found.shape == (502, 3)
    assert found.dtype == np.int32
    assert found[0].tolist() == [0, 0, 0]
    assert found[1].tolist() == [1, 0, 0]
    assert found[2:].min() >= 2
    assert found[2:].max() < rows + 2
    jitted = jax.jit(hash_rows, static_argnums=(1, 2, 3))(ids[:, None], "context.user", rows, 3)
    np.testing.assert_array_equal(found, jitted)


def test_bags_keep_the_rows_of_an_id_side_by_side() -> None:
    hashed = jax.jit(lambda ids: hash_rows(ids, "item.tags", 50, 2))
    bags = hashed(jnp.array([[5, 6, 0], [6, 1, 5]]))
    one, two = (hashed(jnp.array([i])).tolist() for i in (5, 6))
    assert bags.tolist() == [[*one, *two, 0, 0], [*two, 1, 0, *one]]


@pytest.mark.slow
def test_pairs_share_rows_as_often_as_promised() -> None:
    """Over many functions: one row with a probability of 1/m, both with one of 1/m²."""
    rows, owners = 20, 60
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.choice(2**31 - 4, 400, replace=False) + 2, jnp.int32)
    ids = jnp.concatenate([ids, jnp.arange(2, 402, dtype=jnp.int32)])  # and neighbours
    upper = np.triu_indices(len(ids), 1)
    one = both = 0.0
    for owner in range(owners):
        found = np.asarray(hash_rows(ids[:, None], f"context.{owner}", rows, 2))
        same = (found[:, None] == found[None])[upper]
        one += same.mean() / owners
        both += same.all(axis=1).mean() / owners
    assert one == pytest.approx(1 / rows, rel=0.02)
    assert both == pytest.approx(1 / rows**2, rel=0.1)
