"""What is learned from the training events: tasks, vocabularies, bins, scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Experiment
from mtrec_jax.data import describe, features
from mtrec_jax.data.dataset import Prepared, Rule, TaskField
from mtrec_jax.data.examples import Log
from mtrec_jax.data.features import Encoding, Text, one_array
from mtrec_jax.data.growth import earlier_task, grown
from mtrec_jax.losses.tasks import KINDS, class_numbers
from mtrec_jax.losses.tasks.watch_time import quantiles_of
from mtrec_jax.types import FIRST

# {task: {split: (its labels, their mean if they are numbers)}}
Labels = dict[str, dict[int, tuple[int, float | None]]]


def fit_tasks(
    events: Any, experiment: Experiment, base: Prepared | None = None
) -> tuple[dict[str, TaskField], list[Rule], Labels]:
    """Classes, means and scales of the training labels, a report, and how many labels there are.

    Every figure is made of exact counts, so that it is the same on every engine. Classes and scales
    that `base` has learned stay what they are; new classes follow.
    """
    tasks, rules, labels = {}, [], Labels()
    for name, task in experiment.tasks.items():
        known = events.filter(events[f"label_{name}"].notnull())
        known = known.select("split", label=known[f"label_{name}"])
        found = known.group_by("label", "split").agg(n=known.count()).to_pyarrow().sort_by("label")
        by_split = {
            code: found.filter(pc.equal(found["split"], code))
            for code in sorted(found["split"].unique().to_pylist())
        }
        kind = KINDS.get(task.kind)
        numbers = kind is None or kind.labels != "classes"
        labels[name] = {
            code: (pc.sum(table["n"]).as_py(), _moments(table)[0] if numbers else None)
            for code, table in by_split.items()
        }
        train = by_split.get(0, found.slice(0, 0))
        if kind is None:
            tasks[name] = TaskField()
            continue
        counts = dict(zip(train["label"].to_pylist(), train["n"].to_pylist(), strict=True))
        describe.check_labels(experiment, name, counts)
        old = earlier_task(base, name)
        if kind.labels == "classes":
            first = old.classes if old else ()
            classes = (*first, *sorted(counts.keys() - set(first), key=_class_order))
            tasks[name] = TaskField(classes=classes)
            rules += _unseen(name, found, classes)
            continue
        mean, std = _moments(train)
        learned = TaskField(mean=mean, std=std or 1.0)
        if kind.labels == "levels":
            levels = sorted(counts.keys() | set(class_numbers(old.classes if old else ())))
            rules += _unseen(name, found, levels)
            shares = tuple(counts.get(level, 0) / sum(counts.values()) for level in levels)
            classes = tuple(repr(float(level)).removesuffix(".0") for level in levels)
            learned = dataclasses.replace(learned, classes=classes, shares=shares)
        elif old and kind.judged == "regression":
            learned = old
        tasks[name] = learned
    return tasks, rules, labels


def _unseen(name: str, found: pa.Table, known: Sequence[Any]) -> list[Rule]:
    """The report of labels whose class no training row has."""
    unseen = found.filter(
        pc.invert(pc.is_in(found["label"], value_set=pa.array(known, found["label"].type)))
    )
    if not len(unseen):
        return []
    shown = tuple(sorted(map(repr, unseen["label"].unique().to_pylist()))[:3])
    rule = f"class of {name} without training rows (masked)"
    return [Rule(rule=rule, rows=pc.sum(unseen["n"]).as_py(), examples=shown)]


def with_quantiles(
    tasks: dict[str, TaskField],
    experiment: Experiment,
    log: Log,
    groups: Mapping[str, tuple[np.ndarray, int]],
    base: Prepared | None = None,
) -> dict[str, TaskField]:
    """The quantiles of watch time by duration group, of the training rows; groups that `base` knows
    keep theirs.

    Args:
      tasks: what is known of the tasks so far.
      experiment: which of them have a `duration`.
      log: all events.
      groups: {duration: its local ids by catalogue index, and how many of these there may be}.
      base: the folder that grows.
    """
    found = dict(tasks)
    for name, task in experiment.tasks.items():
        if task.duration:
            of_item, size = groups[task.duration]
            label = log.targets[f"label_{name}"]
            rows = np.flatnonzero((log.split == 0) & ~np.isnan(label))
            own = of_item[log.events["item"][rows] - FIRST]
            table = quantiles_of(label[rows].astype(np.float64), own, size)
            old = earlier_task(base, name)
            kept = old.quantiles if old else ()
            found[name] = dataclasses.replace(tasks[name], quantiles=(*kept, *table[len(kept) :]))
    return found


def fit_side(
    experiment: Experiment, table: pa.Table, key: str, on: str, base: Prepared | None = None
) -> tuple[list[Encoding], dict[str, pa.Array]]:
    """Features of users or items, fitted on those with training events; and all their cells.

    They continue what `base` has learned.
    """
    trained = pc.greater(table["count"], 0)
    encodings, cells = [], {}
    for name, feature in experiment.features.items():
        if feature.on == on and feature.fitted:
            column = feature.column or name
            own = column == getattr(experiment.data, key)
            cells[name] = one_array(table[key if own else f"column_{column}"])
            sizes = table["count"].to_numpy() if own else np.ones(len(table), np.int64)
            known = trained.to_numpy()
            chosen = cells[name].filter(pa.array(known))
            fresh = features.fit(name, feature, chosen, sizes[known])
            encodings.append(grown(base, fresh, chosen, sizes[known]))
    return encodings, cells


def text_columns(experiment: Experiment, table: pa.Table, on: str) -> dict[str, pa.Array]:
    """{text_<feature>: text or lists of text} of users or items, as they are written for encoders.

    Args:
      experiment: its features of kind "text" are meant.
      table: users or items with column_*, as `fit_side` takes it.
      on: "item" or "context".
    """
    return {
        f"text_{name}": one_array(table[f"column_{feature.column or name}"])
        for name, feature in experiment.features.items()
        if feature.on == on and isinstance(feature, Text)
    }


def fit_events(events: Any, experiment: Experiment, base: Prepared | None = None) -> list[Encoding]:
    """Features that stand in the events: of the history and of the request.

    They continue what `base` has learned.
    """
    encodings = []
    train = events.filter(events["split"] == 0)
    for name, feature in experiment.features.items():
        if f"feature_{name}" in events.columns:
            cells = train.group_by(cell=train[f"feature_{name}"]).agg(n=train.count()).to_pyarrow()
            column, sizes = one_array(cells["cell"]), cells["n"].to_numpy()
            fresh = features.fit(name, feature, column, sizes)
            encodings.append(grown(base, fresh, column, sizes))
    return encodings


def values_report(encodings: list[Encoding]) -> list[Rule]:
    """How many training values were no number, were imputed, or are lists that became text."""
    rules = []
    for encoding in encodings:
        by, name = encoding.feature.impute, encoding.name
        rule = (
            f"training value of {name} looks like a list that became text (kept as it is; write a "
            'column of lists, or "a|b" with kind = "multi_valued" and separator = "|")'
        )
        rules.append(Rule(rule=rule, rows=encoding.as_text, examples=encoding.listed))
        rule = f"training value of {name} is no number (used as missing)"
        rules.append(Rule(rule=rule, rows=encoding.unreadable, examples=encoding.unread))
        rules.append(
            Rule(rule=f"missing training value of {name} imputed ({by})", rows=encoding.imputed)
        )
    return [rule for rule in rules if rule.rows]


def _moments(counts: pa.Table) -> tuple[float, float]:
    """Mean and standard deviation of labels, each of which occurs n times."""
    labels, sizes = counts["label"].to_numpy(), counts["n"].to_numpy()
    mean = float((labels * sizes).sum() / sizes.sum())
    return mean, float(np.sqrt((np.square(labels - mean) * sizes).sum() / sizes.sum()))


def _class_order(text: str) -> tuple[bool, float, str]:
    """Numbers by value, before other texts."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
