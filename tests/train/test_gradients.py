"""A batch that is taken in parts gives what the whole batch gives, in the memory of a part."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.model import make_model
from mtrec_jax.models.towers import TOWERS, TowerInput, TowerSizes, TowerTask
from mtrec_jax.sharding import make_mesh, put_batch, replicate, state_shardings
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.gradients import Given, backward, draw, used_by_several
from mtrec_jax.train.step import Step, make_step
from mtrec_jax.types import Batch, TrainState
from tests import tiny

SIZE, STEPS = 32, 3
UNUSED = "key.bias"  # a softmax does not see this bias: its gradient is rounding noise


def _history(precision: str, train: dict[str, Any], item: str = "sparse") -> Experiment:
    """All kinds of tasks; negatives, and a fusion that learns lists."""
    settings = {"precision": precision, "batch_size": SIZE, "learning_rate": 5e-3}
    return tiny.experiment(
        model={"dropout": 0.0}, train=settings | train, tables={"item": {"update": item}}
    )


def _rows(precision: str, train: dict[str, Any]) -> tuple[Experiment, Manifest]:
    """Single rows without users and items."""
    experiment = parse_experiment(
        {
            "name": "rows",
            "split": {"kind": "random"},
            "features": {name: tiny.FEATURES[name] for name in ("hour", "discount")},
            "tasks": {name: task for name, task in tiny.TASKS.items() if name != "next"},
            "model": {
                "width": 8,
                "dropout": 0.0,
                "towers": {"experts": 2, "expert_hidden": [8], "tower_hidden": [6]},
            },
            "train": {"steps": 20, "precision": precision, "batch_size": SIZE} | train,
        }
    )
    left_out = ("context_ids", "context_numbers", "item_ids", "item_numbers", "history")
    none: dict[str, Any] = dict.fromkeys(left_out, ())
    manifest = dataclasses.replace(
        tiny.manifest(), items=0, trained_items=0, history_length=0, **none
    )
    return experiment, manifest


def _first_position(batch: Batch) -> Batch:
    """The examples of a batch of histories as single rows."""
    request, labels, mask = (
        {name: values[:, :1] for name, values in part.items() if name != "next"}
        for part in (batch.request, batch.labels, batch.mask)
    )
    none = np.zeros((len(batch.user), 1), np.int32)
    return batch._replace(
        context={},
        request=request,
        events={},
        cutoff=none,
        candidate=none,
        labels=labels,
        mask=mask,
        weight=batch.weight[:, :1],
        row=None,
    )


def _case(
    kind: str, precision: str, balance: str, parts: int, shape: tuple[int, int]
) -> tuple[Step, jax.sharding.Mesh]:
    train = {"balance": balance, "accumulate": parts}
    if kind == "rows":
        experiment, manifest = _rows(precision, train)
    else:
        item = "dense" if kind == "history, dense items" else "sparse"
        experiment, manifest = _history(precision, train, item), tiny.manifest()
    mesh = make_mesh(shape)
    return make_step(experiment, make_model(experiment, manifest), mesh, 20), mesh


def _trained(
    kind: str,
    precision: str,
    balance: str,
    parts: int,
    shape: tuple[int, int],
    start: TrainState | None = None,
) -> tuple[dict[str, np.ndarray], TrainState]:
    """Everything that a few steps have changed, by path, and the state that they began from."""
    step, mesh = _case(kind, precision, balance, parts, shape)
    start = start or step.init(3)
    own = jax.tree.map(lambda leaf: leaf.sharding, start)
    state = jax.device_put(start, own, may_alias=False)
    state = jax.device_put(state, state_shardings(state, mesh))
    catalogue = replicate(tiny.catalogue(precision), mesh)
    for s in range(STEPS):
        batch = tiny.batch(s, SIZE, precision)
        batch = put_batch(_first_position(batch) if kind == "rows" else batch, mesh)
        state = jax.block_until_ready(step.update(state, batch, catalogue))
    assert int(state.bad[0]) == 0
    kept = {n: v for n, v in state._asdict().items() if n not in ("key", "scratch", "rounds")}
    return _by_path(kept), start


def _by_path(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(p, simple=True, separator="."): v for p, v in leaves}


@pytest.mark.parametrize(
    ("kind", "balance", "parts", "shape"),
    [
        ("rows", "static", 4, (1, 1)),
        pytest.param("rows", "uncertainty", 2, (2, 4), marks=pytest.mark.slow),
        pytest.param("history", "uncertainty", 4, (2, 4), marks=pytest.mark.slow),
        pytest.param("history, dense items", "static", 2, (4, 2), marks=pytest.mark.slow),
    ],
)
def test_parts_learn_what_the_whole_batch_learns(
    kind: str, balance: str, parts: int, shape: tuple[int, int]
) -> None:
    with jax.enable_x64(True):
        whole, start = _trained(kind, "float64", balance, 1, (1, 1))
        assert len(whole) > 20
        found, _ = _trained(kind, "float64", balance, parts, shape, start)
        assert found.keys() == whole.keys()
        for name in whole:
            if UNUSED not in name:
                scale = max(np.abs(whole[name]).max(), 1e-3)
                assert np.abs(found[name] - whole[name]).max() <= 1e-10 * scale, name
    before = _by_path({"tables": start.tables, "params": {DENSE: start.params[DENSE]}})
    assert all((whole[name] != before[name]).any() for name in before)


@pytest.fixture(scope="module")
def start() -> TrainState:
    """In single precision; only to be read."""
    return _case("history", "float32", "uncertainty", 4, (1, 1))[0].init(3)


def _gradients(state: TrainState, parts: int) -> dict[str, np.ndarray]:
    """Of the sum of all losses, by path: of the layers and of the rows of each group."""
    model = make_model(_history("float32", {}), tiny.manifest())
    items, key, mesh = tiny.catalogue(), jax.random.key(0), make_mesh((1, 1))

    @jax.jit
    def found(state: TrainState, batch: Batch) -> Any:
        wanted = model.ids(batch, items, key)
        stacks = state.tables | {DENSE: state.params[DENSE]}
        rows, draws = fetch(model.layout, stacks, wanted.ids), draw(key, batch)
        given = Given(state.params["network"], rows, batch, wanted, draws)
        weights = model.weights(batch, draws.lottery)
        back = backward(model, given, items, weights, parts, mesh, lambda rows: {})
        return back.finish(back.pullback(jnp.ones(len(model.names))))

    return _by_path(found(state, tiny.batch(0, SIZE)._replace(row=None)))


@pytest.mark.slow
def test_gradients_agree_in_single_precision(start: TrainState) -> None:
    whole = _gradients(start, 1)
    for name, values in _gradients(start, 4).items():
        if UNUSED not in name:
            scale = max(np.abs(whole[name]).max(), 1e-2)  # sums whose parts are larger cancel
            assert np.abs(values - whole[name]).max() <= 1e-5 * scale, name


@pytest.mark.slow
def test_one_part_that_is_not_finite_spoils_the_step(start: TrainState) -> None:
    step, mesh = _case("history", "float32", "uncertainty", 4, (1, 1))
    own = jax.tree.map(lambda leaf: leaf.sharding, start)
    state = jax.device_put(start, own, may_alias=False)
    batch = tiny.batch(0, SIZE)
    stars = batch.labels["stars"].copy()
    stars[np.argwhere(batch.mask["stars"])[-1][0]] = np.nan  # in one of the parts
    bad = batch._replace(labels={**batch.labels, "stars": stars})
    kept = ("params", "tables", "slots", "optimizer", "balance", "sums")

    def bits(state: TrainState) -> list[bytes]:
        leaves = jax.tree.leaves([getattr(state, name) for name in kept])
        return [np.asarray(leaf).tobytes() for leaf in leaves]

    before, catalogue = bits(state), replicate(tiny.catalogue(), mesh)
    state = step.update(state, put_batch(bad, mesh), catalogue)
    assert bits(state) == before
    assert state.bad.tolist() == [1, 1]


@pytest.mark.slow
def test_memory_is_that_of_a_part() -> None:
    manifest, size, mesh = tiny.manifest(), 512, make_mesh((1, 1))
    towers = {"kind": "mmoe", "experts": 2, "expert_hidden": [256, 32], "tower_hidden": [6]}

    def temporary(parts: int) -> int:
        experiment = tiny.experiment(
            model={"width": 32, "towers": towers, "dropout": 0.0},
            train={"batch_size": size, "accumulate": parts},
        )
        step = make_step(experiment, make_model(experiment, manifest), mesh, 20)
        batch = tiny.batch(0, size)._replace(row=None)
        lowered = step.update.lower(step.abstract, batch, tiny.catalogue())  # type: ignore[attr-defined]
        memory = lowered.compile().memory_analysis()
        assert memory
        return int(memory.temp_size_in_bytes)

    assert temporary(8) < 0.35 * temporary(1)


@pytest.mark.parametrize(
    ("kind", "shared"),
    [
        ("shared_bottom", ("bottom",)),
        ("mmoe", ("experts", "gate")),  # a column of the gates a task, in one array
        ("stem", ("shared",)),  # all read the experts of each, whose gradients are its own
    ],
)
def test_what_several_tasks_use_is_read_off_the_operations(
    kind: str, shared: tuple[str, ...]
) -> None:
    tasks = {name: TowerTask("binary") for name in ("a", "b")}
    sizes = TowerSizes(inputs=3, context=1, request=1, width=0, tasks=tasks)
    options = TOWERS[kind](expert_hidden=(2, 2), tower_hidden=(2,))
    made = options.make(sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    graph, params = nnx.split(made, nnx.Param)
    parts = [jnp.ones((4, n)) for n in (3, 1, 1, 0, 0)]
    own = dict.fromkeys(tasks, parts[0])
    given = TowerInput(*parts, own=own)  # type: ignore[misc, arg-type]

    def losses(params: Any) -> tuple[jax.Array, ...]:
        found = nnx.merge(graph, nnx.State(params))(given)
        return tuple(jnp.sum(logits) for logits in found.logits.values())

    used = used_by_several(losses, nnx.to_pure_dict(params))
    for path, is_shared in jax.tree.leaves_with_path(used):
        assert is_shared == (path[0].key in shared), jax.tree_util.keystr(path)
