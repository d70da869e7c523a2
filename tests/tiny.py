"""A tiny sequence experiment with every kind of task and feature, made without touching a disk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import (
    FORMAT,
    IdField,
    Manifest,
    NumberField,
    SplitInfo,
    TaskField,
)
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.model import Model, make_catalogue
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.types import FIRST, Batch, Catalogue, Outputs, PyTree, UserStates

ITEMS, TRAINED = 12, 10  # the last two items of the catalogue are cold
HISTORY, POSITIONS = 5, 3
TASKS: dict[str, dict[str, Any]] = {
    "next": {"kind": "retrieval"},
    "click": {"kind": "binary"},
    "stars": {"kind": "regression", "where": "click", "weight": 0.5},
    "genre": {"kind": "multiclass"},
}
FEATURES: dict[str, dict[str, Any]] = {
    "segment": {"on": "context"},
    "tags": {"on": "context", "kind": "multi_valued", "max_values": 3},
    "age": {"on": "context", "kind": "numeric"},
    "hour": {"on": "request"},
    "discount": {"on": "request", "kind": "numeric"},
    "brand": {"on": "item"},
    "price": {"on": "item", "kind": "numeric"},
    "click": {"on": "history"},
}
SPARSE = {"tags": {"update": "sparse"}, "brand": {"update": "sparse"}}  # as items are


def experiment(**sections: dict[str, Any]) -> Experiment:
    """Tasks are replaced; the other sections extend what is here."""
    base: dict[str, dict[str, Any]] = {
        "data": {"user": "user", "item": "item", "time": "time", "history_length": HISTORY},
        "model": {
            "width": 8,
            "dropout": 0.1,
            "encoder": {"kind": "transformer", "layers": 1, "heads": 2},
            "towers": {"kind": "mmoe", "experts": 2, "expert_hidden": [8], "tower_hidden": [6]},
            "temperature": 0.2,
            "fusion": "attention",  # which learns
        },
        "train": {
            "steps": 20,
            "batch_size": 8,
            "negatives": {"kind": "popular", "count": 6, "power": 0.5},
        },
    }
    tasks, features = sections.pop("tasks", TASKS), sections.pop("features", FEATURES)
    sparse = {name: rule for name, rule in SPARSE.items() if name in features}
    return parse_experiment(
        {
            "name": "tiny",
            "tasks": tasks,
            "features": features,
            "tables": sparse | sections.pop("tables", {}),
        }
        | {name: values | sections.get(name, {}) for name, values in base.items()}
    )


def without_history(**sections: dict[str, Any]) -> tuple[Experiment, Manifest, Batch]:
    """The same without a past, which has no encoder to compile, and a batch of it."""
    features = {name: of for name, of in FEATURES.items() if of["on"] != "history"}
    declared = experiment(features=features, data={"history_length": 0}, **sections)
    learned = dataclasses.replace(manifest(), history_length=0, history=())
    examples = batch(0)
    return declared, learned, examples._replace(events={}, cutoff=examples.cutoff * 0)


def manifest(features: bool = True) -> Manifest:
    """What preparation would have learned; `features=False` leaves the items to their rows."""
    found: dict[str, Any] = {}
    if features:
        found = {
            "context_ids": (
                IdField(name="segment", size=5, slots=1),
                IdField(name="tags", size=7, slots=3),
            ),
            "context_numbers": (NumberField(name="age", mean=0.0, std=1.0),),
            "request_ids": (IdField(name="hour", size=6, slots=1),),
            "request_numbers": (NumberField(name="discount", mean=0.0, std=1.0),),
            "item_ids": (IdField(name="brand", size=5, slots=1),),
            "item_numbers": (NumberField(name="price", mean=0.0, std=1.0),),
            "history": (IdField(name="click", size=4, slots=1),),
        }
    return Manifest(
        format=FORMAT,
        name="tiny",
        protocol="made up",
        fingerprint="0" * 16,
        cleaned="0" * 16,
        config={},
        users=20,
        items=ITEMS,
        trained_items=TRAINED,
        events=100,
        quarantined=0,
        split=SplitInfo(kind="leave_one_out", seed=0, sizes={"train": 60}, fingerprint="0" * 16),
        history_length=HISTORY,
        examples={"train": 20},
        positions={"train": POSITIONS},
        targets={"train": 60},
        tasks={
            "click": TaskField(mean=0.5, std=0.5),
            "stars": TaskField(mean=3.0, std=2.0),
            "genre": TaskField(classes=("a", "b", "c")),
            "next": TaskField(),
        },
        **found,
    )


def catalogue(dtype: str = "float32", features: bool = True, power: float = 0.5) -> Catalogue:
    """Twelve items with different counts; the features of every item differ."""
    rng = np.random.default_rng(7)
    ids = np.zeros((ITEMS + FIRST, int(features)), np.int32)
    numbers = np.zeros((ITEMS + FIRST, int(features)), np.float32)
    if features:
        ids[FIRST:] = rng.integers(1, 5, (ITEMS, 1))
        numbers[FIRST:] = rng.normal(size=(ITEMS, 1))
    counts = np.concatenate([np.arange(1, TRAINED + 1), np.zeros(ITEMS - TRAINED, int)])
    return make_catalogue({"ids": ids, "numbers": numbers}, counts, TRAINED, power, dtype)


def batch(seed: int, size: int = 8, dtype: str = "float32", features: bool = True) -> Batch:
    """Random examples; some histories are short, some positions padded, some labels missing."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, HISTORY + 1, (size, 1))
    filled = np.arange(HISTORY) < length
    shape = (size, POSITIONS)
    real = np.arange(POSITIONS) < rng.integers(1, POSITIONS + 1, (size, 1))
    events = {"item": np.where(filled, rng.integers(FIRST, TRAINED + FIRST, filled.shape), 0)}
    context: dict[str, np.ndarray] = {}
    request: dict[str, np.ndarray] = {}
    if features:
        events["ids"] = np.where(filled, rng.integers(1, 4, filled.shape), 0)[:, :, None]
        tags = rng.integers(0, 7, (size, 3))
        context["ids"] = np.concatenate([rng.integers(0, 5, (size, 1)), tags], 1).astype(np.int32)
        context["numbers"] = rng.normal(size=(size, 1)).astype(dtype)
        request["ids"] = rng.integers(0, 6, (*shape, 1)).astype(np.int32)
        request["numbers"] = rng.normal(size=(*shape, 1)).astype(dtype)
    click = rng.integers(0, 2, shape)
    mask = {
        "next": real,
        "click": real & (rng.random(shape) < 0.8),
        "stars": real & (click == 1),
        "genre": real,
    }
    labels = {
        "next": np.ones(shape),
        "click": click,
        "stars": rng.integers(1, 6, shape),
        "genre": rng.integers(0, 3, shape),
    }
    return Batch(
        context=context,
        request=request,
        events={name: values.astype(np.int32) for name, values in events.items()},
        cutoff=np.minimum(rng.integers(0, HISTORY + 1, shape), length).astype(np.int32),
        candidate=np.where(real, rng.integers(FIRST, TRAINED + FIRST, shape), 0).astype(np.int32),
        labels={
            name: np.where(mask[name], values, 0).astype(dtype) for name, values in labels.items()
        },
        mask={name: values.astype(dtype) for name, values in mask.items()},
        user=np.arange(FIRST, size + FIRST, dtype=np.int32),
        weight=real.astype(dtype),
        row=np.where(real, np.arange(size * POSITIONS).reshape(shape), -1),
    )


def forward(
    model: Model,
    params: PyTree,
    tables: dict[str, jax.Array],
    items: Catalogue,
    examples: Batch,
    key: jax.Array | None = None,
) -> tuple[jax.Array, UserStates, Outputs]:
    """Vectors of the whole catalogue, states and outputs at every position, of states with dropout
    where there is a key."""
    everything = np.arange(items.row.shape[0], dtype=np.int32)
    stacks = tables | ({DENSE: params[DENSE]} if DENSE in params else {})
    rows = fetch(model.layout, stacks, model.item_ids(everything, items))
    vectors = model.items(params, rows, items, everything)
    wanted = model.ids(examples, items, None)
    rows = fetch(model.layout, stacks, wanted.ids)
    none = np.zeros((len(examples.user), 0), np.int32)
    past = jax.numpy.take(vectors, examples.events.get("item", none), axis=0)
    states = model.users(params, rows, past[..., : model.layout.width], examples, key)
    candidates = jax.numpy.take(vectors, examples.candidate, axis=0)
    return vectors, states, model.score(params, states, candidates)
