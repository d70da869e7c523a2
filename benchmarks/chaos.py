"""Does a run that is killed again and again end as if nothing had happened?

`mtrec train` of a generated shop in a process that gets SIGKILL at random moments, 25 times, and is
started again; beside it an undisturbed run. "equal" compares the bytes of `metrics.jsonl`, but for
timings, and the bits of parameters and tables.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_SETTINGS = (
    *("train.epochs=0", "train.steps=400", "train.checkpoint_every=15", "train.log_every=5"),
    *("train.evaluate_every=200", "model.item_placement=sparse"),
)


def answer(quick: bool) -> list[dict[str, Any]]:
    """One row: kills, how often the run had to be started, and whether it ended alike."""
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.data.shop import generate
    from mtrec_jax.experiments import load_experiment

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "raw", seed=0)
        prepare(load_experiment("shop"), folder / "raw", folder / "prepared")
        began = time.monotonic()
        with _training(folder, "straight") as process:
            assert process.wait() == 0
        seconds = time.monotonic() - began
        wanted, kills, starts, rng = 3 if quick else 25, 0, 0, random.Random(0)
        while True:
            starts += 1
            with _training(folder, "killed") as process:
                try:
                    # Most of the time goes by before the first step.
                    status = process.wait(rng.uniform(0.3, 1) * seconds if kills < wanted else None)
                except subprocess.TimeoutExpired:
                    os.kill(process.pid, signal.SIGKILL)
                    kills += process.wait() == -signal.SIGKILL
                    continue
            assert status == 0
            if kills >= wanted:
                break
            _shorten(folder / "killed")
        return [
            {"task": "SIGKILL", "kills": kills, "starts": starts, "seconds of a run": seconds}
            | {"equal": _same(folder / "straight", folder / "killed")}
        ]


def _training(folder: Path, run: str) -> subprocess.Popen[bytes]:
    mtrec = [sys.executable, "-c", "from mtrec_jax.cli import main; main()", "train", "shop"]
    changes = [part for setting in _SETTINGS for part in ("--set", setting)]
    places = ["--prepared", str(folder / "prepared"), "--run", str(folder / run)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return subprocess.Popen([*mtrec, *changes, *places], env=environment, stderr=subprocess.DEVNULL)


def _shorten(run: Path) -> None:
    """A run that has ended before all kills goes on from an earlier checkpoint."""
    steps = sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    (run / "checkpoints" / str(steps[-1])).rename(run / "checkpoints" / f"later-{time.time()}")


def _same(one: Path, other: Path) -> bool:
    import jax

    from mtrec_jax.train.run import load_best, open_run

    records = [
        [
            line
            for line in (run / "metrics.jsonl").read_bytes().splitlines()
            if b"timing" not in line
        ]
        for run in (one, other)
    ]
    left, right = (jax.tree.leaves(load_best(open_run(run))) for run in (one, other))
    bits = [
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(left, right, strict=True)
    ]
    return records[0] == records[1] and all(bits)
