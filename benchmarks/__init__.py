"""Benchmarks, one file per question: `python -m benchmarks [QUESTION] [--quick] [--json FILE]`.

A question of quality or throughput has `answer(quick, ...)`, which returns rows of figures. A
contest between contestants that do the same job has

- `CASES`, {name of a set: the frozen specs in it}; "quick" is one of the sets,
- `problem(case)`, seeded data, the same in every process,
- `CONTESTANTS`, {name: function(problem) -> the call that is timed}, ours first,
- `contestants(case)`, the names of those who take part in a case, if not all do,
- `check(problem, answer)`, which asserts that an answer is right,
- `BEFORE`, where there is one, {name: the same by the calls of an earlier commit} of contestants
  of ours that `--against` has run by that commit too,
- `BOUNDS`, those of them that do less than the job, which no other can undercut by much,
- `BLAS`, those of them whose speed depends on the kernel that OpenBLAS chooses.

`benchmarks.contest` runs it, `benchmarks.report` shows what `--json` has kept.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

QUESTIONS = (
    *("topk", "limits", "softmax", "rank", "everyone", "table_step", "multitask_step", "chaos"),
    *("input", "prepare", "engines", "shop", "fusion", "social", "requests", "first_result"),
    *("serving_latency", "census", "funnel", "conflict", "combinations", "sequence_step"),
    *("text", "leaderboard"),
)
COMPARED = (
    *("jax", "jaxlib", "numpy", "optax", "scikit-learn", "faiss-cpu", "torch", "implicit"),
    *("jax-cce", "tokamax", "torch-rechub", "fbgemm-gpu-cpu", "lightgbm", "transformers"),
)


def environment() -> dict[str, Any]:
    """Versions, processor and commit that a result belongs to."""
    packages = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "cpu": f"{models[0] if models else platform.processor()} x{os.cpu_count()}",
        "commit": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {name: packages[name] for name in COMPARED if name in packages},
        "system": f"{platform.platform()} Python {platform.python_version()}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
