"""The specification of the scoring kernels: plain NumPy in float64, for reading, not for speed.

All of [Q, N] is held in memory. `mtrec_jax.kernels.scoring` gives the same answers up to
rounding.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Num


def normalise(vectors: Num[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Rows [n, D] in float64 divided by their L2 norm; a zero row stays zero."""
    tiny = np.finfo(np.float64 if vectors.dtype == np.float64 else np.float32).tiny
    rows = np.asarray(vectors, np.float64)
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    is_zero = largest < tiny
    scaled = np.where(is_zero, 0, rows) / np.where(is_zero, 1, largest)  # squares cannot overflow
    norm = np.sqrt((scaled * scaled).sum(axis=1, keepdims=True))
    return scaled / np.where(is_zero, 1, norm)


def cosine_scores(
    queries: Num[np.ndarray, "Q D"], items: Num[np.ndarray, "N D"]
) -> Float[np.ndarray, "Q N"]:
    """Cosine of every query with every item, 0 where a vector is zero.

    >>> cosine_scores(np.array([[1, 2, 3]]), np.array([[4, 5, 6]])).round(6).tolist()
    [[0.974632]]
    """
    unit = normalise(items)
    # Not a matrix product: this adds up in one order for every pair, so equal vectors tie.
    rows = [(unit * query).sum(axis=1) for query in normalise(queries)]
    return np.array(rows).reshape(len(queries), len(items))


def cosine_topk(
    queries: Num[np.ndarray, "Q D"],
    items: Num[np.ndarray, "N D"],
    k: int,
    exclude: Int[np.ndarray, "Q X"] | None = None,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """Sort everything by (score descending, id ascending) and keep the first k admissible items."""
    all_scores = cosine_scores(queries, items)
    scores = np.full((len(queries), k), -np.inf)
    ids = np.full((len(queries), k), -1, np.int32)
    for row, order in enumerate(np.argsort(-all_scores, axis=1, kind="stable")):
        excluded = [] if exclude is None else exclude[row]
        best = order[~np.isin(order, excluded)][:k]
        ids[row, : len(best)] = best
        scores[row, : len(best)] = all_scores[row, best]
    return scores, ids


def target_rank(
    queries: Num[np.ndarray, "Q D"],
    items: Num[np.ndarray, "N D"],
    targets: Int[np.ndarray, " Q"],
    exclude: Int[np.ndarray, "Q X"] | None = None,
) -> Int[np.ndarray, " Q"]:
    """Place of the target among the admissible items and itself, sorted as in `cosine_topk`."""
    all_scores = cosine_scores(queries, items)
    ranks = np.zeros(len(queries), np.int32)
    for row, order in enumerate(np.argsort(-all_scores, axis=1, kind="stable")):
        excluded = [] if exclude is None else exclude[row]
        admissible = ~np.isin(order, excluded) | (order == targets[row])
        ranks[row] = np.flatnonzero(order[admissible] == targets[row])[0]
    return ranks
