"""A picture of an evaluation: reliability diagrams of its binary tasks."""

from __future__ import annotations

from pathlib import Path

from mtrec_jax.arguments import a_path
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation.evaluate import Evaluation

FORMATS = (".png", ".svg", ".pdf")


def draw_reliability(evaluation: Evaluation, path: str | Path) -> None:
    """Draw the observed share of label 1 over the mean prediction, a diagram a binary task.

    Args:
      evaluation: from `evaluate_run`; its `reliability` are the bins, of equally many targets.
      path: a .png, .svg or .pdf file, which appears whole.

    Raises:
      ConfigError: matplotlib is not installed, or there is no binary task with targets.
      DataError: another suffix.
    """
    path = a_path("path", path)
    if path.suffix not in FORMATS:
        raise DataError(f"{path}: the file name must end in {', '.join(FORMATS)}")
    drawn = {task: bins for task, bins in evaluation.reliability.items() if bins}
    if not drawn:
        raise ConfigError(f"{path}: there is no binary task with targets to draw")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("pictures need matplotlib: pip install 'mtrec_jax[plots]'") from None
    figure = Figure(figsize=(3.4 * len(drawn), 3.4), layout="constrained")
    for place, (task, bins) in enumerate(drawn.items(), 1):
        axes = figure.add_subplot(1, len(drawn), place)
        predicted, observed = ([one[key] for one in bins] for key in ("predicted", "observed"))
        end = 1.05 * max(predicted + observed) or 1.0
        axes.plot([0, end], [0, end], color="0.7", linewidth=1)
        axes.plot(predicted, observed, "o-")
        axes.set(xlim=(0, end), ylim=(0, end), xlabel="mean prediction", ylabel="share of 1")
        error = evaluation.tasks[task].get("calibration_error", float("nan"))
        axes.set_title(f"{task}, {evaluation.split}: calibration error {error:.4f}", fontsize=9)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=120, format=path.suffix[1:])
    partial.replace(path)
