"""Evaluations as tables for people: the model, its baselines and published figures together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtrec_jax.arguments import instance
from mtrec_jax.config import Experiment
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.evaluate import Evaluation
from mtrec_jax.evaluation.metrics import metric_named, metrics_of
from mtrec_jax.evaluation.protocol import Protocol, check_same
from mtrec_jax.result import Result


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


def side_by_side(evaluations: Mapping[str, Evaluation]) -> Result:
    """Several models in one table, if they were measured by the same rules.

    Args:
      evaluations: {name of the model: its evaluation}.

    Returns:
      A row a metric of each task that all of them have: task, metric, better ("higher" or "lower"),
      and for each model NAME, NAME low and NAME high: the value and its 95 % interval, null where
      it is undefined or was not made.

    Raises:
      ConfigError: they share no task, or rules, splits or targets of these tasks differ.

    Example:
      ```
      first, _ = mtrec_jax.evaluate_run("runs/shop")
      second, _ = mtrec_jax.evaluate_run("runs/shop-ple")
      mtrec_jax.side_by_side({"mmoe": first, "ple": second})
      ```
    """
    remedy = "pass {name: the first of what evaluate_run gives}"
    instance("evaluations", evaluations, Mapping, remedy)
    for name, e in evaluations.items():
        instance(f"evaluations[{name!r}]", e, Evaluation, remedy)
    tasks = comparable({name: (e.protocol, list(e.tasks)) for name, e in evaluations.items()})
    for what in ("split", "targets"):
        found = {n: _of_tasks(getattr(e, what), tasks) for n, e in evaluations.items()}
        if any(one != next(iter(found.values())) for one in found.values()):
            raise ConfigError(f"side_by_side: {what} differ: {found}")
    rows = []
    for task in tasks:
        for metric in next(iter(evaluations.values())).tasks[task]:
            better = "higher" if metric_named(metric).larger_is_better else "lower"
            row: dict[str, object] = {"task": task, "metric": metric, "better": better}
            for name, e in evaluations.items():
                low, high = e.intervals.get(task, {}).get(metric, (np.nan, np.nan))
                parts = {"": e.tasks[task].get(metric, np.nan), " low": low, " high": high}
                row |= {f"{name}{n}": None if np.isnan(v) else v for n, v in parts.items()}
            rows.append(row)
    return Result(pa.Table.from_pylist(rows))


def comparable(measured: Mapping[str, tuple[Protocol, Sequence[str]]]) -> list[str]:
    """The tasks that all models share.

    Args:
      measured: {name of the model: its protocol and its tasks}.

    Raises:
      ConfigError: there is none, or the rules for these tasks differ.
    """
    first = next(iter(measured.values()), (None, ()))[1]
    tasks = [task for task in first if all(task in own for _, own in measured.values())]
    if not tasks:
        raise ConfigError(f"the models {', '.join(measured)} have no task in common")
    check_same({name: _rules(protocol, tasks) for name, (protocol, _) in measured.items()})
    return tasks


def print_side_by_side(evaluations: Mapping[str, Evaluation]) -> None:
    """Print `side_by_side` to standard output, a value and its interval in one column."""
    table = _table("Side by side", ["task", "metric", *evaluations])
    for row in side_by_side(evaluations):
        arrow = "↑" if row["better"] == "higher" else "↓"
        shown = []
        for name in evaluations:
            low, high = row[f"{name} low"], row[f"{name} high"]
            interval = "" if low is None else f" ({_interval((low, high))})"
            shown.append(_number(row[name]) + interval)
        table.add_row(row["task"], f"{row['metric']} {arrow}", *shown)
    Console().print(table)


def _of_tasks(value: object, tasks: Sequence[str]) -> object:
    return {task: value[task] for task in tasks} if isinstance(value, dict) else value


def _rules(protocol: Protocol, tasks: Sequence[str]) -> Protocol:
    """The rules of some tasks alone: how orders were compared is none of them."""
    targets = sorted(target for target in protocol.targets if target.partition(":")[0] in tasks)
    rules = replace(protocol, targets=tuple(targets), reranked=0)
    if protocol.task in tasks:
        return rules
    return Protocol(
        data=rules.data,
        split=rules.split,
        validation=rules.validation,
        test=rules.test,
        order=rules.order,
        past=rules.past,
        targets=rules.targets,
    )


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
