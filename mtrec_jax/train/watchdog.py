"""Reading that is watched: storage that hangs must not hang a run in silence."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mtrec_jax.errors import Error

_PATIENCE = 60  # seconds between notes


class Watched:
    """`next` of an iterator in a thread of its own, one item at a time and none ahead.

    A read that hangs cannot be interrupted; its thread is left behind, and does not keep the
    process from ending.

    Args:
      items: the iterator.
      timeout: seconds without an item before `next` raises; 0: never.
      note: gets a line whenever another `patience` seconds have passed.
      patience: seconds.
    """

    def __init__(
        self,
        items: Iterator[Any],
        timeout: int,
        note: Callable[[str], None],
        patience: int = _PATIENCE,
    ):
        self._items, self._timeout, self._note = items, timeout, note
        self._patience = min(patience, timeout) if timeout else patience
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def next(self) -> Any:
        """The next item.

        Raises:
          Error: it did not come within the timeout.
          StopIteration, or what reading raised.
        """
        self._wanted.put(True)
        waited = 0
        while True:
            try:
                item, error = self._found.get(timeout=self._patience)
                break
            except queue.Empty:
                waited += self._patience
            if self._timeout and waited >= self._timeout:
                raise Error(
                    f"no batch came for {waited} s: the storage of the prepared data does not "
                    "answer. Run the same command to continue from the last checkpoint, or raise "
                    "train.input_timeout"
                )
            self._note(f"waiting for a batch, {waited} s so far: is the storage slow?")
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Let the thread end."""
        self._wanted.put(False)

    def _read(self) -> None:
        while self._wanted.get():
            try:
                self._found.put((next(self._items), None))
            except BaseException as error:
                self._found.put((None, error))
