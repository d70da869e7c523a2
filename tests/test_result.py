"""Tables of answers: on a terminal, in a notebook, and in files that come back the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from mtrec_jax.errors import DataError
from mtrec_jax.result import Result, print_recommendations, save_tables

TABLE = pa.table(
    {
        "user": ["u1", "u1", "ü2"],
        "known": [True, True, False],
        "rank": [1, 2, 1],
        "title": ["Alien, the", 'a "quoted" <title>', "Amélie"],
        "score": pa.array([0.5, -1.25, 1e-8], pa.float32()),
    }
)


def read_csv(path: Path) -> list[dict[str, Any]]:
    return pyarrow.csv.read_csv(path).to_pylist()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_parquet(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def test_columns_are_lists() -> None:
    result = Result(TABLE)
    assert len(result) == 3
    assert result.columns == ["user", "known", "rank", "title", "score"]
    assert result["user"] == ["u1", "u1", "ü2"]
    assert [row["rank"] for row in result] == [1, 2, 1]
    with pytest.raises(KeyError, match="'users'; there are user, known, rank, title, score"):
        result["users"]


def test_a_row_of_csv_is_a_line(tmp_path: Path) -> None:
    table = pa.table({"title": ["Alien,\n the", "a\r\nb"], "rank": [1, 2]})
    Result(table).save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines() == [
        '"title","rank"',
        '"Alien, the",1',
        '"a b",2',
    ]
    Result(table).save(tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet") == table


def test_a_data_frame_holds_the_same() -> None:
    pytest.importorskip("pandas")
    frame = Result(TABLE).to_pandas()
    assert frame["title"].tolist() == TABLE["title"].to_pylist()
    assert list(frame.columns) == TABLE.column_names


@pytest.mark.parametrize("suffix", READERS)
def test_saved_files_come_back_the_same(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"result{suffix}"
    Result(TABLE).save(path)
    found = READERS[suffix](path)
    assert [r["title"] for r in found] == TABLE["title"].to_pylist()
    assert [r["known"] for r in found] == [True, True, False]
    assert [r["score"] for r in found] == pytest.approx(TABLE["score"].to_pylist())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", READERS)
def test_tables_are_written_one_after_the_other(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"result{suffix}"
    assert save_tables([TABLE.slice(0, 2), TABLE.slice(2), TABLE], path) == 6
    found = READERS[suffix](path)
    assert [r["user"] for r in found] == ["u1", "u1", "ü2"] * 2


@pytest.mark.parametrize("suffix", READERS)
def test_an_empty_result_is_a_file_without_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"result{suffix}"
    Result(TABLE.slice(0, 0)).save(path)
    assert READERS[suffix](path) == []


def test_a_failure_leaves_the_older_file(tmp_path: Path) -> None:
    def failing() -> Iterator[pa.Table]:
        yield TABLE
        raise RuntimeError("model fell over")

    path = tmp_path / "result.csv"
    path.write_text("older", encoding="utf-8")
    with pytest.raises(RuntimeError, match="fell over"):
        save_tables(failing(), path)
    assert path.read_text(encoding="utf-8") == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["result.csv"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("result.xlsx", r"result\.xlsx: the file name must end in \.csv, \.jsonl, \.parquet"),
        ("result", r"the file name must end in \.csv"),
        ("file/result.csv", r"cannot write .*file/result\.csv: "),
    ],
)
def test_files_that_cannot_be_written_are_explained(
    tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Result(TABLE).save(tmp_path / name)


@pytest.mark.parametrize("shown", [repr, lambda result: result._repr_html_()])
def test_twenty_rows_are_shown_and_the_others_counted(shown: Callable[[Result], str]) -> None:
    text = shown(Result(pa.table({"item": [f"item{i}." for i in range(2345)]})))
    text = " ".join(text.split())
    assert "item19." in text
    assert "item20." not in text
    assert "2,325 more rows" in text


def test_a_terminal_shows_names_and_short_numbers() -> None:
    lines = repr(Result(TABLE)).splitlines()
    assert lines[0].split() == ["user", "known", "rank", "title", "score"]
    assert lines[1].split() == ["u1", "True", "1", "Alien,", "the", "0.5000"]
    assert not Result(TABLE.slice(0, 0))["user"]


def test_answers_are_printed_by_user_and_read_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    column = Result.__getitem__

    def counted(result: Result, name: str) -> list[Any]:
        read.append(name)
        return column(result, name)

    monkeypatch.setattr(Result, "__getitem__", counted)
    table = pa.table(
        {
            "user": ["u2", "u1", "u2", "u3"],
            "known": [True, False, True, True],
            "item": ["a", "b", "c", "d"],
            "weight like": [0.1, 0.2, 0.3, 0.4],
            "new": [False, False, False, True],
        }
    )
    print_recommendations(Result(table))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    head = ["item", "w.", "like"]
    note = ["(unknown", "user:", "the", "most", "popular", "items)"]
    assert lines == [
        *(["u2"], head, ["a", "0.1000"], ["c", "0.3000"]),
        *(["u1", *note], head, ["b", "0.2000"]),
        *(["u3"], [*head, "new"], ["d", "0.4000", "True"]),
    ]
    assert sorted(read) == ["item", "known", "new", "user"]
    print_recommendations(Result(table.slice(0, 0)))
    assert not capsys.readouterr().out


def test_brackets_are_no_markup() -> None:
    result = Result(pa.table({"item [id]": ["[bold]", "Heat [red]1995[/red]", "[/]"]}))
    lines = repr(result).splitlines()
    assert [line.strip() for line in lines] == [*result.columns, *result["item [id]"]]


def test_a_notebook_shows_text_as_text() -> None:
    """A title is never taken for markup."""
    shown = Result(TABLE)._repr_html_()
    assert "&lt;title&gt;" in shown
    assert "<title>" not in shown
    assert shown.count("<tr>") == 4
