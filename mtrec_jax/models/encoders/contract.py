"""What an encoder of behaviour is made from, and what it reads."""

from __future__ import annotations

from typing import NamedTuple

import jax


class EncoderSizes(NamedTuple):
    """`options.make(sizes, dtype=..., rngs=...)` gives a module `(Behaviour, key) -> states
    [B, S, D]`, whose state s has seen tokens 0 .. s. `key=None` means no dropout.

    A module that hides events in training has `at(Behaviour, cutoff [B, P], masked [B, L + 1] or
    None, key) -> states [B, P, D]` in its place, and its options a `share` of them: positions whose
    own event is not hidden are then not learned.
    """

    width: int  # D
    length: int  # S: a start token and L events
    dropout: float


class Behaviour(NamedTuple):
    """A start token, then a user's events in time order, then padding."""

    tokens: jax.Array  # [B, S, D]
    known: jax.Array  # [B, S] bool: what is no padding
    # [B, S] int32 seconds, of which differences say how far events are apart; that of the start
    # token is the first event's. None without a feature of kind "moment"
    moments: jax.Array | None
    # [B, S] int32 seconds: when what follows each token is asked for. None where this is not known
    asked: jax.Array | None = None
