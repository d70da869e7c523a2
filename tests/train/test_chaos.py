"""A run that is killed at bad moments, and whose files are damaged, ends as if nothing happened."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.train import checkpoint
from mtrec_jax.train.loop import train
from mtrec_jax.train.records import read_records
from mtrec_jax.train.run import Run, check_folder, load_best, open_run

pytestmark = pytest.mark.usefixtures("compiled_programs")

# `mtrec train` that kills itself at a moment.
KILLER = """
import os, signal, sys, threading, time
from pathlib import Path
from mtrec_jax.cli import main
from mtrec_jax.train import loop
from mtrec_jax.train.records import Records

moment = sys.argv.pop(1)
checkpoints = Path(sys.argv[-1]) / "checkpoints"
calls = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_when(condition):
    def watch():
        while not condition():
            time.sleep(0.0002)
        die()
    threading.Thread(target=watch, daemon=True).start()

def parts():
    found = checkpoints.glob("*.orbax-checkpoint-tmp")
    try:
        return [p for step in found for p in step.iterdir()]
    except FileNotFoundError:  # it has been completed
        return []

if moment == "mid-step":
    put = loop.put_batch
    def put_and_die(batch, mesh):
        calls.append(0)
        if len(calls) == 6:
            threading.Timer(0.002, die).start()
        return put(batch, mesh)
    loop.put_batch = put_and_die
elif moment == "checkpoint is written":
    die_when(lambda: any(checkpoints.glob("*.orbax-checkpoint-tmp")))
elif moment == "between its parts":
    die_when(lambda: 1 <= len(parts()) <= 3)
elif moment == "restore":
    restore = loop.checkpoint.restore
    def restore_and_die(*arguments):
        threading.Timer(0.01, die).start()
        return restore(*arguments)
    loop.checkpoint.restore = restore_and_die
elif moment == "metrics are written":
    add = Records.add
    def add_half(self, step, *rest):
        if step >= 25:
            with self.path.open("a") as file:
                file.write('{"step": 25, "spl')
            die()
        add(self, step, *rest)
    Records.add = add_half
main()
"""
MOMENTS = (
    *("mid-step", "checkpoint is written", "between its parts"),
    *("metrics are written", "restore"),
)


@pytest.fixture(scope="module")
def command(
    plain: Experiment,
    shop_prepared: Prepared,
    one_device: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """`mtrec train` of 60 steps in a process of its own: (when to die, run folder) -> the process.

    Checkpoints are due every 10 steps, records every 5."""
    folder = tmp_path_factory.mktemp("chaos")
    steps = replace(plain.train, steps=60, log_every=5, evaluate_every=30, checkpoint_every=10)
    config = folder / "shop.toml"
    config.write_text(to_toml(replace(plain, train=steps)), "utf-8")

    def run(moment: str, name: str) -> subprocess.CompletedProcess[str]:
        arguments = ["train", str(config), "--prepared", str(shop_prepared.folder), "--run", name]
        return subprocess.run(
            [sys.executable, "-c", KILLER, moment, *arguments],
            cwd=folder,
            env=one_device,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    run.folder = folder  # type: ignore[attr-defined]
    return run


@pytest.fixture(scope="module")
def straight(command: Callable[[str, str], subprocess.CompletedProcess[str]]) -> Path:
    """The run folder of an undisturbed run."""
    done = command("never", "straight")
    assert done.returncode == 0, done.stderr
    return command.folder / "straight"  # type: ignore[attr-defined]


def assert_same(one: Path, other: Path) -> None:
    """Records and parameters agree in every bit."""
    records = (
        [
            line
            for line in (run / "metrics.jsonl").read_bytes().splitlines()
            if b"timing" not in line
        ]
        for run in (one, other)
    )
    assert next(records) == next(records)
    left, right = (jax.tree.leaves(load_best(open_run(run))) for run in (one, other))
    for a, b in zip(left, right, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_killed_at_five_moments(
    command: Callable[[str, str], subprocess.CompletedProcess[str]], straight: Path
) -> None:
    killed = straight.parent / "killed"
    for moment in MOMENTS:
        died = command(moment, "killed")
        assert died.returncode == -signal.SIGKILL, (moment, died.stderr)
        if moment == "metrics are written":  # what is whole can be read
            assert max(r["step"] for r in read_records(killed / "metrics.jsonl")) == 20
    done = command("never", "killed")
    assert done.returncode == 0, done.stderr
    assert_same(straight, killed)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "truncated", "notes"])
def test_a_damaged_checkpoint_is_set_aside(
    command: Callable[[str, str], subprocess.CompletedProcess[str]], straight: Path, damage: str
) -> None:
    run = straight.parent / damage
    shutil.copytree(straight, run)
    latest = run / "checkpoints" / "60"
    if damage == "notes":
        file = next(p for p in (latest / "meta").iterdir() if b'"stale"' in p.read_bytes())
        file.write_bytes(re.sub(rb'"stale": .', b'"stale": 7', file.read_bytes()))
    else:
        for file in (latest / "trainer").rglob("d/*"):  # in some of them, nothing is in use
            content = bytearray(file.read_bytes())
            if damage == "truncated":
                content = content[: len(content) // 2]
            else:
                content[len(content) // 2] ^= 0b1000
            file.write_bytes(content)
    done = command("never", damage)
    assert done.returncode == 0, done.stderr
    assert f"{damage}/checkpoints/60 is damaged and was moved to" in done.stderr
    assert "going on from step 50" in done.stderr
    assert (run / "damaged" / "60").is_dir()
    assert_same(straight, run)


def test_a_start_that_is_killed_while_it_claims_its_folder_leaves_it_free(
    shop_experiment: Experiment, tmp_path: Path
) -> None:
    for name in ("prepared.json", "config.toml", "init_from.json"):
        (tmp_path / f"{name}.partial").write_text("{")
    check_folder(tmp_path, shop_experiment)
    (tmp_path / "thesis.txt.partial").write_text("")
    with pytest.raises(ConfigError, match="is not empty and no run folder"):
        check_folder(tmp_path, shop_experiment)


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_the_new_best(
    shop_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process that trains has found a better one."""
    run = replace(shop_run, folder=tmp_path / "run")
    shutil.copytree(shop_run.folder, run.folder)
    _, _, best = load_best(run)
    restore = checkpoint.restore_model

    def removed_first(manager: Any, step: int, *rest: Any) -> Any:
        if step == best:
            shutil.rmtree(run.folder / "checkpoints" / str(best))
        return restore(manager, step, *rest)

    monkeypatch.setattr(checkpoint, "restore_model", removed_first)
    assert load_best(run)[2] != best


def test_the_second_trainer_in_a_run_folder_is_refused(
    shop_experiment: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    with (
        filelock.FileLock(tmp_path / "lock"),
        pytest.raises(ConfigError, match="another process is training in"),
    ):
        train(shop_experiment, shop_prepared, tmp_path, show_progress=False)
