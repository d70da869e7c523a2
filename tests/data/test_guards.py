"""Every guard stops a real leak, and lets a legal look-alike pass."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mtrec_jax.config import Experiment
from mtrec_jax.data import guards
from mtrec_jax.data.engine import Engine, open_engine
from mtrec_jax.data.examples import Log
from mtrec_jax.data.rules import equal_rows
from mtrec_jax.errors import DataError
from tests.data.small import make, rows, run

N = 2000
BINARY = {"like": {"kind": "binary"}}


NAMES = (f"table{n}" for n in itertools.count())


@pytest.fixture
def duckdb(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path) as opened:
        yield opened


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(7)


def text(values: Any) -> list[str | None]:
    return [None if v is None else str(v) for v in values]


def of_rows(duckdb: Engine, label: Any, split: Any = None, **features: Any) -> Any:
    """Events of a row data set: one feature or more, the label of `like`."""
    columns = {
        f"feature_{n}": v if isinstance(v, pa.Array) else text(v) for n, v in features.items()
    }
    split = np.zeros(len(label)) if split is None else split
    values = pa.array(label) if isinstance(label[0], str) else pa.array(label, pa.float64())
    table = pa.table(
        {
            "row": np.arange(len(label)),
            "split": pa.array(split, pa.int8()),
            "label_like": values,
            **columns,
        }
    )
    return duckdb.load(next(NAMES), table)


def of_kind(kind: str = "categorical", task: str = "binary", **more: Any) -> Experiment:
    feature = {"kind": kind, **more}
    return rows(features={"x": feature}, tasks={"like": {"kind": task}})


def stops(duckdb: Engine, label: Any, x: Any, experiment: Experiment) -> bool:
    message = ""
    try:
        guards.determined_labels(of_rows(duckdb, label, x=x), {}, experiment)
    except DataError as error:
        message = str(error)
    parts = ("feature 'x'", "task 'like'", "guard.allow = ['x/like']")
    assert not message or all(part in message for part in parts)
    return bool(message)


# --- determined_labels


def test_a_category_that_determines_the_label(duckdb: Engine, random: np.random.Generator) -> None:
    x = random.integers(0, 40, N)
    label = (x % 3 == 0) * 1.0
    assert stops(duckdb, label, x, of_kind())
    noisy = np.where(random.random(N) < 0.02, 1 - label, label)  # 98 % is a strong honest feature
    assert not stops(duckdb, noisy, x, of_kind())


def test_a_missing_cell_that_determines_the_label(
    duckdb: Engine, random: np.random.Generator
) -> None:
    """An order number that only orders have; the numbers themselves never come again."""
    label = (random.random(N) < 0.3) * 1.0
    order = [i if y else None for i, y in enumerate(label)]
    assert stops(duckdb, label, order, of_kind())


def test_unique_values_determine_nothing(duckdb: Engine, random: np.random.Generator) -> None:
    """Ids, timestamps and measurements: each label could be read off the value, and none is."""
    label = (random.random(N) < 0.3) * 1.0
    assert not stops(duckdb, label, np.arange(N), of_kind())
    assert not stops(duckdb, label, random.normal(size=N), of_kind("numeric"))
    assert not stops(duckdb, label, 1.7e9 + np.arange(N), of_kind("numeric"))
    assert not stops(duckdb, random.normal(size=N), np.arange(N), of_kind("numeric", "regression"))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_determines_the_label(
    duckdb: Engine, random: np.random.Generator, sign: int
) -> None:
    x = sign * random.normal(size=N)
    assert stops(duckdb, (x > 1.2) * 1.0, x, of_kind("numeric"))
    assert not stops(duckdb, (x + random.normal(size=N) > 1.2) * 1.0, x, of_kind("numeric"))


def test_a_number_that_determines_the_label_by_its_range(
    duckdb: Engine, random: np.random.Generator
) -> None:
    x = random.normal(size=20 * N)
    assert stops(duckdb, (np.abs(x) < 1) * 1.0, x, of_kind("numeric"))


def test_a_regression_label_in_another_unit(duckdb: Engine, random: np.random.Generator) -> None:
    x = random.normal(50, 10, N)
    assert stops(duckdb, 2.54 * x + 3, x, of_kind("numeric", "regression"))
    assert not stops(duckdb, x + random.normal(size=N), x, of_kind("numeric", "regression"))
    steps = random.integers(1, 6, N)
    assert stops(duckdb, steps**2.0, steps, of_kind("categorical", "regression"))


def test_a_class_by_another_name(duckdb: Engine, random: np.random.Generator) -> None:
    x = random.integers(0, 30, N)
    label = [f"class {v % 4}" for v in x]
    assert stops(duckdb, label, x, of_kind(task="multiclass"))
    wrong = [f"class {v % 4 if r > 0.01 else 3}" for v, r in zip(x, random.random(N), strict=True)]
    assert not stops(duckdb, wrong, x, of_kind(task="multiclass"))
    nearly_constant = ["usual"] * (N - 15) + ["rare"] * 15
    assert not stops(duckdb, nearly_constant, random.integers(0, 3, N), of_kind(task="multiclass"))


def test_a_word_and_a_list_entry_that_determine_the_label(
    duckdb: Engine, random: np.random.Generator
) -> None:
    label = (random.random(N) < 0.3) * 1.0
    words = [
        [f"w{random.integers(400)}", f"w{random.integers(400)}"] + ["bought"] * int(y)
        for y in label
    ]
    assert stops(duckdb, label, [" ".join(w) for w in words], of_kind("multi_valued"))
    assert stops(duckdb, label, pa.array(words), of_kind("multi_valued"))
    others = [w[:2] for w in words]
    assert not stops(duckdb, label, pa.array(others), of_kind("multi_valued"))


def test_too_few_rows_are_not_judged(duckdb: Engine) -> None:
    label = np.arange(99) % 2 * 1.0
    assert not stops(duckdb, label, label, of_kind())
    label = np.arange(100) % 2 * 1.0
    assert stops(duckdb, label, label, of_kind())
    rare = (np.arange(N) < 9) * 1.0
    assert not stops(duckdb, rare, rare, of_kind())


def test_only_training_rows_count_and_pairs_can_be_allowed(duckdb: Engine) -> None:
    label = np.arange(N) % 2 * 1.0
    split = np.arange(N) % 3 % 2
    x = np.where(split == 0, np.arange(N) % 7, label)  # a label of the judged rows only
    guards.determined_labels(of_rows(duckdb, label, split, x=x), {}, of_kind())
    allowed = rows(features={"x": {}}, tasks=BINARY, guard={"allow": ["x/like"]})
    guards.determined_labels(of_rows(duckdb, label, x=label), {}, allowed)
    other = rows(features={"x": {}}, tasks=BINARY, guard={"allow": ["x/other"]})
    with pytest.raises(DataError, match=r"AUC 1\.0000 on 2,000 training rows"):
        guards.determined_labels(of_rows(duckdb, label, x=label), {}, other)


def of_users(duckdb: Engine, label: Any, users: Any, items: Any, split: Any = None) -> Any:
    n = len(label)
    split = np.zeros(n) if split is None else split
    table = pa.table(
        {
            "row": np.arange(n),
            "split": pa.array(split, pa.int8()),
            "user": text(users),
            "item": text(items),
            "label_like": pa.array(label, pa.float64()),
        }
    )
    return duckdb.load(next(NAMES), table)


def side(key: str, ids: Any, **columns: Any) -> pa.Table:
    named = {f"column_{n}": text(v) for n, v in columns.items()}
    return pa.table({key: text(ids), **named})


@pytest.mark.parametrize("key", ["user", "item"])
def test_a_label_that_a_side_table_determines(
    duckdb: Engine, random: np.random.Generator, key: str
) -> None:
    ids = random.integers(0, 50, N)
    verdict = np.arange(50) % 2
    group = [f"g{i % 6}" for i in range(50)]  # of even or odd ids only
    users, items = (ids, np.arange(N) % 9) if key == "user" else (np.arange(N) % 9, ids)
    on = "context" if key == "user" else "item"
    experiment = make(features={"x": {"on": on}}, tasks=BINARY)
    events = of_users(duckdb, verdict[ids] * 1.0, users, items)
    with pytest.raises(DataError, match="feature 'x'"):
        guards.determined_labels(events, {key: side(key, range(50), x=group)}, experiment)
    honest = side(key, range(50), x=[f"g{i % 7}" for i in range(50)])
    guards.determined_labels(events, {key: honest}, experiment)


def test_a_history_feature_may_be_the_label(duckdb: Engine) -> None:
    label = np.arange(N) % 2 * 1.0
    events = of_users(duckdb, label, np.arange(N) % 50, np.arange(N) % 9)
    events = events.mutate(feature_like=events.label_like.cast("string"))
    experiment = make(features={"like": {"on": "history"}}, tasks=BINARY)
    guards.determined_labels(events, {}, experiment)


# --- next_event_known


def log_of(random: np.random.Generator, **fields: Any) -> Log:
    """40 users with 50 events each; items, likes and the given history fields (from them)."""
    n = 40 * 50
    user = np.repeat(np.arange(40, dtype=np.int32) + 2, 50)
    item = random.integers(2, 30, n).astype(np.int32)
    like = (random.random(n) < 0.4).astype(np.float32)
    last = np.arange(n) % 50 == 49
    events = {"item": item} | {
        name: make_field(item, like, last) for name, make_field in fields.items()
    }
    split = np.where(last, 2, 0).astype(np.int8)
    return Log(user, split, np.arange(n), np.arange(n) * 1.0, events, {"label_like": like}, {})


def following(values: np.ndarray, last: np.ndarray) -> np.ndarray:
    return np.where(last, 1, np.roll(values, -1)).astype(np.int32)


HISTORY = {"tasks": {"next": {"kind": "retrieval"}, "like": {"kind": "binary"}}}


def test_a_history_that_names_the_next_item(random: np.random.Generator) -> None:
    log = log_of(random, then=lambda item, like, last: following(item, last))
    experiment = make(features={"then": {"on": "history"}}, **HISTORY)
    with pytest.raises(DataError, match=r"'then'.*shows the future.*the next of the user's next"):
        guards.next_event_known(log, experiment)
    allowed = make(features={"then": {"on": "history"}}, guard={"allow": ["then/next"]}, **HISTORY)
    guards.next_event_known(log, allowed)


def test_a_history_that_shows_the_next_label(random: np.random.Generator) -> None:
    log = log_of(random, then=lambda item, like, last: following(like + 2, last))
    experiment = make(features={"then": {"on": "history"}}, **HISTORY)
    with pytest.raises(DataError, match="gives away the like of the user's next"):
        guards.next_event_known(log, experiment)


def test_a_running_total_that_is_one_event_ahead(random: np.random.Generator) -> None:
    def total(like: np.ndarray) -> np.ndarray:
        return np.cumsum(like.reshape(40, 50), 1).reshape(-1).astype(np.int32) + 2

    experiment = make(features={"total": {"on": "history", "kind": "binned"}}, **HISTORY)
    honest = log_of(random, total=lambda item, like, last: total(like))
    guards.next_event_known(honest, experiment)
    ahead = log_of(random, total=lambda item, like, last: following(total(like), last))
    with pytest.raises(DataError, match="'total'"):
        guards.next_event_known(ahead, experiment)


def test_what_the_own_event_explains_is_no_future(random: np.random.Generator) -> None:
    """A fixed course of lessons: the next item follows from the item, and so from its number."""
    log = log_of(random, lesson=lambda item, like, last: np.arange(len(item), dtype=np.int32) % 50)
    log.events["item"][:] = log.events["lesson"] + 2
    log.targets["label_like"][:] = log.events["lesson"] % 2
    guards.next_event_known(log, make(features={"lesson": {"on": "history"}}, **HISTORY))


# --- statistics_of_everything


@pytest.fixture
def rated(duckdb: Engine, random: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """Events of 60 items, a fifth of them judged, and what can be computed from them."""
    items, like = random.integers(0, 60, N), (random.random(N) < 0.4) * 1.0
    split = np.where(random.random(N) < 0.2, random.integers(1, 3, N), 0)
    events = of_users(duckdb, like, np.arange(N) % 50, items, split)
    figures: dict[str, Any] = {}
    for name, inside in {"all": split >= 0, "seen": split < 2, "train": split == 0}.items():
        n = np.bincount(items[inside], minlength=60)
        figures[f"count_{name}"] = n
        figures[f"rate_{name}"] = np.bincount(items[inside], like[inside], 60) / n
    return events, figures


@pytest.mark.parametrize("kind", ["numeric", "binned"])
@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("count_all", "number of events over all events"),
        ("count_seen", "number of events over training and validation events"),
        ("count_train", ""),
        ("rate_all", "mean of the label of task 'like' over all"),
        ("rate_train", ""),
        ("rounded_all", "mean of the label of task 'like' over all"),
        ("rounded_train", ""),
        ("price", ""),
    ],
)
def test_a_column_that_has_seen_the_judged_events(
    rated: tuple[Any, dict[str, Any]], name: str, stop: str, kind: str
) -> None:
    events, figures = rated
    figures |= {f"rounded_{n}": np.round(figures[f"rate_{n}"], 3) for n in ("all", "train")}
    figures["price"] = np.arange(60) * 1.5
    sides = {"item": side("item", range(60), x=figures[name])}
    experiment = make(features={"x": {"on": "item", "kind": kind}}, tasks=BINARY)
    if stop:
        with pytest.raises(DataError, match=f"feature 'x'.*{stop}"):
            guards.statistics_of_everything(sides, events, experiment)
    else:
        guards.statistics_of_everything(sides, events, experiment)


def test_all_statistics_are_named_at_once_and_each_can_be_allowed(
    rated: tuple[Any, dict[str, Any]],
) -> None:
    events, figures = rated
    x, y = figures["count_all"], figures["rate_all"]
    sides = {"item": side("item", range(60), x=x, y=y, z=figures["rate_train"])}
    features = {name: {"on": "item", "kind": "numeric"} for name in "xyz"}
    for allow, refused in (
        ([], ["x/events", "y/like"]),
        (["x/events"], ["y/like"]),
        (["x/like"], ["x/events", "y/like"]),
        (["y"], ["x/events"]),
        (["x", "y/like"], []),
    ):
        experiment = make(features=features, tasks=BINARY, guard={"allow": allow})
        message = ""
        try:
            guards.statistics_of_everything(sides, events, experiment)
        except DataError as error:
            message = str(error)
        assert re.findall(r"allow = \['(.*?)'\]", message) == refused


# A log of 1,000 events in which new users come all the time and one label in 29 is a 1: most means
# are 0, and 58 of 169 users have no training event.


def rare_log() -> dict[str, np.ndarray]:
    n = np.arange(1000)
    return {
        "user": n * 7919 % (20 + 180 * n // 1000),
        "item": 31 * n % 97,
        "like": (37 * n % 29 == 5) * 1,
        "time": n,
    }


VIP = (13 * np.arange(200) % 20 == 4) * 1


def rare_means(inside: Any) -> np.ndarray:
    """The mean label of each of 200 users over these events, NaN without one."""
    log = rare_log()
    n, total = (
        np.bincount(log["user"][inside], weights, 200)
        for weights in (np.ones(1000)[inside], log["like"][inside])
    )
    return np.where(n > 0, total / np.maximum(n, 1), np.nan)


def refused(
    duckdb: Engine, log: dict[str, np.ndarray], split: Any, x: Any, key: str = "user"
) -> str:
    """What the guard says of the column `x` of the users or items."""
    events = of_users(duckdb, log["like"] * 1.0, log["user"], log["item"], split)
    cells = [None if np.isnan(v) else v for v in np.asarray(x).tolist()]
    sides = {key: side(key, range(len(cells)), x=cells)}
    on = "context" if key == "user" else "item"
    features = {"x": {"on": on, "kind": "numeric"}}
    try:
        guards.statistics_of_everything(sides, events, make(features=features, tasks=BINARY))
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("decimals", [None, 4, 3, 2, 1])
def test_the_mean_of_a_rare_label_over_all_events(duckdb: Engine, decimals: int | None) -> None:
    log, split = rare_log(), np.repeat([0, 1, 2], [800, 100, 100])
    whole, train = rare_means(split >= 0), rare_means(split == 0)
    if decimals is not None:
        whole, train = np.round(whole, decimals), np.round(train, decimals)
    message = refused(duckdb, log, split, whole)
    assert "mean of the label of task 'like' over all events" in message
    assert message.count("\n") == 0
    assert not refused(duckdb, log, split, train)
    assert not refused(duckdb, log, split, np.nan_to_num(train))  # new users: nothing yet
    shuffled = np.random.default_rng(3).permutation(whole[~np.isnan(whole)])
    whole[~np.isnan(whole)] = shuffled  # the labels of other users
    assert not refused(duckdb, log, split, whole)


@pytest.mark.parametrize("key", ["user", "item"])
def test_flags_and_constants_are_no_statistics_of_rare_labels(duckdb: Engine, key: str) -> None:
    log, split = rare_log(), np.repeat([0, 1, 2], [800, 100, 100])
    for x in (VIP, 1 - VIP, np.zeros(200), np.ones(200), VIP * 0.1, VIP * 1e-5):
        assert not refused(duckdb, log, split, x * 1.0, key)
        assert not refused(duckdb, log, split, x.astype(int), key)


def test_a_flag_that_tells_much_of_the_label_is_no_statistic(duckdb: Engine) -> None:
    """Means rounded to 0 or 1 would be this flag, and new users have no other figure."""
    random = np.random.default_rng(5)
    flag = np.arange(200) % 2
    user = np.concatenate([random.integers(0, 100, N // 2), random.integers(0, 200, N // 2)])
    like = (random.random(N) < np.where(flag[user], 0.95, 0.05)) * 1
    log = {"user": user, "item": user % 7, "like": like}
    assert not refused(duckdb, log, np.repeat([0, 2], N // 2), flag)


def test_a_flag_of_who_ever_bought_is_a_sum_over_all_events(duckdb: Engine) -> None:
    user = np.arange(N) % 400
    like = np.zeros(N, int)
    like[np.arange(0, 60) * 33] = 1  # one of each buyer, some of them among the last events
    log, split = {"user": user, "item": user % 7, "like": like}, np.repeat([0, 2], N // 2)
    bought = np.bincount(user, like, 400).astype(int)
    assert set(bought) == {0, 1}
    assert "sum of the label of task 'like' over all events" in refused(duckdb, log, split, bought)
    before = np.bincount(user[: N // 2], like[: N // 2], 400).astype(int)
    assert not refused(duckdb, log, split, before)


def test_a_mean_in_powers_of_ten_is_as_exact_as_it_is_written(duckdb: Engine) -> None:
    log, split = rare_log(), np.repeat([0, 1, 2], [800, 100, 100])
    log["like"] = log["like"] * 1e-4  # means such as 1.4285e-05
    assert "over all events" in refused(duckdb, log, split, rare_means(split >= 0) * 1e-4)
    assert not refused(duckdb, log, split, VIP * 1.5e-5)


# --- row_in_two_splits

FILES = {"kind": "files", "test_files": ["test.csv"]}


def raw_rows(duckdb: Engine, first: int, **columns: Any) -> Any:
    n = len(next(iter(columns.values())))
    table = pa.table(
        {
            "_row": np.arange(first, first + n),
            **{k: pa.array(text(v), pa.string()) for k, v in columns.items()},
        }
    )
    return duckdb.load(next(NAMES), table)


def check_twins(duckdb: Engine, raw: list[Any], split: Any, experiment: Experiment) -> None:
    """Of raw tables, the first of which begins with row 0, and of events with their split."""
    names = [name for name in raw[0].columns if name != "_row"]
    splits = split.to_pyarrow()["split"].to_pylist()
    sizes = {name: splits.count(code) for code, name in enumerate(("train", "validation", "test"))}
    first = raw[0].count().to_pyarrow().as_py()
    kept = split.filter(split.row < first).count().to_pyarrow().as_py()
    equal = equal_rows(duckdb, raw, names)
    guards.row_in_two_splits(equal, split, experiment, sizes, first - kept, first)


def test_equal_hashes_of_unequal_rows_stop_nothing(
    duckdb: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_rows(duckdb, 0, user=["a"] * 4, item=["x", "y", "z", "z"], time=[1, 2, 3, 4])
    keep, split = make(clean={"duplicates": "keep"}), with_split(duckdb, [0, 0, 1, 2])
    monkeypatch.setattr("ibis.expr.types.Value.hash", lambda value: value.length())
    check_twins(duckdb, [raw], split, keep)
    raw = raw_rows(duckdb, 0, user=["a"] * 4, item=["x", "y", "z", "z"], time=[1, 2, 3, 3])
    with pytest.raises(DataError, match="2 of 2 validation"):
        check_twins(duckdb, [raw], split, keep)


def with_split(duckdb: Engine, split: Any) -> Any:
    table = pa.table({"row": np.arange(len(split)), "split": pa.array(split, pa.int8())})
    return duckdb.load(next(NAMES), table)


def test_an_event_in_two_splits(duckdb: Engine) -> None:
    raw = raw_rows(duckdb, 0, user=["a"] * 4, item=["x", "y", "z", "z"], time=[1, 2, 3, 3])
    keep = make(clean={"duplicates": "keep"})
    with pytest.raises(
        DataError, match=r"2 of 2 validation .* row 2 and row 3.*duplicates = 'drop'"
    ):
        check_twins(duckdb, [raw], with_split(duckdb, [0, 0, 1, 2]), keep)
    check_twins(duckdb, [raw], with_split(duckdb, [1, 2, 0, 0]), keep)  # twins that train
    again = raw_rows(duckdb, 0, user=["a"] * 4, item=["x", "y", "z", "z"], time=[1, 2, 3, 4])
    check_twins(duckdb, [again], with_split(duckdb, [0, 0, 1, 2]), keep)  # seen twice


def test_rows_of_the_training_file_in_the_test_file(
    duckdb: Engine, random: np.random.Generator
) -> None:
    experiment = rows(split=FILES, features={"x": {}}, tasks=BINARY)
    train = random.normal(size=400)
    fresh, copied = random.normal(size=100), np.concatenate([random.normal(size=90), train[:10]])
    split = with_split(duckdb, [0] * 400 + [2] * 100)
    raw = raw_rows(duckdb, 0, x=train, y=[None] * 400)
    check_twins(duckdb, [raw, raw_rows(duckdb, 400, x=fresh, y=[None] * 100)], split, experiment)
    with pytest.raises(DataError, match=r"10 of 100 validation .* the training files"):
        check_twins(
            duckdb, [raw, raw_rows(duckdb, 400, x=copied, y=[None] * 100)], split, experiment
        )


@pytest.mark.parametrize("dropped", [False, True])
def test_people_who_give_the_same_answers(
    duckdb: Engine, random: np.random.Generator, dropped: bool
) -> None:
    """Rows that are equal by chance are so among the training rows as well."""
    answers = random.integers(0, 300, 1000)
    split = np.array([0] * 800 + [2] * 200)
    events = with_split(duckdb, split)
    if dropped:
        first = np.unique(answers[:800], return_index=True)[1]
        events = events.filter((events.split == 2) | events.row.isin(first.tolist()))
    raw = [raw_rows(duckdb, 0, x=answers[:800]), raw_rows(duckdb, 800, x=answers[800:])]
    experiment = rows(split=FILES, features={"x": {}}, tasks=BINARY)
    check_twins(duckdb, raw, events, experiment)


# --- The same through the whole preparation


def csv(**columns: Any) -> str:
    lines = zip(*(text(values) for values in columns.values()), strict=True)
    return (
        "\n".join([",".join(columns), *(",".join(cell or "" for cell in r) for r in lines)]) + "\n"
    )


def visits(random: np.random.Generator) -> dict[str, Any]:
    """30 users with 8 events each, over 25 items."""
    n = 240
    like = (random.random(n) < 0.4) * 1
    return {
        "user": np.repeat(np.arange(30), 8),
        "item": random.integers(0, 25, n),
        "like": like,
        "time": np.arange(n),
    }


@pytest.mark.slow
def test_a_label_among_the_rows_stops_preparation(
    tmp_path: Path, random: np.random.Generator
) -> None:
    like, x = random.integers(0, 2, 400), random.integers(0, 9, 400)
    experiment = of_kind()
    run(tmp_path, experiment, csv(x=x, like=like))
    with pytest.raises(DataError, match=r"feature 'x' .* task 'like'"):
        run(tmp_path, experiment, csv(x=x, like=x % 2))
    report = run(tmp_path, experiment, csv(x=x, like=like)).folder / "report.html"
    assert report.is_file()


def test_a_popularity_over_everything_stops_preparation(
    tmp_path: Path, random: np.random.Generator
) -> None:
    log = visits(random)
    last = np.arange(240) % 8 >= 6
    whole, before = (np.bincount(log["item"][keep], minlength=25) for keep in (last >= 0, ~last))
    experiment = make(
        data={"items": {"files": ["items.csv"]}},
        features={"popularity": {"on": "item", "kind": "numeric"}},
        tasks={"next": {"kind": "retrieval"}},
    )
    run(tmp_path, experiment, csv(**log), items_csv=csv(item=range(25), popularity=before))
    with pytest.raises(DataError, match=r"'popularity' .* number of events over all events"):
        run(tmp_path, experiment, csv(**log), items_csv=csv(item=range(25), popularity=whole))


@pytest.mark.slow
def test_innocent_columns_beside_leaks_in_a_preparation(tmp_path: Path) -> None:
    """One run names every refusal; a column is let through, and the rest is still looked at."""
    log = rare_log()
    mean = rare_means(np.arange(1000) >= 0)
    columns = {"vip": VIP, "none": np.zeros(200, int), "mean": mean, "short": np.round(mean, 2)}
    cells = {n: [None if np.isnan(v) else v for v in x] for n, x in columns.items()}
    users = csv(user=[f"u{u}" for u in range(200)], **cells)
    ids = {key: [f"{key[0]}{n}" for n in log[key]] for key in ("user", "item")}
    order = np.lexsort((np.arange(1000), log["user"]))  # the next label of the same user
    then = np.zeros(1000, int)
    then[order[:-1]] = np.where(np.diff(log["user"][order]) == 0, log["like"][order[1:]], 0)
    events = csv(**log | ids, copy=log["like"], then=then)

    def refused(features: list[str], allow: list[str]) -> list[str]:
        kinds = {name: {"on": "context", "kind": "numeric"} for name in features}
        kinds |= {"copy": {"on": "request"}} if "copy" in features else {}
        kinds |= {"then": {"on": "history"}} if "then" in features else {}
        experiment = make(
            data={"users": {"files": ["users.csv"]}},
            features=kinds,
            tasks=BINARY,
            split={"kind": "time"},
            guard={"allow": allow},
        )
        try:
            run(tmp_path, experiment, events, users_csv=users)
        except DataError as error:
            return re.findall(r"allow = \['(.*?)'\]", str(error))
        return []

    assert refused(["vip", "none"], []) == []
    every = ["copy/like", "mean/like", "short/like", "then/like"]
    assert refused([*columns, "copy", "then"], []) == every
    assert refused([*columns, "copy"], ["mean", "copy/like"]) == ["short/like"]


def test_a_column_with_the_next_item_stops_preparation(
    tmp_path: Path, random: np.random.Generator
) -> None:
    log = visits(random)
    last = np.arange(240) % 8 == 7
    experiment = make(features={"near": {"on": "history"}}, **HISTORY)
    before = np.where(np.arange(240) % 8 == 0, 99, np.roll(log["item"], 1))
    run(tmp_path, experiment, csv(**log, near=before))
    with pytest.raises(DataError, match=r"feature 'near' .* shows the future"):
        run(tmp_path, experiment, csv(**log, near=np.where(last, 99, np.roll(log["item"], -1))))


@pytest.mark.slow
def test_an_event_that_is_logged_twice_stops_preparation(
    tmp_path: Path, random: np.random.Generator
) -> None:
    log = visits(random)
    log["item"][::8] = log["item"][1::8]  # seen twice, at two times
    once = csv(**log)
    keep = make(clean={"duplicates": "keep"})
    run(tmp_path, keep, once)
    twice = once + once.splitlines()[-1] + "\n"
    with pytest.raises(DataError, match=r"equal in every column .* row 239 \(log.csv line 241\)"):
        run(tmp_path, keep, twice)
    run(tmp_path, make(), twice)  # the second one is dropped
