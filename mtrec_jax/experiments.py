"""Experiments from TOML: overrides, checks, and errors that name the key and the remedy."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pydantic

from mtrec_jax.arguments import a_list, shown
from mtrec_jax.config import (
    Clean,
    Data,
    Evaluate,
    Experiment,
    Feature,
    Files,
    Guard,
    Model,
    Published,
    Select,
    Split,
    Task,
    Train,
    Values,
    metrics_of,
    select_metric,
)
from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.overrides import cut, set_key

# columns of the results and names of losses and orders, which a task of that name would overwrite
RESERVED = ("user", "item", "title", "known", "rank", "row", "score", "fused", "fusion")


def built_in_names() -> list[str]:
    """Names of the experiments that come with the package.

    >>> built_in_names()
    ['census-income', 'ml-1m', 'shop', 'shop-social']
    """
    folder = resources.files("mtrec_jax") / "configs"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_experiment(
    config: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Experiment:
    """Read an experiment from a TOML file or a built-in name, then apply `key=value` overrides.

    Args:
      config: path of a TOML file, or one of `built_in_names()`.
      overrides: strings such as `"model.towers=ple"`; values are TOML, bare words are text. Or a
        mapping such as `{"model.towers": "ple"}`.

    Raises:
      ConfigError: no such file or name, invalid TOML, unknown key, wrong type or a combination
        that cannot work. The message names the key, the allowed values and the nearest spelling.

    >>> load_experiment("ml-1m", ["model.towers=ple"]).model.towers
    'ple'
    """
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(
            f"config: {shown(config)} is neither a path nor a name; name a TOML file or one of "
            f"{', '.join(built_in_names())}"
        )
    path = Path(config)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    elif str(config) in built_in_names():
        text = (resources.files("mtrec_jax") / "configs" / f"{config}.toml").read_text("utf-8")
    else:
        raise ConfigError(
            f"no configuration '{config}': it is neither a file nor one of "
            f"{', '.join(built_in_names())}.{nearest(str(config), built_in_names())}"
        )
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{config} is not valid TOML: {error}") from error
    if not isinstance(overrides, Mapping):
        overrides = dict(map(cut, a_list("overrides", overrides, ConfigError)))
    for key, value in overrides.items():
        set_key(values, key, value)
    return parse_experiment(values, where=str(config))


def parse_experiment(values: dict[str, Any], where: str = "configuration") -> Experiment:
    """Check nested dicts against the types above and return the frozen experiment.

    Raises:
      ConfigError: as `load_experiment`; `where` opens the message.
    """
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        raise ConfigError(f"{where}: {shown(values)} is a {kind}, not a mapping of sections")
    try:
        experiment = pydantic.TypeAdapter(Experiment).validate_python(_with_duplicates(values))
    except pydantic.ValidationError as error:
        problems = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise ConfigError(f"{where}:\n{problems}") from None
    check(experiment)
    return experiment


def _with_duplicates(values: Any) -> Any:
    """With the default that depends on the data: equal rows without a user are different cases,
    equal events of a user are one that was written twice."""
    tables = [values.get(key, {}) for key in ("data", "clean")] if isinstance(values, dict) else []
    if not tables or not all(isinstance(table, dict) for table in tables):
        return values
    data, clean = tables
    if data.get("user") or clean.get("duplicate_columns"):
        return values
    return {**values, "clean": {"duplicates": "keep", **clean}}


def check(experiment: Experiment) -> None:
    """Raise `ConfigError` for combinations that types alone cannot forbid."""
    e, problems = experiment, []
    if not re.fullmatch(r"[\w-][\w. -]*", e.name):
        problems.append(f"name: '{e.name}' names folders; use letters, digits, '_', '-' and '.'")
    if not e.tasks:
        problems.append("tasks: at least one is needed, e.g. [tasks.next_item] kind = 'retrieval'")
    problems += _check_history(e)
    problems += _check_split(e)
    for pair in e.guard.allow:
        name = pair.partition("/")[0]
        if name not in e.features or "/" not in pair:
            hint = "" if name in e.features else nearest(name, e.features)
            problems.append(f"guard.allow: '{pair}' is not 'feature/task' of a feature here.{hint}")
    problems += _check_encoder(e) + _check_tasks(e) + _check_fusion(e) + _check_numbers(e)
    if problems:
        raise ConfigError(f"experiment '{e.name}':\n" + "\n".join(f"  {p}" for p in problems))


def _check_history(e: Experiment) -> list[str]:
    """Who looks back needs a past; who does not, something else that tells examples apart."""
    length, problems = e.data.length, []
    why = "data.history_length is 0" if e.data.user and e.data.item else "data.user, data.item: not"
    if not length:
        problems += [
            f"features.{name}.on: no history ({why}); use 'request' for what is known of the event"
            for name, feature in e.features.items()
            if feature.on == "history"
        ]
    if length and e.data.positions > length:
        problems.append("data.positions: at most data.history_length")
    if not length and e.model.encoder == "transformer":
        problems.append(
            f"model.encoder: no history that a transformer could read ({why}); set encoder = "
            "'none' under [model]"
        )
    if not e.data.user:
        problems += [
            f"features.{name}.on: 'context' needs data.user; use 'request' for a column of the event"
            for name, feature in e.features.items()
            if feature.on == "context"
        ]
    if e.data.queries is not None and not (e.data.user and e.data.time):
        problems.append("data.queries: needs data.user and data.time")
    if e.data.hide_ties and not e.data.time:
        problems.append("data.hide_ties: needs data.time")
    if not length and not e.data.item and not e.features:
        problems.append("features: one is needed with on = 'request'; without, all rows look alike")
    return problems


def _check_split(e: Experiment) -> list[str]:
    split, problems = e.split, []
    needed = {
        "time": "time",
        "cold_item": "item",
        **dict.fromkeys(("leave_one_out", "user_ratio", "user_holdout", "cold_user"), "user"),
    }.get(split.kind)
    if needed and not getattr(e.data, needed):
        problems.append(
            f"split.kind: '{split.kind}' needs data.{needed}; 'random', 'folds' and 'files' are "
            "the ones for rows without"
        )
    for key in ("validation_files", "test_files"):
        if getattr(split, key) and split.kind != "files":
            problems.append(f"split.{key}: for split.kind = 'files'; remove it, or set that kind")
    if split.kind == "files" and not split.test_files:
        problems.append("split.test_files: needed when split.kind = 'files'")
    by_number = ("leave_one_out", "folds", "files")
    if not 0 < split.validation < 1 or not 0 <= split.test < 1:
        problems.append("split.validation, split.test: fractions between 0 and 1")
    elif split.validation + split.test >= 1 and split.kind not in by_number:
        problems.append("split.validation, split.test: together below 1, so that some train")
    if split.kind == "folds" and split.folds < 3:
        problems.append("split.folds: 3 or more: one tests, one validates, the others train")
    elif split.kind == "folds" and not 0 <= split.fold < split.folds:
        problems.append(f"split.fold: between 0 and {split.folds - 1}, not {split.fold}")
    if split.kind == "user_holdout" and not 0 < split.fold_in < 1:
        problems.append(
            "split.fold_in: a fraction between 0 and 1; split.kind = 'cold_user' shows nothing"
        )
    return problems


def _check_encoder(e: Experiment) -> list[str]:
    if e.model.encoder != "none" or not e.data.length:
        return []
    problems = [
        f"features.{name}.on: with model.encoder = 'none' nothing would read the history; remove "
        "the feature, or use model.encoder = 'transformer'"
        for name, feature in e.features.items()
        if feature.on == "history"
    ]
    if not any(feature.on in ("context", "request") for feature in e.features.values()):
        problems.append(
            "model.encoder: with 'none' and no feature on = 'context' or 'request' every user would "
            "be the same; add such a feature, or use 'transformer'"
        )
    return problems


def _check_fusion(e: Experiment) -> list[str]:
    problems, worths = [], e.model.fusion_objective
    for name, worth in worths.items():
        key = f"model.fusion_objective.{name}"
        if name not in e.tasks:
            problems.append(f"{key}: there is no such task.{nearest(name, e.tasks)}")
        elif e.tasks[name].kind not in ("retrieval", "binary"):
            problems.append(f"{key}: a retrieval or binary task is needed")
        if not 0 <= worth < float("inf"):
            problems.append(f"{key}: must be a number of 0 or more, not {worth}")
    if worths and not any(worths.values()):
        problems.append("model.fusion_objective: at least one worth must be above 0")
    return problems


def _check_tasks(e: Experiment) -> list[str]:
    problems = []
    binary = [n for n, t in e.tasks.items() if t.kind == "binary"]
    for name, task in e.tasks.items():
        if name in RESERVED:
            problems.append(
                f"tasks.{name}: the results use this name themselves; rename the task and set "
                f"column = '{task.column or name}'"
            )
        if task.reference and task.kind not in ("binary", "regression"):
            problems.append(f"tasks.{name}.reference: for binary and regression tasks; remove it")
        if task.where and task.where not in binary:
            hint = nearest(task.where, binary)
            problems.append(f"tasks.{name}.where: '{task.where}' is no binary task.{hint}")
        if task.at_least is not None and task.equals is not None:
            problems.append(f"tasks.{name}: at_least or equals, not both")
        if task.kind == "retrieval" and not e.data.item:
            problems.append(f"tasks.{name}.kind: 'retrieval' needs data.item")
        if task.kind != "binary" and (task.at_least is not None or task.equals is not None):
            problems.append(f"tasks.{name}: at_least and equals are for binary tasks")
    if sum(t.kind == "retrieval" for t in e.tasks.values()) > 1:
        problems.append("tasks: one retrieval task at most")
    if not problems and e.tasks and e.evaluate.ks:
        task_name, metric, _ = select_metric(e)
        if task_name not in e.tasks:
            hint = nearest(task_name, e.tasks)
            problems.append(f"select.metric: there is no task '{task_name}'.{hint}")
        else:
            known = metrics_of(e.tasks[task_name].kind, e.evaluate.ks)
            if metric not in known:
                problems.append(
                    f"select.metric: task '{task_name}' has {', '.join(known)}, not '{metric}'"
                )
    labels = {t.column or n: n for n, t in e.tasks.items() if t.kind != "retrieval"}
    labels |= {t.reference: n for n, t in e.tasks.items() if t.reference}
    for name, feature in e.features.items():
        column = feature.column or name
        if feature.on != "history" and column in labels:
            problems.append(
                f"features.{name}: column '{column}' is the label of task '{labels[column]}'; a "
                "label among the features leaks the answer. Remove the feature, or declare it "
                "on = 'history', where only past events show it"
            )
    return problems


def _check_numbers(e: Experiment) -> list[str]:
    problems = []
    if (e.train.epochs > 0) == (e.train.steps > 0):
        problems.append("train.epochs, train.steps: exactly one must be above 0")
    if e.model.heads > 0 and e.model.width % e.model.heads:
        problems.append("model.width: a multiple of model.heads")
    positive = {
        "model.width": e.model.width,
        "model.heads": e.model.heads,
        "model.temperature": e.model.temperature,
        "train.batch_size": e.train.batch_size,
        "train.accumulate": e.train.accumulate,
        "train.learning_rate": e.train.learning_rate,
        "train.log_every": e.train.log_every,
        "train.negatives": e.train.negatives,
        "evaluate.candidates": e.evaluate.candidates,
        "evaluate.batch_size": e.evaluate.batch_size,
    }
    problems += [
        f"{key}: must be above 0, not {value}" for key, value in positive.items() if not value > 0
    ]
    bounded: list[tuple[str, float, int]] = [
        ("data.history_length", e.data.history_length, 0),
        ("data.positions", e.data.positions, 0),
        ("data.seed", e.data.seed, 0),
        ("clean.min_user_events", e.clean.min_user_events, 0),
        ("clean.min_item_events", e.clean.min_item_events, 0),
        ("clean.max_bad_fraction", e.clean.max_bad_fraction, 0),
        ("split.seed", e.split.seed, 0),
        ("model.item_capacity", e.model.item_capacity, 0),
        ("model.layers", e.model.layers, 1 if e.model.encoder == "transformer" else 0),
        ("model.experts", e.model.experts, 1),
        ("model.task_experts", e.model.task_experts, 1),
        ("train.epochs", e.train.epochs, 0),
        ("train.steps", e.train.steps, 0),
        ("train.seed", e.train.seed, 0),
        ("train.warmup_steps", e.train.warmup_steps, 0),
        ("train.evaluate_every", e.train.evaluate_every, 0),
        ("train.checkpoint_every", e.train.checkpoint_every, 0),
        ("train.patience", e.train.patience, 0),
        ("train.input_timeout", e.train.input_timeout, 0),
        ("train.weight_decay", e.train.weight_decay, 0),
        ("train.clip_norm", e.train.clip_norm, 0),
        ("train.row_learning_rate", e.train.row_learning_rate, 0),
        ("train.row_weight_decay", e.train.row_weight_decay, 0),
        ("train.row_clip_norm", e.train.row_clip_norm, 0),
        ("train.mesh", min(e.train.mesh), 0),
        ("evaluate.neighbours", e.evaluate.neighbours, 1),
        ("evaluate.bootstrap", e.evaluate.bootstrap, 0),
    ]
    problems += [
        f"{key}: must be {least} or more, not {value}"
        for key, value, least in bounded
        if not value >= least
    ]
    for key, sizes in (
        ("expert_hidden", e.model.expert_hidden),
        ("tower_hidden", e.model.tower_hidden),
    ):
        if not sizes or min(sizes) < 1:
            problems.append(
                f"model.{key}: at least one layer, of 1 unit or more, not {list(sizes)}"
            )
    if not 0 <= e.model.dropout < 1:
        problems.append(f"model.dropout: between 0 and 1, not {e.model.dropout}")
    if not e.evaluate.ks or min(e.evaluate.ks) < 1:
        problems.append("evaluate.ks: at least one k of 1 or more")
    return problems


def _explain(error: Any) -> str:
    """One line for one pydantic error: key, allowed values, nearest spelling."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_at(location[:-1])
        return f"{key}: unknown key.{nearest(location[-1], known)} Known here: {', '.join(known)}"
    if error["type"] == "missing":
        return f"{key}: required, and missing"
    if error["type"] == "literal_error":
        allowed = error["ctx"]["expected"]
        hint = nearest(
            str(error["input"]), [a.strip("' ") for a in allowed.replace(" or ", ", ").split(",")]
        )
        return f"{key}: {error['input']!r} is not one of {allowed}.{hint}"
    return f"{key}: {error['msg']}, not {error['input']!r}"


def _fields_at(location: Sequence[str]) -> list[str]:
    """Field names of the dataclass at a path of the experiment."""
    node: Any = Experiment
    tables = {"features": Feature, "tasks": Task, "values": Values}
    for part in location:
        if node in (Feature, Task, Values, Published) or part.isdigit():
            node = Published if part.isdigit() else node
            continue
        node = {
            "data": Data, "clean": Clean, "split": Split, "guard": Guard, "model": Model,
            "train": Train, "select": Select, "evaluate": Evaluate, "events": Files, "items": Files,
            "users": Files, "queries": Files, "ties": Files,
        }.get(part, tables.get(part, node))  # fmt: skip
    return [f.name for f in dataclasses.fields(node)]
