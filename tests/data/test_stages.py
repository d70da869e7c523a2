"""The two stages of preparation: clean events are shared, prepared folders are chosen from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mtrec_jax.config import Experiment
from mtrec_jax.data.clean import Cleaned, clean, open_cleaned
from mtrec_jax.data.dataset import open_prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.data.prepare import prepare, up_to_date
from mtrec_jax.errors import ConfigError, DataError
from tests.data.small import LOG, make

TASKS: dict[str, Any] = {
    "next": {"kind": "retrieval"},
    "like": {"kind": "binary", "column": "rating", "at_least": 4},
    "top": {"kind": "binary", "column": "rating", "at_least": 5, "where": "like"},
}
FEATURES: dict[str, Any] = {
    "user": {},
    "shop": {"on": "request"},
    "hour": {"on": "request", "kind": "hour"},
    "price": {"on": "request", "kind": "piecewise", "bins": 2},
    "rating": {"on": "history"},
    "genre": {"on": "item"},
    "year": {"on": "item", "kind": "numeric"},
}
ITEMS = "item,genre,year\nx,drama,2000\ny,comedy,2010\nz,drama,1990\nw,,1999\n"


def whole(**sections: Any) -> Experiment:
    """A feature on every place, of whatever is not left out."""
    some, few = sections.pop("tasks", TASKS), sections.pop("features", FEATURES)
    tasks = {name: task for name, task in TASKS.items() if name in some}
    features = {name: feature for name, feature in FEATURES.items() if name in few}
    data = {"items": {"files": ["items.csv"]}, "derive": {"shop": "if_else(price > 12, 'a', 'b')"}}
    made = {"data": data | sections.pop("data", {}), "tasks": tasks, "features": features}
    return make(**made, **sections)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    first, *lines = LOG.splitlines()
    text = "\n".join([f"{first},price", *(f"{line},{10 + n}" for n, line in enumerate(lines))])
    (tmp_path / "log.csv").write_text(text + "\n")
    (tmp_path / "items.csv").write_text(ITEMS)
    return tmp_path


def folds(fold: int) -> Experiment:
    return make(split={"kind": "folds", "folds": 3, "fold": fold})


def test_three_folds_share_one_cleaned_stage(raw: Path) -> None:
    said: list[str] = []
    prepared = [prepare(folds(n), raw, raw / f"fold{n}", progress=said.append) for n in range(3)]
    read = [line for line in said if line.startswith("read events")]
    again = [line for line in said if "are used again" in line]
    assert (len(read), len(again)) == (1, 2)
    assert len([line for line in said if line.startswith("clean: 8 events in ")]) == 3
    assert len([line for line in said if line.startswith("fit: ")]) == 3
    assert len({p.manifest.cleaned for p in prepared}) == 1
    assert len({p.manifest.fingerprint for p in prepared}) == 3
    tests = [set(p.interactions("test")["row"].tolist()) for p in prepared]
    assert sorted(set.union(*tests)) == list(range(8))
    alone = prepare(folds(2), raw, raw / "alone", cleaned=raw / "another")
    files = [p.relative_to(alone.folder) for p in alone.folder.rglob("*") if p.is_file()]
    assert (raw / "another" / "cleaned.json").is_file()
    for file in files:
        assert (alone.folder / file).read_bytes() == (raw / "fold2" / file).read_bytes(), file


def cleaned(raw: Path, experiment: Experiment | None = None, **more: Any) -> tuple[Cleaned, bool]:
    """The clean events, and whether they were those of before."""
    said: list[str] = []
    found = clean(experiment or make(), raw, raw / "clean", progress=said.append, **more)
    return found, any("are used again" in line for line in said)


@pytest.mark.parametrize(
    "file", ["events/part.parquet", "quarantine.parquet", "events/more.parquet", "cleaned.json"]
)
def test_what_was_changed_is_not_trusted(raw: Path, file: str) -> None:
    first, _ = cleaned(raw)
    assert cleaned(raw)[1]
    content = {p: p.read_bytes() for p in first.folder.rglob("*") if p.is_file()}
    path = first.folder / file
    whole = path.read_bytes() if path.exists() else b""
    path.write_bytes(whole[:-3] + b"abc")
    _, used = cleaned(raw)
    assert not used
    assert {p: p.read_bytes() for p in first.folder.rglob("*") if p.is_file()} == content


@pytest.mark.slow
def test_other_bytes_and_another_meaning_are_cleaned_anew(raw: Path) -> None:
    first, _ = cleaned(raw)
    for experiment, same in (
        (folds(1), True),
        (make(data={"history_length": 2, "past": "frozen", "hide_ties": True}), True),
        (make(clean={"min_user_events": 2}), False),
        (make(tasks={"like": {"kind": "regression", "column": "rating"}}), False),
        (make(features={"rating": {"on": "history"}}), False),
        (make(clean={"latest": "now"}), False),
    ):
        cleaned(raw)
        assert cleaned(raw, experiment)[1] == same
    cleaned(raw)
    (raw / "log.csv").write_text((raw / "log.csv").read_text() + "d,x,1,1,9\n")
    second, used = cleaned(raw)
    assert not used
    assert (first.notes.events, second.notes.events) == (8, 9)
    assert first.notes.fingerprint != second.notes.fingerprint


@pytest.mark.slow
def test_now_is_another_one_where_rows_lay_in_the_future(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = make(clean={"latest": "now"})
    assert [cleaned(raw, now)[1] for _ in range(2)] == [False, True]
    with (raw / "log.csv").open("a") as file:
        file.write("d,x,1,4e9,1\n")  # in 2096
    assert [cleaned(raw, now)[1] for _ in range(2)] == [False, True]
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert not cleaned(raw, now)[1]


@pytest.mark.slow
def test_equal_bytes_with_other_events_are_other_data(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = make(clean={"latest": "now"}), []
    with (raw / "log.csv").open("a") as file:
        file.write("a,late,1,4e9,1\nb,later,1,5e9,1\n")  # in 2096 and 2128
    for seconds in (1e9, 2e9, 4.1e9, 6e9):
        monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
        m = prepare(now, raw, raw / "out").manifest
        said.append((m.events, m.fingerprint, m.cleaned))
    events, *fingerprints = zip(*said, strict=True)
    assert events == (8, 8, 9, 10)
    for of in fingerprints:
        assert of[0] == of[1]
        assert len(set(of)) == 3


@pytest.mark.slow
def test_the_split_belongs_to_it_where_cleaning_depends_on_it(raw: Path) -> None:
    bounds = {"values": {"odd": {"column": "rating", "bounds": "quantiles", "high": 0.9}}}
    for seed, same in ((0, False), (0, True), (1, False)):
        split = {"kind": "random", "validation": 0.3, "test": 0.2, "seed": seed}
        assert cleaned(raw, make(clean=bounds, split=split))[1] == same
    for file in "ab":
        (raw / f"{file}.csv").write_text("user,item,rating,time,price\na,x,2,20,9\n")
    for seed, file, same in ((0, "a", False), (1, "a", True), (1, "b", False)):
        split = {"kind": "files", "test_files": [f"{file}.csv"], "validation": 0.3, "seed": seed}
        assert cleaned(raw, make(split=split))[1] == same


def test_a_foreign_folder_is_not_replaced_and_a_failure_leaves_the_old_one(raw: Path) -> None:
    (raw / "clean").mkdir()
    (raw / "clean" / "thesis.txt").write_text("dear to me")
    with pytest.raises(DataError, match=r"clean exists and is no cleaned folder \(no cleaned.json"):
        cleaned(raw)
    (raw / "clean" / "thesis.txt").unlink()
    first, _ = cleaned(raw)
    (raw / "log.csv").write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match="no column 'time'"):
        cleaned(raw)
    assert open_cleaned(first.folder).notes == first.notes
    assert sorted(p.name for p in raw.iterdir()) == ["clean", "items.csv", "log.csv"]


@pytest.mark.slow
def test_tables_in_memory_leave_a_cleaned_stage_only_where_asked(raw: Path) -> None:
    events = pd.read_csv(raw / "log.csv")
    prepare(make(), None, raw / "out", {"events": events})
    assert not (raw / "cleaned").exists()
    for same in (False, True):
        _, used = cleaned(raw, tables={"events": events})
        assert used == same
    _, used = cleaned(raw, tables={"events": events.assign(rating=1)})
    assert not used


def test_keys_that_change_nothing_in_a_folder_leave_it_up_to_date(raw: Path) -> None:
    first = prepare(make(), raw, raw / "out")
    other = make(data={"public": "ml-1m", "reference": "the old system"})
    assert up_to_date(other, raw, raw / "out") == first
    assert prepare(other, raw, raw / "again").manifest.fingerprint == first.manifest.fingerprint


# --- Views of a prepared folder


def test_a_view_has_the_tasks_and_features_of_its_experiment(raw: Path) -> None:
    prepared = prepare(whole(), raw, raw / "out")
    every = prepared.chosen(whole())
    names = ["user", "shop", "hour", "price", "genre", "year", "rating"]
    assert [f.name for f in every.manifest.fields] == names
    some = prepared.chosen(whole(tasks=["like"], features=["rating", "year", "price"]))
    assert list(some.manifest.tasks) == ["like"]
    assert [f.name for f in some.manifest.fields] == ["price", "year", "rating"]
    assert some.manifest.fingerprint == prepared.manifest.fingerprint
    assert some.columns() == [
        *("user", "request_price", "event_item", "event_rating", "cutoff", "candidate"),
        *("label_like", "row"),
    ]
    full, part = (BatchSource(view, "train", 2)[0] for view in (every, some))
    assert part.context == {}
    assert part.request.keys() == {"numbers"}
    np.testing.assert_array_equal(part.request["numbers"], full.request["numbers"])
    np.testing.assert_array_equal(part.events["ids"], full.events["ids"])
    np.testing.assert_array_equal(part.labels["like"], full.labels["like"])
    assert {name: a.shape[1] for name, a in some.catalogue().items()} == {"ids": 0, "numbers": 1}
    assert some.chosen(whole(tasks=["like"], features=["year"])).manifest.fields[0].name == "year"
    assert set(some.users.column_names) == {"id", "event_item", "event_rating", "split"}
    assert set(some.items.column_names) == {"id", "title", "count", "item_year"}
    assert set(some.interactions("train")) == {"user", "candidate", "row", "label_like"}


@pytest.mark.slow
def test_a_view_is_in_the_order_of_its_experiment(raw: Path) -> None:
    prepared = prepare(whole(), raw, raw / "out")
    turned = dataclasses.replace(
        whole(), features=dict(reversed(whole().features.items())), tasks=whole().tasks
    )
    view = prepared.chosen(turned)
    assert [f.name for f in view.manifest.request_ids] == ["hour", "shop"]
    one, other = (BatchSource(p, "train", 2)[0].request["ids"] for p in (prepared, view))
    np.testing.assert_array_equal(one, other[..., ::-1])


def test_a_task_keeps_its_sample_space_without_the_task_that_defines_it(raw: Path) -> None:
    prepared = prepare(whole(), raw, raw / "out")
    top = {"top": {n: v for n, v in TASKS["top"].items() if n != "where"}}
    base = whole(features=["year"])
    alone = dataclasses.replace(base, tasks={"top": make(tasks=top).tasks["top"]})
    view = prepared.chosen(alone)
    np.testing.assert_array_equal(
        view.interactions("train")["label_top"], prepared.interactions("train")["label_top"]
    )
    both = {"like": base.tasks["like"], "top": alone.tasks["top"]}
    with pytest.raises(ConfigError, match=r"tasks\.top\.where: 'like' there, '' here"):
        prepared.chosen(dataclasses.replace(base, tasks=both))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"history_length": 2}}, "data.history_length: 3 there, 2 here"),
        ({"data": {"past": "frozen"}}, "data.past: 'rolling' there, 'frozen' here"),
        ({"split": {"kind": "random"}}, "split.kind: 'leave_one_out' there, 'random' here"),
        ({"clean": {"min_user_events": 2}}, "clean.min_user_events: 0 there, 2 here"),
    ],
)
def test_a_folder_of_another_experiment(raw: Path, sections: dict[str, Any], message: str) -> None:
    few = {"tasks": ["next", "like"], "features": ["rating"]}
    prepared = prepare(whole(**few), raw, raw / "out")
    with pytest.raises(ConfigError, match=message):
        prepared.chosen(whole(**few, **sections))


def test_what_a_folder_lacks_or_means_otherwise(raw: Path) -> None:
    prepared = prepare(whole(tasks=["next"], features=["rating"]), raw, raw / "out")
    with pytest.raises(ConfigError, match=r"(?s)tasks\.like: not there.*features\.year: not there"):
        prepared.chosen(whole(tasks=["like"], features=["rating", "year"]))
    hashed = make(features={"rating": {"on": "history", "kind": "hashed"}}).features
    other = dataclasses.replace(whole(tasks=["next"]), features=hashed)
    with pytest.raises(
        ConfigError, match=r"features\.rating\.kind: 'categorical' there, 'hashed' h"
    ):
        prepared.chosen(other)
    free = dataclasses.replace(whole().data, public="x", reference="y")
    same = dataclasses.replace(whole(tasks=["next"], features=["rating"]), data=free)
    assert open_prepared(prepared.folder).chosen(same).manifest == prepared.manifest
