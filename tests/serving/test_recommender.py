"""Recommendations and predictions of a trained run, through raw ids."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import mtrec_jax
from mtrec_jax.baselines import SimilarUsers
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import overridden, parse_experiment
from mtrec_jax.result import Result
from mtrec_jax.serving.recommender import Recommender, predict_file
from mtrec_jax.serving.requests import Encoder, raw_texts
from mtrec_jax.train.loop import train
from mtrec_jax.train.run import Run
from tests.data import small

USERS = ["u00003", "u00001", "u00042"]
TASKS = ["next_item", "click", "buy", "stars"]


def stored_history(prepared: Prepared, user: str) -> dict[str, list[Any]]:
    """What the prepared folder knows of a user's past, in raw values."""
    index = prepared.user_ids[user] - 2
    items = prepared.user_lists("event_item")[index]
    history: dict[str, list[Any]] = {"item": [prepared.item_names[i - 2] for i in items]}
    for field in prepared.manifest.history:
        values = [None, None, *prepared.vocabulary(field.name).column("value").to_pylist()]
        history[field.name] = [values[i] for i in prepared.user_lists(f"event_{field.name}")[index]]
    return history


def seen_by(prepared: Prepared, user: str) -> set[str]:
    """Items that a user has clicked: next_item is asked of clicks only."""
    history = stored_history(prepared, user)
    pairs = zip(history["item"], history["click"], strict=True)
    return {item for item, click in pairs if click == "1"}


def items_of(result: Result, user: str) -> list[str]:
    pairs = zip(result["user"], result["item"], strict=True)
    return [item for who, item in pairs if who == user]


def popular(prepared: Prepared) -> list[str]:
    """Items by falling number of training clicks, ties in the order of the catalogue."""
    train = prepared.interactions("train")
    events = train["candidate"][train["label_click"] == 1]
    counts = np.bincount(events, minlength=prepared.manifest.items + 2)[2:]
    return [prepared.item_names[place] for place in np.argsort(-counts, kind="stable")]


def test_the_answer_is_a_table_in_the_order_of_the_question(shop_recommender: Recommender) -> None:
    result = shop_recommender.recommend(USERS, 5)
    weights = [f"weight {task}" for task in TASKS]
    assert result.columns == [
        "user",
        "known",
        "rank",
        "item",
        "title",
        "score",
        *TASKS,
        *weights,
        "new",
    ]
    assert result["user"] == [user for user in USERS for _ in range(5)]
    assert result["rank"] == [1, 2, 3, 4, 5] * 3
    assert all(result["known"])
    titles = dict(
        zip(shop_recommender.prepared.item_names, shop_recommender.prepared.titles, strict=True)
    )
    assert result["title"] == [titles[item] for item in result["item"]]
    assert all(title != item for item, title in titles.items())


def test_the_order_follows_the_score(shop_recommender: Recommender) -> None:
    result = shop_recommender.recommend(USERS, 20)
    scores = np.array(result["score"]).reshape(3, 20)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (scores[:, 0] > scores[:, -1]).all()


def test_the_nearest_items_are_sorted_by_the_fused_score_alone(
    shop_recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty candidates by cosine, put into an order that no cosine knows."""
    serving, prepared = shop_recommender._serving, shop_recommender.prepared

    def fused(ids: Any) -> Any:
        return (np.asarray(ids, np.int64) * 37 % 61).astype(np.float32)

    def answer(params: Any, states: Any, vectors: Any, ids: Any) -> Any:
        return serving.answer(params, states, vectors, ids)._replace(fused=fused(ids))

    monkeypatch.setattr(shop_recommender, "_serving", replace(serving, answer=answer))
    names = prepared.item_names
    cosines = dict(
        zip(names, shop_recommender.predict(["u00003"] * 60, names)["next_item"], strict=True)
    )
    past = stored_history(prepared, "u00003")
    pairs = zip(past["item"], past["click"], strict=True)
    seen = {item for item, click in pairs if str(click) == "1"}  # as the targets are
    nearest = sorted(set(names) - seen, key=lambda name: -cosines[name])[:20]
    score = {name: float(fused(prepared.item_ids[name])) for name in nearest}
    result = shop_recommender.recommend(["u00003"], 7, order_by="fused")
    assert result["item"] == sorted(nearest, key=lambda name: -score[name])[:7]
    assert result["score"] == sorted(score.values(), reverse=True)[:7]
    assert result["next_item"] != sorted(result["next_item"], reverse=True)


def test_seen_items_are_left_out_unless_asked_for(shop_recommender: Recommender) -> None:
    prepared = shop_recommender.prepared
    seen = seen_by(prepared, "u00003")
    assert 0 < len(seen) < len(set(stored_history(prepared, "u00003")["item"])), (
        "views do not count"
    )
    everything = len(prepared.item_names)
    fresh = items_of(shop_recommender.recommend(["u00003"], everything), "u00003")
    assert set(fresh) == set(prepared.item_names) - seen
    again = shop_recommender.recommend(["u00003"], everything, exclude_seen=False)
    assert set(again["item"]) == set(prepared.item_names)


def test_allowed_and_blocked_items(shop_recommender: Recommender) -> None:
    seen = sorted(seen_by(shop_recommender.prepared, "u00003"))
    unseen = [i for i in shop_recommender.prepared.item_names if i not in seen]
    allowed, blocked = unseen[:6] + seen[:2], unseen[4:8]
    result = shop_recommender.recommend(["u00003"], 10, allowed=allowed, blocked=blocked)
    assert sorted(result["item"]) == sorted(unseen[:4]), "fewer, as the filters leave fewer"
    every = shop_recommender.recommend(["u00003"], 60, blocked=blocked)
    assert set(every["item"]) == set(unseen) - set(blocked)
    order = [item for item in every["item"] if item in allowed]
    assert result["item"] == order, "filters do not change the order of what is left"
    repeated = shop_recommender.recommend(["u00003"], 10, allowed=allowed * 2, blocked=blocked)
    assert repeated["item"] == result["item"]


def test_predictions_are_in_their_units(shop_recommender: Recommender) -> None:
    result = shop_recommender.recommend(USERS, 20)
    for task in ("click", "buy"):
        values = np.array(result[task])
        assert ((values > 0) & (values < 1)).all()
    assert (np.abs(result["next_item"]) <= 1 + 1e-6).all()
    stars = np.array(result["stars"])
    assert ((stars > 0) & (stars < 7)).all(), "stars, not standard deviations of stars"
    weights = np.array([result[f"weight {task}"] for task in TASKS])
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)
    assert (weights[[TASKS.index(task) for task in ("click", "buy")]] > 0).all()
    assert not weights[[TASKS.index(task) for task in ("next_item", "stars")]].any(), "no worth"


def test_predict_agrees_with_recommend(shop_recommender: Recommender) -> None:
    found = shop_recommender.recommend(USERS, 7)
    pairs = shop_recommender.predict(found["user"], found["item"])
    assert pairs.columns == ["user", "item", "known", *TASKS, "new", "reason"]
    assert (pairs["user"], pairs["item"]) == (found["user"], found["item"])
    assert all(pairs["known"])
    for task in TASKS:
        np.testing.assert_allclose(pairs[task], found[task], rtol=2e-5, atol=1e-6)


def test_no_task_has_the_name_of_another_column(shop_recommender: Recommender) -> None:
    answers = [
        shop_recommender.predict(USERS[:1], ["i0001"]),
        shop_recommender.predict_rows(pa.table({"user": USERS[:1], "item": ["i0001"]})),
        shop_recommender.recommend(USERS[:1], 1),
    ]
    own = {name for found in answers for name in found.columns} - set(TASKS)
    assert {"reason", "new", "known", "rank", "row"} <= own
    for name in own - {f"weight {task}" for task in TASKS}:  # no name of a task has a space
        with pytest.raises(ConfigError, match=f"tasks.{name}: the results use this name"):
            small.make(tasks={name: {"kind": "binary"}})


def test_unknown_pairs_are_marked(shop_recommender: Recommender) -> None:
    pairs = shop_recommender.predict(["u00001", "nobody", "u00001"], ["i0003", "i0003", "nothing"])
    assert pairs["known"] == [True, False, False]
    for task in TASKS:
        assert pairs[task][0] is not None
        assert pairs[task][1:] == [None, None], "nothing is known of them"
    asked = (["u00001", "nobody", "u00001"], ["i0003", "i0003", "nothing"])
    guessed = shop_recommender.predict(*asked, on_unknown="model")
    assert np.isfinite([guessed[task] for task in TASKS]).all()
    assert guessed["click"][0] == pairs["click"][0]
    assert len(shop_recommender.predict([], [])) == 0


def test_an_equal_fresh_history_gives_the_stored_answer(shop_recommender: Recommender) -> None:
    stored = shop_recommender.recommend(USERS, 8)
    histories = [stored_history(shop_recommender.prepared, user) for user in USERS]
    assert shop_recommender.recommend(USERS, 8, histories=histories).table == stored.table


def test_a_fresh_history_changes_the_answer_at_once(shop_recommender: Recommender) -> None:
    stored = shop_recommender.recommend(["u00001"], 8)
    history = stored_history(shop_recommender.prepared, "u00001")
    first = items_of(stored, "u00001")[0]
    longer = {"item": [*history["item"], first], "click": [*history["click"], "1"]}
    after = shop_recommender.recommend(["u00001"], 8, histories=[longer])
    assert first not in after["item"], "it has been seen now"
    assert after["click"] != stored["click"]
    ignored = {"item": longer["item"], "click": [*history["click"], 0]}
    other = shop_recommender.recommend(["u00001"], 8, histories=[ignored])
    assert other["score"] != after["score"], "what happened matters, not only to what"
    assert all(after["known"])


def test_only_the_latest_events_of_a_long_history_count(shop_recommender: Recommender) -> None:
    """The model looks back on 16 events, but what was seen earlier stays excluded."""
    names = shop_recommender.prepared.item_names
    recent, early = names[:16], names[16:30]
    short = shop_recommender.recommend(["x"], 60, histories=[recent])
    long = shop_recommender.recommend(["x"], 60, histories=[early + recent])
    assert [i for i in short["item"] if i not in early] == long["item"]


def test_items_that_the_model_does_not_know_are_unknown_events_of_a_history(
    shop_recommender: Recommender,
) -> None:
    history: Any = {"item": ["zz", "i0001", "yy", "i0002", "zz"], "click": [1, 1, 0, 0, 0]}
    result = shop_recommender.recommend(["x"], 8, histories=[history], blocked=["old"])
    assert result.ignored == {"histories": 2, "blocked": 1}
    assert not {"i0001", "zz"} & set(result["item"])
    other = shop_recommender.recommend(["x"], 8, histories=[history | {"item": ["y"] * 5}])
    assert other.ignored == {"histories": 1}
    assert other["score"] != result["score"], "the known ones count"
    message = r"histories: item 'i000' is not in the catalogue of .*Did you mean 'i00"
    with pytest.raises(DataError, match=message):
        shop_recommender.recommend(["x"], histories=[["i000"]], unknown_items="error")


def test_unknown_users_get_popular_items_in_order(shop_recommender: Recommender) -> None:
    best = popular(shop_recommender.prepared)
    result = shop_recommender.recommend(["nobody", "u00001", "noone"], 4)
    assert items_of(result, "nobody") == items_of(result, "noone") == best[:4]
    assert result["known"] == [False] * 4 + [True] * 4 + [False] * 4
    assert items_of(result, "u00001") == shop_recommender.recommend(["u00001"], 4)["item"]
    filtered = shop_recommender.recommend(["nobody"], 4, blocked=best[1:3], allowed=best[:9])
    assert filtered["item"] == [best[0], *best[3:6]]
    assert shop_recommender.recommend(["nobody"], 4, histories=[[]])["item"] == best[:4]
    for column in ("score", *TASKS, *(f"weight {task}" for task in TASKS)):
        assert result[column][:4] == [None] * 4, "the model says nothing of a stranger"
        assert None not in result[column][4:8]


def test_the_model_may_be_asked_about_strangers(shop_recommender: Recommender) -> None:
    asked = shop_recommender.recommend(["nobody"], 60, on_unknown="model")
    assert asked["known"] == [False] * 60
    assert asked["score"] == sorted(asked["score"], reverse=True)
    pairs = shop_recommender.predict(["nobody"] * 60, asked["item"], on_unknown="model")
    np.testing.assert_allclose(asked["click"], pairs["click"], rtol=1e-4)


def test_an_unknown_user_with_a_history_gets_an_answer_of_their_own(
    shop_recommender: Recommender,
) -> None:
    names = shop_recommender.prepared.item_names
    histories: list[Any] = [names[:3], names[20:40:3]]
    result = shop_recommender.recommend(["new", "newer"], 60, histories=histories)
    assert not any(result["known"])
    new, newer = items_of(result, "new"), items_of(result, "newer")
    assert not set(new) & set(names[:3])
    rest = set(new) & set(newer)
    assert [i for i in new if i in rest] != [i for i in newer if i in rest]
    assert [i for i in new if i in rest] != [
        i for i in popular(shop_recommender.prepared) if i in rest
    ]
    scores = [s for s, u in zip(result["score"], result["user"], strict=True) if u == "new"]
    assert scores == sorted(scores, reverse=True)


def test_more_users_than_a_batch_are_answered_as_each_alone(shop_recommender: Recommender) -> None:
    known = shop_recommender.prepared.user_names
    users = [known[i % len(known)] if i % 7 else f"stranger{i}" for i in range(600)]
    result = shop_recommender.recommend(users, 3)
    assert result["user"] == [user for user in users for _ in range(3)]
    for place in (0, 1, 254, 255, 256, 257, 599):
        alone = shop_recommender.recommend([users[place]], 3)
        part = result.table.slice(3 * place, 3)
        assert part["item"].to_pylist() == alone["item"]
        if place % 7:
            np.testing.assert_allclose(part["score"].to_pylist(), alone["score"], rtol=1e-5)
    pairs = shop_recommender.predict(users, result["item"][::3])
    assert pairs["user"] == users
    assert [value is None for value in pairs["stars"]] == [i % 7 == 0 for i in range(600)]
    found, expected = (np.array(a, float) for a in (pairs["stars"], result["stars"][::3]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # nan where null


def test_all_users_are_those_of_the_data(shop_recommender: Recommender) -> None:
    (table,) = shop_recommender.recommend_all(3)
    named = shop_recommender.recommend(shop_recommender.prepared.user_names, 3)
    for column in ("user", "rank", "item"):
        assert table[column].to_pylist() == named[column]
    np.testing.assert_allclose(table["score"], named["score"], rtol=1e-5)
    allowed = shop_recommender.prepared.item_names[:20]
    filters: dict[str, Any] = {"allowed": allowed, "blocked": allowed[:5]}
    (table,) = shop_recommender.recommend_all(3, **filters)
    assert set(table["item"].to_pylist()) <= set(allowed[5:])
    named = shop_recommender.recommend(shop_recommender.prepared.user_names, 3, **filters)
    assert table["item"].to_pylist() == named["item"]


def test_all_users_may_be_answered_in_the_order_of_a_task(shop_recommender: Recommender) -> None:
    """All 20 candidates of each of the 48 users, the most probable purchase first."""
    (table,) = shop_recommender.recommend_all(20, order_by="buy")
    scores = table["score"].to_numpy().reshape(48, 20)
    np.testing.assert_array_equal(scores.astype(np.float32).ravel(), table["buy"].to_numpy())
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (scores[:, 0] > scores[:, -1]).all()


def test_raw_ids_are_read_as_preparation_reads_them(tmp_path: Path) -> None:
    """Every column kind of a table of ids gives the text that `raw_text` gives."""
    values: list[Any] = [7.0, -0.0, 7.5, 1e14, 1e15, 1e16, 1e-7, True, " u\t", 7, "7.0"]
    expected = ["7", "0", "7.5", str(10**14), str(10**15), "1e+16", "1e-7"]
    assert raw_texts("users", values) == [*expected, "true", "u", "7", "7.0"]
    columns: list[list[Any]] = [[v for v in values if isinstance(v, kind)] for kind in (float, str)]
    for column in (*columns, [True, False]):
        n = len(column)
        items = [column[(i + turn) % n] for turn in range(3) for i in range(n)]
        log = pa.table({"user": column * 3, "item": items, "time": range(3 * n)})
        prepared = prepare(small.make(), None, tmp_path / type(column[0]).__name__, {"events": log})
        assert set(prepared.user_ids) == set(raw_texts("users", column))
    encoder = Encoder(prepared, "float32")
    assert encoder.users(raw_texts("users", [True]), None, [{}]).known.all()
    found = encoder.users(["new"], [[False, True]], [{}]).batch.events["item"][0, :2].tolist()
    assert found == [prepared.item_ids[name] for name in ("false", "true")]


def test_untrimmed_ids_are_found(shop_recommender: Recommender) -> None:
    plain = shop_recommender.recommend(["u00003"], 5, allowed=["i0001", "i0002"])
    padded = shop_recommender.recommend([" u00003 "], 5, allowed=["i0001 ", " i0002"])
    assert padded.table == plain.table
    pairs = shop_recommender.predict(["u00003\n"], [" i0001"])
    assert (pairs["user"], pairs["item"], pairs["known"]) == (["u00003"], ["i0001"], [True])


def test_no_users_give_an_empty_table(shop_recommender: Recommender) -> None:
    empty = shop_recommender.recommend([])
    assert len(empty) == 0
    assert empty.columns == shop_recommender.recommend(["u00001"]).columns


def test_similar_items_are_the_nearest_of_the_others(shop_recommender: Recommender) -> None:
    names = shop_recommender.prepared.item_names
    table = {item: shop_recommender.similar_items(item, 60) for item in names[:5]}
    for item, found in table.items():
        assert found["rank"] == list(range(1, 60))
        assert sorted([*found["item"], item]) == sorted(names), "every other item, not itself"
        assert found["cosine"] == sorted(found["cosine"], reverse=True)
        assert max(found["cosine"]) <= 1 + 1e-6
        short = shop_recommender.similar_items(item, 4)
        assert short["item"] == found["item"][:4]
    one, other = names[0], names[1]
    there = table[one]["cosine"][table[one]["item"].index(other)]
    back = table[other]["cosine"][table[other]["item"].index(one)]
    assert there == pytest.approx(back, rel=1e-5)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.recommend(["u00001"], 0), r"k = 0: between 1 and the 60 items"),
        (lambda r: r.recommend(["u00001"], 61), r"k = 61: between 1 and the 60 items"),
        (lambda r: list(r.recommend_all(61)), r"k = 61: between 1 and the 60 items"),
        (lambda r: r.similar_items("i0001", 61), r"k = 61: between 1 and the 60 items"),
        (
            lambda r: r.recommend(["a"], allowed=["i0001", "i001"], unknown_items="error"),
            r"allowed: item 'i001' is not in the catalogue of .*Did you mean 'i00\d1'\?",
        ),
        (
            lambda r: r.recommend(["u00001"], blocked=["zzz"], unknown_items="error"),
            r"blocked: item 'zzz' is not in the catal",
        ),
        (
            lambda r: r.recommend(["u00001"], allowed=["x", "y"]),
            r"leave no item \(not in the catalogue: 2 ids, 'x', 'y'\)",
        ),
        (lambda r: r.similar_items("zzz"), r"item 'zzz' is not in the catalogue"),
        (
            lambda r: r.recommend(["u00001"], allowed=["i0001"], blocked=["i0001"]),
            r"the filters allowed and blocked leave no item",
        ),
        (
            lambda r: r.recommend(["u00001", "b"], histories=[["i0001"]]),
            r"histories: 1 given for 2 users",
        ),
        (
            lambda r: r.recommend(["a"], histories=[{"item": ["i0001"], "clicks": [1]}]),
            r"histories\[0\]: has item, clicks; it needs item, and may have click, cart",
        ),
        (
            lambda r: r.recommend(["a"], histories=[{"click": [1]}]),
            r"histories\[0\]: has click; it needs item",
        ),
        (
            lambda r: r.recommend(["a"], histories=[{"item": ["i0001"], "click": [1, 0]}]),
            r"histories\[0\]: 2 values of click for 1 items",
        ),
        (
            lambda r: r.recommend(["a"], histories=[{"item": ["zz", "i0001"], "click": [1]}]),
            r"histories\[0\]: 1 values of click for 2 items",
        ),
        (
            lambda r: r.recommend(["u00001", "u0001"], on_unknown="error"),
            r"user 'u0001' is not in the data of .*Did you mean 'u0\d+'\? Pass on_unknown=",
        ),
        (lambda r: r.recommend("u12"), r"users: 'u12' is one text; pass a list of ids"),
        (lambda r: r.predict("u12", ["i0001"]), r"users: 'u12' is one text; pass a list of ids"),
        (lambda r: r.predict(["u12"], "i0001"), r"items: 'i0001' is one text; pass a list"),
        (lambda r: r.recommend(["a"], blocked="i0001"), r"blocked: 'i0001' is one text; pass"),
        (
            lambda r: r.recommend(["a"], histories=["i0001"]),
            r"histories.0.: 'i0001' is one text; pass",
        ),
        (lambda r: r.predict(["u00001"], []), r"predict: 1 users and 0 items; give pairs"),
    ],
)
def test_wrong_questions_are_explained(
    shop_recommender: Recommender, ask: Callable[[Recommender], Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ask(shop_recommender)


def test_raw_rows_of_pairs_are_predicted_as_the_pairs(shop_recommender: Recommender) -> None:
    table = pa.table({"user": ["u00001", "nobody"], "item": ["i0003", "i0003"]})
    rows = shop_recommender.predict_rows(table)
    assert rows.columns == ["row", "known", *TASKS, "new", "reason"]
    pairs = shop_recommender.predict(*table.to_pydict().values())
    assert rows["known"] == pairs["known"] == [True, False]
    guessed = shop_recommender.predict(*table.to_pydict().values(), on_unknown="model")
    rows_guessed = shop_recommender.predict_rows(table, on_unknown="model")
    for task in TASKS:
        assert rows[task][1] is pairs[task][1] is None
        np.testing.assert_allclose(rows[task][:1], pairs[task][:1], rtol=1e-5)
        np.testing.assert_allclose(rows_guessed[task], guessed[task], rtol=1e-5)


def test_what_happens_inside_stands_beside_predictions_if_asked_for(
    shop_recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates of the two experts sum to 1 for each task, the fusion's weights are those of
    `recommend`; predictions stay, and a pair of which nothing is told has none of it."""
    best = shop_recommender.recommend(["u00001"], 2, order_by="fused")
    pairs = pa.table({"user": ["u00001"] * 2 + ["nobody"], "item": [*best["item"], "i0003"]})
    found = shop_recommender.predict(*pairs.to_pydict().values(), looks=True)
    gates = [f"gates/{task}/{expert}" for task in TASKS[1:] for expert in (0, 1)]
    weights = [f"weight {task}" for task in TASKS]
    assert found.columns[7:-2] == [*weights, *gates]
    for task in TASKS[1:]:
        one, other = (found[f"gates/{task}/{expert}"] for expert in (0, 1))
        assert [a + b for a, b in zip(one[:2], other[:2], strict=True)] == pytest.approx([1, 1])
        assert one[2] is None, task
    for column in weights:
        assert found[column][:2] == pytest.approx(best[column], rel=1e-5)
    rows = shop_recommender.predict_rows(pairs, looks=True)
    assert rows["gates/buy/1"][:2] == pytest.approx(found["gates/buy/1"][:2])
    asked = []

    def numbered(params: Any, states: Any, vectors: Any, ids: Any) -> dict[str, Any]:
        asked.append(ids)
        shape = (*ids.shape, 3, 2)
        return {"gates": jax.numpy.arange(np.prod(shape)).reshape(shape)}

    serving = shop_recommender._serving
    monkeypatch.setattr(shop_recommender, "_serving", replace(serving, looks=numbered))
    plain = shop_recommender.predict(*pairs.to_pydict().values())
    assert plain.columns == [name for name in found.columns if name not in (*gates, *weights)]
    assert [plain[task] for task in TASKS] == [found[task] for task in TASKS]
    assert not asked, "answers do without"
    told = shop_recommender.predict(*pairs.to_pydict().values(), looks=True)
    assert [told[column][1] for column in gates] == [6, 7, 8, 9, 10, 11]


def test_a_history_is_encoded_once_a_request(
    shop_recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, calls = shop_recommender._serving, []

    def counted(*given: Any) -> Any:
        calls.append(len(given))
        return serving.users(*given)

    monkeypatch.setattr(shop_recommender, "_serving", replace(serving, users=counted))
    shop_recommender.recommend(USERS, 5)
    assert len(calls) == 1
    shop_recommender.predict(USERS, ["i0001"] * 3)
    assert len(calls) == 2


def test_nothing_is_compiled_after_warming_up(
    shop_recommender: Recommender, capsys: pytest.CaptureFixture[str]
) -> None:
    """Histories of 0 to 500 events, any k, filters and number of users."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    names = shop_recommender.prepared.item_names
    shop_recommender.warm_up()
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x * 3 + len(compiled))(np.arange(5))
    assert compiled, "compilations are heard of"
    compiled.clear()
    for n, length, k in ((1, 0, 1), (2, 1, 21), (9, 17, 60), (66, 500, 20), (130, 3, 33)):
        histories: list[Any] = [[names[(i * 7) % 60] for i in range(length)]] * n
        users = [f"stranger{i}" for i in range(n)]
        shop_recommender.recommend(users, k, histories=histories)
        filters: dict[str, Any] = {"allowed": names[: 20 + k // 2], "blocked": names[:n]}
        if n < 20:
            shop_recommender.recommend(users, k, histories=histories, **filters)
        known = [shop_recommender.prepared.user_names[i % 48] for i in range(n)]
        shop_recommender.recommend(known, k, exclude_seen=n % 2 == 0, order_by="buy")
        shop_recommender.predict(known, [names[i % 60] for i in range(n)])
    shop_recommender.similar_items(names[0], 7)
    shop_recommender.predict_rows(pa.table({"user": ["u00001"], "item": ["i0003"]}))
    assert compiled == []
    assert capsys.readouterr().err == ""
    for _ in range(2):
        next(shop_recommender.recommend_all(5))
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(";")[0] for line in said] == [
        "mtrec: compiling for batches of 256",
        "mtrec: compiling for batches of 256, 20 candidates each",
    ]


def test_who_has_seen_more_than_a_list_holds_is_asked_for_alone(
    shop_recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [*USERS, "nobody"]
    expected = shop_recommender.recommend(users, 9)
    monkeypatch.setattr(shop_recommender, "_room", 4)
    found = shop_recommender.recommend(users, 9)
    assert found["item"] == expected["item"]
    np.testing.assert_allclose(found["score"][:27], expected["score"][:27], rtol=1e-5)


def test_a_task_may_put_the_items_in_order(shop_recommender: Recommender) -> None:
    for task in TASKS:
        found = shop_recommender.recommend(["u00003"], 20, order_by=task)
        assert found[task] == sorted(found[task], reverse=True)
        np.testing.assert_array_equal(np.array(found["score"], np.float32), found[task])
    fused = shop_recommender.recommend(["u00003"], 20, order_by="fused")
    assert sorted(found["item"]) == sorted(fused["item"]), "the same candidates"
    assert found["item"] != fused["item"]
    with pytest.raises(ConfigError, match="order_by: 'star' is not one of 'chosen', 'fused', 'n"):
        shop_recommender.recommend(["u00003"], order_by="star")


def test_ids_of_other_systems_are_ignored_and_counted(shop_recommender: Recommender) -> None:
    plain = shop_recommender.recommend(USERS, 4, allowed=["i0001", "i0002"], blocked=["i0002"])
    mixed = shop_recommender.recommend(
        USERS, 4, allowed=["i0001", "i0002", "new"], blocked=["i0002", "gone", "gone", "old"]
    )
    assert mixed.table == plain.table
    assert (plain.ignored, mixed.ignored) == ({}, {"allowed": 1, "blocked": 2})


def test_what_is_no_id_blocks_nothing_in_silence(shop_recommender: Recommender) -> None:
    mask = np.arange(60) < 30
    with pytest.raises(DataError, match="blocked: these are truth values; pass ids"):
        shop_recommender.recommend(USERS, 4, blocked=mask)
    with pytest.raises(DataError, match="pass a list of ids, or Path"):
        shop_recommender.recommend(USERS, 4, blocked="out.txt")
    plain = shop_recommender.recommend(USERS, 4, blocked=["i0003"])
    for missing in (None, float("nan"), pd.NA, pd.NaT):
        found = shop_recommender.recommend(USERS, 4, blocked=["i0003", missing])
        assert found.table == plain.table


def test_filters_may_be_arrays(shop_recommender: Recommender) -> None:
    first = shop_recommender.recommend(["u00001"], 3)["item"]
    left = shop_recommender.recommend(["u00001"], 2, allowed=np.array(first[:2]))["item"]
    assert sorted(left) == sorted(first[:2])
    assert (
        shop_recommender.recommend(["u00001"], 1, blocked=np.array(first[:1]))["item"] != first[:1]
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("out.txt", "i0003\n i0004 \n\ngone\n"),
        ("out.csv", "stock,item\n0,i0003\n0,i0004\n0,gone\n"),
        ("out.jsonl", '{"item": "i0003"}\n{"item": "i0004"}\n{"item": "gone"}\n'),
    ],
)
def test_filters_come_from_a_file(
    shop_recommender: Recommender, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    listed = shop_recommender.recommend(USERS, 60, blocked=["i0003", "i0004"])
    read = shop_recommender.recommend(USERS, 60, blocked=tmp_path / name)
    assert read.table == listed.table
    assert read.ignored == {"blocked": 1}
    only = shop_recommender.recommend(USERS, 60, allowed=tmp_path / name, exclude_seen=False)
    assert set(only["item"]) == {"i0003", "i0004"}


def test_a_missing_file_of_filters_is_named(shop_recommender: Recommender, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent\.txt"):
        shop_recommender.recommend(USERS, blocked=tmp_path / "absent.txt")


def test_a_moment_without_features_is_refused(shop_recommender: Recommender) -> None:
    with pytest.raises(DataError, match=r"request: 'hour' is no feature on = 'request'.* are none"):
        shop_recommender.recommend(USERS, request={"hour": 21})
    with pytest.raises(DataError, match=r"request: .*pass a mapping .* or a list of 3 of them"):
        shop_recommender.recommend(USERS, request=[{}])


def test_a_run_folder_is_loaded(shop_run: Run, shop_recommender: Recommender) -> None:
    loaded = mtrec_jax.load(shop_run.folder)
    assert loaded.recommend(USERS, 3).table == shop_recommender.recommend(USERS, 3).table


def test_a_baseline_recommends(shop_experiment: Experiment, shop_prepared: Prepared) -> None:
    """The most popular of what the user has not met; for a stranger the most popular of all."""
    popularity = mtrec_jax.fit_baseline(shop_experiment, shop_prepared, "popularity")
    result = popularity.recommend(["u00012", "nobody"], 4)
    assert result.columns == ["user", "known", "rank", "item", "title", "score"]
    assert result["known"] == [True] * 4 + [False] * 4
    train = shop_prepared.interactions("train")
    liked = train["candidate"][train["label_click"] == 1]
    counts = dict.fromkeys(shop_prepared.item_names, 0)
    for item in liked.tolist():
        counts[shop_prepared.item_names[item - 2]] += 1
    ids = {name: place for place, name in enumerate(shop_prepared.item_names)}
    best = sorted(counts, key=lambda name: (-counts[name], ids[name]))
    seen = seen_by(shop_prepared, "u00012")
    assert len(seen & set(best[:4])) == 3, "some of the most popular ones have been seen"
    assert items_of(result, "u00012") == [item for item in best if item not in seen][:4]
    assert items_of(result, "nobody") == best[:4]
    assert result["score"][4:] == [counts[item] for item in best[:4]]
    again = popularity.recommend(["u00012"], 4, exclude_seen=False)
    assert again["item"] == best[:4]
    with pytest.raises(ConfigError, match="ranks no items"):
        mtrec_jax.fit_baseline(shop_experiment, shop_prepared, "bias").recommend(["u00012"])


def test_a_baseline_knows_who_and_what_is_alike(
    shop_experiment: Experiment, shop_prepared: Prepared
) -> None:
    """In raw ids what the fitted baseline says in its own."""
    knn = mtrec_jax.fit_baseline(shop_experiment, shop_prepared, "user_knn")
    alike, ids = knn.similar_users("u00012", 3), shop_prepared.user_ids
    assert isinstance(knn.fitted, SimilarUsers)
    scores, found = knn.fitted.similar_users(np.array([ids["u00012"]]), 3)
    assert [ids[user] for user in alike["user"]] == found[0].tolist()
    assert alike["score"] == scores[0].tolist()
    items = mtrec_jax.fit_baseline(shop_experiment, shop_prepared, "item_knn")
    assert items.similar_items("i0001", 2).columns == ["rank", "item", "title", "score"]
    with pytest.raises(ConfigError, match="does not say which users are alike"):
        items.similar_users("u00012")
    with pytest.raises(DataError, match=r"item 'i001' is not in the data of .*Did you mean"):
        items.similar_items("i001")


def test_a_baseline_needs_the_folder_of_its_experiment(
    shop_experiment: Experiment, shop_prepared: Prepared
) -> None:
    other = overridden(shop_experiment, {"data.past": "frozen"})
    with pytest.raises(ConfigError, match="was prepared for another experiment"):
        mtrec_jax.fit_baseline(other, shop_prepared, "popularity")


def test_similar_users_are_the_nearest_of_the_others(shop_recommender: Recommender) -> None:
    names = shop_recommender.prepared.user_names
    found = shop_recommender.similar_users(names[0], len(names) - 1)
    assert sorted([*found["user"], names[0]]) == sorted(names)
    assert found["cosine"] == sorted(found["cosine"], reverse=True)
    near = found["user"][0]
    back = shop_recommender.similar_users(near, len(names) - 1)
    there = back["cosine"][back["user"].index(names[0])]
    assert there == pytest.approx(found["cosine"][0], abs=1e-5)
    with pytest.raises(DataError, match=r"user 'nobody' is not in the data"):
        shop_recommender.similar_users("nobody")


def test_a_recommender_introduces_itself(shop_recommender: Recommender) -> None:
    assert "'shop'" in repr(shop_recommender)
    assert all(task in repr(shop_recommender) for task in TASKS)


def test_a_notebook_shows_the_run_its_tasks_and_sizes(shop_recommender: Recommender) -> None:
    page = ElementTree.fromstring(shop_recommender._repr_html_())
    assert "shop" in (page.findtext("caption") or "")
    cells = {row.findtext("th"): row.findtext("td") or "" for row in page.iter("tr")}
    kinds = ["retrieval", "binary", "binary", "regression"]
    tasks = ", ".join(f"{task} ({kind})" for task, kind in zip(TASKS, kinds, strict=True))
    assert cells["tasks"] == tasks
    assert cells["data"] == "48 users, 60 items, 879 events"
    assert str(shop_recommender.run.folder) in cells["run"]
    assert str(shop_recommender.prepared.folder) in cells["prepared"]


def test_threads_may_ask_at_once(
    shop_recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither goes on, to the states of its users and to the answers, before the other is there."""
    questions: list[tuple[list[str], int, dict[str, Any]]] = [
        (USERS, 5, {"order_by": "buy", "blocked": ["i0034", "i0041"]}),
        (["u00012", "u00040"], 7, {"exclude_seen": False}),
    ]

    def ask(question: tuple[list[str], int, dict[str, Any]]) -> Result:
        users, k, options = question
        return shop_recommender.recommend(users, k, **options)

    alone = [ask(question) for question in questions]
    serving, both = shop_recommender._serving, threading.Barrier(2, timeout=20)

    def users(*given: Any) -> Any:
        both.wait()
        return serving.users(*given)

    def answer(*given: Any) -> Any:
        both.wait()
        return serving.answer(*given)

    met = replace(serving, users=users, answer=answer)
    monkeypatch.setattr(shop_recommender, "_serving", met)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(ask, questions))
    assert [found.table for found in together] == [found.table for found in alone]


ROWS = "colour,size,sold,kind\n" + "\n".join(
    f"{('red', 'blue', 'green')[i % 3]},{i % 5 + 0.5},{i % 2},{'abc'[i % 3]}" for i in range(60)
)


@pytest.fixture(scope="module")
def rows_recommender(
    tmp_path_factory: pytest.TempPathFactory, compiled_programs: dict[str, str]
) -> Recommender:
    """A run on rows without users and items, with a binary and a multiclass task."""
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.csv").write_text(ROWS, encoding="utf-8")
    experiment = parse_experiment(
        {
            "name": "rows",
            "data": {"events": {"files": ["rows.csv"]}},
            "split": {"kind": "random"},
            "features": {
                "colour": {"on": "request"},
                "size": {"on": "request", "kind": "numeric"},
            },
            "tasks": {"sold": {"kind": "binary"}, "kind": {"kind": "multiclass"}},
            "model": {
                "encoder": "none",
                "towers": {"kind": "shared_bottom", "expert_hidden": [4], "tower_hidden": [4]},
                "width": 4,
            },
            "train": {"steps": 120, "batch_size": 8, "mesh": [1, 1], "learning_rate": 0.02},
        }
    )
    prepared = prepare(experiment, folder, folder / "prepared")
    return Recommender(train(experiment, prepared, folder / "run", show_progress=False))


def test_rows_are_predicted_in_their_order(rows_recommender: Recommender, tmp_path: Path) -> None:
    new = tmp_path / "new.csv"
    lines = "1.5,red\n,blue\n2.5,green\n3,mauve\n" * 80
    new.write_text(f"size,colour\n{lines}", encoding="utf-8")
    result = predict_file(rows_recommender, new)
    assert result.columns == ["row", "sold", "kind a", "kind b", "kind c"]
    assert result["row"] == list(range(320))
    classes = np.array([result[f"kind {c}"] for c in "abc"])
    np.testing.assert_allclose(classes.sum(axis=0), 1, rtol=1e-5)
    assert classes.argmax(axis=0)[:3].tolist() == [0, 1, 2], "the colour tells the kind"
    sold = np.array(result["sold"])
    assert ((sold > 0) & (sold < 1)).all()
    np.testing.assert_allclose(sold.reshape(80, 4), np.broadcast_to(sold[:4], (80, 4)), rtol=1e-5)
    table = {"colour": ["blue", "red"], "size": [None, 1.5]}
    pandas = pytest.importorskip("pandas")
    again = rows_recommender.predict_rows(pandas.DataFrame(table))
    np.testing.assert_allclose(again["sold"], [sold[1], sold[0]], rtol=1e-5)


def test_a_run_on_rows_recommends_nothing(rows_recommender: Recommender, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"predicts rows, not \(user, item\) pairs: use predict_rows"
    ):
        rows_recommender.predict(["a"], ["b"])
    with pytest.raises(ConfigError, match="this run has no retrieval task, so it cannot recommend"):
        rows_recommender.recommend(["a"])
    with pytest.raises(DataError, match=r"absent\.csv: there is no such file"):
        rows_recommender.predict_rows(tmp_path / "absent.csv")
    (tmp_path / "new.csv").write_text("color,size\nred,1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'colour'.*Did you mean 'color'\?"):
        rows_recommender.predict_rows(tmp_path / "new.csv")


DEVICES = "user,item,time,device,click\n" + "".join(
    f"u{n % 5},i{n % 7},{n},{('phone', 'desk')[n // 3 % 2]},{int(n // 3 % 2 == 0)}\n"
    for n in range(200)
)


@pytest.fixture(scope="module")
def moment_recommender(
    tmp_path_factory: pytest.TempPathFactory, compiled_programs: dict[str, str]
) -> Recommender:
    """A run on impressions of which those on a phone are clicked, and no others."""
    experiment = small.make(
        split={"kind": "time", "validation": 0.1, "test": 0.1},
        tasks={"next": {"kind": "retrieval"}, "click": {"kind": "binary"}},
        features={"device": {"on": "request"}, "click": {"on": "history"}},
        model={
            "width": 4,
            "encoder": {"layers": 1},
            "towers": {"kind": "shared_bottom", "expert_hidden": [4], "tower_hidden": [4]},
        },
        train={"steps": 150, "batch_size": 8, "mesh": [1, 1], "learning_rate": 0.03},
        guard={"allow": ["device/click"]},
    )
    folder = tmp_path_factory.mktemp("moments")
    prepared = small.run(folder, experiment, DEVICES)
    return Recommender(train(experiment, prepared, folder / "run", show_progress=False))


@pytest.mark.slow
def test_the_moment_counts(moment_recommender: Recommender) -> None:
    pairs = ["u0", "u1", "u2", "u3"], ["i1", "i2", "i3", "i4"]
    phone = moment_recommender.predict(*pairs, request={"device": "phone"})
    desk = moment_recommender.predict(*pairs, request={"device": "desk"})
    assert min(phone["click"]) > 0.7 > 0.3 > max(desk["click"])
    each = moment_recommender.predict(*pairs, request=[{"device": "phone"}, {"device": "desk"}] * 2)
    expected = [phone["click"][0], desk["click"][1], phone["click"][2], desk["click"][3]]
    np.testing.assert_allclose(each["click"], expected, rtol=1e-5)
    shown = moment_recommender.recommend(["u0"], 3, request={"device": "desk"}, exclude_seen=False)
    assert max(shown["click"]) < 0.3


def test_each_of_many_users_has_a_history_and_a_moment_of_its_own(
    moment_recommender: Recommender,
) -> None:
    """Of seven items person n has met those of the binary digits of n, and the others are left;
    every third is on the phone, where everything is clicked."""
    people = range(1, 21)
    users = [f"person {n}" for n in people]
    met = [[f"i{bit}" for bit in range(7) if n >> bit & 1] for n in people]
    on_phone = np.array([n % 3 == 0 for n in people])
    moments = [{"device": "phone" if phone else "desk"} for phone in on_phone]
    found = moment_recommender.recommend(users, 7, histories=met, request=moments)
    for user, items, phone in zip(users, met, on_phone, strict=True):
        assert sorted([*items_of(found, user), *items]) == [f"i{n}" for n in range(7)]
        clicks = [c for who, c in zip(found["user"], found["click"], strict=True) if who == user]
        assert all((click > 0.5) == phone for click in clicks)
    known = [f"u{n % 5}" for n in people]
    pairs = moment_recommender.predict(known, ["i1"] * 20, request=moments)
    np.testing.assert_array_equal(np.array(pairs["click"]) > 0.5, on_phone)


def test_raw_rows_bring_their_moment_and_the_history_of_their_user(
    moment_recommender: Recommender,
) -> None:
    rows = {"user": ["u0", "u3", "u9"], "item": ["i1", "i2", "i3"]}
    table = pa.table({**rows, "device": ["phone", "desk", None]})
    found = moment_recommender.predict_rows(table)
    moments = [{"device": "phone"}, {"device": "desk"}, {}]
    pairs = moment_recommender.predict(*rows.values(), request=moments)
    assert found["known"] == pairs["known"] == [True, True, False]
    for task in ("next", "click"):
        assert found[task][2] is pairs[task][2] is None
        np.testing.assert_allclose(found[task][:2], pairs[task][:2], rtol=1e-5)
