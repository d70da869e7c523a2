"""SIGINT, SIGTERM and SIGHUP stop a command cleanly, whatever libraries under way make of them."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def stop_signals() -> tuple[int, ...]:
    """The signals that stop a command; SIGHUP is not one where it is ignored, as by `nohup`.

    >>> signal.SIGINT in stop_signals()
    True
    """
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (hangup,)))


def leave_terminal(number: int) -> None:
    """After a hang-up nobody reads what is said: writing to the terminal would fail."""
    if number in (signal.SIGINT, signal.SIGTERM):
        return
    for descriptor in (1, 2):
        with suppress(OSError):  # closed already
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                with open(os.devnull, "wb") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


@contextmanager
def unwinding() -> Iterator[list[int]]:
    """Collect `stop_signals`, and raise `KeyboardInterrupt` for each, so that every `finally`
    removes what is partial.

    Python drops what is raised inside callbacks, such as JAX's at a garbage collection; after that
    the signal is sent once more. Libraries may turn the interrupt into another error: whoever sees
    an error while the list is not empty should take it for an interrupt.

    >>> with unwinding() as received:
    ...     received
    []
    """

    def dropped(unraisable: Any) -> None:
        if received and unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), received[0])).start()
        else:
            hook(unraisable)

    with _received(raises=True) as received:
        hook, sys.unraisablehook = sys.unraisablehook, dropped
        try:
            yield received
        finally:
            sys.unraisablehook = hook


@contextmanager
def collecting() -> Iterator[list[int]]:
    """Collect `stop_signals` instead of dying; a second one has its usual effect.

    >>> with collecting() as received:
    ...     received
    []
    """

    with _received(raises=False) as received:
        yield received


@contextmanager
def _received(raises: bool) -> Iterator[list[int]]:
    """The `stop_signals` that have come so far."""
    received: list[int] = []
    previous: dict[int, Any] = {}  # {signal: what handled it before}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        leave_terminal(number)
        if raises:
            raise KeyboardInterrupt
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # no other may install handlers
        for number in stop_signals():
            previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
