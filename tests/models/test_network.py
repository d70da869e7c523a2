"""Parts of the network that are small enough to be worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.config import Model
from mtrec_jax.losses.tasks import class_levels
from mtrec_jax.models import network
from mtrec_jax.models.fusions import FusionSizes, Utility
from mtrec_jax.models.fusions.none import MeanFusion
from mtrec_jax.models.model import make_model
from mtrec_jax.models.network import Network
from mtrec_jax.models.towers import TowerOutput, TowerTask
from mtrec_jax.tables.layout import DENSE, initial_stacks
from mtrec_jax.types import FIRST, UNKNOWN, Fusing, UserStates
from tests import tiny


class _Inputs:
    """What the mean of tasks has to know of them."""

    retrieval = "next"
    tasks: ClassVar = {
        "click": TowerTask("binary"),
        "stars": TowerTask("regression"),
        "genre": TowerTask("multiclass", 4),
    }
    levels: ClassVar = {"genre": (0.0, 1.0, 2.0, 3.0)}


class _Classes:
    """A run on rows with one task, of the classes 1, 5 and 3 in this order."""

    has_items = has_events = False
    retrieval, order, own = None, ("stars",), ()
    read: ClassVar[dict[str, Any]] = {}
    tasks: ClassVar = {"stars": TowerTask("multiclass", 3)}
    levels: ClassVar = {"stars": class_levels(("1", "5", "3"))}
    thresholds: ClassVar[dict[str, Any]] = {}


def made(inputs: Any, **parts: Any) -> Network:
    layers = object.__new__(Network)
    width = parts.pop("width", 64)
    model = Model(width=width, temperature=0.05)
    parts |= {"config": model, "inputs": inputs}
    for name, part in parts.items():
        object.__setattr__(layers, name, part)
    return layers


def mean(*tasks: str) -> MeanFusion:
    return MeanFusion(FusionSizes(0, 1, tasks, Utility("", ())))


def test_without_a_fusion_tasks_are_averaged_on_one_scale() -> None:
    """By hand, of two pairs: cosines 0.5 and -1 are 0.75 and 0; probabilities of log-odds log 3 and
    0; the normal distribution below 1 and 0; class numbers 1.5 and 3 of 0 to 3."""
    layers = made(_Inputs())
    scores = {
        "next": jnp.array([10.0, -20.0]),
        "click": jnp.array([math.log(3), 0.0]),
        "stars": jnp.array([1.0, 0.0]),
        "genre": jnp.array([1.5, 3.0]),
    }
    units = {task: layers.in_unit(task, score) for task, score in scores.items()}
    fused, weights = mean(*scores)(Fusing(jnp.zeros((2, 0)), {}, scores, units))
    expected = [(0.75 + 0.75 + 0.841345 + 0.5) / 4, (0.0 + 0.5 + 0.5 + 1.0) / 4]
    np.testing.assert_allclose(fused, expected, rtol=1e-5)
    np.testing.assert_allclose(weights, np.full((2, 4), 0.25))


def test_classes_count_by_their_numbers_in_any_order() -> None:
    """By hand: 5 is the highest level, 3 half of it: 0.5 + 0.3 / 2, and 0.1 + 0.8 / 2."""
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
    side = SimpleNamespace(fields=0)
    layers = made(
        _Classes(),
        dtype=jnp.float32,
        context=side,
        request=side,
        interactions=[lambda x, fields: x],
        other_towers=[],
        other_users=[],
        members=None,
        thresholds=[],
        towers=lambda given: TowerOutput({"stars": logits}, {}, {}),
        fusion=mean("stars"),
    )
    none = jnp.zeros((2, 0, 8))
    states = UserStates(
        jnp.zeros((2, 1, 8)), jnp.zeros((2, 0)), none, none, none, jnp.zeros((2, 1), int)
    )
    outputs, _ = layers.outputs(states, None, None)
    np.testing.assert_allclose(outputs.fused[:, 0], [0.65, 0.5], rtol=1e-5)
    assert class_levels(("1", "2", "5")) == (0, 0.5, 2), "in proportion"
    assert class_levels(("b", "a", "7")) == (0, 1, 2), "the places, without an order"


def test_a_search_stands_in_a_history_by_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an item, a search and padding: items as they are, the words for the search; what happened
    is added to each token, and padding stays 0. Tokens are scaled by the root of the width, 8."""

    class Inputs:
        layout = SimpleNamespace(groups={"history": None})

    words = jnp.array([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    events = jnp.array([[[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]]])
    monkeypatch.setattr(network, "pool", lambda group, ids, rows: words[:, :, None])
    layers = made(Inputs(), search=True, behaviour=jnp.zeros_like)
    events_of = {"item": np.array([[FIRST, UNKNOWN, 0]]), "ids": np.zeros((1, 3, 1), int)}
    batch = tiny.batch(0)._replace(events=events_of)
    tokens, met, behaviour = layers._tokens(batch, {"history": jnp.zeros((1, 2))}, events)
    np.testing.assert_allclose(met[0, :2], [[10, 20], [3, 4]])
    np.testing.assert_allclose(tokens[0], [[88, 176], [48, 64], [0, 0]])
    np.testing.assert_allclose(behaviour, words)


def test_members_interactions_and_embedded_numbers_go_together() -> None:
    """A model with all of them: each member's logits stand beside the common ones, at each
    position, whatever the kind of task."""
    model = {"members": 2, "interaction": "dcn", "numbers": "periodic"}
    layers = make_model(tiny.experiment(model=model), tiny.manifest())
    tables = initial_stacks(layers.layout, jax.random.key(0), jnp.dtype("float32"), False)
    params = layers.abstract | {DENSE: tables.pop(DENSE)}
    given = params, tables, tiny.catalogue(), tiny.batch(0)
    _, _, outputs = jax.eval_shape(lambda *given: tiny.forward(layers, *given), *given)
    shape = 8, tiny.POSITIONS
    assert {task: of.shape for task, of in outputs.members.items()} == {
        "click": (*shape, 2),
        "stars": (*shape, 2),
        "genre": (*shape, 2, 3),
    }
    assert outputs.logits["genre"].shape == (*shape, 3)
    scales = layers.abstract["network"]["members"]["scales"]
    width = 2 * 8 + 8 + 8 + 8  # embedded features and numbers of the user and of the moment
    assert scales.shape == (2, width + 3 * 8 + 1 + 8), (
        "the pair, and what happened to similar items"
    )


def test_the_time_of_the_query_counts_also_where_events_came_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three events at 5, 9 and 12, the second state is asked at 7; without a time of the query
    (the first state) at that of the event that follows, behind the last at its own."""
    times = jnp.array([[[7], [0]]])
    monkeypatch.setattr(network, "side_of", lambda inputs, batch, side: {"ids": times})
    layers = made(SimpleNamespace(places={"asked": {}}))
    batch = tiny.batch(0)._replace(cutoff=np.array([[2, 1]]))
    moments, there = jnp.array([[5, 5, 9, 12]]), jnp.array([[True, True, True]])
    np.testing.assert_array_equal(layers._asked(batch, moments, there), [[5, 9, 7, 12]])
    assert made(SimpleNamespace(places={}))._asked(batch, moments, there) is None
