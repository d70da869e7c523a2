"""The whole training step: it learns, in place, compiled once, and the same on any devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.monitoring
import numpy as np
import optax
import pytest

from mtrec_jax.models.model import make_model
from mtrec_jax.sharding import make_mesh, put_batch, replicate, state_shardings
from mtrec_jax.tables.layout import BITS, DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.gradients import draw
from mtrec_jax.train.step import Step, dense_optimizer, make_step
from mtrec_jax.types import Batch, Catalogue, PyTree, TrainState
from tests import tiny

SIZE, STEPS = 16, 50
LOSSES = (*tiny.TASKS, "fusion")


class Compiled(NamedTuple):
    """A step on some devices and the state that it starts from."""

    mesh: jax.sharding.Mesh
    step: Step
    catalogue: Catalogue
    precision: str
    start: TrainState

    def place(self) -> TrainState:
        """A copy of the initial state, as `step.update` consumes what it is given."""
        own = jax.tree.map(lambda leaf: leaf.sharding, self.start)
        copied = jax.device_put(self.start, own, may_alias=False)
        return jax.device_put(copied, state_shardings(copied, self.mesh))

    def update(self, state: TrainState, examples: Batch) -> TrainState:
        return self.step.update(state, put_batch(examples, self.mesh), self.catalogue)


def _compiled(
    shape: tuple[int, int],
    precision: str = "float32",
    start: TrainState | None = None,
    **more: str,
) -> Compiled:
    """`start` spares the compilation of `init`."""
    train = {"precision": precision, "batch_size": SIZE, "learning_rate": 5e-3, **more}
    experiment = tiny.experiment(train=train)
    mesh, manifest = make_mesh(shape), tiny.manifest()
    step = make_step(experiment, make_model(experiment, manifest), mesh, STEPS)
    catalogue = replicate(tiny.catalogue(precision), mesh)
    start = start or step.init(3)
    return Compiled(mesh, step, catalogue, precision, start)


@pytest.fixture(scope="module")
def single() -> Compiled:
    return _compiled((1, 1))


def _train(compiled: Compiled, steps: int = STEPS) -> TrainState:
    """Another batch at every step."""
    state = compiled.place()
    for s in range(steps):
        state = compiled.update(state, tiny.batch(s, SIZE, compiled.precision))
        jax.block_until_ready(state.step)  # virtual devices starve on many un-awaited collectives
    return state


def _learned(state: TrainState) -> dict[str, np.ndarray]:
    """Parameters, tables and summed losses by path."""
    tree = {"params": state.params, "tables": state.tables, "sums": state.sums}
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.slow
def test_every_loss_falls_on_a_batch_that_is_seen_again(single: Compiled) -> None:
    state, examples, sums = single.place(), tiny.batch(0, SIZE), []
    for _ in range(30):
        state = single.update(state, examples)
        sums.append(np.stack([state.sums[name] for name in LOSSES]))
    losses, weights = np.moveaxis(np.diff(sums, axis=0), 2, 0)
    per_step = losses / weights
    fallen = per_step[-5:].mean(axis=0) / per_step[:5].mean(axis=0)
    assert (fallen[:-1] < 0.85).all()
    assert fallen[-1] < 0.97  # the fusion, which can only weigh what the tasks say
    for t, name in enumerate(tiny.TASKS):  # what was summed is what was observed
        np.testing.assert_allclose(weights[:, t], examples.mask[name].sum(), rtol=1e-5)


@pytest.mark.slow
def test_the_state_is_updated_in_place(single: Compiled) -> None:
    state = single.place()
    table = state.tables["lazy_adam"].unsafe_buffer_pointer()
    after = single.update(state, tiny.batch(0, SIZE))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.tables)))
    assert after.tables["lazy_adam"].unsafe_buffer_pointer() == table


def test_rows_that_no_batch_touched_stay_as_they_were(single: Compiled) -> None:
    examples = tiny.batch(0, SIZE)
    examples = examples._replace(  # of the items 4 .. 11 only negatives are touched
        events={name: np.minimum(values, 3) for name, values in examples.events.items()},
        candidate=np.minimum(examples.candidate, 3),
    )
    before = np.asarray(single.start.tables["lazy_adam"])
    after = single.update(single.place(), examples)
    moved = (np.asarray(after.tables["lazy_adam"]) != before).any(axis=1)
    counts = np.asarray(after.slots["lazy_adam"]["count"])
    np.testing.assert_array_equal(moved, counts == 1)
    assert counts.max() == 1
    assert 0 < moved[4 : tiny.TRAINED + 2].sum() <= 6  # as many as there are negatives
    assert moved[2:4].all()
    assert not moved[0]


def test_what_is_masked_has_no_influence(single: Compiled) -> None:
    examples = tiny.batch(1, SIZE)
    rng = np.random.default_rng(0)
    padding = examples.weight == 0
    assert padding.any()
    rubbish = {n: rng.uniform(1, 3, padding.shape).astype(np.float32) for n in tiny.TASKS}
    rubbish["genre"] = rng.integers(0, 3, padding.shape).astype(np.float32)
    unseen = {name: examples.mask[name] == 0 for name in tiny.TASKS}
    other = examples._replace(
        labels={n: np.where(unseen[n], rubbish[n], examples.labels[n]) for n in tiny.TASKS},
        mask={n: np.where(padding, np.float32(1), examples.mask[n]) for n in tiny.TASKS},
        cutoff=np.where(padding, 1 - np.minimum(examples.cutoff, 1), examples.cutoff),
    )
    one, two = (_learned(single.update(single.place(), b)) for b in (examples, other))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-6, atol=1e-7, err_msg=name)
    seen = examples._replace(labels={n: rubbish[n] for n in tiny.TASKS})
    three = _learned(single.update(single.place(), seen))
    for name in ("click", "stars", "genre"):
        assert abs(three[f"sums.{name}"][0] / one[f"sums.{name}"][0] - 1) > 1e-3


def test_losses_and_weights_of_a_batch_worked_out(single: Compiled) -> None:
    """From the logits; the fusion has no retrieval in its objective, and so fits the log-odds."""
    objective = {"dropout": 0.0, "fusion_objective": {"click": 3.0}}
    experiment, manifest = tiny.experiment(model=objective), tiny.manifest()
    model, key = make_model(experiment, manifest), jax.random.key(0)

    @jax.jit
    def run(params: PyTree, tables: dict[str, jax.Array], batch: Batch) -> tuple[Any, Any]:
        wanted = model.ids(batch, single.catalogue, key)
        rows = fetch(model.layout, tables | {DENSE: params[DENSE]}, wanted.ids)
        draws = draw(key, batch)
        shared = model.encode(params, rows, batch, single.catalogue, wanted, draws.users)
        given = params, shared, batch, single.catalogue, wanted, draws.rank
        sums, fusing = model.losses(*given)
        assert model.fusion_loss is not None
        fusion = params, shared, fusing, batch, wanted, draws.lottery, single.mesh
        sums["fusion"] = model.fusion_loss(*fusion)
        weights = model.weights(batch, draws.lottery)
        outputs = tiny.forward(model, params, tables, single.catalogue, batch)[2]
        return {name: (sums[name], weights[name]) for name in sums}, outputs

    b = tiny.batch(2, SIZE)
    b = b._replace(mask={n: np.maximum(m, 1 - b.weight) for n, m in b.mask.items()})
    sums, outputs = run(single.start.params, single.start.tables, b)
    weight = {name: b.weight * b.mask[name] for name in tiny.TASKS}
    assert len({float(w.sum()) for w in weight.values()}) > 2
    click, fused = (np.asarray(x) for x in (outputs.logits["click"], outputs.fused))
    genre = np.asarray(jax.nn.log_softmax(outputs.logits["genre"]))
    classes = np.asarray(b.labels["genre"], int)[..., None]
    expected = {
        "click": np.log1p(np.exp(-(2 * b.labels["click"] - 1) * click)),
        "stars": (outputs.logits["stars"] - (b.labels["stars"] - 3) / 2) ** 2,  # mean 3, std 2
        "genre": -np.take_along_axis(genre, classes, axis=-1)[..., 0],
        "fusion": np.log1p(np.exp(-(2 * b.labels["click"] - 1) * fused)),
    }
    for name, losses in expected.items():
        seen = weight["click" if name == "fusion" else name]
        np.testing.assert_allclose(sums[name], ((losses * seen).sum(), seen.sum()), rtol=1e-5)
    np.testing.assert_allclose(sums["next"][1], weight["next"].sum())


@pytest.mark.slow
def test_an_optimizer_of_ones_own_sees_every_array_by_its_name(single: Compiled) -> None:
    """The configured one is given the layers as one vector, and learns the same."""
    train = {"batch_size": SIZE, "learning_rate": 5e-3}
    experiment, seen = tiny.experiment(train=train), list[str]()

    def note(updates: PyTree, _: PyTree) -> PyTree:
        paths = jax.tree_util.tree_leaves_with_path(updates)
        seen.extend(jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in paths)
        return updates

    own = optax.chain(optax.stateless(note), dense_optimizer(experiment.train, STEPS))
    model = make_model(experiment, tiny.manifest())
    step = make_step(experiment, model, single.mesh, STEPS, own)
    state, expected = step.init(3), _learned(_train(single, 3))
    for s in range(3):
        state = step.update(state, put_batch(tiny.batch(s, SIZE), single.mesh), single.catalogue)
    assert {"dense", "network.encoder.blocks.layers.0.key.kernel"} < set(seen)
    _assert_same(expected, _learned(state), 1e-5, "params.network.encoder.blocks.layers.0.key.bias")


def _compilations() -> tuple[list[str], Callable[..., None]]:
    names: list[str] = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            names.append(f"{event} {details.get('fun_name')}")

    return names, listen


def _assert_same(one: PyTree, other: PyTree, relative: float, except_for: str = "") -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {except_for}:
        scale = np.abs(one[name]).max()
        assert np.abs(one[name] - other[name]).max() <= relative * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, STEPS])
def test_devices_agree_in_double_precision(steps: int) -> None:
    """Dropout, negatives and the fusion's lottery included; the tables split over "table"."""
    with jax.enable_x64(True):
        single = _compiled((1, 1), "float64")
        expected = _learned(_train(single, steps))
        split = _train(_compiled((1, 8), "float64"), steps)  # with an initialisation of its own
        shards = {shard.data.shape[0] for shard in split.tables["lazy_adam"].addressable_shards}
        assert shards == {split.tables["lazy_adam"].shape[0] // 8}
        others = [_learned(split)]
        for shape in ((8, 1), (2, 4)) if steps == STEPS else ():
            others.append(_learned(_train(_compiled(shape, "float64", single.start), steps)))
    for values in expected.values():
        assert values.dtype == np.float64
    # not float32 in disguise
    whole = np.concatenate([v.ravel() for n, v in expected.items() if n.startswith("params.net")])
    assert np.mean(whole.astype(np.float32) != whole) > 0.99
    unused = "params.network.encoder.blocks.layers.0.key.bias"
    assert np.abs(expected.pop(unused)).max() < 1e-9  # rounding: a softmax does not see this bias
    for found in others:
        assert np.abs(found.pop(unused)).max() < 1e-9
        _assert_same(expected, found, 1e-10)


@pytest.mark.slow
def test_devices_agree_in_single_precision(single: Compiled) -> None:
    expected = _learned(_train(single))
    split = _compiled((4, 2), start=single.start)
    found = _learned(_train(split))
    # the gradient of this bias is rounding noise, which Adam scales up to steps of full length
    _assert_same(
        expected, found, 1e-4, except_for="params.network.encoder.blocks.layers.0.key.bias"
    )
    names, listen = _compilations()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for compiled in (single, split):
            _train(compiled)
        assert names == []
        jax.jit(lambda x: x + 1)(np.float32(1))
        assert names  # the listener does hear compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_bfloat16_rows_learn_over_devices_and_a_step_that_is_not_finite_leaves_them() -> None:
    compiled = _compiled((2, 4), row_precision="bfloat16", not_finite="skip")
    state = compiled.place()
    bad = tiny.batch(0, SIZE)
    nan = np.full_like(bad.labels["click"], np.nan)
    bad = bad._replace(labels={**bad.labels, "click": nan})
    parts = ("params", "tables", "slots", "optimizer")
    before = [np.asarray(leaf) for part in parts for leaf in jax.tree.leaves(getattr(state, part))]
    state = compiled.update(state, bad)
    after = [np.asarray(leaf) for part in parts for leaf in jax.tree.leaves(getattr(state, part))]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert state.bad.tolist() == [1, 1]
    assert state.tables["lazy_adam"].dtype == BITS
    losses = []
    for _ in range(30):
        state = compiled.update(state, tiny.batch(0, SIZE))
        losses.append(float(state.sums["next"][0]))
    assert np.mean(np.diff(losses[-6:])) < 0.8 * np.mean(np.diff(losses[:6]))
    # replicas have rounded alike
    copies: dict[str, list[np.ndarray]] = {}
    for shard in state.tables["lazy_adam"].addressable_shards:
        copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    assert len(copies) == 4
    for one, other in copies.values():
        np.testing.assert_array_equal(one, other)
