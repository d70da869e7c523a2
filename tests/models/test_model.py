"""The model as a whole: what a position may see, where its rows come from, what is not known."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.data.dataset import NumberField
from mtrec_jax.models.lookups import sample_negatives
from mtrec_jax.models.model import Model, gather_rows, make_catalogue, make_model
from mtrec_jax.models.network import make_plan
from mtrec_jax.types import FIRST, UNKNOWN, Batch, Outputs, PyTree, UserStates
from tests import tiny

KEY = jax.random.key(0)
ITEMS = tiny.catalogue()


class Built:
    """A model with random parameters and rows, the padding and unknown rows included."""

    def __init__(self, placement: str):
        self.experiment = tiny.experiment(model={"item_placement": placement})
        self.manifest = tiny.manifest()
        self.plan = make_plan(self.experiment, self.manifest)
        self.model: Model = make_model(self.experiment, self.manifest)
        rng = np.random.default_rng(0)

        def draw(like: jax.ShapeDtypeStruct) -> np.ndarray:
            return (0.5 * rng.normal(size=like.shape)).astype(np.float32)

        params, _ = jax.eval_shape(self.model.init, KEY)
        stacks = {s: np.zeros((rows, 8), np.float32) for s, rows in self.plan.rows.items()}
        self.params: PyTree = {"network": jax.tree.map(draw, params["network"])}
        for _, field in sorted(self.plan.fields.items()):  # the same rows wherever they are placed
            place = slice(field.offset, field.offset + field.size)
            stacks[field.stack][place] = rng.normal(size=(field.size, 8))
        self.params["dense"] = stacks["dense"]
        self.tables = {"lazy_adam": stacks["lazy_adam"]}
        self.run = jax.jit(partial(tiny.forward, self.model))
        self.look_up = jax.jit(self.model.lookups)

    def forward(self, examples: Batch) -> tuple[jax.Array, UserStates, Outputs]:
        return self.run(self.params, self.tables, ITEMS, examples)


@pytest.fixture(scope="module")
def sparse() -> Built:
    return Built("sparse")


def test_numbers_may_take_several_places() -> None:
    piecewise = NumberField(name="age", mean=0.0, std=1.0, slots=3)
    manifest = dataclasses.replace(
        tiny.manifest(), context_numbers=(piecewise,), item_numbers=(piecewise, piecewise)
    )
    model = make_model(tiny.experiment(), manifest)
    params, _ = jax.eval_shape(model.init, KEY)
    found = {"/".join(str(k.key) for k in path if hasattr(k, "key")): leaf.shape
             for path, leaf in jax.tree_util.tree_leaves_with_path(params["network"])}  # fmt: skip
    kernels = {name: shape for name, shape in found.items() if "kernel" in name}
    inputs = {name.split("/")[0]: shape[0] for name, shape in kernels.items()}
    assert inputs["user_context"] == 2 * 8 + 3
    assert inputs["item_features"] == 8 + 6


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
        events={"item": items, "click": clicks},
    )
    cutoff = examples.cutoff
    before = _all_of(sparse.forward(examples))
    for place in range(tiny.HISTORY):
        other = {name: values.copy() for name, values in examples.events.items()}
        other["item"][:, place] = (items[:, place] - FIRST + 3) % tiny.TRAINED + FIRST
        other["click"][:, place] = clicks[:, place] % 3 + 1
        after = _all_of(sparse.forward(examples._replace(events=other)))
        moved = {name: np.abs(after[name] - before[name]).max(axis=-1) for name in before}
        for name, distance in moved.items():
            assert (distance[cutoff <= place] == 0).all(), name
        assert (moved["states"][cutoff > place] > 1e-4).all()


def test_dense_and_sparse_placement_give_the_same_outputs(sparse: Built) -> None:
    dense = Built("dense")
    assert sparse.plan.fields["item"].stack == "lazy_adam"
    assert dense.plan.fields["item"].stack == "dense"
    for seed in (1, 2):
        one, other = (b.forward(tiny.batch(seed)) for b in (sparse, dense))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_an_item_that_was_never_trained_is_the_unknown_row_and_its_features(sparse: Built) -> None:
    field = sparse.plan.fields["item"]
    before = np.asarray(sparse.forward(tiny.batch(0))[0])
    step = np.arange(8, dtype=np.float32)
    table = sparse.tables["lazy_adam"].copy()
    table[field.offset + UNKNOWN] += step
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


def test_lookups_touch_the_rows_of_the_batch_and_no_others(sparse: Built) -> None:
    examples, plan = tiny.batch(4), sparse.plan
    looked = sparse.look_up(examples, ITEMS, KEY)
    offset = plan.fields["item"].offset
    places = np.concatenate([examples.events["item"], examples.candidate], axis=1)
    for role, expected in (("item", places), ("negative", np.asarray(looked.negatives))):
        touched = looked.addresses["lazy_adam"][role]
        np.testing.assert_array_equal(touched, np.where(expected == 0, -1, expected + offset))
    np.testing.assert_array_equal(looked.item_ids, places)
    # the second slot group of the context: the tags, side by side
    tags = plan.fields["context.tags"]
    local = examples.context["ids"][:, 1:]
    np.testing.assert_array_equal(
        looked.addresses["lazy_adam"]["context"], np.where(local == 0, -1, local + tags.offset)
    )


def test_negatives_are_drawn_by_their_probability_and_never_cold() -> None:
    counts = np.array([1, 4, 9, 16, 0])
    nothing = {"ids": np.zeros((7, 0), np.int32), "numbers": np.zeros((7, 0), np.float32)}
    items = make_catalogue(nothing, counts, 4, 0.5, "float32")
    expected = np.array([0, 0, 0.1, 0.2, 0.3, 0.4, 0])
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(items.log_probability, np.log(expected), rtol=1e-6)
    drawn = np.asarray(sample_negatives(items, 20_000, KEY))
    found = np.bincount(drawn, minlength=7) / 20_000
    assert (found[expected == 0] == 0).all()
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.25 / 20_000)
    np.testing.assert_array_equal(items.row, [0, 1, 2, 3, 4, 5, 1])


def test_rows_fetched_for_padding_are_zero_and_get_no_gradient(sparse: Built) -> None:
    examples = tiny.batch(5)
    looked = sparse.look_up(examples, ITEMS, None)

    def total(tables: PyTree) -> jax.Array:
        rows = gather_rows({}, tables, {"lazy_adam": looked.addresses["lazy_adam"]})
        return sum((jnp.sum(part) for part in rows["lazy_adam"].values()), jnp.zeros(()))

    gradient = np.asarray(jax.jit(jax.grad(total))(sparse.tables)["lazy_adam"])
    for field in sparse.plan.fields.values():
        if field.stack == "lazy_adam":
            np.testing.assert_array_equal(gradient[field.offset], 0)
    np.testing.assert_array_equal(gradient[-1], 0)
    assert gradient.sum() > 0
