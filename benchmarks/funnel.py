"""Do ESMM and ESCM² know what would be bought of all impressions, when buyers choose their clicks?

Each seed is a new log: users see random items, and click what they would buy more often than other
things, so that clicks are a biased sample of impressions. Purchases are seen after clicks alone,
but the planted probability of buying is known for every impression. Models are trained from the one
prepared folder, equally long, and then p(buy | click) is compared with the planted probability on
*all* impressions of the test rows. "excess" is the mean Kullback-Leibler divergence in thousandths
of a nat, "auc" is of purchases drawn for every impression, "too high" the mean prediction over the
mean probability less 1, in percent. "less" is how much less excess than the first of the naive
models, which learn the conditional probability on clicks alone, with the 95 % interval of a t test
over seeds.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SEEDS = tuple(range(101, 107))  # the log and the settings were chosen on other seeds
SIZES: dict[str, Any] = {"expert_hidden": [32], "tower_hidden": [16]}
MODELS: dict[str, dict[str, Any]] = {
    "shared_bottom (naive)": {"kind": "shared_bottom"},
    "mmoe (naive)": {"kind": "mmoe"},
    "aitm": {"kind": "aitm"},
    "esmm": {"kind": "esmm"},
    "escm2 ipw": {"kind": "escm2"},
    "escm2 dr": {"kind": "escm2", "estimator": "dr"},
}
USERS, ITEMS, IMPRESSIONS = 60, 60, 60_000
RANK, TASTE, QUALITY = 3, 1.6, 0.8  # of what users want: logits
CLICK, CURIOSITY, SELECTION = -2.8, 0.7, 1.5  # click logit = CLICK + curiosity + SELECTION want
BUY = -1.5  # buy logit = BUY + want


def answer(quick: bool, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """A row a model: means over seeds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for seed in seeds[:2] if quick else seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, figures in one_log(Path(folder), seed, 6_000 if quick else IMPRESSIONS):
                found[name].append(figures)
    naive = np.array([figures["excess"] for figures in next(iter(found.values()))])
    rows = []
    for name, each in found.items():
        row: dict[str, Any] = {"task": name, "seeds": len(each)}
        row |= {key: float(np.mean([figures[key] for figures in each])) for key in each[0]}
        less = naive - np.array([figures["excess"] for figures in each])
        rows.append(row | dict(zip(("less", "low", "high"), t_interval(less), strict=True)))
    return rows


def t_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t."""
    from scipy import stats

    error = values.std(ddof=1) / len(values) ** 0.5
    reach = float(stats.t.ppf(0.975, len(values) - 1) * error)
    return float(values.mean()), float(values.mean()) - reach, float(values.mean()) + reach


def generate(seed: int, impressions: int) -> dict[str, np.ndarray]:
    """A log in columns: user, item, click, buy (0 without a click), and `truth`, the probability
    that this user would buy this item, clicked or not."""
    rng = np.random.default_rng(seed)
    users, items = (rng.normal(size=(n, RANK)) for n in (USERS, ITEMS))
    tastes, curious = (rng.normal(size=(n, RANK)) for n in (USERS, ITEMS))
    quality = QUALITY * rng.normal(size=ITEMS)
    user, item = rng.integers(0, USERS, impressions), rng.integers(0, ITEMS, impressions)
    scale = RANK**-0.5
    want = TASTE * scale * (users[user] * items[item]).sum(axis=1) + quality[item]
    curiosity = CURIOSITY * scale * (tastes[user] * curious[item]).sum(axis=1)
    click = rng.random(impressions) < sigmoid(CLICK + curiosity + SELECTION * want)
    truth = sigmoid(BUY + want)
    buy = click & (rng.random(impressions) < truth)
    return {
        "user": user,
        "item": item,
        "click": click.astype(int),
        "buy": buy.astype(int),
        "truth": truth,
    }


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def tower_sizes(kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Of sizes those that a kind of towers has; one without experts has their layers in its towers,
    so that it is as deep as the others.

    >>> tower_sizes("pepnet", {"experts": 4, "expert_hidden": [32], "tower_hidden": [16]})
    {'tower_hidden': (32, 16)}
    """
    from mtrec_jax.models.towers import TOWERS

    known = {field.name for field in dataclasses.fields(TOWERS[kind])} - {"kind"}
    found = {name: size for name, size in sizes.items() if name in known}
    if "expert_hidden" not in known:
        found["tower_hidden"] = (*sizes["expert_hidden"], *sizes["tower_hidden"])
    return found


def experiment(towers: dict[str, Any]) -> Any:
    """Users and items are features of an impression; towers differ, nothing else."""
    from mtrec_jax.experiments import parse_experiment

    sizes = tower_sizes(towers["kind"], SIZES)
    return parse_experiment(
        {
            "name": "funnel",
            "split": {"kind": "random", "validation": 0.15, "test": 0.3, "seed": 0},
            "features": {"who": {"on": "request"}, "what": {"on": "request"}},
            "tasks": {"click": "binary", "buy": {"kind": "binary", "where": "click"}},
            "model": {"width": 16, "fusion": "none", "dropout": 0.1, "towers": sizes | towers},
            "train": {
                "epochs": 20,
                "batch_size": 1024,
                "learning_rate": 3e-3,
                "evaluate_every": 100_000,  # at the end alone: the last step is kept
                "mesh": [1, 1],
            },
            "evaluate": {"bootstrap": 0, "batch_size": 4096},
        }
    )


def prepared(folder: Path, seed: int, impressions: int) -> Any:
    """A log, prepared."""
    import pandas as pd

    from mtrec_jax.data.prepare import prepare

    log = generate(seed, impressions)
    frame = pd.DataFrame(
        {
            "who": [f"u{n}" for n in log["user"]],
            "what": [f"i{n}" for n in log["item"]],
            "click": log["click"],
            "buy": log["buy"],
        }
    )
    return prepare(
        experiment(MODELS["mmoe (naive)"]), None, folder / "prepared", tables={"events": frame}
    )


def one_log(folder: Path, seed: int, impressions: int) -> list[tuple[str, dict[str, float]]]:
    """Every model on one log."""
    data = prepared(folder, seed, impressions)
    truth = generate(seed, impressions)["truth"][data.interactions("test")["row"]]
    would_buy = np.random.default_rng(seed).random(len(truth)) < truth
    found = []
    for number, (name, towers) in enumerate(MODELS.items()):
        logits = predicted(experiment(towers), data, folder / str(number))
        found.append((name, figures(logits, truth, would_buy)))
    return found


def predicted(declared: Any, data: Any, folder: Path) -> np.ndarray:
    """Logits of buy given a click on every test impression, of the best step of a run."""
    from mtrec_jax.evaluation.collect import collect
    from mtrec_jax.models.serve import prepared_serving
    from mtrec_jax.train.loop import train
    from mtrec_jax.train.run import load_best

    run = train(declared, data, folder, show_progress=False)
    params, tables, _ = load_best(run)
    serving = prepared_serving(run.experiment, run.prepared)
    found = collect(run.experiment, run.prepared, serving, params, tables, "test", False)
    return found.logits["buy"].astype(np.float64)


def figures(logits: np.ndarray, truth: np.ndarray, would_buy: np.ndarray) -> dict[str, float]:
    """How far predictions are from the planted probabilities."""
    from mtrec_jax.evaluation.metrics import auc

    entropy = -truth * np.log(truth) - (1 - truth) * np.log(1 - truth)
    loss = truth * np.logaddexp(0, -logits) + (1 - truth) * np.logaddexp(0, logits)
    return {
        "excess": 1000 * float(np.mean(loss - entropy)),
        "auc": auc(would_buy.astype(np.float64), logits),
        "too high": 100 * float(sigmoid(logits).mean() / truth.mean() - 1),
    }
