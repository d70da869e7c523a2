"""Shared-bottom, MMoE and PLE: the wiring of the papers, on cases worked out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.models.towers.towers import PLE, MMoE, SharedBottom

N, INPUTS, TASKS, SHARED, OWN, HIDDEN = 7, 5, 3, 2, 2, (4, 3)
FLOAT = jnp.dtype("float32")
X = np.random.default_rng(0).normal(size=(N, INPUTS)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _call(graph: Any, state: Any, x: Any) -> Any:
    return nnx.merge(graph, state)(x)


def _run(towers: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    hidden, gates = _call(*nnx.split(towers), X)
    return np.stack(hidden), {name: np.asarray(gate) for name, gate in gates.items()}


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


def _ple() -> PLE:
    return PLE(INPUTS, TASKS, SHARED, OWN, HIDDEN, dtype=FLOAT, rngs=nnx.Rngs(0))


def test_shared_bottom_gives_every_task_the_same_network() -> None:
    towers = SharedBottom(INPUTS, TASKS, HIDDEN, dtype=FLOAT, rngs=nnx.Rngs(0))
    hidden, gates = _run(towers)
    expected = X
    for layer in towers.bottom.layers:
        expected = _linear(layer, expected)
        expected = expected / (1 + np.exp(-expected))
    np.testing.assert_allclose(hidden, np.stack([expected] * TASKS), atol=1e-6)
    assert gates == {}


def test_mmoe_gate_is_a_softmax_over_all_experts_for_each_task() -> None:
    towers = MMoE(INPUTS, TASKS, 4, HIDDEN, dtype=FLOAT, rngs=nnx.Rngs(0))
    hidden, gates = _run(towers)
    expected = _softmax(_linear(towers.gate, X).reshape(N, TASKS, 4))
    np.testing.assert_allclose(gates["gates"], expected, atol=1e-6)
    experts = _experts(towers.experts, X)
    for t in range(TASKS):
        np.testing.assert_allclose(hidden[t], _mix(expected[:, t], experts), atol=1e-5)
    for e in range(4):
        assert (_moved(towers, lambda e=e: _disturb(towers.experts, e)) > 1e-3).all()  # type: ignore[misc]


def test_mmoe_gates_known_by_hand() -> None:
    towers = MMoE(INPUTS, 2, 2, HIDDEN, dtype=FLOAT, rngs=nnx.Rngs(0))
    towers.gate.kernel[...] = jnp.zeros((INPUTS, 4))
    towers.gate.bias[...] = jnp.log(jnp.array([1.0, 3.0, 9.0, 1.0]))
    hidden, gates = _run(towers)
    np.testing.assert_allclose(gates["gates"][0], [[0.25, 0.75], [0.9, 0.1]], atol=1e-6)
    a, b = _experts(towers.experts, X)
    np.testing.assert_allclose(hidden, [0.25 * a + 0.75 * b, 0.9 * a + 0.1 * b], atol=1e-5)


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


def _second_level_reads_only(towers: PLE, part: str) -> None:
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
