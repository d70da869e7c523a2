"""Row-wise optimizers: a step costs what the touched rows cost, whatever the size of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtrec_jax.types import PyTree


class RowOptimizer(NamedTuple):
    """`init(table [V, D]) -> slots`, a pytree of [V, ...] arrays, and
    `update(rows, slots, grads, learning_rate) -> (rows, slots)` on the touched rows [n, D] only."""

    init: Callable[[jax.Array], PyTree]
    update: Callable[[jax.Array, PyTree, jax.Array, jax.Array | float], tuple[jax.Array, PyTree]]


def rowwise_adagrad(epsilon: float = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator a row, the mean square of its gradient (as in DLRM)."""

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: jax.Array | float
    ) -> tuple[jax.Array, PyTree]:
        total = slots + jnp.mean(jnp.square(grads), axis=-1)
        scale = learning_rate / (jnp.sqrt(total) + epsilon)
        return rows - scale[:, None] * grads, total

    return RowOptimizer(lambda table: jnp.zeros(table.shape[:1], table.dtype), update)


def lazy_adam(b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8) -> RowOptimizer:
    """Adam (Kingma & Ba 2015) whose moments and step count advance only when a row is touched."""

    def init(table: jax.Array) -> PyTree:
        zeros = jnp.zeros_like(table)
        return {"m": zeros, "v": jnp.zeros_like(table), "count": jnp.zeros(len(table), jnp.int32)}

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: jax.Array | float
    ) -> tuple[jax.Array, PyTree]:
        count = slots["count"] + 1
        m = b1 * slots["m"] + (1 - b1) * grads
        v = b2 * slots["v"] + (1 - b2) * jnp.square(grads)
        t = count.astype(rows.dtype)[:, None]
        step = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + epsilon)
        return rows - learning_rate * step, {"m": m, "v": v, "count": count}

    return RowOptimizer(init, update)


def apply_rows(
    optimizer: RowOptimizer,
    table: Float[Array, "V D"],
    slots: PyTree,
    scratch: Int[Array, " V"],
    ids: Int[Array, " n"],
    grads: Float[Array, "n D"],
    learning_rate: Float[Array, ""] | float,
) -> tuple[Float[Array, "V D"], PyTree, Int[Array, " V"]]:
    """Sum the gradients of equal ids, update each touched row once; ids below 0 are padding.

    The exact dedup needs no sort: every id writes its position into `scratch` and reads back one
    winner among its equals; gradients are added up at the winner. `scratch` is work space whose
    content means nothing between calls. Returns (table, slots, scratch), updated in place when the
    caller donates them.
    """
    n, rows_total = ids.shape[0], table.shape[0]
    position = jnp.arange(n, dtype=jnp.int32)
    valid = ids >= 0
    # Positions that must not write are sent to distinct rows past the end, which are dropped: a
    # clamped index would hit the last row, a repeated one would break unique_indices.
    outside = rows_total + position
    scratch = scratch.at[jnp.where(valid, ids, outside)].set(position, mode="drop")
    winner = jnp.where(valid, scratch.at[ids].get(mode="clip"), position)
    summed = jnp.zeros_like(grads).at[winner].add(grads)
    target = jnp.where(valid & (winner == position), ids, outside)
    old = table.at[target].get(mode="clip")
    old_slots = jax.tree.map(lambda s: s.at[target].get(mode="clip"), slots)
    new, new_slots = optimizer.update(old, old_slots, summed, learning_rate)

    def write(whole: jax.Array, part: jax.Array) -> jax.Array:
        return whole.at[target].set(part, mode="drop", unique_indices=True)

    return write(table, new), jax.tree.map(write, slots, new_slots), scratch
