"""What this process may use of the machine: the limits of its container count as well."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60  # what version 1 says where there is none is larger


def threads() -> int:
    """Processors that this process may run on.

    >>> 1 <= threads() <= os.cpu_count()
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(groups: Path = _GROUPS, root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the control group allows; None: all there is."""
    found = []
    for folder, is_new in _folders("cpu", groups, root):
        if is_new:
            quota, _, period = _text(folder / "cpu.max").partition(" ")
        else:
            quota, period = (_text(folder / f"cpu.cfs_{n}_us") for n in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # else "max" or -1
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit(groups: Path = _GROUPS, root: Path = _ROOT) -> int | None:
    """Most bytes that the control group allows; None: no limit but the machine's own."""
    found = []
    for folder, is_new in _folders("memory", groups, root):
        text = _text(folder / ("memory.max" if is_new else "memory.limit_in_bytes"))
        if text.isdigit() and int(text) < _NO_LIMIT:
            found.append(int(text))
    return min(found, default=None)


def machine_memory() -> int | None:
    """Bytes that are built in; None: the system does not say."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory() -> int | None:
    """Bytes that this process may fill: the machine's, or its control group's where that is less.

    >>> memory() is None or memory() > 0
    True
    """
    known = [size for size in (machine_memory(), memory_limit()) if size is not None]
    return min(known, default=None)


def keep_freed_memory() -> bool:
    """Have this process keep memory that it frees, for what it allocates next; whether it could.

    On a CPU, XLA allocates the work space of a program in each call. From 32 MiB on glibc takes it
    from the system each time, and the system clears it page by page: of a training step up to a
    third. Only glibc can be told, on Linux; memory is given back when more than 2 GiB lie free at
    the end of what the process has.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    told = ctypes.CDLL(None).mallopt
    # one arena, since those of threads cannot grow beyond 64 MiB; nothing by mmap; trim late
    return all([told(-8, 1), told(-4, 0), told(-1, 2**31 - 1)])


def _folders(controller: str, groups: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """The control group of this process and those around it; whether it is of version 2."""
    for line in _text(groups).splitlines():
        number, controllers, place = line.split(":", 2)
        is_new = number == "0"
        if is_new or controller in controllers.split(","):
            top = root if is_new else root / controller
            folder = top / place.lstrip("/")  # inside a container only the top may be there
            for around in (folder, *folder.parents):
                if around.is_relative_to(top):
                    yield around, is_new


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
