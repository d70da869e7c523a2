"""Members of an ensemble in one model: what each says, what all say, and what they learn from."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.errors import ConfigError
from mtrec_jax.losses.tasks import TaskField
from mtrec_jax.models.inputs import Inputs, make_inputs, own_name
from mtrec_jax.models.members import Members, mean_answer, together
from mtrec_jax.models.model import Model, make_model
from mtrec_jax.models.objective import make_objective
from mtrec_jax.models.towers import TOWERS, TowerOutput, TowerTask
from mtrec_jax.tables.layout import initial_stacks, make_layout
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.types import Outputs, Shared, Wanted
from tests import tiny
from tests.models.test_network import made
from tests.models.test_towers import FLOAT, NAMES, SIZES, X, _pairs

K = 2


def test_the_answer_is_the_mean_of_probabilities() -> None:
    """.5 and .9 are .7 together, not the .75 of the mean logit; classes (.5, .5) and (.9, .1) are
    (.7, .3); numbers are averaged themselves."""
    logits = jnp.array([[0.0, math.log(9)]])
    np.testing.assert_allclose(jax.nn.sigmoid(mean_answer("binary", logits)), [0.7], rtol=1e-6)
    sure = jnp.array([[-1000.0, -1000.0]])
    np.testing.assert_allclose(mean_answer("binary", sure), [-1000.0], rtol=1e-6)
    classes = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]])) + 3
    np.testing.assert_allclose(jnp.exp(mean_answer("multiclass", classes)), [[0.7, 0.3]], rtol=1e-5)
    np.testing.assert_allclose(mean_answer("regression", jnp.array([[1.0, 4.0]])), [2.5])
    above = jnp.array([[[0.8, 0.5], [0.4, 0.1]]])  # thresholds: each .6 and .3 on average
    above = mean_answer("ordinal", jnp.log(above / (1 - above)))
    np.testing.assert_allclose(jax.nn.sigmoid(above), [[0.6, 0.3]], rtol=1e-5)
    times = mean_answer("watch_time", jnp.log(jnp.array([[1.0, 4.0]])))
    np.testing.assert_allclose(jnp.exp(times), [2.5], rtol=1e-5)
    quantiles = mean_answer("watch_time", logits, "duration_quantiles")
    np.testing.assert_allclose(jax.nn.sigmoid(quantiles), [0.7], rtol=1e-6)


def _answers(graph: Any, own_graph: Any, state: Any, own: Any) -> Any:
    """Of each member, of all with their scales and heads, of all with neither, of the towers."""
    towers, parts = nnx.merge(graph, state), nnx.merge(own_graph, own)
    scales = parts.scales[...]
    said = together(parts.answers(towers(parts.given(_pairs(X)))), SIZES.tasks)[1]
    rows = jnp.concatenate([X * one[None] for one in (*scales, jnp.ones_like(scales[0]))])
    alone = towers(_pairs(rows))
    each = [jax.tree.map(lambda a, k=k: a[k * len(X) :][: len(X)], alone) for k in range(K + 1)]
    parts.scales[...] = jnp.ones_like(scales)
    for head in parts.heads:
        head[...] = jnp.zeros_like(head[...])
    same = towers(parts.given(_pairs(X)))
    return each[:K], said, together(parts.answers(same), SIZES.tasks)[0], each[K]


_SLOW = {"home": pytest.mark.slow}  # a program of hundreds of small layers


@pytest.mark.parametrize("kind", [pytest.param(k, marks=_SLOW.get(k, ())) for k in TOWERS])
def test_a_member_is_the_towers_on_its_own_scales_with_its_own_head(kind: str) -> None:
    """Each member by itself: the towers on x times its scales, plus its head on their hidden
    vectors. With scales of 1 and no heads all answer as the towers alone."""
    small = {"expert_hidden": (4,), "experts": 1, "feature_gates": 1, "rank": 1}
    known = {field.name for field in dataclasses.fields(TOWERS[kind])}
    options = TOWERS[kind](**{name: size for name, size in small.items() if name in known})
    towers = options.make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(1))
    shapes = nnx.eval_shape(lambda towers: towers(_pairs(X)), towers).hidden
    hidden = {task: h.shape[-1] for task, h in shapes.items()}
    several = Members(K, X.shape[1], hidden, SIZES.tasks, dtype=FLOAT, rngs=nnx.Rngs(5))
    scales = np.asarray(several.scales[...])
    assert set(scales.ravel()) == {-1.0, 1.0}
    assert len({tuple(row) for row in scales}) == K
    (graph, state), (own_graph, own) = nnx.split(towers), nnx.split(several)
    each, said, same, alone = jax.jit(functools.partial(_answers, graph, own_graph))(state, own)
    for k, one in enumerate(each):
        for task in NAMES:
            expected = np.asarray(one.logits[task])
            if task in one.hidden:
                head = np.asarray(several.heads[several.names.index(task)][...])[k]
                expected = expected + (np.asarray(one.hidden[task]) @ head)[:, 0]
            np.testing.assert_allclose(said[task][:, k], expected, rtol=1e-4, atol=1e-5)
    for part in ("logits", "hidden"):
        for name, value in getattr(alone, part).items():
            found = getattr(same, part)[name]
            np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)
    for name, value in alone.diagnostics.items():
        for k in range(K):
            of_member = same.diagnostics[name][:, k]
            np.testing.assert_allclose(of_member, value, rtol=1e-4, atol=1e-5)


def test_gates_of_members_are_not_averaged() -> None:
    """Two members that choose opposite experts do not choose half of each."""
    logits, hidden = {"click": jnp.zeros(1)}, {"click": jnp.zeros((1, 2))}
    gates = [jnp.array([[[1.0, 0.0]]]), jnp.array([[[0.0, 1.0]]])]
    members = [TowerOutput(logits, hidden, {"gates": gate}) for gate in gates]
    found, _ = together(members, {"click": TowerTask("binary")})
    np.testing.assert_array_equal(found.diagnostics["gates"], [[[[1, 0]], [[0, 1]]]])


def test_the_loss_is_the_mean_of_the_members_losses() -> None:
    """Two members with probabilities 1/2 and 9/10 of every click: the mean of log 2 and -log .9 for
    a 1, of log 2 and log 10 for a 0; not that of their common probability. So are losses that the
    towers bring."""
    batch = tiny.batch(0)
    shape = batch.weight.shape
    each = jnp.broadcast_to(jnp.array([0.0, math.log(9)]), (*shape, 2))
    none = jnp.zeros((shape[0], 0, 1))
    outputs = Outputs({"click": each[..., 0]}, each[..., 0], each, {}, {"click": each})

    class Towers:
        extra_losses = ("size",)

        def losses(self, logits: Any, labels: Any, mask: Any) -> Any:
            return {"size": (jnp.square(logits["click"]), mask["click"])}

    inputs = Inputs(
        make_layout({}, {}, 1),
        {},
        (),
        {"click": TowerTask("binary")},
        {},
        None,
        {},
        False,
        False,
        0,
        {},
    )
    layers = made(inputs, bias=None, towers=Towers(), outputs=lambda *_: (outputs, None))
    experiment = tiny.experiment(tasks={"click": {"kind": "binary"}}, model={"fusion": "none"})
    objective = make_objective(experiment, tiny.manifest(), inputs, lambda _: layers, layers)
    shared = Shared(none, none[..., 0], none, none, none, none, none[0], none)
    nothing = Wanted({}, jnp.zeros(0, int), jnp.zeros(0, int), jnp.zeros(0), {})
    sums, _ = objective.losses({}, shared, batch, tiny.catalogue(), nothing, None)
    weight = batch.weight * batch.mask["click"]
    ones, zeros = (weight * (batch.labels["click"] == value) for value in (1, 0))
    expected = ones.sum() * (math.log(2) - math.log(0.9)) / 2
    expected += zeros.sum() * (math.log(2) + math.log(10)) / 2
    np.testing.assert_allclose(sums["click"], expected, rtol=1e-5)
    np.testing.assert_allclose(sums["size"], weight.sum() * math.log(9) ** 2 / 2, rtol=1e-5)


GATED = {"kind": "pepnet", "domain": ["hour"], "priors": ["segment", "brand"], "gate_hidden": 4}
GATED |= {"tower_hidden": [4]}  # what it reads by name is each member's own as well


AITM = {"kind": "aitm", "expert_hidden": [4], "tower_hidden": []}  # its losses read its looks


def _without_a_past(**model: Any) -> tuple[Model, Any]:
    """No encoder and no retrieval, so that all that there is can be each member's own."""
    tasks = {name: tiny.TASKS[name] for name in ("click", "stars", "genre")}
    if model.get("towers") == AITM:
        tasks = {"click": tiny.TASKS["click"], "buy": {"kind": "binary", "where": "click"}}
        model |= {"bias": {"features": ["discount"], "dropout": 0.0}}
    declared, learned, examples = tiny.without_history(
        tasks=tasks,
        model={"dropout": 0.0, "fusion": "none", "interaction": "dcn", "towers": GATED} | model,
    )
    learned = dataclasses.replace(learned, tasks=learned.tasks | {"buy": TaskField()})
    bought = (examples.labels["stars"] > 2).astype(np.float32)
    examples = examples._replace(
        row=None,
        labels=dict(examples.labels) | {"buy": bought},
        mask=dict(examples.mask) | {"buy": examples.mask["stars"]},
    )
    return make_model(declared, learned), examples


@pytest.mark.slow
@pytest.mark.parametrize(
    "towers", [pytest.param(GATED, marks=pytest.mark.slow), AITM], ids=["pepnet", "aitm"]
)
def test_members_with_tables_of_their_own_are_models_of_their_own(towers: dict[str, Any]) -> None:
    """Loss and gradients of two members are halves of those of two models, one with the tables and
    layers of each: neither learns from the other."""
    both, examples = _without_a_past(members=2, members_share="encoder", towers=towers)
    one, _ = _without_a_past(towers=towers)
    catalogue, second = tiny.catalogue(), "member 2"
    stacks = initial_stacks(both.layout, jax.random.key(3, impl="rbg"), FLOAT, low=False)

    def loss(model: Model, params: Any, rows: Any) -> jax.Array:
        wanted = model.ids(examples, catalogue, jax.random.key(0))
        shared = model.encode(params, rows, examples, catalogue, wanted, None)
        sums = model.losses(params, shared, examples, catalogue, wanted, None)[0]
        return jnp.stack([sums[name] for name in model.names]).sum()

    params = both.init(0)
    rows = fetch(both.layout, stacks, both.ids(examples, catalogue, jax.random.key(0)).ids)
    found, slopes = jax.jit(jax.value_and_grad(functools.partial(loss, both), 1))(params, rows)
    network, expected = params["network"], 0.0
    alone = jax.jit(jax.value_and_grad(functools.partial(loss, one), 1))
    for number, own in enumerate(("", second)):
        of = dict(one.init(0)["network"]) | {"interactions": {0: network["interactions"][number]}}
        of |= {name: network[name] for name in ("bias",) if name in network}  # one for all members
        if own:
            parts = {side: f"own_{side}" for side in ("items", "context", "request")}
            parts |= {"towers": "other_towers", "user_context": "other_users"}
            of |= {name: network[of_second][0] for name, of_second in parts.items()}
        else:
            shared = ("items", "context", "request", "towers", "user_context")
            of |= {name: network[name] for name in shared}
        names = {group: own_name(group, own) for group in one.layout.groups}
        # no tower reads sampled negatives
        names |= {group: group for group in names if group.startswith("negative")}
        value, gradient = alone({"network": of}, {g: rows[name] for g, name in names.items()})
        expected += float(value) / 2
        for group, name in names.items():
            assert group.startswith("negative") or np.abs(gradient[group]).max() > 0
            np.testing.assert_allclose(slopes[name], gradient[group] / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_members_have_no_tables_of_their_own_beside_those_of_tasks() -> None:
    with pytest.raises(ConfigError, match="has tables of each task already"):
        _without_a_past(members=2, members_share="encoder", towers="stem")


def test_nothing_is_looked_up_for_members_that_no_tower_reads() -> None:
    """Sampled negatives are scored by the retrieval alone, unless a fusion learns from them; a
    model for retrieval alone has no towers."""

    def owned(tasks: Any, **model: Any) -> set[str]:
        several = {"members": 2, "members_share": "encoder"} | model
        declared = tiny.experiment(tasks=tasks, model=several)
        inputs = make_inputs(declared, tiny.manifest())
        return {group.partition(":")[0] for group in inputs.layout.groups if ":" in group}

    read = {"context", "request", "item", "item_features"}
    assert owned(tiny.TASKS, fusion="weighted") == read
    assert owned(tiny.TASKS, fusion="attention") == read | {"negative", "negative_features"}
    assert owned({"next": tiny.TASKS["next"]}, fusion="none") == set()
