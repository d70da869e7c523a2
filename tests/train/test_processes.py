"""Several processes train, evaluate and recommend as one, and hand their runs to fewer devices."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.processes import start
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train import loop
from mtrec_jax.train.loop import train
from mtrec_jax.train.records import read_records
from mtrec_jax.train.run import load_best, open_run
from mtrec_jax.train.stopping import Stopped
from mtrec_jax.types import Batch

ROOT = Path(__file__).parents[2]
STEPS = 50

WHERE = ("step", "split", "task", "metric")

# A command that sends itself a signal once it has been given a number of batches; 0: never.
STOPPER = """
import os, runpy, signal, sys
from mtrec_jax.train import loop

at, by, script = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
put, given = loop.put_batch, []

def put_and_stop(batch, mesh):
    given.append(0)
    if len(given) == at:
        os.kill(os.getpid(), by)
    return put(batch, mesh)

loop.put_batch = put_and_stop
runpy.run_path(script, run_name="__main__")
"""


class Two:
    """`mtrec ARGUMENTS` in two processes with four virtual devices each."""

    def __init__(self, folder: Path, flags: str):
        self.folder, self.flags = folder, flags

    def __call__(
        self,
        *arguments: object,
        stop: int = 0,
        which: int = 0,
        by: signal.Signals = signal.SIGTERM,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Both processes, ended; one gets a signal when it has got `stop` batches."""
        environment = os.environ | {
            "XLA_FLAGS": f"{self.flags} --xla_force_host_platform_device_count=4",
            "JAX_ENABLE_X64": "1",
            # No cache of programs: it would serve the first process alone, and the other one would
            # be late for the first exchange, for which they wait 30 seconds.
        }
        started = []
        for number, (address, _) in enumerate(_arguments_of_two()):
            moment = stop if number == which else 0
            program = ["-c", STOPPER, moment, int(by), ROOT / "scripts" / "train.py"]
            joined = ["--coordinator", address, "--processes", 2, "--process", number]
            started.append(
                subprocess.Popen(
                    [sys.executable, *map(str, [*program, *joined, *arguments])],
                    cwd=self.folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended = []
        try:
            for process in started:
                out, err = process.communicate(timeout=300)
                done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
                ended.append(done)
        finally:
            for process in started:
                process.kill()
        return ended


@pytest.fixture(scope="module")
def experiment(plain: Experiment) -> Experiment:
    steps = replace(
        plain.train,
        steps=STEPS,
        evaluate_every=25,
        checkpoint_every=10,
        batch_size=16,
        precision="float64",
        mesh=(2, 4),
        optimizer="sgd",  # Adam magnifies the rounding of gradients that are almost zero
        row_optimizer="rowwise_adagrad",
    )
    return replace(plain, model=replace(plain.model, dropout=0.0), train=steps)


@pytest.fixture(scope="module")
def two(
    experiment: Experiment, one_device: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Two:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "shop.toml").write_text(to_toml(experiment), "utf-8")
    return Two(folder, one_device["XLA_FLAGS"])


@pytest.fixture(scope="module")
def alone(experiment: Experiment, shop_prepared: Prepared, two: Two) -> Path:
    """The run of one process with one device."""
    return _go_on(experiment, shop_prepared, two.folder / "alone", (1, 1))


def _go_on(experiment: Experiment, prepared: Prepared, folder: Path, mesh: tuple[int, int]) -> Path:
    """Train in this process."""
    config = replace(experiment, train=replace(experiment.train, mesh=mesh))
    with jax.enable_x64(True):
        train(config, prepared, folder, show_progress=False)
    return folder


def _learned(folder: Path) -> list[np.ndarray]:
    with jax.enable_x64(True):
        params, tables, _ = load_best(open_run(folder))
        return [np.asarray(leaf) for leaf in jax.tree.leaves((params, tables))]


def _assert_same(one: Path, other: Path) -> None:
    for a, b in zip(_records(one), _records(other), strict=True):
        assert [a[key] for key in WHERE] == [b[key] for key in WHERE]
        assert a["value"] == pytest.approx(b["value"], rel=1e-7)
    for left, right in zip(_learned(one), _learned(other), strict=True):
        # the gradient of a bias that a softmax does not see is rounding noise, about 1e-19
        assert np.abs(left - right).max() <= 1e-10 * max(np.abs(right).max(), 1e-6)


def _records(folder: Path) -> list[dict[str, Any]]:
    return [
        r for r in read_records(folder / "metrics.jsonl") if r["split"] in ("train", "validation")
    ]


@pytest.fixture(scope="module")
def both(two: Two, shop_prepared: Prepared) -> Path:
    """The run of two processes."""
    done = two("train", "shop.toml", "--prepared", shop_prepared.folder, "--run", "both")
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    return two.folder / "both"


@pytest.mark.slow
def test_two_processes_learn_and_recommend_what_one_does(two: Two, alone: Path, both: Path) -> None:
    _assert_same(alone, both)
    done = two("recommend", both, "--all-users", "--k", 5, "--out", "all.csv")
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    parts = [two.folder / f"all-0000{i}-of-00002.csv" for i in range(2)]
    shared = [row for part in parts for row in pyarrow.csv.read_csv(part).to_pylist()]
    with jax.enable_x64(True):
        one = pa.concat_tables(Recommender(both).recommend_all(5)).to_pylist()
    assert [(r["user"], r["item"]) for r in one] == [(r["user"], r["item"]) for r in shared]


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes_and_devices(
    two: Two, alone: Path, experiment: Experiment, shop_prepared: Prepared
) -> None:
    folder = two.folder / "elastic"
    arguments = ("train", "shop.toml", "--prepared", shop_prepared.folder, "--run", folder)
    done = two(*arguments, stop=7)
    assert [p.returncode for p in done] == [143, 143], done[0].stderr + done[1].stderr
    assert "stopped at step 8 of 50" in done[0].stderr  # all agree, after every fourth step
    for mesh, more in (((1, 4), 9), ((2, 1), 6)):
        with _stopping_after(more), pytest.raises(Stopped):
            _go_on(experiment, shop_prepared, folder, mesh)
    _go_on(experiment, shop_prepared, folder, (1, 1))
    _assert_same(alone, folder)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_one_that_is_killed_ends_the_others_and_the_run_goes_on_to_the_same_bits(
    two: Two, both: Path, shop_prepared: Prepared, which: int
) -> None:
    folder = two.folder / f"killed-{which}"
    arguments = ("train", "shop.toml", "--prepared", shop_prepared.folder, "--run", folder)
    done = two(*arguments, stop=33, which=which, by=signal.SIGKILL)
    assert done[which].returncode == -signal.SIGKILL
    assert done[1 - which].returncode not in (0, None), done[1 - which].stderr
    assert max(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*")) < STEPS
    done = two(*arguments)
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    for one, other in zip(_learned(both), _learned(folder), strict=True):
        np.testing.assert_array_equal(one, other)
    assert _records(both) == _records(folder)


@pytest.mark.slow
def test_two_processes_begin_with_what_a_run_has_learned(
    two: Two, alone: Path, experiment: Experiment, shop_prepared: Prepared
) -> None:
    """Tables that are split over four shards take over those of one device, bit by bit."""
    short = replace(experiment, train=replace(experiment.train, learning_rate=1e-30))
    (two.folder / "short.toml").write_text(to_toml(short), "utf-8")
    done = two(
        *("train", "short.toml", "--prepared", shop_prepared.folder, "--run", "warm"),
        *("--init-from", alone),
    )
    assert [p.returncode for p in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "initialised from" in done[0].stderr
    for one, other in zip(_learned(alone), _learned(two.folder / "warm"), strict=True):
        np.testing.assert_array_equal(one, other)


@contextlib.contextmanager
def _stopping_after(batches: int) -> Iterator[None]:
    given: list[int] = []

    def put_and_stop(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
        given.append(0)
        if len(given) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    put, loop.put_batch = loop.put_batch, put_and_stop
    try:
        yield
    finally:
        loop.put_batch = put


@pytest.mark.slow
def test_a_second_group_of_processes_is_refused(
    two: Two, alone: Path, shop_prepared: Prepared
) -> None:
    arguments = ("train", "shop.toml", "--prepared", shop_prepared.folder, "--run", alone)
    with filelock.FileLock(alone / "lock"):
        done = two(*arguments)
    assert done[0].returncode == 2
    assert "another process is training" in done[0].stderr
    assert done[1].returncode != 0


GATHER = """
import sys
import numpy as np
from mtrec_jax import processes

address, number = sys.argv[1], int(sys.argv[2])
processes.start(address, 2, number)
own = np.arange(5 * number).reshape(-1, 5) + 2**40
print([part.tolist() for part in processes.gathered(own, piece=7)])
"""


def test_arrays_of_all_processes_are_gathered_in_pieces() -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", GATHER, *arguments], stdout=subprocess.PIPE)
        for arguments in _arguments_of_two()
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        assert out.decode().splitlines()[-1] == str([[], [[2**40 + i for i in range(5)]]])


def _arguments_of_two() -> list[tuple[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [(address, str(number)) for number in range(2)]


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "message"),
    [
        ("localhost", 2, 0, "'localhost' is not HOST:PORT"),
        ("localhost:99999", 2, 0, "'localhost:99999' is not HOST:PORT"),
        ("localhost:9911", 0, -1, "--processes N and --process I are needed as well"),
        ("", 2, 0, "--processes, --process: --coordinator HOST:PORT is needed as well"),
        ("localhost:9911", 2, 2, "--process 2 of --processes 2: the processes are numbered"),
    ],
)
def test_what_does_not_name_a_process_is_refused(
    coordinator: str, processes: int, process: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(coordinator, processes, process)


def test_waiting_for_the_first_process_ends_with_its_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mtrec_jax.processes._PATIENCE", 1)
    address, number = _arguments_of_two()[1]
    with pytest.raises(ConfigError, match=rf"{address}: process 0 was not there within 1 s"):
        start(address, 2, int(number))
