"""What a deep model has to beat. A file a method, a line a method in the dictionary below."""

from __future__ import annotations

from typing import Any

from mtrec_jax.baselines.als import Als
from mtrec_jax.baselines.bias import Bias
from mtrec_jax.baselines.contract import (
    Interactions,
    Predicts,
    Ranks,
    Scorer,
    SimilarItems,
    SimilarUsers,
)
from mtrec_jax.baselines.ease import Ease
from mtrec_jax.baselines.item_knn import ItemKnn
from mtrec_jax.baselines.popularity import Popularity
from mtrec_jax.baselines.random import Random
from mtrec_jax.baselines.user_knn import UserKnn

BASELINES: dict[str, Any] = {
    "random": Random,
    "popularity": Popularity,
    "bias": Bias,
    "item_knn": ItemKnn,
    "user_knn": UserKnn,
    "als": Als,
    "ease": Ease,
}

__all__ = [
    "BASELINES",
    "Interactions",
    "Predicts",
    "Ranks",
    "Scorer",
    "SimilarItems",
    "SimilarUsers",
]
