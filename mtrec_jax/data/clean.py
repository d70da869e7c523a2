"""Remove what cannot be used, and count every removal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ibis

from mtrec_jax.config import Clean, Experiment
from mtrec_jax.data.dataset import Rule
from mtrec_jax.data.read import EXAMPLES, ROW
from mtrec_jax.data.schema import Source, count, typed
from mtrec_jax.errors import DataError


def clean_source(backend: Any, experiment: Experiment, source: Source) -> tuple[Any, list[Rule]]:
    """Typed events of one source without malformed, keyless and repeated rows; and the report.

    Raises:
      DataError: more rows are malformed than `clean.max_bad_fraction` allows.
    """
    table = backend.create_table(f"typed_{source.name}", typed(experiment, source))
    found = table.group_by("problem").agg(n=table.count()).to_pyarrow().to_pylist()
    removed = {r["problem"]: r["n"] for r in found if r["problem"] is not None}
    rules = [Rule(rule=f"{source.name}: rows read", rows=source.rows), *_bad_lines(source)]
    for problem in sorted(removed, reverse=True):  # "missing" before "malformed"
        first = table.filter(table.problem == problem).order_by("row").limit(EXAMPLES)
        shown = []
        for r in first.select("row", "evidence").to_pyarrow().to_pylist():
            text = "" if r["evidence"] is None else f": {r['evidence'][:80]!r}"
            shown.append(source.place(r["row"]) + text)
        rules.append(Rule(rule=problem, rows=removed[problem], examples=tuple(shown)))
    check_bad_fraction(experiment.clean, source, rules)
    good = table.filter(table.problem.isnull()).drop("problem", "evidence")
    if experiment.clean.duplicates == "drop":
        first = source.table.group_by(list(source.columns)).agg(row=source.table[ROW].min())
        once = backend.create_table(f"once_{source.name}", good.semi_join(first, "row"))
        again = good.anti_join(once, "row")
        if repeated := count(again):
            rows = again.order_by("row").limit(EXAMPLES).select("row").to_pyarrow()
            shown = [source.place(row) for row in rows.column("row").to_pylist()]
            rules.append(Rule(rule="duplicate row", rows=repeated, examples=tuple(shown)))
        good = once
    return good, rules


def _bad_lines(source: Source) -> list[Rule]:
    if not source.bad:
        return []
    name = f"{source.name}: malformed line"
    return [Rule(rule=name, rows=source.bad, examples=source.examples)]


def check_bad_fraction(clean: Clean, source: Source, rules: Sequence[Rule] = ()) -> list[Rule]:
    """Rules about malformed lines of a source, unless there are too many to go on.

    Raises:
      DataError: the malformed part of its rows is above `clean.max_bad_fraction`.
    """
    bad = [r for r in (rules or _bad_lines(source)) if "malformed" in r.rule]
    total = sum(r.rows for r in bad)
    if total > clean.max_bad_fraction * source.rows:
        lines = "\n".join(f"  {r.rule}: {r.rows:,}; {'; '.join(r.examples)}" for r in bad)
        raise DataError(
            f"{source.name} ({source.files()}): {total:,} of {source.rows:,} rows are malformed, "
            f"more than clean.max_bad_fraction = {clean.max_bad_fraction}:\n{lines}\n"
            "Fix these rows, or raise clean.max_bad_fraction to leave them out"
        )
    return bad


def k_core(backend: Any, events: Any, clean: Clean) -> tuple[Any, list[Rule]]:
    """Events of users and items that keep at least the configured number of events.

    Removing an item takes events from users and the other way round, so both rules are repeated
    until nothing changes; the result is the largest such set, whatever the order.
    """
    least = {"user": clean.min_user_events, "item": clean.min_item_events}
    least = {key: n for key, n in least.items() if n > 1}
    if not least:
        return events, []
    keys = [key for key in ("user", "item") if key in events.columns]
    core, rest, n = events.select("row", *keys), count(events), 0
    before, first = _sizes(events, keys), rest
    while rest != n:
        n = rest
        for key, minimum in least.items():
            sizes = core.group_by(key).agg(size=core.count())
            core = core.semi_join(sizes.filter(sizes["size"] >= minimum), key)
        core = backend.create_table(f"core_{rest}", core)
        rest = count(core)
    if rest == first:
        return events, []
    after = _sizes(core, keys)
    limits = ", ".join(f"clean.min_{key}_events = {minimum}" for key, minimum in least.items())
    removed = {f"{key}s": before[key] - after[key] for key in keys} | {"events": first - rest}
    rules = [Rule(rule=f"{what} removed ({limits})", rows=n) for what, n in removed.items() if n]
    return backend.create_table("in_core", events.semi_join(core, "row")), rules


def _sizes(events: Any, keys: list[str]) -> dict[str, int]:
    sizes = events.agg(**{key: events[key].nunique() for key in keys}).to_pyarrow().to_pylist()[0]
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


def missing_labels(events: Any, experiment: Experiment) -> list[Rule]:
    """How many labels of each task are missing, before sample spaces are taken into account."""
    tasks = [name for name, task in experiment.tasks.items() if task.kind != "retrieval"]
    if not tasks:
        return []
    counts = {name: events[f"label_{name}"].isnull().sum() for name in tasks}
    found = events.agg(**counts).to_pyarrow().to_pylist()[0]
    rules = {f"label of {name} missing (masked)": int(n) for name, n in found.items() if n}
    return [Rule(rule=rule, rows=n) for rule, n in rules.items()]
