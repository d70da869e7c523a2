"""Raw logs to the prepared folder, on logs small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mtrec_jax.data.dataset import SPLITS
from mtrec_jax.data.new_rows import encode_requests
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import chosen
from tests.data.small import LOG, example_of, make, rows, rules, run


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
    # no wider than the data: nobody has more than two training events
    assert m.positions == {"train": 2, "validation": 1, "test": 1}
    assert m.examples == {"train": 3, "validation": 2, "test": 2}
    assert m.targets == {"train": 4, "validation": 2, "test": 2}
    [train] = example_of(prepared, "train", "a")
    assert train["event_item"] == [2, 0, 0]
    assert train["cutoff"] == [0, 1]
    assert train["candidate"] == [2, 3]
    assert train["row"] == [0, 1]
    assert train["label_next"] == [1, 1]
    [short] = example_of(prepared, "train", "b")
    assert short["label_next"][0] == 1
    assert np.isnan(short["label_next"][1])
    [test] = example_of(prepared, "test", "a")
    assert (test["event_item"], test["cutoff"], test["candidate"]) == ([2, 3, 5], [3], [4])
    assert test["row"] == [5]
    assert (
        m.protocol
        == "leave-one-out by (time, source row), rolling past, 3 users, 4 items, 8 events"
    )


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
    # the test event f looks back on a, b, c, d: e has its timestamp
    assert example_of(hidden, "test", "u")[0]["cutoff"] == [4]


def test_time_split_keeps_equal_timestamps_together(tmp_path: Path) -> None:
    times = [1, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    text = "user,item,time\n" + "".join(f"u,i{n},{t}\n" for n, t in enumerate(times))
    split = {"kind": "time", "validation": 0.3, "test": 0.1}
    prepared = run(tmp_path, make(split=split), text)
    assert prepared.user_lists("split")[0].tolist() == [0] * 6 + [1] * 3 + [2]
    assert prepared.manifest.positions == {"train": 3, "validation": 1, "test": 1}
    found = example_of(prepared, "validation", "u")
    # the last three events before a target are its past, whatever their split
    assert [e["cutoff"] for e in found] == [[3], [3], [3]]
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


@pytest.mark.slow
def test_duplicates_keep_the_first_source_row(tmp_path: Path) -> None:
    text = LOG + "a,x,5,1\na,x,4,1\n"
    prepared = run(tmp_path, make(), text)
    assert prepared.manifest.events == 9
    [rule] = [r for r in prepared.manifest.report if r.rule == "duplicate row"]
    assert (rule.rows, rule.examples) == (1, ("row 8 (log.csv line 10)",))
    kept = run(tmp_path, make(clean={"duplicates": "keep"}), text)
    assert kept.manifest.events == 10


def test_lists_are_repeated_only_when_their_values_are(tmp_path: Path) -> None:
    rest = {"user": ["a"] * 4, "item": ["x"] * 4, "time": [1] * 4}
    tags = [["b, c"], ["b", "c"], ["b", "c"], None]
    more = {"user": list("aabb"), "item": list("yzxy"), "time": range(4), "tags": [[]] * 4}
    events = pa.concat_tables(
        [pa.table({**rest, "tags": tags}), pa.table(more)], promote_options="permissive"
    )
    prepared = prepare(make(), None, tmp_path / "out", {"events": events})
    [rule] = [r for r in prepared.manifest.report if r.rule == "duplicate row"]
    assert (rule.rows, rule.examples) == (1, ("row 2",))


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
    assert train["row"][order].tolist() == [0, 1, 2, 3, 4]
    items = [prepared.items["id"].to_pylist()[i - 2] for i in train["candidate"][order]]
    assert items == ["x", "y", "x", "z", "y"]
    np.testing.assert_array_equal(train["label_top"][order], [1, 0, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(train["user"][order], [2, 2, 3, 2, 3])
    assert prepared.users.column_names == ["id", "event_item", "split"]
    new = {"user": ["b", "new", None], "item": ["x", "new", "y"], "time": [1, 2, 3]}
    encoded = encode_requests(prepared, pd.DataFrame(new))
    assert encoded["user"].tolist() == [3, 1, 0]
    assert encoded["candidate"][:, 0].tolist() == [2, 1, 3]


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cleaned", "log.csv", "out"]
    other = run(tmp_path, experiment, text + "u1,i1,1,99\n")
    assert other.manifest.fingerprint != first.manifest.fingerprint
    assert other.manifest.cleaned != first.manifest.cleaned
    assert first.manifest.cleaned == again.manifest.cleaned


@pytest.mark.slow
def test_random_split_is_seeded_and_close_to_its_fractions(tmp_path: Path) -> None:
    text = "click,x\n" + "".join(f"{n % 2},{n}\n" for n in range(10_000))
    tasks = {"click": {"kind": "binary"}}

    def split_rows(seed: int) -> dict[str, set[int]]:
        split = {"kind": "random", "validation": 0.2, "test": 0.1, "seed": seed}
        prepared = run(tmp_path, rows(tasks=tasks, features={"x": {}}, split=split), text)
        return {name: set(prepared.interactions(name)["row"].tolist()) for name in SPLITS}

    one, two = split_rows(0), split_rows(1)
    assert sum(len(r) for r in one.values()) == len(set.union(*one.values())) == 10_000
    for found in (one, two):
        assert abs(len(found["validation"]) - 2000) < 130
        assert abs(len(found["test"]) - 1000) < 100
    assert len(one["test"] & two["test"]) < 170  # 100 expected of independent splits


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


def test_without_a_time_the_order_is_that_of_the_source(tmp_path: Path) -> None:
    text = "user,item,like\nb,x,1\na,x,0\na,y,1\nb,y,0\na,z,1\nb,z,1\na,w,0\n"
    features = {
        "like": {"on": "history"},
        "seen": {"on": "request", "kind": "past_count", "column": "item"},
    }
    data = {"time": "", "history_length": 2}
    prepared = run(tmp_path, make(data=data, features=features), text)
    assert prepared.manifest.protocol.startswith("leave-one-out by source row, rolling past, 2 us")
    names = prepared.item_names
    order = [[names[i - 2] for i in prepared.user_lists("event_item")[user]] for user in (0, 1)]
    assert order == [["x", "y", "z", "w"], ["x", "y", "z"]]
    assert prepared.user_lists("split")[0].tolist() == [0, 0, 1, 2]
    [test] = example_of(prepared, "test", "a")
    assert [names[i - 2] for i in test["event_item"]] == ["y", "z"]
    [found] = prepared.manifest.request_numbers
    # b x, a x, a y train; of z the validation event of a sees none, the test event of b one
    counts = {
        (split, user): example_of(prepared, split, user)[0]["request_seen"]
        for split, user in (("train", "a"), ("validation", "a"), ("test", "b"))
    }
    raw = {key: np.expm1(np.array(v) * found.std + found.mean) for key, v in counts.items()}
    assert {key: np.round(v, 6).tolist() for key, v in raw.items()} == {
        ("train", "a"): [1, 0],
        ("validation", "a"): 0,
        ("test", "b"): 1,
    }


def test_features_of_the_moment_stand_at_each_position(tmp_path: Path) -> None:
    text = "user,item,hour,tags,price,time\n" + "".join(
        f"u{n % 2},i{n % 3},{n % 5},{'p q' if n % 2 else 'q'},{n},{n}\n" for n in range(12)
    )
    features = {
        "hour": {"on": "request"},
        "tags": {"on": "request", "kind": "multi_valued", "max_values": 2},
        "price": {"on": "request", "kind": "numeric"},
    }
    prepared = run(tmp_path, make(data={"positions": 2}, features=features), text)
    m = prepared.manifest
    assert [(f.name, f.slots) for f in m.request_ids] == [("hour", 1), ("tags", 2)]
    hours = prepared.vocabulary("hour")["value"].to_pylist()
    tags = prepared.vocabulary("tags")["value"].to_pylist()
    [price] = m.request_numbers
    for split in SPLITS:
        for block in prepared.blocks(split):
            positions = block["row"].shape[1]
            found = block["request_tags"].reshape(-1, positions, 2)
            for place in zip(*np.nonzero(block["row"] >= 0), strict=True):
                row = int(block["row"][place])
                hour = np.reshape(block["request_hour"], (-1, positions))[place]
                assert hours[hour - 2] == str(row % 5)
                shown = [tags[i - 2] for i in found[place] if i]
                assert shown == (["p", "q"] if row % 2 else ["q"])
                value = np.reshape(block["request_price"], (-1, positions))[place]
                assert value == pytest.approx((row - price.mean) / price.std, rel=1e-5)
            padding = block["row"] < 0
            assert not np.reshape(block["request_hour"], (-1, positions))[padding].any()
            assert not found[padding].any()


def test_one_folder_holds_what_experiments_choose_from(tmp_path: Path) -> None:
    tasks = {
        "next": {"kind": "retrieval"},
        "high": {"kind": "binary", "column": "rating", "at_least": 4},
        "top": {"kind": "binary", "column": "rating", "at_least": 5, "where": "high"},
    }
    features = {
        "rating": {"on": "history", "kind": "binned", "bins": 2},
        "so_far": {"on": "request", "kind": "past_rate", "column": "user", "label": "high"},
        "hour": {"on": "request", "kind": "hour"},
    }
    whole = make(tasks=tasks, features=features)
    prepared = run(tmp_path, whole)
    some = chosen(whole, tasks=["top"], features="hour,so_far")
    view = prepared.chosen(some)
    assert list(view.manifest.tasks) == ["top"]
    assert not view.manifest.history
    assert [f.name for f in view.manifest.request_ids] == ["hour"]
    assert [f.name for f in view.manifest.request_numbers] == ["so_far"]  # of a task left out
    [block] = view.blocks("train")
    [every] = prepared.blocks("train")
    assert "label_high" in every
    assert "label_high" not in block
    np.testing.assert_array_equal(block["label_top"], every["label_top"])  # only where high is 1
    with pytest.raises(ConfigError, match=r"left_out = \['next', 'high'\].*choose=False"):
        prepare(some, tmp_path, tmp_path / "other")
