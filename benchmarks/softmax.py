"""How long does a softmax loss over a whole catalogue take with its gradients, and beside what?

Mean cross-entropy of 25,600 positions (128 histories of 200) over 3,416 items, and its gradients by
queries and items. "optax" makes the matrix of all logits; jax-cce and tokamax stream as we do.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import contest


class Softmax(NamedTuple):
    """One loss over a catalogue."""

    queries: int  # B
    items: int  # N
    width: int  # D


class Problem(NamedTuple):
    """Vectors [B, D] and [N, D], and rows of the second [B]."""

    queries: jax.Array
    items: jax.Array
    targets: jax.Array


CASES = {
    "quick": (Softmax(1_280, 3_416, 64),),
    "table": (Softmax(25_600, 3_416, 64), Softmax(4_096, 100_000, 64)),
}
BLAS: tuple[str, ...] = ()
BOUNDS = ("bound",)

Call = Callable[[], Any]  # the loss, and the gradients by queries and items
_CHUNKS = (512, 1024, 4096)  # of jax-cce: the fastest of these


def problem(case: Softmax) -> Problem:
    """Seeded vectors, whose logits spread as those of a trained model."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((case.queries + case.items, case.width), np.float32) / 2
    targets = rng.integers(0, case.items, case.queries).astype(np.int32)
    return Problem(*jax.device_put((vectors[: case.queries], vectors[case.queries :], targets)))


def check(problem: Problem, answer: Any) -> None:
    """Loss and gradients are those of the whole matrix in float64, for as many queries as fit."""
    if answer is None:
        return
    loss, (to_queries, to_items) = jax.tree.map(np.asarray, answer)
    exact, part = 0.0, np.zeros(to_items.shape)
    queries, items, targets = (np.asarray(a) for a in problem)
    wrong = 0.0
    for rows in np.array_split(np.arange(len(queries)), max(1, len(queries) // 256)):
        logits = queries[rows].astype(np.float64) @ items.T.astype(np.float64)
        largest = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - largest)
        total = weights.sum(axis=1, keepdims=True)
        own = np.arange(len(rows)), targets[rows]
        exact += float((np.log(total[:, 0]) + largest[:, 0] - logits[own]).sum())
        weights /= total
        weights[own] -= 1
        part += weights.T @ queries[rows] / len(queries)
        wrong = max(wrong, _distance(to_queries[rows], weights @ items / len(queries)))
    np.testing.assert_allclose(loss, exact / len(queries), rtol=1e-5)
    assert max(wrong, _distance(to_items, part)) <= 1e-5


def _distance(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def _differentiated(problem: Problem, loss: Callable[..., Any]) -> Call:
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(program(*problem))


def _ours(problem: Problem) -> Call:
    from mtrec_jax.kernels import streaming_softmax_loss

    return _differentiated(problem, streaming_softmax_loss)


def _optax(problem: Problem) -> Call:
    def loss(queries: jax.Array, items: jax.Array, targets: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(queries @ items.T, targets)
        return jnp.mean(losses)

    return _differentiated(problem, loss)


def _jax_cce(problem: Problem) -> Call:
    loss = importlib.import_module("jax_cce").linear_cross_entropy
    ways = {
        f"chunks of {size}": _differentiated(problem, functools.partial(loss, chunk_size=size))
        for size in _CHUNKS
    }
    return contest.fastest(ways)


def _tokamax(problem: Problem) -> Call:
    loss = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    return _differentiated(problem, lambda q, w, y: loss(q, y, w.T, reduction="mean"))


def _bound(problem: Problem) -> Call:
    """The three products alone: logits, and the gradients that they would give."""

    @jax.jit
    def products(queries: jax.Array, items: jax.Array) -> tuple[jax.Array, jax.Array]:
        def add(total: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = tile @ items.T
            return total + logits.T @ tile, logits @ items

        tiles = queries.reshape(-1, math.gcd(len(queries), 1024), queries.shape[1])
        return jax.lax.scan(add, jnp.zeros_like(items), tiles)

    def call() -> Any:
        jax.block_until_ready(products(problem.queries, problem.items))

    return call


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _ours,
    "optax": _optax,
    "jax-cce": _jax_cce,
    "tokamax": _tokamax,
    "bound": _bound,
}
