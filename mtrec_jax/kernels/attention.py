"""Attention whose scores are forgotten as soon as they are used.

Of the way there, the inputs, the outputs and a normaliser of each query are kept; the way back
makes the scores again (Dao et al., NeurIPS 2022), so that memory grows with the length and not with
its square. Where attention is causal, scores above the diagonal are mostly not made: queries come
in blocks, each against the keys up to its end.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_QUERIES = 128  # of a block, at most


def causal_attention(
    query: Float[Array, "N S D"], key: Float[Array, "N S D"], value: Float[Array, "N S D"]
) -> Float[Array, "N S D"]:
    """softmax(query . key / sqrt(D)) of the positions up to each query's own, times the values.

    Heads stand in the first axis. Differentiable by all three. Of fewer bits than 32, products are
    summed in 32, and weights are made in 32.

    >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> causal_attention(x, x, x)[0, 0].tolist()  # it sees itself alone
    [1.0, 0.0]
    """
    return _attention(query * query.shape[-1] ** -0.5, key, value)


@jax.custom_vjp
def _attention(query: Array, key: Array, value: Array) -> Array:
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    mixed, normalisers = [], []
    for own, past, seen in blocks(query.shape[1]):
        scores = _scores(query[:, own], key[:, past], seen)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed.append(_mixed("nij,njd->nid", weights, value[:, past]) / total)
        normalisers.append((largest + jnp.log(total))[..., 0])
    found, normaliser = jnp.concatenate(mixed, axis=1), jnp.concatenate(normalisers, axis=1)
    found = found.astype(value.dtype)
    return found, (query, key, value, found, normaliser)


def _backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    query, key, value, mixed, normaliser = kept
    to_query, wide = [], normaliser.dtype
    own_part = jnp.sum(gradient.astype(wide) * mixed.astype(wide), axis=-1, keepdims=True)
    to_key, to_value = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
    for own, past, seen in blocks(query.shape[1]):
        scores = _scores(query[:, own], key[:, past], seen)
        weights = jnp.exp(scores - normaliser[:, own, None])
        to_weights = _mixed("nid,njd->nij", gradient[:, own], value[:, past])
        to_scores = weights * (to_weights - own_part[:, own])
        to_query.append(_mixed("nij,njd->nid", to_scores, key[:, past]))
        to_key = to_key.at[:, past].add(_mixed("nij,nid->njd", to_scores, query[:, own]))
        to_value = to_value.at[:, past].add(_mixed("nij,nid->njd", weights, gradient[:, own]))
    found = jnp.concatenate(to_query, axis=1), to_key, to_value
    return tuple(to.astype(of.dtype) for to, of in zip(found, kept[:3], strict=True))  # type: ignore[return-value]


_attention.defvjp(_forward, _backward)


def blocks(length: int) -> Iterator[tuple[slice, slice, Array]]:
    """Queries, the keys that some of them see, and which see which."""
    count = -(-length // _QUERIES)
    size = -(-length // count)
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = (start + jnp.arange(stop - start))[:, None] >= jnp.arange(stop)[None]
        yield slice(start, stop), slice(0, stop), seen


def _scores(query: Array, key: Array, seen: Array) -> Array:
    return jnp.where(seen[None], _mixed("nid,njd->nij", query, key), -jnp.inf)


def _mixed(axes: str, one: Array, other: Array) -> Array:
    """A product of numbers of the second's bits, summed in 32 at least."""
    wide = jnp.promote_types(other.dtype, jnp.float32)
    return jnp.einsum(axes, one.astype(other.dtype), other, preferred_element_type=wide)


def padded_attention(
    query: Float[Array, "N S D"],
    key: Float[Array, "N S D"],
    value: Float[Array, "N S D"],
    known: Bool[Array, "N S"],
) -> Float[Array, "N S D"]:
    """softmax(query . key / sqrt(D)) of all positions that are no padding, times the values. Scores
    are made again on the way back.

    >>> x = jnp.array([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    >>> padded_attention(x, x, x, jnp.array([[False, True, False]]))[0, 2].tolist()
    [0.0, 1.0]
    """

    @jax.checkpoint
    def mixed(query: Array, key: Array, value: Array) -> Array:
        scores = _mixed("nid,njd->nij", query * query.shape[-1] ** -0.5, key)
        weights = jax.nn.softmax(jnp.where(known[:, None], scores, -jnp.inf), axis=-1)
        return _mixed("nij,njd->nid", weights, value).astype(value.dtype)

    return mixed(query, key, value)
