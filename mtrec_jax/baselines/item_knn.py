"""Item-based nearest neighbours: items that the same users like.

Sarwar et al. (2001), "Item-based collaborative filtering recommendation algorithms"; top-N form of
Deshpande and Karypis (2004), "Item-based top-N recommendation algorithms": every item of a history
votes for its nearest neighbours with its similarity to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Float32, Int, Int64
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids, most_similar
from mtrec_jax.baselines.neighbours import (
    Weights,
    history_pairs,
    liked_pairs,
    make_weigher,
    nearest,
    stored,
)
from mtrec_jax.types import Lists

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True, kw_only=True)
class ItemKnn:
    """`kind = "item_knn"`: cosine between the columns of the user-item matrix.

    similarity(i, j) = users of both / sqrt(users of i x users of j), where `weights` are binary.
    With "tfidf" a user counts the less the more items the user likes, with "bm25" likewise, and
    products take the place of cosines (`neighbours.Weigher`). With `shrinkage` the similarity is
    multiplied by n / (n + shrinkage), where n users like both (Bell and Koren 2007), as few users
    in common say little.

    Repeated interactions count once; padding and unknown ids are left out; of equal similarities
    the lowest item is kept.
    """

    kind: Literal["item_knn"] = "item_knn"
    neighbours: Annotated[int, Field(ge=1)] = 100  # kept per item
    weights: Weights = "binary"
    shrinkage: Annotated[float, Field(ge=0)] = 0.0

    def fit(self, interactions: Interactions) -> Similarities:
        """Similarities of what the same users like.

        Raises:
          DataError: an id is beyond the users or items.
        """
        check_ids(self.kind, interactions)
        by_item = liked_pairs(interactions).T.tocsr()
        items = make_weigher(self.weights, by_item).documents(by_item)
        itself = np.arange(interactions.n_items)
        return Similarities(nearest(items, items, self.neighbours, self.shrinkage, itself))


@dataclass(frozen=True)
class Similarities:
    """Row i holds the similarities of catalogue index i to its nearest neighbours."""

    similarity: sp.csr_array  # [N, N] float32, diagonal 0

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Votes:
        """Score each query's history of item ids.

        Repeats count once; padding, unknown and untrained items are passed over.
        """
        return Votes(history_pairs(histories, self.similarity.shape[0]), self.similarity)

    def similar_items(
        self, items: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k nearest of each item id among the kept ones: (similarities, item ids)."""
        size = self.similarity.shape[0]
        return most_similar("item", lambda rows: stored(self.similarity, rows), items, k, size)


@dataclass(frozen=True)
class Votes:
    """Sums of similarities between a history and each item."""

    histories: sp.csr_array  # [Q, N] float32, 1 where the item is in the history
    similarity: sp.csr_array  # [N, N]

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Scores of the queries' histories; 0 where nothing in them knows the item."""
        return (self.histories[queries] @ self.similarity).toarray()
