"""The rules by which events are removed, or lose a value; every removal is counted and shown.

Removed rows are tables of (row, reason, evidence), kept in the engine until they are written to the
quarantine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_jax.config import Clean, Experiment, Values
from mtrec_jax.data.dataset import Rule
from mtrec_jax.data.engine import Engine, count, rows
from mtrec_jax.data.read import EXAMPLES, ROW, Staged
from mtrec_jax.data.schema import odd_values, typed
from mtrec_jax.data.sources import EVENTS, Source
from mtrec_jax.data.split import split_events
from mtrec_jax.errors import DataError

DAY = 86_400  # seconds
Bounds = tuple[float | None, float | None]  # lowest and highest value that stays


def usable_events(
    engine: Engine, experiment: Experiment, sources: dict[str, Source]
) -> tuple[Any, list[Rule], list[str], dict[str, Bounds]]:
    """All usable events, and what was removed.

    Rules apply in this order: malformed lines, missing keys, unreadable or impossible values,
    duplicates, bots, outliers by fitted bounds, k-core.

    Returns:
      The events with row, part (0 events, 1 test files, 2 validation files), user, item, time,
      label_*, reference_*, weight_* and feature_*; the report; the names of the engine's tables of
      removed rows; the bounds that were fitted, by the name of their rule.

    Raises:
      DataError: more rows are malformed than `clean.max_bad_fraction` allows.
    """
    bounds: dict[str, Bounds] = {}
    if fits_bounds(experiment):
        events, *_ = _without_bad_rows(engine, experiment, sources)
        events = engine.keep("provisional", events)
        bounds = fitted_bounds(experiment, events)
        engine.forget("provisional")
        experiment = with_bounds(experiment, bounds)
    events, rules, removed = _without_bad_rows(engine, experiment, sources)
    events, found, out = k_core(engine, events, experiment.clean)
    rules += [*found, *(bounds_rule(experiment, name, *pair) for name, pair in bounds.items())]
    return events, rules, removed + out, bounds


def _without_bad_rows(
    engine: Engine, experiment: Experiment, sources: dict[str, Source]
) -> tuple[Any, list[Rule], list[str]]:
    """Events of all event sources after the rules that look at single rows, duplicates and bots."""
    parts, rules, removed = [], list[Rule](), list[str]()
    for part, name in enumerate(EVENTS):
        if name in sources:
            events, found, out = _clean_source(engine, experiment, sources[name])
            parts.append(events.mutate(part=ibis.literal(part, "int8")))
            rules, removed = rules + found, removed + out
    events = parts[0]
    for more in parts[1:]:
        events = events.union(more)
    if experiment.clean.max_user_events_a_day:
        events, found, out = _bots(engine, events, experiment.clean.max_user_events_a_day)
        rules, removed = rules + found, removed + out
    for name, rule in experiment.clean.values.items():
        if f"broken_{name}" in events.columns:
            n = count(events.filter(events[f"broken_{name}"]))
            if n:
                rules.append(Rule(rule=f"values: {name} ({rule.column} set to missing)", rows=n))
            events = events.drop(f"broken_{name}")
    return events, rules, removed


def _clean_source(
    engine: Engine, experiment: Experiment, source: Source
) -> tuple[Any, list[Rule], list[str]]:
    """Typed events of one source without malformed, keyless, impossible and repeated rows."""
    staged = source.staged
    table = engine.keep(f"typed_{staged.name}", typed(experiment, source.table))
    bad = table.filter(table.problem.notnull())
    bad = bad.select("row", reason=bad.problem, evidence=bad.evidence)
    bad = engine.keep(f"removed_{staged.name}", bad)
    rules = [Rule(rule=f"{staged.name}: rows read", rows=staged.rows), *bad_lines(staged)]
    rules += counted(bad, staged)
    check_bad_fraction(experiment.clean, staged, rules)
    good = table.filter(table.problem.isnull()).drop("problem", "evidence")
    odd = [name for name in good.columns if name.startswith("odd_")]
    for name, rule in zip(odd, odd_values(experiment), strict=True):
        found = good.filter(good[name].notnull())
        found = found.select("row", reason=ibis.literal(rule), evidence=found[name])
        rules += counted(found, staged)
    good = good.drop(*odd)
    removed = [f"removed_{staged.name}"]
    if experiment.clean.duplicates == "drop":
        keys = experiment.clean.duplicate_columns or source.columns
        again = engine.keep(
            f"duplicates_{staged.name}", _repeated(engine, source.table, table, keys)
        )
        removed.append(f"duplicates_{staged.name}")
        rules += _rule(staged, "duplicate row", again)
        good = good.anti_join(again, "row")
    return good, rules, removed


def counted(found: Any, staged: Staged, prefix: str = "") -> list[Rule]:
    """A rule with its first rows for each reason; rows as in the tables of removed rows."""
    sizes = {r["reason"]: r["n"] for r in rows(found.group_by("reason").agg(n=found.count()))}
    rules = []
    for reason in sorted(sizes, reverse=True):  # "missing" before "malformed"
        first = found.filter(found.reason == reason).order_by("row").limit(EXAMPLES)
        shown = []
        for r in rows(first):
            text = "" if r["evidence"] is None else f": {r['evidence'][:80]!r}"
            shown.append(staged.place(r["row"]) + text)
        rules.append(Rule(rule=prefix + reason, rows=sizes[reason], examples=tuple(shown)))
    return rules


def _repeated(engine: Engine, raw: Any, typed: Any, keys: Sequence[str]) -> Any:
    """Good rows that are equal in `keys` to an earlier good row, as removed rows."""
    bad = typed.filter(typed.problem.notnull())
    found = equal_rows(engine, [raw.anti_join(bad, raw[ROW] == bad.row)], keys)
    again = found.filter(found.row > found["first"])
    return again.select("row", reason=ibis.literal("duplicate row"), evidence=ibis.null("string"))


def equal_rows(engine: Engine, tables: Sequence[Any], names: Sequence[str]) -> Any:
    """All rows of raw tables that are equal in the columns `names` to another one: `row`, and the
    `first` row that it is equal to; kept as the table "equal"."""
    keys = [f"key_{i}" for i in range(len(names))]
    columns = dict(zip(keys, names, strict=True))
    parts = [t.select(row=t[ROW], **{k: _key(t[n]) for k, n in columns.items()}) for t in tables]
    keyed = ibis.union(*parts) if len(parts) > 1 else parts[0]
    # few rows have a hash that occurs again: only they need to be compared in full
    text = ibis.literal("\x01").join([keyed[key] for key in keys])
    hashed = engine.keep("hashed", keyed.select("row", hash=text.hash()))
    often = hashed.group_by("hash").agg(n=hashed.count())
    often = hashed.semi_join(often.filter(often.n > 1), "hash").select("row")
    keyed = keyed.semi_join(engine.keep("hashed_alike", often), "row")
    alike = ibis.window(group_by=keys)
    found = keyed.select("row", first=keyed.row.min().over(alike), n=keyed.row.count().over(alike))
    found = engine.keep("equal", found.filter(found.n > 1).drop("n"))
    engine.forget("hashed")
    engine.forget("hashed_alike")
    return found


def _key(column: Any) -> Any:
    """Text that is equal where cells are: NULL equals nothing, whereas two missing cells do."""
    if column.type().is_array():
        cells = column.map(lambda cell: cell.fill_null("\x00"))
        column = column.length().cast("string").concat("\x1f", cells.join("\x1f"))
    return column.fill_null("\x00")


def _rule(staged: Staged, reason: str, removed: Any) -> list[Rule]:
    n = count(removed)
    first = rows(removed.order_by("row").limit(EXAMPLES).select("row")) if n else []
    shown = tuple(staged.place(r["row"]) for r in first)
    return [Rule(rule=reason, rows=n, examples=shown)] if n else []


def _bots(engine: Engine, events: Any, most: int) -> tuple[Any, list[Rule], list[str]]:
    """Events without those of users who have more than `most` on any day."""
    slim = engine.keep("before_bots", events.select("row", "user", "time"))
    days = slim.group_by("user", day=(slim.time / DAY).floor()).agg(n=slim.count())
    bots = days.filter(days.n > most).select("user").distinct()
    reason = f"bot: more than {most:,} events a day"
    out = slim.semi_join(bots, "user")
    out = engine.keep("bots", out.select("row", reason=ibis.literal(reason), evidence=out.user))
    engine.forget("before_bots")
    names = [r["evidence"] for r in rows(out.select("evidence").distinct().order_by("evidence"))]
    rules = []
    if names:
        shown = tuple(f"user {name}" for name in names[:EXAMPLES])
        rules = [
            Rule(rule=reason, rows=count(out), examples=shown),
            Rule(rule="users removed as bots", rows=len(names)),
        ]
    return events.anti_join(out, "row"), rules, ["bots"]


def bad_lines(staged: Staged) -> list[Rule]:
    """A rule for each reason why lines of a raw table are malformed."""
    if not staged.bad:
        return []
    table = pq.read_table(staged.malformed).sort_by("row")
    rules = []
    for reason in sorted(set(table["reason"].to_pylist())):
        found = table.filter(pa.compute.equal(table["reason"], reason))
        shown = [
            f"{staged.place(r['row'])}: {r['text'][:80]!r}"
            for r in found.slice(0, EXAMPLES).to_pylist()
        ]
        name = f"{staged.name}: malformed line ({reason})"
        rules.append(Rule(rule=name, rows=len(found), examples=tuple(shown)))
    return rules


def check_bad_fraction(clean: Clean, staged: Staged, rules: Sequence[Rule] = ()) -> list[Rule]:
    """Rules about malformed lines of a source, unless there are too many to go on.

    Raises:
      DataError: the malformed part of its rows is above `clean.max_bad_fraction`.
    """
    rules = [r for r in (rules or bad_lines(staged)) if not r.rule.startswith("values: ")]
    bad = [r for r in rules if "malformed" in r.rule]
    total = sum(r.rows for r in bad)
    if total > clean.max_bad_fraction * staged.rows:
        lines = "\n".join(f"  {r.rule}: {r.rows:,}; {'; '.join(r.examples)}" for r in bad)
        raise DataError(
            f"{staged.name} ({staged.files()}): {total:,} of {staged.rows:,} rows are malformed, "
            f"more than clean.max_bad_fraction = {clean.max_bad_fraction}:\n{lines}\n"
            "Fix these rows, or raise clean.max_bad_fraction to leave them out. Times are ISO 8601 "
            "(2024-01-31T12:00:00+01:00) or Unix time in data.time_unit; numbers have a decimal "
            "point; labels are 0 and 1, or tasks.NAME.equals says which text is a 1, at_least from "
            "which number on, and kind = 'ordinal' or 'regression' takes ratings as they are"
        )
    return bad


def k_core(engine: Engine, events: Any, clean: Clean) -> tuple[Any, list[Rule], list[str]]:
    """Events of users and items that keep at least the configured number of events.

    Removing an item takes events from users and the other way round, so both rules are repeated
    until nothing changes; the result is the largest such set, whatever the order.
    """
    least = {"user": clean.min_user_events, "item": clean.min_item_events}
    least = {key: n for key, n in least.items() if n > 1}
    if not least:
        return events, [], []
    keys = [key for key in ("user", "item") if key in events.columns]
    slim = engine.keep("before_core", events.select("row", *keys))
    before, last = _sizes(slim, keys), list(least)[-1]
    left = dict(before)
    kept: dict[str, Any] = {}  # {key: table of the users, or of the items, that stay}
    for number in itertools.count():
        old = left[last]
        for key, minimum in least.items():
            core = slim
            for other, table in kept.items():
                core = core if other == key else core.semi_join(table, other)
            found = core.group_by(key).agg(size=core.count())
            name = f"core_{key}_{number}"
            kept[key] = engine.keep(name, found.filter(found["size"] >= minimum).select(key))
            left[key] = engine.size(name)
        if left[last] == old or len(least) == 1:  # then the other rule has nothing new to remove
            break
    if all(left[key] == before[key] for key in least):
        engine.forget("before_core")
        return events, [], []
    core, parts = slim, []
    for key, table in kept.items():
        parts.append(core.anti_join(table, key).select("row"))
        core, events = core.semi_join(table, key), events.semi_join(table, key)
    limits = ", ".join(f"clean.min_{key}_events = {minimum}" for key, minimum in least.items())
    out = parts[0].union(parts[1]) if len(parts) > 1 else parts[0]
    reason = ibis.literal(f"outside the core ({limits})")
    engine.keep("outside_core", out.select("row", reason=reason, evidence=ibis.null("string")))
    after = left if len(kept) == len(keys) else _sizes(core, keys)
    engine.forget("before_core")
    sizes = {f"{key}s": before[key] - after[key] for key in keys}
    sizes |= {"events": engine.size("outside_core")}
    rules = [Rule(rule=f"{what} removed ({limits})", rows=n) for what, n in sizes.items() if n]
    return events, rules, ["outside_core"]


def _sizes(events: Any, keys: list[str]) -> dict[str, int]:
    sizes = rows(events.agg(**{key: events[key].nunique() for key in keys}))[0]
    return {key: int(size) for key, size in sizes.items()}


def sample_spaces(events: Any, experiment: Experiment) -> Any:
    """Events whose labels are missing outside the task's sample space (`where`, transitively)."""
    final: dict[str, Any] = {}

    def label(name: str) -> Any:
        if name not in final:
            value, where = events[f"label_{name}"], experiment.tasks[name].where
            if where:
                value = ibis.ifelse(label(where) == 1, value, ibis.null(value.type()))
            final[name] = value
        return final[name]

    return events.mutate(**{f"label_{name}": label(name) for name in experiment.tasks})


def check_weights(
    events: Any, experiment: Experiment, place: Callable[[int], str] = "row {}".format
) -> None:
    """Stop where a training row with a label has no weight of 0 or more, or none has one above.

    Args:
      events: Ibis table with row, split, label_* and weight_*, sample spaces taken into account.
      experiment: its tasks; those with a `weight_column` are meant.
      place: says where a source row is.

    Raises:
      DataError: with the number of such rows and the first one.
    """
    for name, task in experiment.tasks.items():
        if not task.weight_column:
            continue
        key, taught = f"tasks.{name}.weight_column", events[f"label_{name}"].notnull()
        taught = events.filter(taught & (events["split"] == 0))
        taught = taught.select("row", w=taught[f"weight_{name}"])
        bad = taught.filter(taught.w.isnull() | (taught.w < 0))
        if found := rows(bad.order_by("row").limit(1)):
            value = "no number" if found[0]["w"] is None else f"{found[0]['w']:g}"
            raise DataError(
                f"{key}: {count(bad):,} training rows with a label have no weight of 0 or more in "
                f"'{task.weight_column}', e.g. {place(found[0]['row'])}: {value}. Give each one "
                f"(data.derive: if_else(is_missing({task.weight_column}), 1, "
                f"{task.weight_column})), or remove these rows (clean.values)"
            )
        if not rows(taught.filter(taught.w > 0).limit(1)):
            raise DataError(
                f"{key}: every training row with a label weighs 0 ('{task.weight_column}'). Check "
                "the column, or remove the task"
            )


def missing_labels(events: Any, experiment: Experiment) -> list[Rule]:
    """How many labels of each task are missing, before sample spaces are taken into account."""
    tasks = [name for name, task in experiment.tasks.items() if task.kind != "retrieval"]
    if not tasks:
        return []
    counts = {name: events[f"label_{name}"].isnull().sum() for name in tasks}
    found = rows(events.agg(**counts))[0]
    named = {f"label of {name} missing (masked)": int(n) for name, n in found.items() if n}
    return [Rule(rule=rule, rows=n) for rule, n in named.items()]


def fits_bounds(experiment: Experiment) -> bool:
    """Whether a rule has bounds that the training rows decide, and so the split."""
    return any(v.bounds != "given" for v in experiment.clean.values.values() if not v.valid)


def bounds_rule(experiment: Experiment, name: str, low: float | None, high: float | None) -> Rule:
    """What the report says of fitted bounds."""
    rule = experiment.clean.values[name]
    limits = [f"{sign} {b:.15g}" for sign, b in ((">=", low), ("<=", high)) if b is not None]
    return Rule(rule=f"values: {name}: fitted {rule.column} {' and '.join(limits)}", rows=0)


def with_bounds(experiment: Experiment, bounds: dict[str, Bounds]) -> Experiment:
    """The experiment with fitted bounds in the place of quantiles and deviations."""
    given = {
        name: dataclasses.replace(rule, bounds="given", low=bounds[name][0], high=bounds[name][1])
        if name in bounds
        else rule
        for name, rule in experiment.clean.values.items()
    }
    return dataclasses.replace(
        experiment, clean=dataclasses.replace(experiment.clean, values=given)
    )


def fitted_bounds(experiment: Experiment, events: Any) -> dict[str, Bounds]:
    """The bounds by quantiles or MAD of the training rows, as numbers.

    The training rows are those of the split over the rows that pass the rules on single rows.
    """
    train = split_events(events, experiment).filter(lambda t: t["split"] == 0)
    bounds = {}
    for name, rule in experiment.clean.values.items():
        if rule.valid or rule.bounds == "given":
            continue
        found = train.group_by(value=train[f"value_{name}"]).agg(n=train.count()).to_pyarrow()
        found = found.filter(found["value"].is_valid()).sort_by("value")
        bounds[name] = _bounds(rule, found["value"].to_numpy(), found["n"].to_numpy(), name)
    return bounds


def _bounds(rule: Values, values: np.ndarray, counts: np.ndarray, name: str) -> Bounds:
    if not len(values):
        raise DataError(
            f"clean.values.{name}: no training value of '{rule.column}' is a number. Check the "
            "column, or remove the rule"
        )
    if rule.bounds == "quantiles":
        low, high = (
            None if share is None else _quantile(values, counts, share)
            for share in (rule.low, rule.high)
        )
        return low, high
    median = _quantile(values, counts, 0.5)
    away = np.abs(values - median)
    order = np.argsort(away, kind="stable")
    spread = rule.deviations * 1.4826 * _quantile(away[order], counts[order], 0.5)
    return median - spread, median + spread


def _quantile(values: np.ndarray, counts: np.ndarray, share: float) -> float:
    """The smallest of the sorted values that at least `share` of all rows do not exceed."""
    below = np.cumsum(counts)
    return float(values[np.searchsorted(below, share * below[-1] - 1e-9)])
