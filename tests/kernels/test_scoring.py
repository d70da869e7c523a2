"""The streaming kernels against the NumPy specification and against answers known by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.kernels import cosine_scores, cosine_topk, reference, scoring, streaming, target_rank
from tests.specs import SMALL_SCORING, Scoring

NEAR = 1e-6  # cosines closer than this may swap when they are rounded differently
_topk = jax.jit(streaming.topk, static_argnames=("k", "block"))
_rank = jax.jit(streaming.rank, static_argnames="block")
_normalise = jax.jit(streaming.normalise)


def _problem(shape: Scoring, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(shape.queries, shape.width)).astype(np.float32)
    items = rng.normal(size=(shape.items, shape.width)).astype(np.float32)
    if not shape.excluded:
        return queries, items, None
    exclude = rng.integers(-1, shape.items, size=(shape.queries, shape.excluded))
    return queries, items, exclude


def _assert_same_order(
    found: tuple[Any, Any], expected: tuple[Any, Any], all_scores: np.ndarray
) -> None:
    """Scores agree place by place, and an id differs only where the true scores are within NEAR."""
    scores, ids = (np.asarray(part) for part in found)
    np.testing.assert_allclose(scores, expected[0], atol=NEAR)
    np.testing.assert_array_equal(ids == -1, np.asarray(expected[1]) == -1)
    place = np.nonzero(ids >= 0)
    true = all_scores[place[0], ids[place]]
    np.testing.assert_allclose(true, np.asarray(expected[0])[place], atol=NEAR)
    for row in ids:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_published_example() -> None:
    score = cosine_scores(np.array([[1, 2, 3]]), np.array([[4, 5, 6]]))
    assert float(score[0, 0]) == pytest.approx(32 / np.sqrt(14 * 77), abs=1e-7)
    assert round(float(score[0, 0]), 6) == 0.974632  # and not 0.8165


@pytest.mark.parametrize("shape", SMALL_SCORING, ids=str)
def test_topk_is_the_reference(shape: Scoring) -> None:
    queries, items, exclude = _problem(shape)
    found = cosine_topk(queries, items, shape.results, exclude)
    expected = cosine_topk(queries, items, shape.results, exclude, implementation="reference")
    _assert_same_order(found, expected, reference.cosine_scores(queries, items))
    assert found[0].dtype == jnp.float32
    assert found[1].dtype == jnp.int32
    np.testing.assert_allclose(
        cosine_scores(queries, items), reference.cosine_scores(queries, items), atol=NEAR
    )


@pytest.mark.parametrize("shape", SMALL_SCORING, ids=str)
def test_rank_of_result_j_is_j(shape: Scoring) -> None:
    queries, items, exclude = _problem(shape, seed=1)
    indices = np.asarray(cosine_topk(queries, items, shape.results, exclude)[1])
    for place in range(min(3, shape.results)):
        is_real = indices[:, place] >= 0
        ranks = target_rank(queries, items, np.maximum(indices[:, place], 0), exclude)
        np.testing.assert_array_equal(np.asarray(ranks)[is_real], place)


@st.composite
def _exact_problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of signs in 4 dimensions and zeros: every cosine is exact and most of them tie."""
    seed = draw(st.integers(0, 2**32 - 1))
    zeros = draw(st.sampled_from([0.0, 0.1, 0.9]))
    count = draw(st.sampled_from([1, 300]))
    rng = np.random.default_rng(seed)
    scales = rng.integers(1, 9, size=(count, 1))
    items = rng.choice([-1, 1], size=(count, 4)) * scales * (rng.random((count, 1)) >= zeros)
    queries = rng.choice([-1, 1], size=(8, 4)) * (rng.random((8, 1)) >= zeros)
    exclude = rng.integers(-1, count, size=(8, 16))
    exclude[rng.random(exclude.shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -1
    targets = rng.integers(0, count, size=8)
    targets = np.where(rng.random(8) < 0.3, np.maximum(exclude[:, 0], 0), targets)
    return queries.astype(np.float32), items.astype(np.float32), exclude, targets


@hypothesis.given(_exact_problems(), st.sampled_from([1, 7, 320]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_ties_exclusions_and_zeros_exactly(
    problem: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], k: int
) -> None:
    queries, items, exclude, targets = problem
    unit = (_normalise(queries), _normalise(items))
    scores, ids = _topk(*unit, k, exclude, block=128)
    expected_scores, expected_ids = reference.cosine_topk(queries, items, k, exclude)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores.astype(np.float32))
    ranks = _rank(*unit, targets, exclude, block=128)
    np.testing.assert_array_equal(ranks, reference.target_rank(queries, items, targets, exclude))


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (100, 7)])
def test_parallel_vectors_tie_in_every_block(rows: int, width: int) -> None:
    rng = np.random.default_rng(width)
    direction = rng.integers(-9, 10, size=width)
    items = direction * rng.integers(1, 1000, size=(5000, 1))
    scores, indices = cosine_topk(rng.normal(size=(rows, width)), items, 20)
    np.testing.assert_array_equal(indices, np.tile(np.arange(20), (rows, 1)))
    assert (scores == scores[:, :1]).all()
    ranks = target_rank(rng.normal(size=(rows, width)), items, np.full(rows, 4700))
    np.testing.assert_array_equal(ranks, 4700)


def test_an_equal_score_in_a_weaker_group_keeps_its_lower_index() -> None:
    items = np.array([[0, 1]] * 64)
    items[17], items[1] = [3, 4], [4, 3]
    items[[18, 2]] = [1, 1]  # the same score, in groups with other maxima
    for query in ([[3, 4]], [[4, 3]]):
        assert cosine_topk(np.array(query), items, 4)[1].tolist()[0][1:3] == [2, 18]


@pytest.mark.parametrize("block", [1, 384])
def test_block_size_changes_rounding_only(block: int) -> None:
    queries, items, exclude = _problem(Scoring(16, 1_111, 24, 12, 5))
    unit = (_normalise(queries), _normalise(items))
    found = _topk(*unit, 12, exclude, block=block)
    _assert_same_order(
        found,
        reference.cosine_topk(queries, items, 12, exclude),
        reference.cosine_scores(queries, items),
    )
    np.testing.assert_array_equal(_rank(*unit, found[1][:, 7], exclude, block=block), 7)


def test_answers_do_not_depend_on_the_other_queries() -> None:
    queries, items, _ = _problem(Scoring(258, 700, 16, 5))
    scores, indices = cosine_topk(queries, items, 5)
    for rows in (slice(0, 1), slice(255, 258)):
        part = cosine_topk(queries[rows], items, 5)
        np.testing.assert_allclose(part[0], scores[rows], atol=NEAR)
        np.testing.assert_array_equal(part[1], indices[rows])


def test_few_programs_are_compiled() -> None:
    _, items, _ = _problem(Scoring(1, 77, 6, 2))
    cosine_topk(items[:9], items, 2)
    cosine_topk(np.tile(items, (4, 1)), items, 2)  # 308 queries: two chunks of 256
    compiled: Any = scoring._topk
    before = compiled._cache_size()
    for count in (10, 13, 16, 256, 600):
        cosine_topk(np.resize(items, (count, 6)), items, 2)
    assert compiled._cache_size() == before


def test_fewer_admissible_items_than_k() -> None:
    items = np.eye(3)
    scores, indices = cosine_topk(np.eye(3)[:1], items, 5, exclude=np.array([[0, -1, 0]]))
    assert indices.tolist() == [[1, 2, -1, -1, -1]]
    assert scores.tolist() == [[0.0, 0.0, -np.inf, -np.inf, -np.inf]]
    everything = np.array([[2, 1, 0]])
    assert cosine_topk(np.eye(3)[:1], items, 1, exclude=everything)[1].tolist() == [[-1]]


@pytest.mark.parametrize("implementation", scoring.IMPLEMENTATIONS)
def test_empty_inputs(implementation: str) -> None:
    none, some = np.zeros((0, 4), np.float32), np.ones((2, 4), np.float32)
    scores, indices = cosine_topk(none, some, 3, implementation=implementation)
    assert scores.shape == indices.shape == (0, 3)
    scores, indices = cosine_topk(some, none, 3, implementation=implementation)
    assert indices.tolist() == [[-1] * 3] * 2
    assert scores.tolist() == [[-np.inf] * 3] * 2
    no_lists = np.zeros((2, 0), int)
    assert cosine_topk(some, some, 1, no_lists, implementation)[1].tolist() == [[0], [0]]
    assert cosine_scores(none, some).shape == (0, 2)
    assert cosine_scores(some, none).shape == (2, 0)
    assert target_rank(none, some, np.zeros(0, int)).shape == (0,)


def test_zero_and_extreme_vectors() -> None:
    items = np.array([[0, 0], [1e30, 1e30], [1e-30, 0], [-1, 0]], np.float32)
    scores = cosine_scores(np.array([[0.0, 0.0], [3e38, 0.0]]), items)
    np.testing.assert_allclose(scores, [[0] * 4, [0, np.sqrt(0.5), 1, -1]], atol=NEAR)
    assert cosine_topk(np.zeros((1, 2)), items, 4)[1].tolist() == [[0, 1, 2, 3]]
    assert cosine_topk(np.ones((1, 2)), items, 4)[1].tolist() == [[1, 2, 0, 3]]


def test_target_is_never_excluded() -> None:
    queries, items = np.array([[1, 0]] * 2), np.array([[1, 0], [2, 1], [1, 1], [0, 1]])
    exclude = np.array([[2, 0], [-1, -1]])
    assert target_rank(queries, items, np.array([2, 2]), exclude).tolist() == [1, 2]
    assert reference.target_rank(queries, items, np.array([2, 2]), exclude).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int8", "int64"])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_dtypes(dtype: str, as_array: Any) -> None:
    numbers = np.random.default_rng(3).integers(-5, 6, size=(40, 8))
    items = as_array(numbers.astype(jnp.dtype(dtype) if as_array is np.asarray else "float32"))
    items = items if as_array is np.asarray else items.astype(jax.dtypes.canonicalize_dtype(dtype))
    scores, indices = cosine_topk(items[:3], items, 4)
    assert scores.dtype == jnp.float32
    expected = reference.cosine_topk(numbers[:3], numbers, 4)
    _assert_same_order((scores, indices), expected, reference.cosine_scores(numbers[:3], numbers))


def test_float64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        queries, items = rng.normal(size=(4, 10)), rng.normal(size=(300, 10))
        exclude = rng.integers(-1, 300, size=(4, 3))
        scores, indices = cosine_topk(queries, items, 6, exclude)
        expected = reference.cosine_topk(queries, items, 6, exclude)
        assert scores.dtype == jnp.float64
        assert indices.dtype == jnp.int32
        np.testing.assert_allclose(scores, expected[0], rtol=1e-14)
        np.testing.assert_array_equal(indices, expected[1])
        ranks = target_rank(queries, items, expected[1][:, 2], exclude)
        np.testing.assert_array_equal(ranks, 2)
        assert ranks.dtype == jnp.int32


TWO = np.ones((2, 3), np.float32)
NAN = np.array([[1, 2, 3], [1, np.nan, 3], [np.nan, 1, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((NAN, TWO, 1), "queries row 1 holds NaN"),
        ((np.tile(NAN[::2], (150, 1)), TWO, 1), "queries row 1 holds NaN"),
        ((np.concatenate([np.ones((299, 3)), NAN]), TWO, 1), "queries row 300 holds NaN"),
        ((TWO, NAN, 1), "items row 1 holds NaN"),
        ((TWO, np.array([[0, np.inf, 0]]), 1), "items row 0 holds NaN or a number that is inf"),
        ((TWO, np.array([[0, 1e300, 0]]), 1), "items row 0 .* infinite in float32"),
        ((TWO[0], TWO, 1), r"queries must have two axes \[Q, D\], but its shape is \(3,\)"),
        ((TWO, TWO[0], 1), r"items must have two axes \[N, D\]"),
        ((TWO, TWO[:, :2], 1), r"queries \(2, 3\) and items \(2, 2\) differ in width"),
        ((TWO > 0, TWO, 1), "queries has dtype bool"),
        ((TWO, TWO * 1j, 1), "items has dtype complex64"),
        ((TWO, TWO, 1, np.array([[-1], [2]])), r"exclude\[1, 0\] is 2, but there are 2 items"),
        ((TWO, TWO, 1, np.array([[0], [-2]])), r"exclude\[1, 0\] is -2"),
        ((TWO, TWO, 1, np.array([[0]])), r"exclude must hold integers \[Q, X\] with Q=2"),
        ((TWO, TWO, 1, np.array([0, 1])), r"exclude must hold integers \[Q, X\]"),
        ((TWO, TWO, 1, np.array([[0.0], [1.0]])), "has shape .* and dtype float64"),
    ],
)
def test_bad_data_is_named(arguments: tuple[Any, ...], message: str) -> None:
    queries, items, k, *lists = arguments
    exclude = lists[0] if lists else None
    for implementation in scoring.IMPLEMENTATIONS:
        with pytest.raises(DataError, match=message):
            cosine_topk(queries, items, k, exclude, implementation)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="k is 0; it must be an integer of at least 1"):
        cosine_topk(TWO, TWO, 0)
    with pytest.raises(ConfigError, match="Did you mean 'reference'"):
        cosine_topk(TWO, TWO, 1, implementation="referense")
    with pytest.raises(DataError, match=r"targets\[1\] is 2, but there are 2 items"):
        target_rank(TWO, TWO, np.array([0, 2]))
    with pytest.raises(DataError, match=r"targets\[0\] is -1.* use indices 0 .. 1$"):
        target_rank(TWO, TWO, np.array([-1, 0]))
    with pytest.raises(DataError, match=r"queries is traced.*kernels.streaming"):
        jax.jit(lambda q: cosine_topk(q, TWO, 1))(TWO)


def test_normalise_has_a_gradient_at_zero() -> None:
    rows = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    jacobian = jax.jit(jax.jacobian(lambda row: streaming.normalise(row[None, :])[0]))
    assert jacobian(rows[0]).tolist() == [[0, 0], [0, 0]]
    unit = rows[1] / 5
    np.testing.assert_allclose(jacobian(rows[1]), (np.eye(2) - np.outer(unit, unit)) / 5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform: str) -> None:
    queries, items = (jax.ShapeDtypeStruct((n, 64), jnp.float32) for n in (256, 20_000))
    exclude = jax.ShapeDtypeStruct((256, 8), jnp.int32)
    targets = jax.ShapeDtypeStruct((256,), jnp.int32)
    for traced in (
        _topk.trace(queries, items, 10, exclude),
        _rank.trace(queries, items, targets, exclude),
    ):
        assert "stablehlo.dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_never_holds_all_scores() -> None:
    queries, items = (jax.ShapeDtypeStruct((n, 8), jnp.float32) for n in (256, 400_000))
    memory = _topk.lower(queries, items, 10).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 0.1 * 256 * 400_000 * 4


def test_items_sharded_over_all_devices() -> None:
    devices = jax.devices()
    queries, items, exclude = _problem(Scoring(4, 64 * len(devices), 8, 6, 3))
    mesh = jax.make_mesh((len(devices),), ("table",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("table", None))
    found = cosine_topk(queries, jax.device_put(items, sharding), 6, exclude)
    _assert_same_order(
        found,
        reference.cosine_topk(queries, items, 6, exclude),
        reference.cosine_scores(queries, items),
    )


def test_importing_the_kernels_loads_jax_and_numpy_only() -> None:
    program = (
        "import sys, mtrec_jax.kernels; "
        "heavy = {'flax', 'grain', 'orbax', 'ibis', 'pydantic', 'optax', 'pandas', 'duckdb', "
        "'mtrec_jax.config'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
