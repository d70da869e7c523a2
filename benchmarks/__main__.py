"""List the questions, or answer one."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import rich
from rich.progress import track
from rich.table import Table

import benchmarks
from benchmarks import contest
from benchmarks.commits import Side, other


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("question", nargs="?", choices=(*benchmarks.QUESTIONS, "report"))
    parser.add_argument("--quick", action="store_true", help="a small problem")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append JSON lines to FILE")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--set", nargs="+", metavar="SET", help="topk: which cases; all of them")
    parser.add_argument("--rounds", type=int, help="turns of each: 7 in contests, first_result 3")
    parser.add_argument("--events", type=int, help="prepare: events of the log (50,000,000)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="prepare, first_result, serving_latency, census, conflict: where files go; all but "
        "prepare keep them",
    )
    parser.add_argument("--runs", type=Path, nargs="+", help="leaderboard: folders of runs")
    parser.add_argument("--data", type=Path, help="census, text: folder of the raw data (data)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="social, requests, census, funnel, fusion, …: other than theirs",
    )
    parser.add_argument(
        "--against",
        metavar="COMMIT",
        help="first_result, serving_latency, sequence_step: beside this commit",
    )
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help="first_result: help,fit; census: lightgbm,mmoe; combinations: mmoe,ple; …",
    )
    parser.add_argument("--test", action="store_true", help="census: also look at the test set")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # the contestant's side
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.question is None:
        for name in (*benchmarks.QUESTIONS, "report"):
            docstring = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
            print(f"{name}: {docstring.splitlines()[0]}")
        return
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.error("--rounds: at least 1")
    if chosen.json and not chosen.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {chosen.json.resolve().parent}")
    if hasattr(os, "sched_setaffinity"):  # XLA sizes its thread pool by the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])
    question = importlib.import_module(f"benchmarks.{chosen.question}")
    if hasattr(question, "write"):  # the report
        print(question.write())
    elif chosen.contestant:
        del sys.argv[1:]  # some contestants read it
        contest.serve(question, chosen.set[0], chosen.case, chosen.contestant)
    elif hasattr(question, "answer"):  # a question of quality or throughput: figures
        from mtrec_jax.machine import keep_freed_memory  # earlier commits have none

        keep_freed_memory()  # as commands of the library do
        taken = set(inspect.signature(question.answer).parameters) - {"quick"}
        given = {name: getattr(chosen, name) for name in taken}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            results = question.answer(chosen.quick, **given)
        except ModuleNotFoundError as error:
            parser.exit(2, f'{error.name} is not installed: pip install -e ".[bench]"\n')
        rich.print(_figures(results))
        _append(chosen.json, {"question": chosen.question, "quick": chosen.quick}, results)
    else:
        every = [name for name in question.CASES if name != "quick"]
        sets = ["quick"] if chosen.quick else chosen.set or every
        if unknown := set(sets) - set(question.CASES):
            parser.error(f"--set: {', '.join(unknown)}; there are {', '.join(every)}")
        with contextlib.ExitStack() as stack:
            side = None
            if chosen.against:
                if not hasattr(question, "BEFORE"):
                    parser.error(f"--against: {chosen.question} has no contestant of other commits")
                work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                kept = chosen.folder or work
                made = other(chosen.against, kept, work, chosen.folder is None)
                side = stack.enter_context(made)
            shared = chosen.rounds or 7, chosen.threads, chosen.json
            _run_contest(question, sets, *shared, side)


def _run_contest(
    question: ModuleType,
    sets: list[str],
    rounds: int,
    threads: int,
    file: Path | None,
    against: Side | None = None,
) -> None:
    name = question.__name__.rpartition(".")[2]
    cases = [(group, number) for group in sets for number in range(len(question.CASES[group]))]
    kernels = contest.best_kernels(question, *cases[0])
    for group, number in track(cases, "cases", disable=not sys.stderr.isatty()):
        case = question.CASES[group][number]
        results, failed = contest.compare(question, group, number, rounds, kernels, against)
        rich.print(_table(str(case), results, failed, question.BOUNDS))
        shared = {"question": name, "set": group, "case": case._asdict(), "threads": threads}
        _append(file, shared, [result._asdict() for result in results])
    libraries = sorted({library for result in results for library in result.blas})
    print(f"{benchmarks.environment()['cpu']}, {threads} threads; {', '.join(libraries)}")


def _append(path: Path | None, shared: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Add results as JSON lines, with where they were measured."""
    if path is not None:
        where = benchmarks.environment()
        where["run"] = f"{where['time']} {os.getpid()}"
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(shared | where | result) + "\n" for result in results)


def _figures(results: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for name in results[0]:
        table.add_column(name, justify="left" if name in ("task", "case") else "right")
    for result in results:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in result.values()))
    return table


def _table(
    title: str, results: list[contest.Result], failed: dict[str, str], bounds: tuple[str, ...]
) -> Table:
    table = Table(title=title, box=None)
    for name in ("contestant", "ms", "spread", "compile ms", "peak MiB", "/ ours", "notes"):
        table.add_column(name, justify="left" if name in ("contestant", "notes") else "right")
    ours = next(
        (r.median_ms for r in results if r.contestant.startswith("mtrec_jax")), float("nan")
    )
    for result in results:
        table.add_row(
            f"[dim]{result.contestant}" if result.contestant in bounds else result.contestant,
            f"{result.median_ms:.1f}",
            f"{result.fastest_ms:.1f}-{result.slowest_ms:.1f}",
            f"{result.compile_ms:.0f}",
            f"{result.peak_mib:.0f} (+{result.peak_mib - result.before_mib:.0f})",
            f"{result.median_ms / ours:.2f}",
            result.notes or result.kernel,
        )
    for name, error in failed.items():
        table.add_row(name, "", "", "", "", "", error)
    return table


if __name__ == "__main__":
    main()
