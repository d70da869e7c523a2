"""Users and items get their ids, and what their own tables say about them."""

from __future__ import annotations

from typing import Any

import ibis
import pyarrow as pa

from mtrec_jax.config import Experiment
from mtrec_jax.data.clean import check_bad_fraction, counted
from mtrec_jax.data.dataset import Rule
from mtrec_jax.data.engine import Engine, count
from mtrec_jax.data.engine import rows as rows_of
from mtrec_jax.data.read import EXAMPLES, ROW
from mtrec_jax.data.sources import Source, side_columns
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST


def side_table(
    engine: Engine, experiment: Experiment, events: Any, key: str, source: Source | None
) -> tuple[pa.Table, list[Rule]]:
    """All users or items of the events in the order of their ids, and a report about their table.

    Items are ordered by falling training count, so that trained ones come first, then by raw id;
    users by raw id.

    Args:
      engine: keeps {key}, count and id as the table `{key}_index`.
      experiment: which columns are needed.
      events: Ibis table with the column `key` and the split.
      key: "user" or "item".
      source: the raw table of users or items, when there is one.

    Returns:
      An Arrow table of {key}, count (training events) and column_* as text.
    """
    if key not in events.columns:
        return pa.table({key: pa.array([], pa.string()), "count": pa.array([], pa.int64())}), []
    sizes = events.group_by(key).agg(count=events.count(where=events["split"] == 0))
    order = [ibis.desc("count"), key] if key == "item" else [key]
    number = ibis.row_number().over(ibis.window(order_by=order))
    index = engine.keep(f"{key}_index", sizes.mutate(id=(number + FIRST).cast("int64")))
    table, rules = index, []
    columns = side_columns(experiment, f"{key}s")
    if source is not None:
        rules = check_bad_fraction(experiment.clean, source.staged)
        raw = source.table
        raw_key = getattr(experiment.data, key)
        first = raw.filter(raw[raw_key].notnull()).group_by(raw_key).agg(first=raw[ROW].min())
        unused = raw.anti_join(first, raw[ROW] == first["first"])
        keyless = unused[raw_key].isnull()
        reason = ibis.ifelse(keyless, f"missing {key}", "row of an id already seen")
        unused = unused.select(row=unused[ROW], reason=reason, evidence=unused[raw_key])
        unused = engine.keep(f"removed_{source.staged.name}", unused)
        rules += counted(unused, source.staged, f"{source.staged.name}: ")
        rows = raw.semi_join(first, raw[ROW] == first["first"])
        rows = rows.select(**{"raw": rows[raw_key]}, **{f"column_{c}": rows[c] for c in columns})
        absent = index.anti_join(rows, index[key] == rows["raw"])
        if n := count(absent):
            name, first = source.staged.name, rows_of(absent.order_by("id").limit(EXAMPLES))
            shown = tuple(repr(r[key]) for r in first)
            if n == engine.size(f"{key}_index"):
                there = rows_of(rows.order_by("raw").select("raw").limit(EXAMPLES))
                raise DataError(
                    f"none of the {n:,} {key}s of the events has a row in the table of {name} "
                    f"({source.staged.files()}): {', '.join(shown)} are not among "
                    f"{', '.join(repr(r['raw']) for r in there) or 'no ids'} … Ids are compared "
                    "as text, with case and leading zeros; write them alike"
                )
            rules.append(Rule(rule=f"{key}s without a row in {name}", rows=n, examples=shown))
        table = index.left_join(rows, index[key] == rows["raw"]).drop("raw")
    return table.order_by("id").drop("id").to_pyarrow(), rules


def with_ids(engine: Engine, events: Any) -> Any:
    """Events with user_id and item_id (0 where the data has none) in the place of user and item."""
    for key in ("user", "item"):
        if key in events.columns:
            index = engine.read(engine.folder / f"{key}_index")
            ids = index.select(key, **{f"{key}_id": "id"})
            events = events.inner_join(ids, key).drop(key)
        else:
            events = events.mutate(**{f"{key}_id": ibis.literal(0, "int64")})
    return events
