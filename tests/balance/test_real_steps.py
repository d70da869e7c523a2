"""A real training step against gradients that are taken directly through the model."""

from __future__ import annotations

import itertools
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
from mtrec_jax.types import Catalogue, PyTree, Shared, TrainState
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
    """The losses of a step as functions of everything that is trained, without its machinery."""

    learned: PyTree  # (params, tables)
    encode: Any  # learned -> Shared
    behind: Any  # learned, Shared -> losses [T]
    fusion: Any  # learned -> loss


def _direct(case: Case, state: TrainState, seed: int) -> Direct:
    model, catalogue = case.model, case.catalogue
    batch = jax.tree.map(jnp.asarray, tiny.batch(seed, SIZE, "float64")._replace(row=None))
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
    wanted = model.ids(batch, catalogue, keys[0])
    draws = draw(keys[1], batch)
    weights = model.weights(batch, draws.lottery)

    def encode(learned: PyTree) -> Shared:
        params, tables = learned
        stacks = tables | {"dense": params["dense"]}
        rows = fetch(model.layout, stacks, wanted.ids)
        return model.encode(params, rows, batch, catalogue, wanted, None)

    def behind(learned: PyTree, shared: Shared) -> jax.Array:
        sums, _ = model.losses(learned[0], shared, batch, catalogue, wanted, None)
        return jnp.stack([sums[name] / weights[name] for name in TASKS])

    def fusion(learned: PyTree) -> jax.Array:
        shared = encode(learned)
        _, fusing = model.losses(learned[0], shared, batch, catalogue, wanted, None)
        given = learned[0], shared, fusing, batch, wanted, draws.lottery, case.mesh
        return model.fusion_loss(*given) / weights["fusion"]

    return Direct((state.params, state.tables), encode, behind, fusion)


@jax.jit
def _flat(tree: PyTree) -> jax.Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])


def _gradients_at_shared(direct: Direct) -> tuple[np.ndarray, np.ndarray]:
    """Each task's own gradient at the shared representation [T, ...], and the losses [T]."""

    @jax.jit
    def run(learned: PyTree) -> tuple[jax.Array, jax.Array]:
        shared = direct.encode(learned)
        of_task = [jax.grad(lambda s, t=t: direct.behind(learned, s)[t])(shared) for t in range(3)]
        return jnp.stack([_flat(gradient) for gradient in of_task]), direct.behind(learned, shared)

    return tuple(np.asarray(found) for found in run(direct.learned))  # type: ignore[return-value]


def _gradient(direct: Direct, weights: np.ndarray, to_shared: np.ndarray) -> PyTree:
    """Of everything, where the heads have the tasks' weights, and this gradient goes back into the
    encoders."""

    @jax.jit
    def run(learned: PyTree, to_shared: jax.Array) -> PyTree:
        def total(learned: PyTree) -> jax.Array:
            shared = direct.encode(learned)
            heads = direct.behind(learned, jax.lax.stop_gradient(shared)) @ jnp.asarray(weights)
            return heads + _flat(shared) @ to_shared + direct.fusion(learned)

        return jax.grad(total)(learned)

    return jax.device_get(run(direct.learned, to_shared))


def _taken_off(before: PyTree, after: TrainState) -> PyTree:
    new = after.params, after.tables
    return jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), before, new)


def _assert_close(found: PyTree, expected: PyTree) -> None:
    for (path, one), other in zip(
        jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        scale = max(np.abs(other).max(), 1e-6)
        assert np.abs(one - other).max() <= 1e-9 * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize("items", ["sparse", "dense"])
def test_a_static_step_takes_off_the_gradient_of_the_weighted_loss(items: str) -> None:
    """Of layers, dense tables and sparse rows, the fusion's own parameters among them."""
    with jax.enable_x64(True):
        case = _case("static", {"item": {"update": items}})
        state = case.step.init(3)
        direct = _direct(case, state, 0)

        @jax.jit
        def gradient(learned: PyTree) -> PyTree:
            def total(learned: PyTree) -> jax.Array:
                losses = direct.behind(learned, direct.encode(learned))
                return losses @ jnp.asarray(WEIGHTS) + direct.fusion(learned)

            return jax.grad(total)(learned)

        expected, before = jax.device_get((gradient(direct.learned), direct.learned))
        _assert_close(_taken_off(before, case.learn(state, 0)), expected)
        fusion = jax.tree.leaves(expected[0]["network"]["fusion"])
        assert all(np.abs(leaf).max() > 0 for leaf in fusion)
        assert np.abs(expected[1]["sgd"]).max() > 0


def test_pcgrad_projects_the_gradients_of_the_tasks_at_the_shared_representation() -> None:
    with jax.enable_x64(True):
        case = _case("pcgrad")
        state = case.step.init(3)
        seed = 1
        direct = _direct(case, state, seed)
        own, _ = _gradients_at_shared(direct)
        own = own * WEIGHTS[:, None]
        inner = own @ own.T
        assert inner[np.triu_indices(3, 1)].min() < 0, "the tasks of this batch agree"

        def projected(task: int, order: tuple[int, ...]) -> np.ndarray:
            left = own[task].copy()
            for other in order:
                left -= min(left @ own[other], 0) / inner[other, other] * own[other]
            return left

        orders = [itertools.permutations({0, 1, 2} - {task}) for task in range(3)]
        sums = [
            sum(projected(task, order) for task, order in enumerate(one))
            for one in itertools.product(*orders)
        ]
        before = jax.device_get(direct.learned)
        possible = [_gradient(direct, WEIGHTS, np.asarray(total)) for total in np.unique(sums, axis=0)]
        plain = _gradient(direct, WEIGHTS, own.sum(axis=0))
        found = _taken_off(before, case.learn(state, seed))
        distances = [_distance(found, one) for one in possible]
        assert min(distances) < 1e-9 < 1e-4 < _distance(found, plain)


def _distance(one: PyTree, other: PyTree) -> float:
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(t)]) for t in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_gradnorm_weighs_by_the_norms_at_the_shared_representation() -> None:
    """Two steps: r is 1 in the first, and the loss beside the first one in the second."""
    with jax.enable_x64(True):
        alpha, rate = 1.5, 0.1
        case = _case({"kind": "gradnorm", "alpha": alpha, "learning_rate": rate}, learning_rate=0.1)
        state, weights, first = case.step.init(3), WEIGHTS.copy(), None
        for seed in range(2):
            direct = _direct(case, state, seed)
            own, losses = _gradients_at_shared(direct)
            first = losses if first is None else first
            ratio = losses / first
            norms = weights * np.linalg.norm(own, axis=1)
            target = norms.mean() * (ratio / ratio.mean()) ** alpha
            expected = _gradient(direct, weights, weights @ own)
            moved = weights - rate * np.sign(norms - target) * norms / weights
            weights = np.maximum(moved, 1e-3)
            weights *= WEIGHTS.sum() / weights.sum()
            before = jax.device_get(direct.learned)
            state = case.learn(state, seed)
            change = jax.tree.map(lambda taken: 10 * taken, _taken_off(before, state))
            assert _distance(change, expected) < 1e-9
            np.testing.assert_allclose(state.balance.weights, weights, rtol=1e-9)
            np.testing.assert_allclose(state.balance.first, first, rtol=1e-9)
        assert np.abs(ratio - 1).max() > 1e-3


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
