"""Evaluations as tables for people: the model, its baselines and published figures together."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtrec_jax.config import Experiment
from mtrec_jax.evaluation.evaluate import Evaluation
from mtrec_jax.evaluation.metrics import metric_named, metrics_of


def evaluation_tables(experiment: Experiment, evaluation: Evaluation) -> RenderableType:
    """One table a task (model, baselines, published figures), and one of the orders."""
    parts: list[RenderableType] = [
        Text(
            f"{experiment.name}, {evaluation.split} split: {evaluation.protocol} "
            f"[protocol {evaluation.protocol.hash}]"
        )
    ]
    parts += [_task_table(experiment, evaluation, name) for name in experiment.tasks]
    if evaluation.orders:
        title = "Orders: retrieved candidates put in order by each score"
        columns = list(next(iter(evaluation.orders.values())))
        table = _table(title, ["order", *columns])
        for name, metrics in evaluation.orders.items():
            table.add_row(name, *(_number(metrics.get(c)) for c in columns))
        parts.append(table)
    return Group(*parts)


def print_evaluation(experiment: Experiment, evaluation: Evaluation) -> None:
    """Print `evaluation_tables` to standard output."""
    Console().print(evaluation_tables(experiment, evaluation))


def _task_table(experiment: Experiment, evaluation: Evaluation, task: str) -> RenderableType:
    kind = experiment.tasks[task].kind
    # with one relevant item, recall is the hit rate: one column is enough to read
    columns = [c for c in metrics_of(kind, experiment.evaluate.ks) if not c.startswith("recall")]
    count = evaluation.targets.get(task, 0)
    arrows = [f"{c} {'↑' if metric_named(c).larger_is_better else '↓'}" for c in columns]
    table = _table(f"{task} ({kind}, {count:,} targets)", ["", *arrows])
    ours = [_number(evaluation.tasks[task].get(c)) for c in columns]
    table.add_row("this model", *ours, style="bold")
    intervals = evaluation.intervals.get(task, {})
    if intervals:
        table.add_row("  95 % interval", *(_interval(intervals.get(c)) for c in columns))
    for name, metrics in evaluation.baselines.items():
        if any(key.rpartition("/")[0] == task for key in metrics):
            table.add_row(name, *(_number(metrics.get(f"{task}/{c}")) for c in columns))
    notes = []
    for published in (p for p in experiment.published if p.task == task):
        values = [_number(published.metrics.get(c)) for c in columns]
        table.add_row(f"published: {published.name}", *values, style="dim")
        rules = f"{published.split} split"
        if published.protocol not in ("", evaluation.protocol.hash):
            rules += f", by ANOTHER PROTOCOL ({published.protocol}), not comparable"
        notes.append(f"published, {rules}: {published.name}: {published.source}")
    return Group(table, *(Text(note, style="dim") for note in notes), Text())


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"
