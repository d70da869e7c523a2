"""SIGINT, SIGTERM and SIGHUP stop a command cleanly, whatever libraries under way make of them."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_Handlers = dict[int, Any]  # {signal: what handled it before}


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
            _to_nowhere(descriptor)


def _to_nowhere(terminal: int) -> None:
    if stat.S_ISCHR(os.fstat(terminal).st_mode):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, terminal)
        os.close(nowhere)


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

    def interrupt(number: int, previous: _Handlers) -> None:
        raise KeyboardInterrupt

    def dropped(unraisable: Any) -> None:
        if received and unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.01, os.kill, (os.getpid(), received[0])).start()
        else:
            hook(unraisable)

    with _received(interrupt) as received:
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

    def once(number: int, previous: _Handlers) -> None:
        signal.signal(number, previous[number])

    with _received(once) as received:
        yield received


@contextmanager
def _received(react: Callable[[int, _Handlers], None]) -> Iterator[list[int]]:
    """The `stop_signals` that have come so far; each is listed, then `react` is called."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install handlers
        return
    previous: _Handlers = {}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        leave_terminal(number)
        react(number, previous)

    for number in stop_signals():
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
