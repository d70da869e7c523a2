"""Fusions: from the calibrated scores of all tasks to the one order of candidates. A file each.

A fusion is a frozen dataclass of options with `make`, see `contract`; the dictionary below names
all that there are.
"""

from __future__ import annotations

from mtrec_jax.models.fusions.attention import Attention
from mtrec_jax.models.fusions.contract import FusionSizes, Term, Utility
from mtrec_jax.models.fusions.multiplicative import Multiplicative
from mtrec_jax.models.fusions.none import NoFusion
from mtrec_jax.models.fusions.weighted import Weighted

FUSIONS = {
    "attention": Attention,
    "weighted": Weighted,
    "multiplicative": Multiplicative,
    "none": NoFusion,
}

__all__ = ["FUSIONS", "FusionSizes", "Term", "Utility"]
