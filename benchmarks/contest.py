"""A contest: each contestant in a process of its own, all checked, then timed in turns.

What disturbs the machine for a while disturbs all of them alike, as each is timed a little in every
round, and the order moves on by one from round to round. A contestant's process has its data and
has answered once, and been checked, before the first round: compilation and the first touch of
memory are no part of its times.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

from benchmarks.commits import ROOT, Side

# What would hold OpenBLAS to the kernel of another processor, or split the cores up.
_REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_KERNELS = ("", "SkylakeX", "Haswell", "Zen")  # of OpenBLAS, tried for those whom it concerns
_CALLS = 2  # timed calls of a turn, after one that is not
_PAUSE = 0.25  # seconds before a turn: idle threads of the one before spin for a while
AT = " at "  # between a contestant of ours and the commit that it is of


class Result(NamedTuple):
    """What one contestant did in one case; times in milliseconds, memory in MiB."""

    contestant: str
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    calls: int
    compile_ms: float  # what the first call took longer: compilation, first touch of memory
    before_mib: float  # peak memory before the first call: data, index, libraries
    peak_mib: float  # after the first call
    kernel: str  # OPENBLAS_CORETYPE that was the fastest, "" for its own choice
    blas: tuple[str, ...]  # libraries of linear algebra in the process
    device: str
    notes: str = ""


def fastest(ways: dict[str, Callable[[], Any]]) -> Callable[[], Any]:
    """Of several ways to do the same, the one that takes the least time here; noted by its name."""

    def seconds(way: Callable[[], Any]) -> float:
        way()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            way()
            times.append(time.perf_counter() - started)
        return min(times)

    name = min(ways, key=lambda name: seconds(ways[name]))

    def call() -> Any:
        return ways[name]()

    call.notes = name  # type: ignore[attr-defined]
    return call


# --- The contestant's side


def serve(question: ModuleType, set_name: str, number: int, name: str) -> None:
    """Prepare and check; then do a turn of timed calls for each line of standard input."""
    problem = question.problem(question.CASES[set_name][number])
    own, at, _ = name.partition(AT)
    call = (question.BEFORE if at else question.CONTESTANTS)[own](problem)
    before = _peak_mib()
    started = time.perf_counter()
    answer = call()
    first, peak = (time.perf_counter() - started) * 1e3, _peak_mib()
    question.check(problem, answer)
    del answer
    _say({"first_ms": first, "before_mib": before, "peak_mib": peak})
    for _ in sys.stdin:
        times = []
        for turn in range(1 + _CALLS):
            started = time.perf_counter()
            call()
            if turn:
                times.append((time.perf_counter() - started) * 1e3)
        _say({"times": times})
    jax = sys.modules.get("jax")
    device = jax.devices()[0].device_kind if jax else "cpu"
    _say({"blas": _blas(), "device": device, "notes": getattr(call, "notes", "")})


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def _blas() -> list[str]:
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        return []
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return sorted({f"{p['internal_api']} {p['version']} {p.get('architecture')}" for p in pools})


# --- The referee's side


def compare(
    question: ModuleType,
    set_name: str,
    number: int,
    rounds: int,
    kernels: dict[str, str],
    against: Side | None = None,
) -> tuple[list[Result], dict[str, str]]:
    """Results of a case, and why some contestants have none. With another commit, those of ours
    that are in `question.BEFORE` take part as that commit has them, too."""
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        everyone = getattr(question, "contestants", lambda case: question.CONTESTANTS)
        names = [*everyone(question.CASES[set_name][number])]
        if against:
            names += [f"{name}{AT}{against.name}" for name in question.BEFORE if name in names]
        for name in names:
            try:
                side = against if against and name.endswith(AT + against.name) else None
                start = _contestant(question, set_name, number, name, kernels.get(name, ""), side)
                running[name] = stack.enter_context(start)
            except _FailedError as error:
                failed[name] = str(error)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
        for round_ in range(rounds):
            names = list(running)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                try:
                    turns[name].append(_turn(running[name][0]))
                except _FailedError as error:
                    failed[name] = str(error)
                    del running[name]
        results = [
            _result(name, first, turns[name], _finish(process), kernels.get(name, ""))
            for name, (process, first) in running.items()
        ]
    return results, failed


def best_kernels(question: ModuleType, set_name: str, number: int) -> dict[str, str]:
    """For each contestant in `BLAS`, the OpenBLAS kernel with which it is the fastest."""
    best: dict[str, str] = {}
    if platform.machine() not in ("x86_64", "AMD64"):
        return best
    for name in question.BLAS:
        seen = {}
        for kernel in _KERNELS:
            with (
                contextlib.suppress(_FailedError),
                _contestant(question, set_name, number, name, kernel) as (process, _),
            ):
                seen[kernel] = min(min(_turn(process)["times"]) for _ in range(3))
        # Another kernel than its own choice has to be clearly faster.
        if seen and min(seen.values()) < 0.95 * seen.get("", float("inf")):
            best[name] = min(seen, key=seen.__getitem__)
    return best


class _FailedError(Exception):
    """A contestant that cannot take part, in one line."""


@contextlib.contextmanager
def _contestant(
    question: ModuleType,
    set_name: str,
    number: int,
    name: str,
    kernel: str,
    side: Side | None = None,
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    environment = {key: value for key, value in os.environ.items() if key not in _REMOVED}
    threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    environment |= dict.fromkeys(_THREADS, threads)
    environment["JAX_TRACEBACK_FILTERING"] = "off"  # the last line of a traceback is its error
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several share a GPU
    if kernel:
        environment["OPENBLAS_CORETYPE"] = kernel
    python, folder = (side.python, _beside(side)) if side else (sys.executable, None)
    short = question.__name__.rpartition(".")[2]
    turn = ["--contestant", name, "--set", set_name, "--case", str(number)]
    with (
        tempfile.TemporaryFile("w+") as said,  # a pipe that nobody reads would fill up
        subprocess.Popen(
            [python, "-m", "benchmarks", short, *turn],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        try:
            yield process, _answer(process, said)
        finally:
            process.kill()


def _beside(side: Side) -> Path:
    """A folder with the package of another commit and the benchmarks of this one."""
    folder = side.work / "beside"
    if not folder.exists():
        folder.mkdir(parents=True)
        for name in ("mtrec_jax", "tests"):
            (folder / name).symlink_to(side.root / name)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    return folder


def _answer(process: subprocess.Popen[str], said: IO[str] | None = None) -> dict[str, Any]:
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            message: dict[str, Any] = json.loads(line)
            return message
    lines = []
    if said is not None:
        said.seek(0)
        lines = said.read().strip().splitlines()
    error = (lines or ["ended without a word"])[-1]
    missing = error.startswith("ModuleNotFoundError")
    raise _FailedError("not installed" if missing else error[:60])


def _turn(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin
    time.sleep(_PAUSE)
    process.stdin.write("\n")
    process.stdin.flush()
    return _answer(process)


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdin
    process.stdin.close()
    return _answer(process)


def _result(
    name: str,
    first: dict[str, Any],
    turns: list[dict[str, Any]],
    last: dict[str, Any],
    kernel: str,
) -> Result:
    times = [time for turn in turns for time in turn["times"]]
    median = statistics.median(times)
    return Result(
        contestant=name,
        median_ms=median,
        fastest_ms=min(times),
        slowest_ms=max(times),
        calls=len(times),
        compile_ms=max(0.0, first["first_ms"] - median),
        before_mib=first["before_mib"],
        peak_mib=first["peak_mib"],
        kernel=kernel,
        blas=tuple(last["blas"]),
        device=last["device"],
        notes=last["notes"],
    )
