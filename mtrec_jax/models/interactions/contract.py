"""What an interaction is made from."""

from __future__ import annotations

from typing import NamedTuple


class InteractionSizes(NamedTuple):
    """`options.make(sizes, dtype=..., rngs=...)` gives a module `(x [n, I], fields [n, F, D]) ->
    [n, O]`, which is what the towers read; it says how wide that is in an attribute, `outputs`.

    `x` is all that is known of n pairs side by side; `fields` are the vectors in it that have the
    width D: of features with embeddings, of the user and of the candidate.
    """

    inputs: int  # I
    fields: int  # F
    width: int  # D
