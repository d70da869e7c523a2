"""The bias tower of Zhao et al., RecSys 2019: in the losses, and in nothing else."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import IdField, TaskField
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import chosen
from mtrec_jax.models.bias import BiasTower
from mtrec_jax.models.inputs import make_inputs, side_of
from mtrec_jax.models.model import make_catalogue, make_model
from mtrec_jax.tables.layout import initial_stacks
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.types import FIRST, Batch, Outputs, PyTree
from tests import tiny

KEY = jax.random.key(0)


def _declared(**bias: Any) -> dict[str, Any]:
    towers = {"kind": "shared_bottom", "expert_hidden": [6], "tower_hidden": []}
    given = {"features": ["discount", "hour"], "dropout": 0.0, "hidden": [4]} | bias
    return {"bias": given, "towers": towers, "dropout": 0.0, "fusion": "none"}


class Case:
    """A model that is not trained, and what it answers and is taught, compiled once."""

    def __init__(self) -> None:
        declared, learned, self.examples = tiny.without_history(
            model=_declared(tasks=["click", "genre"])
        )
        self.model = make_model(declared, learned)
        self.stacks = initial_stacks(self.model.layout, KEY, jnp.dtype("float32"), low=False)
        self.params = self.model.init(0) | {"dense": self.stacks["dense"]}
        given = self.params, self.stacks, tiny.catalogue()
        self.answers = jax.jit(partial(tiny.forward, self.model, *given))
        self.sums = jax.jit(self._sums)

    def _sums(self, examples: Batch) -> dict[str, jax.Array]:
        wanted = self.model.ids(examples, tiny.catalogue(), KEY)
        rows = fetch(self.model.layout, self.stacks, wanted.ids)
        given = examples, tiny.catalogue(), wanted, None
        shared = self.model.encode(self.params, rows, *given)
        return self.model.losses(self.params, shared, *given)[0]


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_the_tower_adds_its_logits_to_the_tasks_in_the_losses_alone(case: Case) -> None:
    """By hand: of numbers and rows through two layers; the logits of what answers, plus these, have
    the cross-entropy that is taught."""
    examples, plain = case.examples, case.answers(case.examples)[2].logits
    bias = jax.tree.map(np.asarray, case.params["network"]["bias"])
    hour, table = examples.request["ids"], np.asarray(case.params["dense"])
    hours = table[case.model.layout.places["hour"].offset + hour[..., 0]] * (hour > 0)
    deviation = np.sqrt(hours.var(axis=-1, keepdims=True) + 1e-6)
    normal = (hours - hours.mean(axis=-1, keepdims=True)) / deviation
    x = np.concatenate([normal, np.clip(examples.request["numbers"], -5, 5)], axis=-1)
    (layer,) = bias["hidden"]["layers"].values()
    z = x @ layer["kernel"] + layer["bias"]
    added = (z / (1 + np.exp(-z))) @ bias["head"]["kernel"] + bias["head"]["bias"]
    assert added.shape == (8, tiny.POSITIONS, 1 + 3)

    click, label = np.asarray(plain["click"]) + added[..., 0], examples.labels["click"]
    losses = {"click": np.log1p(np.exp(click)) - label * click}
    genre, label = np.asarray(plain["genre"]) + added[..., 1:], examples.labels["genre"]
    right = np.take_along_axis(genre, np.asarray(label, int)[..., None], axis=-1)[..., 0]
    losses["genre"] = np.log(np.exp(genre).sum(axis=-1)) - right
    # the stars are not among its tasks
    losses["stars"] = np.square(plain["stars"] - (examples.labels["stars"] - 3) / 2)
    sums = case.sums(examples._replace(row=None))
    for task, loss in losses.items():
        taught = np.sum(loss * examples.mask[task] * examples.weight)
        np.testing.assert_allclose(sums[task], taught, rtol=1e-4)


def test_nothing_else_sees_the_features_of_the_bias(case: Case) -> None:
    """Other values change what is taught, and neither states, scores nor the fused order."""
    request = {name: np.array(values) for name, values in case.examples.request.items()}
    request["ids"] = (request["ids"] + 1) % 6
    request["numbers"] += 1
    both = case.examples, case.examples._replace(request=request)
    jax.tree.map(np.testing.assert_array_equal, *[case.answers(of)[1:] for of in both])
    sums = [case.sums(of._replace(row=None)) for of in both]
    assert abs(sums[0]["click"] - sums[1]["click"]) > 1e-3
    for task in ("next", "stars"):
        np.testing.assert_allclose(sums[0][task], sums[1][task], rtol=1e-6)


def test_the_moment_keeps_what_is_not_of_the_bias() -> None:
    for names, left in ((["hour"], (0, 1)), (["discount"], (1, 0)), (["hour", "discount"], (0, 0))):
        inputs = make_inputs(tiny.experiment(model=_declared(features=names)), tiny.manifest())
        ids, numbers = left
        assert len(inputs.layout.groups.get("request", ())) == ids
        assert inputs.numbers["request"] == (1,) * numbers
        assert inputs.numbers["bias"] == (1,) * (1 - numbers)
        request = tiny.batch(0).request
        for side, held in (("request", left), ("bias", (1 - ids, 1 - numbers))):
            part = side_of(inputs, tiny.batch(0), side)
            expected = {n for n, count in zip(("ids", "numbers"), held, strict=True) if count}
            assert part.keys() == expected
            for name in expected:
                np.testing.assert_array_equal(part[name], request[name])


def test_in_a_share_of_the_positions_the_tower_is_silent() -> None:
    """Of 3,000 positions with logits 0 and a tower that says 1, the share that stay 0."""
    declared = tiny.experiment(model=_declared(features=["hour"], dropout=0.3, hidden=[]))
    inputs, options = make_inputs(declared, tiny.manifest()), declared.model.bias
    assert options is not None
    plain = declared.model.numbers
    tower = BiasTower(inputs, options, plain, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    tower.head.bias[...] = jnp.ones(5)
    features, zeros = jnp.zeros((1000, 3, 8)), jnp.zeros((1000, 3))
    logits = {"next": zeros, "click": zeros, "stars": zeros, "genre": jnp.zeros((1000, 3, 3))}
    members = {"click": jnp.zeros((1000, 3, 2)), "genre": jnp.zeros((1000, 3, 2, 3))}
    members |= {"stars": members["click"]}
    given = Outputs(logits, zeros, zeros[..., None], {}, members)
    added = jax.jit(tower.added)
    found = jax.tree.map(np.asarray, added(given, features, KEY))
    silent = found.logits["click"] == 0
    assert abs(silent.mean() - 0.3) < 5 * np.sqrt(0.21 / 3000)
    said = np.where(silent, 0, 1)
    np.testing.assert_array_equal(found.logits["click"], said)
    np.testing.assert_array_equal(found.logits["genre"], said[..., None].repeat(3, -1))
    np.testing.assert_array_equal(found.logits["next"], zeros)
    for task, values in found.members.items():  # each of an ensemble's two
        expected = np.broadcast_to(said.reshape(1000, 3, *[1] * (values.ndim - 2)), values.shape)
        np.testing.assert_array_equal(values, expected, err_msg=task)
    assert (added(given, features, None).logits["click"] == 1).all()
    ordered = given._replace(logits=logits | {"stars": jnp.zeros((1000, 3, 4))})  # thresholds
    np.testing.assert_array_equal(added(ordered, features, None).logits["stars"], 1)


ITEMS, PLACES, USERS = 12, 4, 16


def _log(rng: np.random.Generator) -> tuple[Batch, np.ndarray]:
    """Impressions of a ranking that put worse items higher: the planted logits of the items, and
    labels that are probabilities, so that there is no noise."""
    worth = np.linspace(-1.5, 1.5, ITEMS)
    item = np.tile(np.arange(ITEMS), USERS * 4)
    # place 0 is the top; the better an item, the lower it stood, more often than not
    drawn = worth[item] + rng.normal(size=len(item))
    place = np.digitize(drawn, np.quantile(drawn, [0.25, 0.5, 0.75]))
    click = 1 / (1 + np.exp(-(worth[item] - 1.5 * place + 1)))
    n = len(item)
    column = partial(np.reshape, shape=(n, 1))
    ones = np.ones((n, 1), np.float32)
    examples = Batch(
        context={},
        request={"ids": (place[:, None, None] + FIRST).astype(np.int32)},
        events={},
        cutoff=np.zeros((n, 1), np.int32),
        candidate=column(item + FIRST).astype(np.int32),
        labels={"click": column(click).astype(np.float32)},
        mask={"click": ones},
        user=np.full(n, FIRST, np.int32),
        weight=ones,
        row=None,
    )
    return examples, worth


@pytest.mark.slow
def test_the_order_of_items_is_nearer_to_the_truth_than_without() -> None:
    """Items that stood lower are better, and clicked less. Learned without the place, their order
    is that of the log; with the bias tower it is that of their worth."""
    examples, worth = _log(np.random.default_rng(0))
    manifest = dataclasses.replace(
        tiny.manifest(features=False),
        items=ITEMS,
        trained_items=ITEMS,
        history_length=0,
        request_ids=(IdField(name="place", size=FIRST + PLACES, slots=1),),
        tasks={"click": TaskField(mean=0.5, std=0.5)},
    )
    found = {}
    for name, bias in (("with", {"features": ["place"]}), ("without", None)):
        declared = tiny.experiment(
            data={"history_length": 0},
            features={name: {"on": "request"} for name in ("place", "tags", "brand")},
            tasks={"click": {"kind": "binary"}},
            model={"towers": {"kind": "shared_bottom", "expert_hidden": [8], "tower_hidden": []}}
            | ({"bias": bias} if bias else {}),
        )
        known = manifest if bias else dataclasses.replace(manifest, request_ids=())
        found[name] = _order(declared, known, examples)
    agreement = {name: np.corrcoef(worth, score)[0, 1] for name, score in found.items()}
    assert agreement["with"] > 0.95
    assert agreement["without"] < 0.5


def _order(declared: Experiment, manifest: Any, examples: Batch) -> np.ndarray:
    """What the click's logit is of each item, after some steps."""
    model, rule = make_model(declared, manifest), optax.adam(0.02)
    none = {name: np.zeros((ITEMS + FIRST, 0), np.int32) for name in ("ids", "numbers")}
    catalogue = make_catalogue(none, np.ones(ITEMS), ITEMS, 0.0, "float32")
    if not manifest.request_ids:
        examples = examples._replace(request={})
    wanted = model.ids(examples, catalogue, None)

    def loss(learned: PyTree, key: jax.Array) -> jax.Array:
        params, stacks = learned
        rows = fetch(model.layout, stacks, wanted.ids)
        shared = model.encode(params, rows, examples, catalogue, wanted, None)
        sums = model.losses(params, shared, examples, catalogue, wanted, key)[0]
        return sums["click"] / examples.weight.size

    @jax.jit
    def trained(learned: PyTree) -> PyTree:
        def step(number: jax.Array, state: PyTree) -> PyTree:
            learned, slots = state
            slope = jax.grad(loss)(learned, jax.random.fold_in(KEY, number))
            updates, slots = rule.update(slope, slots)
            return optax.apply_updates(learned, updates), slots

        return jax.lax.fori_loop(0, 150, step, (learned, rule.init(learned)))[0]

    stacks = initial_stacks(model.layout, KEY, jnp.dtype("float32"), low=False)
    params, stacks = trained((model.init(0), stacks))
    asked = jax.tree.map(lambda array: array[:ITEMS], examples)
    dense = {name: stacks.pop(name) for name in ("dense",) if name in stacks}
    run = jax.jit(partial(tiny.forward, model, params | dense, stacks, catalogue))
    return np.asarray(run(asked)[2].logits["click"])[:, 0]


def test_what_cannot_be_a_bias_is_said() -> None:
    for bias, text in (
        ({"features": ["segment"]}, "'segment' is no feature on = 'request'"),
        ({"features": ["hours"]}, "'hours' is no feature .* Did you mean 'hour'"),
        ({"features": ["hour"], "tasks": ["next"]}, "'next' is no task with a tower"),
    ):
        with pytest.raises(ConfigError, match=text):
            tiny.experiment(model={"bias": bias})
    with pytest.raises(ConfigError, match="no tower to correct"):
        tiny.experiment(model={"bias": {"features": ["hour"]}}, tasks={"next": tiny.TASKS["next"]})


def test_a_bias_goes_with_what_it_reads_and_explains() -> None:
    declared = tiny.experiment(model=_declared(tasks=["click", "genre"]))
    kept = chosen(declared, tasks=["next", "click"], features=["hour", "segment", "click"])
    assert kept.model.bias is not None
    assert (kept.model.bias.features, kept.model.bias.tasks) == (("hour",), ("click",))
    assert chosen(declared, tasks=["next", "stars"]).model.bias is None
    assert chosen(declared, features=["segment", "click"]).model.bias is None
