"""`mtrec`: the same names as in Python, from a raw log to recommendations.

A file a group of commands. Heavy imports stand inside them, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from mtrec_jax import __version__
from mtrec_jax.arguments import naming
from mtrec_jax.cli import data, doctor, plan, study, train, use
from mtrec_jax.cli.options import say
from mtrec_jax.errors import Error, Stalled
from mtrec_jax.interrupts import unwinding
from mtrec_jax.machine import keep_freed_memory

app = typer.Typer(
    name="mtrec",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for command in (
    *(train.run, data.data, data.clean, data.prepare, train.train, train.evaluate, train.compare),
    *(use.recommend, use.predict, use.interests, train.fine_tune, plan.plan, doctor.doctor),
):
    app.command()(command)
app.add_typer(study.study)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"mtrec_jax {__version__}")
        raise typer.Exit
    return asked


def as_option(name: str) -> str:
    """What an argument of the Python functions is called here."""
    known = {"overrides": "--set", "ranges": "--range", "twins": "--twin-set", "runs": "RUN"}
    return known.get(name, f"--{name.replace('_', '-')}")


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """From raw behaviour logs to a trained multi-task recommender, its honest evaluation and
    its recommendations.

    CONFIG is a TOML file or a built-in one: **shop**, **shop-social**, **shop-requests**,
    **ml-1m**, **ml-100k**, **census-income**.

    Start with `mtrec run shop`, then `mtrec recommend runs/shop --users u00007 --k 5`.

    Compiled programs are kept in ~/.cache/mtrec_jax: `MTREC_CACHE=off` keeps none, another value is
    the folder, `MTREC_CACHE_SIZE=500MB` the limit. A bug report begins with `mtrec doctor`.

    Exit status: 0 done · 1 a bug · 2 wrong usage or input · 3 no network · 129, 130, 143 stopped
    by SIGHUP, Ctrl-C, SIGTERM: training is saved, other commands leave nothing partial.
    """


def main(begin: Callable[[], None] | None = None) -> None:
    """Entry point of the `mtrec` command: our own errors become one message and exit status 2.

    `begin` is called first, and its errors are treated alike.
    """
    _quieten(alone=begin is None)
    keep_freed_memory()
    with unwinding() as received, naming(as_option):
        try:
            if begin:
                begin()
            app()
        except BaseException as error:
            done = isinstance(error, SystemExit) and not error.code
            if received and not done:  # whatever a library has made of the interrupt
                say("mtrec: interrupted")
                sys.stdout.flush()
                os._exit(128 + received[0])  # XLA's threads may crash an interpreter's shutdown
            if isinstance(error, Error):
                say(f"mtrec: {error}")
                status = getattr(error, "status", 2)
                if isinstance(error, Stalled):
                    os._exit(status)
                if status <= 128:  # in the others all processes have stopped at the same step
                    _leave(status)
                sys.exit(status)
            if not isinstance(error, SystemExit):
                traceback.print_exc()
                _leave(1)
                sys.exit(1)
            raise


def _leave(status: int) -> None:
    """One of several processes that fails does not wait for the others."""
    if "jax" in sys.modules:
        from mtrec_jax import processes

        processes.leave(status)


def _quieten(alone: bool) -> None:
    """Keep notes of libraries from the screen; what matters of them is raised as well."""
    if alone:  # several processes have errors of their own
        # XLA calls a compilation of two minutes a bug to be filed; read when JAX is imported.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for message in (".*Sharding info not provided.*", "coroutine .* was never awaited"):
        warnings.filterwarnings("ignore", message=message)
    show = warnings.showwarning

    def say_ours(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        ours = Path(filename).is_relative_to(Path(__file__).parents[1])
        if ours and category is UserWarning:
            say(f"mtrec: {message}")
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = say_ours
    for name in ("absl", "asyncio"):  # of Orbax and its tasks
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        # One failed write ends a checkpoint's loop; tensorstore reports those that come after it.
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = print_others
