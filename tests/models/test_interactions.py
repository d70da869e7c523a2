"""Feature interactions by hand: the formulas of their papers on fields that are small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.models.interactions import InteractionSizes
from mtrec_jax.models.interactions.dcn import DCN, CrossNetwork
from mtrec_jax.models.interactions.dot import Dot
from mtrec_jax.models.interactions.fm import FM
from mtrec_jax.models.towers import TowerInput, TowerOutput, TowerTask
from mtrec_jax.types import UserStates
from tests.models.test_network import made, mean

FLOAT = jnp.dtype("float32")
X = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
FIELDS = jnp.array([[[1.0, 2.0], [3.0, 0.0], [-1.0, 4.0]]])  # one pair, F = 3, D = 2
SIZES = InteractionSizes(inputs=1, fields=3, width=2)


def crossing(layers: int, rank: int) -> CrossNetwork:
    sizes = InteractionSizes(inputs=2, fields=0, width=2)
    return DCN(layers=layers, rank=rank).make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))


def test_cross_layers_multiply_the_first_input_and_add_the_last() -> None:
    """x_1 = x_0 * (W x_0 + b) + x_0, by hand: W x_0 + b = [1 + 6 + 1, 2 + 8] of x_0 = [1, 2]; and
    x_2 again with x_0, not x_1, as its factor (Wang et al. 2021, equation 1)."""
    network = crossing(layers=2, rank=0)
    kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    for layer in network.cross:
        layer.kernel[...], layer.bias[...] = kernel, jnp.array([1.0, 0.0])
    first = np.array([1 * 8 + 1, 2 * 10 + 2.0])
    second = np.array([1 * (9 + 66 + 1) + 9, 2 * (18 + 88) + 22.0])
    np.testing.assert_allclose(network(X, FIELDS)[0], second)
    network.cross = nnx.List(network.cross[:1])
    np.testing.assert_allclose(network(X, FIELDS)[0], first)
    assert network.outputs == 2


def test_a_low_rank_is_the_product_of_two_narrow_matrices() -> None:
    """With W = U V^T of rank 1: x V = 1 + 2 * 2 = 5, times U = [10, 20], of x_0 = [1, 2]."""
    network = crossing(layers=1, rank=1)
    network.narrow[0][...] = jnp.array([[1.0], [2.0]])
    network.cross[0].kernel[...] = jnp.array([[10.0, 20.0]])
    np.testing.assert_allclose(network(X, FIELDS)[0], [1 * 50 + 1, 2 * 100 + 2])


def test_dot_products_are_of_each_pair_of_fields_once() -> None:
    """By hand: <v2, v1> = 3, <v3, v1> = -1 + 8, <v3, v2> = -3, over the root of 2; x stays."""
    dot = Dot().make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    found = dot(jnp.array([[7.0]]), FIELDS)
    np.testing.assert_allclose(found[0], [7, *(np.array([3, 7, -3]) / 2**0.5)], rtol=1e-6)
    assert dot.outputs == 4


def test_the_second_order_term_is_the_sum_over_pairs() -> None:
    """v1 v2 + v1 v3 + v2 v3 by dimension: 3 - 1 - 3 and 0 + 8 + 0, over F = 3; their sum is the sum
    of the dot products, 3 + 7 - 3 (Rendle 2010, equation 1)."""
    fm = FM().make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    found = fm(jnp.array([[7.0]]), FIELDS)
    np.testing.assert_allclose(found[0], [7, -1 / 3, 8 / 3], rtol=1e-6)
    np.testing.assert_allclose(3 * found[0, 1:].sum(), 3 + 7 - 3, rtol=1e-6)
    assert fm.outputs == 3


def test_fields_are_the_embedded_features_the_user_and_the_candidate() -> None:
    """Of a user with one embedded feature and a number, and a moment with one embedded feature."""
    seen: dict[str, Any] = {}

    def interaction(x: Any, fields: Any) -> Any:
        seen.update(x=x, fields=fields)
        return x * 2

    def towers(given: TowerInput) -> TowerOutput:
        seen["towers"] = given.x
        return TowerOutput({"stars": given.x[:, 0]}, {}, {})

    inputs = SimpleNamespace(
        has_items=True,
        has_events=False,
        retrieval=None,
        order=("stars",),
        tasks={"stars": TowerTask("regression")},
        levels={},
        own=(),
        read={},
        thresholds={},
    )
    parts: dict[str, Any] = {
        "context": SimpleNamespace(fields=1),
        "request": SimpleNamespace(fields=1),
    }
    parts |= {"members": None, "thresholds": [], "fusion": mean("stars"), "width": 2}
    parts |= {"other_towers": [], "other_users": []}
    layers = made(inputs, dtype=FLOAT, interactions=[interaction], towers=towers, **parts)
    none = jnp.zeros((1, 0, 2))
    user, item = jnp.array([[[5.0, 6.0]]]), jnp.array([[[3.0, 4.0]]])
    context, request = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[[3.0, 4.0]]])
    layers.outputs(
        UserStates(user, context, request, none, none, jnp.zeros((1, 1), int)), item, None
    )
    unit = [0.6 * 2**0.5, 0.8 * 2**0.5]
    expected = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], unit])
    np.testing.assert_allclose(seen["fields"][0], expected, rtol=1e-5)
    np.testing.assert_allclose(seen["x"][0, :5], [1, 2, 9, 3, 4])
    np.testing.assert_allclose(seen["towers"], 2 * seen["x"])
