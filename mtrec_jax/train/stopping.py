"""Runs that end before their time: asked to by a signal, or for want of room or memory."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import jax

from mtrec_jax import processes
from mtrec_jax.config import Experiment
from mtrec_jax.errors import CheckpointError, Error

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share, a file's limit


class Stopped(Error):
    """The run was asked to stop; everything is saved and the same command continues it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status  # for the process to exit with: 128 and the number of the signal


def stopped_at(number: int, total: int, folder: Path, by: int) -> Stopped:
    """The error that ends a run which has saved step `number`."""
    return Stopped(
        f"stopped at step {number} of {total}; everything is saved in {folder}. "
        "Run the same command to continue",
        128 + by,
    )


def asked_to_stop(stopped: list[int], number: int, every: int) -> int:
    """The signal by which to stop after step `number`, or 0.

    Several processes agree on it, after every `every` steps.
    """
    here = stopped[0] if stopped else 0
    if processes.count() == 1:
        return here
    return 0 if number % every else processes.largest(here)


@contextlib.contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Failures for want of room in a run folder become `CheckpointError`; others stay as they are.

    Raises:
      CheckpointError: it says which step was being saved.

    >>> with full_disk_named(Path("runs/shop")):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    mtrec_jax.errors.CheckpointError: no space left in runs/shop while writing ...
    """
    try:
        yield
    except Error:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        # Checkpoints are written by threads: the error may come at a later step.
        begun = (folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")
        steps = sorted(int(p.name.split(".")[0]) for p in begun if p.name[0].isdigit())
        doing = f"saving step {steps[0]}" if steps else "writing"
        raise CheckpointError(
            f"no space left in {folder} while {doing} ({reason}). Earlier steps are kept: free "
            "space and run the same command to continue from the last of them"
        ) from error


@contextlib.contextmanager
def full_memory_named(experiment: Experiment) -> Iterator[None]:
    """XLA's lack of a device's memory becomes an `Error` that says what can be done about it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        config = experiment.train
        raise Error(
            f"a device's memory does not hold the run ({first}). Lower train.batch_size = "
            f"{config.batch_size}, or raise train.accumulate = {config.accumulate}, which takes a "
            "batch in parts; tables are split over more devices by train.mesh. mtrec plan says "
            "what takes how much"
        ) from error


def _reason(error: BaseException | None) -> str | None:
    """What the system said, where an error or one behind it comes from a lack of room."""
    while error is not None:
        for number in _FULL:
            # Orbax and tensorstore raise errors of their own, with the system's words in them.
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None
