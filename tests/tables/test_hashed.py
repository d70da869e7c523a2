"""Tables whose rows are shared by hash functions: trained like any other, on any devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mtrec_jax.models.model import make_model
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.layout import addresses
from mtrec_jax.train.step import make_step
from mtrec_jax.types import TrainState
from tests import tiny

SIZE, STEPS = 16, 12
# a single id in the dense stack, a bag and an item's feature in the sparse one, all hashed
EXPERIMENT = tiny.experiment(
    train={"batch_size": SIZE, "learning_rate": 5e-3},
    model={"towers": {"kind": "shared_bottom", "expert_hidden": [8]}, "fusion": "none"},
    tables={
        "item": {"update": "dense"},
        "segment": {"hash_rows": 300},
        "tags": {"update": "sparse", "hash_rows": 300},
        "brand": {"update": "sparse", "hash_rows": 300, "hash_functions": 3},
    },
)
MODEL = make_model(EXPERIMENT, tiny.manifest())


def trained(shape: tuple[int, int]) -> list[TrainState]:
    """The state before and after each of some steps on one batch."""
    mesh = make_mesh(shape)
    step = make_step(EXPERIMENT, MODEL, mesh, 20)
    catalogue = replicate(tiny.catalogue(), mesh)
    state = step.init(3)
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


@pytest.mark.slow
def test_exactly_the_rows_of_the_ids_of_a_batch_are_trained(single: list[TrainState]) -> None:
    before, after = single[0], single[-1]
    assert MODEL.layout.rows["lazy_adam"] == 5 * 128  # two tables of 302 rows
    ids = {"context": tiny.batch(0, SIZE).context["ids"], "item_features": tiny.catalogue().ids}
    found = jax.jit(lambda ids: {g: addresses(MODEL.layout.groups[g], i) for g, i in ids.items()})(
        ids
    )
    tags, brands = (np.asarray(found[group]["lazy_adam"]) for group in ids)
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
