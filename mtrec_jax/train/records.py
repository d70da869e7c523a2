"""The records of a run: `metrics.jsonl`, and small JSON files that are written whole."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from mtrec_jax.errors import CheckpointError


class Records:
    """`metrics.jsonl`: one object a line with step, split, task, metric, value.

    Timings are records of the split "timing"; apart from them, equal runs write equal files.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self._writes = path, writes  # of several processes, one writes
        self.last_losses: dict[str, float] = {}
        self._since = time.perf_counter()

    def add(self, step: int, split: str, task: str, metric: str, value: float) -> None:
        """Append one record; what is not a number is written as null."""
        record = {"step": step, "split": split, "task": task, "metric": metric}
        record["value"] = value if math.isfinite(value) else None
        if self._writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        if split == "train":
            self.last_losses[task] = value

    def add_timing(self, step: int, what: str, seconds: float) -> None:
        """Append a duration in seconds."""
        self.add(step, "timing", "run", what, seconds)

    def add_seconds(self, step: int) -> None:
        """Append how long it took since the last such record: their sum is the time of the run,
        also of one that was stopped and goes on."""
        now = time.perf_counter()
        self.add_timing(step, "seconds", now - self._since)
        self._since = now

    def size(self) -> int:
        """Bytes on disk now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, size: int) -> bool:
        """Forget what was written after a checkpoint, which will be written again.

        Returns whether the file had fewer bytes; then a torn last line is cut off.
        """
        there = self.size()
        is_short = there < size
        if self._writes and self.path.exists():
            if is_short:
                size = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, size)
        return is_short


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a run's `metrics.jsonl`, in order, but for one that is half written."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".partial")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a small JSON file of a run.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent} is no run folder ({path.name}: {error})") from error
