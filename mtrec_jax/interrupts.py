"""SIGINT and SIGTERM stop a command cleanly, whatever the libraries under way make of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def unwinding() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM, and raise `KeyboardInterrupt` for each, so that every `finally`
    removes what is partial.

    Python drops what is raised inside callbacks, such as JAX's at a garbage collection; after that
    the signal is sent once more. Libraries may turn the interrupt into another error: whoever sees
    an error while the list is not empty should take it for an interrupt.

    >>> with unwinding() as received:
    ...     received
    []
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install handlers
        return

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def dropped(unraisable: Any) -> None:
        if received and unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), received[0])).start()
        else:
            hook(unraisable)

    hook = sys.unraisablehook
    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = dropped
    try:
        yield received
    finally:
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)
