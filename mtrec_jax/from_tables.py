"""A recommender from tables in memory, in one call."""

from __future__ import annotations

import re
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrec_jax.arguments import a_mapping, a_path, naming, shown
from mtrec_jax.compilation import use_compilation_cache
from mtrec_jax.config import Experiment
from mtrec_jax.data.prepare import prepare, up_to_date
from mtrec_jax.data.report import print_report
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import parse_experiment, set_key
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train.loop import check_start, train
from mtrec_jax.train.progress import never_silent
from mtrec_jax.train.run import check_replacement
from mtrec_jax.train.stopping import Stopped


def fit(
    events: Any,
    *,
    user: str,
    item: str,
    time: str = "",
    tasks: Mapping[str, str | Mapping[str, Any]],
    items: Any = None,
    title: str = "",
    users: Any = None,
    features: Mapping[str, str | Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> Recommender:
    """Prepare, train and load a recommender from tables in memory.

    Args:
      events: pandas, Polars or Arrow table, a row an event.
      user, item, time: its columns; time is a number (seconds) or a timestamp;
        without it events happened in the order of the table.
      tasks: {name: kind} or {name: {"kind": …, "column": …, …}} as in the configuration, e.g.
        `{"next_item": "retrieval", "like": {"kind": "binary", "column": "rating", "at_least": 4}}`.
      items, title: table of the items with the same item column, and its column of titles.
      users: table of the users with the same user column.
      features: further inputs, {name: kind} or {name: {"on": …, "kind": …, "column": …}}. By
        default the history shows the tasks' label columns of past events.
      settings: further keys of the configuration, e.g. `{"train.epochs": 5}`, or whole sections,
        e.g. `{"train": {"epochs": 5, "patience": 2}}`.
      folder: where prepared data and the run are kept; by default a temporary folder that lives as
        long as the recommender.
      show_progress: print to standard error what is prepared and cleaned away, sizes, and how
        training goes, a line a minute where that is no terminal.

    Raises:
      ConfigError, DataError: as `load_experiment`, `prepare` and `train`.
      Stopped: a signal asked to stop; with `folder` the state is saved, otherwise nothing is.
    """
    with naming(_of_fit):
        return _fit(
            *(events, items, users, folder, show_progress),
            experiment_of(user, item, time, tasks, title, features, settings),
        )


def _fit(
    events: Any,
    items: Any,
    users: Any,
    folder: str | Path | None,
    show_progress: bool,
    experiment: Experiment,
) -> Recommender:
    use_compilation_cache()
    if events is None:
        raise DataError("events: None; pass a pandas, Polars or Arrow table")
    if folder is not None:
        folder = a_path("folder", folder)
    temporary = tempfile.TemporaryDirectory(prefix="mtrec-") if folder is None else None
    place = Path(temporary.name if temporary else str(folder))
    tables = {"events": events, "items": items, "users": users}
    tables = {name: table for name, table in tables.items() if table is not None}
    kept, run = place / "prepared", place / "run"
    remedy = f"Pass another folder= than {place}"
    try:
        check_start(experiment, run)
        with never_silent(_print if show_progress else lambda _: None, "preparing") as say:
            prepared = up_to_date(experiment, None, kept, tables) or prepare(
                experiment,
                None,
                kept,
                tables=tables,
                progress=say,
                accept=lambda new: check_replacement(kept, new, run, remedy=remedy),
            )
            if show_progress:
                print_report(prepared.manifest)
            say(repr(prepared))
        recommender = Recommender(train(experiment, prepared, run, show_progress=show_progress))
    except BaseException as error:
        if temporary:
            temporary.cleanup()
            if isinstance(error, Stopped):
                stopped = str(error).partition(";")[0]
                raise Stopped(
                    f"{stopped}; its folder was temporary and is removed. Pass folder= to keep "
                    "and continue a run",
                    error.status,
                ) from None
        raise
    if temporary:
        weakref.finalize(recommender, temporary.cleanup)
    return recommender


def _of_fit(name: str) -> str:
    """What an argument of other functions is called in `fit`; "" for one that it does not have."""
    return {"run": "folder=", "overrides": "settings", "init_from": ""}.get(name, f"{name}=")


def _print(text: str) -> None:
    print(text, file=sys.stderr)


def experiment_of(
    user: str,
    item: str,
    time: str,
    tasks: Mapping[str, str | Mapping[str, Any]],
    title: str,
    features: Mapping[str, str | Mapping[str, Any]] | None,
    settings: Mapping[str, Any] | None,
) -> Experiment:
    """The experiment that the arguments of `fit` describe; same names, same errors."""
    example = "tasks={'next_item': 'retrieval'}"
    declared = {}
    for name, task in a_mapping("tasks", tasks, example).items():
        if not isinstance(task, str | Mapping):
            raise ConfigError(
                f"tasks.{name}: {shown(task)} is neither a text nor a mapping; write {example}, "
                "or {'like': {'kind': 'binary', 'column': 'stars', 'at_least': 4}}"
            )
        declared[name] = {"kind": task} if isinstance(task, str) else dict(task)
    if features is None:
        features = _past_labels(declared)
    example = "features={'genre': {'on': 'item'}}"
    for name, feature in a_mapping("features", features, example).items():
        if not isinstance(feature, str | Mapping):
            raise ConfigError(
                f"features.{name}: {shown(feature)} is no kind or mapping; write {example}"
            )
    values: dict[str, Any] = {
        "name": "fit",
        "data": {"user": user, "item": item, "time": time, "title": title},
        "features": {name: f if isinstance(f, str) else dict(f) for name, f in features.items()},
        "tasks": declared,
        "train": {},
    }
    example = "settings={'train.steps': 300}"
    for key, value in a_mapping("settings", settings or {}, example).items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            values[key] |= value
        else:
            set_key(values, key, dict(value) if isinstance(value, Mapping) else value)
    _set_length(values)
    return parse_experiment(values, where="fit")


def _set_length(values: dict[str, Any]) -> None:
    """By default 30 epochs at most, and patience; the whole log trains as long as it is told to."""
    train, split = values["train"], values.get("split")
    split = split if isinstance(split, dict) else {}
    validates = bool(split.get("validation", 1))
    if isinstance(train, dict) and (validates or split.get("test", 1)):
        if validates:
            train.setdefault("patience", 4)
        if "steps" not in train:
            train.setdefault("epochs", 30)


def _past_labels(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """A history feature for each label column; its name is the column's, made a valid name."""
    kinds = {}
    for name, task in tasks.items():
        if task.get("kind") not in (None, "retrieval"):
            numbers = task["kind"] in ("regression", "watch_time") or "at_least" in task
            kinds[str(task.get("column") or name)] = "binned" if numbers else "categorical"
    features: dict[str, dict[str, str]] = {}
    for column, kind in kinds.items():
        name = re.sub(r"[^\w.-]|^\.", "_", column)
        while name == "item" or (name != column and name in kinds) or name in features:
            name += "_"
        features[name] = {"on": "history", "kind": kind, "column": column}
    return features
