"""The multi-task model as pure functions over plain pytrees.

Training:

    wanted = model.ids(batch, catalogue, key, drawing)     which rows, which negatives
    rows, ticket = tables.lookup(..., wanted.ids)          fetch them, once
    shared = model.encode(params, rows, ...)               item tower, history encoder
    sums, fusing = model.losses(params, shared, ...)       experts, towers, losses
    fusion = model.fusion_loss(params, shared, fusing, ..) what teaches the final order

Serving, with the same layers: `items`, `users`, `score`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.losses.negatives import state_before
from mtrec_jax.models.inputs import (
    ITEM,
    Inputs,
    find_ids,
    hidden_events,
    item_ids,
    make_inputs,
    own_name,
    own_too,
    shared_name,
)
from mtrec_jax.models.network import Network
from mtrec_jax.models.objective import make_objective
from mtrec_jax.tables.layout import Layout, pool
from mtrec_jax.types import (
    FIRST,
    UNKNOWN,
    Array,
    Batch,
    Catalogue,
    Fusing,
    Outputs,
    PyTree,
    Shared,
    UserStates,
    Wanted,
)

Rows = dict[str, jax.Array]  # {group: rows [..., M, D]}
HIDDEN_DRAW = 1 << 16  # of events that are hidden; negatives have the same key
CALIBRATION = "calibration"  # of the parameters, where they answer: {task: calibration of logits}


class Model(NamedTuple):
    """A multi-task recommender; every function is pure and may be jitted.

    `losses` are sums; `weights(batch, lottery) -> {loss: what its sum is divided by}` depend on the
    batch alone, so that it may come in parts. The fusion's is the last. `key=None` means no dropout
    and no negatives.
    """

    layout: Layout
    tasks: tuple[str, ...]  # order of the fusion weights
    names: tuple[str, ...]  # of the losses: those of the tasks, then those of no task
    fuses: bool  # whether a fused order is taught
    owners: tuple[str, ...]  # tasks, or members after the first, with tables of their own
    by_example: frozenset[str]  # groups whose ids are split like the batch; others are shared
    abstract: PyTree  # shapes of the layers' parameters
    init: Callable[[int], PyTree]  # seed -> their initial values, drawn on the host
    altered: Callable[[Batch, jax.Array], Batch]  # what training makes of a batch, given a key
    ids: Callable[..., Wanted]  # batch, catalogue, key | None, what drawing remembers
    drawing: Callable[[], PyTree]  # what it remembers before the first step
    encode: Callable[[PyTree, Rows, Batch, Catalogue, Wanted, jax.Array | None], Shared]
    weights: Callable[[Batch, jax.Array], dict[str, jax.Array]]
    losses: Callable[..., tuple[dict[str, jax.Array], Fusing | None]]
    fusion_loss: Callable[..., jax.Array] | None  # None where no fused order is taught
    # item ids [...] -> [..., W]: D that retrieval compares, and what towers alone read
    items: Callable[[PyTree, Rows, Catalogue, Array], jax.Array]
    users: Callable[[PyTree, Rows, Array, Batch, jax.Array | None], UserStates]  # events [B, L, D]
    score: Callable[[PyTree, UserStates, jax.Array | None], Outputs]  # candidates [B, P, W]
    item_ids: Callable[[Array, Catalogue], dict[str, jax.Array]]


def make_model(experiment: Experiment, manifest: Manifest) -> Model:
    """Build the model of an experiment for a prepared data set.

    Args:
      experiment: architecture, tasks, tables.
      manifest: of the chosen view, `Prepared.chosen(experiment).manifest`.
    """
    inputs = make_inputs(experiment, manifest)
    abstract, network, init = _layers(experiment, inputs)

    altered, ids = _of_batches(experiment, inputs)

    def items(params: PyTree, rows: Rows, catalogue: Catalogue, item: Array) -> jax.Array:
        layers = network(params)
        found = _items(layers, rows, catalogue, item, ITEM)
        return _with_more(found, layers, inputs, rows, catalogue, item, ITEM)

    def encode(
        params: PyTree,
        rows: Rows,
        batch: Batch,
        catalogue: Catalogue,
        wanted: Wanted,
        key: jax.Array | None,
    ) -> Shared:
        layers = network(params)
        events, candidates, negatives = _batch_items(layers, inputs, rows, batch, catalogue, wanted)
        states = layers.users(batch, rows, events, key)
        of_users = tuple(map(jnp.asarray, states[:-1]))  # all but the cutoff
        bias = jnp.zeros((*batch.cutoff.shape, 0), layers.dtype)
        if layers.bias is not None:
            bias = layers.bias.features(batch, rows, layers.dtype)
        return Shared._make((*of_users, candidates, negatives, bias))

    def users(
        params: PyTree, rows: Rows, events: Array, batch: Batch, key: jax.Array | None
    ) -> UserStates:
        return network(params).users(batch, rows, events, key)

    def score(params: PyTree, states: UserStates, candidates: jax.Array | None) -> Outputs:
        calibrations = params.get(CALIBRATION)
        return network(params).outputs(states, candidates, None, calibrations)[0]

    objective = make_objective(experiment, manifest, inputs, network, abstract)
    return Model(
        layout=inputs.layout,
        tasks=inputs.order,
        names=objective.names,
        fuses=objective.fuses,
        owners=inputs.own,
        by_example=_by_example(inputs),
        abstract={"network": nnx.to_pure_dict(nnx.state(abstract, nnx.Param))},
        init=init,
        altered=altered,
        ids=ids,
        drawing=lambda: _first_drawing(experiment, inputs, manifest.items),
        encode=encode,
        weights=objective.weights,
        losses=objective.losses,
        fusion_loss=objective.fusion_loss,
        items=items,
        users=users,
        score=score,
        item_ids=lambda item, catalogue: own_too(inputs, item_ids(inputs, item, catalogue)),
    )


def _layers(
    experiment: Experiment, inputs: Inputs
) -> tuple[Network, Callable[[PyTree], Network], Callable[[int], PyTree]]:
    """The layers without values, with those of parameters, and initial parameters of a seed."""
    dtype = jnp.dtype(experiment.train.precision)

    def made(rngs: nnx.Rngs) -> Network:
        searches = experiment.data.queries is not None
        return Network(
            experiment.model, inputs, experiment.data.length, searches, dtype=dtype, rngs=rngs
        )

    # Only the structure is needed here: eval_shape allocates nothing.
    abstract = nnx.eval_shape(lambda: made(nnx.Rngs(0)))
    graph = nnx.graphdef(abstract)

    def network(params: PyTree) -> Network:
        return nnx.merge(graph, nnx.State(params["network"]))

    def init(seed: int) -> PyTree:
        state = nnx.state(made(nnx.Rngs(params=seed)), nnx.Param)
        return {"network": nnx.to_pure_dict(state)}

    return abstract, network, init


def _of_batches(
    experiment: Experiment, inputs: Inputs
) -> tuple[Callable[[Batch, jax.Array], Batch], Callable[..., Wanted]]:
    """`altered` and `ids` of a model."""
    share = getattr(experiment.model.encoder, "share", 0.0) if inputs.has_events else 0.0

    def altered(batch: Batch, key: jax.Array) -> Batch:
        return hidden_events(share, batch, jax.random.fold_in(key, HIDDEN_DRAW)) if share else batch

    def ids(
        batch: Batch, catalogue: Catalogue, key: jax.Array | None, drawing: PyTree = None
    ) -> Wanted:
        return find_ids(inputs, batch, catalogue, experiment.train.negatives, key, drawing)

    return altered, ids


def _first_drawing(experiment: Experiment, inputs: Inputs, items: int) -> PyTree:
    """What the way to draw negatives remembers before the first step."""
    return state_before(experiment.train.negatives, items) if inputs.retrieval else {}


def _by_example(inputs: Inputs) -> frozenset[str]:
    """Groups whose ids are split like the batch; every example has those of others."""
    shared = {"negative", "negative_features"}
    if inputs.lists_items:
        shared |= {ITEM, "item_features"}
    return frozenset(group for group in inputs.layout.groups if shared_name(group) not in shared)


def _items(
    layers: Network, rows: Rows, catalogue: Catalogue, item: Array, group: str, whose: str = ""
) -> jax.Array:
    """Vectors [..., D] of items [...] whose rows are those of `group`, or somebody's own."""
    ids, numbers = (jnp.asarray(table)[item] for table in (catalogue.ids, catalogue.numbers))
    features = rows.get(own_name(f"{group}_features", whose))
    tower = layers.own_items[layers.inputs.own.index(whose)] if whose else layers.items
    return tower(rows[own_name(group, whose)].squeeze(-2), features, ids, numbers)


def _with_more(
    vectors: jax.Array,
    layers: Network,
    inputs: Inputs,
    rows: Rows,
    catalogue: Catalogue,
    item: Array,
    group: str,
) -> jax.Array:
    """Vectors [..., D] of items [...] with what towers alone read of them, [..., W]: the vector of
    each owner's tables, then the features that they read by name, in the shared tables and in each
    owner's."""
    owners = [w for w in inputs.own if own_name(group, w) in inputs.layout.groups]
    parts = [vectors]
    parts += [_items(layers, rows, catalogue, item, group, whose) for whose in owners]
    if places := [place for side, place in inputs.read.values() if side == "item"]:
        ids = jnp.asarray(catalogue.ids)[item]
        for whose in ("", *owners):
            features = rows[own_name(f"{group}_features", whose)]
            if item.ndim == 2:  # behind those of the events, which the shared rows have as well
                features = features[:, features.shape[1] - item.shape[1] :]
            pooled = pool(inputs.layout.groups["item_features"], ids, features)
            parts += [pooled[..., place, :] for place in places]
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else vectors


def _batch_items(
    layers: Network,
    inputs: Inputs,
    rows: Rows,
    batch: Batch,
    catalogue: Catalogue,
    wanted: Wanted,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors of the events [B, L, D], the candidates [B, P, W] and the negatives [n, W]."""
    if not inputs.has_items:
        none = jnp.zeros((batch.user.shape[0], 0, inputs.layout.width), layers.dtype)
        return none, none, none.reshape(0, inputs.layout.width)
    found = _items(layers, rows, catalogue, wanted.items, ITEM)
    candidate = jnp.asarray(batch.candidate)

    def more(vectors: jax.Array, item: Array, group: str) -> jax.Array:
        return _with_more(vectors, layers, inputs, rows, catalogue, item, group)

    if inputs.lists_items:
        events = jnp.asarray(batch.events["item"]) if inputs.has_events else candidate[:, :0]
        whole = more(found, wanted.items, ITEM)
        taken = (jnp.take(whole, ids, axis=0) for ids in (candidate, wanted.negatives))
        return jnp.take(found, events, axis=0), *taken  # type: ignore[return-value]
    negatives = _items(layers, rows, catalogue, wanted.negatives, "negative")
    length = found.shape[1] - candidate.shape[1]
    return (
        found[:, :length],
        more(found[:, length:], candidate, ITEM),
        more(negatives, wanted.negatives, "negative"),
    )


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
