"""Labels and features: masked, scaled and fitted on the training rows alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mtrec_jax.config import Experiment
from mtrec_jax.data import describe, features
from mtrec_jax.data.dataset import SPLITS, open_prepared
from mtrec_jax.data.features import KINDS
from mtrec_jax.data.fit import values_report
from mtrec_jax.data.new_rows import encode_requests, read_columns
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import DataError
from tests.data.small import LOG, example_of, joined, make, rows, rules, run

TASKS = {
    "click": {"kind": "binary"},
    "buy": {"kind": "binary", "column": "bought", "equals": "yes", "where": "click"},
    "price": {"kind": "regression", "where": "buy", "reference": "guess"},
    "shop": {"kind": "multiclass"},
}
SHOP = """click,bought,price,shop,guess,size
1,yes,10,n,9.5,1
true,yes,20,m,,1
0,no,,n,1,1
False,yes,5,m,1,1
1,no,7,,1,1
,yes,3,n,1,1
1,yes,,m,1,1
1,yes,30,k,1,1
"""


def test_labels_masks_and_sample_spaces(tmp_path: Path) -> None:
    split = {"kind": "files", "test_files": ["more.csv"], "validation": 0.2}
    experiment = rows(tasks=TASKS, features={"size": {}}, split=split)
    more = SHOP.splitlines()[0] + "\n1,yes,1,unseen,2,1\n"
    text = SHOP + SHOP.split("\n", 1)[1] * 3  # enough rows for a validation split
    prepared = run(tmp_path, experiment, text, more_csv=more)
    found = {}
    for name in SPLITS:
        arrays = prepared.interactions(name)
        for index, row in enumerate(arrays["row"].tolist()):
            found[row] = {column: float(array[index]) for column, array in arrays.items()}
    assert sorted(found) == list(range(33))  # rows of the test file continue the numbering
    nan = float("nan")
    classes = prepared.manifest.tasks["shop"].classes
    assert classes == ("k", "m", "n")
    expected = {
        "label_click": [1, 1, 0, 0, 1, nan, 1, 1],
        "label_buy": [1, 1, nan, nan, 0, nan, 1, 1],
        "label_price": [10, 20, nan, nan, nan, nan, nan, 30],
        "label_shop": [2, 1, 2, 1, nan, 2, 1, 0],
        "reference_price": [9.5, nan, 1, 1, 1, 1, 1, 1],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal([found[row][name] for row in range(8)], values, name)
    assert np.isnan(found[32]["label_shop"])  # a class that no training row has
    train = prepared.interactions("train")["label_price"]
    train = train[~np.isnan(train)]
    task = prepared.manifest.tasks["price"]
    assert task.mean == pytest.approx(train.mean())
    assert task.std == pytest.approx(train.std())
    assert rules(prepared)["label of click missing (masked)"] == 4
    assert rules(prepared)["class of shop without training rows (masked)"] == 1


def test_labels_that_cannot_be_learned_or_read(tmp_path: Path) -> None:
    def task(**values: Any) -> Experiment:
        return make(tasks={"like": {"kind": "binary", "column": "rating", **values}})

    with pytest.raises(DataError, match=r"'like': every training label is 0 .*'rating'.*at_least"):
        run(tmp_path, task(at_least=9))
    with pytest.raises(DataError, match=r"'like': every training label is 1 .*at_least"):
        run(tmp_path, task(at_least=0))
    empty = LOG.replace("user,item,rating", "user,item,stars").replace("time\n", "time,rating\n")
    empty = "\n".join([empty.split("\n")[0], *(line + "," for line in empty.split("\n")[1:-1])])
    with pytest.raises(DataError, match="'like': no training row has a label in column 'rating'"):
        run(tmp_path, task(at_least=3), empty)
    text = "user,item,rating,time\n" + "".join(f"u{n % 7},i,{n % 5},{n}\n" for n in range(200))
    prepared = run(tmp_path, task(at_least=3), text + "u1,i,nan,9\nu1,i,1_0,9\n")
    assert rules(prepared)["malformed label of like"] == 2
    assert prepared.manifest.events == 200
    text += "".join(f"u1,i,{bad},9\n" for bad in ("nan", "inf", "abc", "1_0", "1e99"))
    with pytest.raises(DataError) as error:
        run(tmp_path, task(at_least=3), text)
    assert "5 of 205 rows are malformed" in str(error.value)
    assert "malformed label of like: 5; row 200 (log.csv line 202): 'nan'; row 201" in str(
        error.value
    )


def test_ordered_classes_are_the_numbers_of_the_training_rows(tmp_path: Path) -> None:
    """Labels stay numbers. Of 9 training rows one has 0.5 stars, 2 have 10, 6 have 4; a number that
    no training row has is masked."""
    split = {"kind": "files", "test_files": ["more.csv"], "validation": 0, "test": 0.1}
    experiment = rows(tasks={"stars": {"kind": "ordinal"}}, features={"size": {}}, split=split)
    text = "stars,size\n" + "".join(f"{x},{n}\n" for n, x in enumerate([10, 0.5, 10, *6 * [4]]))
    prepared = run(tmp_path, experiment, text, more_csv="stars,size\n4.0,1\n7,1\n,1\n")
    task = prepared.manifest.tasks["stars"]
    assert task.classes == ("0.5", "4", "10")
    assert task.shares == pytest.approx((1 / 9, 6 / 9, 2 / 9))
    assert task.mean == pytest.approx(44.5 / 9)
    assert sorted(prepared.interactions("train")["label_stars"]) == [0.5, *6 * [4], 10, 10]
    test = prepared.interactions("test")
    np.testing.assert_array_equal(test["label_stars"][np.argsort(test["row"])], [4, np.nan, np.nan])
    assert rules(prepared)["class of stars without training rows (masked)"] == 1


@pytest.mark.parametrize(
    ("kind", "labels", "problem"),
    [
        ("ordinal", [3], "every training label is 3"),
        ("ordinal", range(200), "200 numbers, more than the 128 that can be classes in order"),
        ("watch_time", [0], r"above 0 in some training rows.* has 0 \.\. 0"),
        ("watch_time", [4, -1], r"watch time is 0 or more.*has -1 \.\. 4"),
    ],
)
def test_numbers_that_are_not_of_their_kind(kind: str, labels: Any, problem: str) -> None:
    experiment = rows(tasks={"seen": {"kind": kind}}, features={"size": {}})
    with pytest.raises(DataError, match=problem):
        describe.check_labels(experiment, "seen", dict.fromkeys(map(float, labels), 2))


def test_watch_time_has_quantiles_by_the_duration_of_the_item(tmp_path: Path) -> None:
    """Of the training rows alone: items x and y are short, z and v are long, and w has no duration
    and too few rows, so that its quantiles are those of all."""
    features = {"length": {"on": "item", "kind": "binned", "bins": 2}}
    tasks = {"watch": {"kind": "watch_time", "duration": "length"}, "next": {"kind": "retrieval"}}
    lines, seconds = ["user,item,watch,time"], {"x": 1, "y": 2, "z": 10, "v": 11, "w": 500}
    for user in range(80):
        for place, item in enumerate("xyzvw" if user < 10 else "xyzv"):
            lines.append(f"u{user},{item},{seconds[item] * (user % 5)},{place}")
        lines += [f"u{user},x,9999,8", f"u{user},x,9999,9"]  # validation and test
    experiment = make(
        data={"items": {"files": ["items.csv"]}}, features=features, tasks=tasks,
        clean={"duplicates": "keep"}, guard={"allow": ["length"]},
    )  # fmt: skip
    items = "item,length\nx,60\ny,61\nz,900\nv,901\nw,\n"
    prepared = run(tmp_path, experiment, "\n".join(lines) + "\n", items_csv=items)
    ids = dict(zip(prepared.item_names, prepared.items["item_length"].to_pylist(), strict=True))
    table = prepared.manifest.tasks["watch"].quantiles
    assert ids["x"] == ids["y"] != ids["z"] == ids["v"]
    assert ids["w"] == 0
    assert len(table) == prepared.manifest.item_ids[0].size
    raw = np.array([line.split(",")[:3] for line in lines[1:] if ",9999," not in line])
    of = {item: raw[raw[:, 1] == item, 2].astype(float) for item in "xyzvw"}
    steps = np.linspace(0, 1, 101)
    for pair in ("xy", "zv"):
        expected = np.quantile(np.concatenate([of[item] for item in pair]), steps)
        np.testing.assert_allclose(table[ids[pair[0]]], expected, rtol=1e-6)
    np.testing.assert_allclose(table[0], np.quantile(np.concatenate([*of.values()]), steps))
    assert open_prepared(prepared.folder).manifest.tasks == prepared.manifest.tasks


WEIGHTED = """click,buy,w,size
1,1,2,1
0,,0,2
1,0,0.5,3
1,1,1,4
0,0,{bad},5
"""


def test_weights_of_examples_reach_the_batch_as_they_are(tmp_path: Path) -> None:
    """A weight is needed where its task has a label in training: not by the last row, which nobody
    clicked. Evaluation has the labels without weights."""
    tasks = {
        "click": {"kind": "binary"},
        "buy": {"kind": "binary", "where": "click", "weight_column": "w"},
    }
    split = {"kind": "random", "validation": 0, "test": 0}
    experiment = rows(tasks=tasks, features={"size": {}}, split=split)
    prepared = run(tmp_path, experiment, WEIGHTED.format(bad=""))
    batch = BatchSource(prepared, "train", 8)[0]
    order = np.argsort(np.asarray(batch.row)[:5, 0])
    found = batch.weights["buy"][order, 0]
    np.testing.assert_array_equal(found, [2, 0, 0.5, 1, 0])
    np.testing.assert_array_equal(batch.mask["buy"][order, 0], [1, 0, 1, 1, 0])
    np.testing.assert_array_equal(batch.mask["click"][order, 0], 1)
    assert set(batch.weights) == {"buy"}
    again = dataclasses.replace(experiment, tasks={"click": experiment.tasks["click"]})
    assert not BatchSource(prepared.chosen(again), "train", 8)[0].weights


def test_a_weight_that_is_none_is_refused_with_its_place(tmp_path: Path) -> None:
    tasks = {"click": {"kind": "binary", "weight_column": "w"}}
    split = {"kind": "random", "validation": 0, "test": 0}
    experiment = rows(tasks=tasks, features={"size": {}}, split=split)
    for bad, shown in (("", "no number"), ("-1", "-1"), ("nan", "no number")):
        place = rf"1 training rows .* in 'w', e\.g\. row 4 \(log\.csv line 6\): {shown}\. Give"
        with pytest.raises(DataError, match=rf"tasks\.click\.weight_column: {place}"):
            run(tmp_path, experiment, WEIGHTED.format(bad=bad))
    nothing = "\n".join(f"{n % 2},1,0,{n}" for n in range(6))
    with pytest.raises(DataError, match="every training row with a label weighs 0"):
        run(tmp_path, experiment, f"click,buy,w,size\n{nothing}\n")
    with pytest.raises(DataError, match=r"no column 'w' \(tasks\.click\.weight_column\)"):
        run(tmp_path, experiment, "click,size\n1,1\n0,2\n")


def test_features_are_fitted_on_training_rows_only(tmp_path: Path) -> None:
    features = {
        "city": {"min_count": 2},
        "age": {"kind": "numeric"},
        "age_bin": {"kind": "binned", "column": "age", "bins": 2},
        "likes": {"kind": "multi_valued", "separator": "|", "max_values": 2},
    }
    header = "click,city,age,likes\n"
    text = header + "0,b,1,p|q\n1,b,2,q\n0,a,3,q | p | z\n1,a,,\n0,a,4,\n1,rare,x,p\n" * 40
    split = {"kind": "files", "test_files": ["more.csv"], "validation": 0.1}
    tasks, allow = {"click": {"kind": "binary"}}, ["age/click", "age_bin/click"]
    experiment = rows(tasks=tasks, features=features, split=split, guard={"allow": allow})
    more = header + "1,new,100,z|p|new\n0,,,\n1, a ,-5,\n"
    text = text.replace("rare", "a", 39)
    prepared = run(tmp_path, experiment, text, more_csv=more)
    m = prepared.manifest
    assert [f.name for f in m.request_ids] == ["city", "age_bin", "likes"]
    assert [(f.size, f.slots) for f in m.request_ids] == [(4, 1), (4, 1), (4, 2)]
    assert prepared.vocabulary("city")["value"].to_pylist() == ["a", "b"]  # by falling count
    assert prepared.vocabulary("likes")["value"].to_pylist() == ["q", "p"]  # z is always third
    train = np.concatenate([block["row"][:, 0] for block in prepared.blocks("train")])
    raw = [line.split(",") for line in text.splitlines()[1:]]
    ages = np.array([float(raw[r][2]) for r in train if raw[r][2] not in ("", "x")])
    [scale] = m.request_numbers
    assert (scale.mean, scale.std) == (pytest.approx(ages.mean()), pytest.approx(ages.std()))
    edges = [float(v) for v in prepared.vocabulary("age_bin")["value"].to_pylist()]
    assert edges == [1.0, np.sort(ages)[len(ages) // 2]]
    counts = prepared.vocabulary("age_bin")["count"].to_pylist()
    assert counts == [(ages < edges[1]).sum(), (ages >= edges[1]).sum()]
    encoded = encode_requests(prepared, tmp_path / "more.csv")
    # city, age_bin, likes: "new" is unknown, missing is 0, numbers beyond the edges are clipped
    assert encoded["request_ids"].tolist() == [[1, 3, 1, 3], [0, 0, 0, 0], [2, 2, 0, 0]]
    ages = np.array([100, scale.mean, -5])  # a missing number counts as the mean
    scaled = (ages - scale.mean) / scale.std
    np.testing.assert_allclose(encoded["request_numbers"][:, 0], scaled, rtol=1e-6)
    [test] = prepared.blocks("test")
    order = test["row"][:, 0] - test["row"].min()
    ids = joined(prepared, test, "request_ids")
    np.testing.assert_array_equal(ids, encoded["request_ids"][order])
    assert rules(prepared)["training value of age is no number (used as missing)"] > 0
    in_memory = pd.DataFrame({"city": ["a", None], "age": [np.nan, 1], "likes": [["q"], []]})
    again = encode_requests(prepared, in_memory)
    assert again["request_ids"].tolist() == [[2, 0, 2, 0], [0, 2, 0, 0]]
    assert encoded["candidate"].tolist() == [[0]] * 3
    with pytest.raises(DataError, match=r"rows: no column 'likes' \(features.likes\)"):
        encode_requests(prepared, in_memory.drop(columns="likes"))
    (tmp_path / "bad.csv").write_text(more + "1,2\n")
    read = read_columns(experiment, tmp_path / "more.csv", ["likes", "city"])
    assert read.to_pydict() == {"likes": ["z|p|new", None, None], "city": ["new", None, "a"]}
    with pytest.raises(DataError, match="malformed lines"):
        encode_requests(prepared, tmp_path / "bad.csv")


def test_item_user_and_history_features_of_sequences(tmp_path: Path) -> None:
    features = {
        "genre": {"on": "item"},
        "year": {"on": "item", "kind": "numeric"},
        "country": {"on": "context"},
        "user": {"on": "context"},
        "rating": {"on": "history"},
    }
    data = {
        "items": {"files": ["items.csv"]},
        "users": {"files": ["users.csv"], "rename": {"uid": "user"}},
        "title": "name",
    }
    items = "item,name,genre,year\nx,The X,drama,2000\ny,The Y,drama,2010\n"
    items += "z,,comedy,1900\nx,No,no,1\nq,Q,q,5\n"
    users = "uid,country\na,nl\nb,de\nd,fr\n"
    prepared = run(tmp_path, make(data=data, features=features), items_csv=items, users_csv=users)
    m = prepared.manifest
    assert prepared.vocabulary("genre")["value"].to_pylist() == ["drama"]
    assert m.item_numbers[0].mean == 2005
    assert m.item_numbers[0].std == 5
    catalogue = (
        prepared.catalogue()
    )  # ids: x 2, y 3, w 4 (no row), z 5 (cold: unknown genre), q 6 (new)
    assert catalogue["ids"][:, 0].tolist() == [0, 0, 2, 2, 0, 1, 1]
    assert catalogue["numbers"][:, 0].tolist() == [0, 0, -1, 1, 0, -21, -400]
    assert prepared.titles == ["The X", "The Y", "w", "z", "Q"]
    assert prepared.vocabulary("country")["value"].to_pylist() == ["de", "nl"]
    # the user id as a feature: a and then b, c by training events
    assert prepared.vocabulary("user")["value"].to_pylist() == ["a", "b", "c"]
    [test] = example_of(prepared, "test", "a")
    assert (test["context_country"], test["context_user"]) == (3, 2)
    [train] = example_of(prepared, "train", "c")
    assert (train["context_country"], train["context_user"]) == (0, 4)  # c has no row in users.csv
    # training ratings 5, 4, 1, 4 in order 4, 1, 5; the rating 3 of z is unknown
    assert prepared.vocabulary("rating")["value"].to_pylist() == ["4", "1", "5"]
    assert test["event_rating"] == [4, 2, 1]
    found = rules(prepared)
    assert found["items: row of an id already seen"] == 1
    assert found["items without a row in items"] == 1
    assert found["users without a row in users"] == 1


def test_every_place_of_a_sequence_has_its_kinds(tmp_path: Path) -> None:
    features = {
        "price": {"on": "item", "kind": "piecewise", "bins": 2, "impute": "own"},
        "about": {"on": "item", "kind": "text"},
        "shop": {"on": "item", "impute": "mode"},
        "age": {"on": "context", "kind": "numeric", "impute": "median"},
        "bio": {"on": "context", "kind": "text"},
        "hour": {"on": "history", "kind": "hour"},
        "gap": {"on": "history", "kind": "gap", "impute": "own"},
        "plays": {"on": "history", "kind": "past_count", "column": "item", "bins": 2},
        "liked": {"on": "history", "kind": "past_rate", "column": "item", "label": "like"},
    }
    tasks = {
        "next": {"kind": "retrieval"},
        "like": {"kind": "binary", "column": "rating", "at_least": 4},
    }
    data = {"items": {"files": ["items.csv"]}, "users": {"files": ["users.csv"]}}
    experiment = make(data=data, features=features, tasks=tasks)
    items = "item,price,about,shop\nx,10,an x,s\ny,20,,t\nz,15,all z,\nw,,,\n"
    users = "user,age,bio\na,20,likes x\nb,,\nc,40,\n"
    text = "user,item,rating,time\na,x,5,3600\na,y,4,7200\nb,x,1,1\na,z,3,7200\nb,y,2,5\n"
    text += "a,w,5,36000\nb,z,5,6\nc,x,4,7\n"
    prepared = run(tmp_path, experiment, text, items_csv=items, users_csv=users)
    m = prepared.manifest
    assert [f.slots for f in m.item_numbers] == [3 - 1]  # x and y train: one bin, and the mark
    names = prepared.item_names
    numbers = prepared.catalogue()["numbers"][2:]
    found = dict(zip(names, numbers.tolist(), strict=True))
    assert found == {"x": [0, 0], "y": [1, 0], "z": [0.5, 0], "w": [0, 1]}
    assert prepared.items["text_about"].to_pylist() == [
        {"x": "an x", "z": "all z"}.get(name) for name in names
    ]
    assert prepared.users["text_bio"].to_pylist() == ["likes x", None, None]
    context = prepared.users["context_age"].to_pylist()
    assert context == [-1, 0, 1]  # b is taken for 30
    [test] = example_of(prepared, "test", "a")
    assert test["event_hour"] == [2 + 1, 2 + 2, 2 + 2]
    # x had two plays before 3600; those of y and z by b are of validation and test, which neither
    # a training nor a validation event of a may know
    plays = prepared.vocabulary("plays")["value"].to_pylist()
    assert [float(v) for v in plays] == [0.0, 1.0]
    assert test["event_plays"] == [3, 2, 2]
    assert test["event_gap"][0] == prepared.vocabulary("gap")["value"].to_pylist().index("") + 2
    assert [f.name for f in m.history] == ["hour", "gap", "plays", "liked"]
    found_rules = rules(prepared)
    assert found_rules["missing training value of age imputed (median)"] == 1
    assert found_rules["missing training value of gap imputed (own)"] == 3


@pytest.mark.parametrize("kind", ["categorical", "multi_valued", "hashed"])
def test_lists_that_became_text_are_reported(kind: str) -> None:
    """As a data frame writes a column of lists to a csv."""
    written = pa.array(["['q', 'p']", '["q"]', "[1, 2]", "[REC]", "q"])
    counts, feature = np.array([6, 2, 1, 5, 4]), KINDS[kind]()
    [rule] = values_report([features.fit("genres", feature, written, counts)])
    assert "genres looks like a list that became text" in rule.rule
    assert (rule.rows, rule.examples) == (9, ("\"['q', 'p']\"", "'[\"q\"]'", "'[1, 2]'"))
    assert values_report([features.fit("title", feature, written[3:], counts[3:])]) == []
