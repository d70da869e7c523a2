"""The raw tables that an experiment declares: staged, checked, opened in the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrec_jax.config import Experiment, Files
from mtrec_jax.data import read
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.expressions import as_text, compile_expression, names
from mtrec_jax.data.features import FriendsTaste, Ties
from mtrec_jax.data.read import ROW, Staged, check_columns
from mtrec_jax.data.schema import columns_of, uses
from mtrec_jax.errors import ConfigError, DataError, nearest

EVENTS = ("events", "test", "validation")  # the sources of events; their rows are numbered through


@dataclass(frozen=True)
class Source:
    """A raw table: staged on disk, and as a table of the engine, with the derived columns."""

    staged: Staged
    table: Any  # ibis table: text columns (or lists of text) and `_row`
    columns: tuple[str, ...]  # of the raw files


def read_sources(
    engine: Engine,
    experiment: Experiment,
    folder: str | Path | None,
    tables: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Source]:
    """The raw tables "events", "test", "validation", "items", "users", "queries", "ties".

    Raises:
      ConfigError: neither files nor a table for the events.
      DataError: an unknown table name, or a column that the experiment names is not there.
    """
    declared = tables_of(experiment, tables)
    columns = {
        name: columns_of(experiment, "events" if name in EVENTS else name) for name in declared
    }
    sources: dict[str, Source] = {}
    next_row = 0
    for name, files in declared.items():
        if tables.get(name) is None and folder is None:
            raise DataError(f"{name}: pass the folder of its files as `data`")
        source = open_source(
            engine,
            experiment,
            name,
            files,
            Path(folder or ""),
            tables.get(name),
            first_row=next_row if name in (*EVENTS, "queries") else 0,
            needed=columns[name],
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
    table = "events" if name in ("rows", *EVENTS) else name
    for use in uses(experiment):
        if use.table != table or not use.single or (name == "rows" and use.outcome):
            continue
        if use.column in source.table.columns and source.table[use.column].type().is_array():
            raise DataError(
                f"{name} ({source.staged.files()}): column '{use.column}' holds lists, but is used "
                f"as one value: {use.purpose}. Take one value out of each list before, or declare "
                "a feature of kind = 'multi_valued'"
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
    named = all_names(experiment, name, needed)
    staged = read.stage(name, files, base, table, first_row, to, experiment.data.public, named)
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


def all_names(experiment: Experiment, table: str, columns: Collection[str]) -> set[str]:
    """The columns of a raw table that the configuration names: `columns`, and what expressions
    read."""
    found = set(columns)
    if table in EVENTS or table == "rows":
        for column, text in experiment.data.derive.items():
            found |= names(text, f"data.derive.{column}")
        for name, rule in experiment.clean.values.items():
            found |= names(rule.valid, f"clean.values.{name}.valid") if rule.valid else set()
    return found


def tables_of(experiment: Experiment, tables: Mapping[str, Any]) -> dict[str, Files]:
    """{raw table that there is: its files}, in the order in which they are read.

    Raises:
      DataError: one of the in-memory `tables` has no such name.
      ConfigError: neither files nor a table for the events.
    """
    data, split, given = experiment.data, experiment.split, experiment.split.kind == "files"
    declared = {
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
    for name in tables:
        if name not in declared:
            raise DataError(f"tables: no table is called '{name}'.{nearest(name, declared)}")
    found = {}
    for name, files in declared.items():
        in_memory = tables.get(name) is not None and (given or name not in EVENTS[1:])
        if in_memory or (files and files.files):
            found[name] = files or Files()
        elif name == "events":
            raise ConfigError("data.events.files: needed, unless tables={'events': ...} is given")
    return found


def _check_sides(experiment: Experiment, sources: dict[str, Source]) -> None:
    """Raise `DataError` for a feature of users, items or friends whose table is not there."""
    own = {"items": experiment.data.item, "users": experiment.data.user}
    for name, feature in experiment.features.items():
        table, column = feature.origin(name, experiment.data)
        needed = ["ties"] if isinstance(feature, (Ties, FriendsTaste)) else []
        needed += [table] if table in own and column != own[table] else []
        for side in needed:
            if side not in sources:
                raise DataError(
                    f"feature '{name}' needs the table of {side}, and there is none: declare "
                    f"data.{side}, or pass tables={{'{side}': ...}}"
                )
