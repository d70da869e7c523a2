"""What the next item is compared with: items that all positions of a step share. A file each.

A way to draw them is a frozen dataclass of options with `draw`, see `contract`; the dictionary
below names all that there are.
"""

from __future__ import annotations

from mtrec_jax.losses.negatives.batch import FromBatch, Queue
from mtrec_jax.losses.negatives.catalogue import AllItems, Popular, Uniform
from mtrec_jax.losses.negatives.contract import Drawn, Pool, size_of, state_before
from mtrec_jax.losses.negatives.hard import Hard
from mtrec_jax.losses.negatives.mixed import Mixed

# {train.negatives.kind: its options}
NEGATIVES = {
    "uniform": Uniform,
    "popular": Popular,
    "all": AllItems,
    "batch": FromBatch,
    "queue": Queue,
    "mixed": Mixed,
    "hard": Hard,
}

__all__ = ["NEGATIVES", "Drawn", "Pool", "size_of", "state_before"]
