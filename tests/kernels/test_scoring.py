"""The public kernels against the NumPy specification and against answers known by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.kernels import cosine_scores, cosine_topk, programs, reference, scoring, target_rank
from tests.specs import SMALL_SCORING, Scoring

NEAR = 1e-6  # rounding of a matrix product, which `cosine_scores` is


SHAPES = [
    pytest.param(shape, marks=[pytest.mark.slow] * (shape.items != 9_001), id=str(shape))
    for shape in SMALL_SCORING
]


def _problem(shape: Scoring, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    queries = rng.normal(size=(shape.queries, shape.width)).astype(np.float32)
    items = rng.normal(size=(shape.items, shape.width)).astype(np.float32)
    if not shape.excluded:
        return queries, items, None
    exclude = rng.integers(-1, shape.items, size=(shape.queries, shape.excluded))
    return queries, items, exclude


def _assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Equal ids, and equal bits of scores."""
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def _expected(
    queries: np.ndarray, items: np.ndarray, k: int, exclude: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    return cosine_topk(queries, items, k, exclude, implementation="reference")


def test_published_example() -> None:
    score = cosine_scores(np.array([[1, 2, 3]]), np.array([[4, 5, 6]]))
    assert float(score[0, 0]) == pytest.approx(32 / np.sqrt(14 * 77), abs=2e-7)
    assert round(float(score[0, 0]), 6) == 0.974632  # and not 0.8165


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_is_the_reference(shape: Scoring) -> None:
    queries, items, exclude = _problem(shape)
    found = cosine_topk(queries, items, shape.results, exclude)
    _assert_same(found, _expected(queries, items, shape.results, exclude))
    assert found[0].dtype == jnp.float32
    assert found[1].dtype == jnp.int32
    np.testing.assert_allclose(
        cosine_scores(queries, items), reference.scores(queries, items), atol=NEAR
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_of_result_j_is_j(shape: Scoring) -> None:
    queries, items, exclude = _problem(shape, seed=1)
    indices = np.asarray(cosine_topk(queries, items, shape.results, exclude)[1])
    for place in range(min(3, shape.results)):
        is_real = indices[:, place] >= 0
        ranks = target_rank(queries, items, np.maximum(indices[:, place], 0), exclude)
        np.testing.assert_array_equal(np.asarray(ranks)[is_real], place)


@pytest.mark.parametrize(("rows", "width"), [pytest.param(1, 64, marks=pytest.mark.slow), (100, 7)])
@pytest.mark.slow
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


@pytest.mark.slow
def test_answers_do_not_depend_on_the_other_queries() -> None:
    queries, items, _ = _problem(Scoring(258, 700, 16, 5))
    found = cosine_topk(queries, items, 5)
    for rows in (slice(0, 1), slice(255, 258)):
        _assert_same(cosine_topk(queries[rows], items, 5), (found[0][rows], found[1][rows]))


@pytest.mark.slow
def test_few_programs_are_compiled() -> None:
    items = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    cosine_topk(items[:9], items, 2)
    cosine_topk(items[:300], items, 2)  # two chunks: 256 and 44, filled up to 64
    compiled: Any = (programs._scores, programs._candidates, programs._settled)
    before = [program._cache_size() for program in compiled]
    for queries, count in ((10, 2990), (16, 3000), (256, 2985), (560, 3000), (60, 2999)):
        cosine_topk(np.resize(items, (queries, 6)), items[:count], 2)
    assert [program._cache_size() for program in compiled] == before


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


@pytest.mark.parametrize(
    ("dtype", "as_array"),
    [
        *[(dtype, np.asarray) for dtype in ("bfloat16", "int8")],
        ("bfloat16", jnp.asarray),
        *[
            pytest.param(dtype, np.asarray, marks=pytest.mark.slow)
            for dtype in ("float64", "float32", "float16", "int64")
        ],
        *[
            pytest.param(dtype, jnp.asarray, marks=pytest.mark.slow)
            for dtype in ("float64", "float32", "float16", "int8", "int64")
        ],
    ],
)
def test_dtypes(dtype: str, as_array: Any) -> None:
    numbers = np.random.default_rng(3).integers(-5, 6, size=(40, 8))
    items = as_array(numbers.astype(jnp.dtype(dtype) if as_array is np.asarray else "float32"))
    items = items if as_array is np.asarray else items.astype(jax.dtypes.canonicalize_dtype(dtype))
    scores, indices = cosine_topk(items[:3], items, 4)
    assert scores.dtype == jnp.float32
    _assert_same((scores, indices), _expected(numbers[:3], numbers, 4, None))


@pytest.mark.slow
def test_float64() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        queries, items = rng.normal(size=(4, 10)), rng.normal(size=(300, 10))
        exclude = rng.integers(-1, 300, size=(4, 3))
        scores, indices = cosine_topk(queries, items, 6, exclude)
        expected = _expected(queries, items, 6, exclude)
        assert scores.dtype == jnp.float64
        assert indices.dtype == jnp.int32
        _assert_same((scores, indices), expected)
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
