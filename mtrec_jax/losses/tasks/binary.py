"""Yes or no: the cross-entropy of a logit, and its probability."""

from __future__ import annotations

import jax
import optax
from jaxtyping import Array, Float

from mtrec_jax.losses.tasks.contract import Head, Kind, TaskField, mean_log_odds, same, sigmoid


def cross_entropy(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Cross-entropy of a logit."""
    return optax.sigmoid_binary_cross_entropy(logits, labels)


BINARY = Kind(
    heads={
        "pointwise": Head(
            loss=cross_entropy,
            predict=lambda logits, learned, xp: sigmoid(logits, xp),
            order=same,
            score=same,
            unit=lambda score, levels: jax.nn.sigmoid(score),
            mean=mean_log_odds,
        )
    },
    lists=("pairwise", "listwise"),
    judged="binary",
)
