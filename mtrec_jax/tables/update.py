"""Row-wise optimizers: a step costs what the touched rows cost, whatever the size of the table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from mtrec_jax.tables.layout import BITS, RowUpdate, computed_dtype, update_rows
from mtrec_jax.types import PyTree

Rate = jax.Array | float


class RowOptimizer(NamedTuple):
    """`init(table [V, D]) -> slots`, a pytree of [V, ...] arrays, and
    `update(rows, slots, grads, learning_rate) -> (rows, slots)` on the touched rows [n, D] only.

    Rows, gradients and slots are of the table's `computed_dtype`: float32 for bfloat16 rows."""

    init: Callable[[jax.Array], PyTree]
    update: Callable[[jax.Array, PyTree, jax.Array, Rate], tuple[jax.Array, PyTree]]


def sgd() -> RowOptimizer:
    """Gradient descent; it keeps nothing."""

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: Rate
    ) -> tuple[jax.Array, PyTree]:
        return rows - learning_rate * grads, slots

    return RowOptimizer(lambda table: {}, update)


def adagrad(initial: float = 0.1, epsilon: float = 1e-7) -> RowOptimizer:
    """Adagrad (Duchi, Hazan & Singer 2011) with one accumulator a number, as in `optax.adagrad`."""

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: Rate
    ) -> tuple[jax.Array, PyTree]:
        total = slots + jnp.square(grads)
        scale = jnp.where(total > 0, jax.lax.rsqrt(total + epsilon), 0)
        return rows - learning_rate * scale * grads, total

    return RowOptimizer(lambda table: jnp.full(table.shape, initial, computed_dtype(table)), update)


def rowwise_adagrad(epsilon: float = 1e-8) -> RowOptimizer:
    """Adagrad with one accumulator a row, the mean square of its gradient (as in DLRM)."""

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: Rate
    ) -> tuple[jax.Array, PyTree]:
        total = slots + jnp.mean(jnp.square(grads), axis=-1)
        scale = learning_rate / (jnp.sqrt(total) + epsilon)
        return rows - scale[:, None] * grads, total

    return RowOptimizer(lambda table: jnp.zeros(table.shape[:1], computed_dtype(table)), update)


def lazy_adam(b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8) -> RowOptimizer:
    """Adam (Kingma & Ba 2015) whose moments and step count advance only when a row is touched."""

    def init(table: jax.Array) -> PyTree:
        # Two arrays, as a donated one must not be given twice.
        m, v = (jnp.zeros(table.shape, computed_dtype(table)) for _ in range(2))
        return {"m": m, "v": v, "count": jnp.zeros(len(table), jnp.int32)}

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: Rate
    ) -> tuple[jax.Array, PyTree]:
        count = slots["count"] + 1
        m = b1 * slots["m"] + (1 - b1) * grads
        v = b2 * slots["v"] + (1 - b2) * jnp.square(grads)
        t = count.astype(rows.dtype)[:, None]
        step = (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + epsilon)
        return rows - learning_rate * step, {"m": m, "v": v, "count": count}

    return RowOptimizer(init, update)


def ftrl(l1: float = 0.0, l2: float = 0.0, beta: float = 1.0) -> RowOptimizer:
    """FTRL-Proximal (McMahan et al., KDD 2013), algorithm 1; with `l1`, weights become exactly 0.

    A row that has not been touched yet starts from its own values. The learning rate has to stay
    the same over a run, as the sums in `z` are in its units: see `at_rate`.
    """

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: Rate
    ) -> tuple[jax.Array, PyTree]:
        n = slots["n"] + jnp.square(grads)
        before = beta / learning_rate + l2
        start = -rows * before - jnp.sign(rows) * l1  # the z whose weights are these rows
        z = jnp.where(slots["n"] == 0, start, slots["z"])
        z += grads - (jnp.sqrt(n) - jnp.sqrt(slots["n"])) / learning_rate * rows
        strength = (beta + jnp.sqrt(n)) / learning_rate + l2
        new = jnp.where(jnp.abs(z) <= l1, 0, (jnp.sign(z) * l1 - z) / strength)
        return new, {"z": z, "n": n}

    def init(table: jax.Array) -> PyTree:
        z, n = (jnp.zeros(table.shape, computed_dtype(table)) for _ in range(2))
        return {"z": z, "n": n}

    return RowOptimizer(init, update)


def at_rate(rule: RowOptimizer, learning_rate: float) -> RowOptimizer:
    """A rule that keeps to one learning rate, whatever it is given."""

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, given: Rate
    ) -> tuple[jax.Array, PyTree]:
        return rule.update(rows, slots, grads, learning_rate)

    return RowOptimizer(rule.init, update)


def bounded(rule: RowOptimizer, weight_decay: float = 0.0, clip_norm: float = 0.0) -> RowOptimizer:
    """A rule with decoupled weight decay (as in AdamW) of the rows that a step touches, and their
    gradients clipped to a norm, each row by itself; 0: neither."""

    def update(
        rows: jax.Array, slots: PyTree, grads: jax.Array, learning_rate: Rate
    ) -> tuple[jax.Array, PyTree]:
        if clip_norm:
            norm = jnp.linalg.norm(grads, axis=-1, keepdims=True)
            grads = grads * jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30))
        new, slots = rule.update(rows, slots, grads, learning_rate)
        return new - learning_rate * weight_decay * rows if weight_decay else new, slots

    return RowOptimizer(rule.init, update)


RULES = {
    "sgd": sgd,
    "adagrad": adagrad,
    "rowwise_adagrad": rowwise_adagrad,
    "lazy_adam": lazy_adam,
    "ftrl": ftrl,
}


_BLOCK = 2**14  # rows that are updated at once: it bounds the work space


def apply_rows(
    optimizer: RowOptimizer,
    table: Num[Array, "V D"],
    slots: PyTree,
    scratch: Int[Array, " V"],
    ids: Int[Array, " n"],
    grads: Float[Array, "n D"],
    learning_rate: Rate,
    key: jax.Array | None = None,
    rows: Float[Array, "n D"] | None = None,
) -> tuple[Num[Array, "V D"], PyTree, Int[Array, " V"]]:
    """Sum the gradients of equal ids, update each touched row once; ids below 0 are padding.

    The exact dedup needs no sort: every id writes its position into `scratch` and reads back one
    winner among its equals; gradients of the others are added to the winner's. `scratch` is work
    space whose content means nothing between calls. Returns (table, slots, scratch), updated in
    place when the caller donates them. bfloat16 rows (a table of `embedding.BITS`) are updated in
    float32 and rounded at random, by `key`.
    Whoever has the `rows` of the ids already, from `nn.embedding.gather`, saves fetching them anew.
    """
    n, rows_total = ids.shape[0], table.shape[0]
    position = jnp.arange(n, dtype=jnp.int32)
    valid = ids >= 0
    # Positions that must not write are sent to distinct rows past the end, which are dropped: a
    # clamped index would hit the last row, a repeated one would break unique_indices.
    outside = rows_total + position
    scratch = scratch.at[jnp.where(valid, ids, outside)].set(position, mode="drop")
    winner = jnp.where(valid, scratch.at[ids].get(mode="clip"), position)
    grads = grads.astype(computed_dtype(table))
    # The winner has its own gradient already: only those of its equals are added.
    summed = grads.at[jnp.where(winner == position, n, winner)].add(grads, mode="drop")
    target = jnp.where(valid & (winner == position), ids, outside)
    blocks = max(1, -(-n // _BLOCK))
    block = -(-n // blocks)

    def one_block(number: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        first = number * block
        start = jnp.minimum(first, n - block)  # the last block begins inside the one before it
        of_block = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=block
        )
        place = start + jnp.arange(block, dtype=jnp.int32)
        address = jnp.where(place >= first, of_block(target), rows_total + place)
        own = None if key is None else jax.random.fold_in(key, number)
        rule = row_update(optimizer, learning_rate, own, table.dtype)
        old = None if rows is None else of_block(rows)
        return update_rows(rule, *state, address, of_block(summed), old)

    table, slots = jax.lax.fori_loop(jnp.int32(0), jnp.int32(blocks), one_block, (table, slots))
    return table, slots, scratch


def row_update(
    optimizer: RowOptimizer, learning_rate: Rate, key: jax.Array | None, dtype: jnp.dtype
) -> RowUpdate:
    """The rule as a function of (rows, slots, grads); bfloat16 rows are rounded at random."""

    def update(rows: jax.Array, slots: PyTree, grads: jax.Array) -> tuple[jax.Array, PyTree]:
        new, slots = optimizer.update(rows, slots, grads, learning_rate)
        return stochastic_round(new, key) if dtype == BITS else new, slots

    return update


def stochastic_round(x: Float[Array, "n D"], key: jax.Array | None) -> Float[Array, "n D"]:
    """float32 to one of the two nearest bfloat16, in proportion to how near: right on average.

    Rounding to the nearest would lose every update below half a unit in the last of 8 bits.
    """
    if key is None:
        raise ValueError("a table of bfloat16 rows needs a key, to be rounded at random")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += _noise(key, x.shape) >> 16  # a carry moves to the next number
    down = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), down, x.astype(jnp.bfloat16))


def _noise(key: jax.Array, shape: tuple[int, ...]) -> Array:
    """32-bit words, mixed from a seed and their places by the finalizer of MurmurHash3 (Appleby).

    Good enough to round by, and on CPUs far faster than as many `jax.random.bits`.
    """
    seed, more = jax.random.bits(key, (2,), jnp.uint32)
    place = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    word = (place + seed) ^ more
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
