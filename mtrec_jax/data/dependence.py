"""How far one value says what a label is: fitted on one half of the rows, judged on the other.

Values are compared by their mean label (or commonest class) in the other half, so that ids and
timestamps, which do not come again, say nothing however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Experiment, Feature
from mtrec_jax.data.features import NUMBER, one_array

ROWS, OF_A_CLASS = 100, 10  # fewer labelled rows are not judged
NUMBERS = ("numeric", "binned", "piecewise")  # kinds of features
BETWEEN = "\x1f"  # the values of a list
_MOST = 500_000  # values of a feature that are looked at, the most frequent ones
_AT_ONCE = 8  # counts to a query of the engine
_BINS = 1000  # of numbers


class Outcome(NamedTuple):
    """A task's training labels; index h of an array is the half 0 or 1 of the rows."""

    name: str
    kind: Literal["binary", "regression", "multiclass"]
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
        return _accuracy(cells, outcome)
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


def _accuracy(cells: Cells, outcome: Outcome) -> float:
    """Of the commonest class by value; 0 where always the same class would do nearly as well."""
    classes = int(cells.label.max(initial=0)) + 1
    pair, place = np.unique(cells.value * classes + cells.label, return_inverse=True)
    n = np.stack([np.bincount(place, x, len(pair)) for x in cells.n])
    value, label = np.divmod(pair, classes)
    sizes = np.bincount(label, n.sum(0), classes)
    right = 0.0
    for own, other in ((0, 1), (1, 0)):
        order = np.lexsort((label, -n[other], value))
        best = order[np.diff(value[order], prepend=-1) != 0]
        known = n[other][best] > 0
        right += n[own][best[known]].sum()
        unseen = np.isin(value, value[best[~known]]) & (label == sizes.argmax())
        right += n[own][unseen].sum()
    accuracy, trivial = right / outcome.n.sum(), sizes.max() / outcome.n.sum()
    enough = (sizes >= OF_A_CLASS).sum() >= 2
    return float(accuracy) if enough and 1 - accuracy <= 0.01 * (1 - trivial) else 0.0


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


def outcomes(train: Any, experiment: Experiment) -> list[Outcome]:
    """The tasks with enough training labels to judge by."""
    tasks = {n: t.kind for n, t in experiment.tasks.items() if t.kind != "retrieval"}
    columns: dict[str, Any] = {}
    half = half_of(train.row)
    for i, (name, kind) in enumerate(tasks.items()):
        label = train[f"label_{name}"]
        for h in (0, 1):
            columns[f"n{h}_{i}"] = (label.notnull() & (half == h)).sum()
            if kind != "multiclass":
                columns[f"s{h}_{i}"] = ibis.ifelse(half == h, label, 0.0).sum()
        if kind != "multiclass":
            columns[f"variance_{i}"] = label.var(how="pop")
    if not columns:
        return []
    (found,) = train.agg(**columns).to_pyarrow().to_pylist()
    judged = []
    for i, (name, kind) in enumerate(tasks.items()):
        n, s = (np.array([found.get(f"{x}{h}_{i}") or 0.0 for h in (0, 1)]) for x in ("n", "s"))
        if n.sum() < ROWS:
            continue
        center = float(s.sum() / n.sum()) if kind == "regression" else 0.0
        spread = float(found.get(f"variance_{i}") or 0.0) * float(n.sum())
        fewest = min(s.sum(), n.sum() - s.sum()) if kind == "binary" else OF_A_CLASS
        if fewest >= OF_A_CLASS and (spread or kind == "multiclass"):
            judged.append(Outcome(name, kind, n, s - center * n, center, spread))
    return judged


def by_value(
    train: Any, values: dict[str, Any], outcomes: list[Outcome]
) -> Iterator[tuple[str, Cells, pa.Array, Outcome]]:
    """(name, cells, their text, outcome) of every value column and task, counted by the engine."""
    half, order = half_of(train.row), _scatter(train.row)
    branches: list[Any] = []
    about: list[tuple[str, Outcome]] = []
    for name, value in values.items():
        for outcome in outcomes:
            label = train[f"label_{outcome.name}"]
            many = outcome.kind == "multiclass"
            cell = train.filter(label.notnull()).select(
                value=text_of(value),
                label=label.cast("string") if many else ibis.literal(""),
                number=ibis.literal(0.0) if many else label - outcome.center,
                half=half,
                order=order,
            )
            sums = {f"n{h}": (cell.half == h).sum() for h in (0, 1)}
            sums |= {f"s{h}": ibis.ifelse(cell.half == h, cell.number, 0.0).sum() for h in (0, 1)}
            cell = cell.group_by("value", "label").agg(**sums, order=cell.order.min())
            cell = cell.order_by(ibis.desc(cell.n0 + cell.n1), "order").limit(_MOST)
            branches.append(cell.mutate(branch=ibis.literal(len(branches), "int64")))
            about.append((name, outcome))
    for start in range(0, len(branches), _AT_ONCE):
        some = branches[start : start + _AT_ONCE]
        pulled = (ibis.union(*some) if len(some) > 1 else some[0]).to_pyarrow()
        for index in range(start, start + len(some)):
            table = pulled.filter(pc.equal(pulled["branch"], index))
            n, s = (np.stack([_floats(table[f"{x}{h}"]) for h in (0, 1)]) for x in ("n", "s"))
            text, label = one_array(table["value"]), one_array(table["label"])
            yield about[index][0], Cells(codes(text), n, s, codes(label)), text, about[index][1]


def best_score(feature: Feature, cells: Cells, text: pa.Array, outcome: Outcome) -> float:
    """The highest score of a feature's cells: as values, as numbers, as words, by its kind."""
    best = score(cells, outcome)
    if feature.kind in NUMBERS:
        best = max(best, number_score(cells, as_numbers(text), outcome))
    if feature.kind == "multi_valued" and outcome.kind == "binary":
        text = pc.replace_substring(text, BETWEEN, feature.separator)
        best = max(best, word_score(cells, text, feature.separator, outcome))
    return best


def half_of(row: Any) -> Any:
    """The half, 0 or 1, that a source row (an Ibis column or an array) is in."""
    return _scatter(row) // 2**28 % 2


def _scatter(row: Any) -> Any:
    """Fibonacci hashing (Knuth, The Art of Computer Programming 3, 6.4): short, as SQL is long."""
    return row % 2**31 * 2654435769 % 2**32


def text_of(cells: Any) -> Any:
    """An Ibis column of text, or of lists of text, as text."""
    return cells.join(BETWEEN) if cells.type().is_array() else cells


def codes(values: pa.Array) -> np.ndarray:
    """A number for each distinct value, nothing included."""
    coded = values.dictionary_encode(null_encoding="encode")
    return np.asarray(coded.indices).astype(np.int64)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.cast(column, pa.float64()))


def as_text(cells: pa.Array) -> pa.Array:
    """Arrow cells of text, or of lists of text, as text."""
    return pc.binary_join(cells, BETWEEN) if pa.types.is_list(cells.type) else cells


def as_numbers(text: pa.Array) -> np.ndarray:
    """Text as float64, NaN where it is no number."""
    number = pc.match_substring_regex(text, NUMBER)
    cells = pc.if_else(pc.fill_null(number, False), text, pa.scalar(None, pa.string()))
    return np.asarray(pc.fill_null(pc.cast(cells, pa.float64()), np.nan))
