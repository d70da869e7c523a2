"""Members of an ensemble in one model: what each says, what all say, and what they learn from."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.models.members import Members, mean_answer
from mtrec_jax.models.objective import make_objective
from mtrec_jax.models.towers import TOWERS, TowerOutput, TowerTask
from mtrec_jax.types import Outputs, Shared
from tests import tiny
from tests.models.test_towers import FLOAT, NAMES, SIZES, X, _pairs

K = 3


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


def members(towers: Any) -> tuple[Members, TowerOutput]:
    alone = towers(_pairs(X))
    hidden = {task: h.shape[-1] for task, h in alone.hidden.items()}
    return Members(K, X.shape[1], hidden, SIZES.tasks, dtype=FLOAT, rngs=nnx.Rngs(5)), alone


@pytest.mark.parametrize("kind", TOWERS)
def test_a_member_is_the_towers_on_its_own_scales_with_its_own_head(kind: str) -> None:
    """Each member by itself: the towers on x times its scales, plus its head on their hidden
    vectors. With scales of 1 and no heads all answer as the towers alone."""
    towers = TOWERS[kind]().make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(1))
    several, alone = members(towers)
    scales = np.asarray(several.scales[...])
    assert set(scales.ravel()) == {-1.0, 1.0}
    assert len({tuple(row) for row in scales}) == K
    said = several.logits(towers(several.given(_pairs(X))))
    for k in range(K):
        one = towers(_pairs(X * scales[k]))
        for task in NAMES:
            expected = np.asarray(one.logits[task])
            if task in one.hidden:
                head = np.asarray(several.heads[several.names.index(task)][...])[k]
                expected = expected + (np.asarray(one.hidden[task]) @ head)[:, 0]
            np.testing.assert_allclose(said[task][:, k], expected, rtol=1e-4, atol=1e-5)
    several.scales[...] = jnp.ones_like(several.scales[...])
    for head in several.heads:
        head[...] = jnp.zeros_like(head[...])
    found = towers(several.given(_pairs(X)))
    all_together = several.together(found, several.logits(found))
    for part in ("logits", "hidden", "diagnostics"):
        for name, value in getattr(alone, part).items():
            np.testing.assert_allclose(
                getattr(all_together, part)[name], value, rtol=1e-4, atol=1e-5
            )


def test_the_loss_is_the_mean_of_the_members_losses() -> None:
    """Two members with probabilities 1/2 and 9/10 of every click: the mean of log 2 and -log .9 for
    a 1, of log 2 and log 10 for a 0; not that of their common probability. So are losses that the
    towers bring."""
    batch = tiny.batch(0)
    shape = batch.weight.shape
    each = jnp.broadcast_to(jnp.array([0.0, math.log(9)]), (*shape, 2))
    none = jnp.zeros((shape[0], 0, 1))
    outputs = Outputs({"click": each[..., 0]}, none, none, {}, {"click": each})

    class Towers:
        extra_losses = ("size",)

        def losses(self, logits: Any, labels: Any, mask: Any) -> Any:
            return {"size": (jnp.square(logits["click"]), mask["click"])}

    layers = SimpleNamespace(towers=Towers(), outputs=lambda *_: (outputs, None))
    inputs = SimpleNamespace(tasks={"click": TowerTask("binary")}, has_items=False, retrieval=None)
    experiment = tiny.experiment(tasks={"click": {"kind": "binary"}}, model={"fusion": "none"})
    made = make_objective(experiment, tiny.manifest(), inputs, lambda _: layers, layers)  # type: ignore[arg-type]
    shared = Shared(none, none[:, 0], none, none, none, none, none[0])
    sums, _ = made.losses({}, shared, batch, None, None, None)
    weight = batch.weight * batch.mask["click"]
    ones, zeros = (weight * (batch.labels["click"] == value) for value in (1, 0))
    expected = ones.sum() * (math.log(2) - math.log(0.9)) / 2
    expected += zeros.sum() * (math.log(2) + math.log(10)) / 2
    np.testing.assert_allclose(sums["click"], expected, rtol=1e-5)
    np.testing.assert_allclose(sums["size"], weight.sum() * math.log(9) ** 2 / 2, rtol=1e-5)
