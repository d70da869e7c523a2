"""Searches and ties of users, cleaned: queries join the histories, ties become lists of friends."""

from __future__ import annotations

from typing import Any

import ibis
import numpy as np
import pyarrow as pa

from mtrec_jax.config import Experiment
from mtrec_jax.data.clean import bad_lines, check_bad_fraction, counted
from mtrec_jax.data.dataset import Lists, Rule
from mtrec_jax.data.engine import Engine
from mtrec_jax.data.examples import QUERY
from mtrec_jax.data.features import one_array
from mtrec_jax.data.read import ROW
from mtrec_jax.data.schema import bound, query_features, seconds
from mtrec_jax.data.sources import Source
from mtrec_jax.types import FIRST, UNKNOWN


def read_queries(
    engine: Engine, experiment: Experiment, source: Source | None, events: Any
) -> tuple[Any, list[Rule]]:
    """Usable queries as row, user, time, split, feature_*, and a report; None without a source.

    Their split is 0 where a training target sees them, before the user's last training event, so
    that features can be learned from these; in the log it is QUERY for all.

    Args:
      engine: keeps the tables "typed_queries" and "removed_queries".
      experiment: names the columns.
      source: the raw queries.
      events: Ibis table of the clean events, with their split.

    Raises:
      DataError: too many lines are malformed.
    """
    if source is None:
        return None, []
    data, clean, raw = experiment.data, experiment.clean, source.table
    text, time = raw[data.time], seconds(raw[data.time], data.time_unit)
    people = events.group_by("user").agg(
        last=ibis.ifelse(events.split == 0, events.time, ibis.null("float64")).max()
    )
    typed = raw.select(row=raw[ROW], user=raw[data.user], time=time, text=raw[data.query], at=text)
    typed = typed.left_join(people.mutate(known=ibis.literal(True)), "user").drop("user_right")
    null = ibis.null("string")
    problems = [
        (typed.user.isnull(), "query: missing user", null),
        (typed.text.isnull(), "query: missing text", null),
        (typed["at"].isnull(), "query: missing time", null),
        (typed.time.isnull(), "query: malformed time", typed["at"]),
    ]
    if (earliest := bound(clean.earliest, "clean.earliest")) is not None:
        problems.append((typed.time < earliest, "query: time before clean.earliest", typed["at"]))
    if (latest := bound(clean.latest, "clean.latest")) is not None:
        problems.append((typed.time > latest, "query: time after clean.latest", typed["at"]))
    problems.append((typed.known.isnull(), "query: user without events", typed.user))
    seen = ibis.ifelse(typed.time < typed["last"], 0, QUERY).fill_null(QUERY)
    good, rules = _without(engine, experiment, source, typed.mutate(split=seen), problems)
    texts = {f"feature_{name}": good.text for name in query_features(experiment)}
    return good.select("row", "user", "time", "split", **texts), rules


def _without(
    engine: Engine,
    experiment: Experiment,
    source: Source,
    typed: Any,
    problems: list[tuple[Any, str, Any]],
) -> tuple[Any, list[Rule]]:
    """Rows without any of the problems (where, reason, evidence), and what was removed."""
    name, null = source.staged.name, ibis.null("string")
    typed = typed.mutate(
        reason=ibis.cases(*((where, reason) for where, reason, _ in problems), else_=null),
        evidence=ibis.cases(*((where, text) for where, _, text in problems), else_=null),
    )
    typed = engine.keep(f"typed_{name}", typed)
    bad = typed.filter(typed.reason.notnull()).select("row", "reason", "evidence")
    bad = engine.keep(f"removed_{name}", bad)
    rules = [Rule(rule=f"{name}: rows read", rows=source.staged.rows), *bad_lines(source.staged)]
    rules += counted(bad, source.staged)
    check_bad_fraction(experiment.clean, source.staged, rules)
    return typed.filter(typed.reason.isnull()).drop("reason", "evidence"), rules


def with_queries(engine: Engine, events: Any, queries: Any) -> Any:
    """Events with ids, and any queries among them: unknown items, no labels, split QUERY."""
    if queries is None:
        return events
    index = engine.read(engine.folder / "user_index").select("user", user_id="id")
    found = queries.inner_join(index, "user").drop("user")
    found = found.mutate(item_id=ibis.literal(UNKNOWN), split=ibis.literal(QUERY))
    texts = [name for name in found.columns if name.startswith("feature_")]
    events = events.mutate(**{name: ibis.null("string") for name in texts})
    columns = {
        name: (found[name] if name in found.columns else ibis.null(kind)).cast(kind)
        for name, kind in events.schema().items()
    }
    return events.union(found.select(**columns))


def friend_lists(
    engine: Engine, experiment: Experiment, source: Source | None, users: pa.Table
) -> tuple[Lists | None, pa.Table, list[Rule]]:
    """The friends of each user, as user indexes in the order of the ties, and a report.

    A tie counts once, from its user to its friend; both must have events. The table of users
    returns with a column for each feature of kind "ties".

    Raises:
      DataError: too many lines are malformed.
    """
    if source is None:
        return None, users, []
    data, raw = experiment.data, source.table
    ties = raw.select(row=raw[ROW], user=raw[data.user], friend=raw[data.friend])
    index = engine.read(engine.folder / "user_index").select("user", "id")
    ties = ties.left_join(index.rename(user_id="id"), "user").drop("user_right")
    ties = ties.left_join(index.select(friend="user", friend_id="id"), "friend").drop(
        "friend_right"
    )
    first = ties.row.min().over(ibis.window(group_by=["user", "friend"]))
    null = ibis.null("string")
    problems = [
        (ties.user.isnull() | ties.friend.isnull(), "tie: missing user or friend", null),
        (ties.user == ties.friend, "tie: to oneself", ties.user),
        (ties.row > first, "tie: repeated", null),
        (ties.user_id.isnull(), "tie: user without events", ties.user),
        (ties.friend_id.isnull(), "tie: friend without events", ties.friend),
    ]
    good, rules = _without(engine, experiment, source, ties, problems)
    table = good.order_by("user_id", "row").select("user_id", "friend_id").to_pyarrow()
    owner = table["user_id"].to_numpy() - FIRST
    offsets = np.searchsorted(owner, np.arange(len(users) + 1))
    friends = Lists((table["friend_id"].to_numpy() - FIRST).astype(np.int32), offsets)
    columns = [f.column or name for name, f in experiment.features.items() if f.kind == "ties"]
    if columns:
        names = one_array(users["user"]).take(pa.array(friends.values))
        lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), names)
        for column in columns:
            users = users.append_column(f"column_{column}", lists)
    return friends, users, rules
