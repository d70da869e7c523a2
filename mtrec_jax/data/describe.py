"""What a prepared folder says about itself, and what cannot be prepared at all."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from mtrec_jax.config import Experiment, Feature, Split
from mtrec_jax.data.dataset import FORMAT, configuration
from mtrec_jax.data.features import CLOCK, GROWING, MOST_IDS, NUMBER, NUMERIC, PAST
from mtrec_jax.errors import ConfigError, DataError, nearest


def check(experiment: Experiment) -> None:
    """Raise `ConfigError` for what only preparation can know to be impossible."""
    e, data = experiment, experiment.data
    problems = []
    for kind, names in (("features", e.features), ("tasks", e.tasks)):
        problems += [
            f"{kind}: '{name}' names a file or column; use letters, digits, '_', '-' and '.' only"
            for name in names
            if not re.fullmatch(r"[\w-][\w.-]*", name)
        ]
        lower = [name.lower() for name in names]
        problems += [
            f"{kind}: '{name}' occurs twice (upper and lower case are the same)"
            for name in names
            if lower.count(name.lower()) > 1
        ]
    for name in e.features:
        problems += [f"features.{name}{problem}" for problem in _check_feature(e, name)]
    for name in e.tasks:
        seen, task = {name}, name
        while e.tasks[task].where:
            task = e.tasks[task].where
            if task in seen:
                problems.append(f"tasks.{name}.where: the sample spaces run in a circle")
                break
            seen.add(task)
    for key, least in (("user", e.clean.min_user_events), ("item", e.clean.min_item_events)):
        if least > 1 and not getattr(data, key):
            problems.append(f"clean.min_{key}_events: needs data.{key}")
    problems += _check_clean(e)
    if problems:
        raise ConfigError(f"experiment '{e.name}':\n" + "\n".join(f"  {p}" for p in problems))


def _check_clean(e: Experiment) -> list[str]:
    """Rules that say too little, or two things at once."""
    clean, data, problems = e.clean, e.data, []
    if clean.max_user_events_a_day and not (data.user and data.time):
        problems.append("clean.max_user_events_a_day: needs data.user and data.time")
    for key in ("earliest", "latest"):
        if getattr(clean, key) and not data.time:
            problems.append(f"clean.{key}: needs data.time")
    lower = [name.lower() for name in clean.values]
    for name, rule in clean.values.items():
        key, limits = f"clean.values.{name}", [b for b in (rule.low, rule.high) if b is not None]
        if lower.count(name.lower()) > 1:
            problems.append(f"{key}: occurs twice (upper and lower case are the same)")
        if rule.valid and (limits or rule.bounds != "given"):
            problems.append(f"{key}: valid, or low, high and bounds, not both; make two rules")
        if not rule.column and (not rule.valid or rule.action == "missing"):
            problems.append(f"{key}.column: needed, the column whose values are judged")
        if rule.valid:
            continue
        if rule.bounds != "mad" and not limits:
            problems.append(f"{key}: give low, high or both")
        if rule.bounds == "mad" and limits:
            problems.append(f"{key}: bounds = 'mad' takes deviations, neither low nor high")
        if rule.bounds == "quantiles" and not all(0 <= b <= 1 for b in limits):
            problems.append(f"{key}: low and high are shares between 0 and 1, such as 0.01")
        if len(limits) == 2 and limits[0] > limits[1]:
            problems.append(f"{key}: low is above high")
        if not rule.deviations > 0:
            problems.append(f"{key}.deviations: must be above 0, not {rule.deviations}")
    return problems


def _check_feature(e: Experiment, name: str) -> list[str]:
    """What is wrong with a feature, each to be put after its name."""
    feature, data = e.features[name], e.data
    on, kind, problems = feature.on, feature.kind, []
    searches = data.queries is not None and (feature.column or name) == data.query
    of_events = on in ("history", "request")
    if on == "history":
        if kind in ("numeric", "piecewise", "text", "ties", "friends_taste"):
            problems.append(".kind: on the history one that gives ids, such as 'binned'")
        if kind == "multi_valued" and not searches:
            problems.append(".kind: one value an event on the history, such as 'categorical'")
        if name == "item":
            problems.append(": every history has the item already; rename it")
    if kind in ("ties", "friends_taste") and on != "context":
        problems.append(": friends are context of the users; use on = 'context'")
    if on == "item" and not data.item:
        problems.append(".on: 'item' needs data.item")
    if kind == "text" and of_events:
        problems.append(".kind: texts are kept for items and users, not for every event")
    if kind in (*CLOCK, "gap") and not of_events:
        problems.append(".on: an event has a time, users and items have none; use 'request' or 'history'")
    if kind in CLOCK and not (feature.column or data.time):
        problems.append(": needs data.time, or a column")
    if kind == "gap" and not (data.user and data.time):
        problems.append(".kind: 'gap' needs data.user and data.time")
    if kind in PAST and not of_events:
        problems.append(
            f".on: counts and rates of the past belong to a moment; as a feature of the {on} they "
            "would contain the outcome of the target itself. Use on = 'request' or 'history'"
        )
    numbers = [n for n, t in e.tasks.items() if t.kind in ("binary", "regression")]
    if kind in ("past_rate", "friends_taste") and feature.label not in numbers:
        hint = nearest(feature.label, numbers)
        problems.append(f".label: '{feature.label}' is no binary or regression task.{hint}")
    if not feature.separator:
        problems.append(".separator: at least one character, between the values of a cell")
    limits = {"bins": 1, "max_values": 1, "buckets": 1, "smoothing": 0}
    problems += [
        f".{key}: must be {least} or more, not {getattr(feature, key)}"
        for key, least in limits.items()
        if not getattr(feature, key) >= least
    ]
    problems += _check_table(feature)
    if feature.impute != "none" and kind in ("text", "ties", "friends_taste"):
        problems.append(f".impute: kind '{kind}' knows no missing value; use 'none'")
    if feature.impute == "median" and kind not in NUMERIC:
        problems.append(".impute: 'median' is for numbers; use 'mode', 'constant' or 'own'")
    if (feature.impute == "constant") != bool(feature.constant):
        problems.append(".impute, .constant: impute = 'constant' and its value go together")
    elif feature.constant and kind in NUMERIC and not re.fullmatch(NUMBER, feature.constant):
        problems.append(f".constant: '{feature.constant}' is no number, which '{kind}' needs")
    return problems


def _check_table(feature: Feature) -> list[str]:
    """What is wrong with the size of a feature's table."""
    limits = {"capacity": 0, "hash_rows": 0, "hash_functions": 1}
    problems = [
        f".{key}: must be {least} or more, not {getattr(feature, key)}"
        for key, least in limits.items()
        if getattr(feature, key) < least
    ]
    for key, kinds in (("capacity", GROWING), ("hash_rows", (*GROWING, "hashed"))):
        if getattr(feature, key) and feature.kind not in kinds:
            known = ", ".join(f"'{kind}'" for kind in kinds)
            problems.append(f".{key}: for features of kind {known}; remove it")
    if feature.capacity and feature.hash_rows:
        problems.append(
            ".capacity: hash_rows has room for any number of values; remove one of them"
        )
    if 0 < feature.hash_rows < feature.hash_functions:
        problems.append(".hash_functions: at most hash_rows")
    if feature.kind == "hashed" and feature.buckets > MOST_IDS:
        problems.append(f".buckets: at most {MOST_IDS:,}, which 32 bits hold")
    return problems


def fingerprint(experiment: Experiment, digests: list[str]) -> str:
    """16 hex digits that change with the format, the configuration or any byte of the raw data."""
    known = {"format": FORMAT, "config": configuration(experiment), "files": digests}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def protocol(experiment: Experiment, users: int, items: int, events: int) -> str:
    """One sentence that says how the data was cleaned and split, for reports.

    >>> from mtrec_jax.config import Clean, Data
    >>> data = Data(user="user", item="item", past="frozen")
    >>> five = Experiment(name="a", data=data, clean=Clean(min_user_events=5, min_item_events=5))
    >>> protocol(five, 604, 341, 9996)
    '5-core, leave-one-out by source row, past frozen at the split, 604 users, 341 items, 9,996 events'
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
    if data.length or any(f.kind in (*PAST, "gap") for f in experiment.features.values()):
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
            return (
                f"fold {split.fold} of {split.folds} tests, the next validates, seed {split.seed}"
            )
        case "user_holdout":
            return f"held-out users ({chance}), {split.fold_in:.3g} of their events shown first"
        case "cold_user" | "cold_item":
            return f"all events of held-out {split.kind.removeprefix('cold_')}s judge ({chance})"
    files = f"test rows from {', '.join(split.test_files)}"
    if split.validation_files:
        return f"{files}, validation rows from {', '.join(split.validation_files)}"
    validation = f"{split.validation:.3g} validation, seed {split.seed}"
    return f"{files}, the rest split at random ({validation})"


def check_splits(experiment: Experiment, sizes: dict[str, int]) -> None:
    """Raise `DataError` for a split without events, except a test split that nobody asked for."""
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
    always = ("leave_one_out", "folds", "files")
    for name, size in sizes.items():
        asked = name != "test" or split.test > 0 or split.kind in always
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
    if task.kind in ("binary", "multiclass") and len(counts) < 2:
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
