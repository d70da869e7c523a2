"""Kinds of tasks: losses and predictions on cases worked out by hand."""

from __future__ import annotations

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.config import Task
from mtrec_jax.evaluation.metrics import METRICS
from mtrec_jax.losses.lists import LISTS
from mtrec_jax.losses.tasks import KINDS, TaskField, class_levels, head_of
from mtrec_jax.losses.tasks.ordinal import first_thresholds, probabilities
from mtrec_jax.losses.tasks.watch_time import FEWEST, quantiles_of, seconds_at, share_below
from mtrec_jax.models.layers import Thresholds

STARS = TaskField(classes=("1", "2", "5"), shares=(0.2, 0.3, 0.5))


def test_a_kind_is_known_wherever_it_is_named() -> None:
    hints = typing.get_type_hints(Task)
    assert {*KINDS, "retrieval"} == set(typing.get_args(hints["kind"]))
    assert set(METRICS) == set(KINDS)
    heads = {loss for kind in KINDS.values() for loss in kind.heads}
    assert {"", *heads, *LISTS} == set(typing.get_args(hints["loss"]))


def test_ordered_classes_lie_between_cumulative_probabilities() -> None:
    """McCullagh 1980. A score of 1/2 above thresholds 0 and 2: P(y > 1) = sigmoid(1/2) = .62246 and
    P(y > 2) = sigmoid(-3/2) = .18243, so that the classes have .37754, .44003 and .18243, and the
    expected number is 1 + .62246 + 3 · .18243 = 2.16975."""
    logits = jnp.array([[0.5, -1.5]] * 3)
    head, p = head_of("ordinal"), np.array([0.377541, 0.440034, 0.182426])
    for xp in (np, jnp):
        found = head.predict(np.asarray(logits) if xp is np else logits, STARS, xp)
        np.testing.assert_allclose(found, [p] * 3, rtol=1e-5)
    found = head.loss(logits, jnp.array([1.0, 2.0, 5.0]), STARS)
    np.testing.assert_allclose(found, -np.log(p), rtol=1e-5)
    np.testing.assert_allclose(head.order(np.asarray(logits), STARS), [2.16975] * 3, rtol=1e-5)
    # for the fusion the numbers 1, 2, 5 are levels 0, 1/2, 2: 1/2 · .62246 + 3/2 · .18243
    score = head.score(logits, class_levels(STARS.classes))
    np.testing.assert_allclose(score, [0.584868] * 3, rtol=1e-5)
    np.testing.assert_allclose(head.unit(score, class_levels(STARS.classes)), [0.292434] * 3, 1e-5)


def test_coral_is_a_cross_entropy_a_threshold() -> None:
    """Cao et al. 2020, by hand for the class in the middle: -log sigmoid(1/2) - log sigmoid(3/2).
    With two classes it is the binary cross-entropy, as are the proportional odds."""
    loss = head_of("ordinal", "coral").loss
    found = loss(jnp.array([[0.5, -1.5]]), jnp.array([2.0]), STARS)
    np.testing.assert_allclose(found, [-np.log(0.622459) - np.log(0.817574)], rtol=1e-5)
    two, logits, labels = TaskField(classes=("0", "1")), jnp.array([0.7, 0.7]), jnp.array([0.0, 1])
    binary = head_of("binary").loss(logits, labels, two)
    for name in KINDS["ordinal"].heads:
        found = head_of("ordinal", name).loss(logits[:, None], labels, two)
        np.testing.assert_allclose(found, binary, rtol=1e-5)


def test_ordered_classes_stay_finite_where_they_are_certain() -> None:
    for score in (-200.0, 0.0, 200.0):
        logits = jnp.array([[score, score - 1e-7]] * 3)

        def total(logits: jax.Array) -> jax.Array:
            return jnp.sum(head_of("ordinal").loss(logits, jnp.array([1.0, 2.0, 5.0]), STARS))

        value, gradient = jax.value_and_grad(total)(logits)
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(gradient)).all()


def test_thresholds_begin_at_the_shares_and_stay_in_order() -> None:
    """A score of 0 has the shares of the training labels, .2, .3 and .5, to begin with."""
    layer = Thresholds(first_thresholds(STARS), dtype=jnp.dtype("float32"))
    np.testing.assert_allclose(
        probabilities(np.asarray(layer(jnp.zeros(1))), STARS, np), [STARS.shares], rtol=1e-5
    )
    layer.free[...] = jnp.array([3.0, -8.0])
    above = np.asarray(layer(jnp.array([0.0, 1.5])))
    assert (above[:, 0] > above[:, 1]).all()
    np.testing.assert_allclose(above[1] - above[0], 1.5)  # all thresholds share the score


def test_the_odds_are_the_expected_watch_time() -> None:
    """Two of four impressions are watched, 30 and 10 seconds long: 10 on average, where the loss is
    flat. Were the watched ones no negatives as well, the odds would be 40 / 2 = 20 (Covington et
    al. 2016: E[T] / (1 - P), near E[T] as long as few are watched)."""
    head, learned = head_of("watch_time"), TaskField(mean=4.0)
    labels = jnp.array([0.0, 0.0, 30.0, 10.0])

    def total(score: jax.Array) -> jax.Array:
        return jnp.sum(head.loss(jnp.full(4, score), labels, learned))

    best = jnp.log(10.0 / 4.0)
    np.testing.assert_allclose(jax.grad(total)(best), 0, atol=1e-5)
    assert jax.grad(total)(best + 0.1) > 0.1
    np.testing.assert_allclose(head.predict(np.full(1, best), learned, np), [10.0], rtol=1e-5)
    # by hand: 10/4 · log(1 + 4/10) + log(1 + 10/4)
    np.testing.assert_allclose(
        head.loss(best, jnp.array(10.0), learned), 2.5 * np.log(1.4) + np.log(3.5), rtol=1e-5
    )


QUANTILES = TaskField(quantiles=((0.0, 0.0, 4.0, 10.0, 10.0), (0.0, 10.0, 20.0, 30.0, 40.0)))


def test_a_label_becomes_its_quantile_among_items_of_its_duration() -> None:
    """D2Q (Zhan et al. 2022). Quarters of the first group end at 0, 0, 4, 10 and 10 seconds: 0 is
    in the middle of the first quarter, 7 in that of the third, and 10 in that of the last. In
    the second group 10 seconds are a quarter of the way."""
    labels, groups = jnp.array([0.0, 7.0, 10.0, 10.0, 99.0]), jnp.array([0.0, 0, 0, 1, 1])
    target = np.array([0.125, 0.625, 0.875, 0.25, 1.0])
    edges = jnp.array(QUANTILES.quantiles)[groups.astype(int)]
    np.testing.assert_allclose(share_below(labels, edges), target)
    head = head_of("watch_time", "duration_quantiles")
    given = jnp.stack([jnp.full(5, np.log(3.0)), groups], -1)  # a predicted quantile of 3/4
    found = head.loss(given, labels, QUANTILES)
    np.testing.assert_allclose(found, 12 * (0.75 - target) ** 2, rtol=1e-5, atol=1e-6)


def test_a_predicted_quantile_becomes_seconds_of_the_items_duration() -> None:
    """3/4 is 10 seconds among the short ones and 30 among the long ones, 3/8 is 2 and 15."""
    logits = np.log(np.array([3.0, 3.0, 0.6, 0.6], np.float32))
    given = np.stack([logits, np.array([0, 1, 0, 1], np.float32)], -1)
    for xp in (np, jnp):
        found = seconds_at(xp.asarray(given), QUANTILES, xp)
        np.testing.assert_allclose(found, [10.0, 30.0, 2.0, 15.0], rtol=1e-5)
        assert found.dtype == np.float32
    ends = np.array([[-90.0, 1.0], [90.0, 1.0]], np.float32)
    np.testing.assert_allclose(seconds_at(ends, QUANTILES, np), [0.0, 40.0], atol=1e-5)


def test_quantiles_are_those_of_each_group_or_of_all_where_it_has_too_few_labels() -> None:
    labels = np.concatenate([np.arange(101.0), np.full(FEWEST - 1, 1000.0)])
    groups = np.repeat([3, 1], [101, FEWEST - 1])
    table = quantiles_of(labels, groups, 5)
    assert table[3] == tuple(np.arange(101.0))
    assert table[0] == table[1] == table[4]
    assert table[1][0] == 0
    assert table[1][-1] == 1000  # of all labels
    assert len({len(row) for row in table}) == 1


@pytest.mark.parametrize(
    ("kind", "loss"), [(kind, loss) for kind, of in KINDS.items() for loss in of.heads]
)
def test_scores_of_every_kind_rise_from_0_to_1(kind: str, loss: str) -> None:
    head, levels = head_of(kind, loss), class_levels(STARS.classes)
    x = np.linspace(-20, 20, 9, dtype=np.float32)
    logits: Any = jnp.asarray(x)
    if kind == "ordinal":
        logits = logits[:, None] - jnp.array([[-1.0, 1.0]])
    elif kind == "multiclass":
        logits = logits[:, None] * jnp.array([[-1.0, 0.0, 1.0]])
    found = np.asarray(head.unit(head.score(logits, levels), levels))
    assert found[0] < 1e-3
    assert found[-1] > 1 - 1e-3
    assert (np.diff(found) >= 0).all()
