"""EASE: a linear autoencoder over items whose weights have a closed form.

Steck (2019), "Embarrassingly shallow autoencoders for sparse data": the weights B with a zero
diagonal that minimise |X - X B|^2 + regularization |B|^2 are B = I - P / diag(P), each column
divided by its own entry of the diagonal, where P is the inverse of X^T X + regularization I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Int64
from pydantic import Field

from mtrec_jax.baselines.contract import Interactions, check_ids, most_similar
from mtrec_jax.baselines.neighbours import history_pairs, liked_pairs
from mtrec_jax.errors import ConfigError
from mtrec_jax.types import Lists

if TYPE_CHECKING:
    import scipy.sparse as sp

_BLOCK = 1024  # rows at a time


@dataclass(frozen=True, kw_only=True)
class Ease:
    """`kind = "ease"`: every item of a history votes for all others with a weight of its own.

    Memory is that of an N x N matrix: 4 N^2 bytes in float32, 3.6 GB of 30,000 items, and 12 N^2 in
    float64 while it fits; the time grows with N^3. Repeated interactions count once; padding and
    unknown ids are left out.
    """

    kind: Literal["ease"] = "ease"
    regularization: Annotated[float, Field(gt=0)] = 500.0
    precision: Literal["float32", "float64"] = "float32"  # of the inverse
    most_items: Annotated[int, Field(ge=1)] = 30_000  # larger catalogues are refused

    def fit(self, interactions: Interactions) -> Weights:
        """The weights that reconstruct the likes of each user.

        Raises:
          ConfigError: there are more items than `most_items`.
          DataError: an id is beyond the users or items.
        """
        check_ids(self.kind, interactions)
        items = interactions.n_items
        if items > self.most_items:
            size = items * items * (4 if self.precision == "float32" else 12) / 1e9
            raise ConfigError(
                f"ease: {items:,} items are more than most_items = {self.most_items:,}; fitting "
                f"them takes {size:,.1f} GB. Raise most_items if there is room, or take item_knn, "
                "which keeps a few neighbours of each item"
            )
        seen = liked_pairs(interactions)
        by_item, gram = seen.T.tocsr(), np.empty((items, items), self.precision)
        for start in range(0, items, _BLOCK):
            part = slice(start, start + _BLOCK)
            gram[part] = (by_item[part] @ seen).toarray()
        gram[np.diag_indices(items)] += self.regularization
        weights = symmetric_inverse(gram)
        weights /= -np.diag(weights).copy()
        weights[np.diag_indices(items)] = 0
        return Weights(weights.astype(np.float32, copy=False))


@dataclass(frozen=True)
class Weights:
    """Row i holds what catalogue index i adds to the score of every other item.

    >>> one = Weights(np.array([[0, 0.5], [0.25, 0]], np.float32))
    >>> past = Lists(np.array([3, 3, 0]), np.array([0, 3]))  # the second item, twice
    >>> one.scorer(np.array([2]), past).scores(np.array([0]))
    array([[0.25, 0.  ]], dtype=float32)
    """

    weights: np.ndarray  # [N, N] float32, diagonal 0

    def scorer(self, users: Int[np.ndarray, " Q"], histories: Lists) -> WeightedVotes:
        """Score each query's history of item ids.

        Repeats count once; padding and unknown items are passed over.
        """
        return WeightedVotes(history_pairs(histories, len(self.weights)), self.weights)

    def similar_items(
        self, items: Int[np.ndarray, " n"], k: int
    ) -> tuple[Float32[np.ndarray, "n k"], Int64[np.ndarray, "n k"]]:
        """The k items for which each item id speaks most: (weights above 0, item ids)."""

        def rows(which: np.ndarray) -> np.ndarray:
            found = self.weights[which]
            return np.where(found > 0, found, np.float32(-np.inf))

        return most_similar("item", rows, items, k, len(self.weights))


@dataclass(frozen=True)
class WeightedVotes:
    """Sums of the weights of a history's items."""

    histories: sp.csr_array  # [Q, N] float32, 1 where the item is in the history
    weights: np.ndarray  # [N, N]

    def scores(self, queries: Int[np.ndarray, " q"]) -> Float32[np.ndarray, "q N"]:
        """Scores of the queries' histories; 0 where nothing in them speaks of the item."""
        return np.asarray(self.histories[queries] @ self.weights)


def symmetric_inverse(matrix: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """The inverse of a symmetric positive definite matrix, by its Cholesky factor.

    The matrix is overwritten. It takes half of the arithmetic of `numpy.linalg.inv`.

    Raises:
      ConfigError: it is not positive definite, in the precision that it has.

    >>> symmetric_inverse(np.array([[2.0, 1.0], [1.0, 2.0]])).round(3)
    array([[ 0.667, -0.333],
           [-0.333,  0.667]])
    """
    from scipy.linalg import get_lapack_funcs  # other baselines do without

    if not len(matrix):
        return matrix
    factor, invert = get_lapack_funcs(("potrf", "potri"), (matrix,))
    # of a symmetric matrix the transpose is the same, in the order of LAPACK
    upper, failed = factor(matrix.T, lower=False, overwrite_a=True, clean=False)
    if not failed:
        upper, failed = invert(upper, lower=False, overwrite_c=True)
    if failed:
        raise ConfigError(
            f"ease: the matrix cannot be inverted in {matrix.dtype}; raise regularization, or set "
            'precision = "float64"'
        )
    for start in range(0, len(upper), _BLOCK):
        stop = start + _BLOCK
        corner = upper[start:stop, start:stop]
        corner[...] = np.triu(corner) + np.triu(corner, 1).T
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper.T
