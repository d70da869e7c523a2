"""Training runs: repeatable to the bit, stopped and continued to the bit, and stopped in time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pyarrow as pa
import pytest

from mtrec_jax.config import Experiment, Select, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.evaluate import Evaluation
from mtrec_jax.evaluation.protocol import protocol_of
from mtrec_jax.from_tables import fit
from mtrec_jax.train import loop, progress
from mtrec_jax.train.loop import train
from mtrec_jax.train.progress import Progress, never_silent
from mtrec_jax.train.records import read_records
from mtrec_jax.train.run import Run, load_best, open_run
from mtrec_jax.train.step import make_step
from mtrec_jax.train.stopping import Stopped

pytestmark = pytest.mark.usefixtures("compiled_programs")


def changed(experiment: Experiment, **keys: Any) -> Experiment:
    return replace(experiment, train=replace(experiment.train, **keys))


def without_timings(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_records(run / "metrics.jsonl") if r["split"] != "timing"]


def steps_kept(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def assert_same_model(one: Run, other: Run) -> None:
    """The parameters of the best checkpoints agree in every bit."""
    (params, tables, step), (others, other_tables, other_step) = load_best(one), load_best(other)
    assert step == other_step
    left, right = jax.tree.leaves((params, tables)), jax.tree.leaves((others, other_tables))
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], None]], None]]:
    """Have something happen while a step is under way. A signal that nobody catches fails a test
    instead of ending it."""

    def not_caught(number: int, frame: Any) -> None:
        raise AssertionError(f"signal {number} reached the handler of the caller")

    advance, previous = Progress.advance, signal.signal(signal.SIGTERM, not_caught)

    def arrange(step: int, action: Callable[[], None]) -> None:
        def and_then(self: Progress, number: int, losses: dict[str, float]) -> None:
            advance(self, number, losses)
            if number == step:
                action()

        monkeypatch.setattr(Progress, "advance", and_then)

    yield arrange
    assert signal.signal(signal.SIGTERM, previous) is not_caught, "a handler was left behind"


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise RuntimeError("power cut")


@pytest.mark.slow
def test_a_seed_decides_the_run(
    shop_run: Run, shop_experiment: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    again = train(shop_experiment, shop_prepared, tmp_path / "again", show_progress=False)
    one, two = (
        [
            line
            for line in (run.folder / "metrics.jsonl").read_bytes().splitlines()
            if b'"split": "timing"' not in line
        ]
        for run in (shop_run, again)
    )
    assert one == two
    assert_same_model(shop_run, again)


@pytest.mark.slow
def test_another_seed_is_another_run_of_as_many_epochs(
    shop_run: Run,
    shop_experiment: Experiment,
    shop_prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three epochs are the 27 steps of the other run; evaluation is due after each epoch. The seed
    is that of the layers, the negatives and the dropout, and that of the order."""
    seeds: dict[str, list[int]] = {"step": [], "order": []}

    def noting_step(*arguments: Any) -> Any:
        step = make_step(*arguments)

        def init(seed: int) -> Any:
            seeds["step"].append(seed)
            return step.init(seed)

        return step._replace(init=init)

    class NotingSource(BatchSource):
        def __init__(self, prepared: Prepared, split: str, size: int, *more: Any, **named: Any):
            super().__init__(prepared, split, size, *more, **named)
            seeds["order"] += [more[0]] if more else []

    monkeypatch.setattr(loop, "make_step", noting_step)
    monkeypatch.setattr(loop, "BatchSource", NotingSource)
    epoch = -(-shop_prepared.manifest.examples["train"] // 8)
    assert 3 * epoch == 27
    experiment = changed(shop_experiment, seed=1, steps=0, epochs=3, evaluate_every=0)
    other = train(experiment, shop_prepared, tmp_path / "run", show_progress=False)
    records = without_timings(other.folder)
    assert records[0] != without_timings(shop_run.folder)[0]
    measured = {r["step"] for r in records if r["split"] == "validation"}
    assert measured == {epoch, 2 * epoch, 3 * epoch}
    assert seeds == {"step": [1], "order": [1]}


def test_every_step_is_logged_and_evaluated_when_due(shop_run: Run) -> None:
    records = without_timings(shop_run.folder)
    losses = [(r["step"], r["task"]) for r in records if r["split"] == "train"]
    tasks = ("buy", "click", "next_item", "stars")
    assert losses == [(step, task) for step in (4, 8, 12, 16, 20, 24, 27) for task in tasks]
    measured = {r["step"] for r in records if r["split"] == "validation"}
    assert measured == {12, 24, 27}
    assert {(r["task"], r["metric"]) for r in records if r["step"] == 24} >= {
        ("next_item", "ndcg@10"),
        ("click", "auc"),
        ("buy", "log_loss"),
        ("stars", "rmse"),
    }
    assert all(np.isfinite(r["value"]) for r in records)


def test_training_learns(shop_run: Run) -> None:
    losses = [r["value"] for r in without_timings(shop_run.folder) if r["metric"] == "loss"]
    first, last = losses[:5], losses[-5:]
    assert sum(last) < sum(first)


def test_a_stopped_and_a_crashed_run_continue_to_the_same_bits(
    shop_run: Run,
    shop_experiment: Experiment,
    shop_prepared: Prepared,
    tmp_path: Path,
    at_step: Callable[[int, Callable[[], None]], None],
) -> None:
    """Stopped between evaluations and at one, and crashed between checkpoints: losses are sums
    over 4 steps, which a stop at 3 or the checkpoint at 14 cuts in two."""
    experiment, folder = changed(shop_experiment, checkpoint_every=7), tmp_path / "run"
    for step in (3, 12):
        at_step(step, terminate)
        with pytest.raises(Stopped, match=rf"stopped at step {step} of 27; .*same command") as end:
            train(experiment, shop_prepared, folder, show_progress=False)
        assert end.value.status == 143
        assert max(steps_kept(folder)) == step
    at_step(17, crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train(experiment, shop_prepared, folder, show_progress=False)
    assert max(steps_kept(folder)) == 14
    assert without_timings(folder)[-1]["step"] == 16, "to be forgotten and written again"
    at_step(27, terminate)  # too late to change anything
    finished = train(experiment, shop_prepared, folder, show_progress=False)
    assert without_timings(folder) == without_timings(shop_run.folder)
    assert_same_model(shop_run, finished)


def test_a_finished_run_is_left_as_it_is(
    shop_run: Run,
    shop_experiment: Experiment,
    shop_prepared: Prepared,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {p: p.stat().st_mtime_ns for p in shop_run.folder.rglob("*") if p.is_file()}
    train(shop_experiment, shop_prepared, shop_run.folder)
    said = capsys.readouterr().err
    assert f"{shop_run.folder} is trained already, up to step 27: nothing to do" in said
    assert {p: p.stat().st_mtime_ns for p in shop_run.folder.rglob("*") if p.is_file()} == files


@pytest.mark.slow
def test_the_best_checkpoint_of_a_lower_is_better_metric_is_kept_and_stops_the_run(
    plain: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    """Climbing up the loss makes each evaluation worse than the first."""
    experiment = changed(plain, evaluate_every=3, patience=3, steps=90)
    experiment = replace(experiment, select=Select(metric="stars/rmse"))
    climb = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(-0.02))
    run = train(experiment, shop_prepared, tmp_path / "run", climb, show_progress=False)
    found = [
        r["value"]
        for r in without_timings(run.folder)
        if (r["split"], r["task"], r["metric"]) == ("validation", "stars", "rmse")
    ]
    assert min(found) == found[0]
    assert len(set(found)) == len(found) == 4, "one evaluation, and three without improvement"
    assert steps_kept(run.folder) == [3, 9, 12]
    assert load_best(run)[2] == 3
    before = (run.folder / "metrics.jsonl").read_bytes()
    train(experiment, shop_prepared, run.folder, climb, show_progress=False)
    assert (run.folder / "metrics.jsonl").read_bytes() == before, "the stop is remembered"


@pytest.mark.slow
def test_patience_counts_since_the_best_step_which_is_the_first_of_equal_ones(
    shop_experiment: Experiment,
    shop_prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = iter([0.5, 0.4, 0.6, 0.6, 0.5, 0.9])
    protocol = protocol_of(shop_experiment, shop_prepared.manifest)

    def scripted(*_: Any, **__: Any) -> Evaluation:
        tasks = {"click": {"auc": next(values)}}
        return Evaluation(split="validation", protocol=protocol, fingerprint="", tasks=tasks)

    monkeypatch.setattr(loop, "evaluate", scripted)
    experiment = changed(shop_experiment, evaluate_every=2, patience=2)
    run = train(experiment, shop_prepared, tmp_path / "run", show_progress=False)
    assert list(values) == [0.9]
    assert steps_kept(run.folder) == [6, 8, 10]
    assert load_best(run)[2] == 6


@pytest.mark.slow
def test_the_mean_of_several_tasks_chooses_and_what_is_undefined_judges_nothing(
    plain: Experiment,
    shop_prepared: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Means nan, 0.5, 0.6, nan, 0.55, 0.6: the third is the best, and two follow that are no
    better. Each task alone would choose another step."""
    pairs = [(np.nan, 0.9), (0.7, 0.3), (0.6, 0.6), (0.9, np.nan), (0.2, 0.9), (0.5, 0.7), (1, 1)]
    values = iter({"click": {"auc": float(a)}, "buy": {"auc": float(b)}} for a, b in pairs)
    protocol = protocol_of(plain, shop_prepared.manifest)

    def scripted(*_: Any, **__: Any) -> Evaluation:
        tasks = next(values)
        return Evaluation(split="validation", protocol=protocol, fingerprint="", tasks=tasks)

    monkeypatch.setattr(loop, "evaluate", scripted)
    experiment = replace(plain, select=Select(metric=("click/auc", "buy/auc")))
    experiment = changed(experiment, evaluate_every=2, patience=2)
    run = train(experiment, shop_prepared, tmp_path / "run", show_progress=False)
    assert len(list(values)) == 1
    assert load_best(run)[2] == 6
    own = [r for r in without_timings(run.folder) if r["split"] == "best"]
    assert [(r["task"], r["metric"], r["step"], r["value"]) for r in own] == [
        ("click", "auc", 8, 0.9),
        ("buy", "auc", 2, 0.9),
    ]
    assert open_run(run.folder).experiment == experiment


@pytest.mark.slow
def test_labels_of_one_class_leave_the_metric_undefined_and_train_to_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last two events of each of 10 users, of which the first validates, are all bought."""
    k = np.arange(120)
    buy = np.where(k < 100, k % 3 % 2, 1)
    fit(
        pa.table({"user": k % 10, "item": k % 7, "time": k, "buy": buy}),
        user="user",
        item="item",
        time="time",
        tasks={"buy": "binary"},
        settings={
            "train": {"epochs": 6, "patience": 2, "batch_size": 10, "mesh": [1, 1]},
            "model": {"width": 4, "towers": {"kind": "shared_bottom"}, "fusion": "none"},
        },
        folder=tmp_path,
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "buy/auc is undefined on the validation set: all its labels there are equal" in said
    assert (
        said.index("rows read") < said.index("Prepared('fit': 10 users") < said.index("undefined")
    )
    assert said.index("undefined") < said.index("validation buy/auc nan")
    records = without_timings(tmp_path / "run")
    aucs = [r["value"] for r in records if r["metric"] == "auc"]
    assert aucs == [None] * 6


@pytest.mark.slow
def test_a_run_is_lengthened_to_what_it_had_been_from_the_start(
    plain: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    """To the bit, but for the record of losses at the old end, which cuts one of 4 steps."""
    ends = {}
    for name, lengths in {"straight": (2,), "lengthened": (1, 2)}.items():
        for epochs in lengths:
            one = changed(plain, steps=0, epochs=epochs, evaluate_every=0, schedule="constant")
            run = train(one, shop_prepared, tmp_path / name, show_progress=False)
        ends[name] = run
    assert_same_model(*ends.values())
    assert open_run(ends["lengthened"].folder).experiment == one
    straight, lengthened = (without_timings(run.folder) for run in ends.values())
    end = max(r["step"] for r in straight) // 2
    records = read_records(ends["lengthened"].folder / "metrics.jsonl")
    assert any((r["step"], r["metric"]) == (end, "seconds") for r in records)  # of the first part
    assert end % 4
    assert straight == [r for r in lengthened if (r["step"], r["split"]) != (end, "train")]
    shorter = changed(one, epochs=1)
    with pytest.raises(ConfigError, match=r"train\.epochs: 2 there, 1 here"):
        train(shorter, shop_prepared, ends["lengthened"].folder, show_progress=False)
    config = ends["lengthened"].folder / "config.toml"  # of a version that had one key less
    config.write_text(config.read_text().replace('targets = "all"\n', ""))
    train(one, shop_prepared, ends["lengthened"].folder, show_progress=False)


def test_a_schedule_that_ends_later_says_where_it_goes_on(plain: Experiment) -> None:
    """Linear over 16 steps from 0.01: half of that in the middle."""
    keys = {"warmup_steps": 0, "learning_rate": 0.01}
    said = {
        name: loop._schedule_goes_on(changed(plain, schedule=name, **keys), 8, 16)
        for name in ("constant", "linear")
    }
    assert said["constant"] == ""
    assert "'linear' goes on at 0.005 and ends there" in said["linear"]


def test_a_run_folder_says_what_it_is(
    shop_run: Run, shop_experiment: Experiment, shop_prepared: Prepared
) -> None:
    opened = open_run(shop_run.folder)
    assert opened.experiment == shop_experiment
    assert opened.prepared.manifest == shop_prepared.manifest
    assert "shop" in repr(opened)


def test_other_data_are_taken_for_newer_ones_while_the_own_are_there(
    shop_run: Run, shop_prepared: Prepared, tmp_path: Path
) -> None:
    copy, folder = tmp_path / "other", tmp_path / "run"
    shutil.copytree(shop_prepared.folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    manifest["fingerprint"] = "0123456789abcdef"
    (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert open_run(shop_run.folder, copy).prepared.learned == shop_prepared.folder.resolve()
    folder.mkdir()
    shutil.copy(shop_run.folder / "config.toml", folder)
    notes = {"folder": str(tmp_path / "gone"), "fingerprint": shop_prepared.manifest.fingerprint}
    (folder / "prepared.json").write_text(json.dumps(notes), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds other data \(0123456789abcdef\).*prepared="):
        open_run(folder, copy)


def test_a_folder_that_cannot_be_written_is_refused(
    plain: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be written \(Not a directory\)"):
        train(plain, shop_prepared, tmp_path / "file" / "run", show_progress=False)


def test_items_without_training_events_are_asked_for_before_the_training(
    shop_experiment: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    trained = shop_prepared.manifest.trained_items
    manifest = replace(shop_prepared.manifest, items=trained)
    prepared = replace(shop_prepared, manifest=manifest)
    evaluated = replace(shop_experiment.evaluate, among="untrained")
    asked = replace(shop_experiment, evaluate=evaluated)
    with pytest.raises(ConfigError, match=r"evaluate\.among: .*every item has training events"):
        train(asked, prepared, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_a_batch_must_divide_over_the_devices(
    shop_experiment: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    experiment = changed(shop_experiment, mesh=(8, 1), batch_size=12)
    with pytest.raises(ConfigError, match=r"12 does not divide over 8 devices; .*multiple of 8"):
        train(experiment, shop_prepared, tmp_path / "run", show_progress=False)


def test_64_bits_must_be_switched_on(
    shop_experiment: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    experiment = changed(shop_experiment, precision="float64")
    with pytest.raises(ConfigError, match=r"'float64' needs 64-bit JAX; set JAX_ENABLE_X64=1"):
        train(experiment, shop_prepared, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def command(
    plain: Experiment, shop_prepared: Prepared, one_device: dict[str, str], tmp_path: Path
) -> Callable[[str], subprocess.Popen[str]]:
    """Start `mtrec train` of 600 steps as a process of its own."""
    config, steps = tmp_path / "shop.toml", {"steps": 600, "log_every": 10, "evaluate_every": 300}
    config.write_text(to_toml(changed(plain, **steps, checkpoint_every=250)), encoding="utf-8")

    def start(run: str) -> subprocess.Popen[str]:
        mtrec = [sys.executable, "-c", "from mtrec_jax.cli import main; main()"]
        folders = ["--prepared", str(shop_prepared.folder), "--run", run]
        return subprocess.Popen(
            [*mtrec, "train", str(config), *folders],
            cwd=tmp_path,
            env=one_device,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.slow
def test_a_terminated_process_continues_to_the_same_bits(
    command: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    with command("straight") as process:
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    with command("stopped") as process:
        for _ in range(30_000):  # each try takes a hundredth of a second
            if metrics.exists() and metrics.read_text().count("\n") >= 15:  # 3 records of 5 losses
                break
            try:
                process.wait(timeout=0.01)
            except subprocess.TimeoutExpired:
                continue
            break
        process.terminate()
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 143, said
    assert "everything is saved in stopped. Run the same command to continue" in said
    assert max(steps_kept(tmp_path / "stopped")) < 250, "it was to be stopped early on"
    with command("stopped") as process:
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    assert without_timings(tmp_path / "stopped") == without_timings(tmp_path / "straight")
    assert_same_model(open_run(tmp_path / "straight"), open_run(tmp_path / "stopped"))


def test_where_nobody_watches_lines_tell_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step is begun at second 0; ten steps in 5 seconds, 89 are left."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with Progress(100, 0, True, "shop") as bar:
        assert bar._line() == "train shop: step 0 of 100, compiling …"
        bar.advance(1, {})
        for step, clock[0] in ((11, 5.0), (21, 10.0)):
            bar.advance(step, {"click": 0.5})
        bar.say("evaluating")
    said = capsys.readouterr().err
    assert said.count("steps/s") == 1
    assert "train shop: step 11 of 100, 2 steps/s, about 44 s left  click 0.5000" in said
    assert said.count("compiling the first step") == 1


def test_what_compiles_does_not_count_in_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps in 5 seconds, 80 in the first evaluation; the 5 of a second one count."""
    clock = [70.0]  # seconds of the first step
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    bar = Progress(101, 0, False, "shop")
    bar.advance(1, {})
    clock[0] += 5
    bar.advance(11, {})
    bar.say("evaluating")
    clock[0] += 80
    assert "step 11 of 101, 2 steps/s, about 45 s left" in bar._line()
    bar.advance(12, {})
    clock[0] += 5
    bar.advance(21, {})
    assert "step 21 of 101, 2 steps/s, about 40 s left" in bar._line()
    bar.say("evaluating")
    clock[0] += 5
    bar.advance(31, {})
    assert "step 31 of 101, 2 steps/s, about 35 s left" in bar._line()


def test_work_that_takes_long_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SILENCE", 0.001)
    lines, heard = list[str](), threading.Event()

    def say(text: str) -> None:
        lines.append(text)
        if text.endswith("so far; last: split: 3 events"):
            heard.set()

    with never_silent(say, "preparing") as tell:
        tell("split: 3 events")
        assert heard.wait(60)
    assert not [t for t in threading.enumerate() if t.name == "mtrec-progress"]


def test_only_the_first_of_equal_values_is_called_the_best(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(10, 0, True, "shop") as bar:
        for step in (2, 4):
            bar.advance(step, {})
            bar.evaluated("click/auc", 0.5, {"best": 0.5, "best_step": 2})
    assert capsys.readouterr().err.count("best so far") == 1


def test_a_first_validation_that_is_not_a_number_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(10, 0, True, "shop") as bar:
        bar.evaluated("click/auc", float("nan"), {"best": None, "best_step": None})
    assert "validation click/auc nan\n" in capsys.readouterr().err
