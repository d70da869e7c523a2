"""Row-wise optimizers: equal to their dense rules, and blind to every row that is not touched."""

from __future__ import annotations

from functools import partial
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtrec_jax.config import Train
from mtrec_jax.tables.layout import BITS, as_held, as_numbers
from mtrec_jax.tables.lookup import gather
from mtrec_jax.tables.rules import (
    RowOptimizer,
    adagrad,
    bounded,
    ftrl,
    lazy_adam,
    rowwise_adagrad,
    sgd,
)
from mtrec_jax.tables.update import apply_rows, stochastic_round
from mtrec_jax.train.step import row_rules

V, D, RATE = 9, 4, 0.1
RULES = {
    "sgd": sgd(),
    "adagrad": adagrad(),
    "rowwise_adagrad": rowwise_adagrad(),
    "lazy_adam": lazy_adam(),
    "ftrl": ftrl(l1=0.05, l2=0.1),
    "bounded": bounded(sgd(), weight_decay=0.1, clip_norm=1.5),
}
DENSE = {"sgd": optax.sgd(RATE), "adagrad": optax.adagrad(RATE), "lazy_adam": optax.adam(RATE)}
every_rule = pytest.mark.parametrize("name", RULES)


class Dense:
    """The same rules over the whole table, written for reading: untouched rows stay still."""

    def __init__(self, name: str, table: np.ndarray):
        self.name, self.table = name, table.astype(np.float64)
        self.sum, self.count = np.zeros(V), np.zeros(V)
        self.squares, self.z, self.n = np.full((V, D), 0.1), np.zeros((V, D)), np.zeros((V, D))
        self.m, self.v = np.zeros((V, D)), np.zeros((V, D))

    def step(self, ids: np.ndarray, grads: np.ndarray) -> None:
        for row in np.unique(ids[ids >= 0]):
            g = grads[ids == row].astype(np.float64).sum(axis=0)
            getattr(self, self.name)(row, g)

    def sgd(self, row: int, g: np.ndarray) -> None:
        self.table[row] -= RATE * g

    def bounded(self, row: int, g: np.ndarray) -> None:
        shorter = g * min(1, 1.5 / np.linalg.norm(g))
        self.table[row] -= RATE * (shorter + 0.1 * self.table[row])

    def adagrad(self, row: int, g: np.ndarray) -> None:
        self.squares[row] += g**2
        self.table[row] -= RATE * g / np.sqrt(self.squares[row] + 1e-7)

    def rowwise_adagrad(self, row: int, g: np.ndarray) -> None:
        self.sum[row] += np.mean(g**2)
        self.table[row] -= RATE * g / (np.sqrt(self.sum[row]) + 1e-8)

    def ftrl(self, row: int, g: np.ndarray) -> None:
        """Algorithm 1 of McMahan et al., number by number, started where the weights are."""
        for i, w in enumerate(self.table[row]):
            if self.n[row, i] == 0:
                self.z[row, i] = -w * (1 / RATE + 0.1) - np.sign(w) * 0.05
            sigma = (np.sqrt(self.n[row, i] + g[i] ** 2) - np.sqrt(self.n[row, i])) / RATE
            self.z[row, i] += g[i] - sigma * w
            self.n[row, i] += g[i] ** 2
            z = self.z[row, i]
            new = -(z - np.sign(z) * 0.05) / ((1 + np.sqrt(self.n[row, i])) / RATE + 0.1)
            self.table[row, i] = 0 if abs(z) <= 0.05 else new

    def lazy_adam(self, row: int, g: np.ndarray) -> None:
        self.count[row] += 1
        self.m[row] = 0.9 * self.m[row] + 0.1 * g
        self.v[row] = 0.999 * self.v[row] + 0.001 * g**2
        m = self.m[row] / (1 - 0.9 ** self.count[row])
        v = self.v[row] / (1 - 0.999 ** self.count[row])
        self.table[row] -= RATE * m / (np.sqrt(v) + 1e-8)


def _start(rule: RowOptimizer, dtype: Any = jnp.float32) -> tuple[jax.Array, Any, jax.Array]:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(V, D)), dtype)
    rubbish = jnp.asarray(np.random.default_rng(1).integers(-(2**31), 2**31, V), jnp.int32)
    return table, rule.init(table), rubbish


_apply = {
    name: jax.jit(partial(apply_rows, rule, learning_rate=RATE)) for name, rule in RULES.items()
}


def _grads(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


@every_rule
def test_duplicates_and_padding_equal_the_rule_written_out(name: str) -> None:
    with jax.enable_x64(True):
        state = _start(RULES[name], jnp.float64)
        dense = Dense(name, np.asarray(state[0]))
        rng = np.random.default_rng(2)
        for step in range(6):
            ids = rng.integers(-1, V, 24).astype(np.int32)  # many of them twice and more
            grads = _grads(24, step).astype(np.float64)
            state = _apply[name](*state, ids, grads)
            dense.step(ids, grads)
            assert state[0].dtype == jnp.float64
            np.testing.assert_allclose(state[0], dense.table, atol=1e-12)


@pytest.mark.parametrize("name", DENSE)
def test_on_all_rows_it_is_the_rule_of_optax(name: str) -> None:
    state, dense = _start(RULES[name]), DENSE[name]
    table, slots = state[0], dense.init(state[0])
    for step in range(6):
        ids = np.random.default_rng(step).permutation(V).astype(np.int32)
        twice, grads = np.concatenate([ids, [-1], ids]), _grads(2 * V + 1, step)  # and padding
        state = _apply[name](*state, twice, grads)
        whole = jnp.zeros((V, D)).at[ids].set(grads[:V] + grads[V + 1 :])
        updates, slots = dense.update(whole, slots)
        table = optax.apply_updates(table, updates)
        np.testing.assert_allclose(state[0], table, atol=1e-6)


@every_rule
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
    ids=st.lists(st.integers(-1, V - 1), min_size=6, max_size=6), seed=st.integers(0, 99)
)
def test_a_row_moves_once_if_touched_and_not_a_bit_otherwise(
    name: str, ids: list[int], seed: int
) -> None:
    state = _start(RULES[name])
    state = _apply[name](*state, jnp.arange(6, dtype=jnp.int32), _grads(6, 200))  # used slots
    before = jax.tree.map(np.array, state[:2])
    address, grads = np.array(ids, np.int32), _grads(6, seed)
    after = jax.tree.map(np.array, _apply[name](*state, address, grads)[:2])
    untouched = np.setdiff1d(np.arange(V), address)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[untouched], new[untouched])
    # a permutation of the batch sums the same gradients
    order = np.random.default_rng(seed).permutation(6)
    again = _apply[name](*state, address[order], grads[order])[0]
    np.testing.assert_allclose(again, after[0], atol=1e-6)
    touched = np.setdiff1d(np.arange(V), untouched)
    assert (after[0][touched] != before[0][touched]).any(axis=1).all()
    if name == "lazy_adam":
        advanced = after[1]["count"] - before[1]["count"]
        np.testing.assert_array_equal(advanced, np.isin(np.arange(V), ids))


@every_rule
def test_nothing_but_padding_changes_nothing(name: str) -> None:
    """The last row above all, where a clamped index would land, and a wrapped -1 as well."""
    state = _start(RULES[name])
    found = _apply[name](*state, jnp.full(6, -1, jnp.int32), _grads(6, 0))
    for old, new in zip(jax.tree.leaves(state[:2]), jax.tree.leaves(found[:2]), strict=True):
        np.testing.assert_array_equal(old, new)


@every_rule
def test_a_large_batch_is_updated_block_by_block_with_rows_that_are_known(name: str) -> None:
    size, n = 50_000, 2 * 2**14 + 3
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(size, D)), jnp.float32)
    ids, grads = rng.integers(-1, size, n).astype(np.int32), _grads(n, 1)
    state = table, RULES[name].init(table), jnp.zeros(size, jnp.int32)
    at_once = _apply[name](*state, ids, grads)
    known = _apply[name](*state, ids, grads, rows=gather(table, jnp.asarray(ids)))
    jax.tree.map(np.testing.assert_array_equal, at_once[:2], known[:2])
    # The same sums, a part of the table after the other in small batches.
    unique, inverse = np.unique(ids, return_inverse=True)
    sums = np.zeros((len(unique), D), np.float64)
    np.add.at(sums, inverse, grads)
    for part in range(0, len(unique), 10_000):
        chosen = slice(part, part + 10_000)
        state = _apply[name](*state, unique[chosen], sums[chosen].astype(np.float32))
    for old, new in zip(jax.tree.leaves(state[:2]), jax.tree.leaves(at_once[:2]), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.dtype("float32"), BITS])
def test_the_work_space_does_not_grow_with_the_table(dtype: jnp.dtype) -> None:
    def memory(size: int) -> Any:
        table = jax.ShapeDtypeStruct((size, 32), dtype)
        slots = jax.ShapeDtypeStruct((size, 32), jnp.float32)
        ids = jax.ShapeDtypeStruct((40_960,), jnp.int32)
        grads = jax.ShapeDtypeStruct((40_960, 32), jnp.float32)
        scratch = jax.ShapeDtypeStruct((size,), jnp.int32)
        step = jax.jit(partial(apply_rows, adagrad(), learning_rate=RATE), donate_argnums=(0, 1, 2))
        lowered = step.lower(table, slots, scratch, ids, grads, key=jax.random.key(0))
        return lowered.compile().memory_analysis()

    small, large = memory(100_000), memory(10_000_000)
    assert large.temp_size_in_bytes == small.temp_size_in_bytes < 8 * 40_960 * 32 * 4
    # Tables, slots and 4 bytes a row are updated in place; nothing else is returned.
    assert large.alias_size_in_bytes == 10_000_000 * (32 * (dtype.itemsize + 4) + 4)
    assert large.output_size_in_bytes - large.alias_size_in_bytes < 1_000


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "lazy_adam"])
def test_rows_decay_by_the_rate_in_each_step_that_touches_them(name: str) -> None:
    """200 touches without a gradient, (1 - 0.1 * 0.1) ** 200 = 0.13398."""
    rule = row_rules(Train(row_weight_decay=0.1))[name]
    rows, grads = jnp.ones((2, D)), jnp.zeros((2, D))
    state = rows, rule.init(rows)
    state = jax.lax.fori_loop(0, 200, lambda _, s: rule.update(s[0], s[1], grads, RATE), state)
    np.testing.assert_allclose(state[0], 0.13398, rtol=1e-4)


def test_ftrl_keeps_to_its_learning_rate_whatever_the_schedule() -> None:
    """A warm-up begins at 0, by which it would divide."""
    rule = row_rules(Train(row_optimizer="ftrl", learning_rate=RATE, warmup_steps=5))["ftrl"]
    rows = jnp.full((3, 4), 0.1)
    slots, grads = rule.init(rows), jnp.full((3, 4), 1e-6)
    expected, _ = ftrl().update(rows, slots, grads, RATE)
    for given in (0.0, 10 * RATE):
        new, _ = rule.update(rows, slots, grads, given)
        np.testing.assert_array_equal(new, expected)
        np.testing.assert_allclose(new, rows, atol=1e-5)


def test_rounding_at_random_is_right_on_average_and_keeps_small_updates() -> None:
    x = jnp.full((1000, 100), 1 + 2**-10)  # between 1 and 1 + 2**-7, an eighth of the way
    rounded = np.asarray(stochastic_round(x, jax.random.key(0)), np.float32)
    assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
    np.testing.assert_allclose(rounded.mean(), 1 + 2**-10, atol=2e-4)
    exact = jnp.array([[0.0, -0.5, jnp.inf, -jnp.inf, jnp.nan, 3.0]])
    found = np.asarray(stochastic_round(exact, jax.random.key(1)), np.float32)
    np.testing.assert_array_equal(found, exact)


def test_a_bfloat16_table_learns_from_updates_below_its_precision() -> None:
    """A step of 2**-10 is lost beside 1 when it is rounded to the nearest."""
    table, rule = as_held(jnp.ones((V, 64)), BITS), sgd()
    apply = jax.jit(partial(apply_rows, rule, learning_rate=2.0**-10))
    state = table, rule.init(table), jnp.zeros(V, jnp.int32)
    ids, grads = jnp.arange(V, dtype=jnp.int32), jnp.ones((V, 64))
    for step in range(256):
        state = apply(*state, ids, grads, key=jax.random.key(step))
    assert state[0].dtype == BITS
    np.testing.assert_allclose(np.asarray(as_numbers(state[0])).mean(), 0.75, atol=0.02)
    with pytest.raises(ValueError, match="key"):
        apply(*state, ids, grads)
