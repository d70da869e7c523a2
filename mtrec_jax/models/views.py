"""Altered views of a history, and the loss that two views of one user are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.models.layers import unit_length
from mtrec_jax.types import Array

Share = Annotated[float, Field(ge=0, lt=1)]
VIEWS = ("crop", "mask", "reorder", "drop")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """`[train.contrast]`: each user's history is altered twice, each time in one of the ways whose
    share is above 0, and encoded; the state after one view has to be nearer to that after the other
    view of the same user than to those of the batch's other users (Xie et al., "Contrastive
    learning for sequential recommendation", ICDE 2022).
    """

    weight: Annotated[float, Field(gt=0)] = 0.1
    temperature: Annotated[float, Field(gt=0)] = 0.5  # of the cosine between two states
    crop: Share = 0.4  # of the events that are cut off at both ends together
    mask: Share = 0.3  # of the events whose places stay empty
    reorder: Share = 0.4  # of the events, one stretch of them, that are shuffled
    drop: Share = 0.0  # of the events that are left out

    @property
    def ways(self) -> tuple[str, ...]:
        """Those that are used."""
        return tuple(name for name in VIEWS if getattr(self, name))


class View(NamedTuple):
    """Altered histories."""

    tokens: jax.Array  # [B, L, D]; 0 where a place is empty
    there: jax.Array  # [B, L] bool: events that are seen
    moments: Array | None  # [B, L]: their times
    size: jax.Array  # [B]: places up to the last event, the empty ones included


def views(
    options: Contrast,
    tokens: jax.Array,
    moments: Array | None,
    count: jax.Array,
    key: jax.Array,
) -> View:
    """One altered view of each history.

    Args:
      options: the ways, of which each history is altered in one, drawn evenly.
      tokens: [B, L, D], of which the first `count` [B] of each are events; 0 where
        `model.event_dropout` hides one, which stays hidden.
      moments: [B, L] times of events, which go with them; None: there are none.
      key: of the draws.

    Returns:
      The view, of at least one place where there was an event.
    """
    b, length = tokens.shape[:2]
    of_way, of_start, of_event = jax.random.split(key, 3)
    way = jax.random.randint(of_way, (b, 1), 0, len(options.ways))
    start, event = jax.random.uniform(of_start, (b, 1)), jax.random.uniform(of_event, (b, length))
    place, size = jnp.arange(length)[None], count[:, None]
    there = place < size
    keys, kept, hidden = place * jnp.ones((b, 1), event.dtype), there, jnp.all(tokens == 0, axis=-1)
    for number, name in enumerate(options.ways):
        chosen, share = way == number, getattr(options, name)
        stretch = jnp.maximum(1, jnp.round((1 - share if name == "crop" else share) * size))
        first = jnp.floor(start * (size - stretch + 1))
        inside = (place >= first) & (place < first + stretch)
        if name == "crop":
            kept = kept & (inside | ~chosen)
        elif name == "reorder":  # a random key between the ends of the stretch for each of its own
            keys = jnp.where(chosen & inside, first + (stretch - 1) * event, keys)
        elif name == "mask":
            hidden = hidden | (chosen & (event < share))
        else:  # the event with the largest draw stays
            most = jnp.max(jnp.where(there, event, -1), axis=1, keepdims=True)
            kept = kept & ((event >= share) | (event == most) | ~chosen)
    order = jnp.argsort(jnp.where(kept, keys, length), axis=1)
    left = jnp.sum(kept, axis=1)
    seen = (place < left[:, None]) & ~jnp.take_along_axis(hidden, order, axis=1)
    taken = jnp.take_along_axis(tokens, order[..., None], axis=1)
    times = None if moments is None else jnp.take_along_axis(jnp.asarray(moments), order, axis=1)
    return View(jnp.where(seen[..., None], taken, 0), seen, times, left)


def contrast_loss(
    one: jax.Array, other: jax.Array, users: jax.Array, counts: jax.Array, temperature: float
) -> jax.Array:
    """The sum over examples of the softmax cross-entropy that the other view [B, D] of an example
    is told from both views of the other users [B]; those whose `counts` [B] is 0 are left out."""
    n = len(one)
    states = unit_length(jnp.concatenate([one, other]))
    weight = jnp.concatenate([counts, counts])
    logits = states @ states.T / temperature
    example, whose = jnp.tile(jnp.arange(n), 2), jnp.tile(users, 2)
    others = (whose[:, None] != whose[None]) & (weight > 0)[None]
    pair = (example[:, None] == example[None]) & ~jnp.eye(2 * n, dtype=bool)
    out = ~(others | pair)
    logits = jnp.where(out, -jnp.inf, logits)
    own = jnp.sum(states * jnp.concatenate([states[n:], states[:n]]), axis=1) / temperature
    # a user who is left out has nobody to be told from
    total = jax.nn.logsumexp(jnp.where((weight > 0)[:, None], logits, 0), axis=1)
    return jnp.sum((total - own) * weight) / 2
