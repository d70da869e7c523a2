"""What a way to take numbers is made from."""

from __future__ import annotations

from typing import NamedTuple


class NumberSizes(NamedTuple):
    """`options.make(sizes, dtype=..., rngs=...)` gives a module `numbers [..., C] -> [..., O]`.

    It says in two attributes how wide that is, `outputs`, and of how many vectors of width D it
    consists, `fields`, 0 where it does not.
    """

    slots: tuple[int, ...]  # numbers of each feature, which stand side by side: their sum is C
    width: int  # D
    coded: tuple[bool, ...]  # of each feature: a code or several, no number and a mark of missing
