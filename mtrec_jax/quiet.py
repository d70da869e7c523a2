"""What libraries print on the side, in a process that is ours alone."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Any


def quieten() -> None:
    """Keep notes of libraries from the screen; what matters of them is raised as well."""
    for message in (".*Sharding info not provided.*", "coroutine .* was never awaited"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("absl", "asyncio"):  # of Orbax and its tasks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        # One failed write ends a checkpoint's loop; tensorstore reports those that come after it.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = print_others
