"""Compiled programs are kept on disk, from one process to the next: most of a short run is XLA.

JAX's persistent cache does it; this file says where, how much, and when not. It decides nothing for
somebody who has chosen a folder for JAX, and importing the package decides nothing at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import jax

from mtrec_jax.arguments import parse_bytes
from mtrec_jax.machine import threads

_ROOM = 64 * 2**20  # bytes that have to be free on the disk


def cache_home() -> Path | None:
    """The folder of compiled programs: `MTREC_CACHE`, or one in the user's cache; None: "off".

    Whoever may write to it can make JAX run their code: it has to be the user's own.
    """
    chosen = os.environ.get("MTREC_CACHE", "")
    if chosen.lower() == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen) if chosen else home / "mtrec_jax" / "xla"


def cache_limit() -> int:
    """Most bytes that a process finds in it: `MTREC_CACHE_SIZE`, such as 500MB; by default 2 GB."""
    return int(parse_bytes("MTREC_CACHE_SIZE", os.environ.get("MTREC_CACHE_SIZE", "2GB")))


def cache_size(home: Path) -> int:
    """Bytes of the programs that are there."""
    return sum(size for _, size, _ in _entries(home))


@functools.cache
def use_compilation_cache() -> None:
    """Let JAX keep compiled programs from now on; entry points of commands and `fit` call it.

    Nothing is done for a user who has told JAX where to keep programs, or not to. Several processes
    that train as one do without it unless `MTREC_CACHE` names a folder: JAX serves only the first
    of them, for which the others would be late.
    """
    home = cache_home()
    chosen = jax.config.values["jax_compilation_cache_dir"] is not None
    is_off = not jax.config.values["jax_enable_compilation_cache"]
    alone = not jax.distributed.is_initialized() or "MTREC_CACHE" in os.environ
    if home is None or chosen or is_off or not alone:
        return
    limit, is_new, folder = cache_limit(), not home.exists(), home / _machine()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_damaged(folder)
        _trim(home, limit)
        if shutil.disk_usage(folder).free < _ROOM:
            raise OSError("the disk is full")
    except OSError as error:
        _say(f"compiled programs are not kept: {home}: {error}. MTREC_CACHE=FOLDER keeps them")
        return
    if is_new:
        _say(
            f"compiled programs are kept in {home}, at most {limit / 1e9:g} GB, so that the next "
            "start is faster; MTREC_CACHE=off keeps none"
        )
    # A disk that fills up costs time, and nothing else.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _say(text: str) -> None:
    print(f"mtrec: {text}", file=sys.stderr)


def _machine() -> str:
    """What programs depend on beside JAX's own key: instructions of the processor, and threads.

    Of the latter the last bits of results depend, and homes are shared between machines.
    """
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{platform.system()} {platform.machine()} {platform.processor()} {features}"
    return f"{hashlib.sha256(text.encode()).hexdigest()[:12]}-{threads()}"


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use, bytes, file) of every program."""
    found = []
    for path in folder.rglob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            status = path.stat()
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    return found


def _trim(home: Path, limit: int) -> None:
    """Remove what was not used for longest, down to the limit.

    JAX's own limit would make processes wait for each other at every program.
    """
    entries = sorted(_entries(home))
    total = sum(size for _, size, _ in entries)
    for _, size, path in entries:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


def _remove_damaged(folder: Path) -> None:
    """Remove what a full disk or a killed process has left half written; JAX never would.

    Each program is looked at once: those that are older than the last look were whole then.
    """
    stamp = folder / "looked"
    last = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.write_text("", encoding="utf-8")  # fails where nothing can be written
    for _, _, path in _entries(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if path.stat().st_mtime >= last and not _is_whole(path.read_bytes()):
                path.unlink()


def _is_whole(program: bytes) -> bool:
    if not program.startswith(b"x"):  # not zlib's: compressed by zstd, which is not looked into
        return bool(program)
    try:
        zlib.decompress(program)
    except zlib.error:
        return False
    return True
