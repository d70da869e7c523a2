"""Searches in histories and friends as features, by hand on a small log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.types import UNKNOWN
from tests.data import small

LOG = """user,item,click,time
a,x,1,1
b,x,0,1
c,y,1,2
a,y,0,3
b,y,1,4
c,x,0,5
a,z,1,6
b,z,0,7
c,z,1,8
a,w,0,9
"""
QUERIES = """user,time,query
a,3,Red shoes
a,0,blue red hat
,2,lost
b,4,
b,soon,red
nobody,5,red
c,9,green tea
b,2,  red
a,20,late words
"""
TIES = """user,friend
a,b
a,c
a,b
b,b
b,
c,nobody
nobody,c
b,a
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    items = "item,kind\nx,one\ny,two\nz,one\nw,two\n"
    files = {"queries_csv": QUERIES, "ties_csv": TIES, "items_csv": items}
    return small.run(tmp_path_factory.mktemp("social"), experiment(), LOG, **files)


def experiment() -> Experiment:
    names = ("queries", "ties", "items")
    return small.make(
        data={**{name: {"files": [f"{name}.csv"]} for name in names}, "history_length": 6},
        clean={"max_bad_fraction": 0.5},
        features={
            "click": {"on": "history", "impute": "own"},
            "query": {"on": "history", "kind": "multi_valued", "max_values": 2},
            "friends": {"kind": "ties", "max_values": 2},
            "taste": {
                "kind": "friends_taste",
                "column": "kind",
                "label": "click",
                "smoothing": 2.0,
            },
        },
        tasks={"next": {"kind": "retrieval"}, "click": {"kind": "binary"}},
    )


def _words(prepared: Prepared) -> dict[str, int]:
    values = prepared.vocabulary("query")["value"].to_pylist()
    return {word: place + 2 for place, word in enumerate(values)}


def test_every_removed_query_and_tie_is_reported_with_its_reason(prepared: Prepared) -> None:
    expected = {
        "queries: rows read": 9,
        "query: missing user": 1,
        "query: missing text": 1,
        "query: malformed time": 1,
        "query: user without events": 1,
        "ties: rows read": 8,
        "tie: missing user or friend": 1,
        "tie: to oneself": 1,
        "tie: repeated": 1,
        "tie: user without events": 1,
        "tie: friend without events": 1,
    }
    report = small.rules(prepared)
    assert {rule: n for rule, n in report.items() if rule.startswith(("quer", "tie"))} == expected
    quarantine = pq.read_table(prepared.folder / "quarantine.parquet")
    of_ties = quarantine.filter(pa.compute.equal(quarantine["source"], "ties"))
    assert of_ties["line"].to_pylist() == [4, 5, 6, 7, 8]
    of_queries = quarantine.filter(pa.compute.equal(quarantine["source"], "queries"))
    assert of_queries["line"].to_pylist() == [4, 5, 6, 7]
    assert of_queries["evidence"].to_pylist() == [None, None, "soon", "nobody"]


def test_words_are_learned_from_queries_that_training_targets_see(prepared: Prepared) -> None:
    """a trains until 3 (6 validates, 9 tests), b until 1, c until 2."""
    assert prepared.vocabulary("query")["value"].to_pylist() == ["blue", "red"]


def test_queries_join_the_histories_in_the_order_of_time_and_row(prepared: Prepared) -> None:
    words, x, y, z = _words(prepared), *(prepared.item_ids[item] for item in "xyz")
    (test,) = small.example_of(prepared, "test", "a")
    # at time 3 the query comes after the event, since its row is numbered after the events'
    assert test["event_item"] == [UNKNOWN, x, y, UNKNOWN, z, 0]
    first, second = np.reshape(test["event_query"], (6, 2)).T.tolist()
    assert first == [words["blue"], 0, 0, UNKNOWN, 0, 0]
    assert second == [words["red"], 0, 0, UNKNOWN, 0, 0]
    assert prepared.user_lists("event_query")[0][0].tolist() == [words["blue"], words["red"]]
    assert test["cutoff"] == [5]
    clicks = prepared.vocabulary("click")["value"].to_pylist()
    clicked, skipped = clicks.index("1") + 2, clicks.index("0") + 2
    assert test["event_click"] == [0, clicked, skipped, 0, clicked, 0]
    (train,) = small.example_of(prepared, "train", "a")
    assert train["event_item"] == [UNKNOWN, x, 0, 0, 0, 0]  # before y at time 3
    assert train["cutoff"][:2] == [1, 2]


def test_queries_are_no_targets_and_count_nowhere(prepared: Prepared) -> None:
    assert prepared.manifest.events == 10
    assert prepared.manifest.targets == {"train": 4, "validation": 3, "test": 3}
    assert prepared.items["count"].to_pylist() == [2, 2, 0, 0]
    lists = prepared.user_lists("event_item")
    assert [len(lists[user]) for user in range(3)] == [4 + 3, 3 + 1, 3 + 1]
    splits = prepared.user_lists("split")[0].tolist()
    assert splits == [4, 0, 0, 4, 1, 2, 4]


def test_friends_are_features_of_the_user(prepared: Prepared) -> None:
    friends = [name.as_py() for name in prepared.vocabulary("friends")["value"]]
    assert sorted(friends) == ["a", "b", "c"]
    ids = np.array([[friends.index(f) + 2 if f else 0 for f in pair] for pair in (["b", "c"],)])
    rows = prepared.users["context_friends"].to_pylist()
    assert rows[0] == ids[0].tolist()
    assert rows[1] == [friends.index("a") + 2, 0]
    assert rows[2] == [0, 0]


def test_tastes_of_friends_are_those_before_the_first_target(prepared: Prepared) -> None:
    """Values "one" and "two" occur in two training events each; the mean click is 1/2."""
    (field,) = prepared.manifest.context_numbers
    assert prepared.vocabulary("taste")["value"].to_pylist() == ["one", "two"]
    # by the end of training, friends b and c of a: x not clicked, y clicked; friend a of b: x
    # clicked, y not: (0 + 1) / (1 + 2) - 1/2 and (1 + 1) / (1 + 2) - 1/2
    known = np.array([[-1 / 6, 1 / 6], [1 / 6, -1 / 6], [0, 0]])
    assert field.std == pytest.approx(known.std())

    def taste(split: str, user: str) -> list[float]:
        (example,) = small.example_of(prepared, split, user)
        return (np.array(example["context_taste"]) * field.std).tolist()

    assert taste("train", "a") == pytest.approx([0, 0])  # at 1 nothing is earlier
    # at 6, validation rows of friends too: "one" x of b and of c; "two" y of c and of b
    assert taste("validation", "a") == pytest.approx([1 / 4 - 1 / 2, 3 / 4 - 1 / 2])
    # at 9, their test rows too: z of b and of c, the latter with a click
    assert taste("test", "a") == pytest.approx([2 / 6 - 1 / 2, 3 / 4 - 1 / 2])
    assert taste("test", "c") == pytest.approx([0, 0])
    served = np.array(prepared.users["context_taste"].to_pylist()) * field.std
    assert served[0].tolist() == pytest.approx([2 / 6 - 1 / 2, 3 / 4 - 1 / 2])


def test_ties_without_a_table_are_refused(tmp_path: Path) -> None:
    friends = {"kind": "ties"}
    with pytest.raises(DataError, match=r"'friends' needs the table of ties.*declare data.ties"):
        small.run(tmp_path, small.make(features={"friends": friends}))
    taste = {"kind": "friends_taste", "column": "kind", "label": "good"}
    given = {
        "tasks": {"good": {"kind": "binary", "column": "rating", "at_least": 4}},
        "data": {"ties": {"files": ["ties.csv"]}},
    }
    with pytest.raises(DataError, match="'taste' needs the table of items"):
        small.run(tmp_path, small.make(features={"taste": taste}, **given), ties_csv=TIES)
    with pytest.raises(ConfigError, match="friends are a context of the users"):
        small.run(tmp_path, small.make(features={"friends": friends | {"on": "item"}}))
