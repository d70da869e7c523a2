"""Parts of the network that are small enough to be worked out by hand."""

from __future__ import annotations

import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from mtrec_jax.config import Model
from mtrec_jax.models.network import Network
from mtrec_jax.models.towers import TowerTask
from mtrec_jax.types import Fusing


class _Inputs:
    """What the mean of tasks has to know of them."""

    retrieval = "next"
    tasks: ClassVar = {
        "click": TowerTask("binary"),
        "stars": TowerTask("regression"),
        "genre": TowerTask("multiclass", 4),
    }


def test_without_a_fusion_tasks_are_averaged_on_one_scale() -> None:
    """By hand, of two pairs: cosines 0.5 and -1 are 0.75 and 0; probabilities of log-odds log 3 and
    0; the normal distribution below 1 and 0; class numbers 1.5 and 3 of 0 to 3."""
    layers = object.__new__(Network)
    object.__setattr__(layers, "config", Model(fusion="none", temperature=0.05))
    object.__setattr__(layers, "inputs", _Inputs())
    scores = {
        "next": jnp.array([10.0, -20.0]),
        "click": jnp.array([math.log(3), 0.0]),
        "stars": jnp.array([1.0, 0.0]),
        "genre": jnp.array([1.5, 3.0]),
    }
    fused, weights = layers.fuse(Fusing(jnp.zeros((2, 0)), {}, scores))
    expected = [(0.75 + 0.75 + 0.841345 + 0.5) / 4, (0.0 + 0.5 + 0.5 + 1.0) / 4]
    np.testing.assert_allclose(fused, expected, rtol=1e-5)
    np.testing.assert_allclose(weights, np.full((2, 4), 0.25))
