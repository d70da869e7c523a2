"""What a deep model has to beat. A file a method, a line a method in the dictionary below."""

from __future__ import annotations

from typing import Any

from mtrec_jax.baselines.bias import Bias
from mtrec_jax.baselines.contract import Interactions, Predicts, Ranks, Scorer
from mtrec_jax.baselines.item_knn import ItemKnn
from mtrec_jax.baselines.popularity import Popularity

BASELINES: dict[str, Any] = {"popularity": Popularity, "bias": Bias, "item_knn": ItemKnn}

__all__ = ["BASELINES", "Interactions", "Predicts", "Ranks", "Scorer"]
