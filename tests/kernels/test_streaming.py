"""The streams, block by block, against the NumPy specification: equal ids, ranks and bits."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.kernels import arithmetic, cosine_topk, reference, streaming
from mtrec_jax.kernels.index import _lists
from mtrec_jax.kernels.streaming import Admissible, Items

_topk = jax.jit(streaming.topk, static_argnames=("k", "block"))
_rank = jax.jit(streaming.rank, static_argnames="block")
_normalise = jax.jit(arithmetic.normalise)
SIGNS = [-1, 1]  # vectors of four of them have exact cosines, and most of them tie


def _admissible(
    rng: np.random.Generator, rows: int, count: int, kinds: str
) -> tuple[Admissible, np.ndarray]:
    """Random lists and masks in the form of the streams, and as [Q, N]."""
    whole, found = np.ones((rows, count), bool), Admissible()
    if "x" in kinds:
        exclude = rng.integers(0, count, (rows, 16))
        exclude[rng.random(exclude.shape) < 0.5] = np.iinfo(np.int32).max
        for row, ids in enumerate(exclude):
            whole[row, ids[ids < count]] = False
        found = _lists(exclude.astype(np.int32))
    if "a" in kinds:
        masks: Any = rng.random((3, count)) < 0.5
        group: Any = rng.integers(0, 3, rows).astype(np.int32)
        whole &= masks[group]
        found = found._replace(allowed=masks, group=group)
    return found, whole


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(8, 1, 4), (5, 700, 33)]),
    k=st.sampled_from([1, 40]),
    block=st.sampled_from([None, 96]),
    kinds=st.sampled_from(["", "xa"]),
    ties=st.booleans(),
    cosine=st.booleans(),
)
@hypothesis.settings(max_examples=3, deadline=None)
def test_streams_are_the_reference(
    seed: int,
    shape: tuple[int, int, int],
    k: int,
    block: int | None,
    kinds: str,
    ties: bool,
    cosine: bool,
) -> None:
    rng = np.random.default_rng(seed)
    rows, count, width = shape
    if ties:
        scales = rng.integers(1, 9, (count, 1)) * (rng.random((count, 1)) > 0.2)
        items: Any = rng.choice(SIGNS, (count, width)) * scales
        queries: Any = rng.choice(SIGNS, (rows, width)) * (rng.random((rows, 1)) > 0.2)
    else:
        items, queries = rng.normal(size=(count, width)), rng.normal(size=(rows, width))
    items, queries = items.astype(np.float32), queries.astype(np.float32)
    admissible, whole = _admissible(rng, rows, count, kinds)
    targets = rng.integers(0, count, rows).astype(np.int32)
    norms = np.linalg.norm(items, axis=1)
    if cosine:
        scale = np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)
        catalogue, given = (
            Items(jnp.asarray(items), jnp.asarray(scale), jnp.ones(())),
            _normalise(queries),
        )
    else:
        largest = norms.max() * np.linalg.norm(queries, axis=1).max()
        catalogue, given = Items(jnp.asarray(items), None, jnp.asarray(largest)), queries
    expected = reference.scores(queries, items, "cosine" if cosine else "dot")
    scores, ids = _topk(given, catalogue, k, admissible, block=block)
    expected_scores, expected_ids = reference.topk(expected, k, whole)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    ranks = _rank(given, catalogue, targets, admissible, block=block)
    np.testing.assert_array_equal(ranks, reference.rank(expected, targets, whole))


@pytest.mark.parametrize("width", [1, 3, 24, 64, 100])
def test_bits_are_those_of_numpy_in_any_shape(width: int) -> None:
    rng = np.random.default_rng(width)
    rows = (rng.normal(size=(60, width)) * 10.0 ** rng.integers(-9, 9, (60, 1))).astype(np.float32)
    unit = reference.normalise(rows)
    np.testing.assert_array_equal(_normalise(rows), unit)
    np.testing.assert_array_equal(_normalise(rows.reshape(3, 20, width)).reshape(60, width), unit)
    np.testing.assert_allclose(np.linalg.norm(unit.astype(float), axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(
        jax.jit(arithmetic.dot)(unit, unit[::-1]), reference.dot(unit, unit[::-1])
    )
    exact = (unit.astype(float) * unit[::-1].astype(float)).sum(axis=1)
    np.testing.assert_allclose(reference.dot(unit, unit[::-1]), exact, atol=2e-7)


def test_the_slow_way_is_taken_where_rounding_could_decide() -> None:
    items = np.ones((3000, 8), np.float32)
    items[2000:] += 1e-7  # one unit in the last place more, within the error of a product
    catalogue, queries = (
        Items(jnp.asarray(items), None, jnp.asarray(9.0)),
        np.ones((8, 8), np.float32),
    )

    @jax.jit
    def certainty(queries: jax.Array) -> jax.Array:
        found = streaming.candidates(queries, catalogue, 5)
        return streaming._rescored(queries, catalogue, 5, found, Admissible(), None)[2]

    certain = certainty(jnp.asarray(queries))
    assert not certain.any()
    assert _topk(queries, catalogue, 5)[1][0].tolist() == [2000, 2001, 2002, 2003, 2004]
    assert _rank(queries, catalogue, np.full(8, 1999)).tolist() == [2999] * 8


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform: str) -> None:
    shape: Any = jax.ShapeDtypeStruct
    queries, vectors = (shape((n, 64), jnp.float32) for n in (256, 100_000))
    catalogue = Items(vectors, shape((100_000,), jnp.float32), 1.0)
    targets = shape((256,), jnp.int32)
    lists = Admissible(shape((256, 8), jnp.int32), shape((2, 2048), jnp.int32))
    for traced in (
        _topk.trace(queries, catalogue, 10, lists),
        _rank.trace(queries, catalogue, targets, lists),
    ):
        assert "stablehlo.dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.slow
def test_never_holds_all_scores() -> None:
    shape: Any = jax.ShapeDtypeStruct
    queries, vectors = (shape((n, 8), jnp.float32) for n in (256, 400_000))
    catalogue = Items(vectors, shape((400_000,), jnp.float32), 1.0)
    memory = _topk.lower(queries, catalogue, 10).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.25 * 256 * 400_000 * 4


@pytest.mark.parametrize("times", [3, 30, 700])
def test_items_that_occur_many_times(times: int) -> None:
    """Enough candidates, more of them, and the slow way: always the lowest ids first."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(1600, 8)).astype(np.float32)
    twins = np.sort(rng.choice(1600, times, replace=False))
    items[twins] = items[twins[0]]
    queries = items[twins[:1]] + rng.normal(size=(5, 8)).astype(np.float32) * 0.01
    found = cosine_topk(queries, items, 10)
    expected = cosine_topk(queries, items, 10, implementation="reference")
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1][0, : min(times, 10)].tolist() == twins[:10].tolist()
