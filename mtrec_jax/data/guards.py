"""Leaks that stop the preparation: answers among the features, and the future in the past.

A guard measures, it does not guess from names. It raises `DataError` with the feature, the task,
the figure and the remedy; `guard.allow` lets a "feature/task" through that is meant to be so.
"""

from __future__ import annotations

from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Experiment, Feature
from mtrec_jax.data import dependence
from mtrec_jax.data.dependence import Cells, Outcome
from mtrec_jax.data.examples import Log
from mtrec_jax.data.features import WRITTEN, as_numbers, one_array
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST

LEAK = 0.999  # AUC, accuracy or R² on rows that the rates were not taken from
_EVENTS = 500_000  # training events that are looked at
_AT_ONCE = 16  # features to a query
_SLICE = 1 << 20  # events that are compared at a time
_KEYS, _EQUAL = 20, 0.9  # so many keys, and this part of them equal, prove a statistic
_COMPUTED = ("hour", "weekday", "gap", "past_count", "past_rate", "ties", "friends_taste")


def determined_labels(events: Any, sides: dict[str, pa.Table], experiment: Experiment) -> None:
    """Stop if a feature of the target itself determines a label (history features show the past).

    The rows of a value in one half of the training rows are judged by its mean label in the other
    half, so that ids and timestamps, which never come again, determine nothing.

    Args:
      events: Ibis table with row, split (0: training), label_*, feature_* (text), user and item.
      sides: {"user" or "item": Arrow table with that key and column_* as text}.
      experiment: its features and tasks; `guard.allow` lets "feature/task" pairs through.

    Raises:
      DataError: a single feature with an AUC, accuracy or R² of .999 or more.
    """
    tasks = [name for name, task in experiment.tasks.items() if task.kind != "retrieval"]
    seen = {
        name: feature
        for name, feature in experiment.features.items()
        if feature.on != "history" and feature.kind not in _COMPUTED
    }
    train = events.filter(events.split == 0)
    more = int(train.count().to_pyarrow().as_py()) / _EVENTS
    if more > 1:  # Fibonacci hashing (Knuth, TAOCP 3, 6.4): SQL of one line
        train = train.filter(train.row % 2**31 * 2654435769 % 2**32 < int(2**32 / more))
    train = train.select("row", *(f"label_{name}" for name in tasks), *_beside_labels(train, seen))
    problems: list[str] = []
    of_rows = [name for name in seen if f"feature_{name}" in train.columns]
    always = [c for c in train.columns if not c.startswith("feature_")]
    for start in range(0, len(of_rows) if tasks else 0, _AT_ONCE):
        some = of_rows[start : start + _AT_ONCE]
        part = train.select(*always, *(f"feature_{name}" for name in some)).to_pyarrow()
        cells = {name: part[f"feature_{name}"] for name in some}
        problems += _determined(part, cells, tasks, experiment)
    for key, table in sides.items() if tasks else ():
        on = "item" if key == "item" else "context"
        own = [n for n, feature in seen.items() if feature.on == on and n not in of_rows]
        if own and key in train.columns:
            part = train.select(*always).to_pyarrow()
            place = pc.index_in(one_array(part[key]), value_set=one_array(table[key]))
            cells = dict.fromkeys(own, part[key])  # the id itself is a feature
            for name in own:
                column = f"column_{seen[name].column or name}"
                if column in table.column_names:
                    cells[name] = one_array(table[column]).take(place)
            problems += _determined(part, cells, tasks, experiment)
    if problems:
        raise DataError("\n".join(problems))


def _beside_labels(events: Any, features: dict[str, Feature]) -> list[str]:
    wanted = ("user", "item", *(f"feature_{name}" for name in features))
    return [name for name in wanted if name in events.columns]


def _determined(
    part: pa.Table, cells: dict[str, Any], tasks: list[str], experiment: Experiment
) -> list[str]:
    """A message for each feature {name: cells} of the rows that determines one of their labels."""
    problems, row = [], part["row"].to_numpy()
    texts = {name: dependence.joined(one_array(column)) for name, column in cells.items()}
    for task_name in tasks:
        task, label = experiment.tasks[task_name], one_array(part[f"label_{task_name}"])
        if task.kind == "multiclass":
            label = label.dictionary_encode().indices
        numbers = np.asarray(pc.fill_null(pc.cast(label, pa.float64()), np.nan))
        outcome, counted, known = dependence.judged(task_name, task.kind, numbers, row)
        if outcome is None:
            continue
        for name, text in texts.items():
            feature = experiment.features[name]
            best = dependence.best_score(feature, text.filter(pa.array(known)), counted, outcome)
            if best >= LEAK and f"{name}/{task_name}" not in experiment.guard.allow:
                measure = {"binary": "AUC", "regression": "R²"}.get(task.kind, "accuracy")
                problems.append(
                    f"feature '{name}' (column '{feature.column or name}') gives away the label of "
                    f"task '{task_name}' (column '{task.column or task_name}'): alone it reaches "
                    f"{measure} {best:.4f} on {int(outcome.n.sum()):,} training rows. Remove "
                    f"features.{name}, or show it of past events only (on = 'history'); if it is "
                    f"truly known beforehand: guard.allow = ['{name}/{task_name}']"
                )
    return problems


# --- Histories that know the future


def next_event_known(log: Log, experiment: Experiment) -> None:
    """Stop if what an event shows in a history determines the user's next item or label.

    Looks at pairs of consecutive training events: at the value of the first, and at its change
    from the event before (a running total that is one event ahead). A value is let off that says
    no more than the item and the labels of its own event do.

    Args:
      log: all events in order; `events` beside "item" are the history features.
      experiment: `guard.allow` lets "feature/task" through ("feature/item" without such a task).

    Raises:
      DataError: a history feature with an AUC, accuracy or R² of .999 or more.
    """
    train = np.flatnonzero(log.split[:_EVENTS] == 0)
    user = log.user[train]
    pairs = np.flatnonzero(user[1:] == user[:-1])
    here, then = train[pairs], train[pairs + 1]
    first = np.diff(user, prepend=-1)[pairs] != 0
    before = train[np.where(first, pairs, pairs - 1)]
    retrieval = [name for name, task in experiment.tasks.items() if task.kind == "retrieval"]
    shown = {n: f for n, f in experiment.features.items() if f.on == "history"}
    owner = {c: c if c in shown else c.rpartition(".")[0] for c in log.events}  # "tags.0" of "tags"
    fields = {(c, owner[c]): ids for c, ids in log.events.items() if owner[c] in shown}
    named = {(retrieval or ["item"])[0]: ("multiclass", np.asarray(log.events["item"]))}
    for name, task in experiment.tasks.items():
        if task.kind != "retrieval":
            named[name] = (task.kind, np.asarray(log.targets[f"label_{name}"]))
    own = [array[here] for _, array in named.values()]
    for task_name, (kind, array) in named.items() if len(here) and fields else ():
        label = array[then].astype(np.float64)
        outcome, cells, known = dependence.judged(task_name, kind, label, log.row[here])
        if outcome is None:
            continue
        for (_, name), ids in fields.items():
            if f"{name}/{task_name}" in experiment.guard.allow:
                continue
            value = ids[here].astype(np.float64)
            step = value - np.where(first, 0, ids[before])
            looks = (value, step) if shown[name].kind in WRITTEN else (value,)
            found = max(_pair_score(look[known], cells, outcome) for look in looks)
            if found >= LEAK > max(_pair_score(v[known], cells, outcome) for v in own):
                raise DataError(
                    f"feature '{name}' (column '{shown[name].column or name}') shows "
                    f"the future: at an event it gives away the {task_name} of the user's next "
                    f"event ({found:.4f} of {int(outcome.n.sum()):,} pairs of training events; "
                    f"AUC, accuracy or R²). Remove features.{name}, or make its column as it was "
                    f"known at the event; if it is meant: guard.allow = ['{name}/{task_name}']"
                )


def _pair_score(value: np.ndarray, cells: Cells, outcome: Outcome) -> float:
    codes = np.unique(value, return_inverse=True)[1]
    return dependence.score(cells._replace(value=codes), outcome)


def log_out_of_order(log: Log, names: Any) -> None:
    """Stop if an event of the log does not come after the one before, by user, time and row.

    Then an event's place says whether it is before another, which `future_in_history` relies on.

    Args:
      log: all events.
      names: [U] raw ids of the users, for the message.

    Raises:
      DataError: naming the user and the source rows of the two events.
    """
    for start in range(1, len(log.user), _SLICE):
        here, before = slice(start, start + _SLICE), slice(start - 1, start - 1 + _SLICE)
        user, time, row = (array[here] for array in (log.user, log.time, log.row))
        before_user, before_time, before_row = (
            array[before][: len(user)] for array in (log.user, log.time, log.row)
        )
        after = (time > before_time) | ((time == before_time) & (row > before_row))
        after = (user > before_user) | ((user == before_user) & after)
        if not after.all():
            first = start + int(np.argmin(after))
            raise _future(log, names, first - 1, first)


def future_in_history(
    log: Log,
    hide_ties: bool,
    names: Any,
    event: np.ndarray,
    cutoff: np.ndarray,
    target: np.ndarray,
) -> None:
    """Stop if a position of some examples sees an event that is not before its target.

    Args:
      log: all events, in the order that `log_out_of_order` checks.
      hide_ties: events of the target's own time are not before it.
      names: [U] raw ids of the users, for the message.
      event: [n, L] places in the log of the events that an example holds, then -1 for none.
      cutoff: [n, P] a position sees the first so many of them.
      target: [n, P] places in the log of the targets, -1 for padding.

    Raises:
      DataError: naming the user and the source rows of the event and the target.
    """
    final, begin = target.max(axis=1), event[:, 0]
    # ascending events from one of the user's up to one before the target are the user's past
    wrong = (event[:, 1:] >= 0) & ((event[:, 1:] <= event[:, :-1]) | (event[:, :-1] < 0))
    wrong = np.pad(wrong, ((0, 0), (1, 0)))
    wrong[:, 0] |= (begin >= 0) & (log.user[begin] != log.user[final])
    if wrong.any():
        n, place = np.argwhere(wrong)[0]
        raise _future(log, names, event[n, place], final[n])
    last = np.take_along_axis(event, np.maximum(cutoff - 1, 0), 1)
    seen = (cutoff > 0) & (target >= 0) & (last >= 0)
    later = last >= target
    if hide_ties:
        later |= log.time[last] >= log.time[target]
    later &= seen
    if later.any():
        n, p = np.argwhere(later)[0]
        raise _future(log, names, last[n, p], target[n, p])


def _future(log: Log, names: Any, event: int | np.integer, target: int | np.integer) -> DataError:
    return DataError(
        f"the history of user {names[log.user[target] - FIRST]} shows source row "
        f"{log.row[event]} (time {log.time[event]:.15g}), which is not before its target, row "
        f"{log.row[target]} (time {log.time[target]:.15g}). Please report it: the examples were "
        "put together wrongly"
    )


# --- Statistics over all splits


def statistics_of_everything(
    sides: dict[str, pa.Table], events: Any, experiment: Experiment
) -> None:
    """Stop if a column of the items or users is a statistic that saw validation or test events.

    Counts, sums and means of labels by key, over all events and over training events, are compared
    with the column where the two differ, so that a statistic of the training events passes.

    Args:
      sides: {"user" or "item": Arrow table with that key and column_* as text}.
      events: Ibis table with split, label_* and the keys.
      experiment: `guard.allow` lets "feature/task" through ("feature/events" for counts).

    Raises:
      DataError: a column equals such a statistic for 90 % of the keys, 20 at least (a statistic of
        the raw log may have counted events that cleaning has removed).
    """
    for key, table in sides.items():
        columns: dict[str, pa.Array] = {}
        for name, feature in experiment.features.items():
            column = f"column_{feature.column or name}"
            if (
                feature.on == ("item" if key == "item" else "context")
                and column in table.schema.names
            ):
                columns[name] = dependence.joined(one_array(table[column]))
        numbers = {name: as_numbers(text) for name, text in columns.items()}
        numbers = {n: x for n, x in numbers.items() if (~np.isnan(x)).sum() >= _KEYS}
        if not numbers or key not in events.columns:
            continue
        counted = _counts(events, key, experiment)
        place = pc.index_in(one_array(table[key]), value_set=one_array(counted[key]))
        counted = counted.take(place).combine_chunks()
        for name, x in numbers.items():
            digits = pc.replace_substring_regex(columns[name], r"^[^.]*\.?|[eE].*$", "")
            margin = 0.5 * 10.0 ** -float(pc.max(pc.utf8_length(digits)).as_py() or 0)
            _check_statistic(experiment, key, name, x, margin, counted)


def _counts(events: Any, key: str, experiment: Experiment) -> pa.Table:
    """By key: judged events, and the statistics <what>|<over which splits>, one column each."""
    over = {
        "training": events.split.isin((0, 3)),
        "training and validation": events.split != 2,
        "all": events.split >= 0,
    }
    columns = {"judged": events.split.isin((1, 2)).sum()}
    for which, inside in over.items():
        n = inside.sum().cast("float64")
        columns[f"number of events//events|{which}"] = n
        for name, task in experiment.tasks.items():
            if task.kind in ("binary", "regression"):
                label = events[f"label_{name}"]
                total = ibis.ifelse(inside, label.fill_null(0.0), 0.0).sum()
                labelled = (inside & label.notnull()).sum().cast("float64")
                columns[f"sum of the label//{name}|{which}"] = total
                columns[f"mean of the label//{name}|{which}"] = total / labelled.nullif(0.0)
                columns[f"sum of the label by events//{name}|{which}"] = total / n.nullif(0.0)
    return events.group_by(key).agg(**columns).to_pyarrow()


def _check_statistic(
    experiment: Experiment, key: str, name: str, x: np.ndarray, margin: float, counted: pa.Table
) -> None:
    def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a - b) <= np.maximum(margin * 1.000001, 1e-6 * np.abs(b))

    judged = np.asarray(pc.fill_null(counted["judged"], 0)) > 0
    for column in counted.schema.names:
        what, _, which = column.partition("|")
        if which in ("", "training"):
            continue
        what, _, task = what.partition("//")
        honest = np.asarray(pc.fill_null(counted[f"{what}//{task}|training"], np.nan), float)
        whole = np.asarray(pc.fill_null(counted[column], np.nan), float)
        telling = judged & ~np.isnan(x) & ~np.isnan(whole) & ~same(honest, whole)
        hits = int((telling & same(x, whole)).sum())
        if telling.sum() < _KEYS or hits < _EQUAL * telling.sum():
            continue
        if f"{name}/{task}" not in experiment.guard.allow:
            of = "" if task == "events" else f" of task '{task}'"
            raise DataError(
                f"feature '{name}' (column '{experiment.features[name].column or name}' of the "
                f"{key}s) is the {what}{of} over {which} events: equal for {hits:,} of "
                f"{telling.sum():,} {key}s where training events alone give another figure. It has "
                "seen what it is judged by. Compute it from training events, or declare "
                f"kind = 'past_count' or 'past_rate'; if it is meant: guard.allow = "
                f"['{name}/{task}']"
            )
