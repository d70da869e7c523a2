"""One contract for all baselines that rank, and each method's own known answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_jax.baselines import BASELINES, Interactions, Predicts, Ranks, Scorer, neighbours
from mtrec_jax.baselines.als import Als
from mtrec_jax.baselines.bias import PROBABILITY, Bias, TaskBiases
from mtrec_jax.baselines.ease import Ease
from mtrec_jax.baselines.item_knn import ItemKnn
from mtrec_jax.baselines.popularity import Popularity
from mtrec_jax.baselines.user_knn import UserKnn
from mtrec_jax.errors import DataError
from mtrec_jax.evaluation.ranking import target_ranks, top_items
from mtrec_jax.types import FIRST, Lists

SIZE = 12  # users and items of the checkerboard


def log(
    users: Iterable[int],
    items: Iterable[int],
    n_users: int,
    n_items: int,
    labels: Iterable[float] = (),
    kind: str = "regression",
    liked: Iterable[bool] | None = None,
) -> Interactions:
    """Everything is liked unless said otherwise, and labels are of a task `stars`."""
    users, items, values = np.array([*users], int), np.array([*items], int), np.array([*labels])
    likes = np.ones(len(items), bool) if liked is None else np.array([*liked], bool)
    task = {"stars": kind} if len(values) else {}
    return Interactions(users, items, likes, dict.fromkeys(task, values), task, n_users, n_items)


def stars(interactions: Interactions, **options: Any) -> TaskBiases:
    return Bias(**options).fit(interactions).tasks["stars"]


def test_each_baseline_has_its_kind_and_says_what_it_can_do() -> None:
    can = {}
    for kind, options in BASELINES.items():
        assert options.kind == options().kind == kind
        fitted = options().fit(log([2, 3], [2, 3], 2, 2, [1.0, 2.0]))
        can[kind] = isinstance(fitted, Ranks), isinstance(fitted, Predicts)
    ranking = ("random", "popularity", "item_knn", "user_knn", "als", "ease")
    assert can == dict.fromkeys(ranking, (True, False)) | {"bias": (False, True)}


def _checkerboard() -> tuple[Interactions, Lists]:
    """User u has every item of the same parity except item u: the log, and the histories."""
    square = np.indices((SIZE, SIZE)).sum(0) % 2 == 0
    np.fill_diagonal(square, False)
    users, items = np.nonzero(square)
    offsets = np.append(0, np.cumsum(square.sum(1)))
    return log(users + FIRST, items + FIRST, SIZE, SIZE), Lists(items + FIRST, offsets)


def _first_unseen(user: int) -> int:
    """All items are equally popular: the lowest index that the user has not seen."""
    return 0 if user == 0 or user % 2 else 1


def _held_out(user: int) -> int:
    return user


@pytest.mark.parametrize(
    ("baseline", "answer"),
    [
        (Popularity(), _first_unseen),
        (ItemKnn(), _held_out),
        (UserKnn(), _held_out),
        (Als(factors=4), _held_out),
        (Ease(), _held_out),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_checkerboard(baseline: Any, answer: Callable[[int], int]) -> None:
    interactions, histories = _checkerboard()
    queries = np.arange(SIZE)
    scorer = baseline.fit(interactions).scorer(queries + FIRST, histories)
    assert isinstance(scorer, Scorer)

    whole = scorer.scores(queries)
    assert whole.shape == (SIZE, SIZE)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(scorer.scores(queries[::-1])[::-1], whole)

    seen = Lists(histories.values - FIRST, histories.offsets)
    expected = np.array([answer(user) for user in range(SIZE)])
    scores, ids = top_items(scorer, queries, 3, seen, SIZE)
    np.testing.assert_array_equal(ids[:, 0], expected)
    assert np.all(np.diff(scores, axis=1) <= 0)
    for user in range(SIZE):
        assert not set(ids[user]) & set(seen[user])
    np.testing.assert_array_equal(target_ranks(scorer, expected, seen, SIZE), 0)


# ---- popularity ----


def test_popularity_counts_real_items_that_are_liked() -> None:
    items = [0, 1, 3, 3, 2, 4, 5]
    interactions = log([2] * 7, items, 1, 4, liked=[True] * 6 + [False])
    assert Popularity().fit(interactions).counts.tolist() == [1, 2, 1, 0]
    assert Popularity().fit(log([], [], 1, 2, liked=[])).counts.tolist() == [0, 0]
    with pytest.raises(DataError, match=r"popularity: item ids 4 \.\. 4 go beyond 0 \.\. 3"):
        Popularity().fit(log([2], [4], 1, 2))


def test_popularity_of_the_last_days_counts_from_the_last_event_of_training() -> None:
    seconds = np.array([0, 1, 43_201, 86_400, 86_401])
    rows = log([2] * 5, [2, 2, 3, 3, 4], 1, 3, liked=[True, True, True, True, False])
    timed = rows._replace(times=seconds)
    assert Popularity().fit(timed).counts.tolist() == [2, 2, 0]
    # the last event is not liked, and yet the end of the split; one a whole day before is outside
    assert Popularity(days=1.0).fit(timed).counts.tolist() == [0, 2, 0]
    assert Popularity(days=0.5).fit(timed).counts.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match=r"days = 7 needs the times .*; declare data.time"):
        Popularity(days=7.0).fit(rows)
    nothing = log([], [], 1, 2, liked=[])._replace(times=np.zeros(0))
    assert Popularity(days=7.0).fit(nothing).counts.tolist() == [0, 0]


# ---- bias ----


def test_bias_first_epoch_by_hand() -> None:
    model = stars(log([2, 2, 3], [2, 3, 2], 2, 2, [5.0, 3.0, 1.0]), epochs=1)
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
    penalty = np.diag([3.0] * n_users + [1.0] * n_items)
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ (labels - labels.mean()))
    options = {"user_regularization": 3.0, "item_regularization": 1.0, "epochs": 400}
    model = stars(log(users + FIRST, items + FIRST, n_users, n_items, labels), **options)
    found = np.concatenate((model.users[FIRST:], model.items[FIRST:]))
    np.testing.assert_allclose(found, solution, atol=1e-12)


def test_bias_of_unknown_ids_is_the_mean_and_missing_labels_are_left_out() -> None:
    fitted = Bias().fit(log([1, 2, 2, 2], [2, 1, 2, 2], 1, 1, [4.0, 2.0, 5.0, np.nan]))
    model = fitted.tasks["stars"]
    assert model.mean == pytest.approx(11 / 3)
    strange = np.array([-1, 0, 1, 99])
    predictions = fitted.predict("stars", strange, strange)
    assert predictions is not None
    np.testing.assert_allclose(predictions, 11 / 3, rtol=1e-6)
    item_alone = fitted.predict("stars", np.array([1]), np.array([2]))
    assert item_alone is not None
    np.testing.assert_allclose(item_alone, model.mean + model.items[2], rtol=1e-6)
    assert model.items[2] > 0  # labels 4 and 5 are above the mean
    assert not model.users[:FIRST].any()
    assert not model.items[:FIRST].any()
    assert fitted.predict("other", strange, strange) is None


def test_bias_predictions_stay_within_their_limits() -> None:
    ids = np.full(500, 2)
    always = Bias().fit(log(ids, ids, 1, 1, np.ones(500), kind="binary"))
    assert always.tasks["stars"].limits == PROBABILITY
    assert always.predict("stars", ids[:1], ids[:1]) == np.float32(1 - 1e-4)
    ids = np.repeat([2, 3], 200)
    labels = np.repeat([5.0, 1.0], 200)  # user and item bias both point the same way
    fitted = Bias().fit(log(ids, ids, 2, 2, labels))
    assert fitted.tasks["stars"].limits == (1.0, 5.0)
    predictions = fitted.predict("stars", ids, ids)
    assert predictions is not None
    assert predictions.min() >= 1
    assert predictions.max() <= 5


def test_bias_without_regularization_leaves_those_without_rows_alone() -> None:
    options = {"user_regularization": 0.0, "item_regularization": 0.0}
    model = stars(log([2], [3], 2, 2, [4.0]), **options)
    assert model.users.tolist() == model.items.tolist() == [0, 0, 0, 0]


def test_bias_errors() -> None:
    with pytest.raises(DataError, match="no training row has a label of task 'stars'"):
        Bias().fit(log([2], [2], 1, 1, [np.nan]))
    with pytest.raises(
        DataError, match=r"bias: user ids 5 \.\. 5 go beyond 0 \.\. 2; pass n_users"
    ):
        Bias().fit(log([5], [2], 1, 1, [1.0]))


# ---- item kNN ----


def test_knn_cosine_by_hand() -> None:
    users = np.array(
        [2, 2, 2, 3, 3, 4, 4, 1]
    )  # user 2: items 0 1 2; user 3: 0 1; user 4: 0 (twice)
    items = np.array([2, 3, 4, 2, 3, 2, 2, 4])
    fitted = ItemKnn().fit(log(users, items, 3, 4))
    similarity = fitted.similarity.toarray()
    expected = np.zeros((4, 4))
    expected[0, 1] = expected[1, 0] = 2 / np.sqrt(3 * 2)
    expected[0, 2] = expected[2, 0] = 1 / np.sqrt(3 * 1)
    expected[1, 2] = expected[2, 1] = 1 / np.sqrt(2 * 1)
    np.testing.assert_allclose(similarity, expected, rtol=1e-6)
    nearest = ItemKnn(neighbours=1).fit(log(users, items, 3, 4)).similarity.toarray()
    np.testing.assert_array_equal(nearest.argmax(1)[:3], [1, 0, 1])
    assert np.count_nonzero(nearest) == 3
    histories = Lists(np.array([2, 4, 4, 0, 1, 99, 5]), np.array([0, 6, 7]))  # items 0 2; item 3
    scores = fitted.scorer(np.array([2, 3]), histories).scores(np.array([1, 0]))
    votes = expected[0] + expected[2]
    np.testing.assert_allclose(scores, [[0.0] * 4, votes.tolist()], rtol=1e-6)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1, 40, 1 << 25]))
def test_knn_equals_dense_computation_in_any_blocks(seed: int, kept: int, work: int) -> None:
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
        row[np.argsort(-row, kind="stable")[kept:]] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_WORK", work)
        model = ItemKnn(neighbours=kept).fit(log(users + FIRST, items + FIRST, 8, 9))
    np.testing.assert_array_equal(model.similarity.toarray(), cosine)


def test_knn_takes_only_what_is_liked_and_checks_ids() -> None:
    liked = [True, True, True, False]
    fitted = ItemKnn().fit(log([2, 2, 3, 3], [2, 3, 2, 4], 2, 3, liked=liked))
    assert fitted.similarity.toarray()[2].tolist() == [0, 0, 0]
    assert fitted.similarity.toarray()[0, 1] == pytest.approx(1 / np.sqrt(2))
    with pytest.raises(DataError, match=r"item_knn: item ids 4 \.\. 4 go beyond 0 \.\. 3"):
        ItemKnn().fit(log([2], [4], 1, 2))
