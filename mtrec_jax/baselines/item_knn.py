"""Item-based nearest neighbours: items that the same users like.

Sarwar et al. (2001), "Item-based collaborative filtering recommendation algorithms"; top-N form of
Deshpande and Karypis (2004), "Item-based top-N recommendation algorithms": every item of a history
votes for its nearest neighbours with its similarity to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Float32, Int
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids
from mtrec_jax.types import FIRST, Lists

if TYPE_CHECKING:
    import scipy.sparse as sp

_WORK = 1 << 25  # products of one block of the similarity matrix: bounds its memory to ~0.4 GB


@dataclass(frozen=True, kw_only=True)
class ItemKnn:
    """`kind = "item_knn"`: cosine between the columns of the binary user-item matrix.

    similarity(i, j) = users of both / sqrt(users of i x users of j). Repeated interactions count
    once; padding and unknown ids are left out; of equal similarities the lowest item is kept.
    """

    kind: Literal["item_knn"] = "item_knn"
    neighbours: Annotated[int, Field(ge=1)] = 100  # kept per item

    def fit(self, interactions: Interactions) -> Similarities:
        """Similarities of what the same users like.

        Raises:
          DataError: an id is beyond the users or items.
        """
        check_ids(self.kind, interactions)
        n_users, n_items = interactions.n_users, interactions.n_items
        users, items = (x[interactions.liked] for x in (interactions.users, interactions.items))
        known = (users >= FIRST) & (items >= FIRST)
        seen = _binary(users[known] - FIRST, items[known] - FIRST, (n_users, n_items))
        by_item = seen.T.tocsr()
        count = np.diff(by_item.indptr).astype(np.float64)
        data, indices, lengths = [], [], []
        for part in _blocks(by_item, seen):
            together = (by_item[part] @ seen).tocsr()  # (block, items): users of both, exact
            together.sort_indices()
            for row in range(together.shape[0]):
                inside = slice(together.indptr[row], together.indptr[row + 1])
                others = together.indices[inside]
                norm = np.sqrt(count[others] * count[part.start + row])
                cosine = (together.data[inside] / norm).astype(np.float32)
                cosine[others == part.start + row] = 0
                keep = _nearest(cosine, self.neighbours)
                data.append(cosine[keep])
                indices.append(others[keep])
                lengths.append(len(keep))
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
        parts = (np.concatenate(data), np.concatenate(indices), offsets)
        return Similarities(type(seen)(parts, shape=(n_items, n_items)))


@dataclass(frozen=True)
class Similarities:
    """Row i holds the cosines of catalogue index i to its nearest neighbours."""

    similarity: sp.csr_array  # [N, N] float32, diagonal 0

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> Votes:
        """Score each query's history of item ids.

        Repeats count once; padding, unknown and untrained items are passed over.
        """
        n_items = self.similarity.shape[0]
        rows = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
        columns = histories.values[histories.offsets[0] : histories.offsets[-1]] - FIRST
        known = (columns >= 0) & (columns < n_items)
        shape = (len(histories), n_items)
        return Votes(_binary(rows[known], columns[known], shape), self.similarity)


@dataclass(frozen=True)
class Votes:
    """Sums of similarities between a history and each item."""

    histories: sp.csr_array  # [Q, N] float32, 1 where the item is in the history
    similarity: sp.csr_array  # [N, N]

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Scores of the queries' histories; 0 where nothing in them knows the item."""
        return (self.histories[queries] @ self.similarity).toarray()


def _binary(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_array:
    """1 at each pair, however often it occurs."""
    import scipy.sparse as sp  # other baselines do without

    ones = np.ones(len(rows), np.float32)
    matrix = sp.csr_array((ones, (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _blocks(by_item: sp.csr_array, seen: sp.csr_array) -> Iterator[slice]:
    """Runs of items whose rows of the product take about `_WORK` multiplications together."""
    work = np.cumsum(by_item @ np.diff(seen.indptr))
    start, items = 0, by_item.shape[0]
    while start < items:
        done = work[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(work, done + _WORK, "right")))
        yield slice(start, stop)
        start = stop


def _nearest(cosine: Float32[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """Positions, ascending, of the k largest positive values; of equals the first."""
    if len(cosine) <= k:
        return np.flatnonzero(cosine > 0)
    last = np.partition(cosine, len(cosine) - k)[len(cosine) - k]
    above = np.flatnonzero(cosine > last)
    equal = np.flatnonzero(cosine == last)[: k - len(above)] if last > 0 else above[:0]
    return np.sort(np.concatenate((above, equal)))
