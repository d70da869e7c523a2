"""Several vectors of a user, of which the nearest to an item counts.

A user's state then is K vectors side by side, [..., K * D]. With one, all of this is nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.kernels import ItemIndex
from mtrec_jax.models.layers import linear, unit_length
from mtrec_jax.types import Array

SHARPEST = 8.0  # a logit of the attention is between -8 and 8


class Interests(nnx.Module):
    """K summaries of the events so far, each by an attention of its own over what they show, added
    to the encoder's state (after the self-attentive extraction of Cen et al., "Controllable
    multi-interest framework for recommendation", KDD 2020)."""

    def __init__(self, count: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.count = count
        self.hidden = linear(width, width, dtype=dtype, rngs=rngs)
        self.logits = linear(width, count, dtype=dtype, rngs=rngs)
        self.outputs = nnx.List(
            [linear(width, width, dtype=dtype, rngs=rngs) for _ in range(count)]
        )

    def __call__(self, tokens: jax.Array, known: jax.Array, states: jax.Array) -> jax.Array:
        """Tokens and states [B, S, D], and which of them are there [B, S] -> [B, S, K * D]."""
        s, d = tokens.shape[1:]
        logits = SHARPEST * jnp.tanh(self.logits(jnp.tanh(self.hidden(tokens))) / SHARPEST)
        weights = jnp.exp(logits) * known[..., None]  # (B, S, K)
        parts = [weights[..., k, None] * tokens for k in range(self.count)]
        # Running sums, as a product with ones: sums over windows are slow on CPUs.
        ones = jnp.tril(jnp.ones((s, s), tokens.dtype))
        summed = jnp.einsum("st,btd->bsd", ones, jnp.concatenate([*parts, weights], axis=-1))
        means = [
            summed[..., k * d : (k + 1) * d] / summed[..., self.count * d + k, None]
            for k in range(self.count)
        ]
        found = [states + of(mean) for of, mean in zip(self.outputs, means, strict=True)]
        return jnp.concatenate(found, axis=-1)


def nearest(vectors: jax.Array, items: jax.Array) -> jax.Array:
    """Of K vectors side by side [..., K * D] the one with the highest cosine with an item [..., D].

    >>> nearest(jnp.array([1.0, 0.0, 0.0, 2.0]), jnp.array([0.1, 0.9])).tolist()
    [0.0, 2.0]
    """
    d = items.shape[-1]
    if vectors.shape[-1] == d:
        return vectors
    each = vectors.reshape(*vectors.shape[:-1], -1, d)
    cosines = jnp.sum(unit_length(each) * unit_length(items)[..., None, :], axis=-1)
    best = jnp.argmax(cosines, axis=-1)
    return jnp.take_along_axis(each, best[..., None, None], axis=-2)[..., 0, :]


def search(
    index: ItemIndex,
    vectors: Array,
    k: int,
    exclude: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    among: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k items [Q, k] that are nearest to the best of each user's vectors [Q, K * D]: their
    cosines and catalogue indexes, as `ItemIndex.search` gives them; exact, ties lowest index first.
    """
    vectors = np.asarray(vectors)
    queries = vectors.reshape(-1, index.shape[1])
    count = len(queries) // max(1, len(vectors))
    if count == 1:
        return index.search(queries, k, exclude, mask, among=among)
    among = None if among is None else [own for own in among for _ in range(count)]
    lists = None if exclude is None else np.repeat(exclude, count, axis=0)
    both = index.search(queries, k, lists, mask, among=among)
    scores, ids = (found.reshape(len(vectors), -1) for found in both)
    order = np.lexsort((ids, -scores), axis=-1)
    scores, ids = (np.take_along_axis(found, order, axis=1) for found in (scores, ids))
    # the first of equal ids stays: its score is the highest
    by_id = np.argsort(ids, axis=1, kind="stable")
    same = np.diff(np.take_along_axis(ids, by_id, axis=1), axis=1, prepend=-2) == 0
    again = np.zeros_like(same)
    np.put_along_axis(again, by_id, same, axis=1)
    left = np.argsort(again | (ids < 0), axis=1, kind="stable")[:, :k]
    there = ~np.take_along_axis(again | (ids < 0), left, axis=1)
    scores, ids = (np.take_along_axis(found, left, axis=1) for found in (scores, ids))
    return np.where(there, scores, -np.inf).astype(np.float32), np.where(there, ids, -1)


def ranks(
    index: ItemIndex,
    vectors: Array,
    targets: np.ndarray,
    exclude: np.ndarray | None,
    mask: np.ndarray | None,
    k: int,
) -> np.ndarray:
    """The rank [Q] of each user's target, 0 = first; with several vectors a user N, the size of the
    catalogue, where it is excluded or not among the first k."""
    vectors = np.asarray(vectors)
    if vectors.shape[1] == index.shape[1]:
        return index.rank(vectors, targets, exclude, mask)
    found = search(index, vectors, min(k, len(index)), exclude, mask)[1]
    hit = found == targets[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1), len(index))
