"""Rows and gradients over sharded tables: the answer of one device, whatever the skew."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.sharding import make_mesh
from mtrec_jax.tables.exchange import Asked, Buffers, default_buffers, look_up, update
from mtrec_jax.tables.rules import lazy_adam
from mtrec_jax.tables.update import update_rows

V, D, N = 512, 3, 240
RNG = np.random.default_rng(0)
IDS = {
    "uniform": RNG.integers(-1, V, N),
    "popular": np.minimum(RNG.zipf(1.3, N) - 1, V - 1),
    "one shard": RNG.integers(V // 8 * 3, V // 8 * 4, N),  # for 8, 4 and 2 shards
    "one row": np.full(N, 77),
    "padding": np.full(N, -1),
    "all rows of one shard": np.concatenate([np.arange(64), RNG.integers(0, 64, N - 64)]),
}
BUFFERS = {"default": None, "smallest": Buffers(1, 1), "uneven": Buffers(7, 11)}
RULE = lazy_adam()


def _rule(rows: jax.Array, slots: Any, grads: jax.Array) -> tuple[jax.Array, Any]:
    return RULE.update(rows, slots, grads, 0.1)


def _expected(table: np.ndarray, ids: np.ndarray, grads: np.ndarray) -> tuple[np.ndarray, Any]:
    """The rule on the sum of each id's gradients."""
    touched = np.unique(ids[ids >= 0])
    total = np.stack([grads[ids == row].sum(axis=0) for row in touched] or [np.zeros(D)])
    slots = jax.tree.map(np.array, RULE.init(jnp.asarray(table)))
    if len(touched):
        rows, new = _rule(
            jnp.asarray(table[touched]),
            jax.tree.map(lambda s: s[touched], slots),
            jnp.asarray(total),
        )
        table = table.copy()
        table[touched] = rows
        for old, part in zip(jax.tree.leaves(slots), jax.tree.leaves(new), strict=True):
            old[touched] = part
    return table, slots


@functools.cache
def _program(shape: tuple[int, int], buffers: Buffers | None) -> Any:
    mesh = make_mesh(shape)
    sizes = buffers or default_buffers(N, mesh)

    def step(table: Any, slots: Any, scratch: Any, ids: Any, grads: Any) -> Any:
        rows, scratch, asked = look_up(table, scratch, ids, mesh, sizes)
        apply = functools.partial(update_rows, _rule)
        table, slots = update(apply, table, slots, asked, grads, mesh, sizes)
        return rows, table, slots, scratch, asked

    by_row = NamedSharding(mesh, P("table"))
    return jax.jit(step, donate_argnums=(0, 1, 2)), by_row


@pytest.mark.parametrize("buffers", BUFFERS)
@pytest.mark.parametrize(
    "shape", [(2, 4), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 8), (4, 2)))]
)
def test_every_id_gets_its_row_and_every_row_its_gradient(
    shape: tuple[int, int], buffers: str
) -> None:
    with jax.enable_x64(True):
        program, by_row = _program(shape, BUFFERS[buffers])
        for seed, (name, ids) in enumerate(IDS.items()):
            rng = np.random.default_rng(seed)
            table, grads = rng.normal(size=(V, D)), rng.normal(size=(N, D))
            rubbish = rng.integers(-(2**31), 2**31, V).astype(np.int32)
            put = [
                jax.device_put(a, by_row) for a in (table, RULE.init(jnp.asarray(table)), rubbish)
            ]
            found = program(*put, ids.astype(np.int32), grads)
            wanted = np.where((ids >= 0)[:, None], table[ids], 0)
            np.testing.assert_array_equal(found[0], wanted, name)
            new, slots = _expected(table, ids, grads)
            np.testing.assert_allclose(found[1], new, atol=1e-12, err_msg=name)
            for part, right in zip(jax.tree.leaves(found[2]), jax.tree.leaves(slots), strict=True):
                np.testing.assert_allclose(part, right, atol=1e-12, err_msg=name)
            untouched = np.setdiff1d(np.arange(V), ids)
            np.testing.assert_array_equal(np.asarray(found[1])[untouched], table[untouched])


def test_distinct_ids_are_sent_once_and_rounds_are_counted() -> None:
    program, by_row = _program((1, 8), Buffers(7, 11))
    table = jnp.zeros((V, D))
    for name, most in (("one row", 1), ("all rows of one shard", 5), ("padding", 0)):
        put = [
            jax.device_put(a, by_row) for a in (table, RULE.init(table), jnp.zeros(V, jnp.int32))
        ]
        asked: Asked = program(*put, IDS[name].astype(np.int32), np.zeros((N, D), np.float32))[4]
        sent = np.asarray(asked.owner) < 8
        assert sent.sum() == sum(len(np.unique(a[a >= 0])) for a in np.split(IDS[name], 8))
        assert set(np.asarray(asked.rounds)) == {most}
        assert np.asarray(asked.numbers).sum() == len(np.unique(IDS[name][IDS[name] >= 0]))
