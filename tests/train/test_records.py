"""The records of a run: one JSON object a line, whatever happens to the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtrec_jax.errors import CheckpointError
from mtrec_jax.train.records import Records, read_json, read_records, write_json


def test_records_are_read_in_the_order_they_were_added(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    records.add(5, "train", "click", "loss", 0.5)
    records.add(5, "validation", "click", "auc", 0.75)
    assert read_records(records.path) == [
        {"step": 5, "split": "train", "task": "click", "metric": "loss", "value": 0.5},
        {"step": 5, "split": "validation", "task": "click", "metric": "auc", "value": 0.75},
    ]
    assert records.last_losses == {"click": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_null(tmp_path: Path, value: float) -> None:
    """Every line stays valid JSON, which knows no NaN."""
    records = Records(tmp_path / "metrics.jsonl")
    records.add(1, "validation", "buy", "auc", value)
    assert json.loads(records.path.read_text(), parse_constant=pytest.fail)["value"] is None


def test_timings_are_told_apart(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    records.add_timing(3, "seconds", 1.5)
    (found,) = read_records(records.path)
    assert (found["split"], found["metric"], found["value"]) == ("timing", "seconds", 1.5)
    assert not records.last_losses


def test_truncation_forgets_what_came_after_a_size(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    assert records.size() == 0
    records.truncate(0)  # there is no file yet
    records.add(1, "train", "click", "loss", 1.0)
    size = records.size()
    records.add(2, "train", "click", "loss", 2.0)
    records.truncate(size)
    assert [r["step"] for r in read_records(records.path)] == [1]
    records.truncate(10**6)  # never fills up with zeros
    assert records.size() == size


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"name": "é", "values": [1, None]})
    assert read_json(path) == {"name": "é", "values": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"not": {"json"}})
    assert read_json(path) == {"name": "é", "values": [1, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize("content", ["{", "\xff", None])
def test_missing_and_damaged_json_name_the_file(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "prepared.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"is no run folder \(prepared\.json: "):
        read_json(path)


def test_a_torn_line_of_a_file_that_is_too_short_is_cut_off(tmp_path: Path) -> None:
    records = Records(tmp_path / "metrics.jsonl")
    records.add(5, "train", "click", "loss", 0.5)
    one = records.size()
    records.add(10, "train", "click", "loss", 0.25)
    whole = records.size()
    assert not records.truncate(whole)
    with records.path.open("r+") as file:
        file.truncate(one + 9)
    assert records.truncate(whole)
    assert records.size() == one
    records.add(15, "train", "click", "loss", 0.125)
    assert [r["step"] for r in read_records(records.path)] == [5, 15]
