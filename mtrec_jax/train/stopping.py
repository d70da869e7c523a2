"""Runs that are asked to stop: by which signal, after which step, with which exit status."""

from __future__ import annotations

from pathlib import Path

from mtrec_jax import processes
from mtrec_jax.errors import Error


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
