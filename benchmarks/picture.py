"""The picture of the README: a run of the generated shop beside the best possible and a baseline.

mtrec run shop
python -m benchmarks.picture runs/shop docs/result.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw(evaluation: dict[str, Any], to: Path) -> None:
    """Draw the binary tasks of an `evaluation.json`, with their 95 % intervals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = ("click", "buy")
    baselines = evaluation["baselines"]
    rows = [
        ("user and item biases", [baselines["bias"][f"{t}/auc"] for t in tasks], "#b8bec8"),
        ("mtrec_jax, one model", [evaluation["tasks"][t]["auc"] for t in tasks], "#1f6f8b"),
        ("best possible", [baselines["best possible"][f"{t}/auc"] for t in tasks], "#e0a458"),
    ]
    figure, axes = pyplot.subplots(figsize=(8, 2.6), dpi=150)
    for number, (label, values, colour) in enumerate(rows):
        places = [t + 0.26 * (1 - number) for t in range(len(tasks))]
        axes.barh(places, values, height=0.24, color=colour, label=label)
        for task, place, value in zip(tasks, places, values, strict=True):
            end = evaluation["intervals"][task]["auc"][1] if label.startswith("mtrec") else value
            axes.text(end + 0.004, place, f"{value:.3f}", va="center", fontsize=8)
    for t, task in enumerate(tasks):
        low, high = evaluation["intervals"][task]["auc"]
        axes.plot([low, high], [t, t], color="black", linewidth=1)
    axes.set_yticks(range(len(tasks)), [f"{task}, AUC" for task in tasks])
    axes.set_xlim(0.5, 0.9)  # an AUC of 0.5 is chance
    axes.set_title("Generated shop, validation split", fontsize=10, loc="left")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.42), ncols=3, frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(to, bbox_inches="tight")


if __name__ == "__main__":
    run, to = sys.argv[1:]
    draw(json.loads((Path(run) / "evaluation.json").read_text("utf-8")), Path(to))
