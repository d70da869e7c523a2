"""New raw rows: the suffix says the format, errors name the file, nothing unreadable passes."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.new_rows import encode_requests, read_columns, with_events
from mtrec_jax.errors import DataError
from tests.data.small import LOG, make, rows, run

TEXT = "colour,size,age,at,sold\n" + "".join(
    f"{('red', 'blue')[n % 2]},{n % 5 + 0.5},{n},{n},{n % 2}\n" for n in range(40)
)


def prepared_rows(folder: Path, text: str = TEXT, **events: Any) -> Prepared:
    experiment = rows(
        data={"time": "at", "events": {"files": ["log.csv"], **events}},
        tasks={"sold": {"kind": "binary"}},
        features={
            "colour": {},
            "size": {"kind": "numeric"},
            "age": {"kind": "binned", "bins": 4},
        },
    )
    return run(folder, experiment, text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared_rows(tmp_path_factory.mktemp("plain"))


def write(table: pa.Table, path: Path) -> None:
    """The table in the format of the file's suffix."""
    frame = table.to_pandas()
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif ".jsonl" in path.name:
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in path.name else ",")


NEW = pa.table({"size": [1.5, None], "colour": ["blue", "red"], "age": [3, 9], "at": [1, 2]})
NAMES = ["new.csv", "new.tsv", "new.jsonl", "new.parquet", "new.csv.gz", "new.jsonl.gz", "NEW.CSV"]


@pytest.mark.parametrize(
    "events",
    [
        {},
        pytest.param({"separator": ";"}, marks=pytest.mark.slow),
        pytest.param(
            {"separator": ", ", "header": ["colour", "size", "age", "at", "sold"]},
            marks=pytest.mark.slow,
        ),
        pytest.param({"format": "tsv"}, marks=pytest.mark.slow),
    ],
)
def test_the_suffix_says_the_format(tmp_path: Path, events: dict[str, Any]) -> None:
    mark = events.get("separator") or ("\t" if events else ",")
    text = TEXT.replace(",", mark)
    text = text.partition("\n")[2] if "header" in events else text
    prepared = prepared_rows(tmp_path, text, **events)
    expected = encode_requests(prepared, NEW)
    for name in NAMES:
        write(NEW, tmp_path / name)
        for array, wanted in encode_requests(prepared, tmp_path / name).items():
            np.testing.assert_array_equal(wanted, expected[array], err_msg=name)
    # the training files' own separator and header are understood too
    for name in ("again.csv", "again.txt"):
        (tmp_path / name).write_text(text)
        assert len(encode_requests(prepared, tmp_path / name)["user"]) == 40


def test_pairs_have_the_format_of_their_suffix(tmp_path: Path) -> None:
    experiment = make(data={"events": {"files": ["log"], "separator": "::"}})
    pairs = pa.table({"item": ["x", "y"], "user": ["a", None]})
    for name in ("pairs.csv", "pairs.tsv", "pairs.jsonl", "pairs.parquet"):
        write(pairs, tmp_path / name)
        found = read_columns(experiment, tmp_path / name, ["user", "item"])
        assert found.to_pydict() == {"user": ["a", None], "item": ["x", "y"]}
    (tmp_path / "bad.parquet").write_text("item,user\n1,2\n")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as Parquet"):
        read_columns(experiment, tmp_path / "bad.parquet", ["user", "item"])


def refused(prepared: Prepared, path: Path) -> str:
    with pytest.raises(DataError) as error:
        encode_requests(prepared, path)
    assert "data.rows" not in str(error.value)
    return str(error.value)


def test_errors_name_the_file(plain: Prepared, tmp_path: Path) -> None:
    new = tmp_path / "new.csv"
    assert refused(plain, tmp_path / "absent.csv").endswith("absent.csv: there is no such file.")
    new.write_text("color,size,age,at\nred,1,1,1\n")
    message = f"{new}: no column 'colour' (features.colour) in new.csv. Did you mean 'color'?"
    assert message in refused(plain, new)
    new.write_text("colour,size,age,at\nred,1\n")
    assert re.search(r"every line of .*new\.csv is malformed", refused(plain, new))
    new.write_text("colour,size,age,at\nred,1,1,1\nred,1\n")
    assert f"{new}: 1 malformed line" in refused(plain, new)
    with gzip.open(tmp_path / "new.csv.gz", "wt") as file:
        file.write("colour,size\nred,1\n")
    assert "new.csv.gz: no column 'age'" in refused(plain, tmp_path / "new.csv.gz")


@pytest.mark.slow
@pytest.mark.parametrize("value", ["abc", "nan", "1e99", "1_0"])
@pytest.mark.parametrize(("column", "rest"), [("size", "1,1"), ("age", "2,1")])
def test_what_is_no_number_is_no_missing_number(
    plain: Prepared, tmp_path: Path, column: str, rest: str, value: str
) -> None:
    other = "age" if column == "size" else "size"
    path = tmp_path / "new.csv"
    path.write_text(f"{column},{other},at,colour\n1,1,1,red\n,1,2,red\n{value},{rest},\n")
    with pytest.raises(DataError) as error:
        encode_requests(plain, path)
    assert str(error.value) == (
        f"row 2 (new.csv line 4): column '{column}' holds '{value}', but feature '{column}' needs "
        "a number. Mend the cell, or leave it empty where the number is missing"
    )
    table = pd.DataFrame({column: [value, value], other: 1, "at": 1, "colour": "red"})
    with pytest.raises(DataError, match=f"row 0: column '{column}' holds '{value}', and 1 more"):
        encode_requests(plain, table)


def test_what_is_no_time_is_refused(plain: Prepared) -> None:
    new = pd.DataFrame({"size": 1, "age": 1, "at": ["1", "soon"], "colour": "red"})
    with pytest.raises(DataError, match=r"row 1: column 'at' holds 'soon', which is no time"):
        encode_requests(plain, new)
    with pytest.raises(DataError, match=r"after the year 2199.*Write them in 's'"):
        encode_requests(plain, new.assign(at=1794181551000))


def test_new_rows_may_lack_what_only_derived_labels_are_made_of(tmp_path: Path) -> None:
    experiment = rows(
        data={"derive": {"large": "size >= 2", "bought": "sold == 1"}},
        tasks={"bought": {"kind": "binary"}},
        features={"colour": {}, "large": {}},
    )
    prepared = run(tmp_path, experiment, TEXT)
    new = pa.table({"colour": ["red", "blue"], "size": [4.0, 1.0]})
    local = encode_requests(prepared, new)["request_ids"]
    large = {v.as_py(): i + 2 for i, v in enumerate(prepared.vocabulary("large")["value"])}
    assert local[:, 1].tolist() == [large["1"], large["0"]]
    with pytest.raises(DataError, match="no column 'large'"):
        encode_requests(prepared, new.drop_columns("size"))


def test_events_lose_what_rules_take_away(tmp_path: Path) -> None:
    """Also of labels, and where the columns of other rules and of derived labels are not there."""
    experiment = make(
        data={"derive": {"dear": "if_else(price > 12, '1', '0')"}},
        clean={
            "values": {
                "most": {"valid": "rating <= 5", "column": "rating", "action": "missing"},
                "sold": {"valid": "price > 0", "column": "rating", "action": "missing"},
                "price": {"column": "price", "low": 1, "action": "missing"},
            }
        },
        tasks={
            "next": {"kind": "retrieval"},
            "like": {"kind": "binary", "column": "rating", "at_least": 4},
            "dear": {"kind": "binary"},
        },
        features={"rating": {"on": "history"}},
    )
    first, *lines = LOG.splitlines()
    text = "\n".join([f"{first},price", *(f"{line},{10 + n}" for n, line in enumerate(lines))])
    prepared = run(tmp_path, experiment, text + "\n")
    assert prepared.vocabulary("rating")["value"].to_pylist() == ["4", "1", "5"]
    table = pa.table({"user": ["c"] * 2, "item": ["x"] * 2, "rating": [9, 5], "time": [20, 21]})
    view, c = with_events(prepared, table), prepared.user_ids["c"] - 2
    assert view.user_lists("event_rating")[c].tolist() == [2, 0, 4]
    assert view.user_lists("did_like")[c].tolist() == [True, False, True]


def test_unknown_items_are_no_searches(tmp_path: Path) -> None:
    experiment = make(
        data={"queries": {"files": ["queries.csv"]}, "history_length": 4},
        features={
            "rating": {"on": "history"},
            "query": {"on": "history", "kind": "multi_valued", "max_values": 2},
        },
    )
    searches = "user,time,query\na,1,red shoes\na,8,red\n"
    prepared = run(tmp_path, experiment, queries_csv=searches)
    users, items = ["a", "a", "a", "zoe"], ["brand new", "x", "newer", "newest"]
    table = pa.table({"user": users, "item": items, "rating": [5, 4, 1, 5], "time": range(10, 14)})
    view = with_events(prepared, table)
    before, x = prepared.user_lists("event_item")[0].tolist(), prepared.item_ids["x"]
    assert before.count(1) == 2, "the searches"
    assert view.user_lists("event_item")[0].tolist() == [*before, x]
    assert view.user_lists("event_rating")[0].tolist()[-1:] == [2]
    assert view.user_names[-1] == "zoe"
    assert view.user_lists("event_item")[view.user_ids["zoe"] - 2].tolist() == []
    assert view.manifest.events == prepared.manifest.events + 1
