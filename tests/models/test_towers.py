"""Towers: the wiring and the losses of the papers, on cases worked out by hand."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.balance import BALANCERS
from mtrec_jax.balance.contract import At, beside
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest, TaskField
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.model import Model, make_model
from mtrec_jax.models.objective import states_of
from mtrec_jax.models.towers import TOWERS, TowerInput, TowerSizes, TowerTask
from mtrec_jax.models.towers.aitm import AITM, AITMTowers, Transfer, later_above_earlier
from mtrec_jax.models.towers.escm2 import ESCM2, ESCM2Towers, doubly_robust, inverse_propensity
from mtrec_jax.models.towers.esmm import ESMM, ESMMTowers, product_cross_entropy
from mtrec_jax.models.towers.home import ExpertSet, FeatureGate, HoME, HoMETowers, SelfGate
from mtrec_jax.models.towers.mmoe import MMoE, MMoETowers
from mtrec_jax.models.towers.ple import PLE, PLETowers
from mtrec_jax.models.towers.shared_bottom import SharedBottom, SharedBottomTowers
from mtrec_jax.models.towers.single_task import SingleTask
from mtrec_jax.sharding import make_mesh
from mtrec_jax.tables.layout import initial_stacks
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.gradients import Given, backward, draw
from mtrec_jax.train.step import make_step
from mtrec_jax.types import Batch
from tests import tiny

N, INPUTS, TASKS, SHARED, OWN, HIDDEN = 7, 5, 3, 2, 2, (4, 3)
NAMES = ("click", "stars", "buy")
FLOAT = jnp.dtype("float32")
X = np.random.default_rng(0).normal(size=(N, INPUTS)).astype(np.float32)
SIZES = TowerSizes(
    inputs=INPUTS,
    context=0,
    request=0,
    width=0,
    tasks={
        "click": TowerTask("binary"),
        "stars": TowerTask("regression"),
        "buy": TowerTask("binary", where="click"),
    },
)


def _pairs(x: Any) -> TowerInput:
    none = jnp.zeros((len(x), 0))
    own = dict.fromkeys(NAMES, jnp.asarray(x))
    return TowerInput(jnp.asarray(x), none, none, none, none, own=own)


@functools.partial(jax.jit, static_argnums=0)
def _call(graph: Any, state: Any, x: Any) -> Any:
    return nnx.merge(graph, state)(_pairs(x))


def _run(towers: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Without towers of their own, the tasks' hidden vectors are what their heads are given."""
    found = _call(*nnx.split(towers), X)
    gates = {name: np.asarray(gate) for name, gate in found.diagnostics.items()}
    return np.stack([found.hidden[name] for name in NAMES]), gates


def _linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def _softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _experts(experts: Any, x: np.ndarray) -> list[np.ndarray]:
    found = []
    for mlp, norm in itertools.zip_longest(experts.mlps, experts.norms):
        h = x
        for layer in mlp.layers:
            h = _linear(layer, h)
            h = h / (1 + np.exp(-h))
        if norm is not None:
            h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + 1e-6)
            h = h * np.asarray(norm.scale[...])
        found.append(h)
    return found


def _mix(weights: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
    assert weights.shape[1] == len(experts)
    return np.einsum("ne,enh->nh", weights, np.stack(experts))


def _disturb(experts: Any, e: int) -> None:
    layer = experts.mlps[e].layers[0]
    noise = np.random.default_rng(9).normal(size=layer.kernel.shape)
    layer.kernel[...] = layer.kernel[...] + jnp.asarray(noise, FLOAT)


def _moved(towers: Any, change: Callable[[], None]) -> np.ndarray:
    """How far each task's hidden vector moves by a change of the weights: [T]."""
    before = _run(towers)[0]
    change()
    return np.abs(_run(towers)[0] - before).max(axis=(1, 2))


def _ple(levels: int = 2, normalise: bool = True) -> PLETowers:
    given: Any = {"experts": SHARED, "task_experts": OWN, "expert_hidden": HIDDEN}
    options = PLE(levels=levels, normalise=normalise, tower_hidden=(), **given)
    return options.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))


def _mmoe(experts: int, normalise: bool = True) -> MMoETowers:
    given: Any = {"expert_hidden": HIDDEN, "tower_hidden": ()}
    options = MMoE(experts=experts, normalise=normalise, **given)
    return options.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))


def _shared_bottom(tower_hidden: tuple[int, ...] = ()) -> SharedBottomTowers:
    options = SharedBottom(expert_hidden=HIDDEN, tower_hidden=tower_hidden)
    return options.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))


def test_shared_bottom_gives_every_task_the_same_network() -> None:
    towers = _shared_bottom()
    hidden, gates = _run(towers)
    expected = X
    for layer in towers.bottom.layers:
        expected = _linear(layer, expected)
        expected = expected / (1 + np.exp(-expected))
    np.testing.assert_allclose(hidden, np.stack([expected] * TASKS), atol=1e-6)
    assert gates == {}


@pytest.mark.parametrize("normalise", [True, False])
def test_mmoe_gate_is_a_softmax_over_all_experts_for_each_task(normalise: bool) -> None:
    """Not normalised they are the paper's f_i(x), equations 5 to 7, a dense network each."""
    towers = _mmoe(4, normalise)
    assert len(towers.experts.norms) == 4 * normalise
    hidden, gates = _run(towers)
    expected = _softmax(_linear(towers.gate, X).reshape(N, TASKS, 4))
    np.testing.assert_allclose(gates["gates"], expected, atol=1e-6)
    experts = _experts(towers.experts, X)
    for t in range(TASKS):
        np.testing.assert_allclose(hidden[t], _mix(expected[:, t], experts), atol=1e-5)
    for e in range(4):
        assert (_moved(towers, lambda e=e: _disturb(towers.experts, e)) > 1e-3).all()  # type: ignore[misc]


def test_mmoe_gates_known_by_hand() -> None:
    towers = _mmoe(2)
    towers.gate.kernel[...] = jnp.zeros((INPUTS, 6))
    towers.gate.bias[...] = jnp.log(jnp.array([1.0, 3.0, 9.0, 1.0, 1.0, 1.0]))
    hidden, gates = _run(towers)
    np.testing.assert_allclose(gates["gates"][0], [[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]], atol=1e-6)
    a, b = _experts(towers.experts, X)
    mixtures = [0.25 * a + 0.75 * b, 0.9 * a + 0.1 * b, 0.5 * a + 0.5 * b]
    np.testing.assert_allclose(hidden, mixtures, atol=1e-5)


def _ple_by_hand(
    towers: PLETowers, x: np.ndarray
) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Tang et al. 2020, equations 3 to 6: task k mixes S^k = [own experts, shared experts] by a
    softmax of what the level's own experts are given; the shared gate mixes those of *every* task
    and the shared ones, on every level but the last."""
    inputs, shared_input, found = [x] * TASKS, x, {}
    for number, level in enumerate(towers.levels, 1):
        end = "" if number == 1 else f"_{number}"
        shared = _experts(level.shared, shared_input)
        own = [_experts(level.own[t], inputs[t]) for t in range(TASKS)]
        gates = [_softmax(_linear(level.gates[t], inputs[t])) for t in range(TASKS)]
        found[f"gates{end}"] = np.stack(gates, axis=1)
        inputs = [_mix(gates[t], own[t] + shared) for t in range(TASKS)]
        if number < len(towers.levels):
            gate = _softmax(_linear(level.gate_shared, shared_input))
            assert gate.shape == (N, TASKS * OWN + SHARED)
            found[f"gate_shared{end}"] = gate
            shared_input = _mix(gate, own[0] + own[1] + own[2] + shared)
    return inputs, found


@pytest.mark.parametrize(("levels", "normalise"), [(1, True), (2, True), (3, True), (2, False)])
def test_ple_equals_its_levels_written_out(levels: int, normalise: bool) -> None:
    towers = _ple(levels, normalise)
    assert bool(towers.levels[0].own[0].norms) == bool(towers.levels[-1].shared.norms) == normalise
    hidden, gates = _run(towers)
    expected, by_hand = _ple_by_hand(towers, X)
    assert gates.keys() == by_hand.keys()
    for name in gates:
        np.testing.assert_allclose(gates[name], by_hand[name], atol=1e-5)
    np.testing.assert_allclose(hidden, expected, atol=1e-5)


def _last_level_reads_only(towers: PLETowers, part: str) -> None:
    """Close the last level's gates to the task's own or to the shared experts."""
    closed = slice(0, OWN) if part == "shared" else slice(OWN, None)
    for gate in towers.levels[-1].gates:
        gate.kernel[...] = jnp.zeros_like(gate.kernel[...])
        gate.bias[...] = jnp.zeros(OWN + SHARED).at[closed].set(-1e9)


def test_ple_task_mixture_sees_own_and_shared_experts_only() -> None:
    towers = _ple()
    _last_level_reads_only(towers, "own")
    first = towers.levels[0]
    for t in range(TASKS):
        for e in range(OWN):
            moved = _moved(towers, lambda t=t, e=e: _disturb(first.own[t], e))  # type: ignore[misc]
            assert moved[t] > 1e-3
            assert (np.delete(moved, t) == 0).all()
    for e in range(SHARED):
        assert (_moved(towers, lambda e=e: _disturb(first.shared, e)) > 1e-3).all()  # type: ignore[misc]


def test_ple_shared_mixture_sees_every_expert() -> None:
    towers = _ple()
    _last_level_reads_only(towers, "shared")
    first = towers.levels[0]
    for experts in (*first.own, first.shared):
        for e in range(len(experts.mlps)):
            moved = _moved(towers, lambda experts=experts, e=e: _disturb(experts, e))  # type: ignore[misc]
            assert (moved > 1e-3).all()


def test_ple_last_level_keeps_the_tasks_apart() -> None:
    towers = _ple()
    last = towers.levels[-1]
    for t in range(TASKS):
        moved = _moved(towers, lambda t=t: _disturb(last.own[t], 0))  # type: ignore[misc]
        assert moved[t] > 1e-3
        assert (np.delete(moved, t) == 0).all()
    assert (_moved(towers, lambda: _disturb(last.shared, 0)) > 1e-3).all()


def test_single_task_shares_nothing() -> None:
    """Each task: dense, silu, dense, silu of its own on x; changing one moves that task alone."""
    options = SingleTask(expert_hidden=(4,), tower_hidden=(3,))
    towers = options.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    hidden, gates = _run(towers)
    assert gates == {}
    for t in range(TASKS):
        expected = X
        for layer in towers.heads.towers[t].layers:
            expected = _silu(_linear(layer, expected))
        np.testing.assert_allclose(hidden[t], expected, atol=1e-6)
        layer = towers.heads.towers[t].layers[0]

        def change(layer: Any = layer) -> None:
            layer.bias[...] = layer.bias[...] + 1

        moved = _moved(towers, change)
        assert moved[t] > 1e-3
        assert (np.delete(moved, t) == 0).all()


def test_heads_are_a_tower_and_a_linear_layer_a_task() -> None:
    sizes = SIZES._replace(tasks=SIZES.tasks | {"genre": TowerTask("multiclass", outputs=4)})
    options = SharedBottom(expert_hidden=HIDDEN, tower_hidden=(6,))
    towers = options.make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))
    found = _call(*nnx.split(towers), X)
    shared = X
    for layer in towers.bottom.layers:
        shared = _linear(layer, shared)
        shared = shared / (1 + np.exp(-shared))
    for t, name in enumerate(sizes.tasks):
        [layer] = towers.heads.towers[t].layers
        hidden = _linear(layer, shared)
        hidden = hidden / (1 + np.exp(-hidden))
        np.testing.assert_allclose(found.hidden[name], hidden, atol=1e-5)
        logits = _linear(towers.heads.heads[t], hidden)
        expected = logits if name == "genre" else logits[:, 0]
        np.testing.assert_allclose(found.logits[name], expected, atol=1e-5)
    assert found.logits["genre"].shape == (N, 4)


@pytest.mark.parametrize("kind", TOWERS)
def test_all_towers_give_what_the_network_wants(kind: str) -> None:
    def run() -> Any:
        return TOWERS[kind]().make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))(_pairs(X))

    found = jax.eval_shape(run)
    assert set(found.logits) == set(found.hidden) == set(NAMES)
    assert all(logits.shape == (N,) for logits in found.logits.values())
    assert len({hidden.shape for hidden in found.hidden.values()}) == 1
    assert all(gates.shape[0] == N for gates in found.diagnostics.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in TOWERS if kind not in ("stem", "pepnet")])
def test_all_that_is_read_is_learned(kind: str) -> None:
    """Central differences along random changes of each array: no gradient is held back on the way.
    (Those of STEM and PEPNet are, and have tests of their own.)"""
    towers = TOWERS[kind](**SMALL.get(kind, {})).make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    graph, params = nnx.split(towers, nnx.Param)
    rng = np.random.default_rng(3)
    pull = {name: rng.normal(size=N) for name in NAMES}

    @jax.jit
    def said(params: Any) -> jax.Array:
        logits = nnx.merge(graph, params)(_pairs(X)).logits
        return sum((jnp.vdot(logits[name], pull[name]) for name in NAMES), jnp.zeros(()))

    leaves, structure = jax.tree.flatten(params)
    gradients = jax.tree.leaves(jax.grad(said)(params))
    slopes, differences = [], []
    for place, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        way = jnp.asarray(rng.normal(size=leaf.shape), FLOAT)
        above, below = (
            said(
                jax.tree.unflatten(
                    structure, [*leaves[:place], leaf + far * way, *leaves[place + 1 :]]
                )
            )
            for far in (0.002, -0.002)
        )
        slopes.append(jnp.vdot(gradient, way))
        differences.append((above - below) / 0.004)
    largest = float(np.max(np.abs(slopes)))
    np.testing.assert_allclose(slopes, differences, rtol=0.02, atol=1e-3 * largest)


# --- ESMM, Ma et al. 2018: "Entire Space Multi-Task Model"


def _esmm(**tasks: TowerTask) -> ESMMTowers:
    sizes = SIZES._replace(tasks=tasks or SIZES.tasks)
    return ESMM(expert_hidden=(4,)).make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def _losses(
    towers: Any,
    probabilities: dict[str, list[float]],
    beside: dict[str, jax.Array] | None = None,
    **rows: list[tuple[int, int]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`rows` holds (label, mask) of each task at each impression, `beside` further inputs."""
    logits = {t: jnp.array([_logit(p) for p in ps]) for t, ps in probabilities.items()}
    logits |= beside or {}
    labels, mask = (
        {t: jnp.array([float(pair[i]) for pair in of]) for t, of in rows.items()} for i in (0, 1)
    )
    found = jax.jit(towers.losses)(logits, labels, mask)
    return {t: (np.asarray(value), np.asarray(counts)) for t, (value, counts) in found.items()}


def test_esmm_multiplies_probabilities_over_all_impressions() -> None:
    """Equation 1 and the loss below it: pCTCVR = pCTR pCVR, cross-entropy with y & z over all D.

    p(click) = 1/2, 1/4, 4/5, 1/2 and p(buy | click) = 1/2, 2/5, 1/4, 1/2 give p(both) = 1/4, 1/10,
    1/5, 1/4. Clicked and bought: -log p(both); not clicked, or clicked and not bought: -log(1 - p).
    The label of a purchase that did not happen for want of a click is masked, and counts.
    """
    found = _losses(
        _esmm(),
        {"click": [0.5, 0.25, 0.8, 0.5], "buy": [0.5, 0.4, 0.25, 0.5], "stars": [0.5] * 4},
        click=[(1, 1), (0, 1), (1, 1), (0, 0)],
        buy=[(1, 1), (0, 0), (0, 1), (0, 0)],
        stars=[(3, 1), (0, 0), (2, 1), (0, 0)],
    )
    assert found.keys() == {"buy"}  # the click is its own task's loss, over all impressions
    value, counts = found["buy"]
    np.testing.assert_allclose(value[:3], -np.log([0.25, 0.9, 0.8]), rtol=1e-5)
    np.testing.assert_array_equal(counts, [1, 1, 1, 0])  # where no click is known, nothing is


def test_esmm_has_no_loss_of_the_conditional_alone() -> None:
    """By hand: L = -log(1 - p q) with logits a, b of p, q = 1/2. dL/da = q p (1 - p) / (1 - p q)
    = (1/8) / (3/4) = 1/6 without a click, the same for b; of the conditional over clicks alone it
    would be 0 for b. After a purchase dL/da = dL/db = -(1 - 1/2) = -1/2."""
    towers = _esmm()

    def total(click: jax.Array, buy: jax.Array, label: float) -> jax.Array:
        labels = {"click": jnp.array([label]), "buy": jnp.array([label])}
        mask = {"click": jnp.ones(1), "buy": jnp.array([label])}
        value, counts = towers.losses({"click": click, "buy": buy}, labels, mask)["buy"]
        return jnp.sum(value * counts)

    zero = jnp.zeros(1)
    for label, slope in ((0.0, 1 / 6), (1.0, -1 / 2)):
        slopes = jax.grad(total, argnums=(0, 1))(zero, zero, label)
        np.testing.assert_allclose(slopes, [[slope], [slope]], rtol=1e-5)


def test_esmm_leaves_out_a_click_whose_purchase_is_not_known() -> None:
    found = _losses(
        _esmm(),
        {"click": [0.5, 0.5], "buy": [0.5, 0.5], "stars": [0.5] * 2},
        click=[(1, 1), (0, 1)],
        buy=[(0, 0), (0, 0)],
        stars=[(0, 0), (0, 0)],
    )
    np.testing.assert_array_equal(found["buy"][1], [0, 1])


def test_esmm_of_three_steps() -> None:
    """p = 1/2 everywhere: p(click, cart) = 1/4, p(click, cart, buy) = 1/8.

    Impressions: all three; cart without purchase; click without cart; nothing; a click of which
    nothing more is known; a cart whose purchase is not known.
    """
    towers = _esmm(
        buy=TowerTask("binary", where="cart"),
        click=TowerTask("binary"),
        cart=TowerTask("binary", where="click"),
    )
    found = _losses(
        towers,
        dict.fromkeys(("click", "cart", "buy"), [0.5] * 6),
        click=[(1, 1), (1, 1), (1, 1), (0, 1), (1, 1), (1, 1)],
        cart=[(1, 1), (1, 1), (0, 1), (0, 0), (0, 0), (1, 1)],
        buy=[(1, 1), (0, 1), (0, 0), (0, 0), (0, 0), (0, 0)],
    )
    value, counts = found["cart"]
    np.testing.assert_array_equal(counts, [1, 1, 1, 1, 0, 1])
    carts = [0.25, 0.25, 0.75, 0.75, 0.25]
    np.testing.assert_allclose(value[counts > 0], -np.log(carts), rtol=1e-5)
    value, counts = found["buy"]
    np.testing.assert_array_equal(counts, [1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(value[:4], -np.log([1 / 8, 7 / 8, 7 / 8, 7 / 8]), rtol=1e-5)


def test_esmm_stays_finite_where_it_is_certain() -> None:
    certain = jnp.array([40.0, -200.0])

    def total(logit: jax.Array, label: float) -> jax.Array:
        return jnp.sum(product_cross_entropy([logit, logit], jnp.full(2, label)))

    for label in (0.0, 1.0):
        value, slope = jax.value_and_grad(total)(certain, label)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_esmm_asks_for_a_funnel() -> None:
    with pytest.raises(ConfigError, match=r'binary task .* where = "click"'):
        _esmm(click=TowerTask("binary"), stars=TowerTask("regression", where="click"))


def test_esmm_learns_where_it_is_confidently_wrong() -> None:
    """-log(1 - s(a) s(b)) falls by s(a) s(b) (1 - s(a)) / (1 - s(a) s(b)): 1/2 at 20 and 20."""

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        return product_cross_entropy([a, b], jnp.zeros(1))[0]

    slopes = jax.grad(loss, argnums=(0, 1))(jnp.full(1, 20.0), jnp.full(1, 20.0))
    np.testing.assert_allclose(np.concatenate(slopes), [0.5, 0.5], rtol=1e-5)


# --- ESCM², Wang et al. 2022: "Entire Space Counterfactual Multi-Task Model"


def _escm2(**given: Any) -> ESCM2Towers:
    small: dict[str, Any] = {"expert_hidden": (4,), "tower_hidden": ()}
    return ESCM2(**(small | {"counterfactual_weight": 1.0} | given)).make(
        SIZES, dtype=FLOAT, rngs=nnx.Rngs(0)
    )


CLICKS = {"click": [(1, 1), (1, 1), (0, 1), (1, 1), (0, 0)]}  # label, known
ROWS: Any = CLICKS | {"buy": [(1, 1), (0, 1), (0, 0), (0, 0), (0, 0)], "stars": [(0, 0)] * 5}
PROBABILITIES = {
    "click": [0.5, 0.02, 0.25, 0.5, 0.5],
    "buy": [0.8, 0.75, 0.4, 0.5, 0.5],
    "stars": [0.5] * 5,
}
COUNTS = [1, 1, 1, 0, 0]  # not where no click is known, nor a click whose purchase is not


def test_escm2_weighs_clicks_by_their_propensity() -> None:
    """R_IPS = 1/|D| sum of o e(r, r^) / o^, over all impressions.

    p(click) = .5, .02, .25, the second raised to .1. Bought, r^ = .8: -log .8 / .5; not bought,
    r^ = .75: -log .25 / .1; not clicked: 0, and counted.
    """
    towers = _escm2(estimator="ipw", global_weight=0.0, least_propensity=0.1)
    found = _losses(towers, PROBABILITIES, **ROWS)
    assert found.keys() == {"buy"}
    value, counts = found["buy"]
    np.testing.assert_array_equal(counts, COUNTS)
    np.testing.assert_allclose(value[:3], [-2 * np.log(0.8), -10 * np.log(0.25), 0], rtol=1e-5)


def test_escm2_adds_the_risk_of_both_with_its_weight() -> None:
    """L = lambda_c R_CVR + lambda_g R_CTCVR: -log(.5 .8), -log(1 - .02 .75), -log(1 - .25 .4)."""
    plain = _losses(_escm2(global_weight=0.0), PROBABILITIES, **ROWS)["buy"][0]
    half = _escm2(global_weight=0.5, counterfactual_weight=3.0)
    both = _losses(half, PROBABILITIES, **ROWS)["buy"][0]
    whole = -np.log([0.4, 1 - 0.015, 0.9])
    np.testing.assert_allclose(both[:3] - 3 * plain[:3], 0.5 * whole, atol=1e-5)


def test_escm2_corrects_an_imputed_error_where_the_label_is_seen() -> None:
    """R_DR = 1/|D| sum of e^ + o (e - e^) / o^ + o (e - e^)^2 / o^.

    e = -log .8 = .2231 with weight 2, and -log .25 = 1.3863 with weight 10; e^ = .1, 1, .3.
    First: .1 + 2 (.1231) + 2 (.1231)^2 = .3766. Second: 1 + 10 (.3863) + 10 (.3863)^2 = 6.355.
    Not clicked: .3. With twice the weight of the last part: .0303 and 1.4922 more.
    """
    given: dict[str, Any] = {"estimator": "dr", "global_weight": 0.0, "least_propensity": 0.1}
    towers = _escm2(**given)
    imputed = {"imputed/buy": jnp.array([0.1, 1.0, 0.3, 0.0, 0.0])}
    value, counts = _losses(towers, PROBABILITIES, imputed, **ROWS)["buy"]
    np.testing.assert_array_equal(counts, COUNTS)
    np.testing.assert_allclose(value[:3], [0.37661, 6.35517, 0.3], rtol=1e-4)
    twice = _losses(_escm2(**given, imputation_weight=2.0), PROBABILITIES, imputed, **ROWS)
    np.testing.assert_allclose(twice["buy"][0][:3] - value[:3], [0.03033, 1.49223, 0], atol=1e-4)


def test_escm2_estimators_are_the_risk_over_everything_in_expectation() -> None:
    """Labels are seen with probability p: the mean of both cases is e itself, for `ipw` with right
    propensities, for `dr` with either right; both wrong, it is not."""
    error, right, wrong = np.array([0.7]), np.array([0.7]), np.array([0.2])

    def expected(estimate: Callable[[Any], Any], p: float, assumed: float) -> float:
        both = p * estimate(np.array([1 / assumed])) + (1 - p) * estimate(np.zeros(1))
        return float(both[0])

    def ipw(w: np.ndarray) -> np.ndarray:
        return np.asarray(inverse_propensity(jnp.array(error), jnp.array(w)))

    def dr(imputed: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda w: np.asarray(doubly_robust(*map(jnp.array, (error, imputed, w))))

    assert expected(ipw, 0.2, 0.2) == pytest.approx(0.7)
    assert expected(ipw, 0.2, 0.4) == pytest.approx(0.35)
    assert expected(dr(wrong), 0.2, 0.2) == pytest.approx(0.7)
    assert expected(dr(right), 0.2, 0.4) == pytest.approx(0.7)
    assert expected(dr(wrong), 0.2, 0.4) == pytest.approx(0.2 + 0.5 * 0.5)


@pytest.mark.parametrize("estimator", ["ipw", "dr"])
def test_escm2_takes_its_propensity_as_a_constant(estimator: Any) -> None:
    """By hand, clicked and bought at logits 0: e = log 2, w = 2. No slope to the click; to the
    purchase -2 (1/2) = -1 with `ipw`; with `dr` and e^ = log 2 - 1/4 in addition
    2 (2) (1/4) (-1/2) = -1/2, and to e^ itself 1 - 2 - 2 (2) (1/4) = -2."""
    towers = _escm2(estimator=estimator, global_weight=0.0)

    def total(logits: dict[str, jax.Array]) -> jax.Array:
        one = {"click": jnp.ones(1), "buy": jnp.ones(1)}
        value, counts = towers.losses(logits, one, one)["buy"]
        return jnp.sum(value * counts)

    given = {"click": jnp.zeros(1), "buy": jnp.zeros(1)}
    if estimator == "dr":
        given["imputed/buy"] = jnp.full(1, np.log(2) - 0.25)
    slopes = jax.grad(total)(given)
    expected = {"ipw": (0, -1), "dr": (0, -1.5)}[estimator]
    np.testing.assert_allclose([slopes["click"][0], slopes["buy"][0]], expected, rtol=1e-5)
    if estimator == "dr":
        np.testing.assert_allclose(slopes["imputed/buy"], [-2], rtol=1e-5)


def test_escm2_of_three_steps_is_seen_after_both() -> None:
    """The propensity of the purchase is p(click) p(cart | click) = .5 .4, hence e / .2."""
    sizes = SIZES._replace(
        tasks={
            "buy": TowerTask("binary", where="cart"),
            "cart": TowerTask("binary", where="click"),
            "click": TowerTask("binary"),
        }
    )
    options = ESCM2(expert_hidden=(4,), counterfactual_weight=1.0, global_weight=0.0)
    towers = options.make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))
    found = _losses(
        towers,
        {"click": [0.5] * 3, "cart": [0.4] * 3, "buy": [0.3] * 3},
        click=[(1, 1), (1, 1), (0, 1)],
        cart=[(1, 1), (0, 1), (0, 0)],
        buy=[(1, 1), (0, 0), (0, 0)],
    )
    np.testing.assert_allclose(found["cart"][0], [-2 * np.log(0.4), -2 * np.log(0.6), 0], rtol=1e-5)
    np.testing.assert_allclose(found["buy"][0], [-5 * np.log(0.3), 0, 0], rtol=1e-5)
    np.testing.assert_array_equal(found["buy"][1], [1, 1, 1])


def test_escm2_shows_propensities_and_imputed_errors() -> None:
    towers = _escm2(estimator="dr", least_propensity=0.4)
    found = towers(_pairs(X))
    click = 1 / (1 + np.exp(-np.asarray(found.logits["click"])))
    assert (click < 0.4).any()
    np.testing.assert_allclose(
        found.diagnostics["propensity/buy"], np.maximum(click, 0.4), rtol=1e-5
    )
    place = towers.heads.names.index("imputed/buy")
    hidden = _silu(_linear(towers.heads.towers[place].layers[0], X))
    raw = _linear(towers.heads.heads[place], hidden)[:, 0]
    np.testing.assert_allclose(found.diagnostics["imputed/buy"], np.log1p(np.exp(raw)), rtol=1e-4)
    assert found.logits.keys() == found.hidden.keys() == set(NAMES)


# --- AITM, Xi et al. 2021: "Modeling the Sequence Dependence among Audience Multi-step Conversions"


def _aitm(*steps: str, **tasks: TowerTask) -> AITMTowers:
    sizes = SIZES._replace(tasks=tasks or SIZES.tasks)
    options = AITM(steps=steps, expert_hidden=HIDDEN, tower_hidden=(), calibrator_weight=0.5)
    return options.make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))


def test_aitm_transfer_known_by_hand() -> None:
    """h1 = h2 = h3 = identity, p = 0 (a silu of 0), q = (a, a) with q . q / sqrt 2 = log 3: the
    softmax of (0, log 3) is (1/4, 3/4), and z = 3/4 q."""
    transfer = Transfer(2, dtype=FLOAT, rngs=nnx.Rngs(0))
    for layer in (transfer.value, transfer.key, transfer.query):
        layer.kernel[...] = jnp.eye(2)
    transfer.passed.layers[0].kernel[...] = jnp.zeros((2, 2))
    a = (np.log(3) / np.sqrt(2)) ** 0.5
    z, weights = transfer(jnp.array([[5.0, -7.0]]), jnp.full((1, 2), a))
    np.testing.assert_allclose(weights, [[0.25, 0.75]], rtol=1e-5)
    np.testing.assert_allclose(z, [[0.75 * a, 0.75 * a]], rtol=1e-5)


def test_aitm_passes_on_along_the_funnel() -> None:
    """z_click = q_click; z_t = AIT(g(z_(t-1)), q_t), here click -> cart -> buy, declared in another
    order; a task outside of the funnel keeps its q."""
    towers = _aitm(
        buy=TowerTask("binary", where="cart"),
        stars=TowerTask("regression", where="click"),
        click=TowerTask("binary"),
        cart=TowerTask("binary", where="click"),
    )
    found = towers(_pairs(X))
    z = {}
    for name, network in zip(towers.tasks, towers.networks, strict=True):
        z[name] = X
        for layer in network.layers:
            z[name] = _silu(_linear(layer, z[name]))
    transfers = dict(zip(("buy", "cart"), towers.transfers, strict=True))
    attention = {}
    for name, earlier in (("cart", "click"), ("buy", "cart")):
        transfer = transfers[name]
        passed = _silu(_linear(transfer.passed.layers[0], z[earlier]))
        both = np.stack([passed, z[name]], axis=1)
        agree = (_linear(transfer.key, both) * _linear(transfer.query, both)).sum(axis=-1)
        attention[name] = _softmax(agree / np.sqrt(HIDDEN[-1]))
        z[name] = (attention[name][:, :, None] * _linear(transfer.value, both)).sum(axis=1)
    for name, expected in z.items():
        np.testing.assert_allclose(found.hidden[name], expected, atol=1e-5)
    looks = found.diagnostics["attention"]
    np.testing.assert_allclose(looks[:, 0], attention["buy"], atol=1e-5)
    np.testing.assert_allclose(looks[:, 1], attention["cart"], atol=1e-5)


def test_aitm_predicts_the_conditional_probability_of_a_task_with_where() -> None:
    """The head says p(buy) and p(click) over all impressions; the task's logit is that of p(buy) /
    p(click), which the calibrator keeps below 1."""
    towers = _aitm()
    found = towers(_pairs(X))
    head = towers.heads.heads[2]
    marginal = _linear(head, np.asarray(found.hidden["buy"]))[:, 0]
    np.testing.assert_allclose(found.diagnostics["marginal/buy"], marginal, atol=1e-5)
    both, click = (1 / (1 + np.exp(-x)) for x in (marginal, np.asarray(found.logits["click"])))
    read = 1 / (1 + np.exp(-np.asarray(found.logits["buy"], np.float64)))
    assert (both < click).any()
    assert (both > click).any()
    np.testing.assert_allclose(read, np.minimum(both / click, 1), rtol=1e-4, atol=1e-5)


def test_aitm_learns_every_step_over_all_impressions_and_in_order() -> None:
    """Equations 6 to 8: cross-entropy of p(t) with y_t over all impressions, and
    alpha max(p(t) - p(t-1), 0) summed over the steps, here 1/2 (.7 - .4) and 0.

    Bought: -log .7; clicked and not bought: -log(1 - .2); not clicked: -log(1 - .1)."""
    towers = _aitm()
    marginal = jnp.array([_logit(p) for p in (0.7, 0.2, 0.1, 0.5)])
    found = _losses(
        towers,
        {"click": [0.4, 0.6, 0.1, 0.1], "buy": [0.5] * 4, "stars": [0.5] * 4},
        {"marginal/buy": marginal},
        click=[(1, 1), (1, 1), (0, 1), (0, 0)],
        buy=[(1, 1), (0, 1), (0, 0), (0, 0)],
        stars=[(0, 0)] * 4,
    )
    assert found.keys() == {"buy", "calibrator"}
    assert towers.extra_losses == ("calibrator",)
    assert towers.loss_inputs == ("marginal/buy",)
    value, counts = found["buy"]
    np.testing.assert_array_equal(counts, [1, 1, 1, 0])
    np.testing.assert_allclose(value[:3], -np.log([0.7, 0.8, 0.9]), rtol=1e-5)
    value, counts = found["calibrator"]
    np.testing.assert_array_equal(counts, [1, 1, 1, 0])
    np.testing.assert_allclose(value[:3], [0.15, 0, 0], atol=1e-6)
    slopes = jax.grad(later_above_earlier, (0, 1))(_logit(0.7), _logit(0.4))
    np.testing.assert_allclose(slopes, [0.7 * 0.3, -0.4 * 0.6], rtol=1e-5)  # both learn from it


def test_aitm_without_where_follows_its_steps() -> None:
    """Labels are about all impressions already: the tasks keep their own losses and logits. The
    order is that of the steps, not of the tasks; a task that is no step has no part.
    1/2 (max(.5 - .3, 0) + max(.6 - .5, 0)) = .15, and 1/2 (.1) where the order holds once."""
    names = ("like", "share", "view", "stay")
    tasks = {name: TowerTask("binary") for name in names}
    towers = _aitm("view", "stay", "share", **tasks)
    assert towers.before == {"stay": "view", "share": "stay"}
    found = _losses(
        towers,
        {"view": [0.3, 0.9], "stay": [0.5, 0.2], "share": [0.6, 0.3], "like": [0.99, 0.99]},
        like=[(1, 1), (1, 1)],
        view=[(1, 1), (0, 1)],
        stay=[(1, 1), (0, 1)],
        share=[(1, 1), (0, 1)],
    )
    assert found.keys() == {"calibrator"}
    np.testing.assert_allclose(found["calibrator"][0], [0.15, 0.05], rtol=1e-5)
    assert list(towers(_pairs(X)).diagnostics) == ["attention"]


@pytest.mark.parametrize(
    ("steps", "where", "text"),
    [
        ((), "", "where = .*steps = "),
        (("a", "stars"), "", "name two or more of the binary tasks"),
        (("a", "a"), "", "each once"),
        (("a",), "", "two or more"),
        (("a", "b"), "a", "tasks.b.where says the order already"),
    ],
)
def test_aitm_takes_no_order_of_steps_that_nobody_declared(
    steps: tuple[str, ...], where: str, text: str
) -> None:
    """Two binary tasks, such as two facts about a person, are no funnel by themselves."""
    tasks = {"a": TowerTask("binary"), "b": TowerTask("binary", where=where)}
    with pytest.raises(ConfigError, match=text):
        _aitm(*steps, **tasks, stars=TowerTask("regression"))


# --- HoME, Wang et al. 2024: "Hierarchy of Multi-Gate Experts"


def _home(**options: Any) -> HoMETowers:
    given = HoME(expert_hidden=HIDDEN, tower_hidden=(), rank=2, **options)
    return given.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))


def _seen(gate: FeatureGate, x: np.ndarray) -> np.ndarray:
    """x times the mixture of 2 sigmoid(x B A)."""
    weights = _softmax(_linear(gate.gate, x))
    total = np.zeros_like(x)
    for e, (down, up) in enumerate(zip(gate.down, gate.up, strict=True)):
        low = x @ np.asarray(down.kernel[...]) @ np.asarray(up.kernel[...])
        total += weights[:, e, None] * 2 / (1 + np.exp(-low))
    return x * total


def _set(experts: ExpertSet, x: np.ndarray) -> list[np.ndarray]:
    """swish(norm(dense(.)))."""
    found, seen = [], _seen(experts.feature_gate, x)
    for mlp, last, norm in zip(experts.mlps, experts.lasts, experts.norms, strict=True):
        h = seen
        for layer in mlp.layers:
            h = _silu(_linear(layer, h))
        h = _linear(last, h)
        h = (h - h.mean(axis=-1, keepdims=True)) / np.sqrt(h.var(axis=-1, keepdims=True) + 1e-6)
        found.append(_silu(h * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])))
    return found


def _handed(gate: SelfGate, x: np.ndarray, experts: list[np.ndarray]) -> np.ndarray:
    """By a softmax of the set's own experts, by a sigmoid of a single one."""
    scores = _linear(gate.gate, x)
    return _mix(1 / (1 + np.exp(-scores)) if len(experts) == 1 else _softmax(scores), experts)


def test_home_equals_its_two_levels_written_out() -> None:
    """Groups (click, buy) and (stars). Meta: z_g mixes the group's and the shared experts, z_s all
    of them, each with its self gate. Tasks: a gate on [z_g, z_s] mixes experts of the task and of
    the group on z_g and shared ones on z_s, with a self gate of the task's own."""
    towers = _home()
    hidden, gates = _run(towers)
    meta, shared = [_set(experts, X) for experts in towers.meta], _set(towers.meta_shared, X)
    gate_shared = _softmax(_linear(towers.gate_shared, X))
    np.testing.assert_allclose(gates["gate_shared"], gate_shared, atol=1e-5)
    z_s = _mix(gate_shared, meta[0] + meta[1] + shared) + _handed(towers.meta_self[2], X, shared)
    z = []
    for g in range(2):
        gate = _softmax(_linear(towers.meta_gates[g], X))
        np.testing.assert_allclose(gates["gates_meta"][:, g], gate, atol=1e-5)
        z.append(_mix(gate, meta[g] + shared) + _handed(towers.meta_self[g], X, meta[g]))
    for t, g in enumerate((0, 1, 0)):  # click, stars, buy
        gate = _softmax(_linear(towers.gates[t], np.concatenate([z[g], z_s], axis=1)))
        np.testing.assert_allclose(gates["gates"][:, t], gate, atol=1e-4)
        mine = _set(towers.own[t], z[g])
        everyone = mine + _set(towers.groups[g], z[g]) + _set(towers.shared, z_s)
        expected = _mix(gate, everyone) + _handed(towers.own_self[t], z[g], mine)
        np.testing.assert_allclose(hidden[t], expected, atol=1e-4)


def test_home_feature_gate_begins_as_it_is_without_its_matrices() -> None:
    """2 sigmoid(0) = 1; with x = 1, B = log 3 and A = 1, 2 sigmoid(log 3) = 3/2; both halved by a
    gate of (1/2, 1/2)."""
    gate = FeatureGate(2, 1, 1, dtype=FLOAT, rngs=nnx.Rngs(0))
    gate.gate.kernel[...] = jnp.zeros((1, 2))
    for e, low in enumerate((0.0, np.log(3))):
        gate.down[e].kernel[...] = jnp.full((1, 1), low)
        gate.up[e].kernel[...] = jnp.ones((1, 1))
    np.testing.assert_allclose(gate(jnp.ones((1, 1))), [[(1 + 1.5) / 2]], rtol=1e-6)


def _disturb_set(experts: ExpertSet) -> None:
    layer = experts.lasts[0]
    noise = np.random.default_rng(9).normal(size=layer.kernel.shape)
    layer.kernel[...] = layer.kernel[...] + jnp.asarray(noise, FLOAT)


def test_home_hides_other_groups_experts() -> None:
    """Behind the meta level a group's experts move its own tasks alone; on it they move the other
    group through the experts of all, and not once the gate of all is closed to them."""
    towers = _home()
    for g, own in enumerate(([True, False, True], [False, True, False])):
        moved = _moved(towers, lambda g=g: _disturb_set(towers.groups[g]))  # type: ignore[misc]
        np.testing.assert_array_equal(moved > 0, own)
    assert (_moved(towers, lambda: _disturb_set(towers.shared)) > 1e-4).all()
    assert (_moved(towers, lambda: _disturb_set(towers.meta[1])) > 1e-5).all()
    towers.gate_shared.bias[...] = jnp.zeros(6).at[2:4].set(-1e9)  # the second group's
    moved = _moved(towers, lambda: _disturb_set(towers.meta[1]))
    np.testing.assert_array_equal(moved > 0, [False, True, False])


def test_home_takes_groups_by_name() -> None:
    assert _home(groups=(("stars", "buy"), ("click",))).group_of == (1, 0, 0)
    for groups in ((("click", "buy"),), (("click", "buy", "stars"), ("buy",))):
        with pytest.raises(ConfigError, match=r"towers\.groups: (stars|buy): name each of click"):
            _home(groups=groups)


# --- All of them, in a step

SMALL: dict[str, dict[str, Any]] = {
    "mmoe": {"experts": 2},
    "ple": {"experts": 1},
    "home": {"experts": 1, "rank": 2},
    "escm2": {"estimator": "dr"},
}


def _impressions(size: int) -> Batch:
    """Single rows of a funnel."""
    rng = np.random.default_rng(3)
    click, shape = rng.integers(0, 2, (size, 1)), (size, 1)
    labels = {"click": click, "buy": click * (rng.random(shape) < 0.5)}
    known = {"click": np.ones(shape), "buy": click}
    none = np.zeros(shape, np.int32)
    request = {
        "ids": rng.integers(0, 6, (size, 1, 1)).astype(np.int32),
        "numbers": rng.normal(size=(size, 1, 1)).astype(np.float32),
    }
    return Batch(
        context={},
        request=request,
        events={},
        cutoff=none,
        candidate=none,
        labels={name: values.astype(np.float32) for name, values in labels.items()},
        mask={name: values.astype(np.float32) for name, values in known.items()},
        user=none[:, 0],
        weight=np.ones(shape, np.float32),
        row=None,
    )


def _rows_model(**model: Any) -> Model:
    return make_model(*_rows(model))


def _rows(
    model: dict[str, Any], balance: str = "static", features: Sequence[str] = ("hour", "discount")
) -> tuple[Experiment, Manifest]:
    """Of a funnel without users and items."""
    declared = parse_experiment(
        {
            "name": "rows",
            "split": {"kind": "random"},
            "features": {name: tiny.FEATURES[name] for name in features},
            "tasks": {"click": "binary", "buy": {"kind": "binary", "where": "click"}},
            "model": {"width": 4, "dropout": 0.0, "fusion": "none"} | model,
            "train": {"steps": 1, "balance": balance},
        }
    )
    nothing: dict[str, Any] = dict.fromkeys(("context_ids", "context_numbers", "item_ids"), ())
    nothing |= dict.fromkeys(("item_numbers", "history"), ())
    nothing |= {"items": 0, "trained_items": 0, "history_length": 0}
    if "hour" not in features:
        nothing["request_ids"] = ()
    learned = {"click": TaskField(), "buy": TaskField()}
    return declared, dataclasses.replace(tiny.manifest(), tasks=learned, **nothing)


def test_members_are_refused_where_losses_need_more_than_logits() -> None:
    """What a member adds to a logit would not be in p(buy), which the tower says beside it."""
    with pytest.raises(ConfigError, match=r"members: 2, .* 'aitm' read more than the logits"):
        _rows_model(towers="aitm", members=2)


_SLOW = {"home": pytest.mark.slow}  # a program of hundreds of small layers


_AT = [n for n, options in BALANCERS.items() if hasattr(options(), "at")]
_PLACED: list[tuple[str, At]] = [
    *((name, "representation") for name in BALANCERS),
    *((name, "parameters") for name in _AT),
]
_TURNS = itertools.cycle(_PLACED[1:])  # behind static weights


@pytest.mark.parametrize(
    ("kind", "balances"),
    [
        *(
            pytest.param(k, [b], marks=_SLOW.get(k, ()))
            for k, b in zip(TOWERS, _TURNS, strict=False)
        ),
        *(pytest.param(kind, _PLACED[1:], marks=pytest.mark.slow) for kind in TOWERS),
    ],
)
def test_every_kind_learns_with_static_weights_and_other_balancing(
    kind: str, balances: list[tuple[str, At]]
) -> None:
    """Through the model's own losses: a small step along what the balancer makes of them lowers
    their sum, and reaches every layer. Balancers take turns; slow: all pairs, many programs."""
    towers = {"kind": kind, "expert_hidden": [4], "tower_hidden": []} | SMALL.get(kind, {})
    if kind == "pepnet":  # layers of the tasks are all that it has
        towers = {"kind": kind, "domain": ["hour"], "gate_hidden": 8, "tower_hidden": [4]}
    model, key, mesh = _rows_model(towers=towers), jax.random.key(0), make_mesh((1, 1))
    assert model.names == ("click", "buy", *(["calibrator"] if kind == "aitm" else []))
    batch, catalogue = _impressions(16), tiny.catalogue()
    stacks = initial_stacks(model.layout, key, FLOAT, low=False)
    wanted = model.ids(batch, catalogue, None)
    rows = fetch(model.layout, stacks, wanted.ids)
    ones = jnp.ones(len(model.names))
    extra = len(model.names) - len(model.tasks)
    balancers = {
        (name, at): beside(made.make(ones[:2]), extra)
        for name, at in (_PLACED[0], *balances)
        for made in (BALANCERS[name](at=at) if name in _AT else BALANCERS[name](),)
    }

    @jax.jit
    def step(network: Any) -> tuple[jax.Array, dict[tuple[str, At], Any]]:
        weights = model.weights(batch, jnp.asarray(batch.weight))
        given = Given(network, rows, batch, wanted, draw(key, batch))
        slopes, losses, start = {}, ones, {"network": network}
        for (name, at), balancer in balancers.items():
            back = backward(model, given, catalogue, weights, 1, mesh, lambda to_rows: {}, at)
            found, _ = balancer.combine(back.pullback, ones > 0, balancer.init(start), key)
            slopes[name, at] = back.finish(found)[0]["network"]
            losses = found.losses if name == "static" else losses
        return losses, slopes

    network = model.init(0)["network"]
    losses, slopes = step(network)
    for balance in balancers:
        moved = jax.tree.map(lambda p, g: p - 0.01 * g, network, slopes[balance])
        assert step(moved)[0].sum() < losses.sum() - 1e-5, balance
    assert all(np.abs(slope).max() > 0 for slope in jax.tree.leaves(slopes[_PLACED[0]]))


# --- Position bias in losses that read more than the logits


def _taught(
    model: Model, biases: list[float], key: jax.Array | None = None
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Sums of the losses with a constant of each task that the bias tower adds, and what the towers
    say without it."""
    batch, catalogue = _impressions(16)._replace(weights=WORTH), tiny.catalogue()
    stacks = initial_stacks(model.layout, jax.random.key(0), FLOAT, low=False)
    wanted = model.ids(batch, catalogue, None)
    params, rows = model.init(0), fetch(model.layout, stacks, wanted.ids)
    bias = params["network"]["bias"]
    head = {"kernel": bias["head"]["kernel"] * 0, "bias": jnp.array(biases)}
    params = {"network": params["network"] | {"bias": bias | {"head": head}}}

    def run(rows: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        shared = model.encode(params, rows, batch, catalogue, wanted, None)
        said = model.score(params, states_of(shared, batch), None)
        sums = model.losses(params, shared, batch, catalogue, wanted, key)[0]
        return sums, said.logits | said.diagnostics

    return jax.jit(run)(rows)


_AITM = {"kind": "aitm", "expert_hidden": [4], "tower_hidden": []}
WORTH = {"buy": np.arange(16, dtype=np.float32)[:, None] / 8}  # of each example's purchase


def test_aitm_adds_the_bias_to_what_it_teaches() -> None:
    """With b added to the logits m of p(click) and p(buy) over all impressions, the losses are the
    cross-entropies of m + b, and the calibrator compares both with it. Each purchase counts as its
    weight says."""
    bias = {"features": ["discount"], "dropout": 0.0, "hidden": []}
    biases, batch = [0.5, -1.0], _impressions(16)
    model = _rows_model(towers=_AITM, bias=bias)
    sums, said = _taught(model, biases)
    p = {}
    for place, (task, name) in enumerate((("click", "click"), ("buy", "marginal/buy"))):
        logit, label = np.asarray(said[name], np.float64) + biases[place], batch.labels[task]
        p[task] = 1 / (1 + np.exp(-logit))
        loss = -np.log(np.where(label > 0, p[task], 1 - p[task])) * WORTH.get(task, 1)
        np.testing.assert_allclose(sums[task], loss.sum(), rtol=1e-5)
    calibrator = 0.6 * np.maximum(p["buy"] - p["click"], 0).sum()
    np.testing.assert_allclose(sums["calibrator"], calibrator, rtol=1e-4)
    divided = model.weights(batch._replace(weights=WORTH), jnp.asarray(batch.weight))
    assert (float(divided["buy"]), float(divided["click"])) == (WORTH["buy"].sum(), 16)

    silent = _rows_model(towers=_AITM, bias=bias | {"dropout": 1 - 1e-7})
    heard = _taught(silent, biases, jax.random.key(1))[0]
    without = _taught(silent, [0.0, 0.0])[0]
    for name in ("click", "buy", "calibrator"):
        np.testing.assert_allclose(heard[name], without[name], rtol=1e-6)


def test_the_bias_is_silent_by_a_draw_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members and the bias tower fold numbers into one key, each another one."""
    numbers, real = list[int](), jax.random.fold_in

    def fold_in(key: jax.Array, number: Any) -> jax.Array:
        numbers.extend([number] * isinstance(number, int))  # those of initial values are counters
        return real(key, number)

    towers = {"kind": "shared_bottom", "expert_hidden": [4], "tower_hidden": []}
    ensemble = {"members": 3, "members_share": "encoder", "dropout": 0.1, "towers": towers}
    model = _rows_model(bias={"features": ["discount"]}, **ensemble)
    monkeypatch.setattr(jax.random, "fold_in", fold_in)
    jax.eval_shape(lambda: _taught(model, [0.0, 0.0], jax.random.key(7)))
    assert {1, 2} < set(numbers)
    assert len(set(numbers)) == len(numbers)


def test_the_calibrator_is_no_task_of_the_balancing() -> None:
    """A step of AITM keeps variances of its two tasks alone; and at the parameters, what the
    calibrator shares with a single task, such as the head of the purchase, is compared with
    nothing."""
    declared, learned = _rows({"towers": _AITM}, "uncertainty")
    model, mesh, key = make_model(declared, learned), make_mesh((1, 1)), jax.random.key(0)
    assert make_step(declared, model, mesh, 1).abstract.balance.shape == (2,)
    batch, catalogue = _impressions(16), tiny.catalogue()
    wanted = model.ids(batch, catalogue, None)
    rows = fetch(model.layout, initial_stacks(model.layout, key, FLOAT, low=False), wanted.ids)

    @jax.jit
    def run(network: Any) -> Any:
        given = Given(network, rows, batch, wanted, draw(key, batch))
        weights = model.weights(batch, jnp.asarray(batch.weight))
        taken = given, catalogue, weights, 1, mesh
        back = backward(model, *taken, lambda to_rows: {}, "parameters")
        found = back.pullback(np.array([1.0, 1.0, 1.0]))
        return found.shared["network"]["towers"], found.heads["network"]["towers"]

    shared, own = run(model.init(0)["network"])
    head = model.names.index("buy")
    assert not shared["heads"]["heads"][head]["kernel"].any()
    assert np.abs(own["heads"]["heads"][head]["kernel"]).max() > 0
    assert (
        np.abs(shared["networks"][0]["layers"][0]["kernel"]).max() > 0
    )  # of the click, read by buy


@pytest.mark.parametrize("features", [("hour", "discount"), ("discount",)])
def test_what_stem_keeps_apart_is_compared_with_nothing(features: Sequence[str]) -> None:
    """At the parameters: experts and dense tables of a task, and what encodes their rows and its
    numbers, whose gradient is its own although all tasks read them."""
    towers = {"kind": "stem", "expert_hidden": [4], "tower_hidden": []}
    declared = _rows({"towers": towers, "numbers": "periodic"}, features=features)
    model, mesh, key = make_model(*declared), make_mesh((1, 1)), jax.random.key(0)
    batch, catalogue = _impressions(16), tiny.catalogue()
    if "hour" not in features:
        batch = batch._replace(request={"numbers": batch.request["numbers"]})
    wanted = model.ids(batch, catalogue, None)
    rows = fetch(model.layout, initial_stacks(model.layout, key, FLOAT, low=False), wanted.ids)

    @jax.jit
    def run(network: Any) -> Any:
        weights = model.weights(batch, jnp.asarray(batch.weight))
        given = Given(network, rows, batch, wanted, draw(key, batch))
        taken = given, catalogue, weights, 1, mesh
        back = backward(model, *taken, lambda to_rows: to_rows, "parameters")
        found = back.pullback(np.array([1.0, 1.0]))
        return found.shared, found.heads

    shared, own = run(model.init(0)["network"])
    for part, of_several in ((shared, True), (own, False)):
        towers, encoded = part["network"]["towers"], part["network"]["own_request"]
        found = {"": [part.get("request"), towers["shared"], part["network"]["request"]]}
        for number, task in enumerate(model.names):
            found[task] = [part.get(f"request:{task}"), towers["own"][number], encoded[number]]
        for name, parts in found.items():
            for leaf in jax.tree.leaves(parts):
                assert np.any(leaf) == (of_several == (name == "")), name
