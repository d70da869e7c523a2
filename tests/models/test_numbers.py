"""Embeddings of numbers (Gorishniy et al. 2022) on cases worked out by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.models.inputs import Inputs, ItemTower, SideFeatures, make_inputs
from mtrec_jax.models.numbers import NumberSizes
from mtrec_jax.models.numbers.linear import LinearNumbers
from mtrec_jax.models.numbers.periodic import PeriodicNumbers
from mtrec_jax.models.numbers.plain import PlainNumbers
from mtrec_jax.tables.layout import make_layout
from tests import tiny

FLOAT = jnp.dtype("float32")


def test_each_feature_has_a_linear_layer_and_relu_of_its_own() -> None:
    """A number 2 and a piecewise code [1, 0.5]: [2 * 3 + 1, relu(-2)], [1 + 2, 10 + 10]."""
    sizes = NumberSizes(slots=(1, 2), width=2, coded=(False, True))
    module = LinearNumbers().make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))
    module.layers[0].kernel[...] = jnp.array([[3.0, -1.0]])
    module.layers[0].bias[...] = jnp.array([1.0, 0.0])
    module.layers[1].kernel[...] = jnp.array([[1.0, 10.0], [4.0, 20.0]])
    found = module(jnp.array([[[2.0, 1.0, 0.5]]]))
    np.testing.assert_allclose(found, [[[7, 0, 3, 20]]])
    assert (module.outputs, module.fields) == (4, 2)


def test_a_number_becomes_sines_and_cosines_of_its_frequencies() -> None:
    """x = 0.5 at c = 0.5 and 1: angles pi / 2 and pi. A second number -1 with a mark of missing at
    c = 0.25: -pi / 2. A code of two numbers, and one of one, have no frequency and go on as they
    are. Layers of ones and no bias add up [sines, cosines, the rest]."""
    sizes = NumberSizes(slots=(1, 2, 2, 1), width=1, coded=(False, False, True, True))
    module = PeriodicNumbers(frequencies=2).make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))
    module.frequencies[...] = jnp.array([[0.5, 1.0], [0.25, 0.0]])
    for layer, weights in zip(
        module.embedded.layers,
        ([1, 10, 100, 1000], [-1, 10, 100, 1000, 10000], [1, 1], [2]),
        strict=True,
    ):
        layer.kernel[...] = jnp.array(weights, FLOAT)[:, None]
    found = module(jnp.array([[0.5, -1.0, 1.0, 1.0, 0.25, 0.5]]))
    first = max(0, 1 * 1 + 10 * 0 + 100 * 0 + 1000 * -1)
    np.testing.assert_allclose(found[0], [first, 1 + 0 + 0 + 1000 + 10000, 1.25, 1], atol=1e-2)
    module.embedded.layers[0].kernel[...] = jnp.array([[1.0], [10.0], [100.0], [-1000.0]])
    np.testing.assert_allclose(module(jnp.array([[0.5, 0, 0, 0, 0, 0]]))[0, 0], 1001, atol=1e-2)
    assert (module.outputs, module.fields) == (4, 4)


def test_the_kind_of_a_feature_says_what_is_a_code() -> None:
    """A code of a single number is none: it has a linear layer of 1 x D and no frequencies."""
    features = tiny.FEATURES | {"discount": {"on": "request", "kind": "piecewise", "bins": 1}}
    inputs = make_inputs(tiny.experiment(features=features), tiny.manifest())
    assert inputs.coded["request"] == (True,)
    assert inputs.coded["context"] == (False,)
    numbers = PeriodicNumbers(frequencies=2)
    side = SideFeatures(inputs, "request", numbers, dtype=FLOAT, rngs=nnx.Rngs(0))
    assert side.numbers.embedded.layers[0].kernel.shape == (1, 8)


def test_features_of_a_moment_hold_their_numbers_embedded_and_cut_off() -> None:
    """Numbers stand behind the embeddings, as fields as wide as they; 9 deviations count as 5."""
    layout = make_layout({}, {}, width=4)
    inputs = Inputs(layout, {"request": (1,)}, (), {}, {}, None, {}, False, False, 0, {})
    side = SideFeatures(inputs, "request", LinearNumbers(), dtype=FLOAT, rngs=nnx.Rngs(1))
    batch = tiny.batch(0, size=2)
    numbers = np.full((2, tiny.POSITIONS, 1), 9.0, np.float32)
    found = side(batch._replace(request={"numbers": numbers}), {}, FLOAT)
    layer = side.numbers.layers[0]
    expected = np.maximum(5 * np.asarray(layer.kernel[...])[0], 0)
    np.testing.assert_allclose(found[1, 2], expected, rtol=1e-6)
    assert expected.any()
    assert (side.outputs, side.fields) == (4, 1)


def test_numbers_of_an_item_are_cut_off_and_vectors_of_its_text_are_not() -> None:
    layout = make_layout({}, {}, width=4)
    inputs = Inputs(layout, {"item": (1, 2)}, (), {}, {}, None, {}, False, False, 0, {})
    inputs = inputs._replace(coded={"item": (False, True)})
    tower = ItemTower(inputs, 1.0, PlainNumbers(), dtype=FLOAT, rngs=nnx.Rngs(1))
    own, ids = jnp.zeros((3, 4)), jnp.zeros((3, 0), jnp.int32)
    numbers = jnp.array([[5.0, 7.0, 0.0], [-2.0, 7.0, 0.0], [900.0, 7.0, 0.0]])
    found = tower(own, None, ids, numbers)
    np.testing.assert_array_equal(found[0], found[2])
    assert tower.features is not None
    kernel, bias = (np.asarray(part[...]) for part in (tower.features.kernel, tower.features.bias))
    np.testing.assert_allclose(found[1], [-2, 7, 0] @ kernel + bias, rtol=1e-5)
