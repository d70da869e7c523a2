"""Requests as the model wants them: histories that hold searches, moments, strangers."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import DataError
from mtrec_jax.experiments import chosen
from mtrec_jax.serving.requests import Encoder
from mtrec_jax.types import UNKNOWN
from tests.data import small

DECLARED = small.make(
    data={"queries": {"files": ["queries.csv"]}, "history_length": 4},
    tasks={
        "next": {"kind": "retrieval"},
        "like": {"kind": "binary", "column": "rating", "at_least": 4},
    },
    features={
        "rating": {"on": "history"},
        "query": {"on": "history", "kind": "multi_valued", "max_values": 2},
    },
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder: Path = tmp_path_factory.mktemp("requests")
    return small.run(folder, DECLARED, queries_csv="user,time,query\na,1,red shoes\na,8,red\n")


def test_a_given_history_may_hold_searches(prepared: Prepared) -> None:
    words = {w.as_py(): i + 2 for i, w in enumerate(prepared.vocabulary("query")["value"])}
    history: dict[str, list[str | None]] = {
        "item": ["x", None, "y"],
        "query": [None, "red hats", None],
        "rating": ["5", "5", "5"],
    }
    found = Encoder(prepared, "float32").users(["new"], [history], [{}]).batch
    x, y = prepared.item_ids["x"], prepared.item_ids["y"]
    assert found.events["item"][0].tolist() == [x, UNKNOWN, y, 0]
    rating, *query = found.events["ids"][0].T  # slot by slot, in the order of the fields
    assert query[0].tolist() == [0, words["red"], 0, 0]
    assert query[1].tolist() == [0, UNKNOWN, 0, 0]
    assert (rating > 0).tolist() == [True, False, True, False]
    assert found.cutoff[0].tolist() == [3]
    # an unknown item would be taken for a search
    strange: dict[str, list[Any]] = {
        "item": ["x", "zz", np.nan, "y"],
        "query": [None, None, "red hats", None],
        "rating": ["5", "1", "5", "5"],
    }
    again = Encoder(prepared, "float32").users(["new"], [strange], [{}])
    assert again.unknown == ("zz",)
    np.testing.assert_array_equal(again.batch.events["item"], found.events["item"])
    np.testing.assert_array_equal(again.batch.events["ids"], found.events["ids"])


def test_a_known_user_brings_the_own_searches(prepared: Prepared) -> None:
    found = Encoder(prepared, "float32").users(["a"], None, [{}])
    searched = found.batch.events["item"][0] == UNKNOWN
    assert searched.tolist() == [False, False, True, False]  # x, (search), y, z, (search), w
    np.testing.assert_array_equal(found.batch.events["ids"][0, :, 1] > 0, searched)
    assert (found.seen[0] == UNKNOWN).sum() == 2  # of the whole history; no item is meant


@pytest.mark.parametrize("left_out", [False, True])
def test_a_history_tells_what_makes_its_items_seen(prepared: Prepared, left_out: bool) -> None:
    """A rating of 4 and more is what counts, also where the model does not train on it: without
    the column nobody knows, and all items do."""
    if left_out:
        prepared = prepared.chosen(chosen(DECLARED, ["next"]))
    rated: dict[str, list[Any]] = {"item": ["x", "y", "z", "w"], "rating": ["5", "3", None, "4.0"]}
    plain: dict[str, list[str]] = {"item": ["x", "y"]}
    encoder = Encoder(prepared, "float32", behaviours=("like",))
    seen = encoder.users(["new", "newer"], [rated, plain], [{}, {}]).seen
    assert seen[0].tolist() == [prepared.item_ids[item] for item in "xw"]
    assert seen[1].tolist() == [prepared.item_ids[item] for item in "xy"]


def test_stored_events_are_seen_by_their_behaviour(prepared: Prepared) -> None:
    """Of a's x, y, z, w all but z have 4 stars and more; of b's x, y, z only z."""
    encoder = Encoder(prepared, "float32", behaviours=("like",))
    found = encoder.users(["a", "b", "c"], None, [{}] * 3).seen
    names = [sorted(prepared.item_names[i - 2] for i in found[user]) for user in range(3)]
    assert names == [["w", "x", "y"], ["z"], ["x"]]


def test_histories_of_unequal_columns_are_refused(prepared: Prepared) -> None:
    with pytest.raises(DataError, match="1 values of query for 2 items"):
        Encoder(prepared, "float32").users(["a"], [{"item": ["x", None], "query": ["red"]}], [{}])
    with pytest.raises(DataError, match="is one text"):
        Encoder(prepared, "float32").users(["a"], [{"item": "xy"}], [{}])


def test_a_column_of_a_history_is_of_all_its_features(tmp_path: Path) -> None:
    """By the name of the column or of the feature, and not by both."""
    stars = {"on": "history", "column": "rating"}
    features = {"stars": stars, "fine": stars, "at": {"on": "history", "kind": "moment"}}
    encoder = Encoder(small.run(tmp_path, small.make(features=features)), "float32")
    named: dict[str, list[Any]] = {"item": ["x"], "stars": ["5"], "fine": ["5"], "at": [9]}
    columns: dict[str, list[Any]] = {"item": ["x"], "rating": ["5"], "time": [9]}
    one, other = (encoder.users(["s"], [given], [{}]).batch.events for given in (named, columns))
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(other[name], array, name)
    assert (one["ids"][0, 0] > UNKNOWN).all()
    with pytest.raises(DataError, match="stars is given twice, by its name and its column"):
        encoder.users(["s"], [named | {"rating": ["1"]}], [{}])


# ---- moments and strangers ----

DAY, HOUR = 86_400, 3600
VISITS = "user,item,time,device,price,click\n" + "".join(
    f"{'abc'[n % 3]},{'xyz'[n % 2]},{n * 7 * HOUR},{('phone', 'desk')[n % 4 > 1]},{n % 5},{n % 2}\n"
    for n in range(60)
)
PEOPLE = "user,city,tags,age\na,bonn,u v,20\nb,bonn,u,40\nc,ulm,v,60\n"


@pytest.fixture(scope="module")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Impressions with features of the moment, by users with features of their own."""
    experiment = small.make(
        data={"users": {"files": ["users.csv"]}},
        split={"kind": "time", "validation": 0.1, "test": 0.1},
        tasks={"next": {"kind": "retrieval"}, "click": {"kind": "binary"}},
        features={
            "city": {},
            "tags": {"kind": "multi_valued", "max_values": 3},
            "age": {"kind": "numeric"},
            "device": {"on": "request"},
            "hour": {"on": "request", "kind": "hour"},
            "price": {"on": "request", "kind": "numeric"},
            "popular": {"on": "request", "kind": "past_count", "column": "item"},
        },
    )
    return small.run(tmp_path_factory.mktemp("visits"), experiment, VISITS, users_csv=PEOPLE)


def test_an_unknown_user_has_the_unknown_values_that_training_knows(visits: Prepared) -> None:
    """City and three slots of tags: unknown is id 1, once a feature; the age is the mean."""
    found = Encoder(visits, "float32").users(["nobody", "c"], None, [{}, {}])
    assert found.known.tolist() == [False, True]
    assert found.batch.context["ids"][0].tolist() == [1, 1, 0, 0]
    city, tags = (visits.vocabulary(name)["value"].to_pylist() for name in ("city", "tags"))
    expected = [city.index("ulm") + 2, tags.index("v") + 2, 0, 0]
    assert found.batch.context["ids"][1].tolist() == expected
    assert found.batch.context["numbers"][0].tolist() == [0.0]
    assert found.batch.context["numbers"][1, 0] > 0


def test_what_is_known_of_the_moment_is_encoded_and_the_rest_is_missing(visits: Prepared) -> None:
    moments: list[dict[str, Any]] = [
        {"device": "phone", "hour": 21, "price": 4},
        {"time": datetime.datetime(2026, 1, 1, 21, 30), "device": "radio"},
        {"time": 21.5 * HOUR},
        {},
    ]
    batch = Encoder(visits, "float32").users(list("abca"), None, moments).batch
    assert batch.request["ids"].shape[:2] == (8, 1), "filled up to the smaller of two sizes"
    device, hour = batch.request["ids"][:4, 0].T
    words = visits.vocabulary("device")["value"].to_pylist()
    assert device.tolist() == [words.index("phone") + 2, UNKNOWN, 0, 0]
    assert hour.tolist() == [21 + 2, 21 + 2, 21 + 2, 0]
    price = batch.request["numbers"][:4, 0, 0]
    assert price[0] > 0
    assert price[1:].tolist() == [0, 0, 0]


def test_numbers_of_the_past_belong_to_the_item_that_is_asked_for(visits: Prepared) -> None:
    """Training events of each item, on the scale log(1 + count), standardised."""
    train = visits.interactions("train")["candidate"]
    counts = np.bincount(train, minlength=4)[[visits.item_ids[item] for item in ("x", "y")]]
    [field] = (f for f in visits.manifest.request_numbers if f.name == "popular")
    encoder = Encoder(visits, "float32")
    batch = encoder.users(["a", "b", "c"], None, [{}] * 3, ["x", "y", "never met"]).batch
    place = [f.name for f in visits.manifest.request_numbers].index("popular")
    found = batch.request["numbers"][:3, 0, place]
    expected = (np.log1p([*counts, 0]) - field.mean) / field.std
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    nothing = encoder.users(["a"], None, [{}]).batch.request["numbers"][0, 0, place]
    assert nothing == 0, "no item is meant: missing"


def test_a_batch_has_one_of_two_sizes(visits: Prepared) -> None:
    encoder = Encoder(visits, "float32")
    sizes = {n: len(encoder.users(["a"] * n, None, [{}] * n).batch.user) for n in (0, 1, 8, 9, 256)}
    assert sizes == {0: 8, 1: 8, 8: 8, 9: 256, 256: 256}


def test_moments_that_cannot_be_meant_are_refused(visits: Prepared) -> None:
    encoder = Encoder(visits, "float32")
    with pytest.raises(DataError, match=r"request: 'devise' is no feature .* mean 'device'"):
        encoder.users(["a"], None, [{"devise": "phone"}])
    with pytest.raises(DataError, match="request: price = 'cheap' is no number"):
        encoder.users(["a"], None, [{"price": "cheap"}])
    with pytest.raises(DataError, match="request: time 'soon' is neither ISO 8601 nor a number"):
        encoder.users(["a"], None, [{"time": "soon"}])
