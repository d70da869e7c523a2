"""Benchmarks, one file per question: `python -m benchmarks [QUESTION] [--quick] [--json FILE]`.

A question is a module with a docstring, `SHAPES` (full, quick), `problem(shape)` (seeded data),
`CONTESTANTS` {name: function(problem) -> call to be timed}, ours first, and an asserting
`check(problem, answer)`. Each contestant runs alone in a fresh process with as many cores.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

# A tuned OPENBLAS_* setting slows NumPy down elsewhere, and XLA_FLAGS may split the cores up.
_REMOVED = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def measure(question: ModuleType, name: str, quick: bool, repetitions: int) -> dict[str, Any]:
    """Check, then time one contestant in this process; times in ms, memory in MiB."""
    problem = question.problem(question.SHAPES[quick])
    call = question.CONTESTANTS[name](problem)
    before = _peak_mib()
    times = []
    for repetition in range(1 + repetitions):
        started = time.perf_counter()
        answer = call()
        times.append((time.perf_counter() - started) * 1e3)
        if repetition == 0:  # compiled, and all memory touched
            question.check(problem, answer)
    first, *times = times
    return {
        "contestant": name,
        "median_ms": statistics.median(times),
        "fastest_ms": min(times),
        "slowest_ms": max(times),
        "compile_ms": max(0.0, first - statistics.median(times)),  # and first touch of memory
        "peak_mib": _peak_mib(),
        "before_mib": before,
        "blas": _blas_kernels(),
    }


def run_alone(question: str, name: str, options: list[str], threads: int) -> dict[str, Any]:
    """`measure` in a fresh process that may use `threads` cores, whatever library it runs."""
    environment = {key: value for key, value in os.environ.items() if key not in _REMOVED}
    environment |= dict.fromkeys(_THREADS, str(threads))
    command = [sys.executable, "-m", "benchmarks", question, "--contestant", name, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        missing = error.startswith("ModuleNotFoundError")
        return {"contestant": name, "error": "not installed" if missing else error}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def environment() -> dict[str, Any]:
    """Versions, processor and commit that a result belongs to."""
    packages = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    compared = {"jax", "jaxlib", "numpy", "scikit-learn", "faiss-cpu", "torch"} & set(packages)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": f"{models[0] if models else platform.processor()} x{os.cpu_count()}",
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {name: packages[name] for name in sorted(compared)},
        "system": f"{platform.platform()} Python {platform.python_version()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _peak_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


def _blas_kernels() -> list[str]:
    try:
        import threadpoolctl
    except ImportError:
        return []
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return [f"{p['internal_api']} {p['version']} {p.get('architecture')}" for p in pools]
