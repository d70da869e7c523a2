"""The model as a whole: what a position may see, where its rows come from, what is not known."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.config import Experiment, Files
from mtrec_jax.data.dataset import NumberField, TaskField
from mtrec_jax.errors import ConfigError
from mtrec_jax.losses.negatives.contract import items_drawn
from mtrec_jax.models.layers import lecun_normal
from mtrec_jax.models.model import Model, make_catalogue, make_model
from mtrec_jax.models.network import Network
from mtrec_jax.models.objective import passed_over, states_of
from mtrec_jax.tables.layout import initial_stacks, spread
from mtrec_jax.tables.lookup import fetch, find
from mtrec_jax.types import FIRST, UNKNOWN, Batch, Outputs, PyTree, UserStates
from tests import tiny

KEY = jax.random.key(0)
ITEMS = tiny.catalogue()


class Built:
    """A model with random parameters and rows, the padding and unknown rows included."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.model: Model = make_model(experiment, tiny.manifest())
        self.places = self.model.layout.places
        rng = np.random.default_rng(0)

        def draw(like: jax.ShapeDtypeStruct) -> np.ndarray:
            return (0.5 * rng.normal(size=like.shape)).astype(np.float32)

        params = jax.eval_shape(lambda: self.model.init(0))
        stacks = {s: np.zeros((n, 8), np.float32) for s, n in self.model.layout.rows.items()}
        self.params: PyTree = {"network": jax.tree.map(draw, params["network"])}
        for name, place in sorted(self.places.items()):  # the same rows wherever they lie
            stacks[place.stack][self.addresses(name)] = rng.normal(size=(place.size, 8))
        self.tables = {stack: jnp.asarray(table) for stack, table in stacks.items()}
        if "dense" in stacks:
            self.params["dense"] = self.tables.pop("dense")
        self.run = jax.jit(partial(tiny.forward, self.model))

    def addresses(self, table: str, ids: np.ndarray | None = None) -> np.ndarray:
        """Where the rows of ids are, by default all of a table; of padding as well."""
        place = self.places[table]
        number = place.offset + (np.arange(place.size) if ids is None else ids)
        spreads = spread(jnp.asarray(number), place.spread) if place.spread else number
        return np.asarray(spreads)

    def forward(self, examples: Batch) -> tuple[jax.Array, UserStates, Outputs]:
        return self.run(self.params, self.tables, ITEMS, examples)


@pytest.fixture(scope="module")
def sparse() -> Built:
    return Built(tiny.experiment())


def test_numbers_may_take_several_places() -> None:
    piecewise = NumberField(name="age", mean=0.0, std=1.0, slots=3)
    manifest = dataclasses.replace(
        tiny.manifest(), context_numbers=(piecewise,), item_numbers=(piecewise, piecewise)
    )
    model = make_model(tiny.experiment(), manifest)
    network = jax.eval_shape(lambda: model.init(0))["network"]
    assert network["user_context"]["kernel"].shape[0] == 2 * 8 + 3
    assert network["items"]["features"]["kernel"].shape[0] == 8 + 6


def test_searches_have_a_layer_of_their_own() -> None:
    declared = tiny.experiment()
    searched = dataclasses.replace(declared.data, queries=Files(files=("queries.csv",)))
    for data, known in ((declared.data, False), (searched, True)):
        model = make_model(dataclasses.replace(declared, data=data), tiny.manifest())
        assert ("search" in model.abstract["network"]) == known


def _all_of(found: tuple[jax.Array, UserStates, Outputs]) -> dict[str, np.ndarray]:
    """Everything that is said about each position: {name: [B, P, ...]}."""
    _, states, outputs = found
    parts = {"states": states.vectors, "fused": outputs.fused[..., None], "fusion": outputs.fusion}
    shape = outputs.fused.shape
    return {n: np.asarray(a) for n, a in parts.items()} | {
        name: np.asarray(logits).reshape(*shape, -1) for name, logits in outputs.logits.items()
    }


def test_a_position_sees_the_events_before_its_cutoff_and_no_others(sparse: Built) -> None:
    rng = np.random.default_rng(0)
    examples = tiny.batch(0)
    places = np.arange(8 * tiny.POSITIONS, dtype=np.int32).reshape(8, tiny.POSITIONS)
    items = rng.integers(FIRST, tiny.TRAINED + FIRST, (8, tiny.HISTORY)).astype(np.int32)
    clicks = rng.integers(1, 4, items.shape).astype(np.int32)
    examples = examples._replace(
        cutoff=places % (tiny.HISTORY + 1),
        candidate=places % tiny.TRAINED + FIRST,
        events={"item": items, "ids": clicks[..., None]},
    )
    cutoff = examples.cutoff
    before = _all_of(sparse.forward(examples))
    for place in range(tiny.HISTORY):
        other = {name: values.copy() for name, values in examples.events.items()}
        other["item"][:, place] = (items[:, place] - FIRST + 3) % tiny.TRAINED + FIRST
        other["ids"][:, place, 0] = clicks[:, place] % 3 + 1
        after = _all_of(sparse.forward(examples._replace(events=other)))
        moved = {name: np.abs(after[name] - before[name]).max(axis=-1) for name in before}
        for name, distance in moved.items():
            assert (distance[cutoff <= place] == 0).all(), name
        assert (moved["states"][cutoff > place] > 1e-4).all()


def test_dense_and_sparse_tables_give_the_same_outputs(sparse: Built) -> None:
    """With dense items a step points into the vectors of all, otherwise each place has its own."""
    dense = Built(tiny.experiment(tables={"item": {"update": "dense"}}))
    assert sparse.places["item"].stack == "lazy_adam"
    assert dense.places["item"].stack == "dense"
    for seed in (1, 2):
        one, other = (b.forward(tiny.batch(seed)) for b in (sparse, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)

    def encoded(built: Built) -> Any:
        examples = tiny.batch(3)
        wanted = built.model.ids(examples, ITEMS, KEY)
        stacks = built.tables | {"dense": built.params["dense"]}
        rows = fetch(built.model.layout, stacks, wanted.ids)
        return wanted.negatives, built.model.encode(
            built.params, rows, examples, ITEMS, wanted, None
        )

    one, other = (jax.jit(partial(encoded, b))() for b in (sparse, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5), one, other)
    assert one[1].negatives.shape == (6, 8)


def test_an_item_that_was_never_trained_is_the_unknown_row_and_its_features(sparse: Built) -> None:
    before = np.asarray(sparse.forward(tiny.batch(0))[0])
    step = np.arange(8, dtype=np.float32)
    table = sparse.tables["lazy_adam"].at[sparse.addresses("item")[UNKNOWN]].add(step)
    moved = {**sparse.tables, "lazy_adam": table}
    after = np.asarray(sparse.run(sparse.params, moved, ITEMS, tiny.batch(0))[0])
    cold = np.arange(tiny.TRAINED + FIRST, tiny.ITEMS + FIRST)
    change = (after - before)[cold]
    scale = change[0] @ step / (step @ step)
    assert scale > 0.1
    np.testing.assert_allclose(change, np.tile(scale * step, (2, 1)), atol=1e-5)
    np.testing.assert_array_equal(
        after[FIRST : tiny.TRAINED + FIRST], before[FIRST : tiny.TRAINED + FIRST]
    )
    # what distinguishes two cold items are their features
    assert np.abs(before[cold[0]] - before[cold[1]]).max() > 1e-2


def test_retrieval_logit_is_the_cosine_over_the_temperature(sparse: Built) -> None:
    examples = tiny.batch(3)
    vectors, states, outputs = sparse.forward(examples)
    item, user = np.asarray(vectors)[examples.candidate], np.asarray(states.vectors)
    cosine = (item * user).sum(-1) / np.linalg.norm(item, axis=-1) / np.linalg.norm(user, axis=-1)
    np.testing.assert_allclose(outputs.logits["next"], cosine / 0.2, rtol=1e-4, atol=1e-5)
    assert outputs.logits["genre"].shape == (8, tiny.POSITIONS, 3)
    assert outputs.fusion.shape == (8, tiny.POSITIONS, len(tiny.TASKS))
    np.testing.assert_allclose(outputs.fusion.sum(axis=-1), 1, atol=1e-6)


def test_a_batch_looks_up_its_own_ids_and_no_others(sparse: Built) -> None:
    examples, layout = tiny.batch(4), sparse.model.layout

    @jax.jit
    def run(examples: Batch) -> Any:
        wanted = sparse.model.ids(examples, ITEMS, KEY)
        return wanted, find(layout, wanted.ids)

    wanted, found = run(examples._replace(row=None))
    places = np.concatenate([examples.events["item"], examples.candidate], axis=1)
    np.testing.assert_array_equal(wanted.items, places)
    for group, expected in (("item", places), ("negative", np.asarray(wanted.negatives))):
        touched = found["lazy_adam"][group][..., 0]
        rows = sparse.addresses("item", expected)
        np.testing.assert_array_equal(touched, np.where(expected == 0, -1, rows))
        features = wanted.ids[f"{group}_features"]
        np.testing.assert_array_equal(features, ITEMS.ids[expected])
    # the tags, side by side after the segment, in a stack of their own
    tags = np.asarray(examples.context["ids"])[:, 1:]
    rows = sparse.addresses("tags", tags)
    np.testing.assert_array_equal(found["lazy_adam"]["context"], np.where(tags == 0, -1, rows))
    for side in ("context", "request"):
        np.testing.assert_array_equal(wanted.ids[side], getattr(examples, side)["ids"])
    np.testing.assert_array_equal(wanted.ids["history"], examples.events["ids"])
    assert sparse.model.by_example == {"item", "item_features", "context", "request", "history"}


def test_dropped_ids_become_unknown_in_training_alone() -> None:
    tables = {"tags": {"update": "sparse", "id_dropout": 0.25}, "item": {"id_dropout": 0.5}}
    model = make_model(tiny.experiment(tables=tables), tiny.manifest())
    size = 4_000
    examples = tiny.batch(0, size)
    whole = model.ids(examples, ITEMS, None).ids
    dropped = jax.jit(lambda examples: model.ids(examples, ITEMS, KEY).ids)(
        examples._replace(row=None)
    )
    for group, slots, share in (("context", slice(1, 4), 0.25), ("item", slice(None), 0.5)):
        before, after = (np.asarray(ids[group])[..., slots] for ids in (whole, dropped))
        real = before >= FIRST
        gone = after != before
        assert (after[gone] == UNKNOWN).all()
        assert not gone[~real].any()  # padding stays padding
        deviation = np.sqrt(share * (1 - share) / real.sum())
        assert abs(gone[real].mean() - share) < 5 * deviation
    segment = slice(0, 1)
    np.testing.assert_array_equal(
        dropped["context"][:, segment], examples.context["ids"][:, segment]
    )
    for group in ("request", "history", "item_features"):
        np.testing.assert_array_equal(dropped[group], whole[group])


def test_negatives_are_drawn_by_their_probability_and_never_cold() -> None:
    counts = np.array([1, 4, 9, 16, 0])
    nothing = {"ids": np.zeros((7, 0), np.int32), "numbers": np.zeros((7, 0), np.float32)}
    items = make_catalogue(nothing, counts, 4, 0.5, "float32")
    expected = np.array([0, 0, 0.1, 0.2, 0.3, 0.4, 0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(items.log_probability, np.log(expected), rtol=1e-6)
    drawn = np.asarray(items_drawn(items.cumulative, 20_000, KEY))
    found = np.bincount(drawn, minlength=7) / 20_000
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 20_000)
    np.testing.assert_array_equal(items.row, [0, 1, 2, 3, 4, 5, 1])


def test_rows_fetched_for_padding_are_zero_and_get_no_gradient(sparse: Built) -> None:
    wanted = sparse.model.ids(tiny.batch(5), ITEMS, None)

    def total(tables: PyTree) -> jax.Array:
        stacks = tables | {"dense": sparse.params["dense"]}
        rows = fetch(sparse.model.layout, stacks, wanted.ids)
        return sum((jnp.sum(part) for part in rows.values()), jnp.zeros(()))

    gradient = np.asarray(jax.jit(jax.grad(total))(sparse.tables)["lazy_adam"])
    for name, place in sparse.places.items():
        if place.stack == "lazy_adam":
            np.testing.assert_array_equal(gradient[sparse.addresses(name)[0]], 0)
    np.testing.assert_array_equal(gradient[-1], 0)
    assert gradient.sum() > 0


def test_initial_values_depend_on_the_seed_alone() -> None:
    model = make_model(tiny.experiment(), tiny.manifest())
    one, again, other = (model.init(seed)["network"] for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    kernel, drawn = (of["encoder"]["blocks"]["layers"][0]["up"]["kernel"] for of in (one, other))
    assert (np.asarray(kernel) != drawn).all()
    # lecun: variance 1 / inputs
    wide = lecun_normal(jax.random.key(1), (400, 300), jnp.dtype("float32"))
    assert np.var(wide) == pytest.approx(1 / 400, rel=0.02)
    assert np.abs(wide).max() < 2.3 / 20


@pytest.mark.parametrize(
    "removed", ["events", pytest.param("items", marks=pytest.mark.slow), "towers"]
)
def test_what_the_data_does_not_have_is_left_out(removed: str) -> None:
    """No history; neither items nor history; retrieval alone."""
    declared, manifest = tiny.experiment(), tiny.manifest()
    examples = tiny.batch(0)
    if removed == "towers":
        declared = tiny.experiment(tasks={"next": tiny.TASKS["next"]})
    else:
        manifest = dataclasses.replace(manifest, history_length=0, history=())
        none = examples.cutoff * 0
        examples = examples._replace(events={}, cutoff=none)
    if removed == "items":
        tasks = {name: task for name, task in tiny.TASKS.items() if name != "next"}
        declared = dataclasses.replace(
            declared, tasks={name: declared.tasks[name] for name in tasks}
        )
        manifest = dataclasses.replace(
            manifest, items=0, trained_items=0, item_ids=(), item_numbers=()
        )
        examples = examples._replace(candidate=none)
    model = make_model(declared, manifest)
    stacks = initial_stacks(model.layout, KEY, jnp.dtype("float32"), low=False)
    params = model.init(0)

    @jax.jit
    def run(examples: Batch) -> Any:
        wanted = model.ids(examples, ITEMS, KEY)
        rows = fetch(model.layout, stacks, wanted.ids)
        shared = model.encode(params, rows, examples, ITEMS, wanted, None)
        return shared, model.losses(params, shared, examples, ITEMS, wanted, None)[0]

    shared, sums = run(examples._replace(row=None))
    assert sums.keys() == set(declared.tasks)
    assert all(np.isfinite(total) and total > 0 for total in sums.values())
    assert shared.events.shape[1] == (tiny.HISTORY if removed == "towers" else 0)
    assert shared.candidates.shape[1] == (0 if removed == "items" else tiny.POSITIONS)
    assert ("item" in model.layout.groups) == (removed != "items")


def test_features_of_the_moment_reach_each_position_by_itself(sparse: Built) -> None:
    examples = tiny.batch(6)
    before = np.asarray(sparse.forward(examples)[2].logits["click"])
    request = {name: values.copy() for name, values in examples.request.items()}
    request["ids"][:, 1] = (request["ids"][:, 1] + 1) % 6
    request["numbers"][:, 1] += 1
    after = np.asarray(sparse.forward(examples._replace(request=request))[2].logits["click"])
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (np.abs(after - before)[:, 1] > 1e-5).all()


def test_losses_that_towers_bring_stand_in_the_place_of_the_tasks_own() -> None:
    """ESMM's purchase, from the logits: -log(p q) after a purchase, else -log(1 - p q), at all
    impressions whose outcome is known, clicked or not."""
    tasks = {"click": {"kind": "binary"}, "buy": {"kind": "binary", "where": "click"}}
    declared = tiny.experiment(
        tasks=tasks, model={"towers": {"kind": "esmm", "expert_hidden": [4]}, "dropout": 0.0}
    )
    learned = {"click": TaskField(), "buy": TaskField()}
    model = make_model(declared, dataclasses.replace(tiny.manifest(), tasks=learned))
    stacks = initial_stacks(model.layout, KEY, jnp.dtype("float32"), low=False)
    params, examples = model.init(0), tiny.batch(7, 32)
    rng = np.random.default_rng(0)
    click = np.asarray(examples.labels["click"])
    known = np.asarray(examples.mask["click"]) * click * (rng.random(click.shape) < 0.8)
    buy = known * rng.integers(0, 2, click.shape)
    examples = examples._replace(
        labels={"click": click, "buy": buy.astype(np.float32)},
        mask={"click": examples.mask["click"], "buy": known.astype(np.float32)},
        row=None,
    )

    @jax.jit
    def run(examples: Batch) -> Any:
        wanted = model.ids(examples, ITEMS, None)
        rows = fetch(model.layout, stacks, wanted.ids)
        shared = model.encode(params, rows, examples, ITEMS, wanted, None)
        sums, _ = model.losses(params, shared, examples, ITEMS, wanted, None)
        logits = model.score(params, states_of(shared, examples), shared.candidates).logits
        return sums, model.weights(examples, jnp.asarray(examples.weight)), logits

    sums, weights, logits = run(examples)
    p, q = (1 / (1 + np.exp(-np.asarray(logits[t], np.float64))) for t in ("click", "buy"))
    counts = np.where(click > 0, known, examples.mask["click"]) * examples.weight
    loss = -np.log(np.where(buy > 0, p * q, 1 - p * q))
    np.testing.assert_allclose(sums["buy"], (loss * counts).sum(), rtol=1e-5)
    np.testing.assert_allclose(weights["buy"], counts.sum(), rtol=1e-6)
    assert counts.sum() > 2 * known.sum() > 0  # impressions without a click are most of them
    loss = -np.log(np.where(click > 0, p, 1 - p)) * examples.mask["click"] * examples.weight
    np.testing.assert_allclose(sums["click"], loss.sum(), rtol=1e-5)
    assert set(weights) == {"click", "buy", "fusion"}


def test_what_the_moment_says_of_the_target_must_not_stand_beside_other_candidates() -> None:
    """A rate of the target's own item would tell it from all others that the retrieval brings."""
    features = {**tiny.FEATURES, "hour": {"on": "request", "column": "item"}}
    experiment = tiny.experiment(features=features)
    with pytest.raises(ConfigError, match=r"hour: column 'item' is the target's own item"):
        make_model(experiment, tiny.manifest())


@pytest.mark.parametrize(("of", "expected"), [("user", [(0, 1), (2, 1)]), ("request", [(0, 1)])])
def test_what_is_passed_over_was_shown_and_its_label_is_known(
    of: str, expected: list[tuple[int, int]]
) -> None:
    """Positions: taken, passed over, taken at another time, without a label, padding."""
    clicks = {"next": {"kind": "retrieval", "where": "click"}, "click": {"kind": "binary"}}
    train = {"retrieval": {"kind": "softmax", "shown": of}}
    declared = tiny.experiment(tasks=clicks, train=train, data={"hide_ties": True})
    given = tiny.batch(0, size=1)._replace(
        candidate=np.array([[5, 6, 7, 8, 0]], np.int32),
        cutoff=np.array([[2, 2, 3, 3, 0]], np.int32),
        weight=np.array([[1, 1, 1, 1, 0]], np.float32),
        mask={
            "next": np.array([[1, 0, 1, 0, 0]], np.float32),
            "click": np.array([[1, 1, 1, 0, 0]], np.float32),
        },
    )
    found = passed_over(declared, "next", jnp.asarray(given.mask["next"]), given)
    assert found is not None
    pairs = [(p, q) for p, q in np.argwhere(np.asarray(found)[0]).tolist() if p in (0, 2)]
    assert pairs == expected


def test_a_hidden_event_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the second event hidden, the state behind it is that behind the first, and the next one
    is as if it were not there; without a key nothing is hidden."""
    kept = jnp.asarray(np.arange(tiny.HISTORY) != 1)[None]
    monkeypatch.setattr(Network, "_kept", lambda self, shape, key: jnp.broadcast_to(kept, shape))
    model = {"encoder": {"kind": "mean"}, "event_dropout": 0.5, "dropout": 0.0}
    built = Built(tiny.experiment(model=model))
    examples = tiny.batch(0)
    item = np.arange(FIRST, FIRST + tiny.HISTORY, dtype=np.int32) + np.zeros((8, 1), np.int32)
    events = {n: np.asarray(a) for n, a in examples.events.items()} | {"item": item}
    without = {n: np.delete(a, 1, axis=1) for n, a in events.items()}
    padded = {n: np.concatenate([a, a[:, :1] * 0], axis=1) for n, a in without.items()}
    whole = examples._replace(events=events)

    def states(batch: Batch, cutoff: list[int], key: jax.Array | None) -> np.ndarray:
        given = batch._replace(cutoff=np.tile(np.array(cutoff, np.int32), (8, 1)))
        found = jax.jit(partial(tiny.forward, built.model))
        return np.asarray(found(built.params, built.tables, ITEMS, given, key)[1].vectors)

    hidden, plain = states(whole, [1, 2, 3], KEY), states(whole, [1, 2, 3], None)
    np.testing.assert_allclose(hidden[:, 1], hidden[:, 0], atol=1e-6)
    np.testing.assert_allclose(
        hidden, states(examples._replace(events=padded), [1, 1, 2], None), atol=1e-5
    )
    assert np.abs(plain[:, 1] - plain[:, 0]).max() > 1e-3
