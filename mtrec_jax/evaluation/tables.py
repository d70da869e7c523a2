"""Evaluations as tables for people: the model, its baselines and published figures together."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtrec_jax.arguments import argument
from mtrec_jax.config import Experiment
from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.evaluation.answers import UNCHOSEN
from mtrec_jax.evaluation.evaluate import Evaluation
from mtrec_jax.evaluation.metrics import metric_named
from mtrec_jax.evaluation.paired import Difference, holm, paired_difference
from mtrec_jax.evaluation.protocol import Protocol, check_same
from mtrec_jax.result import Result

_ACROSS = 4  # metrics beside each other


def evaluation_tables(experiment: Experiment, evaluation: Evaluation) -> RenderableType:
    """Tables of each task (model, baselines, published figures), of the orders, and of segments."""
    parts: list[RenderableType] = [
        Text(
            f"{experiment.name}, {evaluation.split} split: {evaluation.protocol} "
            f"[protocol {evaluation.protocol.hash}]"
        )
    ]
    if evaluation.calibration:
        parts.append(Text(f"predictions are calibrated: {evaluation.calibration}"))
    parts += [_task_table(experiment, evaluation, name) for name in experiment.tasks]
    parts += [Text(f"ALARM {text}", style="bold red") for text in evaluation.alarms]
    if evaluation.orders:
        columns = sorted(next(iter(evaluation.orders.values())), key=lambda c: "@" not in c)
        rows = [
            (name, [_number(metrics.get(c)) for c in columns], "")
            for name, metrics in evaluation.orders.items()
        ]
        parts += _tables("Orders: candidates put in order by each score", columns, rows)
        if evaluation.order:
            flattered = evaluation.split == "validation" and UNCHOSEN not in evaluation.order
            own = "; it was chosen, and scores were calibrated, on this split" * flattered
            parts.append(Text(f"{evaluation.order}{own}"))
    return Group(*parts, *_segment_tables(experiment, evaluation))


def print_evaluation(experiment: Experiment, evaluation: Evaluation) -> None:
    """Print `evaluation_tables` to standard output."""
    Console().print(evaluation_tables(experiment, evaluation))


def compared(evaluations: Mapping[str, Evaluation], metrics: Sequence[str] = ()) -> Result:
    """Several models in one table, each beside the first, if they were measured by the same rules.

    The difference to the first model has a 95 % interval and a p value of a paired t test over
    users (`paired.paired_difference`); p is corrected for all comparisons of the table (Holm). It
    holds the chance among users alone: it is of two trainings, not of two methods.

    Args:
      evaluations: {name of the model: its evaluation}, two or more.
      metrics: "task/metric" of those to compare, so that fewer comparisons are corrected for; ():
        all that the models share.

    Returns:
      A row a metric: task, metric, better ("higher", "lower", or the best value), users (with
      targets), the first model's value under its name, and for each other NAME: its value,
      NAME difference (to the first), NAME low, NAME high, NAME p. Null is what is undefined, or has
      no sums by user, as the calibration error.

    Raises:
      ConfigError: they share no task, or rules, splits, events or targets of these tasks differ, or
        a metric is not there.
    """
    tasks = comparable({name: (e.protocol, list(e.tasks)) for name, e in evaluations.items()})
    same_events({name: e.judged for name, e in evaluations.items()})
    for what in ("split", "targets"):
        found = {n: _of_tasks(getattr(e, what), tasks) for n, e in evaluations.items()}
        if any(one != next(iter(found.values())) for one in found.values()):
            raise ConfigError(f"the models were measured on different {what}: {found}")
    (first, one), *others = evaluations.items()
    names = [f"{t}/{m}" for t in tasks for m in one.tasks[t]]
    names = [n for n in names if all(_value(e, n) is not None for _, e in others)]
    for name in metrics:
        if name not in names:
            raise ConfigError(
                f"{argument('metrics')} {name}: the models share {', '.join(names)}."
                f"{nearest(name, names)}"
            )
    rows: list[dict[str, Any]] = []
    for name in metrics or names:
        task, _, metric = name.partition("/")
        row: dict[str, Any] = {"task": task, "metric": metric, "better": better(metric)}
        row |= {"users": _users(one, task), first: _value(one, name)}
        for other, e in others:
            row |= _beside(one, e, name, other)
        rows.append(row)
    tests = [(row, f"{name} p") for row in rows for name, _ in others]
    for (row, key), p in zip(tests, holm([row[key] for row, key in tests]), strict=True):
        row[key] = p
    return Result(pa.Table.from_pylist([{k: _null(v) for k, v in row.items()} for row in rows]))


def same_events(judged: Mapping[str, str]) -> None:
    """Raise `ConfigError` unless all models were judged by the same events, see `evaluate.judged`.

    >>> same_events({"one": "0f", "other": "0f"})
    """
    if len(set(judged.values())) > 1:
        shown = ", ".join(f"{name}: {digits}" for name, digits in judged.items())
        raise ConfigError(
            f"the models were measured on different events, or on other splits of them ({shown}). "
            "Train them on folders of the same files and split, such as one prepared folder"
        )


def better(metric: str) -> str:
    """Which values of a metric are better: "higher", "lower", or the number that is best.

    >>> better("auc"), better("rmse"), better("copc")
    ('higher', 'lower', '1')
    """
    known = metric_named(metric)
    if known.ideal is not None:
        return f"{known.ideal:g}"
    return "higher" if known.larger_is_better else "lower"


def _beside(one: Evaluation, other: Evaluation, name: str, shown: str) -> dict[str, Any]:
    """What a model's columns say of a metric."""
    task, _, metric = name.partition("/")
    before, value = (e.tasks[task][metric] for e in (one, other))
    found = Difference(value - before, *[np.nan] * 3)
    tables = [e.users.sort_by("user") for e in (one, other) if e.users is not None]
    if len(tables) == 2 and all(name in table.column_names for table in tables):
        first, second = (table[name].to_numpy() for table in tables)
        targets = [table[f"{task} targets"].to_numpy() for table in tables]
        if not np.array_equal(*targets):
            raise ConfigError(f"the models were not measured on the same targets of {task}")
        found = paired_difference(second, first, targets[0])
    parts = {"difference": found.mean, "low": found.low, "high": found.high, "p": found.p}
    return {shown: value} | {f"{shown} {part}": value for part, value in parts.items()}


def _value(evaluation: Evaluation, name: str) -> float | None:
    task, _, metric = name.partition("/")
    return evaluation.tasks[task].get(metric)


def _users(evaluation: Evaluation, task: str) -> int | None:
    if evaluation.users is None:
        return None
    return int(np.count_nonzero(evaluation.users[f"{task} targets"].to_numpy()))


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and np.isnan(value) else value


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


def print_compared(result: Result, split: str) -> None:
    """Print what `compared` gave to standard output."""
    first = result.columns[4]
    others = [n.removesuffix(" difference") for n in result.columns if n.endswith(" difference")]
    columns = [c for name in others for c in (name, f"- {first}", "95 % interval", "p")]
    table = _table(f"Compared on the {split} split", ["task", "metric", first, *columns])
    for row in result:
        cells = [_number(row[first])]
        for name in others:
            low, high = row[f"{name} low"], row[f"{name} high"]
            interval = "" if low is None else f"{low:+.4f} to {high:+.4f}"
            p = row[f"{name} p"]
            change = row[f"{name} difference"]
            cells += [_number(row[name]), "" if change is None else f"{change:+.4f}", interval]
            cells.append("" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001")
        table.add_row(row["task"], f"{row['metric']} {_arrow(row['metric'])}", *cells)
    tests = sum(row[f"{name} p"] is not None for row in result for name in others)
    console = Console() if sys.stdout.isatty() else Console(width=max(140, 60 * len(others)))
    console.print(table)
    console.print(
        f"Difference to {first}; paired t test over users, p corrected for {tests} comparisons "
        "(Holm).\nIt compares trainings, not methods: the chance among users is in p, that among "
        "seeds is not (mtrec study crossval)",
        style="dim",
    )


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
    columns = _columns(evaluation, task)
    count = evaluation.targets.get(task, 0)
    rows: list[tuple[str, list[str], str]] = []
    ours = [_number(evaluation.tasks[task].get(c)) for c in columns]
    rows.append(("this model", ours, "bold"))
    intervals = evaluation.intervals.get(task, {})
    if intervals:
        rows.append(("  95 % interval", [_interval(intervals.get(c)) for c in columns], ""))
    for name, metrics in evaluation.baselines.items():
        if any(key.rpartition("/")[0] == task for key in metrics):
            rows.append((name, [_number(metrics.get(f"{task}/{c}")) for c in columns], ""))
    notes = []
    for published in (p for p in experiment.published if p.task == task):
        if published.under and (others := evaluation.protocol.other_than(published.under)):
            rules = ", ".join(f"{n} {there}, here {here}" for n, (there, here) in others.items())
            notes.append(f"published under other rules ({rules}): {published.name}")
            continue
        values = [_number(published.metrics.get(c)) for c in columns]
        rows.append((f"published: {published.name}", values, "dim"))
        rules = f"{published.split} split"
        if published.protocol not in ("", evaluation.protocol.hash):
            rules += f", by ANOTHER PROTOCOL ({published.protocol}), not comparable"
        notes.append(f"published, {rules}: {published.name}: {published.source}")
    if kind == "retrieval":
        notes.append("one item to find: recall@k is hr@k, map@k is mrr@k, precision@k is hr@k / k")
    title = f"{task} ({kind}, {count:,} targets)"
    return Group(
        *_tables(title, columns, rows), *(Text(note, style="dim") for note in notes), Text()
    )


def _tables(
    title: str, columns: Sequence[str], rows: Iterable[tuple[str, list[str], str]]
) -> Iterator[Table]:
    """Rows (name, cells, style) with a column a metric, so many in a table that lines stay short;
    rows without anything to say in one are left out there."""
    for start in range(0, len(columns), _ACROSS):
        shown = columns[start : start + _ACROSS]
        table = _table("" if start else title, ["", *(f"{c} {_arrow(c)}" for c in shown)])
        for name, cells, style in rows:
            if any(own := cells[start : start + _ACROSS]):
                table.add_row(name, *own, style=style)
        yield table


def _segment_tables(experiment: Experiment, evaluation: Evaluation) -> Iterator[RenderableType]:
    """For each way to part the targets a table a task, a row a value."""
    for name, by_value in evaluation.segments.items():
        for task in experiment.tasks:
            columns = _columns(evaluation, task)
            rows = [
                (f"{value} ({int(of[task]['targets']):,})", [_number(of[task][c]) for c in columns])
                for value, of in by_value.items()
                if of[task]["targets"]
            ]
            styled = [(value, cells, "") for value, cells in rows]
            yield from _tables(f"{task} by {name} (targets)", columns, styled)
            yield Text()


def _columns(evaluation: Evaluation, task: str) -> list[str]:
    """The metrics that people read: with one relevant item, three others say the same."""
    others = ("recall", "map", "precision")
    return [m for m in evaluation.tasks[task] if m.partition("@")[0] not in others]


def _arrow(metric: str) -> str:
    known = metric_named(metric)
    if known.ideal is not None:
        return f"→ {known.ideal:g}"
    return "↑" if known.larger_is_better else "↓"


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"  # nan is shown as such


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f}-{interval[1]:.3f}"
