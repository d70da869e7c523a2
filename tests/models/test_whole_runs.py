"""Towers that need more than one vector of a pair, and the bias tower, in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import mtrec_jax
from mtrec_jax.errors import DataError
from mtrec_jax.train.records import read_records
from mtrec_jax.train.run import load_best

pandas = pytest.importorskip("pandas")

KINDS: dict[str, Any] = {
    "stem": {"kind": "stem", "experts": 1, "expert_hidden": [4], "tower_hidden": []},
    "pepnet": {"kind": "pepnet", "domain": ["device"], "gate_hidden": 4, "tower_hidden": [4]},
}


def _events() -> Any:
    """Twelve people with eight impressions each of nine films, on two devices and three places."""
    rows = [
        {
            "person": f"p{p}",
            "film": f"f{(p + 2 * n) % 9}",
            "click": (p + n) % 2,
            "stars": 1 + (p * n) % 5,
            "device": "tv" if p % 3 else "phone",
            "place": n % 3,
            "when": 1000 * n + p,
        }
        for p in range(12)
        for n in range(8)
    ]
    return pandas.DataFrame(rows)


def _fit(towers: str, steps: int, folder: Path) -> mtrec_jax.Recommender:
    return mtrec_jax.fit(
        _events(),
        user="person",
        item="film",
        time="when",
        tasks={"next": "retrieval", "click": "binary", "stars": "regression"},
        features={
            "device": {"on": "request"},
            "place": {"on": "request", "kind": "numeric"},
            "clicked": {"on": "history", "column": "click"},
        },
        settings={
            "data": {"history_length": 4},
            "model": {
                "width": 4,
                "encoder": {"layers": 1},
                "towers": KINDS[towers],
                "bias": {"features": ["place"], "tasks": ["click"]},
            },
            "train": {"steps": steps, "batch_size": 8, "negatives": {"count": 8}, "mesh": [1, 1]}
            | {"evaluate_every": 2, "log_every": 1},
            "evaluate": {"batch_size": 8, "candidates": 6, "bootstrap": 0},
        },
        folder=folder,
        show_progress=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("towers", KINDS)
def test_a_run_goes_on_exactly_and_answers_without_the_bias(
    towers: str, tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """Slow: three trainings and their evaluation a case. What is carried on is the same generic
    state for all towers; that it is all of it is seen in whole runs alone."""
    whole = _fit(towers, 4, tmp_path / "whole")
    _fit(towers, 2, tmp_path / "parts")
    parts = _fit(towers, 4, tmp_path / "parts")
    states = [load_best(of.run, None)[:2] for of in (whole, parts)]
    jax.tree.map(np.testing.assert_array_equal, *states)
    records = [
        [r for r in read_records(of.run.folder / "metrics.jsonl") if r["split"] == "validation"]
        for of in (whole, parts)
    ]
    assert records[0] == records[1]

    asked = [{"device": "tv", "place": place} for place in (0, 2)]
    answers = [parts.recommend(["p1"], k=3, request=moment, exclude_seen=False) for moment in asked]
    assert answers[0].table.equals(answers[1].table)
    assert len(answers[0]["item"]) == 3
    similar = parts.similar_items("f1", k=2)
    assert len(similar["item"]) == 2
    rows = _events()[:5]
    known = [parts.predict_rows(frame)["click"] for frame in (rows, rows.drop(columns="place"))]
    assert known[0] == known[1]
    with pytest.raises(DataError, match="device"):
        parts.predict_rows(rows.drop(columns="device"))
    other = parts.predict_rows(rows.assign(device="tv"))["click"]
    assert other != known[0]
