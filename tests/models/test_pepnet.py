"""PEPNet, Chang et al., KDD 2023: the gates of its equations, and what they let back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.errors import ConfigError
from mtrec_jax.losses.negatives.catalogue import Uniform
from mtrec_jax.models.inputs import find_ids, make_inputs
from mtrec_jax.models.model import _batch_items, make_model
from mtrec_jax.models.network import Network
from mtrec_jax.models.towers import TowerInput, TowerSizes, TowerTask
from mtrec_jax.models.towers.pepnet import GateUnit, PEPNet, PEPNetTowers
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.train.step import make_step
from mtrec_jax.types import Batch
from tests import tiny

N, INPUTS, D, GATE, HIDDEN = 5, 6, 3, 4, (7, 2)
FLOAT, KEY = jnp.dtype("float32"), jax.random.key(0)
RNG = np.random.default_rng(0)
X, SCENE, AUTHOR, USER, ITEM = (
    RNG.normal(size=(N, width)).astype(np.float32) for width in (INPUTS, D, D, D, D)
)
SIZES = TowerSizes(
    inputs=INPUTS,
    context=0,
    request=0,
    width=D,
    tasks={"click": TowerTask("binary"), "genre": TowerTask("multiclass", outputs=3)},
    features={"scene": D, "author": D},
)


def _towers(**options: Any) -> PEPNetTowers:
    chosen = PEPNet(gate_hidden=GATE, tower_hidden=HIDDEN, **options)
    return chosen.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))


def _given(**other: Any) -> TowerInput:
    none, features = jnp.zeros((N, 0)), {"scene": SCENE, "author": AUTHOR}
    known = {"x": X, "user": USER, "item": ITEM, "features": features} | other
    parts = {name: jax.tree.map(jnp.asarray, part) for name, part in known.items()}
    return TowerInput(context=none, request=none, **parts)


def _linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _gate(unit: GateUnit | None, x: np.ndarray) -> np.ndarray:
    """Equation 1: relu, then gamma sigmoid with gamma = 2."""
    assert unit is not None
    return 2 * _sigmoid(_linear(unit.second, np.maximum(_linear(unit.first, x), 0)))


def _by_hand(towers: PEPNetTowers, domain: Any, prior: np.ndarray) -> dict[str, np.ndarray]:
    """Equations 2 to 6: everything that the network holds, by name."""
    found = {"scale_input": np.ones_like(X)}
    if domain is not None:
        found["scale_input"] = _gate(towers.gate, np.concatenate([domain, X], axis=1))
    x = found["scale_input"] * X
    told, hidden = np.concatenate([prior, x], axis=1), [x, x]
    for number, width in enumerate(HIDDEN):
        gates = _gate(towers.gates[number], told).reshape(N, 2, width)
        found[f"scales_{number + 1}"] = gates
        for t in range(2):
            z = _linear(towers.layers[number][t], hidden[t])
            hidden[t] = gates[:, t] * z * _sigmoid(z)
    for t, name in enumerate(SIZES.tasks):
        found[name] = _linear(towers.heads[t], hidden[t])
    return found


@pytest.mark.parametrize("declared", [True, False])
def test_gates_and_layers_are_those_of_the_paper(declared: bool) -> None:
    """Without a domain the input is not gated; without priors user and item are."""
    towers = _towers(domain=("scene",), priors=("author", "scene")) if declared else _towers()
    found = jax.jit(lambda given: towers(given))(_given())
    prior = np.concatenate([AUTHOR, SCENE] if declared else [USER, ITEM], axis=1)
    expected = _by_hand(towers, SCENE if declared else None, prior)
    named = {"click": found.logits["click"][:, None], "genre": found.logits["genre"]}
    assert ("scale_input" in found.diagnostics) == declared
    for name, values in (found.diagnostics | named).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert found.diagnostics["scales_1"].shape == (N, 2, 7)
    assert found.diagnostics["scales_1"].std() > 0.01


def test_the_input_learns_from_what_it_says_and_not_from_how_it_gates() -> None:
    """dy/dx with both gates held as they are: from the head back, w * g2 act'(z2) W2 g1 act'(z1) W1
    g0; a gate that let the gradient through would add to it. Scene and author learn through gates
    alone."""
    towers = _towers(domain=("scene",), priors=("author",))

    def total(given: TowerInput) -> jax.Array:
        return jnp.sum(towers(given).logits["click"])

    slope = jax.jit(jax.grad(total))(_given())
    known = _by_hand(towers, SCENE, AUTHOR)
    hidden, slopes = known["scale_input"] * X, []
    for number in range(2):
        z = _linear(towers.layers[number][0], hidden)
        gate, s = known[f"scales_{number + 1}"][:, 0], _sigmoid(z)
        hidden = gate * z * s
        slopes.append(gate * (s + z * s * (1 - s)))
    back = np.broadcast_to(np.asarray(towers.heads[0].kernel[...])[:, 0], (N, HIDDEN[-1]))
    for number in (1, 0):
        back = (back * slopes[number]) @ np.asarray(towers.layers[number][0].kernel[...]).T
    np.testing.assert_allclose(slope.x, back * known["scale_input"], rtol=1e-3, atol=1e-5)
    assert all(np.abs(slope.features[name]).max() > 1e-4 for name in ("scene", "author"))
    np.testing.assert_array_equal(slope.user, 0)  # it is no prior here


def test_priors_are_features_with_an_embedding_of_any_side() -> None:
    """By their place among those of their side; the bias has none that others could read."""
    kind = {"kind": "pepnet", "domain": ["hour"], "priors": ["tags", "brand", "hour"]}
    declared = tiny.experiment(model={"towers": kind})
    found = make_inputs(declared, tiny.manifest())
    assert found.read == {"hour": ("request", 0), "tags": ("context", 1), "brand": ("item", 0)}
    for name in ("price", "hour"):  # a number; what the bias tower alone may read
        towers = dataclasses.replace(declared.model.towers, priors=(name,), domain=())
        model = tiny.experiment(model={"bias": {"features": ["hour"]}}).model
        wrong = dataclasses.replace(declared, model=dataclasses.replace(model, towers=towers))
        with pytest.raises(ConfigError, match=rf"reads '{name}'.* segment, tags, brand"):
            make_inputs(wrong, tiny.manifest())


def test_the_items_features_stand_behind_what_retrieval_compares() -> None:
    """Those of the priors, in their order, of candidates and negatives: a row of 2 for each brand
    that is 2, and so on, behind the items' own, here without their features."""
    kind = {"kind": "pepnet", "priors": ["segment", "brand"]}
    inputs = make_inputs(tiny.experiment(model={"towers": kind}), tiny.manifest())
    layers, examples, catalogue = object.__new__(Network), tiny.batch(1), tiny.catalogue()
    object.__setattr__(layers, "items", lambda own, *of_features: own)

    @jax.jit
    def run(examples: Batch) -> Any:
        wanted = find_ids(inputs, examples, catalogue, Uniform(count=6), KEY)
        rows = {g: jnp.repeat(of.astype(FLOAT)[..., None], 8, -1) for g, of in wanted.ids.items()}
        return wanted, _batch_items(layers, inputs, rows, examples, catalogue, wanted)

    wanted, found = run(examples._replace(row=None))
    assert found[0].shape == (8, tiny.HISTORY, 8)
    for vectors, ids in zip(found[1:], (examples.candidate, wanted.negatives), strict=True):
        expected = np.stack([catalogue.row[ids], catalogue.ids[ids][..., 0]], axis=-1)
        np.testing.assert_array_equal(vectors, np.repeat(expected, 8, axis=-1))


@pytest.mark.slow
def test_a_step_teaches_the_gates() -> None:
    """With the hour as the scene and the brand as the author, on a batch that is seen again and
    again. Slow: it compiles a step."""
    kind = {"kind": "pepnet", "domain": ["hour"], "priors": ["segment", "brand"]}
    declared, learned, examples = tiny.without_history(
        model={"towers": kind | {"gate_hidden": 4, "tower_hidden": [6]}, "fusion": "none"},
        train={"learning_rate": 0.01},
    )
    model, mesh = make_model(declared, learned), make_mesh((1, 1))
    step, items = make_step(declared, model, mesh, 20), replicate(tiny.catalogue(), mesh)
    state, placed, sums = step.init(0), put_batch(examples, mesh), list[Any]()
    gates = state.params["network"]["towers"]["gates"]
    before = jax.tree.map(np.asarray, gates)
    for _ in range(20):
        state = step.update(state, placed, items)
        sums.append([state.sums[name][0] for name in ("click", "stars", "genre")])
    losses = np.diff(np.array(sums), axis=0)
    assert (losses[-4:].mean(axis=0) < 0.9 * losses[:4].mean(axis=0)).all()
    after = state.params["network"]["towers"]["gates"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, after, before)
    assert all(jax.tree.leaves(moved))
