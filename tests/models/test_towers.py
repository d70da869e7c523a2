"""Shared-bottom, MMoE, PLE and ESMM: the wiring of the papers, on cases worked out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.towers import TOWERS, TowerInput, TowerSizes, TowerTask
from mtrec_jax.models.towers.esmm import ESMM, ESMMTowers, product_cross_entropy
from mtrec_jax.models.towers.mmoe import MMoE, MMoETowers
from mtrec_jax.models.towers.ple import PLE, PLETowers
from mtrec_jax.models.towers.shared_bottom import SharedBottom, SharedBottomTowers

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
    none = jnp.zeros((N, 0))
    return TowerInput(jnp.asarray(x), none, none, none, none)


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


def _experts(experts: Any, x: np.ndarray) -> list[np.ndarray]:
    found = []
    for mlp, norm in zip(experts.mlps, experts.norms, strict=True):
        h = x
        for layer in mlp.layers:
            h = _linear(layer, h)
            h = h / (1 + np.exp(-h))
        h = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + 1e-6)
        found.append(h * np.asarray(norm.scale[...]))
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


def _ple() -> PLETowers:
    options = PLE(experts=SHARED, task_experts=OWN, expert_hidden=HIDDEN, tower_hidden=())
    return options.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))


def _mmoe(experts: int) -> MMoETowers:
    options = MMoE(experts=experts, expert_hidden=HIDDEN, tower_hidden=())
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


def test_mmoe_gate_is_a_softmax_over_all_experts_for_each_task() -> None:
    towers = _mmoe(4)
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


def test_ple_equals_the_two_levels_written_out() -> None:
    towers = _ple()
    hidden, gates = _run(towers)
    shared, own = _experts(towers.shared_1, X), _experts(towers.own_1, X)
    everyone = own + shared
    shared_gate = _softmax(_linear(towers.gate_shared_1, X))
    assert shared_gate.shape == (N, TASKS * OWN + SHARED)
    np.testing.assert_allclose(gates["gate_shared"], shared_gate, atol=1e-6)
    shared_2 = _experts(towers.shared_2, _mix(shared_gate, everyone))
    gate_1 = _softmax(_linear(towers.gate_tasks_1, X).reshape(N, TASKS, OWN + SHARED))
    np.testing.assert_allclose(gates["gates"], gate_1, atol=1e-6)
    for t in range(TASKS):
        mixture = _mix(gate_1[:, t], own[t * OWN : (t + 1) * OWN] + shared)
        gate_2 = _softmax(_linear(towers.gate_2[t], mixture))
        np.testing.assert_allclose(gates["gates_2"][:, t], gate_2, atol=1e-5)
        expected = _mix(gate_2, _experts(towers.own_2[t], mixture) + shared_2)
        np.testing.assert_allclose(hidden[t], expected, atol=1e-5)


def _second_level_reads_only(towers: PLETowers, part: str) -> None:
    """Close the second level's gates to the task's own or to the shared experts."""
    closed = slice(0, OWN) if part == "shared" else slice(OWN, None)
    for gate in towers.gate_2:
        gate.kernel[...] = jnp.zeros_like(gate.kernel[...])
        gate.bias[...] = jnp.zeros(OWN + SHARED).at[closed].set(-1e9)


def test_ple_task_mixture_sees_own_and_shared_experts_only() -> None:
    towers = _ple()
    _second_level_reads_only(towers, "own")
    for t in range(TASKS):
        for e in range(OWN):
            moved = _moved(towers, lambda e=t * OWN + e: _disturb(towers.own_1, e))  # type: ignore[misc]
            assert moved[t] > 1e-3
            assert (np.delete(moved, t) == 0).all()
    for e in range(SHARED):
        assert (_moved(towers, lambda e=e: _disturb(towers.shared_1, e)) > 1e-3).all()  # type: ignore[misc]


def test_ple_shared_mixture_sees_every_expert() -> None:
    towers = _ple()
    _second_level_reads_only(towers, "shared")
    for experts, count in ((towers.own_1, TASKS * OWN), (towers.shared_1, SHARED)):
        for e in range(count):
            moved = _moved(towers, lambda experts=experts, e=e: _disturb(experts, e))  # type: ignore[misc]
            assert (moved > 1e-3).all()


def test_ple_second_level_keeps_the_tasks_apart() -> None:
    towers = _ple()
    for t in range(TASKS):
        moved = _moved(towers, lambda t=t: _disturb(towers.own_2[t], 0))  # type: ignore[misc]
        assert moved[t] > 1e-3
        assert (np.delete(moved, t) == 0).all()
    assert (_moved(towers, lambda: _disturb(towers.shared_2, 0)) > 1e-3).all()


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
    towers = TOWERS[kind]().make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    found = towers(_pairs(X))
    assert set(found.logits) == set(found.hidden) == set(NAMES)
    assert all(logits.shape == (N,) for logits in found.logits.values())
    assert len({hidden.shape for hidden in found.hidden.values()}) == 1
    assert all(len(gates) == N for gates in found.diagnostics.values())


# --- ESMM, Ma et al. 2018: "Entire Space Multi-Task Model"


def _esmm(**tasks: TowerTask) -> ESMMTowers:
    sizes = SIZES._replace(tasks=tasks or SIZES.tasks)
    return ESMM(expert_hidden=(4,)).make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def _losses(
    towers: ESMMTowers, probabilities: dict[str, list[float]], **rows: list[tuple[int, int]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`rows` holds (label, mask) of each task at each impression."""
    logits = {t: jnp.array([_logit(p) for p in ps]) for t, ps in probabilities.items()}
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
