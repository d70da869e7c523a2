"""The raw tables that an experiment declares: staged, checked, opened in the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrec_jax.config import Experiment, Files
from mtrec_jax.data import read
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.expressions import as_text, compile_expression, names
from mtrec_jax.data.read import ROW, Staged, check_columns
from mtrec_jax.data.schema import event_features
from mtrec_jax.errors import ConfigError, DataError, nearest

EVENTS = ("events", "test", "validation")  # the sources of events; their rows are numbered through
LISTS = ("categorical", "multi_valued", "hashed", "text", "ties")  # kinds that take lists


@dataclass(frozen=True)
class Source:
    """A raw table: staged on disk, and as a table of the engine, with the derived columns."""

    staged: Staged
    table: Any  # ibis table: text columns (or lists of text) and `_row`
    columns: tuple[str, ...]  # of the raw files


def event_columns(experiment: Experiment) -> dict[str, str]:
    """{column of the events: what for}, without the labels and references."""
    data = experiment.data
    keys = {"user": data.user, "item": data.item, "time": data.time}
    columns = {column: f"data.{key}" for key, column in keys.items() if column}
    for name, column in event_features(experiment).items():
        columns.setdefault(column, f"features.{name}")
    return columns


def label_columns(experiment: Experiment) -> dict[str, str]:
    """{column of the events: which label, reference or rule needs it}."""
    columns = {}
    for name, task in experiment.tasks.items():
        if task.kind != "retrieval":
            columns[task.column or name] = f"the label of task '{name}'"
        if task.reference:
            columns[task.reference] = f"tasks.{name}.reference"
    for name, rule in experiment.clean.values.items():
        if rule.column:
            columns.setdefault(rule.column, f"clean.values.{name}.column")
    for column in experiment.clean.duplicate_columns:
        columns.setdefault(column, "clean.duplicate_columns")
    return columns


def side_columns(experiment: Experiment, side: str) -> dict[str, str]:
    """{column of the items or users table: what for}, without its key."""
    data, columns = experiment.data, {}
    on = "item" if side == "items" else "context"
    key = data.item if side == "items" else data.user
    if side == "items" and data.title:
        columns[data.title] = "data.title"
    for name, feature in experiment.features.items():
        if feature.kind == "friends_taste" and side == "items":
            columns.setdefault(feature.column or name, f"features.{name}")
        elif feature.kind in ("ties", "friends_taste"):
            continue
        elif feature.on == on and (on == "item" or data.kind == "sequences"):
            columns.setdefault(feature.column or name, f"features.{name}")
    return {column: purpose for column, purpose in columns.items() if column != key}


def read_sources(
    engine: Engine,
    experiment: Experiment,
    folder: str | Path | None,
    tables: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Source]:
    """The raw tables "events", "test", "validation", "items", "users", "queries", "ties".

    Raises:
      ConfigError: neither files nor a table for the events.
      DataError: an unknown table name, or a column that the experiment names is not there.
    """
    declared = _declared(experiment)
    for name in tables:
        if name not in declared:
            raise DataError(f"tables: no table is called '{name}'.{nearest(name, declared)}")
    columns = _needed_columns(experiment)
    sources: dict[str, Source] = {}
    next_row = 0
    for name, files in declared.items():
        by_files = experiment.split.kind == "files"
        table = tables.get(name) if by_files or name not in EVENTS[1:] else None
        if table is None and not (files and files.files):
            if name == "events":
                raise ConfigError(
                    "data.events.files: needed, unless tables={'events': ...} is given"
                )
            continue
        if table is None and folder is None:
            raise DataError(f"{name}: pass the folder of its files as `data`")
        base = Path(folder) if folder is not None else Path()
        source = open_source(
            engine,
            experiment,
            name,
            files or Files(),
            base,
            table,
            first_row=next_row if name in (*EVENTS, "queries") else 0,
            needed=_all_names(experiment, columns[name]),
        )
        if name in (*EVENTS, "queries"):
            next_row = source.staged.next_row
        have = [c for c in source.table.columns if c != ROW]
        check_columns(name, have, columns[name], source.staged.files())
        check_single(experiment, name, source)
        say(f"read {name}: {source.staged.rows:,} rows")
        sources[name] = source
    _check_sides(experiment, sources)
    return sources


def check_single(experiment: Experiment, name: str, source: Source) -> None:
    """Raise `DataError` for a column of lists where a row has one value.

    Features of ids take lists; keys, times, labels, numbers and titles do not.
    """
    data, uses = experiment.data, dict[str, str]()
    if name not in ("queries", "ties"):
        uses = {data.title: "data.title"} if name == "items" and data.title else {}
        for feature, declared in experiment.features.items():
            of_events = declared.on == "history" or data.kind == "rows"
            side = "items" if declared.on == "item" else "events" if of_events else "users"
            if (side == name or (side, name) == ("events", "rows")) and declared.kind not in LISTS:
                uses[declared.column or feature] = f"features.{feature} (kind = '{declared.kind}')"
    if name in EVENTS:
        several = ("clean.duplicate_columns",)
        uses |= {c: u for c, u in label_columns(experiment).items() if u not in several}
    keys = (data.user, data.item, data.time, data.friend, data.query)
    uses |= {column: "a key, a time or a text" for column in keys if column}
    for column, use in uses.items():
        if column in source.table.columns and source.table[column].type().is_array():
            raise DataError(
                f"{name} ({source.staged.files()}): column '{column}' holds lists, but is used as "
                f"one value: {use}. Take one value out of each list before, or declare a feature "
                "of kind = 'multi_valued'"
            )


def open_source(
    engine: Engine,
    experiment: Experiment,
    name: str,
    files: Files,
    base: Path,
    table: Any,
    first_row: int,
    needed: Collection[str],
) -> Source:
    """Stage one raw table, and open it in the engine with the columns derived from it.

    Raises:
      DataError: a file is missing, empty or unreadable, or every line of it is malformed.
      ConfigError: an expression of `data.derive` is wrong, or its name is taken.
    """
    to = engine.folder / f"raw_{name}_{first_row}"
    staged = read.stage(name, files, base, table, first_row, to, experiment.data.public, needed)
    raw = engine.read(to)
    if name in EVENTS or name == "rows":
        for column, text in experiment.data.derive.items():
            where = f"data.derive.{column}"
            if name == "rows" and not names(text, where) <= set(raw.columns):
                continue  # new rows may lack what only labels are made of
            if column.lower() in (c.lower() for c in staged.columns):
                raise ConfigError(f"{where}: {staged.files()} has a column '{column}'; rename one")
            known = {n: raw[n] for n in raw.columns if n != ROW}
            raw = raw.mutate(**{column: as_text(compile_expression(text, known, where))})
    return Source(staged, raw, staged.columns)


def _all_names(experiment: Experiment, columns: Collection[str]) -> set[str]:
    """The columns of a table that anything reads, also by way of an expression."""
    found = set(columns)
    for column, text in experiment.data.derive.items():
        found |= names(text, f"data.derive.{column}") if column in found else set()
    for name, rule in experiment.clean.values.items():
        found |= names(rule.valid, f"clean.values.{name}.valid") if rule.valid else set()
    return found


def _declared(experiment: Experiment) -> dict[str, Files | None]:
    data, split = experiment.data, experiment.split
    given = split.kind == "files"
    return {
        "events": data.events,
        "test": dataclasses.replace(data.events, files=split.test_files if given else ()),
        "validation": dataclasses.replace(
            data.events, files=split.validation_files if given else ()
        ),
        "items": data.items,
        "users": data.users,
        "queries": data.queries,
        "ties": data.ties,
    }


def _check_sides(experiment: Experiment, sources: dict[str, Source]) -> None:
    """Raise `DataError` for a feature of users, items or friends whose table is not there."""
    data = experiment.data
    for name, feature in experiment.features.items():
        column = feature.column or name
        needed = []
        if feature.kind in ("ties", "friends_taste"):
            needed = ["ties"]
        elif feature.on == "context" and data.kind == "sequences" and column != data.user:
            needed = ["users"]
        if (feature.on == "item" or feature.kind == "friends_taste") and column != data.item:
            needed.append("items")
        for side in needed:
            if side not in sources:
                raise DataError(
                    f"feature '{name}' needs the table of {side}, and there is none: declare "
                    f"data.{side}, or pass tables={{'{side}': ...}}"
                )


def _needed_columns(experiment: Experiment) -> dict[str, dict[str, str]]:
    data = experiment.data
    events = event_columns(experiment) | label_columns(experiment)
    return {
        **dict.fromkeys(EVENTS, events),
        "items": {data.item: "data.item"} | side_columns(experiment, "items"),
        "users": {data.user: "data.user"} | side_columns(experiment, "users"),
        "queries": {data.user: "data.user", data.time: "data.time", data.query: "data.query"},
        "ties": {data.user: "data.user", data.friend: "data.friend"},
    }
