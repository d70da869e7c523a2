"""What a step is made of can be compiled for accelerators that are not here: it is lowered only."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.kernels.softmax import softmax_loss
from mtrec_jax.models.encoders import Behaviour, EncoderSizes
from mtrec_jax.models.encoders.transformer import Transformer
from mtrec_jax.models.model import make_model
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.exchange import Buffers, look_up, update
from mtrec_jax.tables.layout import BITS
from mtrec_jax.tables.rules import RULES
from mtrec_jax.tables.update import apply_rows, update_rows
from mtrec_jax.train.step import make_step
from tests import tiny

PLATFORMS = ("cuda", "tpu")


def lowered(traced: Any) -> str:
    """The program for all platforms; it raises where an operation has no rule for one of them."""
    texts = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in PLATFORMS]
    assert all(texts)
    return texts[0]


@pytest.mark.parametrize("shape", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4)])
def test_the_step(shape: tuple[int, int]) -> None:
    """With dropout, negatives, both kinds of tables and the fusion; over devices, the exchange."""
    train = {"batch_size": 16, "row_precision": "bfloat16", "optimizer": "adamw", "clip_norm": 1.0}
    experiment, mesh = tiny.experiment(train=train), make_mesh(shape)
    step = make_step(experiment, make_model(experiment, tiny.manifest()), mesh, 10)
    given = put_batch(tiny.batch(0, 16), mesh), replicate(tiny.catalogue(), mesh)
    text = lowered(step.update.trace(step.abstract, *given))  # type: ignore[attr-defined]
    assert "stablehlo.dot_general" in text
    assert ("all_to_all" in text) == (shape == (2, 4))


def _deep(layers: int, width: int, length: int, deep: bool) -> Any:
    """The gradients of an encoder's parameters, traced without any array."""
    options = Transformer(layers=layers, heads=16, expansion=4, deep=deep, compute="bfloat16")
    sizes, like = EncoderSizes(width, length, 0.1), jax.ShapeDtypeStruct
    encoder = nnx.eval_shape(
        lambda: options.make(sizes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(encoder)

    def loss(state: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        known = jnp.ones(tokens.shape[:2], bool)
        return jnp.sum(nnx.merge(graph, state)(Behaviour(tokens, known, None), key))

    given = like((8, length, width), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(jax.grad(loss)).trace(state, *given)


@pytest.mark.slow
def test_an_encoder_of_24_layers_of_1024_is_a_loop_over_one() -> None:
    text = lowered(_deep(24, 1024, 512, True))
    assert "stablehlo.while" in text
    assert text.count("stablehlo.dot_general") < 60  # of one layer there and back
    assert "tensor<24x1024x4096xf32>" in text
    assert "bf16" in text


@pytest.mark.slow
def test_memory_of_a_loop_grows_by_the_inputs_of_its_layers_alone() -> None:
    """Beside the parameters and their gradients."""
    needed = {
        (layers, deep): _deep(layers, 64, 128, deep).lower().compile().memory_analysis()
        for layers in (4, 12)
        for deep in (True, False)
    }
    grown = {
        deep: needed[12, deep].temp_size_in_bytes - needed[4, deep].temp_size_in_bytes
        for deep in (True, False)
    }
    inputs = 8 * (8 * 128 * 64 * 4)  # of 8 more layers
    assert grown[True] < 2.5 * inputs
    assert grown[False] > 3 * grown[True]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [jnp.dtype(jnp.float32), BITS], ids=str)
def test_rows(rule: str, dtype: jnp.dtype) -> None:
    optimizer, like = RULES[rule](), jax.ShapeDtypeStruct
    table, scratch = like((512, 8), dtype), like((512,), jnp.int32)
    slots = jax.eval_shape(optimizer.init, table)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    given = table, slots, scratch, like((100,), jnp.int32), like((100, 8), jnp.float32), 0.1, key
    assert "stablehlo.scatter" in lowered(
        jax.jit(functools.partial(apply_rows, optimizer)).trace(*given)
    )


def test_the_exchange() -> None:
    mesh, sizes, rule = make_mesh((2, 4)), Buffers(16, 16), RULES["lazy_adam"]()

    def apply(rows: jax.Array, slots: Any, grads: jax.Array) -> tuple[jax.Array, Any]:
        return rule.update(rows, slots, grads, 0.1)

    def step(table: Any, slots: Any, scratch: Any, ids: Any, grads: Any) -> Any:
        _, scratch, asked = look_up(table, scratch, ids, mesh, sizes)
        changed = functools.partial(update_rows, apply)
        return update(changed, table, slots, asked, grads, mesh, sizes)

    by_row = NamedSharding(mesh, P("table"))
    table = np.zeros((512, 8), np.float32)
    put = [
        jax.device_put(a, by_row)
        for a in (table, rule.init(jnp.asarray(table)), np.zeros(512, "i4"))
    ]
    traced = jax.jit(step).trace(*put, np.zeros(96, np.int32), np.zeros((96, 8), np.float32))
    assert "all_to_all" in lowered(traced)


def test_the_softmax_and_its_gradients() -> None:
    like = jax.ShapeDtypeStruct
    queries, items = like((4, 32, 16), jnp.float32), like((10_000, 16), jnp.float32)
    ids, bias = like((10_000,), jnp.int32), like((10_000,), jnp.float32)
    targets, own = like((4, 32), jnp.int32), like((4, 32), jnp.float32)
    loss = jax.value_and_grad(softmax_loss, argnums=(0, 1))
    traced = jax.jit(loss).trace(queries, items, ids, targets, own, bias, own)
    assert "stablehlo.while" in lowered(traced)
