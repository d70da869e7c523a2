"""Rules that update rows: a step costs what the touched rows cost, whatever the table's size."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtrec_jax.tables.layout import computed_dtype
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
    the same over a run, as the sums in `z` are in its units: see `at_rate`. Its regularization is
    that of `l1` and `l2`, of all steps together: rows come from `z` anew in each step, so that a
    decay of the rows beside it (`bounded`) would be undone by the next one.
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
