"""A final training on the whole log: nothing is held back, and the last step is the best."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import mtrec_jax
from mtrec_jax.cli.data import prepare_folder
from mtrec_jax.data.prepare import prepare, up_to_date
from mtrec_jax.errors import ConfigError
from mtrec_jax.from_tables import experiment_of
from tests.data.small import LOG, make, run

WHOLE = {"split.validation": 0, "split.test": 0}


@pytest.mark.parametrize(
    "kind",
    [
        "leave_one_out",
        "folds",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("time", "user_ratio", "random")),
    ],
)
def test_every_event_trains_whatever_the_kind(kind: str, tmp_path: Path) -> None:
    held = run(tmp_path, make(split={"kind": kind, "validation": 0, "test": 0}))
    assert held.manifest.split.sizes == {"train": 8, "validation": 0, "test": 0}
    assert held.manifest.targets == {"train": 8, "validation": 0, "test": 0}


def test_a_share_of_nothing_validates_nothing_and_tests_the_rest(tmp_path: Path) -> None:
    found = run(tmp_path, make(split={"kind": "time", "validation": 0, "test": 0.25}))
    assert found.manifest.split.sizes == {"train": 6, "validation": 0, "test": 2}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train": {"epochs": 1, "patience": 2}}, "train.patience"),
        ({"train": {"epochs": 1, "evaluate_every": 5}}, "train.evaluate_every"),
        ({"select": {"metric": "next/ndcg@10"}}, "select.metric"),
        ({"split": {"validation": 0, "test": 0.1}}, "split.validation"),
    ],
)
def test_what_needs_validation_events_is_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make(**{"split": {"validation": 0, "test": 0}, **changes})


def test_the_length_of_such_a_training_is_given() -> None:
    tasks = {"next_item": "retrieval"}
    given = "user", "item", "time", tasks, "", None
    with pytest.raises(ConfigError, match=r"train\.epochs, train\.steps"):
        experiment_of(*given, WHOLE)
    assert experiment_of(*given, WHOLE | {"train.steps": 7}).train.patience == 0
    assert experiment_of(*given, {}).train.patience == 4


@pytest.mark.slow
def test_the_last_step_is_kept_and_there_is_nothing_to_evaluate(
    tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    log = {"user": rng.integers(0, 9, 90), "item": rng.integers(0, 7, 90)}
    model = mtrec_jax.fit(
        pa.table(log),
        user="user",
        item="item",
        tasks={"next_item": "retrieval"},
        settings=WHOLE
        | {"train.steps": 5, "train.batch_size": 3, "model.width": 8, "train.mesh": [1, 1]},
        folder=tmp_path,
        show_progress=False,
    )
    assert model.step == 5
    assert model.prepared.manifest.split.sizes["train"] == model.prepared.manifest.events
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line).get("split") for line in lines} & {"validation"} == set()
    for split in ("validation", "test"):
        with pytest.raises(ConfigError, match="nothing to evaluate"):
            mtrec_jax.evaluate_run(model.run, split)


def test_a_folder_is_up_to_date_until_data_or_configuration_change(tmp_path: Path) -> None:
    experiment = make()
    made = run(tmp_path, experiment)
    found = up_to_date(experiment, tmp_path, made.folder)
    assert found is not None
    assert found.manifest == made.manifest
    assert up_to_date(make(data={"history_length": 2}), tmp_path, made.folder) is None
    assert up_to_date(experiment, tmp_path, tmp_path / "elsewhere") is None
    (tmp_path / "log.csv").write_text(LOG + "c,w,1,9\n", encoding="utf-8")
    assert up_to_date(experiment, tmp_path, made.folder) is None
    grown = prepare(experiment, tmp_path, tmp_path / "grown", grow_from=made.folder)
    assert up_to_date(experiment, tmp_path, grown.folder) is not None


@pytest.mark.slow
def test_the_command_run_does_not_prepare_again(tmp_path: Path) -> None:
    experiment = make()
    made = run(tmp_path, experiment)
    written = (made.folder / "manifest.json").stat().st_mtime_ns
    prepare_again = functools.partial(
        prepare_folder,
        experiment,
        tmp_path,
        made.folder,
        None,
        remedy="",
        engine="duckdb",
        memory="",
        master="local[*]",
    )
    assert prepare_again(again=False).manifest == made.manifest
    assert (made.folder / "manifest.json").stat().st_mtime_ns == written
    prepare_again()  # as the command prepare
    assert (made.folder / "manifest.json").stat().st_mtime_ns > written
