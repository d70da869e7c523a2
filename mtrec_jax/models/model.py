"""The multi-task model as pure functions over plain pytrees.

Training and serving call the same functions in the same order:

    looked  = model.lookups(batch, catalogue, key)        which rows
    rows    = gather_rows(params, tables, looked)         fetch them
    vectors = model.items(params, rows, ...)              item tower          [..., D]
    states  = model.users(params, rows, events, ...)      history encoder     [B, P, D]
    outputs = model.rank(params, states, vectors, ...)    experts, towers, fusion
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.models.lookups import find_items, find_rows
from mtrec_jax.models.network import Network, make_plan
from mtrec_jax.tables.layout import BITS, DENSE, gather, initial_table
from mtrec_jax.types import (
    FIRST,
    UNKNOWN,
    Array,
    Batch,
    Catalogue,
    ItemVectors,
    Lookups,
    Outputs,
    PyTree,
    UserStates,
)

Rows = dict[str, dict[str, jax.Array]]  # {stack: {role: rows [..., D]}}


class Model(NamedTuple):
    """A multi-task recommender; every function is pure and may be jitted."""

    init: Callable[..., tuple[PyTree, dict[str, jax.Array]]]  # key, mesh=None -> params, tables
    lookups: Callable[[Batch, Catalogue, jax.Array | None], Lookups]
    items: Callable[[PyTree, Rows, Catalogue, Array], jax.Array]  # item ids [...] -> [..., D]
    batch_items: Callable[[PyTree, Rows, Catalogue, Lookups, Batch], ItemVectors]
    users: Callable[[PyTree, Rows, Array, Batch, jax.Array | None], UserStates]  # events [B, L, D]
    rank: Callable[[PyTree, UserStates, jax.Array | None, jax.Array | None], Outputs]
    item_lookups: Callable[[Array, Catalogue], dict[str, dict[str, jax.Array]]]
    tasks: tuple[str, ...]  # order of the fusion weights


def make_model(experiment: Experiment, manifest: Manifest) -> Model:
    """Build the model of an experiment for a prepared data set.

    Returns pure functions; `init(key, mesh)` gives `(params, tables)`: `params["network"]` are the
    dense layers, `params["dense"]` the table stack that optax updates, `tables` the stacks that are
    updated row by row, by the names of their rules (each only where something is declared so).
    """
    dtype = jnp.dtype(experiment.train.precision)
    plan = make_plan(experiment, manifest)
    width = experiment.model.width
    retrieves = any(task.kind == "retrieval" for task in experiment.tasks.values())
    negatives = experiment.train.negatives if retrieves else 0
    # Only the structure is needed here: eval_shape allocates nothing.
    abstract = nnx.eval_shape(lambda: Network(experiment, manifest, dtype=dtype, rngs=nnx.Rngs(0)))
    graph = nnx.graphdef(abstract)

    def network(params: PyTree) -> Network:
        return nnx.merge(graph, nnx.State(params["network"]))

    def init(key: jax.Array, mesh: Mesh | None = None) -> tuple[PyTree, dict[str, jax.Array]]:
        key_network, key_tables = jax.random.split(key)
        made = Network(experiment, manifest, dtype=dtype, rngs=nnx.Rngs(params=key_network))
        params = {"network": nnx.to_pure_dict(nnx.state(made, nnx.Param))}
        tables = {}
        for i, (stack, rows) in enumerate(sorted(plan.rows.items())):
            fields = [f for f in plan.fields.values() if f.stack == stack]
            stack_key = jax.random.fold_in(key_tables, i)
            low = experiment.train.row_precision == "bfloat16" and stack != DENSE
            kept = BITS if low else dtype
            table = initial_table(stack_key, fields, rows, width, kept, mesh)
            if stack == DENSE:
                params["dense"] = table
            else:
                tables[stack] = table
        return params, tables

    def item_lookups(item_ids: Array, catalogue: Catalogue) -> dict[str, dict[str, jax.Array]]:
        return find_items(plan, item_ids, catalogue)

    def lookups(batch: Batch, catalogue: Catalogue, key: jax.Array | None) -> Lookups:
        return find_rows(plan, batch, catalogue, negatives, key)

    def items(params: PyTree, rows: Rows, catalogue: Catalogue, item_ids: Array) -> jax.Array:
        if not plan.has_items:
            return jnp.zeros((0, width), dtype)
        own = next(r["item"] for r in rows.values() if "item" in r)
        features = {s: r["item_features"] for s, r in rows.items() if "item_features" in r}
        ids = jnp.asarray(catalogue.ids)[item_ids]
        numbers = jnp.asarray(catalogue.numbers)[item_ids]
        return network(params).item_vectors(own, features, ids, numbers)

    def batch_items(
        params: PyTree, rows: Rows, catalogue: Catalogue, looked: Lookups, batch: Batch
    ) -> ItemVectors:
        if not plan.has_items:
            none = jnp.zeros((batch.user.shape[0], 0, width), dtype)
            return ItemVectors(none, None, none.reshape(0, width))
        found = items(params, rows, catalogue, looked.item_ids)
        events = batch.events["item"] if plan.has_events else batch.candidate[:, :0]
        if plan.fields["item"].stack == DENSE:
            parts = (events, batch.candidate, looked.negatives)
            return ItemVectors(*(jnp.take(found, jnp.asarray(ids), axis=0) for ids in parts))
        alone = _as_items(rows, "negative")
        negatives = items(params, alone, catalogue, looked.negatives)
        length = events.shape[1]
        return ItemVectors(found[:, :length], found[:, length:], negatives)

    def users(
        params: PyTree, rows: Rows, events: Array, batch: Batch, key: jax.Array | None
    ) -> UserStates:
        roles = ("context", "history")
        by_role = {role: {s: r[role] for s, r in rows.items() if role in r} for role in roles}
        return network(params).user_states(batch, by_role, events, key)

    def rank(
        params: PyTree, states: UserStates, candidates: jax.Array | None, key: jax.Array | None
    ) -> Outputs:
        return network(params).outputs(states, candidates, key)

    return Model(init, lookups, items, batch_items, users, rank, item_lookups, plan.task_names)


def _as_items(rows: Rows, role: str) -> Rows:
    """The rows of another role and its features, as if they were those of the items."""
    return {
        stack: {r.replace(role, "item"): rows for r, rows in by_role.items() if r.startswith(role)}
        for stack, by_role in rows.items()
    }


def gather_rows(
    params: PyTree, tables: dict[str, jax.Array], found: dict[str, dict[str, jax.Array]]
) -> Rows:
    """Fetch the rows of `Lookups.addresses`; differentiate with respect to the result or params."""
    stacks = {**tables, **({"dense": params["dense"]} if "dense" in params else {})}
    return {
        stack: {role: gather(stacks[stack], address) for role, address in by_role.items()}
        for stack, by_role in found.items()
    }


def make_catalogue(
    features: dict[str, np.ndarray],
    counts: np.ndarray,
    trained: int,
    power: float,
    dtype: str,
    row: np.ndarray | None = None,
) -> Catalogue:
    """Item features and training counts [N] -> the catalogue; negatives follow counts ** power.

    `row` [N + 2] says where each item's own row is; by default the trained items come first.
    """
    n = len(counts)
    if row is None:
        row = np.full(n + FIRST, UNKNOWN, np.int32)
        row[0] = 0
        row[FIRST : FIRST + trained] = np.arange(FIRST, FIRST + trained)
    weights = np.zeros(n + FIRST)
    weights[FIRST : FIRST + trained] = counts[:trained].astype(np.float64) ** power
    probability = weights / max(weights.sum(), 1e-300)
    cumulative = np.cumsum(probability)
    cumulative[FIRST + trained - 1 :] = 1  # rounding must not leave room for an untrained item
    levels = np.minimum(np.round(cumulative * 2.0**32), 2.0**32 - 1).astype(np.uint32)
    with np.errstate(divide="ignore"):
        log_probability = np.log(probability).astype(dtype)
    return Catalogue(
        ids=features["ids"],
        numbers=features["numbers"].astype(dtype),
        row=row,
        cumulative=levels,
        log_probability=log_probability,
    )
