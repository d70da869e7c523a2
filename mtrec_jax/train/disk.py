"""A disk that is full: what writing to it raises, in our own words."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mtrec_jax.errors import CheckpointError, Error

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share, a file's limit


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
        doing = f"saving step {steps[-1]}" if steps else "writing"
        raise CheckpointError(
            f"no space left in {folder} while {doing} ({reason}). Earlier steps are kept: free "
            "space and run the same command to continue from the last of them"
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
