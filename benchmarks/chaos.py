"""Does a run that is killed again and again end as if nothing had happened?

`mtrec train` of a generated shop in a process that gets SIGKILL at random moments, 25 times, and is
started again; beside it an undisturbed run. Some kills come at a random moment of the start, which
takes most of the time, the others at one of the work after it. A row tells how many hit a phase;
"equal" compares the bytes of `metrics.jsonl`, but for timings, and all bits of the parameters and
tables of the last and the best checkpoint.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# `mtrec train` that notes its phase and step in a file, which outlives it.
_MARKED = """
import os, sys
from mtrec_jax.cli import main
from mtrec_jax.train import loop

file, at = os.open(sys.argv.pop(1), os.O_WRONLY), {"step": 0}

def mark(phase):
    os.pwrite(file, f"{phase},{at['step']}".ljust(40).encode(), 0)

def marked(owner, name, phase, after):
    function = getattr(owner, name)
    def call(*arguments):
        mark(phase)
        found = function(*arguments)
        mark(after)
        return found
    setattr(owner, name, call)

def advance(bar, number, losses):
    at["step"] = number
    mark("steps")

mark("building")
marked(loop.checkpoint, "restore_latest", "restore", "first step")
marked(loop, "_evaluate", "evaluation", "steps")
marked(loop.checkpoint, "save", "saving", "steps")
loop.Progress.advance = advance
main()
"""
_BEFORE_WORK = ("imports", "building", "restore", "first step")
_SETTINGS = (  # a small model: it is the restarts that matter
    *("data.history_length=16", "tables.item.update=sparse", "model.towers=shared_bottom"),
    *("train.epochs=0", "train.log_every=5", "train.checkpoint_every=15"),
    "train.evaluate_every=60",
)


def answer(quick: bool) -> list[dict[str, Any]]:
    """A row a phase: kills that hit it, and whether the run ended like the undisturbed one."""
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.data.shop import generate
    from mtrec_jax.experiments import load_experiment

    wanted, steps = (4, 300) if quick else (25, 2000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _say("preparing")
        generate(folder / "raw", seed=0, users=200, items=150, impressions=30)
        experiment = load_experiment("shop", [*_SETTINGS, f"train.steps={steps}"])
        prepare(experiment, folder / "raw", folder / "prepared")
        for run in ("straight", "timed"):  # the first one compiles
            began = time.monotonic()
            _, work = _run(folder, run, steps)
            _say(f"undisturbed: {time.monotonic() - began:.0f} s, {work:.0f} of them at work")
        killed = list(_kill(folder, steps, wanted, work))
        began = time.monotonic()
        _run(folder, "killed", steps)
        _say(f"to its end: {time.monotonic() - began:.0f} s")
        runs = [folder / name for name in ("straight", "timed", "killed")]
        equal = _same(runs[0], runs[1]) and _same(runs[0], runs[2])
        counts = Counter(killed)
        return [
            {"task": f"killed in: {phase}", "kills": counts[phase], "of": len(killed)}
            | {"steps of the run": steps, "equal": equal}
            for phase in (*_BEFORE_WORK, "steps", "steps while saving", "saving", "evaluation")
            if counts[phase]
        ]


def _kill(folder: Path, steps: int, wanted: int, work: float) -> Iterator[str]:
    """Start the run and kill it, again and again; the phases in which it died.

    Even if all the work between two kills were kept, the run would not end before the last kill.
    """
    rng, start = random.Random(0), 0.0
    for number in range(1, wanted + 1):
        if start and rng.random() < 0.4:
            moment, after = rng.uniform(0, start), False
        else:
            moment, after = rng.uniform(0, work / wanted), True
        phase, start = _run(folder, "killed", steps, moment, after, start)
        _say(f"kill {number} of {wanted}: {phase}")
        if phase != "end":
            yield phase.partition(",")[0]


def _run(
    folder: Path,
    run: str,
    steps: int,
    moment: float = float("inf"),
    after_start: bool = True,
    start: float = 0.0,
) -> tuple[str, float]:
    """Train until the end, or kill it a moment after its start or after the first step.

    Returns:
      Where it stood, and the seconds of the start; of an undisturbed run those of the work.
    """
    mark = folder / "mark"
    mark.write_text("imports,0".ljust(40))
    began, first = time.monotonic(), None
    with _training(folder, run, steps, mark) as process:
        while process.poll() is None:
            now = time.monotonic()
            if first is None and _phase(mark) not in _BEFORE_WORK:
                first, start = now, now - began
            since = first if after_start else began
            if since is not None and now - since >= moment:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        status = process.wait()
    if status == 0:
        return "end", time.monotonic() - (first or began)
    assert status == -signal.SIGKILL, f"the run ended by itself with status {status}"
    phase = mark.read_text().strip()
    # what a thread writes beside the steps
    if phase.startswith("steps") and any(
        (folder / run / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    ):
        phase = phase.replace("steps", "steps while saving")
    return phase, start


def _phase(mark: Path) -> str:
    return mark.read_text().partition(",")[0]


def _training(folder: Path, run: str, steps: int, mark: Path) -> subprocess.Popen[bytes]:
    settings = (*_SETTINGS, f"train.steps={steps}")
    changes = [part for setting in settings for part in ("--set", setting)]
    places = ["--prepared", str(folder / "prepared"), "--run", str(folder / run)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", _MARKED, str(mark), "train", "shop", *changes, *places],
        env=environment,
        stderr=subprocess.DEVNULL,
    )


def _same(one: Path, other: Path) -> bool:
    records = [
        [
            line
            for line in (run / "metrics.jsonl").read_bytes().splitlines()
            if b"timing" not in line
        ]
        for run in (one, other)
    ]
    left, right = _learned(one), _learned(other)
    return records[0] == records[1] and left == right


def _learned(folder: Path) -> list[bytes]:
    """Parameters and tables of the last and the best checkpoint, and which these are."""
    import jax

    from mtrec_jax.models.model import make_model
    from mtrec_jax.train import checkpoint
    from mtrec_jax.train.run import open_run
    from mtrec_jax.train.step import model_shapes

    run = open_run(folder)
    like = model_shapes(run.experiment, make_model(run.experiment, run.prepared.manifest))
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        steps = [manager.latest_step(), checkpoint.best_or_latest(manager, folder)]
        models = [checkpoint.restore_model(manager, step, like) for step in steps]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((steps, models))]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
