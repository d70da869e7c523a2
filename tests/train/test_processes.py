"""Several processes train, evaluate and recommend as one, and hand their runs to fewer devices."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import filelock
import jax
import numpy as np
import pyarrow.csv
import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.train.records import read_json, read_records
from mtrec_jax.train.run import load_best, open_run

ROOT = Path(__file__).parents[2]
STEPS = 50

Command = Callable[..., list[subprocess.CompletedProcess[str]]]

# A command that asks itself to stop once it has been given a number of batches; 0: never.
STOPPER = """
import os, runpy, signal, sys
from mtrec_jax import cli
from mtrec_jax.train import loop

at, script = int(sys.argv.pop(1)), sys.argv.pop(1)
put, given = loop.put_batch, []

def put_and_stop(batch, mesh):
    given.append(0)
    if len(given) == at:
        os.kill(os.getpid(), signal.SIGTERM)
    return put(batch, mesh)

loop.put_batch = put_and_stop
runpy.run_path(script, run_name="__main__") if script != "mtrec" else cli.main()
"""


@pytest.fixture(scope="module")
def command(
    shop_experiment: Experiment,
    shop_prepared: Prepared,
    compiled_programs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Command:
    """`mtrec ARGUMENTS` in processes of their own, which share 8 or fewer virtual devices."""
    folder = tmp_path_factory.mktemp("processes")
    model = replace(
        shop_experiment.model, towers="shared_bottom", item_placement="sparse", dropout=0.0
    )
    steps = replace(
        shop_experiment.train,
        **{"steps": STEPS, "evaluate_every": 25, "checkpoint_every": 10, "batch_size": 16},
        precision="float64",
    )
    config = folder / "shop.toml"
    config.write_text(to_toml(replace(shop_experiment, model=model, train=steps)), "utf-8")

    def run(
        count: int, devices: int, *arguments: object, stop: int = 0
    ) -> list[subprocess.CompletedProcess[str]]:
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // count}",
            "JAX_ENABLE_X64": "1",
            "JAX_COMPILATION_CACHE_DIR": str(compiled_programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        started = []
        for number in range(count):
            joined = ["--coordinator", address, "--processes", count, "--process", number]
            script = ["mtrec"] if count == 1 else [ROOT / "scripts" / "train.py", *joined]
            program = ["-c", STOPPER, 0 if number else stop, *script]
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, [*program, *arguments])],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended = []
        for process in started:
            out, err = process.communicate(timeout=300)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return ended

    run.folder, run.prepared = folder, shop_prepared.folder  # type: ignore[attr-defined]
    return run


def _train(
    command: Command, count: int, mesh: tuple[int, int], name: str, stop: int = 0
) -> list[subprocess.CompletedProcess[str]]:
    prepared = command.prepared  # type: ignore[attr-defined]
    data, table = mesh
    return command(
        *(count, data * table, "train", "shop.toml", "--prepared", prepared, "--run", name),
        *("--set", f"train.mesh=[{data},{table}]"),
        stop=stop,
    )


def _learned(folder: Path) -> list[np.ndarray]:
    with jax.enable_x64(True):
        params, tables, step = load_best(open_run(folder))
    assert step == STEPS or step == STEPS // 2
    return [np.asarray(leaf) for leaf in jax.tree.leaves((params, tables))]


@pytest.fixture(scope="module")
def alone(command: Command) -> Path:
    """The run of one process with one device."""
    (done,) = _train(command, 1, (1, 1), "alone")
    assert done.returncode == 0, done.stderr
    return command.folder / "alone"  # type: ignore[attr-defined]


def test_two_processes_learn_what_one_device_learns(command: Command, alone: Path) -> None:
    done = _train(command, 2, (2, 4), "two")
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    two = command.folder / "two"  # type: ignore[attr-defined]
    for a, b in zip(_records(alone), _records(two), strict=True):
        assert a["step"] == b["step"]
        assert a["metric"] == b["metric"]
        assert a["task"] == b["task"]
        assert a["value"] == pytest.approx(b["value"], rel=1e-7)
    for left, right in zip(_learned(alone), _learned(two), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-10)
    # evaluation and recommendations of the same processes
    done = command(2, 8, "evaluate", "two")
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    together = read_json(two / "evaluation.json")
    done = command(2, 8, "recommend", "two", "--all-users", "--k", 5, "--out", "all.csv")
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    parts = [two.parent / f"all-0000{i}-of-00002.csv" for i in range(2)]
    shared = [pyarrow.csv.read_csv(part).to_pylist() for part in parts]
    (done_alone,) = command(1, 1, "evaluate", "two")
    assert done_alone.returncode == 0, done_alone.stderr
    (done_alone,) = command(1, 1, "recommend", "two", "--all-users", "--k", 5, "--out", "one.csv")
    assert done_alone.returncode == 0, done_alone.stderr
    assert _close(read_json(two / "evaluation.json")["tasks"], together["tasks"])
    one = pyarrow.csv.read_csv(two.parent / "one.csv").to_pylist()
    assert [(r["user"], r["item"]) for r in one] == [
        (r["user"], r["item"]) for part in shared for r in part
    ]


def _records(folder: Path) -> list[dict]:
    return [r for r in read_records(folder / "metrics.jsonl") if r["split"] != "timing"]


def _close(one: dict, other: dict) -> bool:
    return all(
        one[task][metric] == pytest.approx(value, rel=1e-6)
        for task, metrics in other.items()
        for metric, value in metrics.items()
    )


def test_a_run_goes_on_with_fewer_devices_and_processes(command: Command, alone: Path) -> None:
    folder = command.folder / "elastic"  # type: ignore[attr-defined]
    given = 0
    for count, mesh, more in ((2, (2, 4), 7), (1, (1, 4), 6), (1, (2, 1), 11), (1, (1, 1), 0)):
        done = _train(command, count, mesh, "elastic", stop=more)
        assert all(p.returncode == (143 if more else 0) for p in done), done[0].stderr
        if more:  # processes agree after every fourth step
            given += -(-more // 4) * 4 if count > 1 else more
            assert f"stopped at step {given} of {STEPS}" in done[0].stderr
        if mesh != (2, 4):
            assert "mesh" in done[0].stderr
            assert "last bits" in done[0].stderr
    for a, b in zip(_records(alone), _records(folder), strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-7)
    for left, right in zip(_learned(alone), _learned(folder), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-10)


def test_a_second_group_of_processes_is_refused(command: Command, alone: Path) -> None:
    with filelock.FileLock(alone / "lock"):
        done = _train(command, 2, (1, 2), "alone")
    assert done[0].returncode == 2
    assert "another process is training" in done[0].stderr
    assert done[1].returncode != 0
