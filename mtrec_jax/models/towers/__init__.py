"""Task towers: from what is known of a pair to the logits of all tasks. A file each.

Towers are a frozen dataclass of options with `make`, see `contract`; the dictionary below names all
that there are.
"""

from __future__ import annotations

from mtrec_jax.models.towers.aitm import AITM
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes, TowerTask
from mtrec_jax.models.towers.escm2 import ESCM2
from mtrec_jax.models.towers.esmm import ESMM
from mtrec_jax.models.towers.home import HoME
from mtrec_jax.models.towers.mmoe import MMoE
from mtrec_jax.models.towers.pepnet import PEPNet
from mtrec_jax.models.towers.ple import PLE
from mtrec_jax.models.towers.shared_bottom import SharedBottom
from mtrec_jax.models.towers.single_task import SingleTask
from mtrec_jax.models.towers.stem import STEM

TOWERS = {
    "single_task": SingleTask,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "home": HoME,
    "aitm": AITM,
    "esmm": ESMM,
    "escm2": ESCM2,
    "pepnet": PEPNet,
    "stem": STEM,
}

__all__ = ["TOWERS", "TowerInput", "TowerOutput", "TowerSizes", "TowerTask"]
