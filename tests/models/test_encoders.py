"""Encoders against their formulas written out in NumPy, and against their common promise."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtrec_jax.errors import ConfigError
from mtrec_jax.kernels.attention import causal_attention
from mtrec_jax.models.attention import LastSearch, TargetAttention
from mtrec_jax.models.encoders import ENCODERS, Behaviour, EncoderSizes
from mtrec_jax.models.encoders.bert4rec import BERT4Rec
from mtrec_jax.models.encoders.gru import Units
from mtrec_jax.models.encoders.hstu import HSTU, Unit
from mtrec_jax.models.encoders.mean import Mean
from mtrec_jax.models.encoders.transformer import Block, CausalTransformer, Transformer
from mtrec_jax.models.inputs import hidden_events
from tests import tiny

B, S, D = 2, 6, 12
FLOAT = jnp.dtype("float32")
SIZES = EncoderSizes(D, S, 0.1)


def _past(tokens: Any, known: Any = None) -> Behaviour:
    there = jnp.ones(tokens.shape[:2], bool) if known is None else jnp.asarray(known)
    return Behaviour(jnp.asarray(tokens), there, None)


def _linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def _normalise(layer: Any, x: np.ndarray) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])


def _block(block: Block, x: np.ndarray, heads: int) -> np.ndarray:
    """Pre-norm attention and feed-forward of one sequence [S, D], head by head, state by state."""
    normed, size = _normalise(block.norm_attention, x), D // heads
    query, key, value = (_linear(part, normed) for part in (block.query, block.key, block.value))
    mixed = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        for s in range(len(x)):
            scores = key[: s + 1, own] @ query[s, own] / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[s, own] = (weights / weights.sum()) @ value[: s + 1, own]
    x = x + _linear(block.output, mixed)
    hidden = np.maximum(_linear(block.up, _normalise(block.norm_hidden, x)), 0)
    return x + _linear(block.down, hidden)


def _random_parameters(module: nnx.Module) -> None:
    """Biases and scales start at 0 and 1, where a forgotten one would not show."""
    rng = np.random.default_rng(1)
    state = nnx.state(module, nnx.Param)
    drawn = jax.tree.map(lambda a: jnp.asarray(0.4 * rng.normal(size=a.shape), a.dtype), state)
    nnx.update(module, drawn)


def _transformer(layers: int, length: int, rate: float) -> CausalTransformer:
    sizes = EncoderSizes(D, length, rate)
    return Transformer(layers=layers, heads=2).make(sizes, dtype=FLOAT, rngs=nnx.Rngs(0))


def test_block_equals_attention_written_out() -> None:
    heads = 3
    block = Block(SIZES, Transformer(heads=heads), dtype=FLOAT, rngs=nnx.Rngs(0))
    _random_parameters(block)
    x = np.random.default_rng(2).normal(size=(B, S, D)).astype(np.float32)
    found = jax.jit(lambda x: block(x, None))(x)
    expected = [_block(block, sequence.astype(np.float64), heads) for sequence in x]
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind not in ("none", "bert4rec")])
def test_a_state_depends_on_the_tokens_up_to_it_and_on_no_later_one(kind: str) -> None:
    encoder = ENCODERS[kind]().make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    run = jax.jit(lambda x: encoder(_past(x), None))
    rng = np.random.default_rng(3)
    tokens = rng.normal(size=(1, S, D)).astype(np.float32)
    before = np.asarray(run(tokens))
    for s in range(S):
        changed = tokens.copy()
        # random, not constant: the layer norm would swallow a constant
        changed[:, s] += rng.normal(size=D).astype(np.float32)
        moved = np.abs(np.asarray(run(changed)) - before).max(axis=-1)[0]
        assert (moved[:s] == 0).all()
        assert (moved[s:] > 1e-4).all()


def test_transformer_adds_positions_drops_and_normalises() -> None:
    transformer = _transformer(1, S + 3, 0.5)
    run = jax.jit(lambda x, key: transformer(_past(x), key))
    same = np.broadcast_to(np.random.default_rng(4).normal(size=D), (1, S, D)).astype(np.float32)
    plain = np.asarray(run(same, None))
    np.testing.assert_allclose(plain.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(plain.var(axis=-1), 1, atol=1e-4)
    assert np.abs(plain[0, 0] - plain[0, -1]).max() > 1e-3  # equal tokens, unequal places
    key = jax.random.key(0)
    np.testing.assert_array_equal(run(same, key), run(same, key))
    assert np.abs(run(same, key) - plain).max() > 0.1


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.width: 12 .* model\.encoder\.heads = 5"):
        Transformer(heads=5).make(EncoderSizes(D, S, 0.0), dtype=FLOAT, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("length", [5, 128, 300])
def test_attention_in_blocks_is_attention(length: int) -> None:
    """Values and gradients, where the last block is shorter than the others."""
    rng = np.random.default_rng(length)
    q, k, v, pull = (jnp.asarray(rng.normal(size=(2, length, 4)), FLOAT) for _ in range(4))

    def written_out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("nid,njd->nij", q, k) / 2
        seen = jnp.tril(jnp.ones((1, length, length), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("nij,njd->nid", weights, v)

    def both(attention: Any) -> Any:
        def total(*given: jax.Array) -> jax.Array:
            return jnp.sum(attention(*given) * pull)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    found, expected = both(causal_attention), both(written_out)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("heads", "later"), [(1, None), (2, 3600)])
def test_pointwise_attention_with_places_and_times_written_out(
    heads: int, later: int | None
) -> None:
    """Pair by pair, as in section 3.2 of Zhai et al. 2024; events 0, 1, 60, 86,400 seconds after
    each other are in buckets 0, 0, 13 and 37. What follows is asked for an hour later, or at a time
    that is not known."""
    unit = Unit(SIZES, HSTU(heads=heads), dtype=FLOAT, rngs=nnx.Rngs(0))
    _random_parameters(unit)
    x = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
    moments = np.cumsum([[5, 0, 1, 60, 86_400, 0], [7, 1, 1, 1, 0, 60]], axis=1).astype(np.int32)
    asked = moments if later is None else moments + later
    past = _past(x)._replace(
        moments=jnp.asarray(moments), asked=None if later is None else jnp.asarray(asked)
    )
    found = jax.jit(lambda x: unit(x, past, None))(x)
    by_place, by_time = np.asarray(unit.by_place[...]), np.asarray(unit.by_time[...])
    for b in range(B):
        every = _linear(unit.inputs, _normalise(unit.norm_inputs, x[b].astype(np.float64)))
        gate, value, query, key = np.split(every / (1 + np.exp(-every)), 4, axis=-1)
        mixed, size = np.zeros((S, D)), D // heads
        for head, i in np.ndindex(heads, S):
            own = slice(head * size, (head + 1) * size)
            for j in range(i + 1):
                apart = max(1, int(asked[b, i] - moments[b, j]))
                score = query[i, own] @ key[j, own] + by_place[i - j]
                score += by_time[int(np.log(apart) / 0.301)]
                mixed[i, own] += score / (1 + np.exp(-score)) * value[j, own] / S
        expected = x[b] + _linear(unit.output, _normalise(unit.norm_mixed, mixed) * gate)
        np.testing.assert_allclose(found[b], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["transformer", pytest.param("hstu", marks=pytest.mark.slow)])
def test_layers_as_a_loop_are_the_same_layers(kind: str) -> None:
    """Values, what is dropped, and the gradient of each layer."""
    plain, deep = (
        ENCODERS[kind](layers=3, heads=2, deep=deep).make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
        for deep in (False, True)
    )
    x = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)

    def learned(encoder: Any) -> Any:
        graph, state = nnx.split(encoder)

        def loss(state: Any) -> jax.Array:
            return jnp.sum(nnx.merge(graph, state)(_past(x), jax.random.key(1)) ** 2)

        value, gradient = jax.jit(jax.value_and_grad(loss))(state)
        return value, nnx.to_pure_dict(gradient)["blocks" if kind == "transformer" else "units"]

    (value, layers), (of_loop, stacked) = learned(plain), learned(deep)
    assert float(of_loop) == pytest.approx(float(value), rel=1e-5)
    for number, layer in layers["layers"].items():
        own = jax.tree.map(lambda array, number=number: array[number], stacked["loop"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), own, layer
        )


@pytest.mark.parametrize("kind", ["transformer", "hstu"])
def test_products_of_fewer_bits_are_near_and_the_states_as_precise_as_before(kind: str) -> None:
    x = np.random.default_rng(3).normal(size=(B, S, D)).astype(np.float32)
    states = [
        jax.jit(lambda x, encoder=encoder: encoder(_past(x), None))(x)
        for compute in ("same", "bfloat16")
        for encoder in [ENCODERS[kind](compute=compute).make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))]
    ]
    assert states[1].dtype == jnp.float32
    difference = np.abs(states[1] - states[0]).max()
    assert 1e-4 < difference < 0.1


def test_hidden_events_are_filled_in_from_both_sides_and_answers_from_what_was_before() -> None:
    """In training a state depends on all events but the hidden ones; else on those before."""
    encoder = BERT4Rec(heads=2).make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(9).normal(size=(1, S, D)).astype(np.float32)
    known = np.arange(S)[None] < S - 1  # the start token, four events, and padding
    cutoff = jnp.array([[1, 4]])
    masked = np.zeros((1, S), bool)
    masked[0, [1, 4]] = True  # the second event, and the one behind the last
    run = jax.jit(lambda x, masked: encoder.at(_past(x, known), cutoff, masked, None))
    for given, seen in ((masked, [[0, 1, 3, 4], [0, 1, 3, 4]]), (None, [[0, 1], [0, 1, 2, 3, 4]])):
        before = np.asarray(run(tokens, given))
        for s in range(S):
            changed = tokens.copy()
            changed[:, s] += np.random.default_rng(s).normal(size=D).astype(np.float32)
            moved = np.abs(np.asarray(run(changed, given)) - before).max(axis=-1)[0]
            for position in (0, 1):
                assert (moved[position] > 1e-4) == (s in seen[position]), (s, position)


def test_positions_whose_event_is_seen_do_not_learn() -> None:
    """The hidden places are those of targets, a share of them, and all other weights are 0."""
    batch = tiny.batch(0, 400)
    cutoff = np.tile(np.array([[1, 3, 5]], np.int32), (400, 1))
    found = hidden_events(0.3, batch._replace(cutoff=cutoff), jax.random.key(0))
    masked, weight = np.asarray(found.events["masked"]), np.asarray(found.weight)
    assert masked.shape == (400, tiny.HISTORY + 1)
    np.testing.assert_array_equal(masked[:, [1, 3, 5]], weight > 0)
    assert not masked[:, [0, 2, 4]].any()
    share = (weight > 0).sum() / (batch.weight > 0).sum()
    assert abs(share - 0.3) < 5 * np.sqrt(0.21 / (batch.weight > 0).sum())
    assert (weight <= batch.weight).all()


def test_units_are_those_of_the_paper() -> None:
    """State by state, with gates as Cho et al. 2014 write them."""
    units = Units(D, 3, dtype=FLOAT, rngs=nnx.Rngs(0))
    _random_parameters(units)
    tokens = np.random.default_rng(7).normal(size=(1, S, D)).astype(np.float32)
    found = np.asarray(jax.jit(units.__call__)(tokens))[0]
    state = np.zeros(3)
    for s in range(S):
        x, h = _linear(units.of_token, tokens[0, s]), _linear(units.of_state, state)
        update, reset = (1 / (1 + np.exp(-(x[i : i + 3] + h[i : i + 3]))) for i in (0, 3))
        new = np.tanh(x[6:] + reset * h[6:])
        state = (1 - update) * new + update * state
        np.testing.assert_allclose(found[s], state, atol=1e-5)


def test_the_mean_is_that_of_the_events_so_far() -> None:
    """The order of earlier events is nothing, and places of padding are none of them."""
    encoder = Mean(hidden=()).make(SIZES, dtype=FLOAT, rngs=nnx.Rngs(0))
    run = jax.jit(lambda x, known: encoder(_past(x, known), None))
    tokens = np.random.default_rng(8).normal(size=(1, S, D)).astype(np.float32)
    known = np.arange(S)[None] < 4
    mixed, padded = tokens[:, [0, 2, 3, 1, 4, 5]], tokens.copy()
    padded[:, 4:] = 9
    states, other, more = (run(x, known) for x in (tokens, mixed, padded))
    np.testing.assert_allclose(states[:, 3:], other[:, 3:], atol=1e-5)
    np.testing.assert_allclose(states, more, atol=1e-5)
    events = np.concatenate([tokens[0, 0], tokens[0, 1:4].mean(axis=0)])
    expected = _normalise(encoder.norm, _linear(encoder.output, events))
    np.testing.assert_allclose(states[0, 3], expected, atol=1e-4)
    assert np.abs(np.asarray(states - other)[:, 1]).max() > 0.01


def test_target_attention_is_a_softmax_over_the_events_before_the_cutoff() -> None:
    attention = TargetAttention(D, dtype=FLOAT, rngs=nnx.Rngs(0))
    _random_parameters(attention)
    rng = np.random.default_rng(5)
    candidates = rng.normal(size=(B, 3, D)).astype(np.float32)
    events, outcomes = rng.normal(size=(2, B, S, D)).astype(np.float32)
    cutoff = np.array([[0, 1, 4], [6, 2, 0]], np.int32)
    found = jax.jit(attention.__call__)(candidates, events, outcomes, cutoff)
    sharpness = np.exp(float(attention.log_sharpness[...]))
    for b, p in np.ndindex(cutoff.shape):
        seen = slice(0, cutoff[b, p])
        wanted, known = (_linear(attention.project, x) for x in (candidates[b, p], events[b, seen]))
        cosine = known @ wanted / np.linalg.norm(wanted) / np.linalg.norm(known, axis=-1)
        weights = np.exp(sharpness * cosine)
        expected = weights @ outcomes[b, seen] / max(weights.sum(), 1e-9)
        np.testing.assert_allclose(found[b, p], expected, atol=1e-5)


def test_the_last_search_before_a_position_counts_and_fades() -> None:
    search = LastSearch(D, dtype=FLOAT, rngs=nnx.Rngs(0))
    _random_parameters(search)
    words = np.random.default_rng(6).normal(size=(2, 5, D)).astype(np.float32)
    searched = np.array([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
    cutoff = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]], np.int32)
    found = jax.jit(search.__call__)(words, searched, cutoff)
    fading = np.exp(-np.log1p(np.exp(float(search.fading[...]))))
    last = {2: (1, 0), 3: (1, 1), 4: (3, 0), 5: (3, 1)}  # {cutoff: place, events since}
    for b, p in np.ndindex(cutoff.shape):
        place, since = last.get(p, (0, 0))
        known = words[0, place] * fading**since if p in last and not b else np.zeros(D)
        np.testing.assert_allclose(found[b, p], _linear(search.project, D**0.5 * known), atol=1e-5)
