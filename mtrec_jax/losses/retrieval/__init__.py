"""What teaches the two towers: the next item against negatives. A file each.

A loss is a frozen dataclass of options with `loss`, see `contract`; the dictionary below names all
that there are. What the negatives are is chosen beside it, see `losses.negatives`.
"""

from __future__ import annotations

from mtrec_jax.losses.retrieval.bce import BCE, GBCE
from mtrec_jax.losses.retrieval.bpr import BPR
from mtrec_jax.losses.retrieval.contract import Compared
from mtrec_jax.losses.retrieval.contrastive import Contrastive
from mtrec_jax.losses.retrieval.softmax import Softmax

# {train.retrieval.kind: its options}
RETRIEVAL = {
    "softmax": Softmax,
    "bce": BCE,
    "gbce": GBCE,
    "bpr": BPR,
    "contrastive": Contrastive,
}

__all__ = ["RETRIEVAL", "Compared"]
