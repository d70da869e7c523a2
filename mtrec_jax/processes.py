"""Several processes that train as one: how they start, what they agree on, who writes.

Every process runs the same program on its own devices, and JAX's runtime joins them. Only the first
one writes to the run folder (Orbax apart, which writes from where the arrays are). A decision that
depends on what one process alone sees is made by all, with `largest`.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtrec_jax.errors import ConfigError

_PATIENCE = 300  # seconds for the first process to begin


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Join the processes, before anything else is done with JAX.

    Args:
      coordinator: HOST:PORT of the first process, the same for all. Empty: what Slurm, MPI or a
        TPU pod says; `processes` and `process` are then not needed.
      processes: how many there are.
      process: the number of this one, from 0.

    Raises:
      ConfigError: numbers that do not fit each other, or no cluster that says them.
    """
    if not coordinator:
        if processes or process != -1:
            raise ConfigError("--processes, --process: --coordinator HOST:PORT is needed as well")
        _leave_signals()
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no cluster tells this process who the others are ({error}); pass "
                "--coordinator HOST:PORT --processes N --process I"
            ) from error
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: {coordinator!r} is not HOST:PORT")
    if process == -1 or not processes:
        raise ConfigError("--coordinator: --processes N and --process I are needed as well")
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process {process} of --processes {processes}: the processes are numbered from 0"
        )
    if process:
        _await(host.strip("[]"), int(port))
    _leave_signals()
    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"--coordinator {coordinator}: the processes do not meet ({first})"
        ) from None


def _leave_signals() -> None:
    """JAX's runtime would take SIGTERM for itself, on which this package stops."""
    jax.config.update("jax_enable_preemption_service", False)


def _await(host: str, port: int) -> None:
    """Wait until the first process listens; JAX's own wait could not be interrupted."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"--coordinator {host}:{port}: process 0 was not there within {_PATIENCE} s "
                    f"({error}). Start it as well, and look at the address"
                ) from error
        time.sleep(0.5)


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def index() -> int:
    """The number of this one."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def wait(where: str) -> None:
    """Go on when all processes are here."""
    if count() > 1:
        multihost_utils.sync_global_devices(where)


def largest(value: int) -> int:
    """The largest of all processes' values, for all."""
    return value if count() == 1 else max(int(v[0]) for v in gathered(np.array([value])))


def total(value: int) -> int:
    """The sum of all processes' values, for all."""
    return sum(int(v[0]) for v in gathered(np.array([value])))


def own_file(path: Path) -> Path:
    """Where this process writes its part of a file: beside the others, with its number.

    >>> own_file(Path("all.csv")).name
    'all.csv'
    """
    if count() == 1:
        return path
    return path.with_name(f"{path.stem}-{index():05}-of-{count():05}{path.suffix}")


def leave(status: int) -> None:
    """End this process at once, so that the others learn of it: they cannot go on without it.

    Ending as usual would wait for them, and they for this one.
    """
    if jax.distributed.is_initialized() and count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def check_same(what: str, text: str) -> None:
    """Raise `ConfigError` unless all processes have the same text."""
    own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    every = gathered(own)
    odd = [number for number, other in enumerate(every) if (other != every[0]).any()]
    if odd:
        raise ConfigError(
            f"{what}: process {odd[0]} has another than process 0. All processes need the same "
            "configuration, and storage that they share for prepared data and the run folder"
        )


def gathered(array: np.ndarray, piece: int = 2**30) -> list[np.ndarray]:
    """The arrays of all processes in their order, bit by bit; their lengths may differ.

    At most `piece` bytes of each are sent at once.

    >>> [a.tolist() for a in gathered(np.array([1, 2]))]
    [[1, 2]]
    """
    if count() == 1:
        return [array]
    # As bytes: devices hold 32 bits, the host has more.
    raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    size = np.array(divmod(len(raw), piece), np.int32)
    sizes = multihost_utils.process_allgather(size).reshape(-1, 2) @ np.array([piece, 1])
    longest, parts = int(sizes.max()), [np.zeros((count(), 0), np.uint8)]
    for start in range(0, longest, piece):
        own = np.zeros(min(piece, longest - start), np.uint8)
        own[: max(0, len(raw) - start)] = raw[start : start + len(own)]
        parts.append(np.asarray(multihost_utils.process_allgather(own)))
    joined = np.concatenate(parts, axis=1)
    return [
        np.frombuffer(part[:size].tobytes(), array.dtype).reshape(-1, *array.shape[1:])
        for part, size in zip(joined, sizes, strict=True)
    ]
