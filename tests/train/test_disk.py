"""A run whose disk becomes full says so, keeps what it has, and is continued."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import mtrec_jax
from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import CheckpointError, Error
from mtrec_jax.train.stopping import full_disk_named, full_memory_named
from tests.disks import small_disk

pytestmark = pytest.mark.usefixtures("compiled_programs")

# `mtrec train` in which files may not grow any more from its 25th step on.
LIMITED = """
import resource, sys, time
from pathlib import Path
from mtrec_jax.cli import main
from mtrec_jax.train import loop

put, calls = loop.put_batch, []

def put_and_limit(batch, mesh):
    calls.append(0)
    if len(calls) == limited:
        while not any(run.glob("checkpoints/20")):  # which is written by a thread
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return put(batch, mesh)

limited, run = int(sys.argv.pop(1)), Path(sys.argv[-1])
loop.put_batch = put_and_limit
main()
"""
Train = Callable[[int, Path], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def train(
    plain: Experiment,
    shop_prepared: Prepared,
    one_device: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Train:
    """Of 60 steps, with a checkpoint every 10: (step from which files are limited, run folder)."""
    folder = tmp_path_factory.mktemp("disk")
    steps = replace(plain.train, steps=60, log_every=10, evaluate_every=60, checkpoint_every=10)
    config = folder / "shop.toml"
    config.write_text(to_toml(replace(plain, train=steps)), "utf-8")

    def run(limited: int, run: Path) -> subprocess.CompletedProcess[str]:
        places = ["--prepared", str(shop_prepared.folder), "--run", str(run)]
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(limited), "train", str(config), *places],
            env=one_device,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def straight(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed run."""
    run = tmp_path_factory.mktemp("straight") / "run"
    done = train(0, run)
    assert done.returncode == 0, done.stderr
    return run


def _records(run: Path) -> list[bytes]:
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    return [line for line in lines if b"timing" not in line]


def _steps(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def _assert_full(done: subprocess.CompletedProcess[str], run: Path, why: str) -> None:
    """It says which step found no room, and the ones before it are there."""
    assert done.returncode == 2, done.stderr
    expected = rf"mtrec: no space left in {re.escape(str(run))} while saving step (\d+) \({why}\)"
    found = re.search(expected + r"\. Earlier steps are kept", done.stderr)
    assert found, done.stderr
    step = int(found[1])
    assert _steps(run) == [step - 20, step - 10], done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_small_disk_that_fills_up(train: Train, straight: Path, tmp_path: Path) -> None:
    kept = straight / "checkpoints" / "60"
    blocks = sum(-(-p.stat().st_size // 4096) for p in kept.rglob("*") if p.is_file())
    with small_disk(tmp_path / "disk", f"{4 * blocks * 5 // 2}k") as disk:
        run = disk / "run"
        _assert_full(train(0, run), run, "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        done = train(0, run)
        assert done.returncode == 0, done.stderr
        assert _records(run) == _records(straight)


@pytest.mark.slow
def test_files_that_may_not_grow(train: Train, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _assert_full(train(25, run), run, "File too large")
    done = train(0, run)
    assert done.returncode == 0, done.stderr
    assert _records(run) == _records(straight)


def test_only_a_lack_of_room_is_renamed(tmp_path: Path) -> None:
    message = r"^no space left in .* while writing \(Disk quota exceeded\)"
    with pytest.raises(CheckpointError, match=message), full_disk_named(tmp_path):
        raise ValueError("writing has failed") from OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(OSError, match="Permission"), full_disk_named(tmp_path):
        raise OSError(errno.EACCES, "Permission denied")


def test_a_batch_that_no_memory_holds_is_named() -> None:
    experiment = mtrec_jax.load_experiment("shop", ["train.batch_size=64"])
    message = r"memory does not hold the run \(RESOURCE_EXHAUSTED.*batch_size = 64.*mtrec plan"
    with pytest.raises(Error, match=message), full_memory_named(experiment):
        jax.numpy.zeros(2**46).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError), full_memory_named(experiment):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
