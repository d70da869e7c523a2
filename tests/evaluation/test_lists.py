"""Recommended lists: metrics by hand and in an evaluation, alarms, and the price of diversity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mtrec_jax.baselines import BASELINES
from mtrec_jax.baselines.popularity import Counts
from mtrec_jax.config import seen_behaviours, to_dict
from mtrec_jax.data.examples import past_items
from mtrec_jax.diversity import Dpp, Mmr
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.collect import seen_items
from mtrec_jax.evaluation.comparison import training_interactions
from mtrec_jax.evaluation.evaluate import Evaluation, evaluate
from mtrec_jax.evaluation.lists import (
    Background,
    alarms,
    list_statistics,
    make_background,
    overlap_of_users,
    overlap_with_popular,
)
from mtrec_jax.evaluation.metrics import bootstrap_interval, bootstrap_intervals, mean_statistic
from mtrec_jax.evaluation.ranking import ranks_and_lists, top_items
from mtrec_jax.evaluation.tables import print_evaluation
from mtrec_jax.experiments import overridden, parse_experiment
from mtrec_jax.models.serve import prepared_serving
from mtrec_jax.train.run import Run, load_answers, load_best, measured_under
from mtrec_jax.types import FIRST, UNKNOWN, Lists

# Items 0 and 1 are of genre a, 2 of a and b, 3 of b; of 4 nothing is known. Of eight training users
# 8, 4, 2, 1 and none have them.
GENRES = np.array([[1, 0], [1, 0], [0.5**0.5, 0.5**0.5], [0, 1], [0, 0]])
BY_HAND = Background(
    share=np.array([1, 0.5, 0.25, 0.125, 0]),
    least=0.125,
    own=np.array([0.75, 0.25, np.nan]),
    place=np.arange(5),
    alike=GENRES,
    left_out=np.array([0, 1, 5]),  # user 0 has items 0 and 1, user 1 item 0
)
LISTS = np.array([[2, 3, 4], [1, 2, -1], [0, 1, 2]])
USERS = np.array([FIRST, FIRST + 1, FIRST + 2])


def test_metrics_of_lists_by_hand() -> None:
    ones = np.ones(3)
    found = {n: of(ones) for n, of in list_statistics(LISTS, USERS, BY_HAND, (2, 3)).items()}
    assert found["coverage@2"] == 4 / 5
    assert found["coverage@3"] == 1
    # bits of the items: 0, 1, 2, 3, 3
    assert found["novelty@2"] == pytest.approx((2.5 + 1.5 + 0.5) / 3)
    assert found["novelty@3"] == pytest.approx((8 / 3 + 1.5 + 1) / 3)
    near = 1 - 0.5**0.5
    assert found["diversity@2"] == pytest.approx((near + near + 0) / 3)
    assert found["diversity@3"] == pytest.approx(((near + 2) / 3 + near + 2 * near / 3) / 3)
    # the third user has no past; the others' lists have .1875 and .375, their pasts .75 and .25
    assert found["popularity@2"] == pytest.approx((0.1875 + 0.375) / (0.75 + 0.25))
    # shown 1, 2, 2, 1 and 0 times: in rising order 0 1 1 2 2, weighed by -4 -2 0 2 4
    assert found["gini@2"] == pytest.approx((-2 + 4 + 8) / (5 * 6))


def test_metrics_of_lists_follow_the_weights() -> None:
    """As a bootstrap draws: the first list three times, the second not at all."""
    drawn = np.array([3.0, 0, 1])
    again = np.array([0, 0, 0, 2])
    weighted = list_statistics(LISTS, USERS, BY_HAND, (3,))
    repeated = list_statistics(LISTS[again], USERS[again], BY_HAND, (3,))
    for name, of in weighted.items():
        assert of(drawn) == pytest.approx(repeated[name](np.ones(4))), name


def test_what_is_undefined_is_nan() -> None:
    """No lists; lists of one item, which have no pairs; users of whom nothing is known."""
    nothing = list_statistics(LISTS[:0], USERS[:0], BY_HAND, (3,))
    assert all(np.isnan(of(np.ones(0))) for of in nothing.values())
    nobody = np.full(3, UNKNOWN)
    found = {n: of(np.ones(3)) for n, of in list_statistics(LISTS, nobody, BY_HAND, (1,)).items()}
    assert {name for name, value in found.items() if np.isnan(value)} == {
        *("diversity@1", "popularity@1")
    }


def test_overlaps_by_hand() -> None:
    """Pairs share one item (2), one (2) and two (1 and 2), of lists of 8 / 3 items on average."""
    assert overlap_of_users(LISTS, USERS, 5) == pytest.approx(4 / 3 / (8 / 3))
    twice = USERS[[0, 0, 1]]  # the first pair is of one user
    assert overlap_of_users(LISTS, twice, 5) == pytest.approx(3 / 2 / (8 / 3))
    # most popular of what is left: 2 3 4 | 1 2 | 0 1 2; every list is that of its user
    assert overlap_with_popular(LISTS, USERS, BY_HAND)[0] == 1
    # of the three that the first may be shown 2 is the most popular, of the four of the second 1, 2
    shares, chance = overlap_with_popular(np.array([[4, -1], [3, 2]]), USERS[[0, 1]], BY_HAND)
    assert shares == (0 + 1 / 2) / 2
    assert chance == pytest.approx((1 / 3 + 2 / 4) / 2)


def ranked(run: Run, baseline: Any, k: int) -> tuple[np.ndarray, np.ndarray, Background]:
    """Lists of a baseline for the test split, their users, and what they are judged against."""
    experiment, prepared = run.experiment, run.prepared
    test = prepared.interactions("test")
    rows = np.flatnonzero(test["label_click"] == 1)
    users, items = test["user"][rows], prepared.manifest.items
    excluded = seen_items(prepared, "test", users, seen_behaviours(experiment))
    fitted = baseline.fit(training_interactions(experiment, prepared))
    scorer = fitted.scorer(users, past_items(prepared, "test", rows))
    targets = test["candidate"][rows].astype(np.int64) - FIRST
    lists = ranks_and_lists(scorer, targets, excluded, k, items)[1]
    background = make_background(experiment, prepared, "test", lambda: np.zeros((items, 1)))
    return lists, users, background


def test_alarms_go_off_for_popularity_and_not_for_neighbours(shop_run: Run) -> None:
    lists, users, background = ranked(shop_run, BASELINES["popularity"](), 10)
    assert overlap_with_popular(lists, users, background)[0] == 1
    same, popular = alarms("one", lists, users, background, 10)
    assert same.startswith("one: nearly everyone gets the same list. Two users share ")
    assert "the alarm is at 60% of what chance leaves open" in same
    assert popular.startswith("one: the lists are the popularity list. A user's list holds 100% of")
    assert alarms("other", *ranked(shop_run, BASELINES["item_knn"](), 10), 10) == []


def test_one_list_for_all_that_is_not_popular_is_one_alarm(shop_run: Run) -> None:
    lists, users, background = ranked(shop_run, BASELINES["popularity"](), 10)
    rare = np.tile(np.argsort(-background.place)[:10], (len(lists), 1))
    [alarm] = alarms("a", rare, users, background, 10)
    assert alarm.startswith("a: nearly everyone gets the same list. Two users share 100% of")


def test_a_catalogue_that_is_hardly_larger_than_the_lists_raises_no_alarm() -> None:
    """Four of five items are in every list, whoever gets it: chance leaves little open."""
    draw = np.random.default_rng(0)
    lists = np.stack([draw.permutation(5)[:4] for _ in range(40)])
    users = np.arange(40) + FIRST
    free = replace(BY_HAND, own=np.full(40, np.nan), left_out=np.zeros(0, np.int64))
    assert overlap_of_users(lists, users, 5) > 0.7
    assert alarms("a", lists, users, free, 4) == []


def test_what_the_lists_of_a_split_are_judged_against(shop_run: Run) -> None:
    """Clicks of training count for shares; those before the split are what users have."""
    experiment, prepared = shop_run.experiment, shop_run.prepared
    n, m = prepared.manifest.items, prepared.manifest.users
    had = {split: np.zeros((m, n), bool) for split in ("train", "validation")}
    for split, of in had.items():
        log = prepared.interactions(split)
        clicked = log["label_click"] == 1
        of[log["user"][clicked] - FIRST, log["candidate"][clicked] - FIRST] = True
    found = make_background(experiment, prepared, "test", lambda: np.zeros((n, 1)))
    share = had["train"].sum(axis=0) / had["train"].any(axis=1).sum()
    np.testing.assert_allclose(found.share, share)
    before = had["train"] | had["validation"]
    own = [share[items].mean() if items.any() else np.nan for items in before]
    np.testing.assert_allclose(found.own, own)
    hidden = [np.sort(found.place[items]) for items in map(np.flatnonzero, before)]
    keys = [user * n + places for user, places in enumerate(hidden)]
    assert found.left_out.tolist() == np.concatenate(keys).tolist()
    # category and brand of an item, one value each: cosines 0, .5 and 1
    alike = (found.alike @ found.alike.T).toarray()
    assert set(np.unique(alike.round(9))) == {0, 0.5, 1}
    ids = prepared.items.select(["item_category", "item_brand"]).to_pandas()
    both = (ids.to_numpy()[:, None] == ids.to_numpy()).mean(axis=2)
    np.testing.assert_allclose(alike, both.reshape(n, n), atol=1e-9)


def test_best_items_come_in_order_whatever_their_scores() -> None:
    """Signs, ties, infinities and both zeros, in several parts, beside a stable sort."""
    draw = np.random.default_rng(1)
    scores = np.round(draw.normal(size=(50, 40)) * 3).astype(np.float32)
    scores[scores == 1] = -0.0
    scores[:, 7], scores[3] = np.inf, -np.inf
    exclude = Lists(draw.integers(0, 40, 100), np.arange(0, 101, 2))

    class Given(Counts):
        def scores(self, queries: np.ndarray) -> np.ndarray:
            return scores[queries]

    for k in (1, 6, 40, 60):
        found = top_items(Given(scores[0]), np.arange(50), k, exclude, 40)
        shown = scores.copy()
        for query in range(50):
            shown[query, exclude[query]] = -np.inf
        order = np.argsort(-shown, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(shown, order, axis=1)
        np.testing.assert_array_equal(found[0][:, :40], best)
        np.testing.assert_array_equal(found[1][:, :40], np.where(best > -np.inf, order, -1))
        assert (found[1][:, 40:] == -1).all()


def test_intervals_of_many_metrics_are_those_of_each() -> None:
    values, users = np.random.default_rng(2).random((3, 60)), np.arange(60) // 2
    statistics = {str(i): mean_statistic(of) for i, of in enumerate(values)}
    found = bootstrap_intervals(statistics, users, 30)
    for name, statistic in statistics.items():
        assert found[name] == bootstrap_interval(statistic, users, 30)


def test_a_diversifier_is_read_kept_and_asked_for_anew(shop_run: Run) -> None:
    experiment = measured_under(
        shop_run, ["evaluate.diversify={kind='dpp', trade=0.2}"], None, "test"
    ).experiment
    assert experiment.evaluate.diversify == Dpp(trade=0.2)
    assert parse_experiment(to_dict(experiment)) == experiment
    with pytest.raises(ConfigError, match=r"evaluate\.diversify: 'mrr' is not one of 'mmr', 'dpp'"):
        overridden(experiment, {"evaluate.diversify": "mrr"})


@pytest.fixture(scope="module")
def diversified(shop_run: Run) -> Evaluation:
    """The test split, with lists put together by MMR."""
    rules = replace(
        shop_run.experiment.evaluate, diversify=Mmr(trade=0.3), baselines=(), ks=(5, 10)
    )
    experiment = replace(shop_run.experiment, evaluate=rules)
    params, tables, step = load_best(shop_run)
    serving, answers = prepared_serving(experiment, shop_run.prepared), load_answers(shop_run, step)
    return evaluate(experiment, shop_run.prepared, serving, params, tables, "test", answers=answers)


def test_the_price_of_diversity_stands_beside_the_plain_orders(
    shop_run: Run, diversified: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = load_answers(shop_run, load_best(shop_run)[2])
    assert answers is not None
    orders, plain = diversified.orders, answers.order
    assert list(orders) == ["fused", "next_item", "click", "buy", "stars", f"{plain}, mmr"]
    for k in (5, 10):
        assert orders["next_item"][f"diversity@{k}"] == pytest.approx(
            diversified.tasks["next_item"][f"diversity@{k}"]
        )
        assert orders["next_item"][f"ndcg@{k}"] == pytest.approx(
            diversified.tasks["next_item"][f"ndcg@{k}"]
        )
    own = orders[f"{plain}, mmr"]
    assert own["ndcg@5"] != orders[plain]["ndcg@5"]
    assert own["ndcg@5"] <= own["ndcg@10"]
    assert "utility auc" not in own, "a list has no score of what is not in it"
    print_evaluation(shop_run.experiment, diversified)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{plain}, mmr" in printed
    assert "diversified by mmr (trade = 0.3)" in printed
    assert "diversity@5" in printed


def test_lists_are_measured_with_intervals_and_sums_by_user(diversified: Evaluation) -> None:
    assert {n.partition("@")[0] for n in diversified.intervals["next_item"]} == {
        *("hr", "ndcg", "mrr", "recall", "precision", "map", "novelty", "diversity", "popularity")
    }
    assert diversified.users is not None
    for name in ("diversity@10", "popularity@5"):
        sums = diversified.users[f"next_item/{name}"].to_numpy().sum()
        value = diversified.tasks["next_item"][name]
        assert sums / diversified.targets["next_item"] == pytest.approx(value)


def test_alarms_are_kept_and_printed(
    shop_run: Run,
    diversified: Evaluation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = replace(diversified, alarms=("next_item: nearly everyone gets the same list.",))
    assert Evaluation.from_dict(told.to_dict()).alarms == told.alarms
    print_evaluation(shop_run.experiment, told)
    assert "ALARM next_item: nearly everyone gets the same list." in capsys.readouterr().out
