"""Rules of `clean.values`, columns of lists, and places with odd names: refused or understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_jax.data.new_rows import encode_requests
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from tests.data.small import LOG, make, rows, run

SIZES = "size,sold\n" + "".join(f"{n % 7 + 1},{n % 2}\n" for n in range(60)) + "999,1\n"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"valid": "rating + 1"}, "a condition is needed"),
        ({"low": 1}, "odd.column: needed"),
        ({"valid": "rating > 0", "action": "missing"}, "odd.column: needed"),
        ({"valid": "rating > 0", "low": 1}, "not both"),
        ({"column": "rating"}, "give low, high or both"),
        ({"column": "rating", "bounds": "quantiles", "high": 95}, "shares between 0 and 1"),
        ({"column": "rating", "bounds": "mad", "high": 5}, "takes deviations"),
        ({"column": "rating", "bounds": "mad", "deviations": 0}, "deviations: must be above 0"),
        ({"column": "rating", "low": 5, "high": 1}, "low is above high"),
    ],
)
def test_a_rule_that_says_too_little_or_too_much(
    tmp_path: Path, rule: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, make(clean={"values": {"odd": rule}}))


@pytest.mark.parametrize("bounds", [{"high": 9}, {"bounds": "quantiles", "high": 0.9}])
def test_new_rows_lose_the_values_that_training_rows_lost(
    tmp_path: Path, bounds: dict[str, Any]
) -> None:
    experiment = rows(
        tasks={"sold": {"kind": "binary"}},
        features={"size": {"kind": "numeric"}},
        clean={"values": {"odd": {"column": "size", "action": "missing", **bounds}}},
    )
    prepared = run(tmp_path, experiment, SIZES)
    fitted = [r.rule for r in prepared.manifest.report if "fitted" in r.rule]
    assert fitted == (["values: odd: fitted size <= 7"] if "bounds" in bounds else [])
    found = encode_requests(prepared, pa.table({"size": ["3", "999", None]}))["request_numbers"]
    np.testing.assert_array_equal(found[1], found[2])
    assert not np.array_equal(found[0], found[1])


@pytest.mark.parametrize("column", ["user", "rating", "weight"])
def test_lists_where_one_value_is_needed(tmp_path: Path, column: str) -> None:
    records = [{"user": f"u{n % 3}", "item": f"i{n}", "rating": 1, "time": n} for n in range(9)]
    records = [{**record, "weight": 2} for record in records]
    records[4] = {**records[4], column: [5, 6]}
    log = "\n".join(json.dumps(record) for record in records)
    experiment = make(
        data={"events": {"files": ["log.jsonl"], "format": "jsonl"}},
        tasks={"next": {"kind": "retrieval"}, "rating": {"kind": "regression"}},
        features={"weight": {"kind": "binned", "on": "history"}},
    )
    with pytest.raises(DataError, match=f"column '{column}' holds lists"):
        run(tmp_path, experiment, LOG, log_jsonl=log)


def test_lists_are_duplicates_if_they_have_the_same_elements_in_the_same_places(
    tmp_path: Path,
) -> None:
    tags = [["a", None], [None, "a"], ["a"], ["a", None], None, [], [], [None], None, [""]]
    record = {"user": "u", "item": "i", "time": 5}
    log = "\n".join(json.dumps(record | {"tags": cell}) for cell in tags)
    log += "".join(f'\n{{"user": "{u}", "item": "x", "time": {n}}}' for n, u in enumerate("vvvw"))
    experiment = make(data={"events": {"files": ["log.jsonl"], "format": "jsonl"}})
    prepared = run(tmp_path, experiment, LOG, log_jsonl=log)
    again = [rule for rule in prepared.manifest.report if rule.rule == "duplicate row"]
    table = pq.read_table(prepared.folder / "quarantine.parquet")
    assert table["row"].to_pylist() == [3, 6, 8, 9]  # "" is missing, as in every other cell
    assert [rule.rows for rule in again] == [4]


def test_a_rule_named_malformed_does_not_count_as_malformed(tmp_path: Path) -> None:
    rule = {"column": "rating", "low": 3}
    clean = {"values": {"malformed price": rule}, "max_bad_fraction": 0.0, "duplicates": "keep"}
    report = {r.rule: r.rows for r in run(tmp_path, make(clean=clean)).manifest.report}
    assert report["values: malformed price"] == 2


def test_quarantine_has_the_order_of_the_rows_over_all_reasons(tmp_path: Path) -> None:
    """Malformed lines, bad cells, repeated rows and rare users, in two files of events."""
    test = "user,item,rating,time\nb,y,2,8\n,x,1,1\nb\nb,y,2,8\nrare,x,1,1\n"
    log = "user,item,rating,time\nb\nrare,y,1,1\n,x,1,1\n" + LOG.partition("\n")[2]
    experiment = make(
        split={"kind": "files", "test_files": ["test.csv"], "validation": 0.3},
        clean={"min_user_events": 3, "max_bad_fraction": 0.5},
    )
    prepared = run(tmp_path, experiment, log, test_csv=test)
    table = pq.read_table(prepared.folder / "quarantine.parquet").drop_columns("evidence")
    few, core = "malformed line (too few cells)", "outside the core (clean.min_user_events = 3)"
    assert [tuple(r.values()) for r in table.to_pylist()] == [
        (0, "events", "log.csv", 2, few),
        (1, "events", "log.csv", 3, core),
        (2, "events", "log.csv", 4, "missing user"),
        (10, "events", "log.csv", 12, core),
        (12, "test", "test.csv", 3, "missing user"),
        (13, "test", "test.csv", 4, few),
        (14, "test", "test.csv", 5, "duplicate row"),
        (15, "test", "test.csv", 6, core),
    ]


def test_a_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "a[1]{b}*"
    odd.mkdir()
    (odd / "log.csv").write_text(LOG)
    assert prepare(make(), odd, odd / "out[2]").manifest.events == 8


@pytest.mark.parametrize(
    ("times", "unit", "message"),
    [
        (lambda n: 1_700_000_000_000 + n, "s", r"9 of 9 events are after the year 2199.*'ms' or"),
        (lambda n: 20240101 + n, "s", "looks like a date"),
        (lambda n: (1_700_000_000 + n) * (1000 if n == 4 else 1), "s", ""),
        (lambda n: 1_700_000_000_000 + n, "ms", ""),
    ],
)
def test_times_in_another_unit(tmp_path: Path, times: Any, unit: str, message: str) -> None:
    log = "user,item,time\n" + "".join(f"u{n % 3},i{n},{times(n)}\n" for n in range(9))
    experiment = make(data={"time_unit": unit})
    if message:
        with pytest.raises(DataError, match=message):
            run(tmp_path, experiment, log)
    else:
        late = [r.rows for r in run(tmp_path, experiment, log).manifest.report if "2199" in r.rule]
        assert late == ([1] if unit == "s" else [])


STARS = "user,item,time,stars\n" + "".join(
    f'u{k % 20},i{k % 13},{k},"{["4,5", "3", "n/a", "5"][k % 4]}"\n' for k in range(400)
)


def test_text_that_is_read_as_a_number_and_is_none_is_reported(tmp_path: Path) -> None:
    experiment = make(
        data={"derive": {"liked": "stars >= 4"}},
        tasks={"next": {"kind": "retrieval"}, "liked": {"kind": "binary"}},
        clean={"values": {"stars": {"column": "stars", "low": 1, "high": 9}}},
    )
    report = {r.rule: r for r in run(tmp_path, experiment, STARS).manifest.report}
    for rule in (
        "values: stars: stars is no number (left as it is)",
        "derive: liked = stars >= 4 has no value, its columns have",
    ):
        assert report[rule].rows == 200
        assert report[rule].examples[:2] == (
            "row 0 (log.csv line 2): '4,5'",
            "row 2 (log.csv line 4): 'n/a'",
        )


def test_ids_that_are_written_in_another_way(tmp_path: Path) -> None:
    items = "item,genre\n" + "".join(f"I{k},g\n" for k in range(13))
    experiment = make(data={"items": {"files": ["items.csv"]}}, features={"genre": {"on": "item"}})
    with pytest.raises(DataError, match=r"none of the 13 items .*'i\d+'.* are not among 'I0'"):
        run(tmp_path, experiment, STARS, items_csv=items)


def test_searches_whose_times_cannot_be_read(tmp_path: Path) -> None:
    queries = "user,time,query\n" + "".join(
        f"u{k % 20},{k if k % 2 else '01.02.2024'},q{k % 5}\n" for k in range(100)
    )
    experiment = make(
        data={"queries": {"files": ["q.csv"]}},
        features={"query": {"on": "history", "kind": "multi_valued"}},
    )
    with pytest.raises(DataError, match=r"query: malformed time: 50; .*q\.csv line 2.: '01\.02"):
        run(tmp_path, experiment, STARS, q_csv=queries)


def test_a_name_that_leaves_its_folder() -> None:
    with pytest.raises(ConfigError, match=r"name: '\.\./evil' names folders"):
        make(name="../evil")


@pytest.mark.parametrize("memory", ["4", "GB", "4 apples"])
def test_memory_that_is_no_size(tmp_path: Path, memory: str) -> None:
    (tmp_path / "log.csv").write_text(LOG)
    with pytest.raises(ConfigError, match="give a size with its unit"):
        prepare(make(), tmp_path, tmp_path / "out", memory=memory)
