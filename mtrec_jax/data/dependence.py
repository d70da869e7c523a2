"""How far one value says what a label is: fitted on one half of the rows, judged on the other.

Values are compared by their mean label (or commonest class) in the other half, so that ids and
timestamps, which do not come again, say nothing however many there are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.config import Feature
from mtrec_jax.data.examples import mix
from mtrec_jax.data.features import WRITTEN, as_numbers

ROWS, OF_A_CLASS = 100, 10  # fewer labelled rows are not judged
BETWEEN = "\x1f"  # the values of a list
_BINS = 1000  # of numbers


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
    if feature.kind in WRITTEN:
        best = max(best, number_score(cells, as_numbers(text), outcome))
    if feature.kind == "multi_valued" and outcome.kind == "binary":
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
