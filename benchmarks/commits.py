"""A question asked of two commits: this one, and another with an environment of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Side(NamedTuple):
    """A commit: where its code is, what runs it, and whether it keeps compiled programs."""

    name: str
    root: Path
    python: str
    work: Path
    keeps: bool


def here(work: Path) -> Side:
    """This commit, with a folder for its files."""
    return Side("here", ROOT, sys.executable, work, _keeps(ROOT))


def environment_of(side: Side) -> dict[str, str]:
    """The variables of its processes: its code, and compiled programs of its own."""
    removed = ("JAX_COMPILATION_CACHE_DIR", "MTREC_CACHE_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return kept | {"MTREC_CACHE": str(side.work / "compiled"), "PYTHONPATH": str(side.root)}


@contextlib.contextmanager
def other(commit: str, kept: Path, work: Path, temporary: bool) -> Iterator[Side]:
    """A worktree of the commit with an environment of its own; made once in a folder that stays."""
    full = _git("rev-parse", "--verify", f"{commit}^{{commit}}")
    root, environment = (kept / full[:12] / name for name in ("tree", "environment"))
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = environment / "complete"
    try:
        if not root.exists():
            _git("worktree", "add", "--detach", str(root), full)
        if not ready.exists():
            print(f"benchmarks: making {environment} for {commit}", file=sys.stderr)
            venv.create(environment, clear=True, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt"]
            subprocess.run([*install, "-e", "."], cwd=root, check=True)
            ready.touch()
        yield Side(commit, root, str(python), work, _keeps(root))
    finally:
        if temporary and root.exists():
            _git("worktree", "remove", "--force", str(root))


def _keeps(root: Path) -> bool:
    return (root / "mtrec_jax" / "compilation.py").exists()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
