"""The time of the query, where the retrieval knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtrec_jax
from mtrec_jax.errors import DataError
from mtrec_jax.evaluation.protocol import protocol_of

pandas = pytest.importorskip("pandas")

FILMS, SOON, LATE = 12, 60, 86_400


@pytest.mark.slow
def test_the_time_since_the_last_event_decides_what_is_recommended(tmp_path: Path) -> None:
    """Soon after a film its successor follows, a day later the one on the other side of the circle:
    nobody without the time of the query can know which."""
    rng, rows = np.random.default_rng(0), []
    for person in range(120):
        film, when = int(rng.integers(FILMS)), 1_000_000_000
        for _ in range(8):
            rows.append({"person": f"p{person}", "film": f"f{film}", "when": when})
            late = bool(rng.integers(2))
            when += LATE if late else SOON
            film = (film + (FILMS // 2 if late else 1)) % FILMS
    moment = {"kind": "moment", "column": "when"}
    model = mtrec_jax.fit(
        pandas.DataFrame(rows),
        user="person",
        item="film",
        time="when",
        tasks={"next": "retrieval"},
        features={"at": moment | {"on": "history"}, "asked": moment | {"on": "request"}},
        settings={
            "data": {"history_length": 6, "positions": 6},
            "model": {"width": 16, "encoder": {"kind": "hstu", "layers": 2}, "dropout": 0.0},
            "train": {"steps": 400, "batch_size": 40, "negatives": "all", "learning_rate": 1e-2}
            | {"mesh": [1, 1], "evaluate_every": 400, "schedule": "constant"},
            "evaluate": {"bootstrap": 0, "candidates": 6, "exclude_seen": False},
        },
        folder=tmp_path / "run",
        show_progress=False,
    )
    assert protocol_of(model.experiment, model.prepared.manifest).query_time == "known"
    starts = [int(film) for film in rng.integers(FILMS, size=20)]
    histories = [{"item": [f"f{film}"], "at": [1_000_000_000]} for film in starts]
    right = 0
    for gap, step in ((SOON, 1), (LATE, FILMS // 2)):
        found = model.recommend(
            [f"stranger {n}" for n in range(20)],
            k=1,
            histories=histories,
            exclude_seen=False,
            request={"asked": 1_000_000_000 + gap},
        )
        expected = [f"f{(film + step) % FILMS}" for film in starts]
        right += sum(a == b for a, b in zip(found["item"], expected, strict=True))
    assert right >= 36  # of 40; without the time about half
    asked: dict[str, Any] = {
        "k": 3,
        "exclude_seen": False,
        "request": {"asked": 1_000_000_000 + LATE},
    }
    by_name = model.recommend(["s"], histories=[{"item": ["f1"], "at": [1_000_000_000]}], **asked)
    column = model.recommend(["s"], histories=[{"item": ["f1"], "when": [1_000_000_000]}], **asked)
    assert column["item"] == by_name["item"]
    missing = {"item": ["f1"], "at": [pandas.NA]}
    assert len(model.recommend(["s"], histories=[missing], **asked)["item"]) == 3
    with pytest.raises(DataError, match=r"histories\[0\], at: time 'noon' is neither ISO 8601"):
        model.recommend(["s"], histories=[missing | {"at": ["noon"]}], **asked)
