"""Orders, baselines and blocks of an evaluation, from numbers given by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.baselines import BASELINES
from mtrec_jax.data.examples import past_items
from mtrec_jax.evaluation import collect as collecting
from mtrec_jax.evaluation.collect import (
    ABSENT,
    Collected,
    Ways,
    _rerank,
    collect,
    met_items,
    ordering,
)
from mtrec_jax.evaluation.comparison import compare, training_interactions
from mtrec_jax.evaluation.evaluate import _orders
from mtrec_jax.losses.tasks import TaskField
from mtrec_jax.models.model import make_model
from mtrec_jax.models.serve import Answer, Serving, prepared_serving
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.tables.layout import DENSE, initial_stacks
from mtrec_jax.train.run import Run, load_answers, load_best
from mtrec_jax.types import Array, PyTree, UserStates
from tests import tiny
from tests.data import small
from tests.serving.test_recommender import stored_history


@pytest.fixture(scope="module")
def serving(shop_run: Run) -> Serving:
    return prepared_serving(shop_run.experiment, shop_run.prepared)


@pytest.fixture(scope="module")
def collected(shop_run: Run, serving: Serving) -> Collected:
    """The test split, ranked among all items, all of them candidates of every order."""
    params, tables, step = load_best(shop_run)
    answers = load_answers(shop_run, step)
    assert answers is not None
    params = serving.calibrated(params, answers.calibration)
    rules = replace(shop_run.experiment.evaluate, exclude_seen=False, candidates=60)
    experiment = replace(shop_run.experiment, evaluate=rules)
    parts = experiment, shop_run.prepared, serving, params, tables
    return collect(*parts, "test", orders=True)


def empty(n: int) -> Collected:
    """So many targets of nobody."""
    none = np.zeros(n, np.int64)
    return Collected(none, none, {}, {}, np.zeros(n), none > 0, none + ABSENT, {})


def test_the_fused_order_puts_the_largest_first(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates 2, 5, 3, 4 of a cosine order, where the fused score of an item is its id, and a
    task's logit the opposite. Of classes 1, 5 and 3, in this order as a grown folder has them, item
    2 gets class 5, item 4 class 3 and the others class 1: the third class is not the best."""
    stars = np.log(np.full((6, 3), 0.01))
    stars[[2, 3, 4, 5], [1, 0, 2, 0]] = np.log(0.98)
    tasks = {"click": {"kind": "binary"}, "stars": {"kind": "multiclass"}}
    learned = {"click": TaskField(), "stars": TaskField(classes=("1", "5", "3"))}
    manifest = replace(tiny.manifest(), tasks=learned)
    sorted_by = ordering(tiny.experiment(tasks=tasks), manifest)

    def answer(params: PyTree, states: UserStates, vectors: Array, ids: Array) -> Answer:
        score: Any = np.asarray(ids, float)
        return Answer({}, score, score, {"click": -score, "stars": stars[ids]})

    monkeypatch.setattr(collecting, "QUERIES", 3)
    part = replace(empty(4), candidate=np.array([9, 4, 5, 8]))
    part.order_ranks = {name: np.full(4, ABSENT) for name in ("fused", *sorted_by)}
    states = UserStates(*[np.zeros((3, 1))] * 6)
    found = np.tile(np.array([[0, 3, 1, 2]]), (3, 1))
    own: Any = replace(serving, answer=answer)
    chosen = np.array([1, 2, 3])
    _rerank(own, {}, part, chosen, states, np.zeros((1, 1)), found, Ways(sorted_by))
    assert part.order_ranks["fused"].tolist() == [ABSENT, 1, 0, ABSENT]
    assert part.order_ranks["click"].tolist() == [ABSENT, 2, 3, ABSENT]
    assert part.order_ranks["stars"].tolist() == [ABSENT, 1, 2, ABSENT]


def test_orders_worked_out(shop_run: Run) -> None:
    """Three retrieved targets and one that is not; of two places the second counts 1 / log2(3).

    Worth of a target: half for being the next item, half for the click.
    """
    rules = replace(shop_run.experiment.evaluate, ks=(2,))
    model = replace(shop_run.experiment.model, fusion_objective={"next_item": 1.0, "click": 3.0})
    experiment = replace(shop_run.experiment, evaluate=rules, model=model)
    made = empty(4)
    made.retrieved = np.array([True, True, True, False])
    none = np.full(4, np.nan)
    made.labels = {"next_item": np.array([1.0, 1, 1, np.nan]), "click": np.array([1.0, 0, 0, 1])}
    made.labels |= {"buy": none, "stars": none}
    made.fused = np.array([0.9, 0.1, 0.2, 0.15])
    made.logits = {name: np.array([1.0, 2.0, 0.5, 0.6]) for name in experiment.tasks}
    made.order_ranks = {name: np.array([1, 0, 2, ABSENT]) for name in experiment.tasks}
    made.order_ranks["fused"] = np.array([0, 1, ABSENT, 0])
    found = _orders(experiment, shop_run.prepared, made)
    second = 1 / np.log2(3)
    assert found["fused"]["ndcg@2"] == pytest.approx((1 + second) / 3)
    assert found["stars"]["ndcg@2"] == pytest.approx((second + 1) / 3)
    assert found["fused"]["value@2"] == pytest.approx((4 + second) / 6)
    assert found["stars"]["value@2"] == pytest.approx((4 * second + 1) / 6)
    # clicked .9 and .15, not clicked .1 and .2: three of four pairs are in order
    assert found["fused"]["auc click"] == 3 / 4
    assert found["stars"]["auc click"] == 2 / 4  # 1 and .6, 2 and .5


def test_what_is_recommended_is_what_is_ranked(
    shop_run: Run, shop_recommender: Recommender, collected: Collected
) -> None:
    """A target's place among all items, by cosine and in the fused order, is that in the list for
    its user, given the history before it; but for items whose scores differ by rounding."""
    prepared = shop_run.prepared
    rows = np.flatnonzero(collected.retrieved)[::4][:8]
    assert len(rows) == 8
    past = past_items(prepared, "test", rows)
    for place, row in enumerate(rows):
        user = prepared.user_names[collected.user[row] - 2]
        before = len(past[place])
        history = {n: v[:before] for n, v in stored_history(prepared, user).items()}
        asked = shop_recommender.recommend(
            [user], 60, histories=[history], exclude_seen=False, order_by="fused"
        )
        target = asked["item"].index(prepared.item_names[collected.candidate[row] - 2])
        for column, rank in (
            ("next_item", collected.ranks[row]),
            ("score", collected.order_ranks["fused"][row]),
        ):
            scores = np.array(asked[column])
            ahead = [(scores > scores[target] + gap).sum() for gap in (1e-5, -1e-5)]
            assert ahead[0] <= rank < ahead[1], column
        assert asked["rank"][target] == target + 1


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_neighbours_recommend_nothing_that_was_seen(
    shop_run: Run, collected: Collected, exclude_seen: bool
) -> None:
    """By hand: cosines of the columns of clicks in training; a history's votes are added up."""
    prepared, items = shop_run.prepared, shop_run.prepared.manifest.items
    baseline = BASELINES["item_knn"](neighbours=items)
    rules = replace(
        shop_run.experiment.evaluate, exclude_seen=exclude_seen, baselines=(baseline,), ks=(5,)
    )
    experiment = replace(shop_run.experiment, evaluate=rules)
    found = compare(experiment, prepared, collected, "test")["item_knn"]

    train = prepared.interactions("train")
    clicked = train["label_click"] == 1
    seen = np.zeros((prepared.manifest.users, items))
    seen[train["user"][clicked] - 2, train["candidate"][clicked] - 2] = 1
    norms = np.sqrt(np.maximum(seen.sum(axis=0), 1))
    similarity = seen.T @ seen / norms / norms[:, None]
    np.fill_diagonal(similarity, 0)
    rows = np.flatnonzero(collected.retrieved)
    past = past_items(prepared, "test", rows, met_items(prepared, prepared.wanted)[2])
    ranks: list[int] = []
    hidden_ones = 0
    earlier = np.zeros((prepared.manifest.users, items), bool)  # clicked, as the targets are
    for split in ("train", "validation"):
        log = prepared.interactions(split)
        liked = log["label_click"] == 1
        earlier[log["user"][liked] - 2, log["candidate"][liked] - 2] = True
    for place, row in enumerate(rows):
        user, target = collected.user[row] - 2, collected.candidate[row] - 2
        votes = similarity[np.unique(past[place]) - 2].sum(axis=0).astype(np.float32)
        shown = np.ones(items, bool)
        if exclude_seen:
            shown &= ~earlier[user]
            shown[target] = True
        hidden_ones += (~shown).sum()
        tolerance = 1e-6
        ahead = shown & (
            (votes > votes[target] + tolerance)
            | ((np.abs(votes - votes[target]) <= tolerance) & (np.arange(items) < target))
        )
        ranks.append(ahead.sum())
    assert bool(hidden_ones) == exclude_seen
    assert found["next_item/hr@5"] == pytest.approx((np.array(ranks) < 5).mean(), abs=0.02)
    gains = np.where(np.array(ranks) < 5, 1 / np.log2(np.array(ranks) + 2.0), 0)
    assert found["next_item/ndcg@5"] == pytest.approx(gains.mean(), abs=0.02)


def test_biases_predict_for_the_users_and_items_of_the_targets(
    shop_run: Run, collected: Collected
) -> None:
    prepared = shop_run.prepared
    baseline = BASELINES["bias"](user_regularization=1.0, item_regularization=2.0)
    rules = replace(shop_run.experiment.evaluate, baselines=(baseline,))
    experiment = replace(shop_run.experiment, evaluate=rules)
    found = compare(experiment, prepared, collected, "test")["bias"]
    fitted = baseline.fit(training_interactions(experiment, prepared)).tasks["click"]
    assert np.ptp(fitted.users) > 0.2
    test = prepared.interactions("test")
    label, user, item = (test[name] for name in ("label_click", "user", "candidate"))
    p = np.clip(fitted.mean + fitted.users[user] + fitted.items[item], 1e-4, 1 - 1e-4)
    loss = -np.mean(np.where(label == 1, np.log(p), np.log(1 - p)))
    assert found["click/log_loss"] == pytest.approx(loss, rel=1e-5)
    other = np.roll(user, 1)
    q = np.clip(fitted.mean + fitted.users[other] + fitted.items[item], 1e-4, 1 - 1e-4)
    assert abs(np.mean(np.where(label == 1, np.log(q), np.log(1 - q))) + loss) > 1e-3


@pytest.mark.slow
def test_targets_are_ranked_alike_in_blocks_of_any_size(
    shop_run: Run, serving: Serving, collected: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch with more targets than a block: two blocks or more of it, the last not full."""
    monkeypatch.setattr(collecting, "QUERIES", 16)
    params, tables, step = load_best(shop_run)
    params = serving.calibrated(params, load_answers(shop_run, step).calibration)  # type: ignore
    rules = replace(shop_run.experiment.evaluate, exclude_seen=False, candidates=60, batch_size=64)
    experiment = replace(shop_run.experiment, evaluate=rules)
    parts = experiment, shop_run.prepared, serving, params, tables
    found = collect(*parts, "test", orders=True)
    assert found.retrieved.sum() > 16
    assert found.retrieved.sum() % 16
    for name in ("user", "candidate", "retrieved"):
        np.testing.assert_array_equal(getattr(found, name), getattr(collected, name))
    np.testing.assert_allclose(found.fused, collected.fused, rtol=1e-4, atol=1e-5)
    for one, other in (
        (found.ranks, collected.ranks),
        *((found.order_ranks[n], collected.order_ranks[n]) for n in collected.order_ranks),
    ):
        assert np.mean(one != other) < 0.02  # ties by rounding aside
        assert np.abs(one - other).max() <= 1


# the last purchase of a user, the target: what was only viewed (a), what was bought in training
# (b) or for validation (c), and what is new to the user (d)
AGAIN = "user,item,time,buy\n" + "".join(
    f"{user},{item},{time},{buy}\n"
    for user, last in (("a", "v"), ("b", "w"), ("c", "y"), ("d", "z"))
    for time, (item, buy) in enumerate((("v", 0), ("w", 1), ("x", 1), ("y", 1), (last, 1)))
)


@pytest.mark.slow
def test_a_target_that_was_seen_before_is_missed(
    tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """All five items are shown, but for those that were seen: only a seen target can be missed."""
    made = small.make(
        tasks={"next": {"kind": "retrieval", "where": "buy"}, "buy": {"kind": "binary"}},
        model={
            "width": 4,
            "encoder": "none",
            "towers": {"kind": "shared_bottom", "expert_hidden": [4], "tower_hidden": [4]},
        },
        features={"user": {"on": "context"}},
        evaluate={"ks": [5], "candidates": 5, "baselines": ["popularity", "item_knn"]},
    )
    prepared = small.run(tmp_path, made, AGAIN)
    model = make_model(made, prepared.manifest)
    stacks = initial_stacks(model.layout, jax.random.key(0), jnp.dtype("float32"), False)
    params = model.init(0) | {DENSE: stacks.pop(DENSE)}
    serving = prepared_serving(made, prepared)
    bought, met, never = {"exclude_seen": True}, {"seen": ("any",)}, {"exclude_seen": False}
    cases: list[tuple[dict[str, Any], str]] = [(bought, "ad"), (met, "d"), (never, "abcd")]
    for rules, hit in cases:
        experiment = replace(made, evaluate=replace(made.evaluate, **rules))
        parts = experiment, prepared, serving, params, stacks
        found = collect(*parts, "test", orders=True)
        users = np.array([prepared.user_names[i - 2] for i in found.user])
        assert sorted(users) == list("abcd")
        for ranks in (found.ranks, *found.order_ranks.values()):
            assert sorted(users[ranks < 5]) == list(hit), rules
            assert (ranks[~np.isin(users, list(hit))] == ABSENT).all()
        for name, metrics in compare(experiment, prepared, found, "test").items():
            assert metrics["next/hr@5"] == len(hit) / 4, (name, rules)
