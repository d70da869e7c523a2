"""What a kind of task is: how its logits are taught and read, and what its labels are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax


@dataclass(frozen=True, kw_only=True)
class TaskField:
    """What preparation learned about a task from the training rows."""

    classes: tuple[str, ...] = ()  # multiclass: class c is classes[c], stored as label c; ordinal:
    # the numbers that labels are, in order
    mean: float = 0.0  # of the training labels
    std: float = 1.0
    shares: tuple[float, ...] = ()  # ordinal: of the training labels, by class
    quantiles: tuple[tuple[float, ...], ...] = ()  # watch_time with a duration: by its local id
    # the training labels at equal steps from their least to their largest


class Head(NamedTuple):
    """How the logits of a task are taught and read.

    `*B` is any shape, `xp` is NumPy or `jax.numpy`. Logits are [*B], or [*B, C] where there are
    several, or with `grouped` [*B, 2]: the tower's and the local id of the item's group.
    """

    loss: Callable[[Any, Any, TaskField], Any]  # (logits, labels [*B], learned) -> [*B]
    predict: Callable[[Any, TaskField, Any], Any]  # (logits, learned, xp) -> what people read
    order: Callable[[Any, TaskField], Any]  # (logits, learned), NumPy -> [*B] to sort by
    # What the fusion is given, without the group: logits and levels (`class_levels`) to one number,
    score: Callable[[Any, Sequence[float]], Any]  # [n],
    unit: Callable[[Any, Sequence[float]], Any]  # and that number and levels to [0, 1]
    grouped: bool = False
    # Of members of an ensemble, without the group: logits [n, K, ...] whose predictions to average
    mean: Callable[[Any], Any] = lambda each: each.mean(axis=1)


class Kind(NamedTuple):
    """A line of `KINDS`."""

    heads: dict[str, Head]  # {tasks.NAME.loss: head}, the default first
    lists: tuple[str, ...] = ()  # losses of `losses.lists` that it takes as well
    outputs: Callable[[TaskField], int] = lambda learned: 1  # of its tower
    # Ordinal: the thresholds that a fresh model takes from the tower's score, one logit each
    thresholds: Callable[[TaskField], tuple[float, ...]] | None = None
    labels: Literal["numbers", "classes", "levels"] = "numbers"  # levels: few numbers, in order
    judged: Literal["binary", "regression", "multiclass"] = "regression"  # as what, for leaks


def same(logits: Any, *_: Any) -> Any:
    """Logits that are what is asked for themselves."""
    return logits


def sigmoid(logits: Any, xp: Any) -> Any:
    """1 / (1 + exp(-x)), which overflows nowhere."""
    return 0.5 * (1 + xp.tanh(logits / 2))


def mean_log_odds(each: jax.Array) -> jax.Array:
    """The log-odds [n, ...] of the mean of K probabilities, given theirs [n, K, ...]."""
    yes, no = (jax.nn.logsumexp(jax.nn.log_sigmoid(sign * each), axis=1) for sign in (1, -1))
    return yes - no


def class_numbers(classes: Sequence[str]) -> list[float]:
    """The numbers that classes are; [] where not all are numbers, so that they have no order.

    >>> class_numbers(("1", "5", "2.5")), class_numbers(("red", "2"))
    ([1.0, 5.0, 2.5], [])
    """
    try:
        found = [float(name) for name in classes]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []


def class_levels(classes: Sequence[str]) -> tuple[float, ...]:
    """What each of C classes counts as in a fusion, between 0 and C - 1: in proportion to their
    numbers, or their places where not all are numbers.

    >>> class_levels(("1", "5", "3")), class_levels(("red", "2"))
    ((0.0, 2.0, 1.0), (0.0, 1.0))
    """
    numbers = class_numbers(classes) or list(range(len(classes)))
    low, high = min(numbers, default=0), max(numbers, default=0)
    return tuple((x - low) * (len(classes) - 1) / ((high - low) or 1) for x in numbers)


def unit_of_levels(score: Any, levels: Sequence[float]) -> Any:
    """The expected level over the largest."""
    return score / max(1.0, *levels)
