"""User-based nearest neighbours: what users like who like the same items.

Resnick et al. (1994), "GroupLens: an open architecture for collaborative filtering of netnews", on
likes alone: the nearest users vote for their items with their similarity, as in Herlocker et al.
(1999), "An algorithmic framework for performing collaborative filtering".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids, most_similar
from mtrec_jax.baselines.neighbours import (
    Documents,
    Weigher,
    Weights,
    history_pairs,
    liked_pairs,
    make_weigher,
    nearest,
    stored,
)
from mtrec_jax.types import FIRST, Lists

if TYPE_CHECKING:
    import scipy.sparse as sp


@dataclass(frozen=True, kw_only=True)
class UserKnn:
    """`kind = "user_knn"`: cosine between the rows of the user-item matrix.

    similarity(u, v) = items of both / sqrt(items of u x items of v), where `weights` are binary.
    With "tfidf" an item counts the less the more users like it, with "bm25" likewise, and products
    take the place of cosines (`neighbours.Weigher`); `shrinkage` as for `ItemKnn`. Products are
    taken in blocks, and the nearest alone are kept.
    """

    kind: Literal["user_knn"] = "user_knn"
    neighbours: Annotated[int, Field(ge=1)] = 100  # kept per user
    weights: Weights = "binary"
    shrinkage: Annotated[float, Field(ge=0)] = 0.0

    def fit(self, interactions: Interactions) -> Neighbours:
        """The nearest users of every user.

        Raises:
          DataError: an id is beyond the users or items.
        """
        check_ids(self.kind, interactions)
        seen = liked_pairs(interactions)
        weigher = make_weigher(self.weights, seen)
        users, itself = weigher.documents(seen), np.arange(interactions.n_users)
        near = nearest(users, users, self.neighbours, self.shrinkage, itself)
        return Neighbours(users, near, weigher, self.neighbours, self.shrinkage)


@dataclass(frozen=True)
class Neighbours:
    """Row u of `near` holds the similarities of user index u, id - 2, to the nearest users."""

    users: Documents
    near: sp.csr_array  # [U, U] float32, at most `neighbours` a row, diagonal 0
    weigher: Weigher
    neighbours: int
    shrinkage: float

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> NeighbourVotes:
        """Score each query by the users nearest to its history of item ids.

        A history that is the user's own in training has the neighbours found there; those of any
        other are found now. Nobody is a neighbour of their own. Repeats count once; padding,
        unknown and untrained items are passed over.
        """
        seen = self.users.seen
        queries = history_pairs(histories, seen.shape[1])
        known = (users >= FIRST) & (users < seen.shape[0] + FIRST)
        own = np.where(known, users.astype(np.int64) - FIRST, -1)
        same = self._trained(queries, own)
        fresh = np.flatnonzero(~same)
        documents = self.weigher.documents(queries[fresh])
        found = nearest(documents, self.users, self.neighbours, self.shrinkage, own[fresh])
        return NeighbourVotes(_merged(self.near[own[same]], found, same), seen)

    def similar_users(
        self, users: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k nearest of each user id among the kept ones: (similarities, user ids)."""
        size = self.near.shape[0]
        return most_similar("user", lambda rows: stored(self.near, rows), users, k, size)

    def _trained(self, queries: sp.csr_array, own: Int[np.ndarray, " Q"]) -> Bool[np.ndarray, " Q"]:
        """Whether each history holds what its user likes in training, no more and no less."""
        whose = np.flatnonzero(own >= 0)
        theirs, asked = self.users.seen[own[whose]], queries[whose]
        common = np.asarray(theirs.multiply(asked).sum(axis=1)).reshape(-1)
        sizes = np.diff(theirs.indptr)
        same = np.zeros(len(own), bool)
        same[whose] = (sizes == np.diff(asked.indptr)) & (sizes == common)
        return same


@dataclass(frozen=True)
class NeighbourVotes:
    """Sums of similarities to the neighbours that like each item."""

    near: sp.csr_array  # [Q, U] float32
    seen: sp.csr_array  # [U, N]

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Scores of the queries' neighbours; 0 where none of them likes the item."""
        return (self.near[queries] @ self.seen).toarray()


def _merged(first: sp.csr_array, second: sp.csr_array, of_first: np.ndarray) -> sp.csr_array:
    """Rows of two matrices as one: `of_first [Q]` says which takes its next row from the first."""
    import scipy.sparse as sp  # other baselines do without

    place = np.where(of_first, np.cumsum(of_first) - 1, first.shape[0] + np.cumsum(~of_first) - 1)
    return sp.vstack((first, second), format="csr")[place]
