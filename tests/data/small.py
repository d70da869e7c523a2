"""A small log and the experiments over it that the tests of preparation share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.prepare import prepare
from mtrec_jax.experiments import parse_experiment

LOG = """user,item,rating,time
a,x,5,1
a,y,4,2
b,x,1,1
a,z,3,2
b,y,2,5
a,w,5,9
b,z,5,6
c,x,4,7
"""


def make(**sections: Any) -> Experiment:
    """A sequence experiment over log.csv; `data` extends its section, the others are replaced."""
    data = {
        "events": {"files": ["log.csv"]},
        "user": "user",
        "item": "item",
        "time": "time",
        "history_length": 3,
    }
    base = {"name": "small", "tasks": {"next": {"kind": "retrieval"}}, "train": {"epochs": 1}}
    return parse_experiment({**base, **sections, "data": data | sections.get("data", {})})


def rows(**sections: Any) -> Experiment:
    """An experiment over log.csv without histories, and without users, items and time; features
    are of the request unless they say otherwise."""
    none = {"user": "", "item": "", "time": "", "history_length": 0}
    data = {**none, **sections.pop("data", {})}
    features = {n: {"on": "request", **f} for n, f in sections.pop("features", {}).items()}
    base = {"model": {"encoder": "none"}, "clean": {"duplicates": "keep"}}
    base |= {"split": {"kind": "random"}}
    return make(data=data, features=features, **base | sections)


def run(folder: Path, experiment: Experiment, text: str = LOG, **files: str) -> Prepared:
    for name, content in {"log_csv": text, **files}.items():
        (folder / name.replace("_", ".")).write_text(content, encoding="utf-8")
    return prepare(experiment, folder, folder / "out")


def rules(prepared: Prepared) -> dict[str, int]:
    return {rule.rule: rule.rows for rule in prepared.manifest.report}


def example_of(prepared: Prepared, split: str, user: str) -> list[dict[str, Any]]:
    found = []
    for block in prepared.blocks(split):
        for index in np.flatnonzero(block["user"] == prepared.user_ids[user]):
            found.append({name: array[index].tolist() for name, array in block.items()})
    return found
