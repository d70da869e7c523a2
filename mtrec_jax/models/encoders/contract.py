"""What an encoder of behaviour is made from."""

from __future__ import annotations

from typing import NamedTuple


class EncoderSizes(NamedTuple):
    """`options.make(sizes, dtype=..., rngs=...)` gives a module `(tokens [B, S, D], key) -> states
    [B, S, D]`, whose state s has seen tokens 0 .. s. `key=None` means no dropout."""

    width: int  # D
    length: int  # S: a start token and L events
    dropout: float
