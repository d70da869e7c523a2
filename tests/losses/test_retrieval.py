"""Losses of the retrieval against the full softmax and closed forms; negatives and their logQ."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.kernels.softmax import softmax_loss
from mtrec_jax.losses.negatives import NEGATIVES, Pool, size_of, state_before
from mtrec_jax.losses.negatives.batch import FromBatch, Queue
from mtrec_jax.losses.negatives.catalogue import AllItems, Popular, Uniform
from mtrec_jax.losses.negatives.hard import Hard
from mtrec_jax.losses.negatives.mixed import Mixed
from mtrec_jax.losses.retrieval import RETRIEVAL, Compared, contract, softmax
from mtrec_jax.losses.retrieval.softmax import Softmax
from mtrec_jax.models.model import make_catalogue
from mtrec_jax.types import FIRST, Catalogue

B, P, D, N, SCALE = 2, 3, 5, 10, 2.0
_RNG = np.random.default_rng(0)


def _unit(shape: tuple[int, ...]) -> jax.Array:
    vectors = _RNG.normal(size=shape)
    return jnp.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), jnp.float32)


USERS, VECTORS = _unit((B, P, D)), _unit((N + FIRST, D))
POSITIVES = jnp.asarray(_RNG.integers(FIRST, N + FIRST, (B, P)), jnp.int32)
COUNTS = np.arange(1, N + 1)
ONES = jnp.ones((B, P))
SCORES = SCALE * np.asarray(USERS, np.float64) @ np.asarray(VECTORS, np.float64).T
OWN = np.take_along_axis(SCORES, np.asarray(POSITIVES)[..., None], axis=-1)[..., 0]
PARTITION = np.exp(SCORES[..., FIRST:]).sum(axis=-1)
EVERY = jnp.arange(FIRST, N + FIRST)


def _catalogue(power: float, counts: np.ndarray = COUNTS) -> Catalogue:
    nothing = {"ids": np.zeros((N + 2, 0), np.int32), "numbers": np.zeros((N + 2, 0), np.float32)}
    return make_catalogue(nothing, counts, N, power, "float32")


def _compared(
    ids: jax.Array,
    log_expected: jax.Array,
    users: jax.Array = USERS,
    vectors: jax.Array = VECTORS,
    weights: jax.Array = ONES,
    **other: Any,
) -> Compared:
    given = Compared(
        users=users,
        positives=vectors[POSITIVES],
        negatives=vectors[ids],
        positive_ids=POSITIVES,
        negative_ids=ids,
        log_expected=log_expected,
        scale=SCALE,
        weights=weights,
        items=N,
        shown=None,
    )
    return given._replace(**other)


def _each(options: Any, ids: jax.Array, log_expected: jax.Array, **other: Any) -> jax.Array:
    """The loss of each position: by how much its weight changes the sum."""

    def total(weights: jax.Array) -> jax.Array:
        loss: jax.Array = options.loss(_compared(ids, log_expected, weights=weights, **other))
        return loss

    return jax.grad(total)(ONES)


# --- Losses


def test_every_item_once_is_the_full_softmax() -> None:
    found = _each(Softmax(), EVERY, jnp.zeros(N))
    np.testing.assert_allclose(found, np.log(PARTITION) - OWN, rtol=1e-5)


def test_positions_come_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One position at a time, as where logits would not fit: the losses stay with their places."""
    weights = jnp.asarray(_RNG.random((B, P)), jnp.float32)
    tiles: list[tuple[int, ...]] = []

    def noting(queries: Any, *more: Any) -> Any:
        tiles.append(queries.shape[:2])
        return softmax_loss(queries, *more)

    expected = ((np.log(PARTITION) - OWN) * np.asarray(weights)).sum()
    monkeypatch.setattr(softmax, "softmax_loss", noting)
    for most, shape in ((contract.LOGITS, (1, B)), (1, (P, B))):
        monkeypatch.setattr(contract, "LOGITS", most)
        total = Softmax().loss(_compared(EVERY, jnp.zeros(N), weights=weights))
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        assert tiles.pop() == shape


def test_a_negative_that_is_the_positive_or_padding_does_not_count() -> None:
    ids = jnp.full((B, P), 5, jnp.int32)
    shape: dict[str, Any] = {"positives": VECTORS[ids], "positive_ids": ids}
    drawn, expected = jnp.array([2, 3, 5, 5, 0]), jnp.array([0.1, 0.2, 0.3, 0.4, jnp.inf])
    for options in (Softmax(), RETRIEVAL["bce"](), RETRIEVAL["bpr"](), RETRIEVAL["contrastive"]()):
        with_hits = _each(options, drawn, expected, **shape)
        without = _each(options, drawn[:2], expected[:2], **shape)
        if options.kind == "softmax":
            np.testing.assert_allclose(with_hits, without, rtol=1e-6)
            continue
        none = _each(options, drawn[2:3], expected[2:3], **shape)  # what the positive adds alone
        np.testing.assert_allclose((with_hits - none) * 5, (without - none) * 2, rtol=1e-5)


def test_nothing_but_hits_is_a_loss_of_zero_without_gradient() -> None:
    ids, drawn = jnp.full((B, P), 4, jnp.int32), jnp.full(3, 4, jnp.int32)

    def total(users: jax.Array, vectors: jax.Array) -> jax.Array:
        other = {"positive_ids": ids, "positives": vectors[ids]}
        return Softmax().loss(_compared(drawn, jnp.zeros(3), users, vectors, **other))

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(USERS, VECTORS)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("kind", RETRIEVAL)
def test_padding_and_extreme_scores_stay_finite(kind: str) -> None:
    """A zero vector for the positive, and a temperature that overflows a plain exp."""

    def total(users: jax.Array, vectors: jax.Array) -> jax.Array:
        other: dict[str, Any] = {"positives": vectors[POSITIVES] * 0, "scale": 1e3}
        loss: jax.Array = RETRIEVAL[kind]().loss(
            _compared(EVERY, jnp.zeros(N), users, vectors, **other)
        )
        return loss

    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(USERS, VECTORS)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)


def test_losses_of_pairs_are_those_of_their_papers() -> None:
    """With three negatives that are no position's next item; gBCE by hand: of 3 of 9 others alpha
    is 1/3, and with t = .75 beta = 1/3 (.75 (1 - 3) + 3) = .5; logits are moved by log(.5 / 3)."""
    free = [i for i in range(FIRST, N + FIRST) if i not in np.asarray(POSITIVES)][:3]
    assert len(free) == 3
    others = SCORES[..., free]
    yes, no = np.log1p(np.exp(-OWN)), np.log1p(np.exp(others))
    bias = np.log(0.5 / 3)
    rare_yes, rare_no = np.log1p(np.exp(-OWN - bias)), np.log1p(np.exp(others + bias))
    worse = np.log1p(np.exp(others - OWN[..., None]))
    above = np.maximum(others / SCALE - 0.4, 0)
    expected = {
        "bce": yes + no.mean(axis=-1),
        "gbce": (0.5 * rare_yes + rare_no.sum(axis=-1)) / 4,
        "bpr": worse.mean(axis=-1),
        "contrastive": 1 - OWN / SCALE + 150 * above.mean(axis=-1),
    }
    for kind, value in expected.items():
        given = jnp.array(free), jnp.zeros(3)
        found = _each(RETRIEVAL[kind](), *given, items=N)
        np.testing.assert_allclose(found, value, rtol=2e-5, err_msg=kind)


def test_what_was_shown_and_passed_over_is_a_negative_of_its_own() -> None:
    """Beside a drawn item 9: position 0 chose against position 2, which nobody weighs."""
    drawn, seen = jnp.array([9]), np.zeros((B, P, P), bool)
    seen[0, 0, 2] = True
    found = _each(Softmax(), drawn, jnp.zeros(1), shown=jnp.asarray(seen))
    plain = _each(Softmax(), drawn, jnp.zeros(1))
    terms = [SCORES[0, 0, int(i)] for i in (*POSITIVES[0, [0, 2]], 9)]
    expected = np.array(plain)
    expected[0, 0] = np.log(np.exp(terms).sum()) - terms[0]
    assert 9 not in np.asarray(POSITIVES[0, :1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- Negatives

BATCH = jnp.asarray(_RNG.choice(np.arange(FIRST, N + FIRST), (8, 16), p=COUNTS / COUNTS.sum()))
THERE = jnp.asarray(_RNG.random(BATCH.shape) < 0.8, jnp.float32)
DRAWN = {
    "uniform": Uniform(count=16),
    "popular": Popular(count=16),
    "all": AllItems(),
    "batch": FromBatch(count=64),
    "queue": Queue(count=64, batches=2),
    "mixed": Mixed(count=32),
    "hard": Hard(count=16, pool=48),
}


def _in_batch() -> np.ndarray:
    """How often each item is the next one in the batch, by catalogue index."""
    return np.bincount(np.asarray(BATCH)[np.asarray(THERE) > 0], minlength=N + FIRST)[FIRST:]


def test_every_way_to_draw_is_tested() -> None:
    assert DRAWN.keys() == NEGATIVES.keys()


@pytest.mark.parametrize("kind", DRAWN)
def test_the_partition_and_its_gradient_are_those_of_the_full_softmax(kind: str) -> None:
    """Mean over draws of exp(loss + own logit), which is Z: without logQ it is far from it; and of
    its gradient. The training counts are those of the batch, and the moving averages slow."""
    options: Any = DRAWN[kind]
    if hasattr(options, "rate"):
        options = type(options)(**{**vars(options), "rate": 1e-6})
    pool = Pool(_catalogue(options.power, _in_batch()), N, BATCH, THERE)

    def partition(vectors: jax.Array, key: jax.Array) -> jax.Array:
        start = state_before(options, N)
        if kind == "queue":  # half of it is old
            start = options.draw(pool, start, jax.random.fold_in(key, 2))[1]
        drawn, _ = options.draw(pool, start, key)
        assert drawn.ids.shape == (size_of(options, N),)

        def total(weights: jax.Array) -> jax.Array:
            given = _compared(drawn.ids, drawn.log_expected, vectors=vectors, weights=weights)
            if hasattr(options, "kept"):
                given = options.kept(given, jax.random.fold_in(key, 1))
            return Softmax().loss(given)

        own = SCALE * jnp.sum(USERS * vectors[POSITIVES], axis=-1)
        return jnp.sum(jnp.exp(jax.grad(total)(ONES) + own))

    @jax.jit
    def both(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(functools.partial(jax.value_and_grad(partition), VECTORS))(keys)

    def exact(vectors: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(SCALE * USERS @ vectors[FIRST:].T))

    value, gradient = jax.value_and_grad(exact)(VECTORS)
    draws = 1 if kind == "all" else 3000
    found = both(jax.random.split(jax.random.key(1), draws))
    for of_draws, true in zip(found, (value, gradient), strict=True):
        mean, spread = np.asarray(of_draws).mean(axis=0), np.asarray(of_draws).std(axis=0)
        error = spread / np.sqrt(draws) + 1e-5 * float(np.abs(true).max())
        assert (error < 0.03 * np.abs(true).max()).all()  # sharp enough to see a wrong sign
        assert (np.abs(mean - true) < 4.8 * error).all()


@pytest.mark.parametrize("options", [FromBatch(count=64), Queue(count=128, batches=2)])
def test_gaps_recover_a_popularity_that_counts_do_not_know(options: Any) -> None:
    """Training counts say that all are alike; the stream, that some are many times as frequent, of
    which each batch has others."""
    share = _in_batch() / _in_batch().sum()

    @jax.jit
    def stepped(state: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        of_batch, of_draw = jax.random.split(key)
        known = jax.random.choice(of_batch, N, BATCH.shape, p=jnp.asarray(share)) + FIRST
        drawn, state = options.draw(Pool(_catalogue(0.0), N, known, THERE), state, of_draw)
        return state, drawn

    state = state_before(options, N)
    for key in jax.random.split(jax.random.key(2), 400):
        state, (ids, expected) = stepped(state, key)
    of_item = dict(zip(np.asarray(ids).tolist(), np.asarray(expected), strict=True))
    errors = [of_item[i] - np.log(len(ids) * share[i - FIRST]) for i in of_item]
    print(errors)
    assert np.abs(np.mean(errors)) < 0.15
    assert np.max(np.abs(errors)) < 0.5
    assert all(np.isfinite(part).all() for part in jax.tree.leaves(state))
    assert not np.allclose(share, 0.1, atol=0.03)


def test_a_queue_has_the_last_batches_and_its_empty_places_do_not_count() -> None:
    options, key = Queue(count=6, batches=3), jax.random.key(0)
    pool, state = Pool(_catalogue(1.0), N, BATCH, THERE), state_before(options, N)
    seen: list[int] = []
    for number in range(4):
        (ids, expected), state = options.draw(pool, state, jax.random.fold_in(key, number))
        seen = [*np.asarray(ids)[:2], *seen]
        filled = np.isfinite(expected)
        np.testing.assert_array_equal(filled, np.asarray(ids) > 0)
        assert filled.sum() == min(6, 2 * (number + 1))
        np.testing.assert_array_equal(np.asarray(ids)[filled], seen[: filled.sum()])


@pytest.mark.slow
def test_a_batch_without_a_next_item_brings_padding() -> None:
    pool = Pool(_catalogue(1.0), N, BATCH, THERE * 0)
    for options in (FromBatch(count=4), Mixed(count=4), Queue(count=4)):
        (ids, expected), _ = options.draw(pool, state_before(options, N), jax.random.key(0))
        assert (np.isinf(expected) == (np.asarray(ids) == 0)).all()
        assert not np.isnan(expected).any()


def test_hard_negatives_are_hard() -> None:
    """The mean cosine of those that are kept is above that of the pool."""
    options, pool = Hard(count=64, pool=256), Pool(_catalogue(0.0), N, BATCH, THERE)
    drawn, _ = options.draw(pool, {}, jax.random.key(0))
    given = _compared(*drawn, scale=10.0)
    kept = options.kept(given, jax.random.key(1))
    before, after = (float(jnp.mean(USERS @ c.negatives.T)) for c in (given, kept))
    assert len(kept.negative_ids) == 64
    assert after > before + 0.03
