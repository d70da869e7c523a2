"""Raw logs to the prepared folder, on logs small enough to work out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.config import Experiment, parse_experiment
from mtrec_jax.data.dataset import BLOCK, SPLITS, Prepared
from mtrec_jax.data.examples import MODULUS, Log, mix, sequence_examples, write_examples
from mtrec_jax.data.prepare import encode_rows, prepare
from mtrec_jax.errors import ConfigError, DataError

LOG = """user,item,rating,time
a,x,5,1
a,y,4,2
b,x,1,1
a,z,3,2
b,y,2,5
a,w,5,9
b,z,5,6
c,x,4,7
"""


def make(**sections: Any) -> Experiment:
    """A sequence experiment over log.csv; `data` extends its section, the others are replaced."""
    data = {
        "events": {"files": ["log.csv"]},
        "user": "user",
        "item": "item",
        "time": "time",
        "history_length": 3,
    }
    base = {"name": "small", "tasks": {"next": {"kind": "retrieval"}}, "train": {"epochs": 1}}
    return parse_experiment({**base, **sections, "data": data | sections.get("data", {})})


def rows(**sections: Any) -> Experiment:
    """A row experiment over log.csv, without users, items and time."""
    data = {"kind": "rows", "user": "", "item": "", "time": "", **sections.pop("data", {})}
    base = {"model": {"encoder": "none"}, "clean": {"duplicates": "keep"}}
    return make(data=data, **base | {"split": {"kind": "random"}} | sections)


def run(folder: Path, experiment: Experiment, text: str = LOG, **files: str) -> Prepared:
    for name, content in {"log_csv": text, **files}.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return prepare(experiment, folder, folder / "out")


def rules(prepared: Prepared) -> dict[str, int]:
    return {rule.rule: rule.rows for rule in prepared.manifest.report}


def example_of(prepared: Prepared, split: str, user: str) -> list[dict[str, Any]]:
    found = []
    for block in prepared.blocks(split):
        for index in np.flatnonzero(block["user"] == prepared.user_ids[user]):
            found.append({name: array[index].tolist() for name, array in block.items()})
    return found


def test_ids_splits_and_examples_of_leave_one_out(tmp_path: Path) -> None:
    prepared = run(tmp_path, make(data={"title": ""}))
    m = prepared.manifest
    assert (m.users, m.items, m.trained_items, m.events) == (3, 4, 2, 8)
    # trained: x (a, b, c) and y (a); z and w occur in validation and test alone
    assert prepared.item_ids == {"x": 2, "y": 3, "w": 4, "z": 5}
    assert prepared.items["count"].to_pylist() == [3, 1, 0, 0]
    assert prepared.user_ids == {"a": 2, "b": 3, "c": 4}
    assert prepared.titles == ["x", "y", "w", "z"]
    # a: x(1) y(2) z(2) w(9): the tie of y and z is decided by the source row
    assert prepared.user_lists("event_item")[0].tolist() == [2, 3, 5, 4]
    assert prepared.user_lists("split")[0].tolist() == [0, 0, 1, 2]
    assert prepared.user_lists("split")[2].tolist() == [0]  # 1 event: everything trains
    assert m.positions == {"train": 3, "validation": 1, "test": 1}
    assert m.examples == {"train": 3, "validation": 2, "test": 2}
    assert m.targets == {"train": 4, "validation": 2, "test": 2}
    [train] = example_of(prepared, "train", "a")
    assert train["event_item"] == [2, 0, 0]
    assert train["cutoff"] == [0, 1, 0]
    assert train["candidate"] == [2, 3, 0]
    assert train["row"] == [0, 1, -1]
    assert train["label_next"][:2] == [1, 1]
    assert np.isnan(train["label_next"][2])
    [test] = example_of(prepared, "test", "a")
    assert (test["event_item"], test["cutoff"], test["candidate"]) == ([2, 3, 5], [3], [4])
    assert test["row"] == [5]
    assert m.protocol == "leave-one-out by (time, source row), 3 users, 4 items, 8 events"


def test_windows_are_cut_from_the_end_and_look_back_history_length(tmp_path: Path) -> None:
    text = "user,item,time\n" + "".join(f"u,i{n},{n}\n" for n in range(9))
    experiment = make(data={"history_length": 3, "positions": 2})
    prepared = run(tmp_path, experiment, text)
    number = {i: int(raw[1:]) for raw, i in prepared.item_ids.items()} | {0: None}

    def plain(ids: list[int]) -> list[int | None]:
        return [number[i] for i in ids]

    found = sorted(example_of(prepared, "train", "u"), key=lambda e: e["row"])
    # 7 training events, 0..6: chunks (0), (1, 2), (3, 4), (5, 6)
    assert [plain(e["candidate"]) for e in found] == [[0, None], [1, 2], [3, 4], [5, 6]]
    assert [plain(e["event_item"]) for e in found] == [
        [None, None, None],
        [0, 1, None],
        [1, 2, 3],
        [3, 4, 5],
    ]
    assert [e["cutoff"] for e in found] == [[0, 0], [1, 2], [2, 3], [2, 3]]


def test_hide_ties_hides_events_of_the_same_timestamp(tmp_path: Path) -> None:
    text = "user,item,time\nu,a,1\nu,b,2\nu,c,2\nu,d,2\nu,e,3\nu,f,3\n"
    shown = run(tmp_path, make(data={"history_length": 4}), text)
    assert example_of(shown, "train", "u")[0]["cutoff"] == [0, 1, 2, 3]
    assert example_of(shown, "test", "u")[0]["cutoff"] == [4]
    hidden = run(tmp_path, make(data={"history_length": 4, "hide_ties": True}), text)
    assert example_of(hidden, "train", "u")[0]["cutoff"] == [0, 1, 1, 1]
    # the test event f looks back on b, c, d, e, and e has its timestamp
    assert example_of(hidden, "test", "u")[0]["cutoff"] == [3]


def test_time_split_keeps_equal_timestamps_together(tmp_path: Path) -> None:
    times = [1, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    text = "user,item,time\n" + "".join(f"u,i{n},{t}\n" for n, t in enumerate(times))
    split = {"kind": "time", "validation": 0.3, "test": 0.1}
    prepared = run(tmp_path, make(split=split), text)
    assert prepared.user_lists("split")[0].tolist() == [0] * 6 + [1] * 3 + [2]
    assert prepared.manifest.positions == {"train": 3, "validation": 3, "test": 1}
    [one] = example_of(prepared, "validation", "u")
    assert one["cutoff"] == [1, 2, 3]  # events of all splits before a target are its past
    with pytest.raises(DataError, match=r"split 'validation' has no event.*distinct timestamps"):
        run(tmp_path, make(split=split), "user,item,time\nu,a,1\nu,b,1\n")
    nobody = run(tmp_path, make(split={"kind": "time", "validation": 0.3, "test": 0}), text)
    assert nobody.manifest.targets["test"] == 0
    assert len(nobody.interactions("test")["row"]) == 0


def test_k_core_runs_to_its_fixed_point(tmp_path: Path) -> None:
    # the item r of user c is rare; without it c is too short, then the item q is rare
    text = "user,item,time\na,p,1\na,q,2\na,s,3\nb,p,1\nb,s,2\nb,p,3\nc,q,1\nc,r,2\n"
    clean = {"min_user_events": 2, "min_item_events": 2}
    prepared = run(tmp_path, make(clean=clean), text)
    assert set(prepared.item_ids) == {"p", "s"}
    assert set(prepared.user_ids) == {"a", "b"}
    limits = "removed (clean.min_user_events = 2, clean.min_item_events = 2)"
    expected = {f"users {limits}": 1, f"items {limits}": 2, f"events {limits}": 3}
    assert expected.items() <= rules(prepared).items()
    assert prepared.manifest.protocol.startswith("2-core, leave-one-out")
    with pytest.raises(DataError, match=r"(?s)no event is left.*events removed.*Lower the limits"):
        run(tmp_path, make(clean={"min_user_events": 9}), text)


def test_duplicates_keep_the_first_source_row(tmp_path: Path) -> None:
    text = LOG + "a,x,5,1\na,x,4,1\n"
    prepared = run(tmp_path, make(), text)
    assert prepared.manifest.events == 9
    [rule] = [r for r in prepared.manifest.report if r.rule == "duplicate row"]
    assert (rule.rows, rule.examples) == (1, ("row 8 (log.csv line 10)",))
    kept = run(tmp_path, make(clean={"duplicates": "keep"}), text)
    assert kept.manifest.events == 10


def test_malformed_lines_and_missing_keys_are_counted_with_their_lines(tmp_path: Path) -> None:
    text = LOG + "a,b\n\na,,1,8\n,x,1,8\na,x,1,\na,x,1,soon\na,x,1,1,1\n"
    clean = {"max_bad_fraction": 0.5}
    prepared = run(tmp_path, make(clean=clean), text)
    found = {r.rule: r for r in prepared.manifest.report}
    assert prepared.manifest.events == 8
    assert found["events: rows read"].rows == 14
    assert found["events: malformed line"].rows == 2
    assert found["events: malformed line"].examples == (
        "row 8 (log.csv line 10): 'a,b'",
        "row 14 (log.csv line 16): 'a,x,1,1,1'",
    )
    assert found["malformed time"].examples == ("row 13 (log.csv line 15): 'soon'",)
    assert [found[f"missing {key}"].rows for key in ("user", "item", "time")] == [1, 1, 1]
    with pytest.raises(DataError) as error:
        run(tmp_path, make(), text)
    message = str(error.value)
    assert "3 of 14 rows are malformed, more than clean.max_bad_fraction = 0.01" in message
    assert "row 13 (log.csv line 15): 'soon'" in message
    assert "raise clean.max_bad_fraction" in message


def test_quotes_blanks_encodings_and_line_ends(tmp_path: Path) -> None:
    raw = (
        b'\xef\xbb\xbf user , "item",time\r\n a , "x, ""the"" one" ,1\r\na,"y",2\r\n'
        b'\ta ,z" disc,3\na,"open,4\n\xff,w,5\na,v,6'
    )
    (tmp_path / "log.csv").write_bytes(raw)
    experiment = make(clean={"max_bad_fraction": 0.5})
    prepared = prepare(experiment, tmp_path, tmp_path / "out")
    assert set(prepared.item_ids) == {'x, "the" one', "y", 'z" disc', "v"}
    assert list(prepared.user_ids) == ["a"]
    rule = prepared.manifest.report[1]
    assert (rule.rule, rule.rows) == ("events: malformed line", 2)
    assert [example.split(":")[0] for example in rule.examples] == [
        "row 3 (log.csv line 5)",
        "row 4 (log.csv line 6)",
    ]


def test_times_are_seconds_or_iso_8601(tmp_path: Path) -> None:
    zoned = ["1970-01-01T00:00:04Z", "1970-01-01T02:00:03+02:00"]
    times = [*zoned, "1970-01-01T00:00:02.5", "2", "1.5", "1970-01-01"]
    text = "user,item,time\n" + "".join(f"u,i{n},{t}\n" for n, t in enumerate(times))
    prepared = run(tmp_path, make(data={"history_length": 9}), text)
    raw = prepared.items["id"].to_pylist()
    order = [raw[i - 2] for i in prepared.user_lists("event_item")[0]]
    assert order == ["i5", "i4", "i3", "i2", "i1", "i0"]


TASKS = {
    "click": {"kind": "binary"},
    "buy": {"kind": "binary", "column": "bought", "equals": "yes", "where": "click"},
    "price": {"kind": "regression", "where": "buy", "reference": "guess"},
    "shop": {"kind": "multiclass"},
}
SHOP = """click,bought,price,shop,guess
1,yes,10,n,9.5
true,yes,20,m,
0,no,,n,1
False,yes,5,m,1
1,no,7,,1
,yes,3,n,1
1,yes,,m,1
1,yes,30,k,1
"""


def test_labels_masks_and_sample_spaces(tmp_path: Path) -> None:
    split = {"kind": "files", "test_files": ["more.csv"], "validation": 0.2}
    experiment = rows(tasks=TASKS, split=split)
    more = SHOP.splitlines()[0] + "\n1,yes,1,unseen,2\n"
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
    experiment = rows(tasks={"click": {"kind": "binary"}}, features=features, split=split)
    more = header + "1,new,100,z|p|new\n0,,,\n1, a ,-5,\n"
    text = text.replace("rare", "a", 39)
    prepared = run(tmp_path, experiment, text, more_csv=more)
    m = prepared.manifest
    assert [f.name for f in m.context_ids] == ["city", "age_bin", "likes"]
    assert [(f.size, f.slots) for f in m.context_ids] == [(4, 1), (4, 1), (4, 2)]
    assert prepared.vocabulary("city")["value"].to_pylist() == ["a", "b"]  # by falling count
    assert prepared.vocabulary("likes")["value"].to_pylist() == ["q", "p"]  # z is always third
    train = np.concatenate([block["row"][:, 0] for block in prepared.blocks("train")])
    raw = [line.split(",") for line in text.splitlines()[1:]]
    ages = np.array([float(raw[r][2]) for r in train if raw[r][2] not in ("", "x")])
    [scale] = m.context_numbers
    assert (scale.mean, scale.std) == (pytest.approx(ages.mean()), pytest.approx(ages.std()))
    edges = [float(v) for v in prepared.vocabulary("age_bin")["value"].to_pylist()]
    assert edges == [1.0, np.sort(ages)[len(ages) // 2]]
    counts = prepared.vocabulary("age_bin")["count"].to_pylist()
    assert counts == [(ages < edges[1]).sum(), (ages >= edges[1]).sum()]
    encoded = encode_rows(prepared, tmp_path / "more.csv")
    # city, age_bin, likes: "new" is unknown, missing is 0, numbers beyond the edges are clipped
    assert encoded["context_ids"].tolist() == [[1, 3, 1, 3], [0, 0, 0, 0], [2, 2, 0, 0]]
    ages = np.array([100, scale.mean, -5])  # a missing number counts as the mean
    scaled = (ages - scale.mean) / scale.std
    np.testing.assert_allclose(encoded["context_numbers"][:, 0], scaled, rtol=1e-6)
    [test] = prepared.blocks("test")
    order = test["row"][:, 0] - test["row"].min()
    np.testing.assert_array_equal(test["context_ids"], encoded["context_ids"][order])
    assert rules(prepared)["training value of age is no number (used as missing)"] > 0
    in_memory = pd.DataFrame({"city": ["a", None], "age": [np.nan, 1], "likes": [["q"], []]})
    again = encode_rows(prepared, in_memory)
    assert again["context_ids"].tolist() == [[2, 0, 2, 0], [0, 2, 0, 0]]
    assert encoded["candidate"].tolist() == [[0]] * 3
    with pytest.raises(DataError, match=r"rows: no column 'likes' \(features.likes\)"):
        encode_rows(prepared, in_memory.drop(columns="likes"))
    (tmp_path / "bad.csv").write_text(more + "1,2\n")
    with pytest.raises(DataError, match="malformed lines"):
        encode_rows(prepared, tmp_path / "bad.csv")


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
    catalogue = prepared.catalogue()  # ids: x 2, y 3, w 4 (no row), z 5 (cold: unknown genre)
    assert catalogue["ids"][:, 0].tolist() == [0, 0, 2, 2, 0, 1]
    assert catalogue["numbers"][:, 0].tolist() == [0, 0, -1, 1, 0, -21]
    assert prepared.titles == ["The X", "The Y", "w", "z"]
    assert prepared.vocabulary("country")["value"].to_pylist() == ["de", "nl"]
    # the user id as a feature: a and then b, c by training events
    assert prepared.vocabulary("user")["value"].to_pylist() == ["a", "b", "c"]
    [test] = example_of(prepared, "test", "a")
    assert test["context_ids"] == [3, 2]
    [train] = example_of(prepared, "train", "c")
    assert train["context_ids"] == [0, 4]  # c has no row in users.csv
    # training ratings 5, 4, 1, 4 in order 4, 1, 5; the rating 3 of z is unknown
    assert prepared.vocabulary("rating")["value"].to_pylist() == ["4", "1", "5"]
    assert test["event_rating"] == [4, 2, 1]
    found = rules(prepared)
    assert found["items: row of an id already seen"] == 1
    assert found["items without a row in items"] == 1
    assert found["users without a row in users"] == 1


def test_rows_with_user_item_and_time(tmp_path: Path) -> None:
    like = {"kind": "binary", "column": "rating", "at_least": 4}
    top = {"kind": "binary", "column": "rating", "at_least": 5, "where": "like"}
    tasks = {"top": top, "like": like}
    experiment = rows(
        data={"user": "user", "item": "item", "time": "time"},
        tasks=tasks,
        split={"kind": "time", "validation": 0.2, "test": 0.2},
    )
    prepared = run(tmp_path, experiment)
    train = prepared.interactions("train")
    order = np.argsort(train["row"])
    assert train["row"][order].tolist() == [0, 1, 2, 3]
    items = [prepared.items["id"].to_pylist()[i - 2] for i in train["candidate"][order]]
    assert items == ["x", "y", "x", "z"]
    np.testing.assert_array_equal(train["label_top"][order], [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(train["user"][order], [2, 2, 3, 2])
    assert prepared.users.column_names == ["id", "event_item", "split"]
    new = {"user": ["b", "new", None], "item": ["x", "new", "y"], "time": [1, 2, 3]}
    encoded = encode_rows(prepared, pd.DataFrame(new))
    assert encoded["user"].tolist() == [3, 1, 0]
    assert encoded["candidate"][:, 0].tolist() == [2, 1, 3]


def test_in_memory_tables_formats_and_several_files_agree(tmp_path: Path) -> None:
    tasks = {"next": {"kind": "retrieval"}, "stars": {"kind": "regression", "column": "rating"}}
    text = LOG.replace("b,x,1,1", "b,x,,1").replace("c,x,4,7", "7,8,2.5,7")
    plain = run(tmp_path, make(tasks=tasks), text)
    expected = {s: (plain.folder / f"{s}.parquet").read_bytes() for s in SPLITS}
    frame = pd.read_csv(tmp_path / "log.csv")
    polars_like = pa.table(
        {
            "user": pa.array(frame["user"]).dictionary_encode(),
            "item": pa.array(frame["item"]).cast(pa.large_string()),
            "rating": pa.array(frame["rating"]),
            "time": pd.to_datetime(frame["time"], unit="s"),
        }
    )
    pq.write_table(pa.Table.from_pandas(frame), tmp_path / "log.parquet")
    frame.to_json(tmp_path / "log.jsonl", orient="records", lines=True)
    lines = text.splitlines(keepends=True)
    (tmp_path / "one.csv").write_text("".join(lines[:4]))
    cells = [line.strip().split(",") for line in lines[4:]]
    other = [f"{item},{user},{time},{rating}\n" for user, item, rating, time in cells]
    (tmp_path / "two.csv").write_text("item,user,time,rating\n" + "".join(other))
    (tmp_path / "bare.csv").write_text("".join(lines[1:]).replace(",", "::"))
    names = ["user", "item", "rating", "time"]
    variants: list[tuple[dict[str, Any], Any]] = [
        ({}, frame),
        ({}, polars_like),
        ({"files": ["log.parquet"], "format": "parquet"}, None),
        ({"files": ["log.jsonl"], "format": "jsonl"}, None),
        ({"files": ["one.csv", "two.csv"]}, None),
        ({"files": ["bare.csv"], "header": names, "separator": "::"}, None),
    ]
    for number, (files, table) in enumerate(variants):
        experiment = make(tasks=tasks, data={"events": files})
        tables = {"events": table} if table is not None else None
        data = tmp_path if table is None else None
        prepared = prepare(experiment, data, tmp_path / f"out{number}", tables)
        assert prepared.item_ids == plain.item_ids
        for split, content in expected.items():
            written = (prepared.folder / f"{split}.parquet").read_bytes()
            assert written == content, (number, split)


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    features = {"rating": {"on": "history"}, "user": {}}
    generator = np.random.default_rng(0)
    text = "user,item,rating,time\n" + "".join(
        f"u{u},i{i},{r},{t}\n" for u, i, r, t in generator.integers(0, 30, (400, 4))
    )
    experiment = make(features=features)
    first = run(tmp_path, experiment, text)
    files = {p.relative_to(first.folder): p.read_bytes() for p in first.folder.rglob("*.*")}
    assert {"train.parquet", "users.parquet", "manifest.json"} <= {p.name for p in files}
    again = prepare(experiment, tmp_path, tmp_path / "out")  # replaces the older one
    assert {p.relative_to(first.folder): p.read_bytes() for p in again.folder.rglob("*.*")} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv", "out"]
    other = run(tmp_path, experiment, text + "u1,i1,1,99\n")
    assert other.manifest.fingerprint != first.manifest.fingerprint
    assert json.loads((other.folder / "manifest.json").read_text())["kind"] == "sequences"


def test_random_split_is_seeded_and_close_to_its_fractions(tmp_path: Path) -> None:
    text = "click,x\n" + "".join(f"{n % 2},{n}\n" for n in range(10_000))
    tasks = {"click": {"kind": "binary"}}

    def split_rows(seed: int) -> dict[str, set[int]]:
        split = {"kind": "random", "validation": 0.2, "test": 0.1, "seed": seed}
        prepared = run(tmp_path, rows(tasks=tasks, split=split), text)
        return {name: set(prepared.interactions(name)["row"].tolist()) for name in SPLITS}

    one, two = split_rows(0), split_rows(1)
    assert sum(len(r) for r in one.values()) == len(set.union(*one.values())) == 10_000
    for found in (one, two):
        assert abs(len(found["validation"]) - 2000) < 130
        assert abs(len(found["test"]) - 1000) < 100
    assert len(one["test"] & two["test"]) < 170  # 100 expected of independent splits


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"log\.csv: there is no such file\.$"):
        prepare(make(), tmp_path, out)
    with pytest.raises(DataError, match=r"Fetch the data with: mtrec data ml-1m"):
        prepare(make(data={"public": "ml-1m"}), tmp_path, out)
    for text in ("", "user,item,rating,time\n"):
        with pytest.raises(DataError, match=r"log\.csv is empty"):
            run(tmp_path, make(), text)
    wrong = LOG.replace("rating", "ratings")
    tasks = {"like": {"kind": "binary", "column": "rating", "at_least": 3}}
    with pytest.raises(DataError) as error:
        run(tmp_path, make(tasks=tasks), wrong)
    assert str(error.value) == (
        "events: no column 'rating' (the label of task 'like') in log.csv. Did you mean "
        "'ratings'? Columns: user, item, ratings, time"
    )
    with pytest.raises(
        DataError, match="feature 'genre' is a column of the items table, and there"
    ):
        run(tmp_path, make(features={"genre": {"on": "item"}}))
    words = "user,item,rating,time\nu,a,good,1\nu,b,bad,2\nu,c,good,3\n"
    with pytest.raises(DataError, match=r"feature 'rating': no training value .* is a number"):
        run(tmp_path, make(features={"rating": {"on": "history", "kind": "binned"}}), words)
    with pytest.raises(DataError, match=r"every line of log.csv is malformed.*separator"):
        run(tmp_path, make(data={"events": {"files": ["log.csv"], "header": ["user", "item"]}}))
    with pytest.raises(
        DataError, match=r"tables: no table is called 'event'. Did you mean 'events'"
    ):
        prepare(make(), tmp_path, out, tables={"event": None})
    with pytest.raises(DataError, match="the column name 'User' is taken"):
        run(tmp_path, make(), LOG.replace("rating", "User"))
    circle = {"a": {"kind": "binary", "where": "b"}, "b": {"kind": "binary", "where": "a"}}
    with pytest.raises(ConfigError, match=r"tasks\.a\.where: the sample spaces run in a circle"):
        prepare(make(tasks=circle), tmp_path, out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.csv"]


def test_foreign_folders_are_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("dear to me")
    with pytest.raises(DataError, match=r"out exists and is no prepared folder"):
        run(tmp_path, make())
    assert (out / "thesis.txt").read_text() == "dear to me"
    (out / "thesis.txt").unlink()
    run(tmp_path, make())  # an empty folder may be used
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(DataError):
        run(tmp_path, make(), "user,item\n1,2\n")
    assert (out / "manifest.json").read_bytes() == before  # a failure leaves the old one alone


def test_row_groups_and_random_order(tmp_path: Path) -> None:
    blocks = [{"row": np.arange(n, n + 3000)[:, None]} for n in range(0, 12_000, 3000)]
    assert write_examples(tmp_path / "x.parquet", iter(blocks)) == (12_000, 12_000)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sizes == [BLOCK, BLOCK, 12_000 - 2 * BLOCK]


@given(st.integers(0, 2**40), st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_mix_agrees_between_python_and_numpy(value: int, seed: int) -> None:
    assert 0 <= mix(value, seed) < MODULUS
    assert mix(np.array([value]), seed).tolist() == [mix(value, seed)]


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    history=st.integers(1, 6),
    positions=st.integers(1, 6),
    held_out=st.integers(0, 3),
    hide_ties=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_target_once_and_never_its_own_future(
    lengths: list[int], history: int, positions: int, held_out: int, hide_ties: bool
) -> None:
    positions = min(positions, history)
    user = np.repeat(np.arange(len(lengths)) + 2, lengths).astype(np.int32)
    n = len(user)
    nth = np.concatenate([np.arange(length) for length in lengths])
    split = np.concatenate([np.arange(k) >= k - held_out for k in lengths]).astype(np.int8)
    items = np.arange(n, dtype=np.int32) + 2  # an item is its event, so that it can be traced
    time = (nth // 2).astype(np.float64)
    log = Log(user, split, np.arange(n), time, {"item": items}, {})
    for part in (0, 1):
        seen = []
        for block in sequence_examples(log, {}, part, positions, history, hide_ties, seed=3):
            for index in range(len(block["row"])):
                tokens = block["event_item"][index] - 2
                for place in np.flatnonzero(block["row"][index] >= 0):
                    target = block["row"][index, place]
                    seen.append(target)
                    assert block["candidate"][index, place] == items[target]
                    past = tokens[: block["cutoff"][index, place]]
                    start = target - nth[target]
                    end = start + (nth[target] // 2 * 2 if hide_ties else nth[target])
                    expected = np.arange(start, end)
                    assert past.tolist() == expected[len(expected) - len(past) :].tolist()
                    most = history - positions + 1 - (1 if hide_ties else 0)
                    assert len(past) >= min(len(expected), most)
        assert sorted(seen) == np.flatnonzero(split == part).tolist()
