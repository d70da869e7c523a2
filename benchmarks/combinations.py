"""Which towers go with which balancing? Every kind of both, on logs of a funnel.

Each seed is a new log of `funnel`: impressions, clicks, and purchases after clicks. From its one
prepared folder every combination is trained equally long; "click" and "buy" are the AUC on
validation of its best step, means and deviations over the logs. "lead" is the mean over both tasks
and all logs by which a combination is ahead of the same towers under static weights.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import funnel

SEEDS = (201, 202)


def answer(
    quick: bool, seeds: Sequence[int] = SEEDS, only: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row a combination; `only` some kinds of towers."""
    from rich.progress import track

    from mtrec_jax.balance import BALANCERS
    from mtrec_jax.models.towers import TOWERS

    towers = only or (("shared_bottom", "esmm") if quick else tuple(TOWERS))
    balances = ("static", "pcgrad") if quick else tuple(BALANCERS)
    pairs = [(kind, balance) for kind in towers for balance in balances]
    seeds = seeds[:1] if quick else seeds
    found: dict[tuple[str, str], list[tuple[float, float]]] = {pair: [] for pair in pairs}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            prepared = funnel.prepared(Path(folder), seed, 6_000 if quick else funnel.IMPRESSIONS)
            for kind, balance in track(pairs, f"seed {seed}"):
                run = Path(folder) / f"{kind}-{balance}"
                found[kind, balance].append(scores(kind, balance, prepared, run))
    return [row(pair, found[pair], found[pair[0], "static"]) for pair in pairs]


def scores(kind: str, balance: str, prepared: Any, folder: Path) -> tuple[float, float]:
    """AUC of clicks and of purchases given a click, on validation."""
    from mtrec_jax.balance import BALANCERS
    from mtrec_jax.train.loop import train
    from mtrec_jax.train.run import evaluate_run

    declared = funnel.experiment({"kind": kind})
    training = dataclasses.replace(declared.train, balance=BALANCERS[balance]())
    declared = dataclasses.replace(declared, train=training)
    tasks = evaluate_run(train(declared, prepared, folder, show_progress=False))[0].tasks
    return tasks["click"]["auc"], tasks["buy"]["auc"]


def row(
    pair: tuple[str, str], found: list[tuple[float, float]], static: list[tuple[float, float]]
) -> dict[str, Any]:
    """Means and sample deviations over the logs."""
    row: dict[str, Any] = {"towers": pair[0], "balance": pair[1], "seeds": len(found)}
    for task, of_seeds in zip(("click", "buy"), zip(*found, strict=True), strict=True):
        spread = statistics.stdev(of_seeds) if len(of_seeds) > 1 else float("nan")
        row |= {task: statistics.fmean(of_seeds), f"{task} ±": spread}
    ahead = [sum(a) - sum(b) for a, b in zip(found, static, strict=True)]
    return row | {"lead": statistics.fmean(ahead) / 2}
