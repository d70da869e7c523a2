"""A table that is larger than what a process may have trains over two processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mtrec_jax.config import to_toml
from mtrec_jax.data.prepare import prepare
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.train.records import read_records

ROOT = Path(__file__).parents[2]
ROWS, WIDTH = 30_000_000, 64  # 7.7 GB
LIMIT = 7_300_000_000  # bytes of data a process may have

# scripts/train.py in a process with less memory
LIMITED = """
import resource, runpy, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv.pop(1)),) * 2)
try:
    np.empty(int(sys.argv.pop(1)), np.uint8)
except MemoryError:  # the whole table is not to be had
    pass
else:
    sys.exit("the limit does not hold")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only"
)
def test_a_table_beyond_the_memory_of_a_process(tmp_path: Path) -> None:
    assert ROWS * WIDTH * 4 > LIMIT
    rng = np.random.default_rng(0)
    lines = (f"{u},{u % 2}" for u in rng.integers(0, 10**9, 800))
    (tmp_path / "log.csv").write_text("who,label\n" + "\n".join(lines), "utf-8")
    experiment = parse_experiment(
        {
            "name": "large",
            "data": {"events": {"files": ["log.csv"]}},
            "split": {"kind": "random"},
            "features": {"who": {"kind": "hashed", "buckets": ROWS, "on": "request"}},
            "tables": {"who": {"update": "sparse", "rule": "sgd"}},
            "tasks": {"label": {"kind": "binary"}},
            "model": {
                **{"width": WIDTH, "fusion": "none"},
                "towers": {"kind": "shared_bottom", "expert_hidden": [8], "tower_hidden": [4]},
            },
            "train": {
                **{"steps": 8, "batch_size": 64, "mesh": [1, 2], "evaluate_every": 8},
                **{"log_every": 4, "checkpoint_wait": True},
            },
            "evaluate": {"batch_size": 64},
        }
    )
    prepared = prepare(experiment, tmp_path, tmp_path / "prepared")
    (tmp_path / "large.toml").write_text(to_toml(experiment), "utf-8")
    arguments = ["train", "large.toml", "--prepared", str(prepared.folder), "--run"]
    for process in _run(tmp_path, [*arguments, "two"]):
        assert process.returncode == 0, process.stderr
    assert max(r["step"] for r in read_records(tmp_path / "two" / "metrics.jsonl")) == 8


def _run(folder: Path, arguments: list[str]) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = []
    for number in range(2):
        joined = ["--coordinator", address, "--processes", "2", "--process", str(number)]
        limits = [str(LIMIT), str(ROWS * WIDTH * 4)]
        program = ["-c", LIMITED, *limits, str(ROOT / "scripts" / "train.py")]
        started.append(
            subprocess.Popen(
                [sys.executable, *program, *joined, *arguments],
                cwd=folder,
                env=os.environ
                | {
                    "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # so large a table takes minutes else
                },
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = []
    for process in started:
        _, err = process.communicate(timeout=300)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, "", err))
    return ended
