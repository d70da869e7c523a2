"""Friends' tastes: equal to a plain loop, strictly from the past, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.data import social
from mtrec_jax.data.social import Responses, friends_taste
from mtrec_jax.types import Lists

USERS, VALUES, MEAN, SMOOTHING = 4, 3, 0.25, 2.0
VALUE_OF = np.array([-1, -1, 0, 1, 2, 0, -1])  # items 2 .. 6


def _problem(seed: int) -> tuple[Lists, Responses, np.ndarray, np.ndarray]:
    """Friends, events in the order of user and time, and examples in any order."""
    rng = np.random.default_rng(seed)
    tied = rng.random((USERS, USERS)) < 0.5
    np.fill_diagonal(tied, False)
    friends = Lists(np.nonzero(tied)[1], np.concatenate([[0], np.cumsum(tied.sum(axis=1))]))
    owner = np.sort(rng.integers(USERS, size=30))
    time = rng.integers(8, size=30).astype(float)
    time = time[np.lexsort((time, owner))]
    label = rng.choice([0.0, 0.5, 1.0, np.nan], size=30)
    begins = np.searchsorted(owner, np.arange(USERS + 1))
    item, split = rng.integers(1, 7, size=30), rng.integers(4, size=30).astype(np.int8)
    events = Responses(begins, time, split, item, label, VALUE_OF)
    return friends, events, rng.integers(USERS, size=9), rng.integers(9, size=9).astype(float)


def _taste(problem: tuple[Lists, Responses, np.ndarray, np.ndarray]) -> np.ndarray:
    return friends_taste(*problem, (0, 3), VALUES, MEAN, SMOOTHING)


def _loop(problem: tuple[Lists, Responses, np.ndarray, np.ndarray]) -> np.ndarray:
    friends, events, users, moments = problem
    found = np.zeros((len(users), VALUES))
    for e, (user, at) in enumerate(zip(users, moments, strict=True)):
        for value in range(VALUES):
            labels = [
                events.label[i]
                for friend in friends[user]
                for i in range(events.begins[friend], events.begins[friend + 1])
                if events.time[i] < at
                and events.split[i] in (0, 3)
                and VALUE_OF[events.item[i]] == value
                and not np.isnan(events.label[i])
            ]
            total, count = sum(labels) + SMOOTHING * MEAN, len(labels) + SMOOTHING
            found[e, value] = total / count - MEAN
    return found


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), work=st.sampled_from([1, 20, 1 << 21]))
def test_friends_taste_is_that_of_a_plain_loop(seed: int, work: int) -> None:
    problem = _problem(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(social, "_WORK", work)
        np.testing.assert_allclose(_taste(problem), _loop(problem), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), moment=st.integers(0, 8))
def test_nothing_at_or_after_an_example_touches_it(seed: int, moment: int) -> None:
    friends, events, users, _ = _problem(seed)
    at = np.full(len(users), float(moment))
    late = events.time >= moment
    rng = np.random.default_rng(seed + 1)
    changed = events._replace(
        label=np.where(late, rng.random(30), events.label),
        item=np.where(late, rng.permutation(events.item), events.item),
        split=np.where(late, 0, events.split),
    )
    before, after = (_taste((friends, e, users, at)) for e in (events, changed))
    np.testing.assert_array_equal(before, after)


def test_by_hand() -> None:
    """User 0 has friends 1 and 2; the own events and those of user 3 say nothing."""
    owner = np.array([0, 1, 1, 2, 3])
    events = Responses(
        begins=np.searchsorted(owner, np.arange(5)),
        time=np.array([1.0, 1.0, 3.0, 2.0, 1.0]),
        split=np.zeros(5, np.int8),
        item=np.array([2, 2, 2, 3, 2]),
        label=np.array([1.0, 1.0, 1.0, 0.0, 0.0]),
        value_of=VALUE_OF,
    )
    friends = Lists(np.array([1, 2]), np.array([0, 2, 2, 2, 2]))
    users, at = np.array([0, 1, 0, 0]), np.array([np.inf, np.inf, 2.0, 3.0])
    found = friends_taste(friends, events, users, at, (0,), 3, mean=0.5, smoothing=2.0)
    expected = [
        [3 / 4 - 1 / 2, 1 / 3 - 1 / 2, 0],  # (2 + 1) / (2 + 2), (0 + 1) / (1 + 2)
        [0, 0, 0],
        [2 / 3 - 1 / 2, 0, 0],  # (1 + 1) / (1 + 2); the event at 2 is not earlier
        [2 / 3 - 1 / 2, 1 / 3 - 1 / 2, 0],
    ]
    np.testing.assert_allclose(found, np.array(expected), atol=1e-7)
