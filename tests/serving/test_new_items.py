"""Items that stand in their table alone: kept, scored from their features, and marked."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mtrec_jax
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import DataError
from mtrec_jax.models.serve import load_catalogue
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.tables.lookup import fetch
from tests.data.small import make, run

LOG = "user,item,time\n" + "".join(
    f"{user},{item},{time}\n"
    for user in "abcde"
    for time, item in enumerate("xyzxy" if user in "ab" else "yzxyz")
)
# `new` shares its features with x; of `odd` no feature is known: no other item is of fir, a missing
# price is taken for 2, a missing colour for red, and size and shape are marked as missing
ITEMS = """item,brand,price,colour,size,shape
x,oak,1,red,1,round
y,elm,2,red,2,
z,elm,9,blue,,flat
rare,oak,1,red,1,flat
odd,fir,,,,
new,oak,1,red,1,round
"""  # `rare` loses its one event
EXPERIMENT = {
    "data": {"items": {"files": ["items.csv"]}},
    "clean": {"min_item_events": 2},
    "features": {
        "brand": {"on": "item"},
        "price": {"on": "item", "kind": "numeric", "impute": "median"},
        "colour": {"on": "item", "impute": "mode"},
        "size": {"on": "item", "kind": "numeric", "impute": "own"},
        "shape": {"on": "item", "impute": "own"},
    },
    "train": {"steps": 3, "batch_size": 2, "mesh": [1, 1], "negatives": {"count": 4}},
    "model": {"width": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    place = tmp_path_factory.mktemp("new_items")
    return run(place, make(**EXPERIMENT), LOG + "a,rare,9\n", items_csv=ITEMS)


@pytest.fixture(scope="module")
def model(
    folder: Prepared, tmp_path_factory: pytest.TempPathFactory, compiled_programs: dict[str, str]
) -> Recommender:
    place = tmp_path_factory.mktemp("runs") / "run"
    return Recommender(mtrec_jax.train_run(make(**EXPERIMENT), folder, place, show_progress=False))


def test_new_items_follow_those_with_events(folder: Prepared) -> None:
    m = folder.manifest
    assert (m.items, m.new_items, m.trained_items) == (3, 2, 3)
    assert folder.item_names[3:] == ["new", "odd"], "an item that a rule has put out stays out"
    assert folder.items["count"].to_pylist()[3:] == [0, 0]
    told = {rule.rule: (rule.rows, rule.examples) for rule in m.report}
    assert told["new items, without events (kept, they never train)"] == (2, ("'new'", "'odd'"))
    assert told["items whose events were all removed (left out)"] == (1, ("'rare'",))


def test_training_and_evaluation_do_not_see_them(folder: Prepared) -> None:
    assert load_catalogue(folder, make(**EXPERIMENT)).row.tolist() == [0, 1, 2, 3, 4]
    whole = load_catalogue(folder.with_new_items(), make(**EXPERIMENT))
    assert whole.row.tolist() == [0, 1, 2, 3, 4, 1, 1]
    assert np.isfinite(whole.log_probability).tolist() == [False] * 2 + [True] * 3 + [False] * 2


def test_a_new_item_is_scored_from_its_features_and_marked(model: Recommender) -> None:
    found = model.predict(["a"] * 5, ["x", "new", "odd", "nonsense", "y"])
    assert found["new"] == [False, True, True, False, False]
    why = "a new item, of which no feature is known"
    unknown = "the item is not in the data"
    assert found["reason"] == [None, None, why, unknown, None]
    assert found["next"][2] is None
    # by hand: x and new share their features, so that their vectors differ by their rows alone
    ids, vectors = model.prepared.item_ids, np.asarray(model._vectors)
    own = jnp.array([[ids["x"]], [1]], jnp.int32)
    rows = fetch(model._serving.model.layout, model._shared[1], {"item": own})
    x, unknown = np.asarray(rows["item"])[:, 0]
    assert np.abs(x - unknown).max() > 1e-4
    np.testing.assert_allclose(vectors[ids["x"]] - vectors[ids["new"]], x - unknown, atol=1e-6)
    assert found["next"][1] != found["next"][3], "not what nonsense gets"


def test_who_is_not_in_the_data_is_named(model: Recommender) -> None:
    found = model.predict(["nobody", "nobody", "a"], ["x", "nonsense", "x"])["reason"]
    where = " in the data"
    assert found == [f"the user is not{where}", f"neither user nor item is{where}", None]


def test_it_is_recommended_and_what_cannot_be_scored_is_not(model: Recommender) -> None:
    found = model.recommend(["a"], 5, exclude_seen=False)
    assert sorted(found["item"]) == ["new", "x", "y", "z"]
    marks = dict(zip(found["item"], found["new"], strict=True))
    assert marks == {"new": True, "x": False, "y": False, "z": False}
    trained = model.recommend(["a"], 5, exclude_seen=False, new_items=False)
    assert sorted(trained["item"]) == ["x", "y", "z"]
    chosen = model.recommend(["a"], 1, allowed=["new"])
    assert chosen["item"] == ["new"]
    assert sorted(model.similar_items("new", 5)["item"]) == ["x", "y", "z"]
    with pytest.raises(DataError, match="item 'odd' is a new item, of which no feature is known"):
        model.similar_items("odd", 2)


def test_a_baseline_knows_nothing_of_what_is_like_a_new_item(folder: Prepared) -> None:
    knn = mtrec_jax.fit_baseline(make(**EXPERIMENT), folder, "item_knn")
    with pytest.raises(DataError, match="item 'new' is new: it has no events"):
        knn.similar_items("new", 2)
    with pytest.raises(DataError, match="k = 3: between 1 and the 2 other items"):
        knn.similar_items("x", 3)


def test_users_without_events_are_counted(tmp_path: Path) -> None:
    users = "user,age\na,1\nb,2\nc,3\nd,4\ne,5\nzoe,6\n"
    data = {"users": {"files": ["users.csv"]}}
    features = {"age": {"on": "context"}}
    found = run(tmp_path, make(data=data, features=features), LOG, users_csv=users)
    told = {rule.rule: (rule.rows, rule.examples) for rule in found.manifest.report}
    assert told["users without events (left out)"] == (1, ("'zoe'",))
