"""Losses of the tasks' logits; the step divides their sum by the sum of their weights."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtrec_jax.data.dataset import TaskField


def binary(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Cross-entropy of a logit."""
    return optax.sigmoid_binary_cross_entropy(logits, labels)


def multiclass(
    logits: Float[Array, "*B C"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Softmax cross-entropy of C logits; labels are the numbers of classes."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def regression(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Squared error of the standardised label, so that tasks of any unit weigh alike."""
    return jnp.square(logits - (labels - learned.mean) / learned.std)


# {kind of task: loss (logits, labels, what preparation learned) -> a value an example}
TASK_LOSSES: dict[str, Callable[..., Array]] = {
    "binary": binary,
    "multiclass": multiclass,
    "regression": regression,
}
