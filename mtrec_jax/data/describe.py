"""What a prepared folder says about itself, and what cannot be learned from."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mtrec_jax.config import Experiment, Split
from mtrec_jax.data.dataset import FORMAT, FREE, configuration
from mtrec_jax.data.features import Text
from mtrec_jax.errors import DataError
from mtrec_jax.losses.tasks.ordinal import MOST


def fingerprint(experiment: Experiment, digests: list[str]) -> str:
    """16 hex digits that change with the format, with what of the configuration a folder depends
    on, and with any byte of the raw data."""
    config = configuration(experiment)
    config["data"] = {key: value for key, value in config["data"].items() if key not in FREE}
    known = {"format": FORMAT, "config": config, "files": digests}
    known |= {"weights": weights} if (weights := _weights(experiment)) else {}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights(experiment: Experiment) -> dict[str, str]:
    """{feature: hash of the weights that make vectors of it}."""
    found = {}
    for name, feature in experiment.features.items():
        if isinstance(feature, Text) and feature.encoder:
            from mtrec_jax.models.text.bert import weights_digest  # JAX, where it is asked for

            found[name] = weights_digest(feature.weights)
    return found


def protocol(experiment: Experiment, users: int, items: int, events: int) -> str:
    """One sentence that says how the data was cleaned and split, for reports.

    >>> from mtrec_jax.config import Data
    >>> data = Data(user="user", item="item", past="frozen")
    >>> protocol(Experiment(name="a", data=data), 604, 341, 9996)
    'leave-one-out by source row, past frozen at the split, 604 users, 341 items, 9,996 events'
    """
    clean, split, data = experiment.clean, experiment.split, experiment.data
    parts = []
    least = (max(clean.min_user_events, 1), max(clean.min_item_events, 1))
    if least[0] == least[1] > 1:
        parts.append(f"{least[0]}-core")
    elif max(least) > 1:
        parts.append(f"users with {least[0]} and items with {least[1]} events or more")
    order = "(time, source row)" if data.time else "source row"
    parts.append(_split_in_words(split, order))
    if data.length or any(f.looks_back for f in experiment.features.values()):
        parts.append("past frozen at the split" if data.past == "frozen" else "rolling past")
    if data.hide_ties:
        parts.append("events of the same timestamp hidden")
    if data.user:
        parts.append(f"{users:,} users")
    if data.item:
        parts.append(f"{items:,} items")
    return ", ".join([*parts, f"{events:,} events"])


def _split_in_words(split: Split, order: str) -> str:
    shares = f"{split.validation:.3g} validation, {split.test:.3g} test"
    chance = f"{shares}, seed {split.seed}"
    if split.whole:
        return f"every event trains, by {order}"
    match split.kind:
        case "leave_one_out":
            return f"leave-one-out by {order}"
        case "time":
            return f"split at two points in time ({shares})"
        case "user_ratio":
            return f"last events of each user by {order} ({shares})"
        case "random":
            return f"random split ({chance})"
        case "folds":
            return _fold_in_words(split)
        case "user_holdout":
            return f"held-out users ({chance}), {split.fold_in:.3g} of their events shown first"
        case "cold_user" | "cold_item":
            return f"all events of held-out {split.kind.removeprefix('cold_')}s judge ({chance})"
    files = f"test rows from {', '.join(split.test_files)}"
    if split.validation_files:
        return f"{files}, validation rows from {', '.join(split.validation_files)}"
    validation = f"{split.validation:.3g} validation, seed {split.seed}"
    return f"{files}, the rest split at random ({validation})"


def _fold_in_words(split: Split) -> str:
    """
    >>> _fold_in_words(Split(kind="folds", folds=4, by="user", hold_back=0.05))
    'fold 0 of 4 (whole users) tests, 0.05 of the others validates, seed 0'
    """
    of = {"user": " (whole users)", "time": " (windows of time)"}.get(split.by or "", "")
    if split.stratify:
        of = f" (equal shares of '{split.stratify}')"
    held = "the next validates"
    if split.by == "time":
        held = "the window before validates"
    if split.hold_back is not None:
        held = f"{split.hold_back:.3g} of the others validates"
    seed = "" if split.by == "time" else f", seed {split.seed}"
    return f"fold {split.fold} of {split.folds}{of} tests, {held}{seed}"


def check_splits(experiment: Experiment, sizes: dict[str, int]) -> None:
    """Raise `DataError` for a split without events, except one that nobody asked for."""
    split = experiment.split
    more = "raise split.validation and split.test, or bring more"
    remedy = {
        "leave_one_out": "only users with 3 events or more are evaluated; use split.kind = 'time'",
        "time": f"{more} distinct timestamps",
        "user_ratio": f"{more} events a user",
        "random": f"{more} rows",
        "folds": "lower split.folds, or bring more rows",
        "files": "raise split.validation, or check split.validation_files and split.test_files",
        "cold_item": f"{more} items",
    }.get(split.kind, f"{more} users")
    always = split.kind in ("leave_one_out", "folds", "files") and not split.whole
    wanted = {"train": True, "validation": split.validates, "test": split.test > 0 or always}
    for name, size in sizes.items():
        asked = wanted.get(name, True)
        if not size and asked:
            raise DataError(f"split '{name}' has no event ({split.kind}): {remedy}")


def check_labels(experiment: Experiment, name: str, counts: dict[Any, int]) -> None:
    """Raise `DataError` for a task that its training labels {label: count} cannot teach."""
    task = experiment.tasks[name]
    column = task.column or name
    total = sum(counts.values())
    if not total:
        where = f" where task '{task.where}' is 1" if task.where else ""
        raise DataError(
            f"task '{name}': no training row has a label in column '{column}'{where}. Check the "
            f"column, or remove the task"
        )
    if task.kind == "watch_time" and (min(counts) < 0 or not max(counts)):
        raise DataError(
            f"task '{name}': watch time is 0 or more, and above 0 in some training rows; column "
            f"'{column}' has {min(counts):g} .. {max(counts):g}. Remove other rows (clean.values), "
            "or set kind = 'regression'"
        )
    if task.kind == "ordinal" and len(counts) > MOST:
        raise DataError(
            f"task '{name}': column '{column}' has {len(counts):,} numbers, more than the {MOST} "
            "that can be classes in order. Round them (data.derive), or set kind = 'regression'"
        )
    if task.kind in ("binary", "multiclass", "ordinal") and len(counts) < 2:
        only = next(iter(counts))
        shown = f"{only:g}" if isinstance(only, float) else repr(only)
        key = (
            "at_least"
            if task.at_least is not None
            else "equals"
            if task.equals is not None
            else "column"
        )
        raise DataError(
            f"task '{name}': every training label is {shown} ({total:,} rows, column '{column}'). "
            f"Check tasks.{name}.{key}, or remove the task"
        )
