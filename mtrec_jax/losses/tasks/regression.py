"""A number: the squared error of the standardised label, and a value in the label's unit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtrec_jax.losses.tasks.contract import Head, Kind, TaskField, same


def squared_error(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Squared error of the standardised label, so that tasks of any unit weigh alike."""
    return jnp.square(logits - (labels - learned.mean) / learned.std)


REGRESSION = Kind(
    heads={
        "pointwise": Head(
            loss=squared_error,
            predict=lambda logits, learned, xp: logits * learned.std + learned.mean,
            order=same,
            score=same,
            # the share of the training labels that lie lower, were they normal
            unit=lambda score, levels: jax.scipy.stats.norm.cdf(score),
        )
    },
    lists=("pairwise",),
)
