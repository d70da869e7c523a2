"""A recommender from tables in memory, in one call."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrec_jax.config import Experiment
from mtrec_jax.data.prepare import prepare
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.recommender import Recommender
from mtrec_jax.train.loop import train


def fit(
    events: Any,
    *,
    user: str,
    item: str,
    time: str,
    tasks: Mapping[str, str | Mapping[str, Any]],
    items: Any = None,
    title: str = "",
    users: Any = None,
    features: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> Recommender:
    """Prepare, train and load a recommender from tables in memory.

    Args:
      events: pandas, Polars or Arrow table, a row an event.
      user, item, time: its columns; time is a number (seconds) or a timestamp.
      tasks: {name: kind} or {name: {"kind": …, "column": …, …}} as in the configuration, e.g.
        `{"next_item": "retrieval", "like": {"kind": "binary", "column": "rating", "at_least": 4}}`.
      items, title: table of the items with the same item column, and its column of titles.
      users: table of the users with the same user column.
      features: further inputs, {name: {"on": …, "kind": …, "column": …}}. By default the history
        shows the tasks' label columns of past events.
      settings: further sections of the configuration, e.g. `{"train": {"epochs": 5}}`.
      folder: where prepared data and the run are kept; by default a temporary folder that lives as
        long as the recommender.
      show_progress: print progress to standard error.

    Raises:
      ConfigError, DataError: as `load_experiment`, `prepare` and `train`.
    """
    temporary = tempfile.TemporaryDirectory(prefix="mtrec-") if folder is None else None
    place = Path(temporary.name if temporary else str(folder))
    experiment = _experiment_of(user, item, time, tasks, title, features, settings)
    tables = {"events": events, "items": items, "users": users}
    tables = {name: table for name, table in tables.items() if table is not None}
    prepared = prepare(experiment, None, place / "prepared", tables=tables)
    recommender = Recommender(
        train(experiment, prepared, place / "run", show_progress=show_progress)
    )
    if temporary:
        weakref.finalize(recommender, temporary.cleanup)
    return recommender


def _experiment_of(
    user: str,
    item: str,
    time: str,
    tasks: Mapping[str, str | Mapping[str, Any]],
    title: str,
    features: Mapping[str, Mapping[str, Any]] | None,
    settings: Mapping[str, Mapping[str, Any]] | None,
) -> Experiment:
    declared = {n: {"kind": t} if isinstance(t, str) else dict(t) for n, t in tasks.items()}
    if features is None:
        features = {
            t.get("column", name): {
                "on": "history",
                "kind": "categorical" if t["kind"] == "multiclass" or "equals" in t else "binned",
            }
            for name, t in declared.items()
            if t.get("kind") not in (None, "retrieval")
        }
    values: dict[str, Any] = {
        "name": "fit",
        "data": {"user": user, "item": item, "time": time, "title": title},
        "features": {name: dict(feature) for name, feature in features.items()},
        "tasks": declared,
        "train": {"epochs": 30, "patience": 4},
    }
    for section, keys in (settings or {}).items():
        values[section] = {**values.get(section, {}), **keys}
        if "steps" in keys and section == "train" and "epochs" not in keys:
            values[section]["epochs"] = 0
    return parse_experiment(values, where="fit")
