"""Results that `--json` has written, as one page: docs/benchmarks/README.md and its plots.

Of several results for the same case and contestant the last one counts. The plots show the sets of
`topk` in which one number varies, on logarithmic axes, with the bound: the fastest of the bare
products. On a GPU or TPU they are the measured roofline of that device.
"""

from __future__ import annotations

import importlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import benchmarks

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
_VARIED = {"items": "N", "queries": "Q", "results": "k"}  # sets of `topk` in which one varies
_LEFT_OUT = ("mtrec_jax raw", "scikit-learn", "implicit")  # of plots, to keep them readable

_HEAD = """# Benchmarks

Written by `python -m benchmarks report` from the JSON lines beside it, which `python -m benchmarks
QUESTION --json FILE` appends. Times are medians of calls in milliseconds, with the fastest and the
slowest call; each contestant runs in a process of its own, in turns with the others. "/ ours" is
how many times as long as mtrec_jax it took: below 1 it was faster. *Bounds* are the bare products,
of which nothing is kept. "First call" is what the first call took longer than the others, which
says nothing where a contestant tried several ways before (bounds, jax-cce). Peak memory contains
data and index; in brackets, what the first call added to the peak so far. Figures of different runs
are not to be compared: the speed of a machine changes."""


def write(folder: Path = FOLDER) -> Path:
    """Write the page and its plots into the folder of the JSON lines; returns the page's path.

    Raises:
      FileNotFoundError: there is no JSON line in the folder.
    """
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    if not lines:
        raise FileNotFoundError(f"no *.jsonl in {folder}: python -m benchmarks topk --json FILE")
    lines.sort(key=lambda line: line["time"])
    contests = _newest([line for line in lines if "contestant" in line])
    figures = [line for line in lines if "contestant" not in line]
    pages = _figure_tables(figures) | _contest_tables(contests)
    parts = [_HEAD]
    for question in benchmarks.QUESTIONS:
        if question in pages:
            parts += [f"## {question}"]
            if question == "topk":
                parts += [f"![time against {name}]({name})" for name in _plots(contests, folder)]
            for title, (columns, rows) in pages[question].items():
                parts += [f"**{title}**", _markdown(columns, rows)]
    places = sorted({_place(line) for line in (*contests, *figures)})
    parts += ["## Measured on", "\n".join(f"- {place}" for place in places)]
    page = "\n\n".join(parts) + "\n"
    path = folder / "README.md"
    path.write_text(page, encoding="utf-8")
    return path


def _newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case, the results of the run that was the last to answer it."""
    last = {_case(line): line["run"] for line in lines}
    return [line for line in lines if line["run"] == last[_case(line)]]


def _case(line: dict[str, Any]) -> tuple[str, str]:
    return line["question"], json.dumps(line["case"]) + line["device"]


def _place(line: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    threads = f", {line['threads']} threads" if "threads" in line else ""
    blas = f"; {', '.join(line['blas'])}" if line.get("blas") else ""
    return f"{line['cpu']}{threads}, {line['system']}, commit {line['commit']}; {packages}{blas}"


# --- Tables


def _contest_tables(lines: list[dict[str, Any]]) -> dict[str, Any]:
    columns = ("contestant", "ms", "fastest-slowest", "/ ours", "first call, ms more", "peak MiB")
    pages: dict[str, Any] = defaultdict(dict)
    ours: dict[str, float] = {}
    for line in lines:
        case = ", ".join(f"{name} {n:,}" for name, n in line["case"].items() if n)
        title = f"{line['set']}: {case} ({line['device']})"
        _, rows = pages[line["question"]].setdefault(title, (columns, []))
        name = line["contestant"]
        if line["contestant"].startswith("mtrec_jax") and title not in ours:
            ours[title] = line["median_ms"]
        extra = line["peak_mib"] - line["before_mib"]
        rows.append(
            (
                f"*{name}*" if name.startswith("bound") else name,
                f"{line['median_ms']:.2f}",
                f"{line['fastest_ms']:.2f}-{line['slowest_ms']:.2f}",
                f"{line['median_ms'] / ours[title]:.2f}" if title in ours else "",
                f"{line['compile_ms']:.0f}",
                f"{line['peak_mib']:.0f} (+{extra:.0f})",
            )
        )
    return pages


def _figure_tables(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last answer to each question; of a leaderboard all, with their commits, a table for each
    protocol."""
    pages: dict[str, Any] = {}
    own = {*benchmarks.environment(), "question", "quick", "run", "protocol", "rules"}
    last = {(line["question"], line["quick"]): line["run"] for line in lines}
    for line in lines:
        every = line["question"] == "leaderboard"
        if every or line["run"] == last[line["question"], line["quick"]]:
            row = {name: value for name, value in line.items() if name not in own}
            row = {"commit": line["commit"]} | row if every else row
            groups = pages.setdefault(line["question"], {})
            title = "a small problem" if line["quick"] else "the problem in full"
            if every:
                title = f"protocol {line['protocol']}: {line.get('rules', 'of an earlier version')}"
            _, rows = groups.setdefault(title, (tuple(row), []))
            rows.append(tuple(_shown(value) for value in row.values()))
    return pages


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value}"


def _markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- Plots


def _plots(lines: list[dict[str, Any]], folder: Path) -> list[str]:
    """File names of one plot for each number that varies."""
    importlib.import_module("matplotlib").use("Agg")  # of [bench]; slow to load
    plt = importlib.import_module("matplotlib.pyplot")

    names = []
    for field, symbol in _VARIED.items():
        group = [line for line in lines if line["set"] == field]
        if not group:
            continue
        fixed = _without(group[0], field)
        figure, axes = plt.subplots(figsize=(6, 4))
        for name, points in _curves([a for a in lines if _without(a, field) == fixed], field):
            style = "k--" if name == "bound" else "o-"
            axes.loglog(*zip(*sorted(points.items()), strict=True), style, label=name, markersize=4)
        rest = ", ".join(f"{name} {n:,}" for name, n in fixed["case"].items() if n)
        axes.set(xlabel=f"{symbol}: {field}", ylabel="ms", title=rest)
        axes.legend(fontsize=8)
        axes.grid(which="both", alpha=0.3)
        names.append(f"topk-{field}.png")
        figure.savefig(folder / names[-1], dpi=110, bbox_inches="tight")
        plt.close(figure)
    return names


def _without(line: dict[str, Any], field: str) -> dict[str, Any]:
    """What the points of a curve have in common."""
    case = {name: n for name, n in line["case"].items() if name != field}
    return {"case": case, "question": line["question"], "device": line["device"]}


def _curves(lines: list[dict[str, Any]], field: str) -> list[tuple[str, dict[int, float]]]:
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in lines:
        place, name, time = line["case"][field], line["contestant"], line["median_ms"]
        if name.startswith("bound"):
            curves["bound"][place] = min(time, curves["bound"].get(place, time))
        elif name not in _LEFT_OUT:
            curves[name][place] = time
    return list(curves.items())
