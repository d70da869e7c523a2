"""Do tuned gradient-boosted trees beat one model for both tasks of census-income?

Trees have a model a task: LightGBM and scikit-learn's HistGradientBoosting, each tuned by 30 draws
from the ranges below, of which the first are the library's defaults. Validation ends each boosting
early and chooses the best draw, which is then fitted with every seed. Ours is one model for both
tasks: the built-in configuration, and every other kind of towers in its place. All see the same
columns, encoded on training rows: categories as they are, numbers (trees need no bins of them).
Figures are of validation, which also chose the checkpoint; with `--test` there are columns of the
test set beside them, which chooses nothing.

A row has mean and deviation over seeds, and the seconds of one seed, for trees those of both tasks.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.funnel import tower_sizes
from mtrec_jax.evaluation.metrics import auc

SEEDS = (0, 1, 2, 3, 4)
TRIALS = 30
# {library: {option: (low, high)}}: whole numbers stay whole, and are drawn by their logarithm, as
# what spans more than a factor of ten is
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "lightgbm": {
        "learning_rate": (0.03, 0.3),
        "num_leaves": (8, 128),
        "min_child_samples": (5, 300),
        "colsample_bytree": (0.3, 1.0),
        "subsample": (0.5, 1.0),
        "reg_lambda": (1e-3, 100.0),
        "cat_smooth": (1, 200),
        "cat_l2": (1, 100),
    },
    "scikit-learn": {
        "learning_rate": (0.03, 0.3),
        "max_leaf_nodes": (8, 128),
        "min_samples_leaf": (5, 300),
        "max_features": (0.3, 1.0),
        "l2_regularization": (1e-3, 100.0),
    },
}
MOST_TREES, PATIENCE = 2000, 50


Scores = dict[tuple[str, str], list[float]]  # {(task, split): the AUC of each seed}
Predict = Callable[[np.ndarray], np.ndarray]  # columns [n, F] -> probabilities [n]


class Rows(NamedTuple):
    """A split as trees take it."""

    columns: np.ndarray  # [n, F]
    labels: dict[str, np.ndarray]  # {task: [n]}
    categories: list[int]  # columns that are categories


def answer(
    quick: bool,
    data: Path = Path("data"),
    folder: Path | None = None,
    seeds: Sequence[int] = SEEDS,
    only: Sequence[str] = (),
    test: bool = False,
) -> list[dict[str, Any]]:
    """A row a library of trees and a kind of towers; `only` some of them. The prepared folder, the
    draws and the runs stay in `folder`, and what is there is not trained again."""
    from mtrec_jax.data.prepare import prepare, up_to_date
    from mtrec_jax.data.public import fetch
    from mtrec_jax.errors import ConfigError
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.models.towers import TOWERS

    experiment = load_experiment("census-income", ("train.epochs=1",) if quick else ())
    seeds = seeds[:1] if quick else seeds
    fetch("census-income", data)
    raw = data / "census-income"
    with tempfile.TemporaryDirectory() as temporary:
        work = folder or Path(temporary)
        kept = work / "prepared"
        whole = with_numbers(experiment)
        prepared = up_to_date(whole, raw, kept) or prepare(whole, raw, kept)
        found = []
        for name in only or (*RANGES, *TOWERS):
            try:
                if name in RANGES:
                    trials = 2 if quick else TRIALS
                    found.append(of_trees(name, prepared, seeds, trials, work, test))
                else:
                    found.append(of_towers(name, experiment, prepared, seeds, work, test))
            except ConfigError as error:  # of towers that need other tasks
                print(f"{name}: {error}")
    return found


def with_numbers(experiment: Any) -> Any:
    """With each column that a feature takes for numbers also as a plain number, for trees."""
    from mtrec_jax.data.features.numeric import Numeric

    columns = [f.column or name for name, f in experiment.features.items() if f.of_numbers]
    plain = {f"{name}_number": Numeric(on="request", column=name) for name in columns}
    return dataclasses.replace(experiment, features=experiment.features | plain)


def of_towers(
    kind: str, experiment: Any, prepared: Any, seeds: Sequence[int], work: Path, test: bool
) -> dict[str, Any]:
    """The row of a kind of towers, with the sizes of the configured ones where it has them."""
    from mtrec_jax.models.towers import TOWERS
    from mtrec_jax.train.loop import train
    from mtrec_jax.train.records import read_records
    from mtrec_jax.train.run import evaluate_run

    model = experiment.model
    sizes = tower_sizes(kind, vars(model.towers))
    share = "layers" if getattr(TOWERS[kind], "task_tables", False) else model.members_share
    model = dataclasses.replace(model, towers=TOWERS[kind](**sizes), members_share=share)
    scores: Scores = {}
    seconds = []
    for seed in seeds:
        one = dataclasses.replace(
            experiment,
            model=model,
            train=dataclasses.replace(experiment.train, seed=seed),
            evaluate=dataclasses.replace(experiment.evaluate, bootstrap=0),
        )
        run = train(one, prepared, work / f"{kind}-{seed}", show_progress=False)
        for split in ("validation", "test") if test else ("validation",):
            evaluation, _ = evaluate_run(run, split)
            for task, metrics in evaluation.tasks.items():
                scores.setdefault((task, split), []).append(metrics["auc"])
        records = read_records(run.folder / "metrics.jsonl")
        seconds.append(sum(r["value"] for r in records if r["metric"] == "seconds"))
    return as_row(kind, scores, seconds)


def of_trees(
    library: str, prepared: Any, seeds: Sequence[int], trials: int, work: Path, test: bool
) -> dict[str, Any]:
    """The row of a library of trees, with the best draw of each task."""
    splits = ("train", "validation", "test") if test else ("train", "validation")
    rows = {split: as_rows(prepared, split) for split in splits}
    scores: Scores = {}
    seconds = np.zeros(len(seeds))
    for task in rows["train"].labels:
        kept = work / f"{library}-{task}-{prepared.manifest.fingerprint}.jsonl"
        tuned = drawn(library, rows, task, trials, kept)
        best = draw(library, int(np.argmax(tuned)))
        print(f"{library}, {task}: {best}, {max(tuned):.4f}; defaults {tuned[0]:.4f}")
        for place, seed in enumerate(seeds):
            start = time.perf_counter()
            predicted = fitted(library, rows, task, best, seed)
            seconds[place] += time.perf_counter() - start
            for split, scored in predicted.items():
                found = auc(rows[split].labels[task], scored)
                scores.setdefault((task, split), []).append(found)
    return as_row(library, scores, list(seconds))


def drawn(library: str, rows: dict[str, Rows], task: str, trials: int, kept: Path) -> list[float]:
    """AUC on validation of each draw, from the file or else fitted and kept there."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    known = {one["trial"]: one["auc"] for one in map(json.loads, lines)}
    both = {split: rows[split] for split in ("train", "validation")}
    for number in range(trials):
        if number not in known:
            options = draw(library, number)
            scored = fitted(library, both, task, options, 0)["validation"]
            known[number] = auc(rows["validation"].labels[task], scored)
            line = {"trial": number, "auc": known[number], "options": options}
            with kept.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return [known[number] for number in range(trials)]


def as_row(name: str, scores: Scores, seconds: list[float]) -> dict[str, Any]:
    """Means and sample deviations over seeds of a case."""
    row: dict[str, Any] = {"case": name, "seeds": len(seconds)}
    for (task, split), of_seeds in scores.items():
        spread = statistics.stdev(of_seeds) if len(of_seeds) > 1 else float("nan")
        named = task if split == "validation" else f"{task} test"
        row |= {f"{named} auc": statistics.fmean(of_seeds), f"{named} ±": spread}
    return row | {"seconds": round(statistics.fmean(seconds), 1)}


def as_rows(prepared: Any, split: str) -> Rows:
    """A split's columns: ids of categories, and numbers, each as one number."""
    m = prepared.manifest
    features = m.config["features"]
    column = {name: feature.get("column") or name for name, feature in features.items()}
    numbers = [f.name for f in m.request_numbers if f.name.endswith("_number")]
    numeric = {column[name] for name in numbers}
    ids = [f.name for f in m.request_ids if column[f.name] not in numeric]
    names = [f"request_{name}" for name in (*ids, *numbers)]
    blocks = list(prepared.blocks(split, names + [f"label_{task}" for task in m.tasks]))

    def whole(name: str) -> np.ndarray:
        return np.concatenate([block[name].reshape(-1) for block in blocks])

    columns = np.stack([whole(name) for name in names], axis=1).astype(np.float32)
    labels = {task: whole(f"label_{task}") for task in m.tasks}
    return Rows(columns, labels, list(range(len(ids))))


def draw(library: str, number: int) -> dict[str, float | int]:
    """The options of a trial; the first has the library's own."""
    rng, found = np.random.default_rng(number), dict[str, float | int]()
    for name, (low, high) in RANGES[library].items() if number else ():
        whole = isinstance(low, int)
        by_logarithm = whole or high > 10 * low
        ends = np.log([low, high]) if by_logarithm else np.array([low, high])
        value = float(rng.uniform(*ends))
        value = float(np.exp(value)) if by_logarithm else value
        found[name] = round(value) if whole else value
    return found


def fitted(
    library: str, rows: dict[str, Rows], task: str, options: dict[str, Any], seed: int
) -> dict[str, np.ndarray]:
    """Predictions of all splits but "train", of trees that validation ended early."""
    predict = FIT[library](rows["train"], rows["validation"], task, options, seed)
    return {split: predict(rows[split].columns) for split in rows if split != "train"}


def _lightgbm(
    train: Rows, validation: Rows, task: str, options: dict[str, Any], seed: int
) -> Predict:
    import lightgbm

    model = lightgbm.LGBMClassifier(
        n_estimators=MOST_TREES, subsample_freq=1, random_state=seed, verbose=-1, **options
    )
    model.fit(
        train.columns,
        train.labels[task],
        eval_X=validation.columns,
        eval_y=validation.labels[task],
        eval_metric="auc",
        categorical_feature=train.categories,
        callbacks=[lightgbm.early_stopping(PATIENCE, first_metric_only=True, verbose=False)],
    )
    return lambda columns: model.predict_proba(columns)[:, 1]


def _scikit_learn(
    train: Rows, validation: Rows, task: str, options: dict[str, Any], seed: int
) -> Predict:
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        max_iter=MOST_TREES,
        early_stopping=True,
        n_iter_no_change=PATIENCE,
        categorical_features=train.categories,
        random_state=seed,
        **options,
    )
    held = {"X_val": validation.columns, "y_val": validation.labels[task]}
    model.fit(train.columns, train.labels[task], **held)
    return lambda columns: model.predict_proba(columns)[:, 1]


FIT: dict[str, Callable[..., Predict]] = {
    "lightgbm": _lightgbm,
    "scikit-learn": _scikit_learn,
}
