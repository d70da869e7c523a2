"""Losses over the lists that one user was shown: what matters is the order inside of each.

A list is what stands at the P positions of an example and has a label of the task: impressions of
one user that follow each other in time, or those of one request, which are of one time as well. An
example of weight w counts like w equal ones: it weighs its pairs, its place in a softmax, and the
list that it is in.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NOWHERE = -1e30  # a score that has no part in a softmax


def pairwise(
    scores: Float[Array, "B P"],
    labels: Float[Array, "B P"],
    weight: Float[Array, "B P"],
    together: Float[Array, "B P P"],
) -> Float[Array, "B P"]:
    """The mean of log(1 + exp(s_j - s_i)) over the pairs of a list with label i above label j.

    RankNet (Burges et al., "Learning to rank using gradient descent", ICML 2005); of clicks and
    items that were not clicked it is BPR (Rendle et al., UAI 2009).

    Args:
      scores: of the task at each position.
      labels: any numbers; 0 where the weight is 0.
      weight: of the examples; 0 where there is no label.
      together: 1 where two positions are of one list.

    Returns:
      At each position the loss of its list, 0 where all labels of the list are equal: times weight,
      summed and divided by all weights it is the mean over impressions.
    """
    better = labels[:, :, None] > labels[:, None, :]
    pairs = weight[:, :, None] * weight[:, None, :] * together * better
    losses = jax.nn.softplus(scores[:, None, :] - scores[:, :, None])
    return _mean_of_list(jnp.sum(pairs * losses, 2), jnp.sum(pairs, 2), together)


def listwise(
    scores: Float[Array, "B P"],
    labels: Float[Array, "B P"],
    weight: Float[Array, "B P"],
    together: Float[Array, "B P P"],
) -> Float[Array, "B P"]:
    """Softmax cross-entropy of a list: the mean of -log softmax(s)_i, weighted by the labels.

    The loss of ListNet's order (Cao et al., ICML 2007) with gains in the place of their softmax
    (Bruch et al., "An analysis of the softmax cross entropy loss", ICTIR 2019). Arguments and
    result as in `pairwise`, with labels of 0 or more; 0 where all labels of the list are 0.
    """
    there = together * weight[:, None, :]
    shown = jnp.where(there > 0, scores[:, None, :] + jnp.log(jnp.where(there > 0, there, 1)), 0)
    total = jax.nn.logsumexp(jnp.where(there > 0, shown, NOWHERE), axis=2)
    gains = weight * labels
    return _mean_of_list(gains * jnp.where(gains > 0, total - scores, 0), gains, together)


def _mean_of_list(values: jax.Array, counts: jax.Array, together: jax.Array) -> jax.Array:
    """Sums of values [B, P] over each position's list, divided by those of counts."""
    total, count = (jnp.einsum("bij,bj->bi", together, x) for x in (values, counts))
    return total / jnp.where(count > 0, count, 1)


# {tasks.NAME.loss: what it is over lists}
LISTS = {"pairwise": pairwise, "listwise": listwise}
