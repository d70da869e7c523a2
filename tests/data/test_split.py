"""Splits, worked out by hand: each event in one of them, on every engine the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import SHOWN, SPLITS, SplitInfo
from mtrec_jax.data.describe import check_splits
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.examples import MODULUS, mix, past_items
from mtrec_jax.data.split import describe_split, split_events
from mtrec_jax.errors import DataError
from tests.data.small import make, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
KINDS: dict[str, dict[str, Any]] = {
    "leave_one_out": {},
    "time": {"validation": 0.3, "test": 0.2},
    "user_ratio": {"validation": 0.2, "test": 0.2},
    "random": {"validation": 0.3, "test": 0.2, "seed": 3},
    "folds": {"folds": 4, "fold": 3, "seed": 1},
    "user_holdout": {"validation": 0.3, "test": 0.3, "fold_in": 0.6},
    "cold_user": {"validation": 0.3, "test": 0.3, "seed": 5},
    "cold_item": {"validation": 0.3, "test": 0.3},
    "files": {"validation": 0.3, "test_files": ["t.csv"]},
}

LONG = {"history_length": 20, "positions": 1}


def log(users: list[str], times: list[float] | None = None, **columns: Any) -> pa.Table:
    """Events in the order of their source rows; by default one a second, of ten items."""
    n = len(users)
    whole = {
        "row": range(n),
        "part": [0] * n,
        "user": users,
        "item": [f"i{row % 10}" for row in range(n)],
        "time": times or [float(row) for row in range(n)],
    }
    return pa.table(whole | columns)


def of(kind: str, **keys: Any) -> Experiment:
    return make(split={"kind": kind, **KINDS[kind], **keys})


def split(engine: Engine, experiment: Experiment, events: pa.Table) -> tuple[list[int], SplitInfo]:
    """The split of each event by its source row, and what is said about it."""
    done = engine.keep("split", split_events(engine.load("events", events), experiment))
    assert "part" not in done.columns
    assert not {"nth", "n"} & set(done.columns)
    whole = pa.concat_tables(engine.batches("split")).sort_by("row")
    assert whole["row"].to_pylist() == sorted(events["row"].to_pylist())
    return whole["split"].to_pylist(), describe_split(done, experiment)


def integer(raw: str) -> int:
    return int(hashlib.md5(raw.encode()).hexdigest()[:7], 16)


def chosen(chance: int, test: float, validation: float) -> int:
    """The split of whom chance gives a number below 2^31."""
    return 2 if chance < test * MODULUS else 1 if chance < (test + validation) * MODULUS else 0


def test_leave_one_out_takes_the_last_two_of_three_or_more(duckdb: Engine) -> None:
    events = log([*"aaaabbbcc"], [3, 1, 2, 2, 5, 5, 5, 1, 2])
    # a: rows 1 | 2 | 3 | 0 by time, then row; b: all at once; c is too short
    assert split(duckdb, of("leave_one_out"), events)[0] == [2, 0, 0, 1, 0, 1, 2, 0, 0]


def test_time_keeps_equal_timestamps_together(duckdb: Engine) -> None:
    times = [1.0, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    experiment = of("time", validation=0.3, test=0.1)
    assert split(duckdb, experiment, log(["u"] * 10, times))[0] == [0] * 6 + [1] * 3 + [2]
    # 8 | 2 events before and from 8: with a share of .05 the end of the log is the nearest border
    none = split(duckdb, of("time", validation=0.3, test=0.04), log(["u"] * 10, times))[1]
    assert none.sizes == {"train": 7, "validation": 3, "test": 0}


def test_user_ratio_takes_the_last_events_of_each_user(duckdb: Engine) -> None:
    # of 5, 4, 3, 1 events 2, 2, 1, 0 are held out, the last 1, 1, 1, 0 of them test
    events = log([*"aaaaabbbbcccd"])
    assert split(duckdb, of("user_ratio"), events)[0] == [0, 0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 2, 0]
    most = split(duckdb, of("user_ratio", validation=0.5, test=0.4), events)[0]
    assert most[:5] == [0, 1, 1, 2, 2]  # 4.5 and 2 of 5, but one event trains
    assert most[-1] == 0


def test_random_and_folds_mix_the_source_row(duckdb: Engine) -> None:
    rows = [*range(40), 2**31 + 7, 2**33]
    events = log(["u"] * 42, row=rows)
    found = split(duckdb, of("random"), events)[0]
    assert found == [chosen(mix(row, 3), 0.2, 0.3) for row in rows]
    folds = [mix(row, 1) % 4 for row in rows]
    for fold in range(4):
        expected = [2 if f == fold else 1 if f == (fold + 1) % 4 else 0 for f in folds]
        assert split(duckdb, of("folds", fold=fold), events)[0] == expected


def test_folds_of_users_keep_their_events_together(duckdb: Engine) -> None:
    users = [f"u{n % 23}" for n in range(60)]
    part = [mix(integer(raw), 1) % 4 for raw in users]
    for fold in range(4):
        expected = [2 if p == fold else 1 if p == (fold + 1) % 4 else 0 for p in part]
        assert split(duckdb, of("folds", by="user", fold=fold), log(users))[0] == expected
    held = split(duckdb, of("folds", by="user", fold=0, hold_back=0.5), log(users))[0]
    by_user = {(raw, code) for raw, code in zip(users, held, strict=True)}
    assert len(by_user) == 23
    assert [code == 2 for code in held] == [p == 0 for p in part]
    assert {code for code, p in zip(held, part, strict=True) if p} == {0, 1}


def test_stratified_folds_have_equal_shares_of_each_label(duckdb: Engine) -> None:
    labels = [1.0, 0.0, 0.0, None] * 20 + [1.0, 0.0]
    tasks = {"next": {"kind": "retrieval"}, "like": {"kind": "binary"}}
    seen: list[int] = []
    for fold in range(4):
        parts = {"kind": "folds", "folds": 4, "fold": fold, "stratify": "like", "seed": 1}
        events = log(["u"] * 82, label_like=pa.array(labels, pa.float64()))
        found = split(duckdb, make(split=parts, tasks=tasks), events)[0]
        tests = [row for row, code in enumerate(found) if code == 2]
        counts = [sum(labels[row] == value for row in tests) for value in (1.0, 0.0, None)]
        assert all(n in whole for n, whole in zip(counts, ((5, 6), (10, 11), (5,)), strict=True))
        assert found.count(1) in (20, 21, 22)
        seen += tests
    assert sorted(seen) == list(range(82)), "each row tests once"


def test_folds_of_time_move_forward_and_end_behind_the_test_window(duckdb: Engine) -> None:
    """Two folds are four windows of three events; ties go with the nearest border."""
    times = [float(row) for row in range(12)]
    for fold, expected in enumerate(([0] * 3 + [1] * 3 + [2] * 3, [0] * 6 + [1] * 3 + [2] * 3)):
        experiment = of("folds", by="time", folds=2, fold=fold, hold_back=None)
        events = duckdb.load("events", log(["u"] * 12, times))
        done = duckdb.keep("split", split_events(events, experiment))
        found = pa.concat_tables(duckdb.batches("split")).sort_by("row")
        assert found["split"].to_pylist() == expected
        assert found["row"].to_pylist() == list(range(len(expected)))
        assert set(done.columns) == {"row", "user", "item", "time", "split"}
    half = of("folds", by="time", folds=2, fold=0, hold_back=0.5)
    duckdb.keep("half", split_events(duckdb.load("events", log(["u"] * 12, times)), half))
    found = pa.concat_tables(duckdb.batches("half")).sort_by("row")
    assert found["split"].to_pylist() == [0] * 3 + [1] * 3 + [2] * 3


def test_user_holdout_shows_first_and_judges_later(duckdb: Engine) -> None:
    users = [f"u{n}" for n in range(30)]
    part = {raw: chosen(mix(integer(raw), 0), 0.3, 0.3) for raw in users}
    assert set(part.values()) == {0, 1, 2}
    # user n has 1 + n % 5 events: of 1, 2, 3, 4, 5 the first 1, 1, 1, 2, 3 are shown
    events = log([raw for n, raw in enumerate(users) for _ in range(1 + n % 5)])
    expected = []
    for n, raw in enumerate(users):
        shown = (1, 1, 1, 2, 3)[n % 5] if part[raw] else 0
        expected += [SHOWN] * shown + [part[raw]] * (1 + n % 5 - shown)
    found, info = split(duckdb, of("user_holdout"), events)
    assert found == expected
    assert info.sizes["shown"] == expected.count(SHOWN)
    assert sum(info.sizes.values()) == len(expected)


def test_cold_users_and_items_never_train(duckdb: Engine) -> None:
    users = [f"u{n}" for n in range(20)] * 2 + ["é日本", "x y"]
    events = log(users, item=[f"i{n % 7}" for n in range(42)])
    found = split(duckdb, of("cold_user"), events)[0]
    assert found == [chosen(mix(integer(raw), 5), 0.3, 0.3) for raw in users]
    found = split(duckdb, of("cold_item", seed=2), events)[0]
    assert found == [chosen(mix(integer(f"i{n % 7}"), 2), 0.3, 0.3) for n in range(42)]


def test_given_files_and_what_is_left_to_chance(duckdb: Engine) -> None:
    events = log(["u"] * 9, part=[0, 0, 0, 0, 0, 1, 1, 2, 2])
    both = of("files", validation_files=["v.csv"])
    assert split(duckdb, both, events)[0] == [0] * 5 + [2, 2, 1, 1]
    part = log(["u"] * 9, part=[0] * 7 + [1, 1])
    expected = [int(mix(row, 0) < 0.3 * MODULUS) for row in range(7)] + [2, 2]
    assert 0 < sum(expected[:7]) < 7
    assert split(duckdb, of("files"), part)[0] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_every_event_is_in_one_split_by_a_stable_fingerprint(duckdb: Engine, kind: str) -> None:
    rng = np.random.default_rng(0)
    n = 4000
    events = log(
        [f"u{u}" for u in rng.integers(0, 400, n)],
        rng.integers(0, 500, n).astype(float).tolist(),
        item=[f"i{i}" for i in rng.integers(0, 400, n)],
        part=(rng.random(n) < 0.2).astype(int).tolist() if kind == "files" else [0] * n,
    )
    found, info = split(duckdb, of(kind), events)
    assert len(found) == n
    assert set(found) <= {0, 1, 2, SHOWN if kind == "user_holdout" else 2}
    sizes = {k: found.count(code) for k, code in zip(info.sizes, (0, 1, 2, SHOWN), strict=False)}
    assert info.sizes == sizes
    split_ = of(kind).split
    shares = {
        "leave_one_out": (0.1, 0.1),  # users have some 10 events
        "folds": (0.25, 0.25),
        "files": (0.3 * 0.8, 0.2),
        "user_holdout": (0.3 * 0.45, 0.3 * 0.45),  # of 10 events 6 are shown
    }.get(kind, (split_.validation, split_.test))
    assert [sizes["validation"] / n, sizes["test"] / n] == pytest.approx(shares, abs=0.05)
    again, other = split(duckdb, of(kind), events.take(rng.permutation(n)))
    assert (again, other) == (found, info)


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.randoms(use_true_random=False),
    st.sampled_from([0, 2**20, 2**31 - 4, 2**40]),
)
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_fingerprint_sees_every_move_and_no_order(
    duckdb: Engine, splits: list[int], random: Any, first: int
) -> None:
    def fingerprint(order: list[int], codes: list[int]) -> str:
        pairs = pa.table({"row": [first + i for i in order], "split": [codes[i] for i in order]})
        return describe_split(duckdb.load("pairs", pairs), of("random")).fingerprint

    order = list(range(len(splits)))
    plain = fingerprint(order, splits)
    assert len(plain) == 16
    assert int(plain, 16) >= 0
    shuffled = random.sample(order, len(order))
    assert fingerprint(shuffled, splits) == plain
    moved = splits.copy()
    moved[shuffled[0]] = (moved[shuffled[0]] + random.randint(1, 3)) % 4
    assert fingerprint(order, moved) != plain


def test_first_and_last_times_of_the_splits(duckdb: Engine) -> None:
    _, info = split(duckdb, of("time"), log(["a"] * 10))
    assert list(info.times) == ["train", "validation", "test"]
    assert info.times["train"][0] == 0.0
    assert info.times["test"][1] == 9.0
    assert info.times["train"][1] + 1 == info.times["validation"][0]
    events = pa.table({"row": [0, 1], "split": [0, 2]})
    assert describe_split(duckdb.load("untimed", events), of("random")).times == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PySpark's own, of pandas 3
def test_spark_splits_as_duckdb_does(spark: Engine, duckdb: Engine) -> None:
    rng = np.random.default_rng(1)
    n = 300
    events = log(
        [f"ü{u}" for u in rng.integers(0, 30, n)],
        (rng.integers(0, 50, n) / 4).tolist(),
        part=rng.integers(0, 3, n).tolist(),
        row=rng.permutation(n) + 2**31 - 100,
    )
    for kind in ("time", "user_ratio", "folds", "user_holdout"):  # the others are parts of these
        expected, info = split(duckdb, of(kind), events)
        done = spark.keep("split", split_events(spark.load("events", events), of(kind)))
        whole = pa.concat_tables(spark.batches("split")).sort_by("row")
        assert whole["split"].to_pylist() == expected, kind
    assert describe_split(done, of(kind)) == info


def test_empty_splits_are_refused() -> None:
    for kind, remedy in (
        ("user_ratio", "more events a user"),
        ("cold_item", "more items"),
        ("user_holdout", "more users"),
        ("folds", r"lower split\.folds"),
    ):
        with pytest.raises(DataError, match=f"split 'test' has no event .{kind}.: .*{remedy}"):
            check_splits(of(kind), {"train": 5, "validation": 2, "test": 0})
    check_splits(of("cold_item", test=0.0), {"train": 5, "validation": 2, "test": 0})


USERS, ITEMS = 40, 25
LINES = [
    (f"u{user}", f"i{(user * 7 + step * 3) % ITEMS}", float(step * 10 + user % 3))
    for user in range(USERS)
    for step in range(6 + user % 3)
]
TEXT = "user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in LINES)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "files"])
def test_no_history_holds_what_its_split_may_not_see(tmp_path: Path, kind: str) -> None:
    """A user meets an item once in this log, so that an event is known by the two of them."""
    prepared = run(tmp_path, make(split={"kind": kind, **KINDS[kind]}, data=LONG), TEXT)
    splits, items = prepared.user_lists("split"), prepared.user_lists("event_item")
    assert sorted(prepared.item_names) == sorted({item for _, item, _ in LINES})
    code_of = {
        (user, item): code
        for user in range(USERS)
        for item, code in zip(items[user].tolist(), splits[user].tolist(), strict=True)
    }
    time_of = {(prepared.user_ids[u] - 2, prepared.item_ids[i]): time for u, i, time in LINES}
    trained: set[int] = set()
    for name, code, may_see in (
        ("train", 0, {0}),
        ("validation", 1, {0, 1, SHOWN}),
        ("test", 2, {0, 1, 2, SHOWN}),
    ):
        targets = 0
        for block in prepared.blocks(name):
            for index, place in np.argwhere(block["row"] >= 0).tolist():
                user = int(block["user"][index]) - 2
                target = (user, int(block["candidate"][index, place]))
                assert code_of[target] == code
                targets += 1
                past = block["event_item"][index, : block["cutoff"][index, place]].tolist()
                assert past == [
                    item
                    for item in items[user].tolist()
                    if code_of[user, item] in may_see and time_of[user, item] < time_of[target]
                ]
            if name == "train":
                trained |= set(block["candidate"].ravel()) | set(block["event_item"].ravel())
        assert targets == list(code_of.values()).count(code)
    if kind == "cold_item":
        cold = {item for (_, item), code in code_of.items() if code}
        assert not cold & trained
        assert cold | trained == {0, *prepared.item_ids.values()}  # the catalogue ranks them all
        assert prepared.manifest.trained_items == len(trained - {0})
    if kind in ("cold_user", "user_holdout"):
        for user in range(USERS):
            codes = set(splits[user].tolist())
            assert codes == {0} or 0 not in codes


def test_shown_events_are_seen_and_never_train(tmp_path: Path) -> None:
    from mtrec_jax.evaluation.collect import seen_items

    prepared = run(tmp_path, make(split={"kind": "user_holdout", **KINDS["user_holdout"]}), TEXT)
    splits, items = prepared.user_lists("split"), prepared.user_lists("event_item")
    shown = {
        user: [
            i for i, c in zip(items[user].tolist(), splits[user].tolist(), strict=True) if c == 3
        ]
        for user in range(USERS)
    }
    assert sum(map(len, shown.values())) == prepared.manifest.split.sizes["shown"] > 20
    everyone = np.arange(USERS) + 2
    for name in ("validation", "test"):
        seen = seen_items(prepared, name, everyone)
        for user in range(USERS):
            if shown[user]:
                before = shown[user]
                if name == "test" and 1 in splits[user]:
                    before = items[user].tolist()
                assert sorted(seen[user] + 2) == sorted(before)
        users = prepared.interactions(name)["user"]
        past = past_items(prepared, name, np.arange(len(users)))
        for index, user in enumerate(users.tolist()):
            assert past[index].tolist()[: len(shown[user - 2])] == shown[user - 2]
    assert not seen_items(prepared, "train", everyone).values.size
    train = prepared.interactions("train")
    assert not {user for user in shown if shown[user]} & set((train["user"] - 2).tolist())
    counted = np.bincount(train["candidate"] - 2, minlength=len(prepared.items))
    assert counted.tolist() == prepared.items["count"].to_pylist()


@pytest.mark.parametrize(
    ("past_is", "sees"),
    [("rolling", ({0}, {0, 1}, {0, 1, 2})), ("frozen", ({0}, {0}, {0, 1}))],
)
def test_past_items_hide_what_the_split_hides(
    tmp_path: Path, past_is: str, sees: tuple[set[int], ...]
) -> None:
    """The whole past of a target, without later events and those that the split hides from it."""
    data = {"history_length": 2, "past": past_is}
    experiment = make(split={"kind": "folds", **KINDS["folds"]}, data=data)
    prepared = run(tmp_path, experiment, TEXT)
    splits, items = prepared.user_lists("split"), prepared.user_lists("event_item")
    for name, may_see in zip(SPLITS, sees, strict=True):
        targets = prepared.interactions(name)
        past = past_items(prepared, name, np.arange(len(targets["user"])))
        for index, (user, item) in enumerate(
            zip(targets["user"] - 2, targets["candidate"], strict=True)
        ):
            whole = items[user].tolist()
            pairs = zip(whole[: whole.index(item)], splits[user].tolist(), strict=False)
            assert past[index].tolist() == [i for i, code in pairs if code in may_see]
