"""One run of a study: trained or continued, predicted once, kept, and compared in pairs.

What a run says of each target is kept as Parquet, in the order of the split's file:

```
user string (raw id, null without), row int64 (of the source), rank int32 (of retrieval, 0 first)
label_<task> float64 (NaN without), prediction_<task> float64 or a list of class probabilities
```

Metadata of the file, JSON under "mtrec": what the predictions were made with, see `_made_with`, and
the numbers that ordered classes are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from mtrec_jax.arguments import renaming
from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared, to_arrays
from mtrec_jax.evaluation.answers import calibrated_logits
from mtrec_jax.evaluation.collect import collect
from mtrec_jax.evaluation.metrics import (
    Statistic,
    bootstrap_interval,
    metric_named,
    ranking_statistics,
    task_statistics,
)
from mtrec_jax.losses.tasks import class_numbers
from mtrec_jax.models import calibration
from mtrec_jax.models.calibration import Calibration
from mtrec_jax.models.serve import predictions, prepared_serving
from mtrec_jax.train.loop import OnEvaluation, train
from mtrec_jax.train.run import Run, best_step, load_answers, load_best, shared_mesh
from mtrec_jax.types import FIRST

_NOBODY = "row "  # begins the name of a target of nobody
_NOTES = b"mtrec"  # key of the file's metadata


class Predicted(NamedTuple):
    """The targets of a split and what a run says of them, one entry each, in file order."""

    user: np.ndarray  # [n] raw ids; a target of nobody has a name of its own
    row: np.ndarray  # [n] of the source
    rank: np.ndarray  # [n] among all items; very large where it was not found, -1 where not ranked
    labels: dict[str, np.ndarray]  # {task: [n]}, NaN without
    values: dict[str, np.ndarray]  # {task: [n], or [n, C]}
    numbers: Mapping[str, Sequence[float]] = MappingProxyType({})  # {task: of its C classes}

    @property
    def of_users(self) -> bool:
        """Whether the data have users."""
        return not all(name.startswith(_NOBODY) for name in self.user)

    def statistics(self, task: str, kind: str, ks: Iterable[int]) -> dict[str, Statistic]:
        """The task's metrics as functions of row weights [n], of which its targets count."""
        if kind == "retrieval":
            rows = np.flatnonzero(self.rank >= 0)
            found = ranking_statistics(self.rank[rows], ks)
        else:
            rows = np.flatnonzero(~np.isnan(self.labels[task]))
            users = np.unique(self.user[rows], return_inverse=True)[1]
            given = self.labels[task][rows], self.values[task][rows]
            numbers = self.numbers.get(task, ())
            found = task_statistics(kind, *given, users if self.of_users else None, ks, numbers)

        def of_rows(statistic: Statistic) -> Statistic:
            return lambda weights: statistic(weights[rows])

        return {name: of_rows(statistic) for name, statistic in found.items()}


def trained(
    experiment: Experiment,
    prepared: Prepared,
    folder: Path,
    on_evaluation: OnEvaluation | None = None,
    show_progress: bool = True,
) -> Run:
    """Train a run of a study, or continue it; one that is finished is opened. Messages name the
    folder of the study in place of the run's."""
    with renaming("run", "out"):
        return train(experiment, prepared, folder, None, show_progress, None, on_evaluation)


def predicted(run: Run, split: str, path: Path) -> Predicted:
    """What the run's best checkpoint says of a split; kept in `path`, and read from there again
    while the run has no other configuration or best checkpoint, and is calibrated as it was."""
    calibrate = run.experiment.evaluate.calibrate
    answers = load_answers(run, best_step(run)) if calibrate else None
    known = answers.calibration if answers else {}
    made_with = _made_with(run, split, known)
    if not path.exists() or _notes(path).get("made with") != made_with:
        table = _said(run, split, known)
        classes = {t: run.prepared.manifest.tasks[t].classes for t in run.experiment.tasks}
        notes = {
            "made with": made_with,
            "numbers": {task: class_numbers(of) for task, of in classes.items() if of},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        pq.write_table(table.replace_schema_metadata({_NOTES: json.dumps(notes)}), partial)
        partial.replace(path)
    return read_predicted(path)


def _made_with(run: Run, split: str, known: Mapping[str, Calibration]) -> dict[str, Any]:
    """All that predictions and ranks depend on; a longer run has another configuration, and often
    another best step."""
    return {
        "split": split,
        "data": run.prepared.manifest.fingerprint,
        "configuration": hashlib.sha256(to_toml(run.experiment).encode()).hexdigest()[:16],
        "step": best_step(run),
        "calibration": calibration.to_json(known),
    }


def _notes(path: Path) -> dict[str, Any]:
    metadata = pq.read_schema(path).metadata or {}
    return dict(json.loads(metadata.get(_NOTES, b"{}")))


def _said(run: Run, split: str, known: Mapping[str, Calibration]) -> pa.Table:
    """The table that is kept."""
    mesh = shared_mesh(run.experiment)
    serving = prepared_serving(run.experiment, run.prepared, mesh)
    params, tables, _ = load_best(run, mesh, serving.model)
    parts = run.experiment, run.prepared, serving, params, tables
    found = collect(*parts, split, orders=False)
    own = bool(known) and split == "validation"  # as `evaluate` measures it
    logits = calibrated_logits(run.experiment, found, known, own)
    values = predictions(run.experiment, run.prepared.manifest, logits)
    names = np.array([*[None] * FIRST, *run.prepared.user_names], dtype=object)
    columns: dict[str, Any] = {
        "user": pa.array(names[found.user], pa.string()),
        "row": run.prepared.interactions(split)["row"],
        "rank": np.where(found.retrieved, found.ranks, -1),
    }
    for task in run.experiment.tasks:
        columns[f"label_{task}"] = found.labels[task].astype(np.float64)
        value = np.asarray(values[task])
        wide = pa.FixedSizeListArray.from_arrays
        columns[f"prediction_{task}"] = (
            value if value.ndim == 1 else wide(pa.array(value.reshape(-1)), value.shape[1])
        )
    return pa.table(columns)


def read_predicted(path: Path) -> Predicted:
    """What `predicted` has kept."""
    table = pq.read_table(path)
    arrays = to_arrays(table.drop_columns(["user"]))
    user = np.array(table["user"].to_pylist(), dtype=object)
    alone = np.array([f"{_NOBODY}{row}" for row in arrays["row"]], dtype=object)
    return Predicted(
        user=np.where(user == None, alone, user).astype(str),  # noqa: E711
        row=arrays["row"],
        rank=arrays["rank"],
        labels={n.removeprefix("label_"): a for n, a in arrays.items() if n[:6] == "label_"},
        values={
            n.removeprefix("prediction_"): a for n, a in arrays.items() if n[:11] == "prediction_"
        },
        numbers=_notes(path)["numbers"],
    )


@dataclass(frozen=True)
class Difference:
    """How much better the first of two is than the second: above 0 it is, whatever the metric."""

    value: float  # mean over pairs of runs
    low: float  # 95 % interval over users
    high: float
    each: tuple[float, ...]  # of each pair of runs, such as a seed or a fold

    @property
    def verdict(self) -> str:
        """ "better" or "worse" where the interval over users excludes 0 and all pairs agree with
        it; else "no difference"."""
        if self.low > 0 and min(self.each) > 0:
            return "better"
        return "worse" if self.high < 0 and max(self.each) < 0 else "no difference"


def difference(
    pairs: Sequence[tuple[Predicted, Predicted]],
    task: str,
    kind: str,
    metric: str,
    ks: Iterable[int] = (10,),
    resamples: int = 200,
) -> Difference:
    """The mean difference of a metric over pairs of runs on the same targets, and its interval.

    A resample draws users, each with all of its targets in all pairs, and every pair is measured on
    it: a paired bootstrap (Efron and Tibshirani 1993, chapter 13). The interval holds what chance
    among users makes; what chance among trainings makes is in `each`.

    Args:
      pairs: (first, second) of each seed or fold.
      task, kind, metric, ks: what is measured.
      resamples: 0 leaves the interval out (nan).
    """
    sign = 1.0 if metric_named(metric).larger_is_better else -1.0
    both = [aligned(first, second) for first, second in pairs]
    ends = np.cumsum([len(first.row) for first, _ in both])
    parts = []
    for first, second in both:
        one, other = (p.statistics(task, kind, ks)[metric] for p in (first, second))
        parts.append((one, other))

    def each(weights: np.ndarray) -> list[float]:
        cut = np.split(weights, ends[:-1])
        return [sign * (a(w) - b(w)) for (a, b), w in zip(parts, cut, strict=True)]

    users = np.unique(np.concatenate([first.user for first, _ in both]), return_inverse=True)[1]
    values = each(np.ones(int(ends[-1])))
    low, high = bootstrap_interval(lambda w: float(np.mean(each(w))), users, resamples)
    return Difference(float(np.mean(values)), low, high, tuple(values))


def aligned(first: Predicted, second: Predicted) -> tuple[Predicted, Predicted]:
    """Both in the order of the source rows; they have to be about the same ones.

    >>> one = Predicted(np.array(["u"]), np.array([3]), np.array([-1]), {}, {})
    >>> aligned(one, one)[0].row.tolist()
    [3]
    """
    found = []
    for each in (first, second):
        order = np.argsort(each.row, kind="stable")
        labels, values = ({n: a[order] for n, a in of.items()} for of in (each.labels, each.values))
        at = each.user[order], each.row[order], each.rank[order]
        found.append(Predicted(*at, labels, values, each.numbers))
    if not np.array_equal(found[0].row, found[1].row):
        raise ValueError("runs of different targets")
    return found[0], found[1]


def ensemble(runs: Sequence[Predicted]) -> Predicted:
    """The mean of what runs say of the same targets, in the same order; ranks have none."""
    first = runs[0]
    values = {task: np.mean([run.values[task] for run in runs], axis=0) for task in first.values}
    return first._replace(values=values, rank=np.full_like(first.rank, -1))


def json_rows(table: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table for JSON: what is not a number is null."""
    return [
        {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()}
        for row in table
    ]


def corrected_t_test(differences: Sequence[float], test_share: float) -> float:
    """Two-sided p-value that the mean of differences over folds or resamples is 0.

    The variance is that of Nadeau and Bengio 2003, "Inference for the generalization error",
    Machine Learning 52: (1 / n + test / train) s^2, since training sets overlap.

    Args:
      differences: [n] of each fold.
      test_share: size of a test fold over that of its training set.

    Returns:
      nan for fewer than two folds.

    >>> round(corrected_t_test([1.0, 2.0, 3.0], 0.5), 4)
    0.1598
    """
    values = np.asarray(differences, np.float64)
    n = len(values)
    if n < 2:
        return float("nan")
    deviation = np.sqrt((1 / n + test_share) * values.var(ddof=1))
    if deviation == 0:
        return float(values.mean() == 0)
    return float(2 * stats.t.sf(abs(values.mean()) / deviation, n - 1))


def metrics_by_run(
    runs: Mapping[Any, Predicted], task: str, kind: str, ks: Iterable[int]
) -> dict[Any, dict[str, float]]:
    """{run: {metric: value}} of a task."""
    found = {}
    for name, each in runs.items():
        statistics = each.statistics(task, kind, ks)
        ones = np.ones(len(each.row))
        found[name] = {metric: value(ones) for metric, value in statistics.items()}
    return found
