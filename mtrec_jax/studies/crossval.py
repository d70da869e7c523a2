"""Cross-validation: the same trainings over folds and seeds, and what differs between them.

A study is a folder:

```
data/N/cleaned       clean events, once for all folds; N numbers configurations of other data
data/N/fold-F        the prepared folder of a fold
runs/NAME/F-S        run folders, of fold F and seed S
kept/SPLIT/NAME/F-S.parquet    what each run says of its fold's targets
crossval.json        the figures
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_path, a_whole_number, instance, one_of
from mtrec_jax.config import Experiment, Split, main_metric
from mtrec_jax.data.dataset import Prepared, configuration
from mtrec_jax.data.prepare import prepare, up_to_date
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.paired import holm
from mtrec_jax.experiments import check
from mtrec_jax.result import Result
from mtrec_jax.studies.runs import (
    Predicted,
    corrected_t_test,
    difference,
    ensemble,
    json_rows,
    metrics_by_run,
    predicted,
    trained,
)
from mtrec_jax.train.records import write_json

Say = Callable[[str], None]
By = Literal["event", "user", "time"]


@dataclass(frozen=True)
class Crossvalidated:
    """What a cross-validation has found."""

    scores: Result  # configuration, task, metric, mean, over folds, over seeds, runs
    pairs: Result | None  # of two configurations: task, metric, first, second, difference, p …
    split: str
    test_looks: int  # how often the test folds have been looked at


def crossval(
    experiments: Experiment | Mapping[str, Experiment],
    data: str | Path | None,
    out: str | Path,
    folds: int = 5,
    seeds: int = 3,
    by: By = "event",
    stratify: str = "",
    hold_back: float | None = None,
    split: Literal["validation", "test"] = "validation",
    whole: Mapping[str, Experiment] | None = None,
    tables: Mapping[str, Any] | None = None,
    only_folds: int = 0,
    say: Say = lambda text: None,
    show_progress: bool = True,
) -> Crossvalidated:
    """Train experiments on each fold with several seeds, and compare them in pairs.

    What is there already is not done again, so that a study which was stopped or killed goes on
    where it was, and more seeds may be added.

    Args:
      experiments: one, or {name: experiment}.
      data, tables: the raw data, as `prepare` takes them.
      out: folder of the study.
      folds, by, stratify, hold_back: see `[split]` in the configuration, which may declare
        `hold_back` as well; of time there are `folds` + 2 windows.
      seeds: trainings of each fold, from `train.seed` on.
      split: "test" looks at the test folds, which is counted; choose by "validation".
      whole: {name: what is prepared}, where an experiment chooses its tasks or features from it.
      only_folds: the first so many; 0: all.
      say: is told what happens.
      show_progress: of each training.

    Raises:
      ConfigError: the split does not suit the data, or the experiments differ in what they measure.
      DataError: as `prepare`.

    Example:
      ```
      found = mtrec_jax.study_crossval(experiment, "data/ml-100k", "studies/ml-100k", seeds=3)
      print(found.scores)
      ```
    """
    folder, named = a_path("out", out), _named(experiments)
    one_of("split", split, ("validation", "test"))
    for name, value in (("folds", folds), ("seeds", seeds)):
        a_whole_number(name, value, 1, 10**4, "10,000", ConfigError)
    whole = {name: (whole or {}).get(name, e) for name, e in named.items()}
    kept: dict[tuple[str, int, int], Predicted] = {}
    own, shares = next(iter(named.values())).split, []  # the same folds for all
    hold_back = own.hold_back if hold_back is None else hold_back
    for fold in range(only_folds or folds):
        opened: dict[int, Prepared] = {}
        parts = _of_fold(fold, folds, by, stratify, hold_back) | {"seed": own.seed}
        for name, e in named.items():
            place, base = _data_number(whole, name)
            if place not in opened:
                there = folder / "data" / str(place)
                opened[place] = _prepared(_on(base, parts), data, tables, there, fold, say)
            sizes = opened[place].manifest.split.sizes
            shares.append(sizes[split] / max(sizes["train"], 1))
            for number, seed in enumerate(range(e.train.seed, e.train.seed + seeds)):
                one = replace(_on(e, parts), train=replace(e.train, seed=seed), tune=None)
                run, file = (f"{name}/{fold}-{seed}", f"{name}/{fold}-{seed}.parquet")
                say(f"{name}: fold {fold}, seed {seed}")
                done = trained(one, opened[place], folder / "runs" / run, None, show_progress)
                path = folder / "kept" / split / file
                kept[name, fold, number] = predicted(done, split, path)
    looks = _looks(folder, split)
    scores, pairs = _scores(named, kept), _pairs(named, kept, float(np.mean(shares)))
    found = Crossvalidated(scores, pairs, split, looks)
    write_json(folder / "crossval.json", _plain(found))
    return found


def _named(experiments: Experiment | Mapping[str, Experiment]) -> dict[str, Experiment]:
    if isinstance(experiments, Experiment):
        return {experiments.name: experiments}
    for name, each in experiments.items():
        instance(f"experiments[{name!r}]", each, Experiment, "pass what load_experiment gives")
    return dict(experiments)


def _of_fold(
    fold: int, folds: int, by: By, stratify: str, hold_back: float | None
) -> dict[str, Any]:
    one_of("by", by, ("event", "user", "time"))
    return {
        "kind": "folds",
        "folds": folds,
        "fold": fold,
        "by": None if by == "event" else by,
        "stratify": stratify or None,
        "hold_back": hold_back,
    }


def _on(experiment: Experiment, parts: Mapping[str, Any]) -> Experiment:
    """The experiment on a fold, in the place of its own split."""
    found = replace(experiment, split=Split(**parts))
    check(found)
    return found


def _data_number(whole: Mapping[str, Experiment], name: str) -> tuple[int, Experiment]:
    """Which data an experiment is prepared to, and the first experiment that has them."""
    keys = [json.dumps(_without_split(e), sort_keys=True) for e in whole.values()]
    number = keys.index(keys[list(whole).index(name)])
    return number, list(whole.values())[number]


def _without_split(experiment: Experiment) -> dict[str, Any]:
    return {key: value for key, value in configuration(experiment).items() if key != "split"}


def _prepared(
    experiment: Experiment,
    data: str | Path | None,
    tables: Mapping[str, Any] | None,
    folder: Path,
    fold: int,
    say: Say,
) -> Prepared:
    """A fold's prepared folder, from clean events that all folds share, but where their bounds are
    fitted on training rows."""
    out = folder / f"fold-{fold}"
    if found := up_to_date(experiment, data, out, tables):
        return found
    fitted = any(rule.bounds != "given" for rule in experiment.clean.values.values())
    cleaned = folder / (f"cleaned-{fold}" if fitted else "cleaned")
    return prepare(experiment, data, out, tables, say, cleaned=cleaned)


def _looks(folder: Path, split: str) -> int:
    path = folder / "crossval.json"
    before = json.loads(path.read_text("utf-8"))["test_looks"] if path.exists() else 0
    return int(before) + (split == "test")


def _scores(
    named: Mapping[str, Experiment], kept: Mapping[tuple[str, int, int], Predicted]
) -> Result:
    """Means over all runs, with the deviations over folds (of their means) and over seeds (within a
    fold), and the mean over folds for the seeds' ensembles."""
    rows = []
    for name, e in named.items():
        by_fold: dict[int, list[Predicted]] = {}
        for (of, fold, _), each in kept.items():
            if of == name:
                by_fold.setdefault(fold, []).append(each)
        for task, declared in e.tasks.items():
            how = task, declared.kind, e.evaluate.ks
            runs = [
                list(metrics_by_run(dict(enumerate(f)), *how).values()) for f in by_fold.values()
            ]
            joined = declared.kind != "retrieval" and len(runs[0]) > 1
            together = {fold: ensemble(f) for fold, f in by_fold.items()} if joined else {}
            of_seeds = metrics_by_run(together, *how).values()
            for metric in runs[0][0]:
                values = [[found[metric] for found in of_fold] for of_fold in runs]
                means = [float(np.mean(of_fold)) for of_fold in values]
                within = [float(np.var(f, ddof=1)) for f in values if len(f) > 1]
                row: dict[str, Any] = {"configuration": name, "task": task, "metric": metric}
                row |= {"mean": float(np.mean(means)), "over folds": _deviation(means)}
                row |= {"over seeds": float(np.sqrt(np.mean(within))) if within else None}
                row |= {"ensemble": _mean([found[metric] for found in of_seeds])}
                rows.append(row | {"runs": sum(map(len, values))})
    return Result(pa.Table.from_pylist(rows))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _pairs(
    named: Mapping[str, Experiment],
    kept: Mapping[tuple[str, int, int], Predicted],
    test_share: float,
) -> Result | None:
    """Each pair of configurations on the tasks that both have, by each task's main metric; p values
    are corrected for how many the table has (Holm)."""
    rows: list[dict[str, Any]] = []
    names = list(named)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            for task in (t for t in named[first].tasks if t in named[second].tasks):
                e, kind = named[first], named[first].tasks[task].kind
                metric = main_metric(e, task)
                ones = {key[1:]: each for key, each in kept.items() if key[0] == first}
                others = {key[1:]: each for key, each in kept.items() if key[0] == second}
                both = sorted(ones.keys() & others.keys())
                pairs = [(ones[key], others[key]) for key in both]
                found = difference(pairs, task, kind, metric, e.evaluate.ks, e.evaluate.bootstrap)
                folds = sorted({fold for fold, _ in both})
                means = [
                    float(
                        np.mean([v for (f, _), v in zip(both, found.each, strict=True) if f == k])
                    )
                    for k in folds
                ]
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "first": first,
                        "second": second,
                        "first is better by": found.value,
                        "low": found.low,
                        "high": found.high,
                        "p over folds": corrected_t_test(means, test_share),
                        "folds won": sum(mean > 0 for mean in means),
                    }
                )
    for row, p in zip(rows, holm([row["p over folds"] for row in rows]), strict=True):
        row["p over folds"] = p
    return Result(pa.Table.from_pylist(rows)) if rows else None


def _plain(found: Crossvalidated) -> dict[str, Any]:
    return {
        "split": found.split,
        "test_looks": found.test_looks,
        "scores": json_rows(found.scores),
        "pairs": json_rows(found.pairs or ()),
    }
