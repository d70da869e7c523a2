"""Does the report of transfer find a planted conflict, and which architectures remove it?

Two binary tasks depend on x1 (x2 + x3) and x1 (x2 - x3): alike on x2, oppositely on x3. A shared
bottom of four hidden units is enough for one of the two products, not for both. Each row is a model
against its own single-task twins at equal budget: the gain of each task in AUC with its interval
over rows, and the mean cosine between the tasks' gradients at the shared parameters over training.
Methods on gradients compare them at the parameters: here nothing is learned before the towers, so
that at the shared representation PCGrad and CAGrad would change nothing, and the others would weigh
gradients of inputs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SMALL: dict[str, Any] = {"expert_hidden": [4], "tower_hidden": []}
MODELS: dict[str, dict[str, Any]] = {
    "shared bottom": {},
    "the same, uncertainty": {"train.balance": "uncertainty"},
    "the same, DWA": {"train.balance": "dwa"},
    "the same, FAMO": {"train.balance": "famo"},
    "the same, GradNorm": {"train.balance": {"kind": "gradnorm", "at": "parameters"}},
    "the same, PCGrad": {"train.balance": {"kind": "pcgrad", "at": "parameters"}},
    "the same, CAGrad": {"train.balance": {"kind": "cagrad", "at": "parameters"}},
    "the same, DB-MTL": {"train.balance": {"kind": "dbmtl", "at": "parameters"}},
    "MMoE, 2 experts": {"model.towers": {"kind": "mmoe", "experts": 2, **SMALL}},
    "MMoE, 4 experts": {"model.towers": {"kind": "mmoe", "experts": 4, **SMALL}},
    "PLE, 1 + 1 experts": {
        "model.towers": {"kind": "ple", "experts": 1, "task_experts": 1, **SMALL}
    },
    "PLE, 1 + 2 experts": {
        "model.towers": {"kind": "ple", "experts": 1, "task_experts": 2, **SMALL}
    },
}
QUICK = ("shared bottom", "MMoE, 4 experts")
ROWS, SEEDS = 20_000, 3


def answer(quick: bool, folder: Path | None = None) -> list[dict[str, Any]]:
    """A row a model and task; what a folder has already is not trained again."""
    if folder is not None:
        return _answer(quick, folder)
    with tempfile.TemporaryDirectory() as place:
        return _answer(quick, Path(place))


def _answer(quick: bool, folder: Path) -> list[dict[str, Any]]:
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.experiments import overridden
    from mtrec_jax.studies.transfer import transfer

    results = []
    events = planted(ROWS // 2 if quick else ROWS, seed=0)
    base = experiment()
    prepared = prepare(base, None, folder / "prepared", {"events": events})
    for name in QUICK if quick else MODELS:
        out = folder / name.replace(" ", "-")
        model = overridden(base, MODELS[name])
        found = transfer(model, prepared, out, 1 if quick else SEEDS, show_progress=False)
        assert found.cosines is not None
        cosine = float(np.mean(found.cosines["parameters"]))
        for row in found.tasks:
            kept = ("joint", "alone", "gain", "low", "high", "over seeds", "verdict")
            results.append({"case": name, "task": row["task"]})
            results[-1] |= {key: row[key] for key in kept} | {"cosine": cosine}
    return results


def experiment() -> Any:
    """Two tasks, four numbers, and a shared bottom that is too small for both."""
    from mtrec_jax.experiments import parse_experiment

    towers = {"kind": "shared_bottom", **SMALL}
    return parse_experiment(
        {
            "name": "conflict",
            "data": {"history_length": 0},
            "split": {"kind": "random", "validation": 0.3, "test": 0.05},
            "features": {f"x{n}": {"on": "request", "kind": "numeric"} for n in (1, 2, 3, 4)},
            "tasks": {"plus": {"kind": "binary"}, "minus": {"kind": "binary"}},
            "model": {"width": 4, "dropout": 0, "fusion": "none", "towers": towers},
            "train": {
                "epochs": 12,
                "batch_size": 256,
                "learning_rate": 1e-2,
                "schedule": "cosine",
            },
            "select": {"metric": ["plus/auc", "minus/auc"]},
        }
    )


def planted(rows: int, seed: int) -> pa.Table:
    """Four standard normal numbers, the last without a meaning, and two labels a row."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    logits = {"plus": x[:, 0] * (x[:, 1] + x[:, 2]), "minus": x[:, 0] * (x[:, 1] - x[:, 2])}
    labels = {
        name: (rng.random(rows) < 1 / (1 + np.exp(-2 * logit))).astype(np.int64)
        for name, logit in logits.items()
    }
    return pa.table({f"x{n + 1}": x[:, n] for n in range(4)} | labels)
