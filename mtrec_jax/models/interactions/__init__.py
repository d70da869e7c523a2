"""Feature interactions: products of inputs, before the towers. A file each.

An interaction is a frozen dataclass of options with `make`, see `contract`; the dictionary below
names all that there are.
"""

from __future__ import annotations

from mtrec_jax.models.interactions.contract import InteractionSizes
from mtrec_jax.models.interactions.dcn import DCN
from mtrec_jax.models.interactions.dot import Dot
from mtrec_jax.models.interactions.fm import FM
from mtrec_jax.models.interactions.none import NoInteraction

INTERACTIONS = {
    "none": NoInteraction,
    "dcn": DCN,
    "dot": Dot,
    "fm": FM,
}

__all__ = ["INTERACTIONS", "InteractionSizes"]
