"""Seconds that somebody watched: 0 or more, many of them 0, and longer where the item is longer."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mtrec_jax.losses.tasks.contract import Head, Kind, TaskField, mean_log_odds, same, sigmoid

STEPS = 100  # of a group's quantiles
FEWEST = 50  # training labels of a group; one with fewer has the quantiles of all


def weighted_logistic(
    logits: Float[Array, "*B"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Logistic regression whose odds are the expected watch time (Covington, Adams and Sargin,
    "Deep neural networks for YouTube recommendations", RecSys 2016).

    An impression is a positive that weighs its seconds T, here as a multiple of their mean, so that
    tasks of any unit weigh alike. The paper counts as negatives the impressions with T = 0, of
    which the odds become sum T / (N - k) with k positives, E[T] only as long as k is small. Here
    each impression is a negative of weight 1, and the odds are E[T] whatever k is.
    """
    return labels / learned.mean * jax.nn.softplus(-logits) + jax.nn.softplus(logits)


def duration_quantiles(
    logits: Float[Array, "*B 2"], labels: Float[Array, "*B"], learned: TaskField
) -> Float[Array, "*B"]:
    """Squared error of the label's quantile among items of its duration (D2Q, Zhan et al.,
    "Deconfounding duration bias in watch-time prediction", KDD 2022), over the variance 1/12 of a
    quantile. Logits are the tower's and the item's duration group."""
    edges = jnp.array(learned.quantiles, logits.dtype)[logits[..., 1].astype(jnp.int32)]
    target = share_below(labels, edges)
    return 12 * jnp.square(jax.nn.sigmoid(logits[..., 0]) - target)


def share_below(labels: Float[Array, "*B"], edges: Float[Array, "*B q"]) -> Float[Array, "*B"]:
    """The quantile of each label, between 0 and 1, given quantiles at equal steps; labels that many
    rows share have the middle of theirs.

    >>> shares = share_below(jnp.array([3.0, 0.0]), jnp.array([[0.0, 0.0, 2.0, 6.0]] * 2))
    >>> [round(share, 4) for share in shares.tolist()]
    [0.75, 0.1667]
    """
    low, high, label = edges[..., :-1], edges[..., 1:], labels[..., None]
    inside = jnp.clip((label - low) / jnp.where(high > low, high - low, 1), 0, 1)
    jump = 0.5 * (label >= low) + 0.5 * (label > low)
    return jnp.mean(jnp.where(high > low, inside, jump), axis=-1)


def seconds_at(logits: Any, learned: TaskField, xp: Any) -> Any:
    """The watch time at a predicted quantile of the item's group, `share_below` the other way."""
    table, group = xp.asarray(learned.quantiles), logits[..., 1].astype("int32")
    place = sigmoid(logits[..., 0], xp) * (table.shape[1] - 1)
    step = xp.clip(xp.floor(place), 0, table.shape[1] - 2).astype("int32")
    low, high = table[group, step], table[group, step + 1]
    return (low + (place - step) * (high - low)).astype(logits.dtype)


def quantiles_of(
    labels: Float[np.ndarray, " n"], groups: Int[np.ndarray, " n"], size: int
) -> tuple[tuple[float, ...], ...]:
    """The training labels of groups 0 .. size - 1 at STEPS equal steps, least and largest included.

    >>> table = quantiles_of(np.arange(101.0), np.full(101, 2), 4)
    >>> [len(table), table[2][:3], table[0] == table[2]]  # the others have too few rows
    [4, (0.0, 1.0, 2.0), True]
    """
    shares = np.linspace(0, 1, STEPS + 1)
    order = np.argsort(groups, kind="stable")
    ends = np.searchsorted(groups[order], np.arange(size + 1))
    of_group = [labels[order[start:end]] for start, end in itertools.pairwise(ends)]
    whole = _plain(np.quantile(labels, shares))
    return tuple(
        _plain(np.quantile(own, shares)) if len(own) >= FEWEST else whole for own in of_group
    )


def _plain(numbers: np.ndarray) -> tuple[float, ...]:
    """32-bit numbers in their fewest digits, as manifests hold them."""
    return tuple(float(str(x)) for x in numbers.astype(np.float32))


WATCH_TIME = Kind(
    heads={
        "weighted_logistic": Head(
            loss=weighted_logistic,
            predict=lambda logits, learned, xp: learned.mean * xp.exp(logits),
            order=lambda logits, learned: learned.mean * np.exp(logits),
            score=same,
            # the share of labels that lie lower, were they exponential with the mean of all
            unit=lambda score, levels: -jnp.expm1(-jnp.exp(score)),
            mean=lambda each: jax.nn.logsumexp(each, axis=1) - jnp.log(each.shape[1]),
        ),
        "duration_quantiles": Head(
            loss=duration_quantiles,
            predict=seconds_at,
            order=lambda logits, learned: seconds_at(logits, learned, np),
            score=same,
            unit=lambda score, levels: jax.nn.sigmoid(score),
            grouped=True,
            mean=mean_log_odds,
        ),
    },
)
