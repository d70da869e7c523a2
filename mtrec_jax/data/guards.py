"""Leaks that stop the preparation: answers among the features, and the future in the past.

A guard measures, it does not guess from names. It raises `DataError` with every feature that it
refuses, the task, the figure and the remedy; `guard.allow` lets a "feature" or a "feature/task"
through that is meant to be so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Experiment, Feature
from mtrec_jax.data.examples import Log, mix
from mtrec_jax.data.features import MultiValued, Text, as_numbers, one_array
from mtrec_jax.errors import DataError
from mtrec_jax.losses.tasks import KINDS, labelled

LEAK = 0.999  # AUC, accuracy or R² on rows that the rates were not taken from
_EVENTS = 500_000  # training events that are looked at
_AT_ONCE = 16  # features to a query
_KEYS, _TELLING, _EQUAL = 20, 10, 0.9  # so many keys, and this part of them, prove a statistic
ROWS, OF_A_CLASS = 100, 10  # fewer labelled rows are not judged
BETWEEN = "\x1f"  # the values of a list
_BINS = 1000  # of numbers


def leaks(*checks: Callable[[], None]) -> list[str]:
    """What all of these checks refuse: the messages of their `DataError`s."""
    problems = []
    for check in checks:
        try:
            check()
        except DataError as error:
            problems.append(str(error))
    return problems


# --- Answers among the features


def determined_labels(events: Any, sides: dict[str, pa.Table], experiment: Experiment) -> None:
    """Stop if a feature of the target itself determines a label (history features show the past).

    The rows of a value in one half of the training rows are judged by its mean label in the other
    half, so that ids and timestamps, which never come again, determine nothing.

    Args:
      events: Ibis table with row, split (0: training), label_*, feature_* (text), user and item.
      sides: {"user" or "item": Arrow table with that key and column_* as text}.
      experiment: its features and tasks; `guard.allow` lets "feature/task" pairs through.

    Raises:
      DataError: each single feature with an AUC, accuracy or R² of .999 or more.
    """
    tasks = [name for name, task in experiment.tasks.items() if task.kind != "retrieval"]
    seen = {
        name: feature
        for name, feature in experiment.features.items()
        if feature.on != "history" and not feature.computed
    }
    train = events.filter(events.split == 0)
    more = int(train.count().to_pyarrow().as_py()) / _EVENTS
    if (
        more > 1
    ):  # every so many rows: a prime, which pages of so many impressions are no multiple of
        found = itertools.count(math.ceil(more))
        train = train.filter(train.row % next(n for n in found if _is_prime(n)) == 0)
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


def _is_allowed(experiment: Experiment, feature: str, task: str) -> bool:
    return not {feature, f"{feature}/{task}"}.isdisjoint(experiment.guard.allow)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _beside_labels(events: Any, features: dict[str, Feature]) -> list[str]:
    wanted = ("user", "item", *(f"feature_{name}" for name in features))
    return [name for name in wanted if name in events.columns]


def _determined(
    part: pa.Table, cells: dict[str, Any], tasks: list[str], experiment: Experiment
) -> list[str]:
    """A message for each feature {name: cells} of the rows that determines one of their labels."""
    problems, row = [], part["row"].to_numpy()
    texts = {name: joined(one_array(column)) for name, column in cells.items()}
    for task_name in tasks:
        task, label = experiment.tasks[task_name], one_array(part[f"label_{task_name}"])
        if task.kind in labelled("classes"):
            label = label.dictionary_encode().indices
        numbers = np.asarray(pc.fill_null(pc.cast(label, pa.float64()), np.nan))
        kind = KINDS[task.kind].judged
        outcome, counted, known = judged(task_name, kind, numbers, row)
        if outcome is None:
            continue
        for name, text in texts.items():
            feature = experiment.features[name]
            best = best_score(feature, text.filter(pa.array(known)), counted, outcome)
            if best >= LEAK and not _is_allowed(experiment, name, task_name):
                measure = {"binary": "AUC", "regression": "R²"}.get(kind, "accuracy")
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
      DataError: each history feature with an AUC, accuracy or R² of .999 or more.
    """
    train = np.flatnonzero(log.split[:_EVENTS] == 0)
    user = log.user[train]
    pairs = np.flatnonzero(user[1:] == user[:-1])
    here, then = train[pairs], train[pairs + 1]
    first = np.diff(user, prepend=-1)[pairs] != 0
    before = train[np.where(first, pairs, pairs - 1)]
    retrieval = [name for name, task in experiment.tasks.items() if task.kind == "retrieval"]
    shown = {n: f for n, f in experiment.features.items() if f.on == "history"}
    fields = [
        (name, slot)
        for name, ids in log.events.items()
        if name in shown
        for slot in np.atleast_2d(ids.T)
    ]
    named = {(retrieval or ["item"])[0]: ("multiclass", np.asarray(log.events["item"]))}
    for name, task in experiment.tasks.items():
        if task.kind != "retrieval":
            named[name] = (KINDS[task.kind].judged, np.asarray(log.targets[f"label_{name}"]))
    own = [array[here] for _, array in named.values()]
    problems: dict[str, str] = {}  # {"feature/task": message}; a feature may have several slots
    for task_name, (kind, array) in named.items() if len(here) and fields else ():
        label = array[then].astype(np.float64)
        outcome, cells, known = judged(task_name, kind, label, log.row[here])
        if outcome is None:
            continue
        for name, ids in fields:
            if _is_allowed(experiment, name, task_name):
                continue
            value = ids[here].astype(np.float64)
            step = value - np.where(first, 0, ids[before])
            looks = (value, step) if shown[name].reads_numbers else (value,)
            found = max(_pair_score(look[known], cells, outcome) for look in looks)
            if found >= LEAK > max(_pair_score(v[known], cells, outcome) for v in own):
                problems[f"{name}/{task_name}"] = (
                    f"feature '{name}' (column '{shown[name].column or name}') shows "
                    f"the future: at an event it gives away the {task_name} of the user's next "
                    f"event ({found:.4f} of {int(outcome.n.sum()):,} pairs of training events; "
                    f"AUC, accuracy or R²). Remove features.{name}, or make its column as it was "
                    f"known at the event; if it is meant: guard.allow = ['{name}/{task_name}']"
                )
    if problems:
        raise DataError("\n".join(problems.values()))


def _pair_score(value: np.ndarray, cells: Cells, outcome: Outcome) -> float:
    return score(cells._replace(value=np.unique(value, return_inverse=True)[1]), outcome)


# --- Statistics over all splits


class _Match(NamedTuple):
    """How a column resembles a statistic that has seen judged events."""

    what: str  # the statistic, in words
    which: str  # the splits that it is over, in words
    equal: int  # keys at which it is equal where training events alone give another figure
    telling: int  # all such keys


def statistics_of_everything(
    sides: dict[str, pa.Table], events: Any, experiment: Experiment
) -> None:
    """Stop if a column of the items or users is a statistic that saw validation or test events.

    Counts, sums and means of labels by key, over all events and over training events, are compared
    with the column, as closely as its decimals tell. It is the statistic over all events if it is
    equal to it for 90 % of the keys, and for 90 % of those where the best constant of that many
    decimals is not (or rare labels and new users would make every flag a statistic); and if the
    same holds of the keys where the two statistics differ, 10 at least.

    A column that has nothing to do with the labels, or whose labels are shuffled over the keys, is
    nowhere equal more often than the best constant: what that misses, it misses too. The tenth is
    for a statistic of the raw log, which may have counted events that cleaning has removed.

    Args:
      sides: {"user" or "item": Arrow table with that key and column_* as text}.
      events: Ibis table with split, label_* and the keys.
      experiment: `guard.allow` lets "feature", or "feature/task" through ("feature/events" for
        counts).

    Raises:
      DataError: all such columns, a line for each task whose statistic one is.
    """
    problems: list[str] = []
    for key, table in sides.items():
        columns: dict[str, pa.Array] = {}
        for name, feature in experiment.features.items():
            column = f"column_{feature.column or name}"
            if (
                feature.on == ("item" if key == "item" else "context")
                and column in table.schema.names
            ):
                columns[name] = joined(one_array(table[column]))
        numbers = {name: as_numbers(text) for name, text in columns.items()}
        numbers = {n: x for n, x in numbers.items() if (~np.isnan(x)).sum() >= _KEYS}
        if not numbers or key not in events.columns:
            continue
        counted = _counts(events, key, experiment)
        place = pc.index_in(one_array(table[key]), value_set=one_array(counted[key]))
        counted = counted.take(place).combine_chunks()
        figures = {
            column: np.asarray(pc.fill_null(counted[column], np.nan), float)
            for column in counted.schema.names
            if column != key
        }
        for name, x in numbers.items():
            found = _matches(x, _decimals(columns[name]), figures)
            problems += [
                _statistic_problem(experiment.features[name], name, key, task, match)
                for task, match in found.items()
                if not _is_allowed(experiment, name, task)
            ]
    if problems:
        raise DataError("\n".join(problems))


def _counts(events: Any, key: str, experiment: Experiment) -> pa.Table:
    """By key the statistics <what>//<task>|<over which splits>, one column each."""
    over = {
        "training": events.split.isin((0, 3)),
        "training and validation": events.split != 2,
        "all": events.split >= 0,
    }
    columns = {}
    for which, inside in over.items():
        n = inside.sum().cast("float64")
        columns[f"number of events//events|{which}"] = n
        for name, task in experiment.tasks.items():
            if task.kind in labelled("numbers", "levels"):
                label = events[f"label_{name}"]
                total = ibis.ifelse(inside, label.fill_null(0.0), 0.0).sum()
                known = (inside & label.notnull()).sum().cast("float64")
                columns[f"sum of the label//{name}|{which}"] = total
                columns[f"mean of the label//{name}|{which}"] = total / known.nullif(0.0)
                columns[f"sum of the label by events//{name}|{which}"] = total / n.nullif(0.0)
    return events.group_by(key).agg(**columns).to_pyarrow()


def _decimals(text: pa.Array) -> int:
    """The most decimals that numbers are written with: 3 of 0.125, and 6 of 2.5e-5."""
    digits = pc.utf8_length(pc.replace_substring_regex(text, r"^[^.eE]*\.?|[eE].*$", ""))
    power = pc.replace_substring_regex(text, r"^[^eE]*[eE]?\+?", "")
    power = pc.if_else(pc.match_substring_regex(power, r"^-?\d{1,3}$"), power, "0")
    places = pc.max(pc.subtract(digits, pc.cast(power, pa.int32()))).as_py()
    return min(places or 0, 15)  # more than a float64 holds


def _matches(x: np.ndarray, decimals: int, figures: dict[str, np.ndarray]) -> dict[str, _Match]:
    """{task or "events": the statistic over judged events that a column is, the clearest one}."""
    found: dict[str, _Match] = {}
    for column, whole in figures.items():
        whose, _, which = column.partition("|")
        what, _, task = whose.partition("//")
        if which == "training":
            continue
        match = _match(x, decimals, whole, figures[f"{whose}|training"])
        if match and (task not in found or match[0] > found[task].equal):
            found[task] = _Match(what, which, *match)
    return found


def _match(
    x: np.ndarray, decimals: int, whole: np.ndarray, honest: np.ndarray
) -> tuple[int, int] | None:
    """Keys where `x` is the statistic `whole` and not the `honest` one, of all that tell the two
    apart; None where it is not `whole`."""
    known = ~np.isnan(x) & ~np.isnan(whole)
    x, whole, honest = x[known], whole[known], honest[known]
    if not len(x):
        return None
    margin = 0.5 * 10.0**-decimals
    if 2 * margin >= np.ptp(whole):  # rounded so coarsely all would be one or two: to the digit
        margin, decimals = 0.0, 15

    def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(a - b) <= np.maximum(margin * 1.000001, 1e-6 * np.abs(b))

    values, sizes = np.unique(np.round(whole, decimals), return_counts=True)
    beyond = ~same(np.full(len(whole), values[sizes.argmax()]), whole)
    equal, old = same(x, whole), same(x, honest)
    telling = beyond & ((equal != old) | ~(equal | same(honest, whole)))
    found, all_told = int((telling & equal).sum()), int(telling.sum())
    if (
        found < max(_TELLING, _EQUAL * all_told)
        or equal.mean() < _EQUAL
        or equal[beyond].mean() < _EQUAL
    ):
        return None
    return found, all_told


def _statistic_problem(feature: Feature, name: str, key: str, task: str, match: _Match) -> str:
    of = "" if task == "events" else f" of task '{task}'"
    return (
        f"feature '{name}' (column '{feature.column or name}' of the {key}s) is the {match.what}"
        f"{of} over {match.which} events: equal for {match.equal:,} of {match.telling:,} {key}s "
        "where training events alone give another figure. It has seen what it is judged by. "
        "Compute it from training events, or declare kind = 'past_count' or 'past_rate'; if it is "
        f"meant: guard.allow = ['{name}/{task}']"
    )


# --- Equal rows


def row_in_two_splits(
    equal: Any,
    events: Any,
    experiment: Experiment,
    sizes: dict[str, int],
    dropped: int,
    first_rows: int,
    place: Callable[[int], str] = "row {}".format,
) -> None:
    """Stop if equal raw rows are in different splits: judged by what was learned by heart.

    With user, item and time a row equal to another is the same event, and one is too many. Other
    rows may be equal by chance: then judged rows with a twin in training are compared with the
    training rows that have one themselves.

    Args:
      equal: Ibis table of `row` and the `first` one that it is equal to in every raw column; None
        where duplicates were dropped within the one source.
      events: Ibis table with row and split; of each there are `sizes`.
      experiment: what the columns mean.
      sizes: events of each split.
      dropped: how many of the `first_rows` rows of the first source are not among the events: as
        duplicates they are twins of what is left, and count as training rows.
      place: says where a source row is.

    Raises:
      DataError: with the number of rows and the first pair.
    """
    if equal is None:
        return
    data = experiment.data
    keyed = bool(data.user and data.item and data.time)
    groups = _equal_groups(equal, events, first_rows, keyed)
    twins = ibis.ifelse(groups.train > 1, groups.train, 0).sum()
    both = ibis.ifelse(groups.shared, groups.held, 0).sum()
    found = groups.agg(twins=twins, both=both).to_pyarrow()
    twin, both = (found[name][0].as_py() or 0 for name in ("twins", "both"))
    train = sizes["train"] + sizes.get("shown", 0) + dropped
    held = sizes["validation"] + sizes["test"]
    if both / max(held, 1) <= (0.0 if keyed else 5 * twin / max(train, 1) + 0.01):
        return
    first = groups.filter(groups.shared).order_by("first").limit(1).to_pyarrow().to_pylist()[0]
    pair = f"{place(first['first'])} and {place(first['twin'])}"
    if not keyed:
        pair += f" (training rows among themselves: {twin:,})"
    files = experiment.split.kind == "files"
    remedy = (
        "take these rows out of the training files" if files else "set clean.duplicates = 'drop'"
    )
    raise DataError(
        f"{both:,} of {held:,} validation and test rows are equal in every column to a row of "
        f"another split, e.g. {pair}: they would be judged by what was learned by heart. To judge "
        f"on new rows, {remedy}"
    )


def _equal_groups(equal: Any, events: Any, first_rows: int, keyed: bool) -> Any:
    """By group of equal rows: how many train and are held back, whether it is shared by splits, and
    the first pair of its rows."""
    rows = equal.left_join(events.select("row", "split"), "row").drop("row_right")
    trains = rows.split.isin((0, 3)).fill_null(rows.row < first_rows)
    validates, tests = ((rows.split == n).fill_null(False) for n in (1, 2))
    null = ibis.null("int64")
    groups = rows.group_by(group=rows["first"]).agg(
        train=trains.sum(),
        validation=validates.sum(),
        test=tests.sum(),
        first=ibis.ifelse(trains | validates, rows.row, null).min(),
        twin=ibis.ifelse(validates | tests, rows.row, null).max(),
    )
    held = groups.validation + groups.test
    shared = (groups.train > 0) & (held > 0)
    if keyed:
        shared |= (groups.validation > 0) & (groups.test > 0)
    return groups.mutate(held=held, shared=shared)


# --- How far one value says what a label is: fitted on one half of the rows, judged on the other.
# Values are compared by their mean label (or commonest class) in the other half, so that ids and
# timestamps, which do not come again, say nothing however many there are.


class Outcome(NamedTuple):
    """A task's training labels; index h of an array is the half 0 or 1 of the rows."""

    name: str
    kind: str  # binary, regression or multiclass
    n: np.ndarray  # [2] labelled rows
    s: np.ndarray  # [2] sums of the labels less `center`
    center: float
    spread: float  # regression: sum of squares around the mean


class Cells(NamedTuple):
    """Labelled training rows, counted by the value of a feature (and by the class)."""

    value: np.ndarray  # [k] codes from 0 on
    n: np.ndarray  # [2, k] rows of the two halves
    s: np.ndarray  # [2, k] sums of their labels less `center`
    label: np.ndarray  # [k] class codes (multiclass)


def _auc(score: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the ROC curve of groups of rows with one score each; ties count half."""
    _, group = np.unique(score, return_inverse=True)
    p, q = np.bincount(group, positive), np.bincount(group, negative)
    pairs = p.sum() * q.sum()
    return float((p * (np.cumsum(q) - q / 2)).sum() / pairs) if pairs else 0.5


def score(cells: Cells, outcome: Outcome) -> float:
    """AUC, R² or accuracy of the other half's mean label, or commonest class, by value."""
    if outcome.kind == "multiclass":
        return _accuracy(cells)
    size = int(cells.value.max(initial=-1)) + 1
    n, s = ([np.bincount(cells.value, x, size) for x in pair] for pair in (cells.n, cells.s))
    areas, saved = [], 0.0
    for own, other in ((0, 1), (1, 0)):
        mean = outcome.s[other] / max(outcome.n[other], 1)  # of values that only one half has
        guess = np.where(n[other] > 0, s[other] / np.maximum(n[other], 1), mean)
        saved += float((guess * (2 * s[own] - n[own] * guess)).sum())
        rest = outcome.s[own] - s[own].sum()
        positive = np.append(s[own], rest)
        negative = np.append(n[own] - s[own], outcome.n[own] - n[own].sum() - rest)
        areas.append(_auc(np.append(guess, mean), positive, negative))
    return float(np.mean(areas)) if outcome.kind == "binary" else saved / outcome.spread


def _accuracy(cells: Cells) -> float:
    """Of the commonest class by value; 0 where always the same class would do nearly as well.

    Values that one half alone has count as wrong, but for the commonest class. They are left out
    where they are fewer than the others, since many classes over many values leave some unseen.
    """
    classes = int(cells.label.max(initial=0)) + 1
    pair, place = np.unique(cells.value * classes + cells.label, return_inverse=True)
    n = np.stack([np.bincount(place, x, len(pair)) for x in cells.n])
    value, label = np.divmod(pair, classes)
    right, sizes = 0.0, np.zeros((2, classes))  # [unseen, seen]
    for own, other in ((0, 1), (1, 0)):
        order = np.lexsort((label, -n[other], value))
        best = order[np.diff(value[order], prepend=-1) != 0]
        best = best[n[other][best] > 0]
        seen = np.isin(value, value[best])
        right += n[own][best].sum()
        for row, mask in enumerate((~seen, seen)):
            sizes[row] += np.bincount(label[mask], n[own][mask], classes)
    lucky = sizes[0, sizes.sum(0).argmax()]
    scores = [_beyond_trivial(right + lucky, sizes.sum(0))]
    if sizes[1].sum() >= max(ROWS, sizes[0].sum()):
        scores.append(_beyond_trivial(right, sizes[1]))
    return max(scores)


def _beyond_trivial(right: float, sizes: np.ndarray) -> float:
    rows, others = sizes.sum(), sizes.sum() - sizes.max()
    enough = others >= OF_A_CLASS and rows - right <= 0.01 * others
    return float(right / rows) if enough else 0.0


def number_score(cells: Cells, number: np.ndarray, outcome: Outcome) -> float:
    """The same for a number (NaN: none): by quantile bins, by its rank, or as a straight line."""
    known = ~np.isnan(number)
    weight, total = cells.n.sum(0), cells.s.sum(0)
    x, place = np.unique(number[known], return_inverse=True)
    n = np.bincount(place, weight[known], len(x))
    if n.sum() < ROWS:
        return 0.0
    bins = int(np.clip(n.sum() // 20, 2, _BINS))
    code = np.full(len(number), bins)
    code[known] = ((np.cumsum(n) - n / 2) * bins / n.sum()).astype(np.int64)[place]
    scores = [score(cells._replace(value=code), outcome)]
    s = np.bincount(place, total[known], len(x))
    if outcome.kind == "binary" and min(s.sum(), (n - s).sum()) >= OF_A_CLASS:
        area = _auc(x, s, n - s)
        scores.append(max(area, 1 - area))
    if outcome.kind == "regression":
        x = (x - (n * x).sum() / n.sum()) / max(np.abs(x).max(), 1e-300)
        variance = (n * x * x).sum()
        scores.append(float((x * s).sum() ** 2 / variance / outcome.spread) if variance else 0.0)
    return max(scores)


def word_score(cells: Cells, text: pa.Array, separator: str, outcome: Outcome) -> float:
    """Best AUC of the presence of one word (binary tasks)."""
    words = pc.split_pattern(pc.fill_null(text, ""), separator)
    codes = np.asarray(words.flatten().dictionary_encode().indices)
    cell = np.asarray(pc.list_parent_indices(words))
    positive = np.bincount(codes, cells.s.sum(0)[cell])
    negative = np.bincount(codes, cells.n.sum(0)[cell]) - positive
    p = outcome.s.sum()
    q = outcome.n.sum() - p
    return float(0.5 + np.abs(positive / p - negative / q).max(initial=0) / 2)


def judged(
    name: str, kind: str, label: np.ndarray, row: np.ndarray
) -> tuple[Outcome | None, Cells, np.ndarray]:
    """Outcome and cells of rows with these labels, and which rows those are, the others unlabelled.

    Args:
      name: of the task.
      kind: of the task.
      label: [n] numbers, NaN for none (multiclass: any number for a class).
      row: [n] source rows, which decide the halves.

    Returns:
      The outcome (None where the labels are too few, or all the same), cells [k] that wait for
      their values, and the mask [n] of the k rows.
    """
    known = ~np.isnan(label)
    label, half = label[known], half_of(row[known])
    n = np.stack([half == 0, half == 1]).astype(float)
    center = float(label.mean()) if kind == "regression" and len(label) else 0.0
    spread = float(np.square(label - label.mean()).sum()) if len(label) else 0.0
    classes, code = np.unique(label, return_inverse=True)
    cells = Cells(np.zeros(len(label), np.int64), n, n * (label - center), code)
    fewest = OF_A_CLASS if kind == "regression" else min(np.bincount(code), default=0)
    if kind == "multiclass":
        fewest = OF_A_CLASS * (len(classes) > 1)
    if len(label) < ROWS or fewest < OF_A_CLASS or not spread:
        return None, cells, known
    return Outcome(name, kind, n.sum(1), cells.s.sum(1), center, spread), cells, known


def best_score(feature: Feature, text: pa.Array, cells: Cells, outcome: Outcome) -> float:
    """The highest score of a feature's cells [k]: as values, as numbers, as words, by its kind."""
    cells = cells._replace(value=codes(text))
    best = score(cells, outcome)
    if feature.reads_numbers:
        best = max(best, number_score(cells, as_numbers(text), outcome))
    if isinstance(feature, MultiValued) and outcome.kind == "binary":
        text = pc.replace_substring(text, BETWEEN, feature.separator)
        best = max(best, word_score(cells, text, feature.separator, outcome))
    return best


def half_of(row: np.ndarray) -> np.ndarray:
    """The half, 0 or 1, that each source row is in."""
    return mix(row, 0) % 2


def codes(values: pa.Array) -> np.ndarray:
    """A number for each distinct value, nothing included."""
    coded = values.dictionary_encode(null_encoding="encode")
    return np.asarray(coded.indices).astype(np.int64)


def joined(cells: pa.Array) -> pa.Array:
    """Arrow cells of text, or of lists of text, as text."""
    return pc.binary_join(cells, BETWEEN) if pa.types.is_list(cells.type) else cells


# --- Weights that events have trained


def tuned_on_held_back(experiment: Experiment, files: tuple[str, ...], split: str) -> None:
    """Stop if the encoder of a text was fine-tuned on the training events of another split of the
    same files: some of them are held back here.

    Args:
      experiment: its features; `guard.allow` lets a "feature" through.
      files: SHA-256 of the files of events.
      split: the fingerprint of the split.

    Raises:
      DataError: of each such feature.
    """
    problems = []
    for name, feature in experiment.features.items():
        if not (isinstance(feature, Text) and feature.encoder) or name in experiment.guard.allow:
            continue
        from mtrec_jax.models.text.bert import tuned_on  # JAX, where it is asked for

        there = tuned_on(feature.weights)
        if there and tuple(there["event_files"]) == files and there["split"] != split:
            problems.append(
                f"features.{name}.encoder: {feature.weights} was fine-tuned on the training events "
                f"of another split of these files ({there['split_kind']}), of which some are held "
                "back here. Tune anew: prepare without this encoder, then mtrec fine-tune; or, if "
                f"it is meant: guard.allow = ['{name}']"
            )
    if problems:
        raise DataError("\n".join(problems))
