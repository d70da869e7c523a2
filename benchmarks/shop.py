"""How close to the best possible does the model come on generated shops, and a logistic model?

Each seed is a new shop. The model is trained by the built-in configuration, the logistic regression
sees the same columns (one-hot user, item, and all user and item columns); both are measured on the
validation rows, beside the true probabilities.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

SEEDS = (505, 606)  # the configuration was chosen on seed 0


def answer(quick: bool) -> list[dict[str, Any]]:
    """A row a seed and binary task: AUC of the model, the best possible and the logistic model."""
    results = []
    for seed in SEEDS[:1] if quick else SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            results += _one_shop(Path(folder), seed)
    return results


def _one_shop(folder: Path, seed: int) -> list[dict[str, Any]]:
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.data.shop import generate
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.train.loop import train
    from mtrec_jax.train.run import evaluate_run

    generate(folder / "raw", seed=seed)
    experiment = load_experiment("shop")
    prepared = prepare(experiment, folder / "raw", folder / "prepared")
    evaluation, _ = evaluate_run(train(experiment, prepared, folder / "run", show_progress=False))
    best = evaluation.baselines[experiment.data.reference]
    rows = {split: prepared.interactions(split)["row"] for split in ("train", "validation")}
    results = []
    for task in ("click", "buy"):
        results.append(
            {
                "seed": seed,
                "task": task,
                "model": evaluation.tasks[task]["auc"],
                "best possible": best[f"{task}/auc"],
                "logistic": logistic_auc(folder / "raw", task, rows["train"], rows["validation"]),
            }
        )
    return results


def logistic_auc(raw: Path, task: str, train: np.ndarray, test: np.ndarray) -> float:
    """AUC of a logistic regression on one-hot columns, fitted and measured on source rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.preprocessing import OneHotEncoder

    events = pd.read_csv(raw / "events.csv")[["user", "item", task]]
    table = events.merge(pd.read_csv(raw / "users.csv"), on="user", how="left")
    table = table.merge(pd.read_csv(raw / "items.csv").drop(columns="title"), on="item", how="left")
    table["price"] = pd.qcut(table["price"], 16, labels=False, duplicates="drop")
    labels = table.pop(task).to_numpy()
    columns = OneHotEncoder(handle_unknown="ignore").fit_transform(table)
    train, test = (part[~np.isnan(labels[part])] for part in (train, test))
    model = LogisticRegression(max_iter=300).fit(columns[train], labels[train])
    return float(roc_auc_score(labels[test], model.predict_proba(columns[test])[:, 1]))
