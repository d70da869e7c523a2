"""Staged text becomes what the configuration says it means: Ibis expressions over every engine.

SQL engines promise no order of rows, so `_row`, the number of the row in its source, travels with
every row and decides every tie.
"""

from __future__ import annotations

import datetime
import functools
import time
from typing import Any, NamedTuple

import ibis

from mtrec_jax.config import Experiment, Task
from mtrec_jax.data.cells import YEAR_2200
from mtrec_jax.data.dataset import Rule
from mtrec_jax.data.engine import rows
from mtrec_jax.data.expressions import as_text, compile_expression, names, number
from mtrec_jax.data.features.clock import Clock
from mtrec_jax.data.features.gap import Gap
from mtrec_jax.data.read import ROW
from mtrec_jax.errors import ConfigError, DataError

_TIMESTAMP = (
    r"^(\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?)(\.\d+)?(?:Z|([+-])(\d{2}):?(\d{2})?)?$"
)


def seconds(text: Any, unit: str = "s") -> Any:
    """Unix time in seconds, or an ISO 8601 time (UTC where it names no zone); else NULL."""
    value = number(text) / {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    if not text.type().is_string():
        return value
    other = ibis.ifelse(value.isnull(), text, ibis.null("string"))  # few rows for the patterns

    def part(index: int) -> Any:
        return other.re_extract(_TIMESTAMP, index).nullif("")

    whole = part(1).replace("T", " ").try_cast("timestamp").epoch_seconds()
    offset = part(4).try_cast("int64") * 3600 + part(5).try_cast("int64").fill_null(0) * 60
    offset = ibis.ifelse(part(3) == "-", -offset, offset).fill_null(0)
    moment = whole + part(2).try_cast("float64").fill_null(0) - offset
    return value.fill_null(moment.cast("float64"))


def clock(feature: Clock, seconds: Any) -> Any:
    """Hour "0" .. "23" or weekday "0" (Monday) .. "6" in UTC, as text, of Unix seconds."""
    length, shift, size = feature.seconds, feature.first, feature.values
    sane = ibis.ifelse(seconds.abs() < 1e13, seconds, ibis.null("float64"))
    whole = (sane / length).floor().cast("int64") + shift
    return ((whole % size + size) % size).cast("string")


def label(task: Task, text: Any) -> Any:
    """The label of a task from its column: a number, or text for multiclass; NULL if unreadable."""
    if task.kind == "multiclass":
        return text
    if task.equals is not None:
        return (text == task.equals.strip()).cast("float64")
    value = number(text)
    if task.at_least is not None:
        return (value >= task.at_least).cast("float64")
    if task.kind == "binary":
        word = text.lower()
        true, false = (value == 1) | (word == "true"), (value == 0) | (word == "false")
        return ibis.cases((true, 1.0), (false, 0.0), else_=ibis.null("float64"))
    return value


def bound(text: str, key: str) -> float | None:
    """`clean.earliest` and `clean.latest` as seconds; None for no bound.

    >>> bound("1970-01-02", "clean.earliest")
    86400.0
    """
    if not text:
        return None
    if text == "now":
        return time.time()
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            raise ConfigError(
                f"{key} = {text!r}: give seconds, a time such as 2024-05-01T12:00, or 'now'"
            ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def typed(experiment: Experiment, table: Any, labels: bool = True) -> Any:
    """Events as row, user, item, time, label_*, reference_*, weight_*, feature_*: one name a
    meaning.

    New requests (`labels` false) may lack keys that nothing asks of them.

    `problem` names the first rule that removes a row, `evidence` is the text that breaks it,
    `broken_<rule>` says where a rule of `clean.values` takes a value away, and `odd_<n>` is text
    that counts as missing (`odd_values`). Bounds that are not "given" are left out here.
    """
    data = experiment.data
    table, problems = value_rules(experiment, table, labels)
    taken = {name: table[name] for name in table.columns if name.startswith("broken_")}
    columns: dict[str, Any] = {"row": table[ROW]}
    keyed: list[tuple[Any, str, Any]] = []
    for key, column in (("user", data.user), ("item", data.item)):
        if column in table.columns:
            columns[key] = table[column]
            keyed.append((table[column].isnull(), f"missing {key}", ibis.null("string")))
    if data.time in table.columns:
        text = table[data.time]
        columns["time"] = time = seconds(text, data.time_unit)
        keyed.append((text.isnull(), "missing time", ibis.null("string")))
        keyed.append((time.isnull(), "malformed time", text))
        if (earliest := bound(experiment.clean.earliest, "clean.earliest")) is not None:
            keyed.append((time < earliest, "time before clean.earliest", text))
        if (latest := bound(experiment.clean.latest, "clean.latest")) is not None:
            keyed.append((time > latest, "time after clean.latest", text))
    for name, task in experiment.tasks.items() if labels else ():
        if task.kind == "retrieval":
            columns[f"label_{name}"] = ibis.literal(1.0)
        else:
            text = table[task.column or name]
            columns[f"label_{name}"] = value = label(task, text)
            keyed.append((text.notnull() & value.isnull(), f"malformed label of {name}", text))
        for role, column in (("reference", task.reference), ("weight", task.weight_column)):
            if column:
                columns[f"{role}_{name}"] = number(table[column])
    for name, column in event_features(experiment, outcomes=labels).items():
        columns[f"feature_{name}"] = value = table[column]
        if isinstance(feature := experiment.features[name], Clock):
            columns[f"feature_{name}"] = clock(feature, seconds(value, data.time_unit))
    for name, rule in experiment.clean.values.items() if labels else ():
        if not rule.valid and rule.bounds != "given":
            columns[f"value_{name}"] = number(table[rule.column])
    null = ibis.null("string")
    never = (ibis.literal(False), null, null)
    problems = [*keyed, *problems, never]
    columns["problem"] = ibis.cases(*((c, rule) for c, rule, _ in problems), else_=null)
    columns["evidence"] = ibis.cases(*((c, text) for c, _, text in problems), else_=null)
    odd = _odd_cells(experiment, table) if labels else {}
    return table.select(**columns, **taken, **odd)


def odd_values(experiment: Experiment) -> dict[str, tuple[str, str]]:
    """{rule of the report: (column, how it is read)} of text that silently counts as missing."""
    found = {}
    for name, rule in experiment.clean.values.items():
        if not rule.valid:
            text = f"values: {name}: {rule.column} is no number (left as it is)"
            found[text] = (rule.column, "number")
    for column, expression in experiment.data.derive.items():
        found[f"derive: {column} = {expression} has no value, its columns have"] = (
            column,
            "derive",
        )
    return found


def _odd_cells(experiment: Experiment, table: Any) -> dict[str, Any]:
    """`odd_<n>`: the text that `odd_values` are about, NULL where there is nothing odd."""
    found = {}
    for number_of, (column, how) in enumerate(odd_values(experiment).values()):
        value = table[column]
        if how == "number":
            odd, text = number(value).isnull() & value.notnull(), as_text(value)
        else:
            read = [table[n] for n in sorted(names(experiment.data.derive[column], column))]
            odd = functools.reduce(lambda a, b: a & b, [c.notnull() for c in read], value.isnull())
            text = ibis.literal(", ").join([_shown(c) for c in read]) if read else value
        found[f"odd_{number_of}"] = ibis.ifelse(odd, text, ibis.null("string"))
    return found


def _shown(value: Any) -> Any:
    return value.join(" ") if value.type().is_array() else value.fill_null("")


def check_times(
    events: Any, unit: str, remedy: str = "Set data.time_unit to 's', 'ms' or 'us'"
) -> list[Rule]:
    """Stop if times are in another unit, or dates written as numbers; report a few late ones.

    Missing times are left out, and none at all are right.

    Raises:
      DataError: most events are after the year 2199, or all times are such as 20240131.
    """
    events = events.filter(events.time.notnull())
    time = events.time
    month, day = (time / 100).floor() % 100, time % 100
    is_date = time.between(19000101, 21001231) & month.between(1, 12) & day.between(1, 31)
    counts = {"n": events.count(), "dates": is_date.sum(), "late": (time > YEAR_2200).sum()}
    (found,) = rows(events.agg(**counts, last=time.max()))
    if not found["n"]:
        return []
    late, last = found["late"], found["last"] * {"s": 1, "ms": 1e3, "us": 1e6}[unit]
    if found["dates"] == found["n"]:
        raise DataError(
            f"data.time: every time is a number such as {last:.0f}, which looks like a date and "
            "would be read as seconds since 1970. Write dates as 2024-01-31"
        )
    if late * 2 > found["n"]:
        raise DataError(
            f"data.time: {late:,} of {found['n']:,} events are after the year 2199, such as "
            f"{last:.0f} as Unix time in '{unit}'. {remedy}"
        )
    rule = "time after the year 2199 (is data.time_unit right for all rows?)"
    return [Rule(rule=rule, rows=late)] if late else []


def value_rules(
    experiment: Experiment, table: Any, removes: bool
) -> tuple[Any, list[tuple[Any, str, Any]]]:
    """The table with `broken_<rule>` columns and values taken away, and what removes rows.

    New rows (`removes` false) stay, and may lack the column of a rule: what it takes away is then
    not there.
    """
    columns = {name: table[name] for name in table.columns if name != ROW}
    broken, missing = {}, dict[str, Any]()
    for name, rule in experiment.clean.values.items():
        key = f"clean.values.{name}.valid"
        if not removes and (rule.action == "remove" or rule.column not in columns):
            continue
        if not removes and rule.valid and not names(rule.valid, key) <= set(columns):
            continue
        if rule.valid:
            good = compile_expression(rule.valid, columns, key)
            if not good.type().is_boolean():
                raise ConfigError(
                    f"{key}: {rule.valid}: a condition is needed, that good rows fulfil, such as "
                    "price > 0"
                )
            where = ~good
        elif rule.bounds == "given":
            value, where = number(table[rule.column]), ibis.literal(False)
            if rule.low is not None:
                where = where | (value < rule.low)
            if rule.high is not None:
                where = where | (value > rule.high)
        else:
            continue
        broken[f"broken_{name}"] = where = where.fill_null(False)
        if rule.action == "missing":
            kept = missing.get(rule.column, table[rule.column])
            missing[rule.column] = ibis.ifelse(where, ibis.null(kept.type()), kept)
    table = table.mutate(**broken, **missing) if broken else table
    problems = []
    for name, rule in experiment.clean.values.items():
        if rule.action == "remove" and f"broken_{name}" in broken:
            text = as_text(table[rule.column]) if rule.column else ibis.null("string")
            problems.append((table[f"broken_{name}"], f"values: {name}", text))
    return table, problems


class Use(NamedTuple):
    """What a column of a raw table is for."""

    table: str
    column: str
    purpose: str  # for messages
    single: bool = True  # one value a cell, no list
    outcome: bool = False  # of events that have happened: new requests do without


def uses(experiment: Experiment) -> list[Use]:
    """Every column of the raw tables that something needs, and what for; the first use names it."""
    data, found = experiment.data, list[Use]()
    for table, keys in {
        "events": ("user", "item", "time"),
        "items": ("item",),
        "users": ("user",),
        "queries": ("user", "time", "query"),
        "ties": ("user", "friend"),
    }.items():
        found += [
            Use(table, getattr(data, key), f"data.{key}", outcome=key == "time") for key in keys
        ]
    for name, task in experiment.tasks.items():
        column = "" if task.kind == "retrieval" else task.column or name
        found.append(Use("events", column, f"the label of task '{name}'", outcome=True))
        found.append(Use("events", task.reference, f"tasks.{name}.reference", outcome=True))
        found.append(Use("events", task.weight_column, f"tasks.{name}.weight_column", outcome=True))
    found.append(Use("items", data.title, "data.title"))
    for name, feature in experiment.features.items():
        table, column = feature.origin(name, data)
        several, past = feature.takes_lists, feature.on == "history"
        purpose = f"features.{name}" + ("" if several else f" (kind = '{feature.kind}')")
        found.append(Use(table, column, purpose, not several, past))
    for name, rule in experiment.clean.values.items():
        found.append(Use("events", rule.column, f"clean.values.{name}.column", outcome=True))
    for column in experiment.clean.duplicate_columns:
        found.append(Use("events", column, "clean.duplicate_columns", False, True))
    return [use for use in found if use.column]


def columns_of(
    experiment: Experiment, table: str, outcomes: bool = True, keys: bool = True
) -> dict[str, str]:
    """{column of a raw table: what for}: without those of outcomes for new requests, and without
    the keys for what else a table says."""
    columns: dict[str, str] = {}
    data = experiment.data
    own = {"items": (data.item,), "users": (data.user,)}.get(table, ())
    for use in uses(experiment):
        if use.table == table and (outcomes or not use.outcome) and (keys or use.column not in own):
            columns.setdefault(use.column, use.purpose.partition(" (")[0])
    return columns


def event_features(experiment: Experiment, outcomes: bool = True) -> dict[str, str]:
    """{feature: column} of the features that are made of a column of the events; without
    `outcomes` of those that are known of a new request."""
    roles = ("request", "history") if outcomes else ("request",)
    found = {}
    for name, feature in experiment.features.items():
        table, column = feature.origin(name, experiment.data)
        if feature.on in roles and table == "events" and not isinstance(feature, Gap):
            found[name] = column
    return found


def query_features(experiment: Experiment) -> list[str]:
    """The features of the history that hold the text of queries."""
    features, data = experiment.features, experiment.data
    return [name for name, f in features.items() if f.origin(name, data)[0] == "queries"]
