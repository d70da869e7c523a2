"""A real training step against gradients that are taken directly through the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.model import Model, make_model
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.gradients import draw
from mtrec_jax.train.step import Step, make_step
from mtrec_jax.types import Batch, Catalogue, PyTree, Shared, TrainState
from tests import tiny

SIZE = 16
TASKS = {name: tiny.TASKS[name] for name in ("next", "click", "stars")}
WEIGHTS = np.array([1.0, 1.0, 0.5])  # as declared there
# every rule is plain descent with a rate of 1: a step takes the gradient off
DESCENT = {
    "optimizer": "sgd",
    "row_optimizer": "sgd",
    "learning_rate": 1.0,
    "batch_size": SIZE,
    "precision": "float64",
}


class Case(NamedTuple):
    """A step and what it is made of, on one device."""

    model: Model
    step: Step
    mesh: jax.sharding.Mesh
    catalogue: Catalogue

    def learn(self, state: TrainState, seed: int) -> TrainState:
        """The state after one more batch."""
        batch = put_batch(tiny.batch(seed, SIZE, "float64"), self.mesh)
        return self.step.update(state, batch, self.catalogue)


def _case(balance: Any, tables: dict[str, Any] | None = None, **train: Any) -> Case:
    declared = tiny.experiment(
        tasks=TASKS,
        model={"dropout": 0.0},
        train=DESCENT | {"balance": balance} | train,
        tables=tables or {},
    )
    model, mesh = make_model(declared, tiny.manifest()), make_mesh((1, 1))
    catalogue = replicate(tiny.catalogue("float64"), mesh)
    return Case(model, make_step(declared, model, mesh, 20), mesh, catalogue)


class Direct(NamedTuple):
    """The losses of a step as functions of everything that is trained and of its batch, without
    the step's machinery."""

    encode: Callable[..., Shared]  # learned = (params, tables), given = (batch, keys)
    behind: Callable[..., jax.Array]  # learned, Shared, given -> losses [T]
    fusion: Callable[..., jax.Array]  # learned, given -> loss


def _given(state: TrainState, seed: int) -> tuple[Batch, jax.Array]:
    """A batch, and the keys of the negatives and of what else chance decides."""
    batch = tiny.batch(seed, SIZE, "float64")._replace(row=None)
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    return jax.tree.map(jnp.asarray, batch), keys


def _direct(case: Case) -> Direct:
    model, catalogue = case.model, case.catalogue

    def encode(learned: PyTree, given: tuple[Batch, jax.Array]) -> Shared:
        (params, tables), (batch, keys) = learned, given
        wanted = model.ids(batch, catalogue, keys[0])
        stacks = tables | {"dense": params["dense"]}
        rows = fetch(model.layout, stacks, wanted.ids)
        return model.encode(params, rows, batch, catalogue, wanted, None)

    def behind(learned: PyTree, shared: Shared, given: tuple[Batch, jax.Array]) -> jax.Array:
        batch, keys = given
        wanted = model.ids(batch, catalogue, keys[0])
        sums, _ = model.losses(learned[0], shared, batch, catalogue, wanted, None)
        weights = model.weights(batch, draw(keys[1], batch).lottery)
        return jnp.stack([sums[name] / weights[name] for name in TASKS])

    def fusion(learned: PyTree, given: tuple[Batch, jax.Array]) -> jax.Array:
        batch, keys = given
        wanted, shared = model.ids(batch, catalogue, keys[0]), encode(learned, given)
        _, fusing = model.losses(learned[0], shared, batch, catalogue, wanted, None)
        lottery = draw(keys[1], batch).lottery
        assert model.fusion_loss is not None
        loss = model.fusion_loss(learned[0], shared, fusing, batch, wanted, lottery, case.mesh)
        return loss / model.weights(batch, lottery)["fusion"]

    return Direct(encode, behind, fusion)


@jax.jit
def _flat(tree: PyTree) -> jax.Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def _at_shared(direct: Direct) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Each task's own gradient at the shared representation [T, ...], and the losses [T]."""

    @jax.jit
    def run(learned: PyTree, given: Any) -> tuple[jax.Array, jax.Array]:
        shared = direct.encode(learned, given)
        gradients = jax.jacrev(direct.behind, argnums=1)(learned, shared, given)
        flat = [leaf.reshape(len(TASKS), -1) for leaf in jax.tree.leaves(gradients)]
        return jnp.concatenate(flat, axis=1), direct.behind(learned, shared, given)

    return run


def _whole(direct: Direct) -> Callable[..., PyTree]:
    """The gradient of everything, where the heads have the tasks' weights, and a gradient at the
    shared representation goes back into the encoders."""

    @jax.jit
    def run(learned: PyTree, given: Any, weights: jax.Array, to_shared: jax.Array) -> PyTree:
        def total(learned: PyTree) -> jax.Array:
            shared = direct.encode(learned, given)
            heads = direct.behind(learned, jax.lax.stop_gradient(shared), given) @ weights
            return heads + _flat(shared) @ to_shared + direct.fusion(learned, given)

        return jax.grad(total)(learned)

    return run


def _taken_off(before: PyTree, after: TrainState) -> PyTree:
    new = after.params, after.tables
    return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), before, new)


def _assert_close(found: PyTree, expected: PyTree) -> None:
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(other).max(), 1e-6)
        assert np.abs(one - other).max() <= 1e-9 * scale, jax.tree_util.keystr(path)


@pytest.mark.slow  # tests/train/test_wiring.py has the same of a small model
@pytest.mark.parametrize("items", ["sparse", "dense"])
def test_a_static_step_takes_off_the_gradient_of_the_weighted_loss(items: str) -> None:
    """Of layers, dense tables and sparse rows, the fusion's own parameters among them."""
    with jax.enable_x64(True):
        case = _case("static", {"item": {"update": items}})
        state = case.step.init(3)
        direct, given = _direct(case), _given(state, 0)

        def total(learned: PyTree) -> jax.Array:
            losses = direct.behind(learned, direct.encode(learned, given), given)
            return losses @ jnp.asarray(WEIGHTS) + direct.fusion(learned, given)

        learned = state.params, state.tables
        expected, before = jax.device_get((jax.jit(jax.grad(total))(learned), learned))
        _assert_close(_taken_off(before, case.learn(state, 0)), expected)
        fusion = jax.tree.leaves(expected[0]["network"]["fusion"])
        assert all(np.abs(leaf).max() > 0 for leaf in fusion)
        assert np.abs(expected[1]["sgd"]).max() > 0


@pytest.mark.slow  # a real model, compiled twice; the small one has the rules
def test_at_the_parameters_nothing_is_left_out() -> None:
    """CAGrad without room is the static sum: of layers, dense tables, rows and the fusion."""
    with jax.enable_x64(True):
        ends = []
        for balance in ("static", {"kind": "cagrad", "c": 0.0, "at": "parameters"}):
            case = _case(balance)
            state = case.learn(case.step.init(3), 0)
            ends.append(jax.device_get((state.params, state.tables, state.sums)))
        _assert_close(*ends)


@pytest.mark.slow  # a model of a few numbers does so in tests/train/test_wiring.py
def test_pcgrad_projects_the_gradients_of_the_tasks_at_the_shared_representation() -> None:
    with jax.enable_x64(True):
        case = _case("pcgrad")
        state = case.step.init(3)
        direct, learned = _direct(case), (state.params, state.tables)
        find = _at_shared(direct)
        for seed in range(30):
            own = np.asarray(find(learned, _given(state, seed))[0]) * WEIGHTS[:, None]
            inner = own @ own.T
            if inner[np.triu_indices(3, 1)].min() < -1e-4:
                break
        else:
            pytest.fail("the tasks agree in all batches")

        def projected(task: int, order: tuple[int, ...]) -> np.ndarray:
            left = own[task].copy()
            for other in order:
                left -= min(left @ own[other], 0) / inner[other, other] * own[other]
            return left

        orders = [itertools.permutations({0, 1, 2} - {task}) for task in range(3)]
        sums: list[Any] = [
            sum(projected(task, order) for task, order in enumerate(one))
            for one in itertools.product(*orders)
        ]
        gradient, given = _whole(direct), _given(state, seed)
        before = jax.device_get(learned)
        possible = [gradient(learned, given, WEIGHTS, one) for one in np.unique(sums, axis=0)]
        plain = gradient(learned, given, WEIGHTS, own.sum(axis=0))
        found = _taken_off(before, case.learn(state, seed))
        distances = [_distance(found, one) for one in possible]
        assert min(distances) < 1e-9 < 1e-4 < _distance(found, plain)


def _distance(one: PyTree, other: PyTree) -> float:
    a, b = (np.asarray(_flat(tree)) for tree in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.slow  # and this
def test_gradnorm_weighs_by_the_norms_at_the_shared_representation() -> None:
    """Two steps: r is 1 in the first, and the loss beside the first one in the second."""
    with jax.enable_x64(True):
        alpha, rate = 1.5, 0.1
        case = _case({"kind": "gradnorm", "alpha": alpha, "learning_rate": rate}, learning_rate=0.1)
        state, weights, first = case.step.init(3), WEIGHTS.copy(), None
        direct = _direct(case)
        find, gradient = _at_shared(direct), _whole(direct)
        for seed in range(2):
            learned, given = (state.params, state.tables), _given(state, seed)
            own, losses = map(np.asarray, find(learned, given))
            first = losses if first is None else first
            ratio = losses / first
            norms = weights * np.linalg.norm(own, axis=1)
            target = norms.mean() * (ratio / ratio.mean()) ** alpha
            expected = jax.device_get(gradient(learned, given, weights, weights @ own))
            moved = weights - rate * np.sign(norms - target) * norms / weights
            weights = np.maximum(moved, 1e-3)
            weights *= WEIGHTS.sum() / weights.sum()
            before = jax.device_get(learned)
            state = case.learn(state, seed)
            change = jax.tree.map(lambda taken: 10 * taken, _taken_off(before, state))
            assert _distance(change, expected) < 1e-9
            np.testing.assert_allclose(state.balance.weights, weights, rtol=1e-9)
            np.testing.assert_allclose(state.balance.first, first, rtol=1e-9)
        assert np.abs(ratio - 1).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("items", ["sparse", "dense"])
def test_two_parts_learn_what_the_whole_batch_learns(items: str) -> None:
    """Dense items are listed for all parts together, sparse ones are split like the batch."""
    with jax.enable_x64(True):
        tables = {"item": {"update": items}}
        ends = []
        for parts in (1, 2):
            case = _case("uncertainty", tables, accumulate=parts, learning_rate=0.1)
            state = case.step.init(3)
            for seed in range(3):
                state = case.learn(state, seed)
            ends.append(jax.device_get((state.params, state.tables, state.balance, state.sums)))
        _assert_close(*ends)


def test_a_method_that_needs_single_gradients_refuses_parts() -> None:
    with pytest.raises(ConfigError, match=r"train\.accumulate: 2 parts.* 'pcgrad' needs"):
        _case("pcgrad", accumulate=2, precision="float32")
