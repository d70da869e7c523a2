"""Altered views of histories, and the loss between two of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.models.views import Contrast, contrast_loss, views

LENGTH, COUNTS = 12, np.array([10, 5, 1, 0] * 8)
OFF = {"crop": 0.0, "mask": 0.0, "reorder": 0.0, "drop": 0.0}


def _views(name: str, share: float) -> list[list[int]]:
    """What is left of histories 1, 2, 3, …; 0 is an empty place."""
    there = np.arange(LENGTH) < COUNTS[:, None]
    tokens = np.where(there, np.arange(LENGTH) + 1, 0).astype(np.float32)[..., None]
    options = Contrast(**(OFF | {name: share}))
    times = jnp.asarray(tokens[..., 0], jnp.int32) * 60
    given = jnp.asarray(tokens), times, jnp.asarray(COUNTS), jax.random.key(1)
    found = views(options, *given)
    rows, sizes = np.asarray(found.tokens)[..., 0].astype(int), np.asarray(found.size)
    assert not rows[np.arange(LENGTH) >= sizes[:, None]].any()
    np.testing.assert_array_equal(found.there, rows > 0)
    assert found.moments is not None
    np.testing.assert_array_equal(np.asarray(found.moments)[rows > 0], rows[rows > 0] * 60)
    return [row[:size].tolist() for row, size in zip(rows, sizes, strict=True)]


def test_a_hidden_event_stays_hidden() -> None:
    """In a stretch of one event nothing moves."""
    tokens = jnp.asarray([1.0, 2.0, 0.0, 4.0, 0.0, 0.0])[None, :, None]
    options = Contrast(**(OFF | {"reorder": 0.01}))
    found = views(options, tokens, None, jnp.array([4]), jax.random.key(0))
    assert found.there[0].tolist() == [True, True, False, True, False, False]


def test_a_crop_is_a_stretch_of_the_history() -> None:
    found = _views("crop", 0.4)
    for view, count in zip(found, COUNTS, strict=True):
        assert len(view) == (max(1, round(0.6 * count)) if count else 0)
        assert view == list(range(view[0], view[0] + len(view))) if view else not count
    assert len({view[0] for view, count in zip(found, COUNTS, strict=True) if count == 10}) > 2


def test_a_mask_leaves_places_empty_and_what_is_dropped_leaves_none() -> None:
    masked, dropped = _views("mask", 0.5), _views("drop", 0.5)
    whole = [list(range(1, count + 1)) for count in COUNTS]
    for of_mask, of_drop, all_of in zip(masked, dropped, whole, strict=True):
        assert [b or a for a, b in zip(all_of, of_mask, strict=True)] == all_of
        assert of_drop == [event for event in all_of if event in of_drop]
        assert bool(of_drop) == bool(all_of)
    empty = np.concatenate([np.array(view) == 0 for view in masked])
    assert 0.3 < empty.mean() < 0.7
    assert 0.3 < sum(map(len, dropped)) / COUNTS.sum() < 0.7


def test_a_stretch_is_shuffled_and_all_else_stays() -> None:
    found = _views("reorder", 0.4)
    for view, count in zip(found, COUNTS, strict=True):
        moved = [place for place in range(count) if view[place] != place + 1]
        assert sorted(view) == list(range(1, count + 1))
        assert not moved or moved[-1] - moved[0] < max(1, round(0.4 * count))
    assert any(view != sorted(view) for view in found)


@pytest.mark.slow
def test_each_way_is_taken_by_some() -> None:
    there = (np.arange(LENGTH) < 10).astype(np.float32)
    tokens = jnp.asarray(np.tile(there * (np.arange(LENGTH) + 1), (200, 1))[..., None])
    given = tokens, None, jnp.full(200, 10), jax.random.key(0)
    found = views(Contrast(drop=0.5), *given)
    rows, left = np.asarray(found.tokens)[..., 0], np.asarray(found.size)
    cropped = (left == 6) & (np.diff(rows[:, :6], axis=1) == 1).all(axis=1)
    masked = (left == 10) & (rows[:, :10] == 0).any(axis=1)
    shuffled = (left == 10) & (np.diff(rows[:, :10], axis=1) < 0).any(axis=1) & ~masked
    for share in (cropped.mean(), masked.mean(), shuffled.mean()):
        assert 0.1 < share < 0.4


def test_views_are_told_from_those_of_the_others_written_out() -> None:
    rng, temperature = np.random.default_rng(0), 0.5
    one, other = rng.normal(size=(2, 5, 3)).astype(np.float32)
    counts, users = np.array([1.0, 1.0, 0.0, 1.0, 1.0], np.float32), np.array([7, 8, 9, 5, 8])
    states_of_views = jnp.asarray(one), jnp.asarray(other), jnp.asarray(users)
    found = contrast_loss(*states_of_views, jnp.asarray(counts), temperature)
    kept = [0, 1, 3, 4, 5, 6, 8, 9]
    states = np.concatenate([one, other])[kept].astype(np.float64)
    whose = np.tile(users, 2)[kept]
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    expected = 0.0
    for i in range(8):
        others = [j for j in range(8) if whose[j] != whose[i] or j == (i + 4) % 8]
        scores = np.exp(states[others] @ states[i] / temperature)
        expected -= np.log(scores[others.index((i + 4) % 8)] / scores.sum()) / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)
    given = jnp.asarray(other), jnp.asarray(users), jnp.zeros(5), 0.5
    gradient = jax.grad(lambda x: contrast_loss(x, *given))
    assert not np.asarray(gradient(jnp.asarray(one))).any()  # and it is finite
