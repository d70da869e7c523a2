"""Raw files and tables: what is read, what is left out, and what is said about it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_jax.data.dataset import SPLITS
from mtrec_jax.data.new_rows import read_columns
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from tests.data.small import LOG, make, rows, rules, run

LIKE = {"like": {"kind": "binary"}}


def test_malformed_lines_and_missing_keys_are_counted_with_their_lines(tmp_path: Path) -> None:
    text = LOG + "a,b\n\na,,1,8\n,x,1,8\na,x,1,\na,x,1,soon\na,x,1,1,1\n"
    clean = {"max_bad_fraction": 0.5}
    prepared = run(tmp_path, make(clean=clean), text)
    found = {r.rule: r for r in prepared.manifest.report}
    assert prepared.manifest.events == 8
    assert found["events: rows read"].rows == 14
    few, many = (found[f"events: malformed line (too {how} cells)"] for how in ("few", "many"))
    assert (few.rows, few.examples) == (1, ("row 8 (log.csv line 10): 'a,b'",))
    assert (many.rows, many.examples) == (1, ("row 14 (log.csv line 16): 'a,x,1,1,1'",))
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
    found = [r for r in prepared.manifest.report if "malformed" in r.rule]
    assert {r.rule.split("(")[1][:8]: (r.rows, r.examples[0].split(":")[0]) for r in found} == {
        "unclosed": (1, "row 3 (log.csv line 5)"),
        "not UTF-": (1, "row 4 (log.csv line 6)"),
    }


def test_times_are_seconds_or_iso_8601(tmp_path: Path) -> None:
    zoned = ["1970-01-01T00:00:04Z", "1970-01-01T02:00:03+02:00"]
    times = [*zoned, "1970-01-01T00:00:02.5", "2", "1.5", "1970-01-01"]
    text = "user,item,time\n" + "".join(f"u,i{n},{t}\n" for n, t in enumerate(times))
    prepared = run(tmp_path, make(data={"history_length": 9}), text)
    raw = prepared.items["id"].to_pylist()
    order = [raw[i - 2] for i in prepared.user_lists("event_item")[0]]
    assert order == ["i5", "i4", "i3", "i2", "i1", "i0"]


@pytest.mark.slow
def test_in_memory_tables_formats_and_several_files_agree(tmp_path: Path) -> None:
    tasks = {"next": {"kind": "retrieval"}, "stars": {"kind": "regression", "column": "rating"}}
    text = LOG.replace("b,x,1,1", "b,x,,1").replace("c,x,4,7", "7,8,2.5,7")
    plain = run(tmp_path, make(tasks=tasks), text)
    expected = {s: (plain.folder / f"{s}.parquet").read_bytes() for s in SPLITS}
    frame = pd.read_csv(tmp_path / "log.csv")
    polars_like = pa.table(
        {
            "user": pa.array(frame["user"]).dictionary_encode(),
            "item": pa.array(frame["item"]).cast(pa.string_view()),
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
    with pytest.raises(DataError, match="feature 'genre' needs the table of items, and there"):
        run(tmp_path, make(features={"genre": {"on": "item"}}))
    words = "user,item,rating,time\nu,a,good,1\nu,b,bad,2\nu,c,good,3\n"
    with pytest.raises(DataError, match=r"feature 'rating': no training value .* is a number"):
        run(tmp_path, make(features={"rating": {"on": "history", "kind": "binned"}}), words)
    with pytest.raises(DataError, match=r"every line of .*log.csv is malformed.*separator"):
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
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"log.csv", "cleaned"}  # of preparations that failed after the cleaning
    assert not list((tmp_path / "cleaned").glob(".*"))


def test_uuids_are_ids_and_a_column_that_nobody_names_tells_duplicates(tmp_path: Path) -> None:
    """Purchases of one moment with numbers of their own are two; the same number is written twice.

    A picture beside them is not read.
    """
    people = [uuid.UUID(int=n << 100 | 5) for n in range(3)]
    who, what = [0, 0, 0, 1, 1, 1, 2], ["x", "y", "z", "x", "x", "x", "y"]
    orders = [uuid.UUID(int=n) for n in (1, 2, 6, 3, 4, 4, 5)]
    table = pa.table(
        {
            "user": pa.array([people[n].bytes for n in who], pa.uuid()),
            "item": what,
            "time": [1, 2, 3, 3, 3, 3, 4],
            "order": pa.array([order.bytes for order in orders], pa.uuid()),
            "picture": [b"\xff\0"] * 7,
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    stored = make(data={"events": {"files": ["log.parquet"], "format": "parquet"}})
    for number, found in enumerate(
        (
            prepare(stored, tmp_path, tmp_path / "stored"),
            prepare(make(), None, tmp_path / "given", {"events": table}),
        )
    ):
        assert [*found.user_ids] == sorted(str(person) for person in people), number
        assert found.manifest.events == 6
        assert rules(found)["duplicate row"] == 1


def test_small_derived_numbers_keep_their_digits(tmp_path: Path) -> None:
    derive = {"small": "x / 1e6", "smaller": "x / 1e30", "large": "x * 1e6"}
    experiment = rows(
        data={"derive": derive}, features={n: {"kind": "numeric"} for n in derive}, tasks=LIKE
    )
    found = read_columns(experiment, pa.table({"x": [2.5e-4, -2.0]}), [*derive])
    assert found.to_pydict() == {
        "small": ["0.00000000025", "-0.000002"],
        "smaller": ["0." + 33 * "0" + "25", "-0." + 29 * "0" + "2"],
        "large": ["250", "-2000000"],
    }
