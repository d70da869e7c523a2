"""What the model says and in which order, from numbers given by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.losses import fusion as order
from mtrec_jax.losses.negatives.catalogue import Popular
from mtrec_jax.models import serve
from mtrec_jax.models.model import make_model
from mtrec_jax.models.objective import states_of
from mtrec_jax.models.serve import load_catalogue, predictions, prepared_serving
from mtrec_jax.sharding import make_mesh
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.run import Run, load_best
from mtrec_jax.types import FIRST, Outputs, PyTree, Shared
from tests import tiny


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_predictions_of_every_kind_from_given_logits(xp: object) -> None:
    """Odds of 3 to 1; stars of mean 3 and deviation 2; classes 1 : 2 : 5; a temperature of 1/5."""
    logits = {
        "click": np.log([[3.0, 1 / 3]]),
        "stars": np.array([[0.0, -0.75]]),
        "genre": np.log([[[1.0, 2.0, 5.0], [2.0, 2.0, 4.0]]]) + 7,
        "next": np.array([[4.0, -2.5]]),
    }
    found = predictions(tiny.experiment(), tiny.manifest(), logits, xp)
    expected: dict[str, Any] = {
        "click": [[0.75, 0.25]],
        "stars": [[3.0, 1.5]],
        "genre": [[[1 / 8, 2 / 8, 5 / 8], [1 / 4, 1 / 4, 1 / 2]]],
        "next": [[0.8, -0.5]],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


def test_the_fusion_learns_from_the_hardest_negatives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target and the 3 of 6 negatives of the highest cosine, in plain NumPy; the fused score of
    a pair is what serving answers."""
    monkeypatch.setattr(order, "CANDIDATES", 4)
    experiment = tiny.experiment(model={"dropout": 0.0, "temperature": 0.5})
    model, catalogue, size = make_model(experiment, tiny.manifest()), tiny.catalogue(), 16
    batch = tiny.batch(5, size)
    mesh = make_mesh((1, 1))
    lottery = np.random.default_rng(1).random((size, tiny.POSITIONS)).astype(np.float32)
    rng = np.random.default_rng(0)

    def draw(like: Any) -> jax.Array:
        return jnp.asarray(0.5 * rng.normal(size=like.shape), jnp.float32)

    params: PyTree = jax.tree.map(draw, model.abstract)
    stacks = {s: draw(jax.ShapeDtypeStruct((n, 8), "f4")) for s, n in model.layout.rows.items()}
    params[DENSE] = stacks.pop(DENSE)

    @jax.jit
    def shared_and_loss() -> tuple[Shared, jax.Array, jax.Array, dict[str, jax.Array]]:
        wanted = model.ids(batch, catalogue, jax.random.key(4))
        rows = fetch(model.layout, stacks | {DENSE: params[DENSE]}, wanted.ids)
        shared = model.encode(params, rows, batch, catalogue, wanted, None)
        _, fusing = model.losses(params, shared, batch, catalogue, wanted, None)
        assert model.fusion_loss is not None
        loss = model.fusion_loss(params, shared, fusing, batch, wanted, jnp.asarray(lottery), mesh)
        return shared, wanted.negatives, loss, model.weights(batch, jnp.asarray(lottery))

    @jax.jit
    def fused_of(shared: Shared, candidates: np.ndarray) -> Outputs:
        return model.score(params, states_of(shared, batch), jnp.asarray(candidates))

    shared, negatives, loss, weights = jax.device_get(shared_and_loss())
    own = np.asarray(fused_of(shared, shared.candidates).fused)
    others = np.stack(
        [
            fused_of(shared, np.broadcast_to(vector, shared.candidates.shape)).fused
            for vector in shared.negatives
        ],
        axis=-1,
    )  # (B, P, n)

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)

    total, weight, easy, left_out = 0.0, 0.0, 0, 0
    for b in range(size):
        liked = batch.labels["next"][b] * batch.mask["next"][b]
        clicked = batch.labels["click"][b] * batch.mask["click"][b]
        worth = (liked + clicked) / 2 * batch.mask["next"][b] * batch.weight[b]
        p = int(np.argmax(lottery[b] * (worth > 0)))
        weight += float(worth[p])
        user, target = unit(shared.users[b, p]), batch.candidate[b, p]
        cosines = unit(shared.negatives) @ user
        cosines = np.where(negatives == target, -np.inf, cosines)
        hardest = np.argsort(-cosines, kind="stable")[:3]
        easy += set(hardest) != set(np.argsort(cosines)[:3])
        if unit(shared.candidates[b, p]) @ user < cosines[hardest[-1]]:
            left_out += 1
            continue
        scores = [own[b, p], *(others[b, p, n] for n in hardest if negatives[n] != target)]
        total += float(worth[p] * (np.log(np.exp(scores).sum()) - own[b, p]))
    assert easy
    assert 0 < left_out < size
    assert np.abs(others.std(axis=-1)).min() > 1e-3
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    np.testing.assert_allclose(weights["fusion"], weight, rtol=1e-5)


def test_item_vectors_do_not_depend_on_the_chunks(
    shop_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 items and the two that are none, 16 at a time."""
    params, tables, _ = load_best(shop_run)
    serving = prepared_serving(shop_run.experiment, shop_run.prepared)
    whole = np.asarray(serving.item_vectors(params, tables))
    assert len(np.unique(whole[2:], axis=0)) == len(whole) - 2 == 60
    monkeypatch.setattr(serve, "ITEM_CHUNK", 16)
    np.testing.assert_allclose(serving.item_vectors(params, tables), whole, rtol=1e-5, atol=1e-7)


def test_the_power_of_the_negatives_is_that_of_the_configuration(shop_run: Run) -> None:
    """Of what the retrieval is to find, the events with a click; an item without any as if once."""
    trained, train = shop_run.prepared.manifest.trained_items, shop_run.prepared.interactions()
    clicked = train["candidate"][train["label_click"] == 1] - FIRST
    counts = np.maximum(np.bincount(clicked, minlength=shop_run.prepared.manifest.items), 1.0)
    assert counts[:trained].min() < counts.max()
    for power in (0.0, 0.5, 1.0):
        negatives = Popular(power=power)
        settings = replace(shop_run.experiment.train, negatives=negatives)
        experiment = replace(shop_run.experiment, train=settings)
        found = np.exp(load_catalogue(shop_run.prepared, experiment).log_probability)
        expected = np.where(np.arange(len(counts)) < trained, counts**power, 0)
        np.testing.assert_allclose(found[2:], expected / expected.sum(), rtol=1e-4)
