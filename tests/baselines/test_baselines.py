"""One contract for all baselines that rank, and each method's own known answers."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax import choices
from mtrec_jax.baselines import BASELINES, Interactions, Predicts, Ranks, Scorer, knn
from mtrec_jax.baselines.bias import PROBABILITY, Bias
from mtrec_jax.baselines.knn import ItemKnn
from mtrec_jax.baselines.popularity import Popularity
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation.ranking import target_ranks, top_items
from mtrec_jax.types import FIRST, Lists

SIZE = 12  # users and items of the checkerboard


def _checkerboard() -> tuple[np.ndarray, np.ndarray, Lists]:
    """User u has every item of the same parity except item u: (user ids, item ids, histories)."""
    square = np.indices((SIZE, SIZE)).sum(0) % 2 == 0
    np.fill_diagonal(square, False)
    users, items = np.nonzero(square)
    offsets = np.append(0, np.cumsum(square.sum(1)))
    return users + FIRST, items + FIRST, Lists(items + FIRST, offsets)


def _first_unseen(user: int) -> int:
    """All items are equally popular: the lowest index that the user has not seen."""
    return 0 if user == 0 or user % 2 else 1


def _held_out(user: int) -> int:
    return user


@pytest.mark.parametrize(
    ("kind", "answer"), [("popularity", _first_unseen), ("item_knn", _held_out)]
)
def test_checkerboard(kind: str, answer: Callable[[int], int]) -> None:
    users, items, histories = _checkerboard()
    fitted = BASELINES[kind]().fit(Interactions(users, items, SIZE, SIZE))
    assert isinstance(fitted, Ranks)
    assert not isinstance(fitted, Predicts)
    scorer = fitted.scorer(np.arange(SIZE) + FIRST, histories)
    assert isinstance(scorer, Scorer)

    queries = np.arange(SIZE)
    whole = scorer.block(queries, slice(0, SIZE))
    assert whole.shape == (SIZE, SIZE)
    assert whole.dtype == np.float32
    parts = [scorer.block(queries[::-1], slice(s, min(s + 5, SIZE))) for s in range(0, SIZE, 5)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1)[::-1], whole)

    seen = Lists(histories.values - FIRST, histories.offsets)
    expected = np.array([answer(user) for user in range(SIZE)])
    scores, ids = top_items(scorer, queries, 3, seen, SIZE, item_block=5)
    np.testing.assert_array_equal(ids[:, 0], expected)
    assert np.all(np.diff(scores, axis=1) <= 0)
    for user in range(SIZE):
        assert not set(ids[user]) & set(seen[user])
    np.testing.assert_array_equal(target_ranks(scorer, expected, seen, SIZE), 0)


# ---- popularity ----


def test_popularity_counts_real_items_that_were_liked() -> None:
    items = np.array([0, 1, 3, 3, 2, 4])
    train = Interactions(np.full(6, 2), items, 1, 4)
    assert Popularity().fit(train).items.tolist() == [1, 2, 1, 0]
    liked = Interactions(np.full(6, 2), items, 1, 4, positive=items != 3)
    assert Popularity().fit(liked).items.tolist() == [1, 0, 1, 0]
    none = np.zeros(0, np.int32)
    assert Popularity().fit(Interactions(none, none, 0, 2)).items.tolist() == [0, 0]


def test_ids_beyond_the_sizes_are_refused() -> None:
    one = np.array([2])
    with pytest.raises(DataError, match=r"item ids 4 \.\. 4 go beyond 0 \.\. 3; pass n_items"):
        Interactions(one, np.array([4]), 1, 2)
    with pytest.raises(DataError, match=r"user ids 5 \.\. 5 go beyond 0 \.\. 2; pass n_users"):
        Interactions(np.array([5]), one, 1, 1)


# ---- bias ----


def test_bias_first_epoch_by_hand() -> None:
    users, items = np.array([2, 2, 3]), np.array([2, 3, 2])
    train = Interactions(users, items, 2, 2)
    model = Bias(epochs=1).fit_task(train, np.array([5.0, 3.0, 1.0]))
    item = np.array([(2 - 2) / (10 + 2), 0 / (10 + 1)])  # residuals to the mean 3: 2, 0, -2
    assert model.mean == 3
    np.testing.assert_allclose(model.items, [0, 0, *item])
    np.testing.assert_allclose(model.users, [0, 0, 2 / (15 + 2), -2 / (15 + 1)])


def test_bias_converges_to_the_regularised_least_squares_solution() -> None:
    generator = np.random.default_rng(0)
    n_users, n_items, n = 7, 5, 60
    users, items = generator.integers(0, n_users, n), generator.integers(0, n_items, n)
    labels = generator.normal(size=n)
    design = np.concatenate((np.eye(n_users)[users], np.eye(n_items)[items]), axis=1)
    penalty = np.diag([15.0] * n_users + [10.0] * n_items)
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ (labels - labels.mean()))
    train = Interactions(users + FIRST, items + FIRST, n_users, n_items)
    model = Bias(epochs=100).fit_task(train, labels)
    found = np.concatenate((model.users[FIRST:], model.items[FIRST:]))
    np.testing.assert_allclose(found, solution, atol=1e-12)


def test_bias_of_unknown_ids_is_the_mean_and_missing_labels_are_left_out() -> None:
    users, items = np.array([1, 2, 2, 2]), np.array([2, 1, 2, 2])
    train = Interactions(users, items, 1, 1)
    model = Bias().fit_task(train, np.array([4.0, 2.0, 5.0, np.nan]))
    assert model.mean == pytest.approx(11 / 3)
    strange = np.array([-1, 0, 1, 99])
    np.testing.assert_allclose(model.predict(strange, strange), 11 / 3, rtol=1e-6)
    item_alone = model.predict(np.array([1]), np.array([2]))
    np.testing.assert_allclose(item_alone, model.mean + model.items[2], rtol=1e-6)
    assert model.items[2] > 0  # labels 4 and 5 are above the mean
    assert not model.users[:FIRST].any()
    assert not model.items[:FIRST].any()


def test_bias_predictions_stay_within_their_limits() -> None:
    users, items = np.full(500, 2), np.full(500, 2)
    always = Bias().fit_task(Interactions(users, items, 1, 1), np.ones(500), PROBABILITY)
    assert always.predict(users[:1], items[:1])[0] == np.float32(1 - 1e-4)
    ids = np.repeat([2, 3], 200)
    labels = np.repeat([5.0, 1.0], 200)  # user and item bias both point the same way
    model = Bias().fit_task(Interactions(ids, ids, 2, 2), labels)
    assert model.limits == (1.0, 5.0)
    predictions = model.predict(ids, ids)
    assert predictions.min() >= 1
    assert predictions.max() <= 5


def test_every_binary_and_regression_task_has_biases_of_its_own() -> None:
    users, items = np.array([2, 2, 3]), np.array([2, 3, 2])
    labels = {"click": np.array([1.0, 1, 1]), "stars": np.array([2.0, 4, np.nan])}
    kinds = {"click": "binary", "stars": "regression"}
    fitted = Bias().fit(Interactions(users, items, 2, 2, labels=labels, kinds=kinds))
    assert isinstance(fitted, Predicts)
    assert not isinstance(fitted, Ranks)
    found = fitted.predict(np.array([1]), np.array([1]))
    assert found["click"].tolist() == [np.float32(1 - 1e-4)]
    assert found["stars"].tolist() == [3.0]


def test_a_task_without_labels_has_no_bias() -> None:
    one = np.array([2])
    with pytest.raises(DataError, match="no training row has a label"):
        Bias().fit_task(Interactions(one, one, 1, 1), np.array([np.nan]))


# ---- item kNN ----


def test_knn_cosine_by_hand() -> None:
    users = np.array(
        [2, 2, 2, 3, 3, 4, 4, 1]
    )  # user 2: items 0 1 2; user 3: 0 1; user 4: 0 (twice)
    items = np.array([2, 3, 4, 2, 3, 2, 2, 4])
    train = Interactions(users, items, 3, 4)
    similarity = ItemKnn().fit(train).similarity.toarray()
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = 2 / np.sqrt(3 * 2)
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(3 * 1)
    expected[1, 2] = expected[2, 1] = 1 / np.sqrt(2 * 1)
    np.testing.assert_allclose(similarity, expected, rtol=1e-6)
    nearest = ItemKnn(neighbours=1).fit(train).similarity.toarray()
    np.testing.assert_array_equal(nearest.argmax(1)[:3], [1, 0, 1])
    assert np.count_nonzero(nearest) == 3
    histories = Lists(np.array([2, 4, 4, 0, 1, 99, 5]), np.array([0, 6, 7]))  # items 0 2; item 3
    scorer = ItemKnn().fit(train).scorer(np.array([2, 3]), histories)
    scores = scorer.block(np.array([1, 0]), slice(1, 4))
    votes = expected[0, 1:] + expected[2, 1:]
    np.testing.assert_allclose(scores, [[0.0, 0.0, 0.0], votes.tolist()], rtol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1, 40, 1 << 25]))
def test_knn_equals_dense_computation_in_any_blocks(seed: int, neighbours: int, work: int) -> None:
    generator = np.random.default_rng(seed)
    seen = generator.random((8, 9)) < 0.4
    users, items = np.nonzero(seen)
    together = seen.T.astype(float) @ seen
    count = seen.sum(0)
    cosine = np.zeros((9, 9), np.float32)
    np.divide(
        together,
        np.sqrt(np.outer(count, count)),
        out=cosine,
        where=together > 0,
        casting="same_kind",
    )
    np.fill_diagonal(cosine, 0)
    for row in cosine:
        row[np.argsort(-row, kind="stable")[neighbours:]] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "_WORK", work)
        train = Interactions(users + FIRST, items + FIRST, 8, 9)
        model = ItemKnn(neighbours=neighbours).fit(train)
    np.testing.assert_array_equal(model.similarity.toarray(), cosine)


def test_options_are_checked_and_named() -> None:
    choice = choices.Choice(BASELINES)
    with pytest.raises(ConfigError, match="neighbours: must be 1 or more, not 0"):
        choices.read(choice, {"kind": "item_knn", "neighbours": 0}, "baseline")
    with pytest.raises(ConfigError, match=r"neighbours: not of kind 'bias', but of 'item_knn'"):
        choices.read(choice, {"kind": "bias", "neighbours": 3}, "baseline")
    with pytest.raises(ConfigError, match=r"'popularit' is not one of .*Did you mean 'popularity'"):
        choices.read(choice, "popularit", "baseline")
    assert all(cls().kind == kind for kind, cls in BASELINES.items())


def test_knn_of_a_catalogue_of_thousands_takes_seconds() -> None:
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(3000), 80) + FIRST
    items = (generator.random(len(users)) ** 3 * 3416).astype(np.int64) + FIRST
    start = time.perf_counter()
    model = ItemKnn().fit(Interactions(users, items, 3000, 3416))
    assert time.perf_counter() - start < 8  # about 0.7 s
    assert model.similarity.nnz <= 3416 * 100
