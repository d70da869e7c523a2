"""How fast is everyone's list and rank made: 200,000 users by 100,000 items, and in what memory?"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import numpy as np
from rich.progress import track

_USERS = 2048  # users of a batch


def answer(quick: bool) -> list[dict[str, Any]]:
    """Users per second of the 100 best items and of the target's rank, and the peak memory."""
    from mtrec_jax.kernels import ItemIndex

    users, items, width, k = (10_000, 10_000, 64, 100) if quick else (200_000, 100_000, 64, 100)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((users, width), np.float32)
    index = ItemIndex(rng.standard_normal((items, width), np.float32))
    targets = rng.integers(0, items, users)
    seconds = {"search": 0.0, "rank": 0.0}
    for start in track(range(-_USERS, users, _USERS), "users", disable=not sys.stderr.isatty()):
        rows = slice(max(start, 0), max(start, 0) + _USERS)  # the first batch twice: compiled
        for name in seconds:
            began = time.perf_counter()
            if name == "search":
                index.search(vectors[rows], k)
            else:
                index.rank(vectors[rows], targets[rows])
            seconds[name] += (time.perf_counter() - began) * (start >= 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [
        {"task": task, "users per second": round(users / spent), "seconds": round(spent, 1)}
        | {"peak MiB": round(peak / (2**20 if sys.platform == "darwin" else 2**10))}
        for task, spent in (*seconds.items(), ("both", sum(seconds.values())))
    ]
