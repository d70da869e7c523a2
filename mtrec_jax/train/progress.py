"""What a person sees while a run trains, or while anything else takes minutes."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

_SILENCE = 60.0  # seconds after which a line says that work goes on
_FIRST = 5.0  # seconds of steps from which the time of a run is foretold


@contextlib.contextmanager
def each_minute(line: Callable[[float], str], say: Callable[[str], None]) -> Iterator[None]:
    """Say `line(seconds since the beginning)` each minute, from a thread."""
    ended, started = threading.Event(), time.perf_counter()

    def watch() -> None:
        while not ended.wait(_SILENCE):
            say(line(time.perf_counter() - started))

    watcher = threading.Thread(target=watch, name="mtrec-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextlib.contextmanager
def never_silent(say: Callable[[str], None], what: str) -> Iterator[Callable[[str], None]]:
    """A `say` after whose last line another one follows each minute, until work ends.

    Args:
      say: prints a line.
      what: is being done, before the first line.
    """
    last = [f"{what} …"]

    def tell(text: str) -> None:
        last[0] = text
        say(text)

    with each_minute(lambda seconds: f"  {_duration(seconds)} so far; last: {last[0]}", say):
        yield tell


def _duration(seconds: float) -> str:
    """A time for people.

    >>> _duration(42.0), _duration(150.0), _duration(9000.0)
    ('42 s', '2.5 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} steps/s" if task.speed else "compiling …")


class Progress:
    """A bar with rate, remaining time and losses on a terminal; elsewhere a line for each
    evaluation, one before the first step is compiled, one with the expected time after the first
    steps, and one each minute. Neither the first step nor the first evaluation, which compile,
    counts in the rate."""

    def __init__(self, total: int, done: int, show: bool, name: str):
        self._show, self._total, self._name = show, total, name
        self._doing, self._foretold = "compiling", False
        self._first: tuple[int, float] | None = None  # step that was begun first, and when
        self._evaluating: float | None = None  # since when, for the first time
        self._evaluated = False
        self._number, self._losses = done, ""
        self._lines = contextlib.ExitStack()
        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=self._console,
            disable=not (show and sys.stderr.isatty()),
        )
        self._pipes = show and not sys.stderr.isatty()
        self._task = self._bar.add_task(f"train {name}", total=total, completed=done, losses="")

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._pipes:
            self.note(f"train {self._name}: compiling the first step …")
            self._lines.enter_context(each_minute(lambda _: self._line(), self.note))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._bar.stop()

    def _line(self) -> str:
        """Where training is, its rate and the time that is left."""
        where = f"train {self._name}: step {self._number} of {self._total}"
        begun, since = self._first or (self._number, time.perf_counter())
        now = time.perf_counter() if self._evaluating is None else self._evaluating
        done, seconds = self._number - begun, now - since
        if done <= 0:
            return f"{where}, {self._doing} …"
        left = _duration((self._total - self._number) * seconds / done)
        return f"{where}, {done / seconds:.3g} steps/s, about {left} left  {self._losses}".rstrip()

    def advance(self, number: int, losses: dict[str, float]) -> None:
        """Step `number` is under way."""
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self._number, self._losses, self._doing = number, shown, "training"
        now = time.perf_counter()
        begun, since = self._first or (number, now)
        if self._evaluating is not None:
            since, self._evaluating = since + now - self._evaluating, None
        self._first = begun, since
        if self._pipes and not self._foretold and now - since >= _FIRST:
            self._foretold = True
            self.note(self._line())
        self._bar.update(
            self._task, completed=number, losses=shown, description=f"train {self._name}"
        )

    def say(self, what: str) -> None:
        """Show what is being done beside training."""
        self._doing = what
        if not self._evaluated:
            self._evaluating, self._evaluated = time.perf_counter(), True
        self._bar.update(self._task, description=what)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._show:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def evaluated(self, metric: str, value: float, notes: dict[str, Any]) -> None:
        """Print a validation result; `notes` are the loop's, which say what is best."""
        if self._show:
            step, best = int(self._bar.tasks[0].completed), notes["best"]
            mark = "" if best is None else f"  (best {best:.4f})"
            if notes["best_step"] == step:
                mark = "  (best so far)"
            self._console.print(
                f"step {step:>6} of {self._total}: validation {metric} {value:.4f}{mark}"
            )
