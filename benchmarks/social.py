"""Do search queries and friends help the model where they carry signal, and only there?

Each seed is a new social shop. The built-in configuration is trained with them, without them, and
with both shuffled: every query goes to a random user, every tie to a random friend. The figures are
the AUC of click on the validation rows, and what it gains over the model without, with its 95 %
interval: users are drawn with replacement, the same for both models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mtrec_jax.config import Experiment

SEEDS = (505, 606)  # the configuration was chosen on other seeds
SOCIAL = ("queries", "ties")  # tables, whose features the model without them lacks
RESAMPLES = 1000


def answer(quick: bool, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """A row a seed and model."""
    results = []
    for seed in seeds[:1] if quick else seeds:
        with tempfile.TemporaryDirectory() as folder:
            results += one_shop(Path(folder), seed)
    return results


def one_shop(folder: Path, seed: int, settings: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The three models on one shop."""
    from mtrec_jax.data.shop import generate
    from mtrec_jax.evaluation.metrics import auc
    from mtrec_jax.experiments import load_experiment

    truth = generate(folder / "raw", seed=seed, social=True)
    experiment = load_experiment("shop-social", settings)
    raw = {name: pd.read_csv(folder / "raw" / f"{name}.csv") for name in SOCIAL}
    contestants: dict[str, tuple[Experiment, dict[str, pd.DataFrame]]] = {
        "without": (without(experiment), {}),
        "with": (experiment, {}),
        "shuffled": (experiment, shuffled(raw, np.random.default_rng(seed))),
    }
    best = {"without": truth["social"]["without"]["all"], "with": truth["best"]["click"]["auc"]}
    results, base = [], None
    for name, (contestant, tables) in contestants.items():
        users, labels, scores = validation_clicks(contestant, folder, name, tables)
        base = scores if base is None else base
        gain, low, high = gained(users, labels, scores, base)
        row = {"seed": seed, "task": name, "click auc": auc(labels, scores)}
        row |= {"best possible": best.get(name, float("nan"))}
        results.append(row | {"gain": gain, "low": low, "high": high})
    return results


def without(experiment: Experiment) -> Experiment:
    """The experiment without the tables of queries and ties, and what is made of them."""
    from mtrec_jax.config import to_dict
    from mtrec_jax.data.schema import query_features
    from mtrec_jax.experiments import parse_experiment

    values = to_dict(experiment)
    for name in SOCIAL:
        del values["data"][name]
    made = set(query_features(experiment))
    made |= {n for n, f in experiment.features.items() if f.kind in ("ties", "friends_taste")}
    values["features"] = {n: f for n, f in values["features"].items() if n not in made}
    return parse_experiment(values)


def shuffled(raw: dict[str, pd.DataFrame], rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    """Queries keep their times and texts, users their number of ties; who is meant is random."""
    queries, ties = (raw[name].copy() for name in SOCIAL)
    queries["query"] = rng.permutation(queries["query"])
    ties["friend"] = rng.permutation(ties["friend"])
    return {"queries": queries, "ties": ties}


def validation_clicks(
    experiment: Experiment, folder: Path, name: str, tables: dict[str, pd.DataFrame]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, click and score of every validation row of a trained model, in the order of rows."""
    from mtrec_jax.data.prepare import prepare

    prepared = prepare(experiment, folder / "raw", folder / f"{name}-prepared", tables)
    order = np.argsort(prepared.interactions("validation")["row"])
    user, label, score = measured_clicks(experiment, prepared, folder / f"{name}-run")
    return user[order], label[order], score[order]


def measured_clicks(
    experiment: Experiment, prepared: Any, folder: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, click and score of every validation row of a trained model, in file order."""
    from mtrec_jax.evaluation.collect import collect
    from mtrec_jax.models.serve import prepared_serving
    from mtrec_jax.train.loop import train
    from mtrec_jax.train.run import load_best

    run = train(experiment, prepared, folder, show_progress=False)
    params, tables, _ = load_best(run)
    serving = prepared_serving(run.experiment, run.prepared)
    found = collect(run.experiment, run.prepared, serving, params, tables, "validation", False)
    return found.user, found.labels["click"], found.logits["click"]


def gained(
    users: np.ndarray, labels: np.ndarray, scores: np.ndarray, base: np.ndarray
) -> tuple[float, float, float]:
    """AUC of `scores` above that of `base`, and the ends of its 95 % interval over users."""
    from mtrec_jax.evaluation.metrics import auc_statistic, bootstrap_interval

    ours, theirs = auc_statistic(labels, scores), auc_statistic(labels, base)

    def gain(weights: np.ndarray) -> float:
        return ours(weights) - theirs(weights)

    return gain(np.ones(len(users))), *bootstrap_interval(gain, users, RESAMPLES)
