"""Several vectors of a user."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.kernels import ItemIndex
from mtrec_jax.models import interests

K, D, N = 3, 4, 40


def _cosines(vectors: np.ndarray, items: np.ndarray) -> np.ndarray:
    """[Q, N]: of the best of each user's vectors."""
    each = vectors.reshape(len(vectors), -1, items.shape[1])
    each = each / np.linalg.norm(each, axis=-1, keepdims=True)
    items = items / np.linalg.norm(items, axis=-1, keepdims=True)
    return np.einsum("qkd,nd->qkn", each, items).max(axis=1)


def test_lists_and_ranks_are_those_of_the_best_vector() -> None:
    rng = np.random.default_rng(0)
    items = rng.normal(size=(N, D)).astype(np.float32)
    items[7] = items[3]  # equals, of which the first comes first
    vectors = rng.normal(size=(6, K * D)).astype(np.float32)
    vectors[0, :D] = items[3]
    exclude = rng.integers(N, size=(6, 5)).astype(np.int32)
    exclude[0] = -1
    scores = _cosines(vectors, items)
    np.put_along_axis(scores, np.where(exclude < 0, 0, exclude), -np.inf, axis=1)
    scores[0, 0] = _cosines(vectors, items)[0, 0]
    index = ItemIndex(items)
    for k in (5, N):
        found, ids = interests.search(index, vectors, k, exclude)
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        there = np.take_along_axis(scores, expected, axis=1) > -np.inf
        np.testing.assert_array_equal(ids, np.where(there, expected, -1))
        assert (np.isfinite(found) == there).all()
    assert ids[0, :2].tolist() == [3, 7]
    targets = np.argsort(-scores, axis=1, kind="stable")[np.arange(6), [0, 1, 4, 9, 10, 30]]
    ranks = interests.ranks(index, vectors, targets, exclude, None, 10)
    assert ranks.tolist() == [0, 1, 4, 9, N, N]


def test_a_vector_is_a_weighted_mean_of_the_events_so_far_beside_the_state() -> None:
    """Written out; a later event changes nothing before it."""
    module = interests.Interests(2, D, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    tokens, states = rng.normal(size=(2, 1, 5, D)).astype(np.float32)
    known = np.array([[True, True, True, True, False]])
    found = np.asarray(jax.jit(module.__call__)(tokens, known, states))[0]
    hidden, logits, outputs = module.hidden, module.logits, module.outputs
    drawn = np.tanh(tokens[0] @ hidden.kernel[...] + hidden.bias[...])
    drawn = 8 * np.tanh((drawn @ logits.kernel[...] + logits.bias[...]) / 8)
    weights = np.exp(drawn) * known[0][:, None]
    for s in range(4):
        for k in range(2):
            mean = weights[: s + 1, k] @ tokens[0, : s + 1] / weights[: s + 1, k].sum()
            expected = states[0, s] + mean @ outputs[k].kernel[...] + outputs[k].bias[...]
            np.testing.assert_allclose(found[s, k * D : (k + 1) * D], expected, atol=1e-5)
