"""A picture of a study of transfer: gains, gradient cosines, and the front of weightings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrec_jax.arguments import a_path
from mtrec_jax.errors import ConfigError, DataError


def draw_transfer(study: str | Path) -> Path:
    """Draw the report of a study's folder as `transfer.png` in it.

    Raises:
      ConfigError: matplotlib is not installed.
      DataError: the folder has no report.
    """
    folder = a_path("study", study)
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError(
            "pictures need matplotlib, which is not installed: pip install 'mtrec_jax[plots]'"
        ) from None
    try:
        report = json.loads((folder / "transfer.json").read_text("utf-8"))
    except OSError as error:
        raise DataError(
            f"{folder} has no transfer.json: {error}. Run: mtrec study transfer"
        ) from error
    panels = [_gains]
    panels += [_cosines] if report.get("cosines") else []
    panels += [_front] if len(report.get("weights") or ()) > 1 else []
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    for number, panel in enumerate(panels, 1):
        panel(figure.add_subplot(1, len(panels), number), report)
    partial = folder / "transfer.png.partial"
    figure.savefig(partial, dpi=120, format="png")
    path = folder / "transfer.png"
    partial.replace(path)
    return path


def _gains(axes: Any, report: Mapping[str, Any]) -> None:
    rows: Sequence[Mapping[str, Any]] = report["tasks"]
    axes.axvline(0, color="0.6", linewidth=1)
    for place, row in enumerate(rows):
        color = {"helps": "tab:green", "hurts": "tab:red"}.get(row["verdict"], "0.3")
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=color)
        axes.plot(row["gain"], place, "o", color=color)
        each = report["seeds"][row["task"]]
        axes.plot(each, [place + 0.15] * len(each), ".", color=color, alpha=0.5)
    axes.set_yticks(range(len(rows)), [f"{row['task']}\n{row['metric']}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title("gain by sharing, 95 % over users")


def _cosines(axes: Any, report: Mapping[str, Any]) -> None:
    lines: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in report["cosines"]:
        lines.setdefault((row["first"], row["second"], row["seed"]), []).append(row)
    colors: dict[tuple[str, str], str] = {}
    for (first, second, _), rows in lines.items():
        new = (first, second) not in colors
        color = colors.setdefault((first, second), f"C{len(colors)}")
        steps, values = [r["step"] for r in rows], [r["parameters"] for r in rows]
        axes.plot(steps, values, color=color, label=f"{first}, {second}" if new else None)
        other = [r["representation"] for r in rows]
        axes.plot(steps, other, color=color, linestyle=":")
    axes.axhline(0, color="0.6", linewidth=1)
    axes.set_xlabel("step")
    axes.set_title("gradient cosine: parameters (line),\nrepresentation (dots)")
    axes.legend(fontsize="small", frameon=False)


def _front(axes: Any, report: Mapping[str, Any]) -> None:
    rows = report["weights"]
    names = [f"{row['task']} {row['metric']}" for row in report["tasks"]][:2]
    for row in rows:
        static, on = row["balance"] == "static", bool(row["on the front"])
        look = {"marker": "o" if on else ".", "color": "C0" if on else "0.6"}
        look = look if static else {"marker": "x", "color": "C1"}
        axes.plot(row[names[0]], row[names[1]], **look)
    alone = [row["alone"] for row in report["tasks"]][:2]
    axes.axvline(alone[0], color="0.6", linestyle=":")
    axes.axhline(alone[1], color="0.6", linestyle=":")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.set_title("static weights (x: another balance);\ndotted: alone")
