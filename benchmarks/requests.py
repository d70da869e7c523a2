"""Do the past and the moment each help the model, and both together more than either?

Each seed is a new shop of requests, prepared once. Four models are trained from that one folder:
with both, without history (no history features and no encoder of them), without the features of the
request, and without either. The figures are the AUC of click on the validation rows, what a model
gains over the one without either, and how far the one with both is ahead of it, each with its 95 %
interval: users are drawn with replacement, the same for both models. "best possible" is of the true
probabilities, with the moment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.social import gained, measured_clicks

SEEDS = (505, 606)
MODELS = {  # {model: kinds of features that it lacks}
    "neither": ("history", "request"),
    "history": ("request",),
    "request": ("history",),
    "both": (),
}


def answer(quick: bool, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """A row a seed and model."""
    results = []
    for seed in seeds[:1] if quick else seeds:
        with tempfile.TemporaryDirectory() as folder:
            settings = ("train.epochs=1",) if quick else ()
            results += one_shop(Path(folder), seed, settings)
    return results


def one_shop(
    folder: Path, seed: int, settings: tuple[str, ...] = (), **sizes: Any
) -> list[dict[str, Any]]:
    """The four models on one shop; `sizes` of it, as `generate` takes them."""
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.data.shop import generate
    from mtrec_jax.evaluation.metrics import auc
    from mtrec_jax.evaluation.protocol import check_same, protocol_of
    from mtrec_jax.experiments import load_experiment

    truth = generate(folder / "raw", seed=seed, requests=True, **sizes)
    experiments = {
        name: load_experiment("shop-requests", (*settings, *chosen_without(*lacking)))
        for name, lacking in MODELS.items()
    }
    whole = load_experiment("shop-requests", settings)
    prepared = prepare(whole, folder / "raw", folder / "prepared")
    check_same({name: protocol_of(e, prepared.manifest) for name, e in experiments.items()})
    best = truth["best"]["click"]["auc"]
    clicks = {n: measured_clicks(e, prepared, folder / n) for n, e in experiments.items()}
    users, labels, base = clicks["neither"]
    results = []
    for name, (_, _, scores) in clicks.items():
        row: dict[str, Any] = {"seed": seed, "task": name, "click auc": auc(labels, scores)}
        row |= {"best possible": best}
        row |= zip(("gain", "low", "high"), gained(users, labels, scores, base), strict=True)
        lead = gained(users, labels, clicks["both"][2], scores)
        results.append(row | dict(zip(("both ahead", "from", "to"), lead, strict=True)))
    return results


def chosen_without(*lacking: str) -> list[str]:
    """The overrides that take a model's kinds of features from it; the folder stays."""
    from mtrec_jax.experiments import load_experiment

    declared = load_experiment("shop-requests").features
    kept = ",".join(name for name, feature in declared.items() if feature.on not in lacking)
    encoder = ["model.encoder=none"] if "history" in lacking else []
    return [f"features={kept}", *encoder]
