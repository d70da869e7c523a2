"""Diversifiers: lists whose items are worth much and differ from each other. A file each.

A diversifier is a frozen dataclass of options with `choose`, see `contract`; the dictionary below
names all that there are.
"""

from __future__ import annotations

from mtrec_jax.diversity.contract import Diversifier, described, diversify, falling
from mtrec_jax.diversity.dpp import Dpp
from mtrec_jax.diversity.mmr import Mmr

# {evaluate.diversify.kind: its options}
DIVERSIFIERS = {"mmr": Mmr, "dpp": Dpp}

__all__ = ["DIVERSIFIERS", "Diversifier", "Dpp", "Mmr", "described", "diversify", "falling"]
