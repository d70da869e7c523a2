"""One prepared folder, and the runs that choose from it without another preparation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from mtrec_jax.config import Experiment, Table
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import chosen
from mtrec_jax.models.model import make_model
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.train.loop import train
from mtrec_jax.train.run import evaluate_run, load_best, open_run

pytestmark = pytest.mark.usefixtures("compiled_programs")


@pytest.fixture
def columns_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The columns of training examples that anybody asks the files for."""
    read, seen = pq.ParquetFile.read_row_group, set[str]()

    def watched(
        self: pq.ParquetFile, number: int, columns: list[str] | None = None, **more: Any
    ) -> Any:
        seen.update(columns or [])
        return read(self, number, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    return seen


def brief(experiment: Experiment) -> Experiment:
    steps = dataclasses.replace(experiment.train, steps=4, evaluate_every=4, log_every=2)
    return dataclasses.replace(experiment, train=steps)


CHOICES: dict[str, Callable[[Experiment], Experiment]] = {
    "one task": lambda e: chosen(e, tasks=["stars"]),
    "retrieval alone, two features": lambda e: chosen(
        e, tasks=["next_item"], features=["brand", "click"]
    ),
    "two tasks, one feature": lambda e: chosen(e, tasks=["click", "buy"], features="segment"),
    "items updated as a whole": lambda e: dataclasses.replace(
        e, tables={**e.tables, "item": Table(update="dense")}
    ),
    "a rule for each table": lambda e: dataclasses.replace(
        e,
        tables={
            "item": Table(update="sparse", rule="rowwise_adagrad", id_dropout=0.3),
            "segment": Table(update="sparse", rule="sgd"),
            "brand": Table(update="sparse", hash_rows=10),
        },
    ),
}


SLOW = (
    "one task",
    "two tasks, one feature",
    "items updated as a whole",
    "a rule for each table",
)  # the others choose as much


@pytest.mark.slow
@pytest.mark.parametrize(
    "which", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CHOICES]
)
def test_a_run_stores_its_choice_and_reads_nothing_else(
    which: str,
    plain: Experiment,
    shop_prepared: Prepared,
    tmp_path: Path,
    columns_read: set[str],
) -> None:
    experiment = brief(CHOICES[which](plain))
    train(experiment, shop_prepared, tmp_path / "run", show_progress=False)
    assert f"label_{next(iter(experiment.tasks))}" in columns_read
    for prefix, names, all_names in (
        ("label", experiment.tasks, plain.tasks),
        ("context", experiment.features, plain.features),
        ("event", experiment.features, plain.features),
    ):
        others = {f"{prefix}_{name}" for name in all_names if name not in names}
        assert not columns_read & others
    run = open_run(tmp_path / "run")
    assert run.experiment == experiment
    assert run.prepared.manifest.fingerprint == shop_prepared.manifest.fingerprint
    assert list(run.prepared.manifest.tasks) == list(experiment.tasks)
    assert {f.name for f in run.prepared.manifest.fields} == set(experiment.features)
    found, _ = evaluate_run(run)
    assert found.tasks.keys() >= experiment.tasks.keys()
    params, tables, _ = load_best(run)
    rules = {t.rule or plain.train.row_optimizer for t in experiment.tables.values()
             if t.update == "sparse"}  # fmt: skip
    assert tables.keys() == rules
    layout = make_model(experiment, run.prepared.manifest).layout
    assert (layout.places["item"].stack == DENSE) == (which == "items updated as a whole")
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((params, tables)))


def test_what_the_folder_does_not_hold_is_refused(
    plain: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    other = dataclasses.replace(plain.features["segment"], column="age_group")
    experiment = dataclasses.replace(plain, features={**plain.features, "new": other})
    with pytest.raises(ConfigError, match=r"(?s)features\.new: not there.*Prepare it anew"):
        train(experiment, shop_prepared, tmp_path / "run", show_progress=False)
    changed = dataclasses.replace(plain, features={**plain.features, "segment": other})
    with pytest.raises(ConfigError, match=r"features\.segment\.column: '' there, 'age_group' here"):
        train(changed, shop_prepared, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()
