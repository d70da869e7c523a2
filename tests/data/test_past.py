"""Counts, rates and gaps against plain loops; nothing is known before it has happened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.config import Experiment
from mtrec_jax.data import past, schema
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.examples import mix
from mtrec_jax.data.features import Hour, Weekday
from mtrec_jax.data.new_rows import encode_requests
from mtrec_jax.data.prepare import prepare
from tests.data.small import joined, make, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
SEEN = {  # {data.past: {split: what its events may know}}
    "rolling": {0: (0,), 3: (0, 1, 3), 1: (0, 1, 3), 2: (0, 1, 2, 3)},
    "frozen": {0: (0,), 3: (0, 3), 1: (0, 3), 2: (0, 1, 3)},
}
Event = tuple[str | None, float, float | None, int]  # key, time, label, split


def declared(kind: str, smoothing: float, past: str = "rolling") -> Experiment:
    past_features: dict[str, Any] = {
        "count": {"kind": "past_count", "column": "item", "on": "history"},
        "rate": {"kind": "past_rate", "column": "item", "label": "like", "on": "history"},
        "gap": {"kind": "gap", "on": "history"},
    }
    past_features["rate"]["smoothing"] = smoothing
    data: dict[str, Any] = {"past": past}
    if kind == "random":
        data["history_length"] = 0
        for feature in past_features.values():
            feature["on"] = "request"
    return make(
        data=data,
        tasks={"like": {"kind": "regression"}},
        features=past_features,
        split={"kind": kind},
        model={"encoder": "none"} if kind == "random" else {},
    )


def table(events: list[Event]) -> pa.Table:
    keys, times, labels, splits = zip(*events, strict=True)
    n = len(events)
    return pa.table(
        {
            "row": pa.array(range(n), pa.int64()),
            "user": [f"u{row % 3}" for row in range(n)],
            "time": pa.array(times, pa.float64()),
            "split": pa.array(splits, pa.int8()),
            "label_like": pa.array(labels, pa.float64()),
            "feature_count": pa.array(keys, pa.string()),
            "feature_rate": pa.array(keys, pa.string()),
        }
    )


def found(engine: Engine, events: list[Event], experiment: Experiment) -> dict[str, list[Any]]:
    told = past.add(engine, engine.load("split", table(events)), experiment)
    names = [f"feature_{name}" for name in experiment.features]
    answer: dict[str, list[Any]] = told.order_by("row").select(*names).to_pyarrow().to_pydict()
    return answer


def by_hand(
    events: list[Event], kind: str, smoothing: float, past_is: str = "rolling"
) -> dict[str, list[Any]]:
    """The definition, event by event."""
    trained = [label for _, _, label, split in events if split == 0 and label is not None]
    prior = sum(trained) / max(len(trained), 1)
    counts: list[float | None] = []
    rates: list[float | None] = []
    gaps: list[float | None] = []
    folds = [int(mix(row, 0)) % past.FOLDS for row in range(len(events))]
    for row, (key, time, _, split) in enumerate(events):
        if kind == "random":
            known = [
                label
                for other, (k, _, label, s) in enumerate(events)
                if k == key and s == 0 and (split != 0 or folds[other] != folds[row])
            ]
        else:
            may = SEEN[past_is][split]
            known = [lab for k, t, lab, s in events if k == key and t < time and s in may]
        labels = [label for label in known if label is not None]
        weight = len(labels) + smoothing
        mean = (sum(labels) + smoothing * prior) / weight if weight else None
        counts.append(None if key is None else float(len(known)))
        rates.append(None if key is None else mean)
        may = SEEN[past_is][split]
        own = [(t, r) for r, (_, t, _, s) in enumerate(events) if r % 3 == row % 3 and s in may]
        before = [t for t, r in own if (t, r) < (time, row)]
        gaps.append(time - max(before) if before else None)
    return {"feature_count": counts, "feature_rate": rates, "feature_gap": gaps}


def same(found: dict[str, list[Any]], wanted: dict[str, list[Any]]) -> None:
    for name, values in wanted.items():
        assert [v is None for v in found[name]] == [v is None for v in values], name
        for value, expected in zip(found[name], values, strict=True):
            if expected is not None:
                assert value == pytest.approx(expected, rel=1e-6, abs=1e-9), name


EXAMPLE: list[Event] = [
    ("x", 1, 1, 0),
    ("x", 2, 0, 0),
    ("x", 2, 1, 0),  # at the same moment: neither knows of the other
    ("y", 3, 1, 0),
    (None, 3, 1, 0),
    ("x", 4, None, 1),
    ("x", 5, 1, 1),
    ("x", 6, 0, 2),
    ("x", 7, 1, 0),  # trains, so that it knows of training events only
]


def test_strictly_earlier(duckdb: Engine) -> None:
    told = found(duckdb, EXAMPLE, declared("leave_one_out", smoothing=2.0))
    assert told["feature_count"] == [0, 1, 1, 0, None, 3, 4, 5, 3]
    prior = 5 / 6
    sums = [(0, 0), (1, 1), (1, 1), (0, 0), None, (2, 3), (2, 3), (3, 4), (2, 3)]
    wanted = [None if s is None else (s[0] + 2 * prior) / (s[1] + 2) for s in sums]
    same(told, {"feature_rate": wanted})
    assert told["feature_gap"] == [None, None, None, 2, 1, 2, 2, 3, 5]  # users u0, u1, u2 in turn
    without = found(duckdb, EXAMPLE, declared("leave_one_out", smoothing=0.0))
    assert without["feature_rate"][0] is None  # the mean of nothing
    assert without["feature_rate"][1:3] == [1, 1]


log_of_events = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b"]),
        st.integers(0, 5).map(float),
        st.sampled_from([None, 0.0, 1.0, 0.3, -2.5]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=25,
)
quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quick
@given(log_of_events, st.sampled_from([0.0, 0.5, 20.0]))
@pytest.mark.parametrize(
    ("kind", "past"),
    [
        ("leave_one_out", "rolling"),
        pytest.param("random", "rolling", marks=pytest.mark.slow),
        ("time", "frozen"),
    ],
)
def test_against_a_loop(
    duckdb: Engine, kind: str, past: str, events: list[Event], smoothing: float
) -> None:
    told = found(duckdb, events, declared(kind, smoothing, past))
    same(told, by_hand(events, kind, smoothing, past))


@quick
@given(log_of_events, st.integers(0, 5), st.data())
def test_no_future(duckdb: Engine, events: list[Event], now: int, data: st.DataObject) -> None:
    """What happens from `now` on changes nothing up to `now`; without smoothing towards a mean."""
    other = [
        (key, time, data.draw(st.sampled_from([0.0, 1.0])) if time >= now else label, split)
        for key, time, label, split in events
    ]
    experiment = declared("leave_one_out", smoothing=0.0)
    first, second = (found(duckdb, version, experiment) for version in (events, other))
    for row, event in enumerate(events):
        if event[1] <= now:
            for name in ("feature_count", "feature_gap"):
                assert first[name][row] == second[name][row]
            pair = [v if v is None else round(v, 6) for v in
                    (first["feature_rate"][row], second["feature_rate"][row])]  # fmt: skip
            assert pair[0] == pair[1]


@pytest.mark.filterwarnings("ignore")  # PySpark's own, of pandas 3
@pytest.mark.slow  # tests/data/test_engines.py compares a folder with rates
@pytest.mark.parametrize("kind", ["leave_one_out", "random"])
def test_engines_give_equal_floats(duckdb: Engine, spark: Engine, kind: str) -> None:
    rng = np.random.default_rng(3)
    events: list[Event] = [
        (f"k{key}" if key else None, float(time), None if label > 9 else float(label), int(split))
        for key, time, label, split in zip(
            rng.integers(0, 7, 400),
            rng.integers(0, 90, 400),
            rng.normal(size=400) * 7,
            rng.integers(0, 4, 400),
            strict=True,
        )
    ]
    experiment = declared(kind, smoothing=0.7)
    first, second = (found(engine, events, experiment) for engine in (duckdb, spark))
    assert first == second
    finals = [past.final(e.load("split", table(events)), experiment) for e in (duckdb, spark)]
    assert {n: t.to_pydict() for n, t in finals[0].items()} == {
        n: t.to_pydict() for n, t in finals[1].items()
    }
    assert bool(finals[0]) == (kind == "random")  # sequences have no new rows


@pytest.mark.filterwarnings("ignore")  # PySpark's own, of pandas 3
@pytest.mark.parametrize("engine", ["duckdb", pytest.param("spark", marks=pytest.mark.slow)])
def test_hours_and_weekdays(engine: str, request: pytest.FixtureRequest) -> None:
    times = pa.table({"time": [0.0, 3599.9, 1_700_000_000.0, -1.0, 1e35, None]})  # a Tuesday, 22:13
    time = request.getfixturevalue(engine).load("times", times).time
    for feature, wanted in (
        (Hour(on="request"), ["0", "0", "22", "23", None, None]),
        (Weekday(on="request"), ["3", "3", "1", "2", None, None]),
    ):
        told = time.name("time").as_table().select(time, text=schema.clock(feature, time))
        answer = {r["time"]: r["text"] for r in told.to_pyarrow().to_pylist()}
        assert answer == dict(zip(times["time"].to_pylist(), wanted, strict=True))


ROWS = """user,shop,time,hit,hour
a,s,10,1,10
a,s,20,0,20
b,s,20,1,20
b,t,50,1,50
"""


def test_rows_and_what_new_rows_are_told(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(ROWS)
    (tmp_path / "test.csv").write_text(ROWS.splitlines()[0] + "\na,s,60,0,60\nc,,65,0,65\n")
    (tmp_path / "valid.csv").write_text(ROWS.splitlines()[0] + "\nb,t,55,0,55\n")
    experiment = rows(
        data={"user": "user", "time": "time"},
        tasks={"hit": {"kind": "binary"}},
        features={
            "seen": {"kind": "past_count", "column": "shop"},
            "rate": {"kind": "past_rate", "column": "shop", "label": "hit", "smoothing": 1.0},
            "gap": {"kind": "gap", "bins": 2},
            "hour": {"kind": "hour"},
        },
        split={"kind": "files", "test_files": ["test.csv"], "validation_files": ["valid.csv"]},
    )
    prepared = prepare(experiment, tmp_path, tmp_path / "out")
    m = prepared.manifest
    assert [f.name for f in m.request_numbers] == ["seen", "rate"]
    assert [(f.name, f.size) for f in m.request_ids] == [("gap", 4), ("hour", 26)]
    prior = 0.75
    told = {  # training events in order
        "seen": np.log1p([0, 1, 1, 0]),
        "rate": np.array([prior, (1 + prior) / 2, (1 + prior) / 2, prior]),
    }
    for field, values in zip(m.request_numbers, told.values(), strict=True):
        assert field.mean == pytest.approx(np.mean(values), rel=1e-6)
        assert field.std == pytest.approx(np.std(values), rel=1e-6)
    assert prepared.vocabulary("gap")["value"].to_pylist() == ["10.0", "30.0"]

    def scaled(count: float, rate: float) -> list[float]:
        values = (math.log1p(count), rate)
        fields = m.request_numbers
        return [(v - f.mean) / f.std for v, f in zip(values, fields, strict=True)]

    [test] = prepared.blocks("test")
    order = np.argsort(test["row"][:, 0])
    wanted = np.array([scaled(3, (2 + prior) / 4), [0, 0]])  # no shop: missing
    np.testing.assert_allclose(joined(prepared, test, "request_numbers")[order], wanted, rtol=1e-5)
    assert joined(prepared, test, "request_ids")[order].tolist() == [
        [3, 2],
        [0, 2],
    ]  # 40 s ago, or never before
    last = pq.read_table(prepared.folder / "past" / "gap.parquet").to_pydict()
    assert last == {"value": ["a", "b", None], "number": [20.0, 50.0, None]}
    new = pa.table({"user": ["b", "b", "z"], "shop": ["t", "new", None], "time": [95, 61, 9]})
    encoded = encode_requests(prepared, new)
    wanted = np.array([scaled(1, (1 + prior) / 2), scaled(0, prior), [0, 0]])
    np.testing.assert_allclose(encoded["request_numbers"], wanted, rtol=1e-5)
    assert encoded["request_ids"].tolist() == [[3, 2], [2, 2], [0, 2]]  # 34 s, 11 s, never


@pytest.mark.parametrize(
    ("past_is", "gaps"),
    [("rolling", [None, 20, 30, 30, 10, 60, 10]), ("frozen", [None, 20, 30, 30, 40, 60, 10])],
)
def test_gaps_of_training_do_not_tell_of_held_out_events(
    duckdb: Engine, past_is: str, gaps: list[float | None]
) -> None:
    """A split by items: one that trains follows one that is held out."""
    events = pa.table(
        {
            "row": range(7),
            "user": ["a"] * 7,
            "time": [10.0, 30.0, 40.0, 70.0, 80.0, 100.0, 110.0],
            "split": pa.array([0, 1, 0, 1, 1, 0, 2], pa.int8()),
        }
    )
    split = {"kind": "cold_item", "validation": 0.3, "test": 0.2}
    gap = {"kind": "gap", "on": "request"}
    only = make(data={"past": past_is}, features={"gap": gap}, split=split)
    told = past.add(duckdb, duckdb.load("split", events), only).order_by("row").to_pyarrow()
    assert told["feature_gap"].to_pylist() == gaps


PASSING = """user,item,like,time
a,x,1,1
b,x,0,2
a,y,1,3
b,x,1,4
a,x,0,5
a,x,1,6
b,x,1,7
a,x,0,8
a,x,1,9
a,x,1,10
"""  # five train, three validate, two test
USERS = "ababaabaaa"
TOLD: dict[str, dict[str, Any]] = {  # of the judged events, rows 5 .. 9
    "rolling": {
        "count": [4, 5, 6, 7, 8],  # earlier events of x, whatever their split
        "rate": [2.6 / 5, 3.6 / 6, 4.6 / 7, 4.6 / 8, 5.6 / 9],  # the prior .6 counts as one event
        "past": ["xyx", "xx", "xyxx", "xyxxx", "xyxxxx"],
        "gap": [1, 3, 2, 1, 1],
    },
    "frozen": {
        "count": [4, 4, 4, 7, 7],  # those that train; for the test those that validate, too
        "rate": [2.6 / 5, 2.6 / 5, 2.6 / 5, 4.6 / 8, 4.6 / 8],
        "past": ["xyx", "xx", "xyx", "xyxxx", "xyxxx"],
        "gap": [1, 3, 3, 1, 2],
    },
}


@pytest.mark.parametrize("past_is", ["rolling", "frozen"])
def test_rolling_and_frozen_pasts_by_hand(tmp_path: Path, duckdb: Engine, past_is: str) -> None:
    """Of histories, counts, rates and gaps; on the request, and at the events of histories."""
    (tmp_path / "log.csv").write_text(PASSING)
    of = {"column": "item", "label": "like", "smoothing": 1.0}
    features = {
        "count": {"kind": "past_count", "on": "request", "column": "item"},
        "rate": {"kind": "past_rate", "on": "request", **of},
        "gap": {"kind": "gap", "on": "request", "bins": 2},
        "then": {"kind": "past_count", "on": "history", "column": "item", "bins": 8},
    }
    experiment = make(
        data={"past": past_is, "history_length": 8},
        tasks={"like": {"kind": "binary"}},
        features=features,
        split={"kind": "time", "validation": 0.3, "test": 0.2},
    )
    prepared = prepare(experiment, tmp_path, tmp_path / "out")
    m, told = prepared.manifest, TOLD[past_is]
    text = "past frozen at the split" if past_is == "frozen" else "rolling past"
    assert m.protocol == (
        f"split at two points in time (0.3 validation, 0.2 test), {text}, 2 users, 2 items, "
        "10 events"
    )
    assert m.config["data"]["past"] == past_is
    names = {i: raw for raw, i in prepared.item_ids.items()}
    edges = np.array([float(v) for v in prepared.vocabulary("then")["value"].to_pylist()])
    bins = np.searchsorted(edges, [0, 1, 0, 2, 3, *told["count"]], side="right") + 1
    rows: list[int] = []
    for block in [*prepared.blocks("validation"), *prepared.blocks("test")]:
        numbers = joined(prepared, block, "request_numbers")
        for n, row in enumerate(block["row"][:, 0]):
            rows.append(int(row))
            count, rate = told["count"][row - 5], told["rate"][row - 5]
            wanted = (
                (value - f.mean) / f.std
                for value, f in zip((math.log1p(count), rate), m.request_numbers, strict=True)
            )
            np.testing.assert_allclose(numbers[n], list(wanted), rtol=1e-5)
            shown = "".join(names[i] for i in block["event_item"][n] if i)
            assert shown == told["past"][row - 5]
            assert block["cutoff"][n] == len(shown)
            own = [r for r in range(row) if USERS[r] == USERS[row]]
            if past_is == "frozen":
                own = [r for r in own if r < (5 if row < 8 else 8)]
            assert block["event_then"][n][: len(shown)].tolist() == bins[own].tolist()
    assert sorted(rows) == [5, 6, 7, 8, 9]
    events = pa.table(
        {
            "row": range(10),
            "user": list(USERS),
            "time": np.arange(1.0, 11.0),
            "split": pa.array([0] * 5 + [1] * 3 + [2] * 2, pa.int8()),
        }
    )
    only = make(data={"past": past_is}, features={"gap": features["gap"]})
    gaps = past.add(duckdb, duckdb.load("split", events), only).order_by("row").to_pyarrow()
    assert gaps["feature_gap"].to_pylist()[5:] == told["gap"]
