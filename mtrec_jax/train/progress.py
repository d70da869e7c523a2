"""What a person sees while a run trains."""

from __future__ import annotations

import sys
from types import TracebackType

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


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} steps/s" if task.speed else "compiling …")


class Progress:
    """A bar with rate, remaining time and losses on a terminal; a line per evaluation elsewhere."""

    def __init__(self, total: int, done: int, show: bool, name: str):
        self._show, self._total, self._name = show, total, name
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
        self._task = self._bar.add_task(f"train {name}", total=total, completed=done, losses="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, number: int, losses: dict[str, float]) -> None:
        """Step `number` is under way."""
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self._bar.update(
            self._task, completed=number, losses=shown, description=f"train {self._name}"
        )

    def say(self, what: str) -> None:
        """Show what is being done beside training."""
        self._bar.update(self._task, description=what)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._show:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def evaluated(self, metric: str, value: float, best: float | None) -> None:
        """Print a validation result."""
        if self._show:
            step = int(self._bar.tasks[0].completed)
            mark = "  (best so far)" if value == best else ""
            if best is not None and value != best:
                mark = f"  (best {best:.4f})"
            self._console.print(
                f"step {step:>6} of {self._total}: validation {metric} {value:.4f}{mark}"
            )
