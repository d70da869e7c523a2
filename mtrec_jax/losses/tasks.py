"""Losses of the tasks; the step divides their global sum by the global weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtrec_jax.config import Task
from mtrec_jax.data.dataset import TaskField
from mtrec_jax.kernels.softmax import softmax_loss
from mtrec_jax.models.layers import unit_length
from mtrec_jax.types import Catalogue

LOGITS = 1 << 22  # of the retrieval softmax that exist at once on a device, 16 MB


def task_loss(
    task: Task,
    learned: TaskField,
    logits: Float[Array, "B P"] | Float[Array, "B P C"],
    labels: Float[Array, "B P"],
) -> Float[Array, "B P"]:
    """Binary: cross-entropy of the logit. Multiclass: softmax cross-entropy. Regression: squared
    error of the standardised label (label - mean) / std, so that tasks of any unit weigh alike.
    """
    if task.kind == "binary":
        return optax.sigmoid_binary_cross_entropy(logits, labels)
    if task.kind == "multiclass":
        classes = labels.astype(jnp.int32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return jnp.square(logits - (labels - learned.mean) / learned.std)


def sampled_softmax(
    users: Float[Array, "B P D"],
    positives: Float[Array, "B P D"],
    positive_ids: Int[Array, "B P"],
    negatives: Float[Array, "n D"],
    negative_ids: Int[Array, " n"],
    catalogue: Catalogue,
    temperature: float,
    weights: Float[Array, "B P"],
) -> Float[Array, ""]:
    """Softmax cross-entropy of the cosine with shared sampled negatives and logQ correction.

    The partition function is estimated by importance sampling: with n negatives drawn with
    probability q, Z = exp(s+) + sum_j exp(s_j - log(n q_j)) over the negatives that are not the
    positive itself (Bengio & Senecal 2008; Yi et al., RecSys 2019). Logits exist for a few
    positions at a time, never as B·P·n. Returns the weighted sum of the positions' losses.
    """
    u, v = unit_length(users) / temperature, unit_length(negatives)
    positive = jnp.sum(u * unit_length(positives), axis=-1)
    log_expected = jnp.asarray(catalogue.log_probability)[negative_ids]
    log_expected = log_expected + jnp.log(jnp.asarray(len(negative_ids), u.dtype))
    # Tiles are of positions, as examples may be split over devices.
    batch, length = positive.shape
    most = LOGITS * jax.device_count() // (batch * len(negative_ids))
    some = max(n for n in range(1, length + 1) if length % n == 0 and n <= max(1, most))

    def tiled(array: Array) -> Array:
        return jnp.moveaxis(array, 1, 0).reshape(-1, some, batch, *array.shape[2:])

    return softmax_loss(
        tiled(u),
        v,
        negative_ids,
        tiled(positive_ids),
        tiled(positive),
        -log_expected,
        tiled(weights),
    )


def utility(
    objective: dict[str, float],
    labels: dict[str, Float[Array, "B P"]],
    mask: dict[str, Float[Array, "B P"]],
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Worth of what happened at each position, scaled to [0, 1], and where anything was observed.

    A label outside its sample space (no purchase without a click) counts as not having happened.
    """
    total = sum(objective.values())
    worth = sum(objective[t] / total * labels[t] * mask[t] for t in objective)
    seen = jnp.max(jnp.stack([mask[t] for t in objective]), axis=0)
    return jnp.asarray(worth), seen
