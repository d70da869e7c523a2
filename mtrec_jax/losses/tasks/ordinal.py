"""Ordered classes, such as stars: one score and a threshold between each two neighbours.

The tower gives a score s, which all thresholds t_0 < t_1 < … share: P(y > class k) is
sigmoid(s - t_k), so that these probabilities never cross (proportional odds, McCullagh, "Regression
models for ordinal data", JRSS B 1980; the same head in CORAL, Cao, Mirjalili and Raschka, "Rank
consistent ordinal regression for neural networks", Pattern Recognition Letters 2020). Logits are
those C - 1 differences. Labels are the numbers that the classes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mtrec_jax.losses.tasks.contract import (
    Head,
    Kind,
    TaskField,
    class_numbers,
    mean_log_odds,
    sigmoid,
    unit_of_levels,
)

FAR = 1e4  # a logit of probability 1
MOST = 128  # classes


def exceeded(labels: Float[Array, "*B"], learned: TaskField) -> Float[Array, "*B c"]:
    """1 for each of the C - 1 thresholds that a label lies above, between two numbers."""
    numbers = np.array(class_numbers(learned.classes))
    middle = jnp.array((numbers[1:] + numbers[:-1]) / 2, labels.dtype)
    return (labels[..., None] > jnp.broadcast_to(middle, (*labels.shape, len(middle)))).astype(
        labels.dtype
    )


def proportional_odds(
    logits: Float[Array, "*B c"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """-log P(y = label), where P(y = k) = sigmoid(x_(k-1)) - sigmoid(x_k).

    By sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which cancels nowhere.
    """
    place = jnp.sum(exceeded(labels, learned), axis=-1, keepdims=True).astype(jnp.int32)
    ends = [jnp.full_like(logits[..., :1], end) for end in (FAR, -FAR)]
    padded = jnp.concatenate([ends[0], logits, ends[1]], axis=-1)
    above, below = (jnp.take_along_axis(padded, place + n, axis=-1)[..., 0] for n in (0, 1))
    between = jnp.log(-jnp.expm1(jnp.minimum(below - above, -1e-6)))
    return -(jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below) + between)


def coral(
    logits: Float[Array, "*B c"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """The sum of the C - 1 cross-entropies of "above threshold k"."""
    targets = exceeded(labels, learned)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def probabilities(logits: Any, learned: TaskField, xp: Any) -> Any:
    """Of C classes [*B, C], from logits [*B, C - 1].

    >>> above = np.array([0.9, 0.4])
    >>> probabilities(np.log(above / (1 - above)), TaskField(), np).round(6).tolist()
    [0.1, 0.5, 0.4]
    """
    above = sigmoid(logits, xp)
    ends = xp.ones_like(above[..., :1]), xp.zeros_like(above[..., :1])
    cut = xp.concatenate([ends[0], above, ends[1]], axis=-1)
    return cut[..., :-1] - cut[..., 1:]


def expected_number(logits: np.ndarray, learned: TaskField) -> np.ndarray:
    """The least number, and each step between neighbours by the probability that it is taken."""
    return _expected(logits, class_numbers(learned.classes), np)


def _expected(logits: Any, numbers: Sequence[float], xp: Any) -> Any:
    steps = xp.asarray(np.diff(np.array(numbers)), logits.dtype)
    return numbers[0] + sigmoid(logits, xp) @ steps


def first_thresholds(learned: TaskField) -> tuple[float, ...]:
    """[C - 1], by which a score of 0 has the shares of the training labels."""
    shares = np.array(learned.shares or (1,) * len(learned.classes)).clip(1e-3)
    lower = np.cumsum(shares / shares.sum())[:-1]
    return tuple(np.log(lower / (1 - lower)).tolist())


def _head(loss: Any) -> Head:
    return Head(
        loss=loss,
        predict=probabilities,
        order=expected_number,
        score=lambda logits, levels: _expected(logits, levels, jnp),
        unit=unit_of_levels,
        mean=mean_log_odds,  # of lying above each threshold, and so of each class
    )


ORDINAL = Kind(
    heads={"proportional_odds": _head(proportional_odds), "coral": _head(coral)},
    lists=("pairwise", "listwise"),
    thresholds=first_thresholds,
    labels="levels",
)
