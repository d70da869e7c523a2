"""Nearest neighbours between the rows of sparse matrices: what item_knn and user_knn share.

A row is a *document*, such as an item, and a column a *term*, such as a user who likes it. Products
are taken in blocks of rows and only the nearest are kept, so that no square matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from mtrec_jax.baselines.contract import Interactions
from mtrec_jax.types import FIRST, Lists

if TYPE_CHECKING:
    import scipy.sparse as sp

Weights = Literal["binary", "bm25", "tfidf"]
_WORK = 1 << 25  # products of one block of the similarities: bounds its memory to ~0.4 GB
_K1, _B = 1.2, 0.75  # of BM25: how soon repetition saturates, how much length counts


class Documents(NamedTuple):
    """Rows that are compared."""

    seen: sp.csr_array  # [n, terms] float32, 1 at each pair
    weighted: sp.csr_array  # the same places, with weights above 0
    squares: np.ndarray  # [n] float64: squared norms of the weighted rows; 1: none are divided by


class Weigher(NamedTuple):
    """How the pairs of a document and its terms are weighed, learned from all documents.

    All pairs are there once. "tfidf" weighs a term t by log((1 + documents) / documents with t)
    (Salton and Buckley 1988), "bm25" by log(1 + (documents - with t + .5) / (with t + .5)) times
    (k1 + 1) / (1 + k1 (1 - b + b length / mean length)) with k1 = 1.2 and b = .75 (Robertson and
    Zaragoza 2009), which stands in the place of the norm in the cosine.
    """

    kind: Weights
    terms: np.ndarray  # [terms] float32 weights
    length: float  # mean terms of a document

    def documents(self, seen: sp.csr_array) -> Documents:
        """Weigh the pairs of some documents; those of other data, too."""
        count = np.diff(seen.indptr).astype(np.float64)
        if self.kind == "binary":
            return Documents(seen, seen, count)
        values = self.terms[seen.indices]
        if self.kind == "bm25":
            saturation = (_K1 + 1) / (1 + _K1 * (1 - _B + _B * count / max(self.length, 1e-9)))
            values = values * np.repeat(saturation, np.diff(seen.indptr)).astype(np.float32)
        weighted = type(seen)((values, seen.indices, seen.indptr), shape=seen.shape)
        if self.kind == "bm25":
            return Documents(seen, weighted, np.ones(len(count)))
        squares = np.asarray(weighted.astype(np.float64).power(2).sum(axis=1)).reshape(-1)
        return Documents(seen, weighted, squares)


def make_weigher(kind: Weights, seen: sp.csr_array) -> Weigher:
    """Learn the weights of terms from the pairs `[documents, terms]`."""
    documents = seen.shape[0]
    having = np.bincount(seen.indices, minlength=seen.shape[1]).astype(np.float64)
    terms = np.ones(seen.shape[1])
    if kind == "tfidf":
        terms = np.log((1 + documents) / np.maximum(having, 1))
    elif kind == "bm25":
        terms = np.log(1 + (documents - having + 0.5) / (having + 0.5))
    return Weigher(kind, terms.astype(np.float32), seen.nnz / max(documents, 1))


def nearest(
    queries: Documents,
    documents: Documents,
    k: int,
    shrinkage: float,
    own: Int[np.ndarray, " Q"],
) -> sp.csr_array:
    """The k nearest documents of each query: similarities `[Q, n]` float32, all above 0.

    similarity = product of the weighted rows / product of their norms, times
    common terms / (common terms + shrinkage). Of equal ones the lowest document is kept.

    Args:
      own: the document that is the query itself and is left out; -1: none is.
    """
    terms, of_seen = documents.weighted.T.tocsr(), None
    if shrinkage and documents.weighted is not documents.seen:
        of_seen = documents.seen.T.tocsr()
    data, indices, lengths = [np.zeros(0, np.float32)], [np.zeros(0, np.int32)], []
    for part in _blocks(queries.seen, terms):
        together = _sorted(queries.weighted[part] @ terms)
        common = together if of_seen is None else _sorted(queries.seen[part] @ of_seen)
        for row in range(together.shape[0]):
            inside = slice(together.indptr[row], together.indptr[row + 1])
            others = together.indices[inside]
            norm = np.sqrt(documents.squares[others] * queries.squares[part.start + row])
            similar = together.data[inside] / norm
            if shrinkage:
                pairs = common.data[inside].astype(np.float64)
                similar = similar * (pairs / (pairs + shrinkage))
            similar = similar.astype(np.float32)
            similar[others == own[part.start + row]] = 0
            keep = _largest(similar, k)
            data.append(similar[keep])
            indices.append(others[keep])
            lengths.append(len(keep))
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))
    parts = (np.concatenate(data), np.concatenate(indices), offsets)
    return type(queries.seen)(parts, shape=(queries.seen.shape[0], documents.seen.shape[0]))


def liked_pairs(interactions: Interactions) -> sp.csr_array:
    """1 where a user likes an item: `[U, N]`; padding and unknown ids are left out."""
    users, items = (x[interactions.liked] for x in (interactions.users, interactions.items))
    known = (users >= FIRST) & (items >= FIRST)
    shape = (interactions.n_users, interactions.n_items)
    return _binary(users[known] - FIRST, items[known] - FIRST, shape)


def history_pairs(
    histories: Lists, n_items: int, trained: Bool[np.ndarray, " N"] | None = None
) -> sp.csr_array:
    """1 where an item is in a history of item ids: `[Q, N]`; other ids are passed over, and so are
    items that are not trained."""
    rows = np.repeat(np.arange(len(histories)), np.diff(histories.offsets))
    columns = histories.values[histories.offsets[0] : histories.offsets[-1]] - FIRST
    known = (columns >= 0) & (columns < n_items)
    if trained is not None:
        known[known] = trained[columns[known]]
    return _binary(rows[known], columns[known], (len(histories), n_items))


def stored(similarity: sp.csr_array, rows: Int[np.ndarray, " m"]) -> Float32[np.ndarray, "m n"]:
    """Some rows of kept similarities, -inf where none is kept."""
    found = similarity[rows]
    dense = np.full(found.shape, -np.inf, np.float32)
    dense[np.repeat(np.arange(len(rows)), np.diff(found.indptr)), found.indices] = found.data
    return dense


def _binary(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sp.csr_array:
    """1 at each pair, however often it occurs."""
    import scipy.sparse as sp  # other baselines do without

    ones = np.ones(len(rows), np.float32)
    matrix = sp.csr_array((ones, (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _sorted(product: sp.csr_array) -> sp.csr_array:
    found = product.tocsr()
    found.sort_indices()
    return found


def _blocks(queries: sp.csr_array, terms: sp.csr_array) -> Iterator[slice]:
    """Runs of queries whose rows of the product take about `_WORK` multiplications together."""
    work = np.cumsum(queries @ np.diff(terms.indptr))
    start, rows = 0, queries.shape[0]
    while start < rows:
        done = work[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(work, done + _WORK, "right")))
        yield slice(start, stop)
        start = stop


def _largest(values: Float32[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """Positions, ascending, of the k largest positive values; of equals the first."""
    if len(values) <= k:
        return np.flatnonzero(values > 0)
    last = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > last)
    equal = np.flatnonzero(values == last)[: k - len(above)] if last > 0 else above[:0]
    return np.sort(np.concatenate((above, equal)))
