"""Tables whose rows are shared by hash functions: trained like any other, on any devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from mtrec_jax.data.dataset import Manifest
from mtrec_jax.models.model import make_model
from mtrec_jax.models.network import make_plan
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.layout import addresses
from mtrec_jax.train.step import make_step
from mtrec_jax.types import TrainState
from tests import tiny

SIZE, STEPS = 16, 12
EXPERIMENT = tiny.experiment(
    train={"batch_size": SIZE, "learning_rate": 5e-3},
    model={"item_placement": "dense", "towers": "shared_bottom", "fusion": "none"},
)


def manifest() -> Manifest:
    """A single id in the dense stack, a bag and an item's feature in the sparse one, all hashed."""
    made = tiny.manifest()
    segment, tags = made.context_ids
    shared: dict[str, Any] = {"hash_rows": 300, "hash_functions": 2}
    [brand] = made.item_ids
    return replace(
        made,
        context_ids=(replace(segment, **shared), replace(tags, **shared)),
        item_ids=(replace(brand, **shared | {"hash_functions": 3}),),
    )


def trained(shape: tuple[int, int]) -> list[TrainState]:
    """The state before and after each of some steps on one batch."""
    mesh, learned = make_mesh(shape), manifest()
    step = make_step(EXPERIMENT, learned, make_model(EXPERIMENT, learned), mesh, 20)
    catalogue = replicate(tiny.catalogue(), mesh)
    state = step.init(jax.random.key(3, impl="rbg"))
    seen = [_copied(state)]
    for _ in range(STEPS):
        state = step.update(state, put_batch(tiny.batch(0, SIZE), mesh), catalogue)
        seen.append(_copied(state))
    return seen


def _copied(state: TrainState) -> TrainState:
    return jax.tree.map(np.array, state._replace(key=jax.random.key_data(state.key)))


@pytest.fixture(scope="module")
def single() -> list[TrainState]:
    return trained((1, 1))


def test_exactly_the_rows_of_the_ids_of_a_batch_are_trained(single: list[TrainState]) -> None:
    before, after = single[0], single[-1]
    plan, ids = make_plan(EXPERIMENT, manifest()), tiny.batch(0, SIZE).context["ids"]
    assert plan.rows["lazy_adam"] == 5 * 128  # two tables of 302 rows
    find = jax.jit(lambda ids, items: (addresses(plan.context, ids), addresses(plan.item, items)))
    tags, brands = (np.asarray(a["lazy_adam"]) for a in find(ids, tiny.catalogue().ids))
    assert tags.shape == (SIZE, 6)
    assert brands.shape == (tiny.ITEMS + 2, 3)
    moved = np.flatnonzero((before.tables["lazy_adam"] != after.tables["lazy_adam"]).any(axis=1))
    looked_up = {*tags.reshape(-1).tolist(), *brands.reshape(-1).tolist()} - {-1}
    assert set(moved.tolist()) == looked_up
    counts = after.slots["lazy_adam"]["count"]
    assert set(counts[moved].tolist()) == {STEPS}  # once a step, however many ids share the row


def test_it_learns(single: list[TrainState]) -> None:
    first, before, last = single[1].sums, single[-2].sums, single[-1].sums
    for task in ("click", "stars", "genre"):
        now = (last[task] - before[task])[0] / first[task][1]
        assert now < 0.95 * first[task][0] / first[task][1]


@pytest.mark.slow
def test_devices_agree(single: list[TrainState]) -> None:
    """Through the exchange of rows between the shards of a table."""

    def learned(state: TrainState) -> list[np.ndarray]:
        return jax.tree.leaves((state.params["dense"], state.tables, state.sums))

    for one, other in zip(learned(single[-1]), learned(trained((2, 4))[-1]), strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(one).max()
