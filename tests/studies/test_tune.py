"""Searches: defaults first, resumed exactly, nothing drawn twice, what cannot work left behind."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import mtrec_jax
from mtrec_jax.config import Evaluate, Experiment, Model, Train
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError, Error
from mtrec_jax.experiments import load_experiment, overridden
from mtrec_jax.studies.tune import (
    Range,
    as_key,
    check_values,
    default_values,
    read_ranges,
    search,
)
from mtrec_jax.train.records import read_records

RANGES = {
    "rate": Range(low=1e-4, high=1e-1, log=True),
    "width": Range(low=2, high=64, whole=True),
    "towers": Range(values=("mmoe", "ple", True)),
}
DEFAULTS = {"rate": 1e-3, "width": 16, "towers": "mmoe"}
Report = Callable[[list[float]], None]


class Killed(BaseException):
    """As a process that is gone: nothing is cleaned up behind it."""


def quality(values: dict[str, Any]) -> float:
    """Best at a rate of .03, a width of 40 and PLE."""
    off = abs(math.log10(values["rate"] / 0.03)) + abs(values["width"] - 40) / 40
    return -off - (values["towers"] != "ple")


class Work:
    """An objective that is killed at some of its calls, and remembers them."""

    def __init__(self, killed_at: tuple[int, ...] = ()):
        self.calls: list[tuple[dict[str, Any], str]] = []
        self.killed_at = killed_at

    def __call__(self, values: dict[str, Any], run: Path, report: Report) -> float:
        self.calls.append((values, run.name))
        if len(self.calls) in self.killed_at:
            raise Killed
        report([quality(values) - 1])
        return quality(values)


def run(folder: Path, work: Any, trials: int = 12, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "ranges": RANGES,
        "defaults": DEFAULTS,
        "seed": 7,
        "begun": {"data": "x"},
    } | changes
    return search(objective=work, larger=True, folder=folder, trials=trials, **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Twelve trials that nothing has interrupted."""
    found: list[dict[str, Any]] = run(tmp_path_factory.mktemp("whole"), Work())["trials"]
    return found


def test_defaults_come_first_and_no_trial_twice(whole: list[dict[str, Any]]) -> None:
    assert whole[0]["values"] == DEFAULTS
    assert len({json.dumps(trial["values"]) for trial in whole}) == 12
    assert all(1e-4 <= trial["values"]["rate"] <= 1e-1 for trial in whole)
    assert {type(trial["values"]["width"]) for trial in whole} == {int}


def test_a_study_that_is_killed_twice_is_the_same_study(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Killed in its 3rd and 8th trial: these are done again in their own folders."""
    work = Work(killed_at=(3, 9))
    for _ in range(2):
        with pytest.raises(Killed):
            run(tmp_path, work)
    found = run(tmp_path, work)
    assert found["trials"] == whole
    assert len(work.calls) == 14
    assert work.calls[2] == work.calls[3]
    assert work.calls[8] == work.calls[9]
    assert found["best"]["value"] == max(
        trial["value"] for trial in whole if trial["value"] is not None
    )
    assert run(tmp_path, work)["trials"] == whole, "all is done"
    assert len(work.calls) == 14
    assert len(run(tmp_path, work, trials=13)["trials"]) == 13, "trials count all that there are"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.studies.test_tune import Work, run
work = Work()
def objective(values, folder, report):
    if len(work.calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(values, folder, report)
run(Path(sys.argv[1]), objective)
"""


@pytest.mark.slow
def test_a_study_whose_process_is_killed_is_the_same_study(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    """As above with SIGKILL; three more processes take ten seconds."""
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(tmp_path)]
        assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == -9
    assert run(tmp_path, Work())["trials"] == whole


def test_what_has_no_finite_value_is_a_bad_trial_and_never_the_best(tmp_path: Path) -> None:
    outcomes: Iterator[Any] = iter(
        [0.5, math.inf, math.nan, -math.inf, Error("the loss is not finite"), 0.75]
    )

    def work(values: dict[str, Any], folder: Path, report: Report) -> float:
        outcome = next(outcomes)
        if isinstance(outcome, Error):
            raise outcome
        return float(outcome)

    found = run(tmp_path, work, trials=6)
    assert [trial["value"] for trial in found["trials"]] == [0.5, None, None, None, None, 0.75]
    assert found["best"]["trial"] == 5
    assert found["trials"][4]["reason"] == "the loss is not finite"
    with pytest.raises(StopIteration):  # the seventh is a new one: six are done
        run(tmp_path, work, trials=7)


def test_a_trial_below_the_median_of_the_others_ends_early(tmp_path: Path) -> None:
    """From the second evaluation on, once five trials are finished; others are not touched."""
    reached: list[int] = []

    def work(values: dict[str, Any], folder: Path, report: Report) -> float:
        number, so_far = len(reached), list[float]()
        reached.append(0)
        for evaluation in range(4):
            so_far.append(-1.0 if number in (2, 6) else number + evaluation / 10)
            report(so_far)
            reached[-1] = len(so_far)
        return so_far[-1]

    found = run(tmp_path, work, trials=8)
    assert reached == [4, 4, 4, 4, 4, 4, 1, 4]
    assert [t["reason"] for t in found["trials"] if t["reason"]] == ["worse than the median"]
    assert found["trials"][6]["value"] is None


def test_checkpoints_of_all_but_the_best_are_removed(tmp_path: Path) -> None:
    def work(values: dict[str, Any], folder: Path, report: Report) -> float:
        (folder / "checkpoints" / "3").mkdir(parents=True)
        return [0.1, 0.3, 0.2][int(folder.name)]

    run(tmp_path, work, trials=3)
    kept = [folder.parent.name for folder in tmp_path.glob("trials/*/checkpoints")]
    assert kept == ["0001"]


def test_another_study_in_the_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Work(), trials=1)
    wider = RANGES | {"rate": Range(low=1e-5, high=1e-1, log=True)}
    for changes in ({"ranges": wider}, {"begun": {"data": "y"}}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes)).replace('begun', 'data')}: "):
            run(tmp_path, Work(), **changes)


def test_small_ranges_end_when_all_is_tried(tmp_path: Path) -> None:
    ranges, work = {"towers": Range(values=("a", "b", "c"))}, []

    def objective(values: dict[str, Any], folder: Path, report: Report) -> float:
        work.append(values["towers"])
        return 0.0

    run(tmp_path, objective, ranges=ranges, defaults={"towers": "b"})
    assert work[0] == "b"
    assert sorted(work) == ["a", "b", "c"]


def test_ranges_are_read(shop_experiment: Experiment) -> None:
    assert read_ranges({"train.learning_rate": "1e-4..1e-2:log", "tasks.buy.weight": "0.5..2"}) == {
        "train.learning_rate": Range((), 1e-4, 1e-2, True, False),
        "tasks.buy.weight": Range((), 0.5, 2.0, False, False),
    }
    assert read_ranges({"model.width": "8..64:log"})["model.width"] == Range((), 8, 64, True, True)
    assert read_ranges({"model.towers": ["mmoe", "ple"]})["model.towers"].values == ("mmoe", "ple")
    assert read_ranges({"train.batch_size": "64, 128"})["train.batch_size"].values == (64, 128)
    for key, wrong in {
        "train.learning_rate": "1e-2..1e-4",
        "train.warmup_steps": "0..10:log",
        "model.dropout": "much",
        "model.towers": ["ple"],
        "data.history_length": "10..50",
        "tasks.buy.where": ["click", ""],
    }.items():
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            read_ranges({key: wrong})
    with pytest.raises(ConfigError, match="nothing to search"):
        read_ranges({})


def test_defaults_are_those_of_the_configuration(shop_experiment: Experiment) -> None:
    ranges = read_ranges({"model.towers": "ple,mmoe", "model.width": "4..64"})
    assert default_values(shop_experiment, ranges) == {"model.towers": "mmoe", "model.width": 8}
    for declared in ({"model.width": "16..64"}, {"model.towers": "ple,esmm"}):
        with pytest.raises(ConfigError, match="outside of its range"):
            default_values(shop_experiment, read_ranges(declared))
    with pytest.raises(ConfigError, match="widht"):
        default_values(shop_experiment, read_ranges({"model.widht": "4..64"}))
    with pytest.raises(ConfigError, match=r"no task 'clik'\. Did you mean 'click'"):
        default_values(shop_experiment, read_ranges({"tasks.clik.weight": "0..2"}))


def test_values_are_checked_before_the_first_trial(shop_experiment: Experiment) -> None:
    """0..1 of a key that takes fractions holds the default .1, which would not be a whole one."""
    read = read_ranges({"model.dropout": "0..1", "model.width": "8.0..16.0"})
    assert not as_key("model.dropout", read["model.dropout"], 0.1).whole
    with pytest.raises(ConfigError, match="takes whole numbers"):
        as_key("model.width", read["model.width"], 8)
    for declared in ({"model.towers": "mmoe, pel"}, {"model.dropout": "0..1.5"}):
        with pytest.raises(ConfigError, match=r"cannot be ('pel'|1\.4999)"):
            check_values(shop_experiment, read_ranges(declared))
    # what goes with a value of another key alone is left to the trials
    heads = {"model.encoder.heads": "1, 3", "model.temperature": "0.0..1.0"}
    with pytest.raises(ConfigError, match=r"heads cannot be 3: (?s:.)* no multiple"):
        check_values(shop_experiment, read_ranges(heads))
    check_values(shop_experiment, read_ranges(heads | {"model.width": "8, 12"}))


def test_a_kind_that_is_declared_keeps_its_options(shop_experiment: Experiment) -> None:
    assert overridden(shop_experiment, {"model.towers": "mmoe"}) == shop_experiment
    other = overridden(shop_experiment, {"model.towers": "ple", "tasks.click.weight": 3})
    assert (other.model.towers.kind, other.model.towers.experts) == ("ple", 4)
    assert other.tasks["click"].weight == 3


CHOSEN = [
    (section, field.name)
    for section, options in (("model", Model), ("train", Train), ("evaluate", Evaluate))
    for field in dataclasses.fields(options)
    if "Choice(" in str(field.type)
]


@pytest.mark.parametrize(("section", "field"), CHOSEN)
def test_a_class_of_ones_own_stays_wherever_something_is_chosen(
    section: str, field: str, shop_experiment: Experiment
) -> None:
    """A study reads the experiment anew for each trial."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine:
        kind: str = "mine"
        size: int = 3

    part = getattr(shop_experiment, section)
    mine = (Mine(size=5),) if field == "baselines" else Mine(size=5)
    declared = dataclasses.replace(
        shop_experiment, **{section: dataclasses.replace(part, **{field: mine})}
    )
    found = overridden(declared, {"train.seed": 4})
    assert getattr(getattr(found, section), field) == mine
    assert found.train.seed == 4


def test_ranges_may_be_declared(tmp_path: Path, shop_experiment: Experiment) -> None:
    declared = ['tune.ranges."x"=1']
    with pytest.raises(ConfigError):
        load_experiment("shop", declared)
    settings = {"tune": {"trials": 3, "ranges": {"model.width": "4..64", "model.towers": ["a"]}}}
    tune = load_experiment("shop", settings).tune
    assert tune is not None
    assert (tune.trials, tune.ranges["model.towers"]) == (3, ("a",))


def test_trials_are_runs_on_prepared_data(
    small: tuple[Experiment, Prepared], tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """Two trials of twelve steps; another call has nothing left to do, and says the same."""
    experiment, prepared = small
    ranges, said = {"train.learning_rate": "1e-4..1e-1:log"}, list[str]()
    found = mtrec_jax.study_tune(experiment, prepared, tmp_path, ranges, 2, say=said.append)
    again = mtrec_jax.study_tune(experiment, prepared, tmp_path, ranges, 2, say=said.append)
    assert list(again.trials) == list(found.trials)
    assert [line.partition(":")[0] for line in said] == ["trial 0"] * 2 + ["trial 1"] * 2
    assert found.trials["train.learning_rate"][0] == experiment.train.learning_rate
    run = mtrec_jax.open_run(found.run)
    metrics = mtrec_jax.evaluate_run(run)[0].tasks
    mean = (metrics["plus"]["auc"] + metrics["minus"]["auc"]) / 2
    assert found.value == pytest.approx(mean, abs=1e-9)
    assert found.value == max(found.trials["value"])
    best = mtrec_jax.load_experiment(tmp_path / "best.toml")
    assert best == run.experiment == found.experiment


@pytest.mark.slow
def test_a_trial_goes_on_from_its_checkpoint(
    small: tuple[Experiment, Prepared], tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """Killed after the first of two evaluations: the run is continued, and both are reported."""
    experiment, prepared = small
    ranges = {"train.learning_rate": "1e-4..1e-1:log"}

    def killed(text: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        mtrec_jax.study_tune(experiment, prepared, tmp_path, ranges, 1, say=killed)
    run = tmp_path / "trials" / "0000"
    half = {"train.steps": 6}
    mtrec_jax.train_run(overridden(experiment, half), prepared, run, show_progress=False)
    found = mtrec_jax.study_tune(experiment, prepared, tmp_path, ranges, 1)
    assert found.trials["evaluations"] == [2]
    steps = [record["step"] for record in read_records(run / "metrics.jsonl")]
    assert steps == sorted(steps), "nothing was done twice"
