"""Requests whose histories hold searches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import DataError
from mtrec_jax.serving.requests import Encoder
from mtrec_jax.types import UNKNOWN
from tests.data import small


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    experiment = small.make(
        data={"queries": {"files": ["queries.csv"]}, "history_length": 4},
        features={
            "rating": {"on": "history"},
            "query": {"on": "history", "kind": "multi_valued", "max_values": 2},
        },
    )
    folder: Path = tmp_path_factory.mktemp("requests")
    return small.run(folder, experiment, queries_csv="user,time,query\na,1,red shoes\na,8,red\n")


def test_a_given_history_may_hold_searches(prepared: Prepared) -> None:
    words = {w.as_py(): i + 2 for i, w in enumerate(prepared.vocabulary("query")["value"])}
    history: dict[str, list[str | None]] = {
        "item": ["x", None, "y"],
        "query": [None, "red hats", None],
        "rating": ["5", "5", "5"],
    }
    found = Encoder(prepared, "float32").users(["new"], [history]).batch
    x, y = prepared.item_ids["x"], prepared.item_ids["y"]
    assert found.events["item"][0].tolist() == [x, UNKNOWN, y, 0]
    assert found.events["query.0"][0].tolist() == [0, words["red"], 0, 0]
    assert found.events["query.1"][0].tolist() == [0, UNKNOWN, 0, 0]
    assert (found.events["rating"][0] > 0).tolist() == [True, False, True, False]
    assert found.cutoff[0].tolist() == [3]


def test_a_known_user_brings_the_own_searches(prepared: Prepared) -> None:
    found = Encoder(prepared, "float32").users(["a"], None)
    searched = found.batch.events["item"][0] == UNKNOWN
    assert searched.tolist() == [False, False, True, False]  # x, (search), y, z, (search), w
    np.testing.assert_array_equal(found.batch.events["query.0"][0] > 0, searched)
    assert (found.seen[0] == UNKNOWN).sum() == 2  # of the whole history; no item is meant


def test_histories_of_unequal_columns_are_refused(prepared: Prepared) -> None:
    with pytest.raises(DataError, match="1 values of query for 2 items"):
        Encoder(prepared, "float32").users(["a"], [{"item": ["x", None], "query": ["red"]}])
    with pytest.raises(DataError, match="is one text"):
        Encoder(prepared, "float32").users(["a"], [{"item": "xy"}])
