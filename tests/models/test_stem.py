"""STEM, Su et al., AAAI 2024: forward from all tables, backward to the shared and a task's own."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.losses.negatives.catalogue import Uniform
from mtrec_jax.models.inputs import Inputs, find_ids, make_inputs
from mtrec_jax.models.members import Members
from mtrec_jax.models.model import Model, _batch_items, make_model
from mtrec_jax.models.network import Network
from mtrec_jax.models.towers import TowerInput, TowerSizes, TowerTask
from mtrec_jax.models.towers.stem import STEM, STEMTowers
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.layout import initial_stacks, spread
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.step import make_step
from mtrec_jax.types import FIRST, Array, Batch, PyTree
from tests import tiny

N, INPUTS, SHARED, OWN = 5, 4, 2, 2
TASKS = ("click", "stars", "buy")
FLOAT = jnp.dtype("float32")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, INPUTS)).astype(np.float32)
OF_TASKS = {name: RNG.normal(size=(N, INPUTS)).astype(np.float32) for name in TASKS}
DRAWN = Uniform(count=6)
SMALL = {"kind": "stem", "experts": 1, "expert_hidden": [8], "tower_hidden": [6]}


@pytest.fixture(scope="module")
def towers() -> STEMTowers:
    return _towers(normalise=True)


def _towers(normalise: bool) -> STEMTowers:
    given: Any = {"experts": SHARED, "task_experts": OWN, "expert_hidden": (3,)}
    options = STEM(normalise=normalise, tower_hidden=(), **given)
    tasks = {name: TowerTask("binary") for name in TASKS}
    sizes = TowerSizes(inputs=INPUTS, context=0, request=0, width=0, tasks=tasks, own=TASKS)
    return options.make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))


def _given(x: Array = X, own: dict[str, Any] | None = None) -> TowerInput:
    none = jnp.zeros((N, 0))
    of_tasks = jax.tree.map(jnp.asarray, own or OF_TASKS)
    return TowerInput(jnp.asarray(x), none, none, none, none, own=of_tasks)


def _experts(experts: Any, x: np.ndarray) -> list[np.ndarray]:
    found = []
    for mlp, norm in itertools.zip_longest(experts.mlps, experts.norms):
        (layer,) = mlp.layers
        h = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        h = h / (1 + np.exp(-h))
        if norm is not None:
            h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + 1e-6)
            h = h * np.asarray(norm.scale[...])
        found.append(h)
    return found


@pytest.mark.parametrize("normalise", [True, False])
def test_a_gate_mixes_the_experts_of_all_tables(normalise: bool) -> None:
    """The softmax of W_t (x_t + x) over the experts of all tasks and the shared ones; own experts
    read the task's own tables, shared ones the shared tables."""
    towers = _towers(normalise)
    assert bool(towers.shared.norms) == bool(towers.own[2].norms) == normalise
    found = jax.jit(lambda given: towers(given))(_given())
    experts = [h for t, name in enumerate(TASKS) for h in _experts(towers.own[t], OF_TASKS[name])]
    experts += _experts(towers.shared, X)
    for t, name in enumerate(TASKS):
        gate = towers.gates[t]
        z = (OF_TASKS[name] + X) @ np.asarray(gate.kernel[...]) + np.asarray(gate.bias[...])
        weights = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        assert weights.shape == (N, len(TASKS) * OWN + SHARED)
        np.testing.assert_allclose(found.diagnostics["gates"][:, t], weights, atol=1e-6)
        mixed = np.einsum("ne,enh->nh", weights, np.stack(experts))
        np.testing.assert_allclose(found.hidden[name], mixed, atol=1e-5)


@pytest.mark.slow
def test_a_gradient_reaches_the_shared_tables_and_the_tasks_own(towers: STEMTowers) -> None:
    """Zero to the last bit at the other tasks' tables and experts, which all are read."""
    graph, state = nnx.split(towers)

    @jax.jit
    def logits(state: Any, given: TowerInput) -> jax.Array:
        found = nnx.merge(graph, state)(given).logits
        return jnp.stack([jnp.sum(found[name]) for name in TASKS])

    given = _given()
    before, slopes = logits(state, given), jax.jacrev(logits, argnums=(0, 1))
    of_experts, slopes = jax.jit(slopes)(state, given)
    for t, name in enumerate(TASKS):
        assert np.abs(slopes.x[t]).min() > 1e-7
        for other, table in enumerate(TASKS):
            reached = np.asarray(slopes.own[table][t])
            own = [np.asarray(leaf[t]) for leaf in jax.tree.leaves(of_experts["own"][other])]
            if name == table:
                assert np.abs(reached).min() > 1e-7
                assert all(np.abs(leaf).max() > 0 for leaf in own)
            else:
                assert not reached.any()
                assert not any(leaf.any() for leaf in own)
                moved = _given(own=OF_TASKS | {table: OF_TASKS[table] + 1})
                assert np.abs(logits(state, moved) - before)[t] > 1e-5


def test_members_of_an_ensemble_scale_what_each_task_reads() -> None:
    """As x, by their own scales: pairs of an example stay together, [n, I] -> [n K, I]."""
    members = Members(2, INPUTS, {}, {}, dtype=FLOAT, rngs=nnx.Rngs(0))
    scales = np.arange(1, 2 * INPUTS + 1, dtype=np.float32).reshape(2, INPUTS)
    members.scales[...] = jnp.asarray(scales)
    found = members.given(_given())
    for known, scaled in ((X, found.x), *((OF_TASKS[t], found.own[t]) for t in TASKS)):
        np.testing.assert_array_equal(scaled, (known[:, None] * scales).reshape(2 * N, INPUTS))


# --- The whole model: one row of the shared tables and one of each task's


CASE = tiny.without_history(
    model={"towers": SMALL, "dropout": 0.0, "fusion": "none"},
    train={"row_optimizer": "rowwise_adagrad", "optimizer": "sgd"},
)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(*CASE[:2])


def test_tables_of_each_task_lie_beside_the_shared_ones(model: Model) -> None:
    """As large, with the same rule; the history has none, and other towers have no more memory."""
    places = model.layout.places
    for name in ("segment", "tags", "hour", "brand", "item"):
        for task in ("click", "stars", "genre"):
            own, shared = places[f"{name}:{task}"], places[name]
            assert (own.size, own.stack, own.functions) == (shared.size, shared.stack, 0)
    names = [name for name in places if ":" not in name]
    assert len(places) == 4 * 5
    assert names == list(make_inputs(tiny.without_history()[0], CASE[1]).layout.places)
    whole = make_inputs(tiny.experiment(model={"towers": SMALL}), tiny.manifest()).layout.places
    assert whole.keys() == places.keys() | {"click"}, "the history's clicks are shared alone"


@pytest.mark.slow
def test_losses_reach_the_rows_of_their_own_task(model: Model) -> None:
    """Through item towers and lookups: the gradient of each loss at each group of rows. Retrieval
    has the shared tables alone."""
    catalogue, examples = tiny.catalogue(), CASE[2]._replace(row=None)
    stacks = initial_stacks(model.layout, jax.random.key(3, impl="rbg"), FLOAT, low=False)
    params = model.init(0)

    @jax.jit
    def slopes(examples: Any) -> Any:
        wanted = model.ids(examples, catalogue, jax.random.key(0))
        rows = fetch(model.layout, stacks, wanted.ids)

        def losses(rows: PyTree) -> jax.Array:
            shared = model.encode(params, rows, examples, catalogue, wanted, None)
            sums = model.losses(params, shared, examples, catalogue, wanted, None)[0]
            return jnp.stack([sums[name] for name in tiny.TASKS])

        return {g: jnp.abs(s).reshape(4, -1).max(1) for g, s in jax.jacrev(losses)(rows).items()}

    found = slopes(examples)
    for group, of in found.items():
        shared, _, task = group.partition(":")
        for loss, slope in zip(tiny.TASKS, of, strict=True):
            reached = task in ("", loss)
            if "negative" in group:  # of the retrieval loss, and of the order that costs nothing
                reached = not task and loss == "next"
            elif task == "" and loss == "next":
                reached = shared != "request"
            assert (slope > 0) == reached, f"{loss} at {group}"


def test_candidates_alone_are_looked_up_in_the_tables_of_the_tasks() -> None:
    """Not the events before them, which the encoder reads; dropped ids are dropped in all."""
    tables = {"item": {"id_dropout": 0.5}, "tags": {"update": "sparse", "id_dropout": 0.5}}
    declared = tiny.experiment(model={"towers": SMALL}, tables=tables)
    inputs, examples = make_inputs(declared, tiny.manifest()), tiny.batch(2, 64)
    find = jax.jit(
        lambda batch: find_ids(inputs, batch, tiny.catalogue(), DRAWN, jax.random.key(1))
    )
    ids = {name: np.asarray(of) for name, of in find(examples._replace(row=None)).ids.items()}
    assert ids["item:click"].shape == (64, tiny.POSITIONS, 1)
    np.testing.assert_array_equal(ids["item:click"], ids["item"][:, tiny.HISTORY :])
    np.testing.assert_array_equal(ids["context:genre"], ids["context"])
    gone = (ids["item:genre"] == 1) & (examples.candidate[..., None] >= FIRST)
    assert 0.3 < gone.sum() / (examples.candidate >= FIRST).sum() < 0.7
    assert "history:click" not in ids


@pytest.mark.parametrize("update", ["sparse", "dense"])
def test_what_towers_read_of_items_stands_behind_what_retrieval_compares(update: str) -> None:
    """With rows that say which table they are of, and no features: of the events the shared ones
    alone; of the candidates and negatives those of each task, too. With dense items the vectors of
    all are listed, otherwise those of the batch."""
    declared = tiny.experiment(model={"towers": SMALL}, tables={"item": {"update": update}})
    inputs = make_inputs(declared, tiny.manifest(features=False))
    layers, catalogue = _rows_as_they_are(inputs), tiny.catalogue()
    examples = tiny.batch(1, features=False)
    number = {"": 0, "click": 1, "stars": 2, "genre": 3}  # of the tables that are read

    @jax.jit
    def run(examples: Batch) -> Any:
        wanted = find_ids(inputs, examples, catalogue, DRAWN, jax.random.key(0))
        rows = {
            group: jnp.repeat(of[..., None] + number[group.partition(":")[2]], 8, axis=-1)
            for group, of in wanted.ids.items()
        }
        return wanted, _batch_items(layers, inputs, rows, examples, catalogue, wanted)

    wanted, found = run(examples._replace(row=None))
    expected = [examples.events["item"][..., None]]
    for ids in (examples.candidate, np.asarray(wanted.negatives)):
        expected.append(ids[..., None] + np.arange(4))
    for vectors, of in zip(found, expected, strict=True):
        np.testing.assert_array_equal(vectors, np.repeat(of, 8, axis=-1))


def _rows_as_they_are(inputs: Inputs) -> Network:
    """A network to which an item's vector is its row."""
    layers = object.__new__(Network)
    parts: dict[str, Any] = {"inputs": inputs, "items": lambda own, *of_features: own}
    parts |= {"own_items": [parts["items"]] * len(inputs.own)}
    for name, part in parts.items():
        object.__setattr__(layers, name, part)
    return layers


@pytest.mark.slow
def test_a_step_changes_the_rows_of_tasks_that_were_observed(model: Model) -> None:
    """Nobody clicked: all rows of `stars`, whose sample space are clicks, stay as they were, and
    with them their sums of squares; those of the candidates move in the tables of the others.
    Slow: it compiles a step, and that gradients are zero is seen above."""
    mesh, examples = make_mesh((1, 1)), CASE[2]
    step = make_step(CASE[0], model, mesh, 10)
    nobody = np.zeros_like(examples.mask["stars"])
    examples = examples._replace(mask=examples.mask | {"stars": nobody})  # type: ignore[operator]
    before = step.init(0)
    kept = np.asarray(before.tables["rowwise_adagrad"]).copy()
    after = step.update(before, put_batch(examples, mesh), replicate(tiny.catalogue(), mesh))
    moved = (np.asarray(after.tables["rowwise_adagrad"]) != kept).any(axis=1)
    squares = np.asarray(after.slots["rowwise_adagrad"])
    candidates = np.unique(examples.candidate[examples.weight > 0])
    for task in ("click", "stars", "genre"):
        place = model.layout.places[f"item:{task}"]
        rows = np.asarray(spread(jnp.asarray(place.offset + np.arange(place.size)), place.spread))
        seen = np.unique(examples.candidate[(examples.mask[task] * examples.weight) > 0])
        np.testing.assert_array_equal(np.flatnonzero(moved[rows]), seen)
        np.testing.assert_array_equal(np.flatnonzero(squares[rows]), seen)
        assert len(seen) <= len(candidates)
