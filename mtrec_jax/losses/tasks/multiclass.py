"""One of C classes: the softmax cross-entropy of C logits, and a probability a class."""

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
    unit_of_levels,
)


def cross_entropy(
    logits: Float[Array, "*B C"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Softmax cross-entropy of C logits; labels are the numbers of classes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def probabilities(logits: Any, learned: TaskField, xp: Any) -> Any:
    """Softmax of [*B, C]."""
    exponential = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def expected_number(logits: np.ndarray, learned: TaskField) -> np.ndarray:
    """The expected number of classes that are numbers.

    >>> stars = TaskField(classes=("1", "5", "3"))
    >>> round(float(expected_number(np.log([0.2, 0.5, 0.3]), stars)), 6)
    3.6
    """
    return np.asarray(probabilities(logits, learned, np) @ np.array(class_numbers(learned.classes)))


def expected_level(logits: jax.Array, levels: Sequence[float]) -> jax.Array:
    """The expected level [n] of classes [n, C]."""
    return jax.nn.softmax(logits) @ jnp.array(levels, logits.dtype)


def mean_of_classes(each: jax.Array) -> jax.Array:
    """The logarithms [n, C] of the mean of K probabilities, given logits [n, K, C]."""
    return jax.nn.logsumexp(jax.nn.log_softmax(each), axis=1) - jnp.log(each.shape[1])


MULTICLASS = Kind(
    heads={
        "pointwise": Head(
            loss=cross_entropy,
            predict=probabilities,
            order=expected_number,
            score=expected_level,
            unit=unit_of_levels,
            mean=mean_of_classes,
        )
    },
    outputs=lambda learned: len(learned.classes),
    labels="classes",
    judged="multiclass",
)
