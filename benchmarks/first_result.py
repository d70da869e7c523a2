"""How long until a first result: import, --help, fit, recommend in a new process, mtrec run shop.

`--against COMMIT` has the same done by another commit, in a worktree with an environment of its own
made from that commit's constraints (in `--folder`, which is kept; else in a temporary one). Both
take turns, and each turn is a new process: cold, with no compiled programs kept, then warm, with
those of the turn before. A commit that keeps none has one turn, which counts for both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.commits import Side, environment_of, here, other

# The README's example, whose files are kept.
FIT = """
import numpy as np
import pyarrow as pa
import mtrec_jax

rng = np.random.default_rng(0)
log = {
    "user": rng.integers(0, 200, 5000),
    "item": rng.integers(0, 80, 5000),
    "stars": rng.integers(1, 6, 5000),
}
events = pa.table(log | {"time": np.arange(5000)})
tasks = {"next_item": "retrieval", "like": {"kind": "binary", "column": "stars", "at_least": 4}}
model = mtrec_jax.fit(
    events, user="user", item="item", time="time", tasks=tasks, folder="FOLDER"
)
print(model.recommend([7, 8], k=3))
print(model.predict([7, 8], [3, 4]))
"""
MTREC = "from mtrec_jax.cli import main; main()"

CASES: dict[str, tuple[str, ...]] = {  # code, and arguments; FOLDER is a place of the turn's own
    "import": ("from mtrec_jax import fit, Recommender, load_experiment",),
    "help": (MTREC, "--help"),
    "fit": (FIT,),
    "recommend": (MTREC, "recommend", "FITTED/run", "--users", "7"),
    "run": (
        *(MTREC, "run", "shop", "--data", "FOLDER/data"),
        *("--prepared", "FOLDER/prepared", "--run", "FOLDER/run"),
    ),
}
COMPILED = ("fit", "recommend", "run")  # those that have a cold and a warm state
TARGETS = {  # of the time that the other commit takes; peak memory is to be no larger
    **{("fit", "cold"): 0.5, ("fit", "warm"): 0.25, ("recommend", "warm"): 0.35},
    **{("run", "cold"): 0.7, ("run", "warm"): 0.7},
}


class Turn(NamedTuple):
    """What one process took."""

    seconds: float
    peak_mib: float  # of the largest process


def answer(
    quick: bool,
    against: str = "",
    only: list[str] | None = None,
    rounds: int = 3,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """A row a case and state: medians, extremes, peak memory, and their ratios to the other's."""
    chosen = only or list(CASES)
    if unknown := set(chosen) - set(CASES):
        raise SystemExit(f"--only: {', '.join(unknown)}; there are {', '.join(CASES)}")
    rounds = 1 if quick else rounds
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="first-result-")))
        kept = (folder or place).absolute()
        sides = [here(place / "here")]
        if against:
            sides.append(stack.enter_context(other(against, kept, place / "other", folder is None)))
        turns: dict[tuple[str, str, str], list[Turn]] = {}
        for case in chosen:
            if case == "recommend":
                for side in sides:
                    _turn(side, "fit", fitted=True)
            for number in range(rounds):
                for side in sides if number % 2 == 0 else sides[::-1]:
                    for state, turn in _states(side, case):
                        turns.setdefault((case, state, side.name), []).append(turn)
    return [
        _row(case, state, [turns[case, state, side.name] for side in sides])
        for case in chosen
        for state in (("cold", "warm") if case in COMPILED else ("",))
    ]


def _states(side: Side, case: str) -> Iterator[tuple[str, Turn]]:
    if case not in COMPILED:
        yield "", _turn(side, case)
        return
    shutil.rmtree(side.work / "compiled", ignore_errors=True)
    cold = _turn(side, case)
    yield "cold", cold
    yield "warm", _turn(side, case) if side.keeps else cold


def _turn(side: Side, case: str, fitted: bool = False) -> Turn:
    """One new process, in a folder of its own unless its files are wanted."""
    side.work.mkdir(parents=True, exist_ok=True)
    own = side.work / "fitted" if fitted else Path(tempfile.mkdtemp(dir=side.work))
    code, *arguments = (
        text.replace("FOLDER", str(own)).replace("FITTED", str(side.work / "fitted"))
        for text in CASES[case]
    )
    environment = environment_of(side)
    command = [side.python, "-c", code, *arguments]
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=side.work, env=environment, stdout=subprocess.DEVNULL, stderr=said
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{case} failed at {side.name}:\n{said.read()[-3000:]}")
    if not fitted:
        shutil.rmtree(own)
    return Turn(seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def _row(case: str, state: str, sides: list[list[Turn]]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{case} {state}".strip()}
    for name, turns in zip(("here", "other"), sides, strict=False):
        times = [turn.seconds for turn in turns]
        row[f"{name}, s"] = statistics.median(times)
        row[f"{name}, min to max"] = f"{min(times):.2f} to {max(times):.2f}"
        row[f"{name}, MiB"] = round(max(turn.peak_mib for turn in turns))
    if len(sides) == 2:
        ratio, target = row["here, s"] / row["other, s"], TARGETS.get((case, state))
        memory = row["here, MiB"] / row["other, MiB"]
        row |= {"ratio": ratio, "target": target or "", "memory ratio": memory}
        row["met"] = "" if target is None else "yes" if ratio <= target else "no"
    return row
