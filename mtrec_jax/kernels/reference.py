"""The specification of the scoring kernels in plain NumPy: for reading and tests, not for speed.

All of [Q, N] is held in memory. `mtrec_jax.kernels` gives the same ids, ranks and bits of scores.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Num

LOWER_BITS = {"float32": 12, "float64": 27}  # of the mantissa: the lower half of a number's digits


def dot(a: Float[np.ndarray, "... D"], b: Float[np.ndarray, "... D"]) -> Float[np.ndarray, " ..."]:
    """Dot products over the last axis in the one order of summation that scores have.

    Each factor is the sum of an upper and a lower half, whose products are exact; the products are
    added as a balanced tree, the second half of them to the first, and so on.

    >>> dot(np.float32([[1, 2]]), np.float32([[3, 4]])).tolist()
    [11.0]
    """
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    middle = _tree(a_high * b_low) + _tree(a_low * b_high)
    found = _tree(a_high * b_high) + (middle + _tree(a_low * b_low))
    return np.where(found == 0, found.dtype.type(0), found)  # without a sign


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits = LOWER_BITS[x.dtype.name]
    whole = x.view(np.dtype(f"int{8 * x.dtype.itemsize}"))
    rounded = (whole + whole.dtype.type(1 << (bits - 1))) & whole.dtype.type(-1 << bits)
    high = rounded.view(x.dtype)
    return high, x - high


def _tree(x: np.ndarray) -> np.ndarray:
    width = x.shape[-1]
    full = 1 << max(width - 1, 0).bit_length()
    x = np.concatenate([x, np.zeros((*x.shape[:-1], full - width), x.dtype)], axis=-1)
    while full > 1:
        full //= 2
        x = x[..., :full] + x[..., full:]
    return x[..., 0]


def normalise(vectors: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Rows divided by their largest magnitude, and then by their L2 norm; a zero row stays zero.

    A row whose largest magnitude is below the smallest normal number counts as zero.
    """
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=0)
    is_zero = largest < np.finfo(vectors.dtype).tiny
    scaled = np.where(is_zero, 0, vectors) / np.where(is_zero, 1, largest)
    norm = np.sqrt(dot(scaled, scaled))[:, None]
    return scaled / np.where(is_zero, 1, norm)


def scores(
    queries: Num[np.ndarray, "Q D"], items: Num[np.ndarray, "N D"], metric: str = "cosine"
) -> Float[np.ndarray, "Q N"]:
    """The score of every query with every item: float64 if an input is, else float32.

    >>> scores(np.array([[1, 2, 3]], "f4"), np.array([[4, 5, 6]], "f4")).round(6).tolist()
    [[0.97463...]]
    """
    wide = np.float64 if np.float64 in (queries.dtype, items.dtype) else np.float32
    queries, items = queries.astype(wide), items.astype(wide)
    if metric == "cosine":
        queries, items = normalise(queries), normalise(items)
    found = [dot(items, query[None, :]) for query in queries]
    return np.array(found, wide).reshape(len(queries), len(items))


def topk(
    all_scores: Float[np.ndarray, "Q N"],
    k: int,
    admissible: Bool[np.ndarray, "Q N"] | None = None,
    groups: Int[np.ndarray, "N S"] | None = None,
    most: Int[np.ndarray, " G"] | None = None,
) -> tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]:
    """Sort everything by (score descending, id ascending) and keep the first k admissible items.

    With groups, of which an item has those that are not -1, an item is passed over if a group of
    it has as many items in the list as `most` says.
    """
    found = np.full((len(all_scores), k), -np.inf, all_scores.dtype)
    ids = np.full((len(all_scores), k), -1, np.int32)
    for row, order in enumerate(np.argsort(-all_scores, axis=1, kind="stable")):
        best = order if admissible is None else order[admissible[row][order]]
        if groups is not None and most is not None:
            best = _within(best, groups, most.copy())
        best = best[:k]
        ids[row, : len(best)] = best
        found[row, : len(best)] = all_scores[row, best]
    return found, ids


def _within(order: np.ndarray, groups: np.ndarray, left: np.ndarray) -> np.ndarray:
    kept = []
    for item in order:
        own = groups[item][groups[item] >= 0]
        if (left[own] > 0).all():
            left[own] -= 1
            kept.append(item)
    return np.array(kept, int)


def rank(
    all_scores: Float[np.ndarray, "Q N"],
    targets: Int[np.ndarray, " Q"],
    admissible: Bool[np.ndarray, "Q N"] | None = None,
) -> Int[np.ndarray, " Q"]:
    """Place of the target among the admissible items and itself, sorted as in `topk`."""
    ranks = np.zeros(len(all_scores), np.int32)
    for row, order in enumerate(np.argsort(-all_scores, axis=1, kind="stable")):
        good = np.ones(len(order), bool) if admissible is None else admissible[row][order]
        ranks[row] = np.flatnonzero(order[good | (order == targets[row])] == targets[row])[0]
    return ranks
