"""A step's one lookup and its way back: what autodiff of plain gathers gives, on any devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.sharding import make_mesh, replicate, whole_on
from mtrec_jax.tables.layout import DENSE, TableSize, make_layout
from mtrec_jax.tables.lookup import fetch, lookup
from mtrec_jax.tables.rules import sgd
from mtrec_jax.tables.update import Updated, dense_gradient, new_scratch, update

D, B, RATE = 4, 16, 0.5
# one table is looked up by two groups, and ids repeat within and between them
LAYOUT = make_layout(
    {
        "item": TableSize("sgd", 12),
        "city": TableSize(DENSE, 6),
        "tags": TableSize("sgd", 9),
        "user": TableSize("sgd", 2 + 20, functions=2),
    },
    {
        "context": [("city", 1), ("tags", 3), ("user", 1)],
        "item": [("item", 1)],
        "negative": [("item", 1)],
        "history": [("city", 1)],
    },
    width=D,
)
_RNG = np.random.default_rng(0)
IDS = {
    "context": np.concatenate(
        [
            _RNG.integers(0, 6, (B, 1)),
            _RNG.integers(0, 9, (B, 3)),
            _RNG.integers(0, 1000, (B, 1)),
        ],
        axis=1,
    ).astype(np.int32),
    "item": _RNG.integers(0, 12, (B, 3, 1)).astype(np.int32),
    "negative": _RNG.integers(2, 12, (5, 1)).astype(np.int32),  # divides over no devices
    "history": _RNG.integers(0, 6, (B, 7, 1)).astype(np.int32),
}
STACKS = {
    stack: _RNG.normal(size=(rows, D)).astype(np.float32) for stack, rows in LAYOUT.rows.items()
}
SLOPES = {g: _RNG.normal(size=(*ids.shape, D)).astype(np.float32) for g, ids in IDS.items()}


def _expected() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Rows, and the gradients of the stacks, of plain gathers."""

    def total(stacks: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        rows = fetch(LAYOUT, stacks, {g: jnp.asarray(ids) for g, ids in IDS.items()})
        return sum((jnp.sum(rows[g] * SLOPES[g]) for g in rows), jnp.zeros(())), rows

    stacks = {stack: jnp.asarray(table) for stack, table in STACKS.items()}
    gradients, rows = jax.jit(jax.grad(total, has_aux=True))(stacks)
    return rows, gradients


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (8, 1), (2, 4)])
def test_rows_and_gradients_are_those_of_plain_gathers(shape: tuple[int, int]) -> None:
    mesh = make_mesh(shape)
    sparse = {stack: jnp.asarray(table) for stack, table in STACKS.items() if stack != DENSE}

    @jax.jit
    def step(stacks: Any, ids: Any, slopes: Any, wanted: Any) -> Any:
        scratch = new_scratch({s: t for s, t in stacks.items() if s != DENSE})
        rows, ticket = lookup(LAYOUT, stacks, scratch, ids, mesh, {})
        tables = {s: t for s, t in stacks.items() if s != DENSE}
        state = Updated(tables, {stack: {} for stack in tables}, scratch, jnp.int32(0))
        rules, key = {"sgd": sgd()}, jax.random.key(0)
        found = update(LAYOUT, rules, state, ticket, slopes, RATE, key, wanted, mesh)
        return rows, dense_gradient(LAYOUT, ticket, slopes), found.tables

    given = replicate((STACKS, IDS, SLOPES), mesh)
    rows, dense, tables = jax.device_put(step(*given, jnp.bool_(True)), whole_on(mesh))
    expected_rows, gradients = _expected()
    for group, values in expected_rows.items():
        np.testing.assert_allclose(rows[group], values, atol=1e-6, err_msg=group)
    np.testing.assert_allclose(dense, gradients[DENSE], atol=1e-5)
    np.testing.assert_allclose(tables["sgd"], sparse["sgd"] - RATE * gradients["sgd"], atol=1e-5)
    # a step that is not wanted touches nothing
    _, _, tables = step(*given, jnp.bool_(False))
    np.testing.assert_array_equal(tables["sgd"], sparse["sgd"])
