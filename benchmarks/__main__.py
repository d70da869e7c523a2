"""List the questions, or answer one."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
from pathlib import Path
from typing import Any

import rich
from rich.table import Table

import benchmarks


def main() -> None:
    """Parse the command line and run it."""
    questions = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.name[0] != "_"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("question", nargs="?", choices=questions)
    parser.add_argument("--quick", action="store_true", help="a small problem")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append JSON lines to FILE")
    parser.add_argument("--repetitions", type=int, default=11)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--events", type=int, help="prepare: events of the log (50,000,000)")
    parser.add_argument("--folder", type=Path, help="prepare: where its files go for a while")
    parser.add_argument("--seeds", type=int, nargs="+", help="social: other shops than (505, 606)")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)  # the child's side of run_alone
    chosen = parser.parse_args()
    if chosen.question is None:
        for name in questions:
            docstring = importlib.import_module(f"benchmarks.{name}").__doc__ or ""
            print(f"{name}: {docstring.splitlines()[0]}")
        return
    if hasattr(os, "sched_setaffinity"):  # XLA sizes its thread pool by the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.threads])
    question = importlib.import_module(f"benchmarks.{chosen.question}")
    if chosen.contestant:
        result = benchmarks.measure(question, chosen.contestant, chosen.quick, chosen.repetitions)
        print(json.dumps(result))
        return
    if hasattr(question, "answer"):  # a question of quality: figures, not times
        given = {"events": chosen.events, "folder": chosen.folder, "seeds": chosen.seeds}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            results = question.answer(chosen.quick, **given)
        except ModuleNotFoundError as error:
            parser.exit(2, f'{error.name} is not installed: pip install -e ".[bench]"\n')
        rich.print(_figures(results))
        _append(chosen.json, {"question": chosen.question, "quick": chosen.quick}, results)
        return
    options = [f"--repetitions={chosen.repetitions}", f"--threads={chosen.threads}"]
    options += ["--quick"] if chosen.quick else []
    results = [
        benchmarks.run_alone(chosen.question, name, options, chosen.threads)
        for name in question.CONTESTANTS
    ]
    for result in results:
        if "median_ms" in result and "median_ms" in results[0]:
            result["ratio"] = result["median_ms"] / results[0]["median_ms"]
    where = benchmarks.environment()
    rich.print(_table(str(question.SHAPES[chosen.quick]), results))
    kernels = sorted({kernel for result in results for kernel in result.get("blas", [])})
    print(f"{where['cpu']}, {chosen.threads} threads; BLAS: {', '.join(kernels) or 'unknown'}")
    shared = {"question": chosen.question, "quick": chosen.quick, "threads": chosen.threads}
    _append(chosen.json, shared, results)


def _append(path: Path | None, shared: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Add results as JSON lines, with where they were measured."""
    if path is not None:
        where = benchmarks.environment()
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(shared | where | result) + "\n" for result in results)


def _figures(results: list[dict[str, Any]]) -> Table:
    table = Table(box=None)
    for name in results[0]:
        table.add_column(name, justify="left" if name == "task" else "right")
    for result in results:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in result.values()))
    return table


def _table(title: str, results: list[dict[str, Any]]) -> Table:
    columns = ("contestant", "ms", "spread", "compile ms", "peak MiB", "/ ours")
    table = Table(*columns, title=title)
    for result in results:
        if "error" in result:
            table.add_row(result["contestant"], result["error"])
            continue
        table.add_row(
            result["contestant"],
            f"{result['median_ms']:.1f}",
            f"{result['fastest_ms']:.1f}-{result['slowest_ms']:.1f}",
            f"{result['compile_ms']:.0f}",
            f"{result['peak_mib']:.0f} (+{result['peak_mib'] - result['before_mib']:.0f})",
            f"{result.get('ratio', float('nan')):.2f}",
        )
    return table


if __name__ == "__main__":
    main()
