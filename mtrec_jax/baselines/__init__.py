"""What a deep model has to beat: fitted in seconds, measured on the same targets. A file each.

A baseline is a frozen dataclass of options with `fit`, see `contract`; the dictionary below names
all that there are.
"""

from __future__ import annotations

from mtrec_jax.baselines.bias import Bias
from mtrec_jax.baselines.contract import Baseline, Interactions, Predicts, Ranks, Scorer
from mtrec_jax.baselines.knn import ItemKnn
from mtrec_jax.baselines.popularity import Popularity

BASELINES = {
    "popularity": Popularity,
    "bias": Bias,
    "item_knn": ItemKnn,
}

__all__ = ["BASELINES", "Baseline", "Interactions", "Predicts", "Ranks", "Scorer"]
