"""Staging: every format becomes the same text, and every line is kept or quarantined."""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.config import Files
from mtrec_jax.data import cells, lines, read
from mtrec_jax.data.read import Staged, stage
from mtrec_jax.errors import DataError

Row = dict[str, Any]


def staged(
    base: Path,
    table: Any = None,
    first_row: int = 0,
    named: Sequence[str] = ("i", "j"),
    **files: Any,
) -> Staged:
    return stage("events", Files(**files), base, table, first_row, base / "work", "", named)


def good(result: Staged) -> list[Row]:
    """The staged rows; every file holds the same columns."""
    tables = [pq.read_table(part) for part in result.parts]
    for table in tables:
        assert set(table.column_names) == {*result.columns, "_row"}
    return [row for table in tables for row in table.select([*result.columns, "_row"]).to_pylist()]


def bad(result: Staged) -> list[tuple[int, str, str]]:
    found = pq.read_table(result.malformed).to_pylist()
    assert len(found) == result.bad
    return [(r["row"], r["reason"], r["text"]) for r in found]


def write(base: Path, name: str, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (base / name).write_bytes(data)
    return base


def test_each_malformed_line_has_its_reason_and_its_place(tmp_path: Path) -> None:
    raw = (
        b"\xef\xbb\xbfuser,item\n"
        b"a,x\n"  # 0
        b"a\n"  # 1
        b"\n"  # 2: blank
        b"a,x,1\r\n"  # 3
        b"\xff,x\n"  # 4
        b"a\0,x\n"  # 5
        b'a,"x\n'  # 6: over two lines
        b'y"\n'  # 7
        b' "a, ""b""" ,x \n'  # 8
        b"," + b"z" * (cells.LARGEST + 1) + b"\n"  # 9
        b' ,a "b" c'  # 10
    )
    result = staged(write(tmp_path, "log.csv", raw), files=("log.csv",), rename={"item": "thing"})
    assert good(result) == [
        {"user": "a", "thing": "x", "_row": 0},
        {"user": 'a, "b"', "thing": "x", "_row": 8},
        {"user": None, "thing": 'a "b" c', "_row": 10},
    ]
    unclosed = "unclosed quote (text over several lines needs Parquet or JSON lines)"
    assert bad(result) == [
        (1, "too few cells", "a"),
        (3, "too many cells", "a,x,1"),
        (4, "not UTF-8", "\ufffd,x"),
        (5, "NUL byte", "a\0,x"),
        (6, unclosed, 'a,"x'),
        (7, "too few cells", 'y"'),
        (9, "cell too large", "," + "z" * 199),
    ]
    assert (result.rows, result.bad, result.next_row) == (10, 7, 11)
    assert result.place(8) == "row 8 (log.csv line 10)"


CELL = st.text(st.sampled_from('a"\t ,;é\n'), max_size=4)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=5),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from([",", ";", "\t", "é"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_python_writes_is_read_back(
    tmp_path: Path, rows: list[tuple[str, ...]], end: str, mark: str, quoting: Any
) -> None:
    """Cells over several lines are malformed lines; all others come back trimmed."""
    rows = [("first", "x", "y"), *rows]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=mark, lineterminator=end, quoting=quoting)
    writer.writerows([("a", "b", "c"), *rows])
    write(tmp_path, "log.csv", out.getvalue())
    result = staged(tmp_path, files=("log.csv",), separator=mark)
    expected, line = [], 0
    for row in rows:
        if not any("\n" in cell for cell in row):
            trimmed = [cell.strip() or None for cell in row]
            expected.append((*trimmed, line))
        line += 1 + sum(cell.count("\n") for cell in row)
    found = [(r["a"], r["b"], r["c"], r["_row"]) for r in good(result)]
    if any("\n" in cell for row in rows for cell in row):
        # pieces of a cell may look like lines; where lines end by "\r", "\n" is white space
        assert (
            set(expected) <= set(found) or result.bad or (end == "\r" and len(found) == len(rows))
        )
    else:
        assert found == expected
        assert not result.bad


def test_blocks_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside a line end or a letter; a line longer than a block is one malformed line."""
    raw = 'é,b\r\n1,"x,y"\r\n\r\n' + "2," + "é" * 40 + "\r\n3,é\r4,w\n5," + "v" * 90
    results = []
    for size in (lines._BYTES, 40, 41, 43, 44, 45):
        monkeypatch.setattr(lines, "_BYTES", size)
        result = staged(write(tmp_path, "log.csv", raw), files=("log.csv",))
        results.append((good(result), bad(result), result.next_row))
    whole, where, next_row = results[0]
    assert [row["_row"] for row in whole] == [0, 2, 3, 4, 5]
    assert (whole[0]["b"], whole[3], where, next_row) == (
        "x,y",
        {"é": "4", "b": "w", "_row": 4},
        [],
        6,
    )
    for rows, wrong, end in results[1:]:
        assert [(r, why) for r, why, _ in wrong] == [(2, "cell too large"), (5, "cell too large")]
        assert rows == [row for row in whole if row["_row"] not in (2, 5)]
        assert end == 6


def test_many_lines_of_all_kinds_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regular, quoted and odd lines are cut in three ways."""
    monkeypatch.setattr(lines, "_BYTES", 500)
    kinds = ["{n},b", '"{n}","b"', ' "{n}" ,b', "{n}", '{n},"b', '"{n},x",b', '{n},"b","c"']
    raw = "k,v\n" + "".join(kinds[n % 7].format(n=n) + "\n" for n in range(700))
    result = staged(write(tmp_path, "log.csv", raw), files=("log.csv",))
    found = {r["_row"]: (r["k"], r["v"]) for r in good(result)}
    assert list(found) == [n for n in range(700) if n % 7 in (0, 1, 2, 5)]
    assert found == {n: (f"{n},x" if n % 7 == 5 else str(n), "b") for n in found}
    assert [n for n, _, _ in bad(result)] == [n for n in range(700) if n % 7 in (3, 4, 6)]


def test_separators(tmp_path: Path) -> None:
    write(tmp_path, "log.dat", "a::b\n1:: x \n2::\n3\n::\n::4::5\n")
    result = staged(tmp_path, files=("log.dat",), separator="::")
    assert [(r["a"], r["b"]) for r in good(result)] == [("1", "x"), ("2", None), (None, None)]
    assert [r for r, _, _ in bad(result)] == [2, 4]
    write(tmp_path, "log.tsv", "a\tb\n\t\n1\t2,5\n  \n")
    result = staged(tmp_path, files=("log.tsv",), format="tsv")
    assert [(r["a"], r["b"], r["_row"]) for r in good(result)] == [(None, None, 0), ("1", "2,5", 1)]
    one = staged(write(tmp_path, "one", 'a\n1\n\n" 2"\n"3'), files=("one",))
    assert ([r["a"] for r in good(one)], one.bad, one.rows) == (["1", "2"], 1, 3)
    with pytest.raises(DataError, match=r"data\.events\.separator.* use another"):
        staged(tmp_path, files=("log.dat",), separator='"')


def test_atomic_files(tmp_path: Path) -> None:
    raw = "user_id:token\ttags:token_seq\tpast:float_seq\n u 1 \ta b  c\t1 2.5\nu\t\t\n"
    with gzip.open(tmp_path / "x.inter.gz", "wt") as file:
        file.write(raw)
    result = staged(tmp_path, files=("x.inter.gz",), format="atomic", rename={"user_id": "user"})
    assert good(result) == [
        {"user": "u 1", "tags": ["a", "b", "c"], "past": ["1", "2.5"], "_row": 0},
        {"user": "u", "tags": None, "past": None, "_row": 1},
    ]
    write(tmp_path, "bad", "user_id:token\titem\n")
    with pytest.raises(DataError, match=r"bad: .*name:type.*it says 'item'"):
        staged(tmp_path, files=("bad",), format="atomic")


def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = (
        '{"a": 1.50, "b": true}\n{"b": "x"}\n[1]\n\n{"a": "\\u0000"}\n{"a": "\\ud800"}\n'
        '{"a": [1, " y "], "c": {"d": null}}\n{"a": NaN}\n{"a"'
    )
    expected = [
        {"a": ["1.50"], "b": "true", "c": None, "_row": 0},
        {"a": None, "b": "x", "c": None, "_row": 1},
        {"a": ["1", "y"], "b": None, "c": '{"d": null}', "_row": 6},
        {"a": None, "b": None, "c": None, "_row": 7},
    ]
    reasons = ["no JSON object", "NUL byte", "not UTF-8", "no JSON object"]
    for size in (lines._BYTES, 45):  # many blocks: columns and lists appear after the first one
        monkeypatch.setattr(lines, "_BYTES", size)
        write(tmp_path, "log.json", raw)
        result = staged(tmp_path, named="abc", files=("log.json",), format="jsonl")
        assert good(result) == expected
        assert [r for r, _, _ in bad(result)] == [2, 4, 5, 8]
        assert [why for _, why, _ in bad(result)] == reasons
        assert result.columns == ("a", "b", "c")


def test_types_become_text(tmp_path: Path) -> None:
    columns = {
        "float": pa.array([2.0, 0.1, float("nan"), -0.0, float("inf"), 1e15]),
        "half": pa.array(np.array([1, 0.5, 2, 3, 4, 5], np.float16)),
        "integer": pa.array([1, None, 3, 4, 5, 2**62]),
        "bool": pa.array([True, False, None, True, True, True]),
        "text": pa.array([" x ", "", None, "é", "\u00a0", "a b"]).cast(pa.large_string()),
        "word": pa.array(["p", "q", None, "p", "p", ""]).dictionary_encode(),
        "list": pa.array([[1.0, None], [], None, [2.5], [3], [4]]),
        "time": pa.array([0, 1_500, None, 2_000, 10**12, -1], pa.timestamp("ms")),
        "zoned": pa.array([0, 1_500, None, 0, 0, 0], pa.timestamp("ms", "Europe/Berlin")),
        "day": pa.array([0, 1, None, 3, 4, 5], pa.date32()),
        "nested": pa.array([{"k": 1}, None, None, None, None, {"k": None}]),
        "nothing": pa.nulls(6),
        "bytes": pa.array([b"x", b"", None, b"z", b"z", b"z"]),
    }
    table = pa.table(columns)
    expected = {
        "float": ["2", "0.1", None, "0", "inf", "1000000000000000"],
        "half": ["1", "0.5", "2", "3", "4", "5"],
        "integer": ["1", None, "3", "4", "5", str(2**62)],
        "bool": ["true", "false", None, "true", "true", "true"],
        "text": ["x", None, None, "é", None, "a b"],
        "word": ["p", "q", None, "p", "p", None],
        "list": [["1", None], [], None, ["2.5"], ["3"], ["4"]],
        "time": [
            "1970-01-01 00:00:00",
            "1970-01-01 00:00:01.500",
            None,
            "1970-01-01 00:00:02",
            "2001-09-09 01:46:40",
            "1969-12-31 23:59:59.999",
        ],
        "zoned": [
            "1970-01-01 00:00:00Z",
            "1970-01-01 00:00:01.500Z",
            None,
            *["1970-01-01 00:00:00Z"] * 3,
        ],
        "day": ["1970-01-01", "1970-01-02", None, "1970-01-04", "1970-01-05", "1970-01-06"],
        "nested": ['{"k": 1}', None, None, None, None, '{"k": null}'],
        "nothing": [None] * 6,
        "bytes": ["x", None, None, "z", "z", "z"],
    }
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=4)
    memory = staged(tmp_path, table, named=[*columns])
    stored = staged(tmp_path, named=[*columns], files=("log.parquet",), format="parquet")
    for result in (memory, stored):
        rows = good(result)
        assert [r["_row"] for r in rows] == list(range(6))
        assert {name: [r[name] for r in rows] for name in expected} == expected
    assert memory.place(2) == "row 2"
    assert stored.place(2) == "row 2 (log.parquet line 3)"
    assert memory.digests != staged(tmp_path, table.slice(1), named=[*columns]).digests
    assert memory.digests == staged(tmp_path, table, named=[*columns]).digests


def test_rows_of_a_table_that_are_no_text_are_malformed(tmp_path: Path) -> None:
    table = pa.table(
        {"a": pa.array([b"x", b"\xff", b" y "]), "b": pa.array([["p"], ["q"], ["r", "s\0"]])}
    )
    result = staged(tmp_path, table, first_row=10, named="ab")
    assert good(result) == [{"a": "x", "b": ["p"], "_row": 10}]
    assert bad(result) == [(11, "not UTF-8", "\ufffd"), (12, "NUL byte", "s\0")]


def test_pandas_and_its_index_and_column_names(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x", None], "b": [1.0, np.nan]}, index=[7, 8])
    assert good(staged(tmp_path, frame)) == [
        {"a": "x", "b": "1", "_row": 0},
        {"a": None, "b": None, "_row": 1},
    ]
    named = frame.set_index(pd.Index([7, 8], name="item"))
    assert good(staged(tmp_path / "named", named))[0] == {
        "item": "7",
        "a": "x",
        "b": "1",
        "_row": 0,
    }
    for table, message in (
        (pd.DataFrame({"a": ["x", 1.5]}), r"column 'a' .* float, str .*df\['a'\]\.astype\(str\)"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "several columns named 'a'"),
        (pa.table([[1], [2]], names=["a", "A"]), "the column name 'A' is taken already"),
        (pa.table({"_row": [1]}), "the column name '_row' is taken already"),
        (frame.set_index(pd.Index([1, 2], name="a")), "cannot be read"),
        (pa.table({"": [1]}), "'' cannot name a column"),
        (pa.table({"a": pa.array([], pa.int64())}), "table 'events' is empty"),
    ):
        with pytest.raises(DataError, match=message):
            staged(tmp_path, table, named="ab")


IDS = [uuid.UUID(int=n * 0x1234567890ABCDEF1234567890ABCDEF % 2**128) for n in range(1, 5)]


@pytest.mark.parametrize("stored", [False, True])
def test_columns_that_nobody_names_spoil_no_row(tmp_path: Path, stored: bool) -> None:
    """Binary data and odd types are not read; others tell duplicates, without cells that are no
    text."""
    n = 4
    columns = {
        "i": pa.array(["a", "b", "c", "d"]),
        "image": pa.array([b"\x89PNG\0\xff"] * n),
        "digest": pa.array([b"\xff" * 12] * n, pa.binary(12)),
        "took": pa.array([1, 2, 3, None], pa.duration("s")),
        "event": pa.array([u.bytes for u in IDS], pa.uuid()),
        "page": pa.array(["short", "x" * (cells.LARGEST + 1), "nul\0", None]),
        "tags": pa.array([["p"], ["q\0"], None, []]),
        "bytes in it": pa.array([{"raw": b"\xff"}] * n),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    files: Row = {"files": ("log.parquet",), "format": "parquet"} if stored else {}
    result = staged(tmp_path, None if stored else pa.table(columns), **files)
    assert not result.bad
    assert [row["i"] for row in good(result)] == ["a", "b", "c", "d"]
    assert [row["event"] for row in good(result)] == [str(u) for u in IDS]
    assert [row["page"] for row in good(result)] == ["short", None, None, None]
    assert [row["tags"] for row in good(result)] == [["p"], None, None, []]
    assert not {"image", "digest", "took"} & {*result.columns}


def test_keys_of_json_lines_that_nobody_names_spoil_no_row(tmp_path: Path) -> None:
    raw = '{"i": "a", "x": "\\u0000", "y": ["\\ud800"]}\n{"i": "\\u0000", "x": "z"}\n'
    result = staged(write(tmp_path, "log.json", raw), files=("log.json",), format="jsonl")
    assert good(result) == [{"i": "a", "x": None, "y": None, "_row": 0}]
    assert bad(result) == [(1, "NUL byte", raw.splitlines()[1])]


def test_columns_of_pandas_that_arrow_has_no_type_for(tmp_path: Path) -> None:
    """They stop only where they are named."""
    mixed = {"mixed": ["x", True], "objects": [object(), {1, 2}], "i": [1, 2]}
    assert [row["i"] for row in good(staged(tmp_path, pd.DataFrame(mixed)))] == ["1", "2"]
    with pytest.raises(DataError, match=r"column 'mixed' cannot be read: .* bool, str"):
        staged(tmp_path, pd.DataFrame(mixed), named=["i", "mixed"])


def test_texts_and_whole_numbers_in_a_column_of_pandas_are_texts(tmp_path: Path) -> None:
    given = [285, "Anna", None, np.int64(7), "7", float("nan"), 2**70]
    frame = pd.DataFrame({"i": given, "j": range(7)}, dtype=object)
    texts = ["285", "Anna", None, "7", "7", None, "1180591620717411303424"]
    assert [row["i"] for row in good(staged(tmp_path / "a", frame))] == texts
    assert [row["j"] for row in good(staged(tmp_path / "a", frame))] == list("0123456")
    levels = frame.head(4).astype({"i": "category"})
    assert [row["i"] for row in good(staged(tmp_path / "b", levels))] == texts[:4]


def test_uuids_are_text_with_hyphens(tmp_path: Path) -> None:
    column = pa.array([IDS[0].bytes, None, *(u.bytes for u in IDS)], pa.uuid())
    table = pa.table({"i": column, "j": pa.chunked_array([column.slice(4), column.slice(0, 4)])})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=4)
    texts = [str(IDS[0]), None, *(str(u) for u in IDS)]
    for result in (
        staged(tmp_path, table),
        staged(tmp_path, files=("log.parquet",), format="parquet"),
    ):
        assert [row["i"] for row in good(result)] == texts
        assert [row["j"] for row in good(result)] == texts[4:] + texts[:4]


def no_text() -> dict[str, tuple[Any, str]]:
    """{name: (column of a type that has no meaning as text, what helps)}."""
    spans = pa.array([1, 2], pa.duration("s"))
    year = pd.Series(pd.period_range("2024-01", periods=2, freq="M"))
    other = "which is not read. Make it text"
    return {
        "period": (pa.Array.from_pandas(year), r"Periods.*\.dt\.to_timestamp\(\)"),
        "interval": (pa.Array.from_pandas(pd.Series(pd.interval_range(0, 2))), other),
        "duration": (spans, r"durations.*\.dt\.total_seconds\(\)"),
        "durations": (pa.array([[1], [2]], pa.list_(pa.duration("s"))), "durations"),
        "in_struct": (pa.StructArray.from_arrays([spans], ["s"]), "durations"),
        "in_map": (pa.array([[("k", 1)], []], pa.map_("string", pa.duration("s"))), "durations"),
        "months": (pa.array([(1, 2, 3)] * 2, pa.month_day_nano_interval()), other),
        "runs": (pa.RunEndEncodedArray.from_arrays([2], ["x"]), other),
        "view": (pa.array([["x"], []], pa.list_view(pa.string())), other),
        "union": (
            pa.UnionArray.from_sparse(pa.array([0, 0], pa.int8()), [pa.array([1, 2])]),
            other,
        ),
    }


@pytest.mark.parametrize("name", no_text())
def test_a_named_column_of_a_type_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    column, message = no_text()[name]
    table = pa.table({"i": ["a", "b"], name: column})
    with pytest.raises(DataError, match=rf"^table 'events': column '{name}' .*{message}"):
        staged(tmp_path, table, named=["i", name])
    assert good(staged(tmp_path, table, named=["i"])) == [
        {"i": "a", "_row": 0},
        {"i": "b", "_row": 1},
    ]


def test_the_types_of_other_frames_in_memory(tmp_path: Path) -> None:
    """A frame that gives Arrow streams: views of text, and categories of them, as Polars has."""
    views = pa.array([" b", None, "a"]).cast(pa.string_view())
    table = pa.table(
        {
            "i": views,
            "j": pa.DictionaryArray.from_arrays(pa.array([2, None, 0], pa.uint32()), views),
            "k": pa.array([["x"], None, ["y", "z"]], pa.list_(pa.string_view())),
            "l": pa.array([b"x", None, b"y"]).cast(pa.binary_view()),
            "m": pa.DictionaryArray.from_arrays(pa.array([1, 0, None], pa.int8()), [2.0, 0.5]),
        }
    )

    class Frame:
        def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
            return table.__arrow_c_stream__(requested_schema)

    rows = good(staged(tmp_path, Frame(), named="ijklm"))
    assert [[row[n] for row in rows] for n in "ijklm"] == [
        ["b", None, "a"],
        ["a", None, "b"],
        [["x"], None, ["y", "z"]],
        ["x", None, "y"],
        ["0.5", "2", None],
    ]


@pytest.mark.parametrize(
    ("module", "kind", "call"),
    [
        ("pyspark.sql.classic.dataframe", "DataFrame", "events.toPandas()"),
        ("pyspark.sql.connect.dataframe", "DataFrame", "events.toPandas()"),
        ("polars.lazyframe.frame", "LazyFrame", "events.collect()"),
        ("datasets.arrow_dataset", "Dataset", "events.to_pandas()"),
        ("datasets.dataset_dict", "DatasetDict", "events['train'].to_pandas()"),
        ("dask.dataframe.dask_expr._collection", "DataFrame", "events.compute()"),
    ],
)
def test_what_is_no_table_names_the_call_that_makes_one(
    tmp_path: Path, module: str, kind: str, call: str
) -> None:
    with pytest.raises(DataError, match=f"pass {re.escape(call)}$"):
        staged(tmp_path, type(kind, (), {"__module__": module})())


def test_lists_and_arrays_name_the_call_that_makes_a_table(tmp_path: Path) -> None:
    records = [{"i": "a", "j": 1}, {"i": "b", "j": 2}]
    array = np.array([("a", 1), ("b", 2)], [("i", "U1"), ("j", np.int64)])
    expected = [{"i": "a", "j": "1", "_row": 0}, {"i": "b", "j": "2", "_row": 1}]
    for raw in (records, array, array.view(np.recarray)):
        with pytest.raises(DataError, match=r"pass pandas\.DataFrame\(events\)$"):
            staged(tmp_path, raw)
        assert good(staged(tmp_path, pd.DataFrame(raw))) == expected


def test_large_whole_floats_are_integers_like_the_ids_they_were(tmp_path: Path) -> None:
    found = good(staged(tmp_path, pa.table({"a": [1e15 + 16, 2.0**53 - 1, 0.5]})))
    assert [row["a"] for row in found] == ["1000000000000016", "9007199254740991", "0.5"]


def test_patterns_leave_out_marks_such_as_spark_writes(tmp_path: Path) -> None:
    for name in ("day/_SUCCESS", "day/part.csv"):
        (tmp_path / "day").mkdir(exist_ok=True)
        write(tmp_path / "day", name[4:], "u\n1\n" if "part" in name else "")
    assert len(good(staged(tmp_path, files=("day/*",)))) == 1


def test_globs_urls_and_packed_files(tmp_path: Path) -> None:
    content = {"b.csv": "u,i\n1,2\n", "a.csv": "i,u\n4,3\n5,6\n", "other.txt": "x"}
    for name, text in content.items():
        write(tmp_path, name, text)
    write(
        tmp_path,
        "p.csv.gz",
        gzip.compress(b"u,i\n1,2\n", mtime=0) + gzip.compress(b"3,4\n", mtime=0),
    )
    zstd = pa.CompressedOutputStream(str(tmp_path / "p.csv.zst"), "zstd")
    zstd.write(b"u,i\n1,2\n3,4\n")
    zstd.close()
    result = staged(tmp_path, files=("*.csv",), first_row=5)
    assert [(r["u"], r["i"], r["_row"]) for r in good(result)] == [
        ("3", "4", 5),
        ("6", "5", 6),
        ("1", "2", 7),
    ]
    assert (result.place(6), result.place(7)) == ("row 6 (a.csv line 3)", "row 7 (b.csv line 2)")
    assert result.files() == "a.csv, b.csv"
    for packed in ("p.csv.gz", "p.csv.zst", str(tmp_path / "p.csv.gz"), f"file://{tmp_path}/*.gz"):
        assert [r["u"] for r in good(staged(tmp_path, files=(packed,)))] == ["1", "3"]
    memory = fsspec.filesystem("memory")
    for name in ("a.csv", "b.csv"):
        memory.pipe(f"/bucket/{name}", content[name].encode())
    remote = staged(tmp_path, files=("memory://bucket/*.csv",), first_row=5)
    assert (good(remote), remote.digests) == (good(result), result.digests)
    for missing in ("memory://bucket/c.csv", "memory://bucket/*.json", "*.json", "memory://bucket"):
        with pytest.raises(DataError, match=r"no such file|no file|is a folder"):
            staged(tmp_path, files=(missing,))
    with pytest.raises(DataError, match=r"s4://x/y\.csv cannot be looked up.*Check its name"):
        staged(tmp_path, files=("s4://x/y.csv",))
    with pytest.raises(DataError, match=r"a\.csv is named twice"):
        staged(tmp_path, files=("a.csv", "*.csv"))
    (tmp_path / "z.csv").mkdir()
    with pytest.raises(DataError, match=r"z\.csv is a folder; name the files"):
        staged(tmp_path, files=("z.csv",))


def test_files_of_one_table_have_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "u,i\n1,2\n")
    write(tmp_path, "b.csv", "u,j\n1,2\n")
    with pytest.raises(DataError, match=r"b\.csv has other columns than .*a\.csv: it lacks i and"):
        staged(tmp_path, files=("a.csv", "b.csv"))
    write(tmp_path, "a.csv", "u\n1\n")
    write(tmp_path, "b.csv", "u,other\n2,3\n")
    both = staged(tmp_path / "drift", files=(f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"))
    assert good(both) == [
        {"u": "1", "other": None, "_row": 0},
        {"u": "2", "other": "3", "_row": 1},
    ]
    write(tmp_path, "b.csv", "x,y\n2,3\n")
    with pytest.raises(DataError, match="has other columns"):
        staged(tmp_path / "apart", files=(f"{tmp_path}/a.csv", f"{tmp_path}/b.csv"))
    with pytest.raises(DataError, match=r"rename: there is no column 'U' in"):
        staged(tmp_path / "typo", files=(f"{tmp_path}/a.csv",), rename={"U": "user"})
    write(tmp_path, "a.json", '{"u": 1}\n')
    write(tmp_path, "b.json", '{"u": 2, "i": 3}\n')
    joined = staged(tmp_path, files=("a.json", "b.json"), format="jsonl")
    assert good(joined) == [{"u": "1", "i": None, "_row": 0}, {"u": "2", "i": "3", "_row": 1}]


@pytest.mark.parametrize(
    ("name", "content", "files", "message"),
    [
        ("x.csv", b"", {}, r"x\.csv is empty"),
        ("x.csv", b"a,b\n", {}, r"x\.csv is empty: there is no row of data"),
        ("x.csv", b"a,b\n\n \n", {}, "no row of data in"),
        ("x.csv", b"\n1,2\n", {}, "its first line should name the columns"),
        ("x.csv", b"a,A\n1,2\n", {}, "the column name 'A' is taken already"),
        ("x.csv", b"a,_ROW\n1,2\n", {}, "the column name '_ROW' is taken already"),
        ("x.csv", b"\xffa,b\n1,2\n", {}, "line 1 is not UTF-8 text"),
        ("x.csv", 'a,"b\n1,2\n', {}, "line 1: unclosed quote"),
        ("x.csv", "a,b\n1,2\n".encode("utf-16"), {}, "UTF-16 text; convert it"),
        (
            "x.csv",
            gzip.compress(b"a,b\n1,2\n", mtime=0),
            {},
            r"packed by gzip; give its name .* \.gz",
        ),
        ("x.csv.gz", b"a,b\n1,2\n", {}, r"x\.csv\.gz cannot be read as gzip: .*Check that it"),
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], {}, "cannot be read as gzip"),
        ("x.csv.zst", b"a,b\n1,2\n", {}, "cannot be read as zstd"),
        ("x.csv", b"PAR1....", {}, "a Parquet file; declare format = 'parquet'"),
        ("x.csv", b"a,b\n1\n2\n", {}, r"every line of .*x\.csv is malformed, e\.g\. '1' \(too few"),
        ("x.parquet", b"a,b\n1,2\n", {"format": "parquet"}, "cannot be read as Parquet"),
        ("x.json", b'{"a": 1, "A": 2}\n', {"format": "jsonl"}, "the column name 'A' is taken"),
        ("x.csv", b"a,b\n1,2\n", {"rename": {"a": "b"}}, "the column name 'b' is taken already"),
    ],
)
def test_unusable_files_say_why(
    tmp_path: Path, name: str, content: Any, files: Row, message: str
) -> None:
    write(tmp_path, name, content)
    with pytest.raises(DataError, match=message):
        staged(tmp_path, files=(name,), **files)


def test_a_cut_parquet_file_and_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"a": np.arange(1000).astype(str)})
    pq.write_table(table, tmp_path / "log.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "log.parquet").read_bytes()
    write(tmp_path, "cut.parquet", data[:-40])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read as Parquet"):
        staged(tmp_path, files=("cut.parquet",), format="parquet")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(read.pq.ParquetWriter, "write_table", full)
    with pytest.raises(DataError, match=r"work.* cannot be written: .*No space.* free some"):
        staged(tmp_path, files=("log.parquet",), format="parquet")


def test_json_numbers_and_csv_agree_with_python(tmp_path: Path) -> None:
    """The text of a number is kept as it stands in the file."""
    records = [{"a": 1, "b": -2.5e-3}, {"a": 10**30, "b": 0.1}]
    write(tmp_path, "log.json", "".join(json.dumps(r) + "\n" for r in records))
    rows = good(staged(tmp_path, files=("log.json",), format="jsonl"))
    assert [(r["a"], r["b"]) for r in rows] == [("1", "-0.0025"), (str(10**30), "0.1")]
