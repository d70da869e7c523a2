"""Fusions by hand, in NumPy: what each makes of given scores, and that none disturbs the tasks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.fusions import FUSIONS, FusionSizes, Term, Utility
from mtrec_jax.models.fusions.attention import Attention
from mtrec_jax.models.fusions.multiplicative import Multiplicative
from mtrec_jax.models.fusions.weighted import Weighted
from mtrec_jax.types import Fusing

N, STATE, HIDDEN = 9, 4, 5
TASKS = ("next", "click", "buy", "stars")
SHOP = Utility("", (Term("click", 1.0, ("click",)), Term("buy", 5.0, ("click", "buy"))))
LOG = Utility("next", (Term("next", 1.0, ()), Term("buy", 3.0, ("buy",))))


def made(options: Any, utility: Utility) -> Any:
    sizes = FusionSizes(STATE, HIDDEN, TASKS, utility)
    return options.make(sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def odds(p: Any) -> jax.Array:
    return jnp.log(jnp.asarray(p, jnp.float32) / (1 - jnp.asarray(p, jnp.float32)))


def of_probabilities(click: list[float], buy: list[float]) -> Fusing:
    """Two pairs or more of given probabilities; the score of the next item is 0, 1, …"""
    n = len(click)
    scores = {"next": jnp.arange(n, dtype=jnp.float32), "click": odds(click), "buy": odds(buy)}
    return Fusing(jnp.ones((n, STATE)), {}, scores | {"stars": jnp.zeros(n)}, {})


def drawn() -> Fusing:
    keys = jax.random.split(jax.random.key(1), 8)
    towers = dict(zip(TASKS[1:], keys, strict=False))
    hidden = {t: jax.random.normal(k, (N, HIDDEN)) for t, k in towers.items()}
    scores = {t: 2 * jax.random.normal(k, (N,)) for t, k in zip(TASKS, keys[3:], strict=False)}
    units = {t: jax.nn.sigmoid(score) for t, score in scores.items()}
    return Fusing(jax.random.normal(keys[7], (N, STATE)), hidden, scores, units)


def test_weighted_is_the_expected_worth_along_the_funnel() -> None:
    """A click of .5 with a purchase of .2 after it: .5 + 5 x .5 x .2 = 1, half of it the click's; a
    click of .25 with one of .8: .25 + 5 x .25 x .8 = 1.25. The first is clicked more, the second
    worth more."""
    fused, shares = made(Weighted(), SHOP)(of_probabilities([0.5, 0.25], [0.2, 0.8]))
    np.testing.assert_allclose(fused, [1.0, 1.25], rtol=1e-5)
    np.testing.assert_allclose(shares, [[0, 0.5, 0.5, 0], [0, 0.2, 0.8, 0]], atol=1e-5)


def test_given_a_next_item_its_probability_multiplies_the_worth() -> None:
    """log p(next) + log(1 + 3 p(buy)): scores 0 and 1, purchases of 1/3 and 1/2; the click, which
    next items have had, counts for nothing."""
    fused, shares = made(Weighted(), LOG)(of_probabilities([0.9, 0.1], [1 / 3, 1 / 2]))
    np.testing.assert_allclose(fused, [np.log(2), 1 + np.log(2.5)], rtol=1e-5)
    np.testing.assert_allclose(shares, [[0.5, 0, 0.5, 0], [0.4, 0, 0.6, 0]], atol=1e-5)


def test_multiplicative_is_the_product_of_powers() -> None:
    """p(click)^2 p(buy | click)^.5; learned powers begin at 1, with a root the score is log p."""
    given = of_probabilities([0.5, 0.25], [0.2, 0.8])
    fused, weights = made(Multiplicative(powers={"click": 2.0, "buy": 0.5}), SHOP)(given)
    np.testing.assert_allclose(np.exp(fused), [0.25 * 0.2**0.5, 0.0625 * 0.8**0.5], rtol=1e-5)
    np.testing.assert_allclose(weights, [[0, 0.8, 0.2, 0]] * 2, atol=1e-6)
    learned = made(Multiplicative(), SHOP)
    np.testing.assert_allclose(np.exp(learned(given)[0]), [0.1, 0.2], rtol=1e-3)
    learned.power[...] = jnp.array([-9.0, 9.0])  # softplus: never below 0
    learned.bias[...] = jnp.array(0.5)
    expected = 0.5 + np.log1p(np.exp(-9)) * np.log([0.5, 0.25])
    expected += np.log1p(np.exp(9)) * np.log([0.2, 0.8])
    np.testing.assert_allclose(learned(given)[0], expected, rtol=1e-5)
    rooted, weights = made(Multiplicative(), LOG)(given)
    np.testing.assert_allclose(rooted, [np.log(0.2), 1 + np.log(0.8)], rtol=1e-3)
    np.testing.assert_allclose(weights, [[0.5, 0, 0.5, 0]] * 2, rtol=1e-3)


@pytest.mark.parametrize(
    ("powers", "problem"),
    [
        ({"stars": 1.0}, "'stars' is no probability of the utility, which has click, buy"),
        ({"click": 0.0}, "at least one must be above 0"),
    ],
)
def test_powers_that_mean_nothing_are_refused(powers: dict[str, float], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"model.fusion.powers: {problem}"):
        made(Multiplicative(powers=powers), SHOP)


@pytest.mark.parametrize("utility", [SHOP, LOG], ids=["shown", "next"])
def test_attention_begins_at_the_declared_worths(utility: Utility) -> None:
    """Its prior: the weights are the worths' shares, but for the small random identities; fused is
    the log-odds of the scaled worth, or with a root its score plus the logarithm."""
    fusion, given = made(Attention(), utility), drawn()
    fused, weights = fusion(given)
    worth = np.array([term.worth for term in utility.terms])
    places = [TASKS.index(term.task) for term in utility.terms]
    expected = np.tile(worth / worth.sum(), (N, 1))
    np.testing.assert_allclose(np.asarray(weights)[:, places], expected, atol=0.02)
    fusion.identity[...] = jnp.zeros_like(fusion.identity[...])
    fused, weights = fusion(given)
    plain = np.asarray(made(Weighted(), utility)(given)[0])
    share = plain / worth.sum()
    exact = plain - np.log(worth.sum()) if utility.root else np.log(share / (1 - share))
    np.testing.assert_allclose(fused, exact, rtol=1e-4, atol=1e-5)


def test_attention_weighs_by_the_user_and_the_hidden_vectors() -> None:
    """By hand: a = softmax(log worth + query . (key + identity) / sqrt(size)), in plain NumPy."""
    fusion, given = made(Attention(size=3), SHOP), drawn()
    rng = np.random.default_rng(0)
    key, identity = rng.normal(size=(HIDDEN, 3)), rng.normal(size=(2, 3))
    fusion.key.kernel[...], fusion.identity[...] = jnp.array(key), jnp.array(identity)
    fused, weights = fusion(given)
    kernel, bias = (np.asarray(x[...]) for x in (fusion.query.kernel, fusion.query.bias))
    query = (np.asarray(given.state) @ kernel + bias) / 3**0.5
    logits = np.stack(
        [
            np.log(term.worth) + (query * (np.asarray(given.hidden[term.task]) @ key + own)).sum(1)
            for term, own in zip(SHOP.terms, identity, strict=True)
        ],
        axis=1,
    )
    a = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.ptp(a[:, 0]) > 0.1  # another user, another weighting
    np.testing.assert_allclose(np.asarray(weights)[:, 1:3], a, rtol=1e-4)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    click, buy = (1 / (1 + np.exp(-np.asarray(given.scores[t]))) for t in ("click", "buy"))
    m = a[:, 0] * click + a[:, 1] * click * buy
    np.testing.assert_allclose(fused, np.log(m / (1 - m)), rtol=1e-3, atol=1e-4)


def test_certain_clicks_have_finite_log_odds() -> None:
    """Logits of 40 are probabilities of 1 in single precision."""
    given = drawn()
    sure = given._replace(scores={t: jnp.full(N, 40.0) for t in TASKS})
    fusion = made(Attention(), SHOP)
    graph, state = nnx.split(fusion)
    value, gradient = jax.value_and_grad(lambda s: nnx.merge(graph, s)(sure)[0].sum())(state)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", FUSIONS)
def test_no_gradient_reaches_the_tasks_and_what_learns_gets_one(kind: str) -> None:
    options = FUSIONS[kind]()
    graph, state = nnx.split(made(options, SHOP), nnx.Param)[:2]

    def total(given: Fusing, state: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graph, state)(given)[0] ** 2)

    to_given, to_fusion = jax.grad(total, argnums=(0, 1))(drawn(), state)
    if kind != "none":  # nothing learns the mean, so that no gradient is ever asked for
        for gradient in jax.tree.leaves(to_given):
            np.testing.assert_array_equal(gradient, 0)
    leaves = jax.tree.leaves(to_fusion)
    assert bool(leaves) == options.learns
    moved = [np.abs(gradient).max() > 0 for gradient in leaves]
    assert all(moved)
