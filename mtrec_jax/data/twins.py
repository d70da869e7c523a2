"""Equal raw rows in different splits: they would be judged by what was learned by heart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ibis

from mtrec_jax.config import Experiment
from mtrec_jax.data.dependence import BETWEEN
from mtrec_jax.data.read import ROW
from mtrec_jax.errors import DataError


def row_in_two_splits(
    raw: Sequence[Any],
    events: Any,
    experiment: Experiment,
    place: Callable[[int], str] = "row {}".format,
) -> None:
    """Stop if equal raw rows are in different splits.

    With user, item and time a row equal to another is the same event, and one is too many. Other
    rows may be equal by chance: then judged rows with a twin in training are compared with the
    training rows that have one themselves.

    Args:
      raw: Ibis tables of raw text columns and `_row`, one a source of events.
      events: Ibis table with row and split.
      experiment: where duplicates are dropped within one source nothing can be left.
      place: says where a source row is.

    Raises:
      DataError: with the number of rows and the first pair.
    """
    if len(raw) == 1 and experiment.clean.duplicates == "drop":
        return
    names = [n for n in raw[0].columns if n != ROW and all(n in t.columns for t in raw)]
    keyed = bool(experiment.data.user and experiment.data.item and experiment.data.time)
    cells = [
        t.select(ROW, main=ibis.literal(i == 0), **_texts(t, names)) for i, t in enumerate(raw)
    ]
    whole = ibis.union(*cells) if len(cells) > 1 else cells[0]
    # equal rows have equal hashes, so that rows seldom have to be compared in full
    missing = [whole[name].fill_null("\x00") for name in names]
    hashed = whole.select(ROW, "main", hash=ibis.literal("\x01").join(missing).hash())
    if _in_two_splits(hashed, ["hash"], events, keyed) is None:
        return
    if (problem := _in_two_splits(whole, names, events, keyed)) is None:
        return
    found, pair = problem
    remedy = (
        "take these rows out of the training files"
        if experiment.split.kind == "files"
        else "set clean.duplicates = 'drop'"
    )
    raise DataError(
        f"{found['shared']:,} of {found['judged']:,} validation and test rows are equal in every "
        f"column to a row of another split, e.g. {place(pair['first'])} and {place(pair['twin'])}"
        + (f" (training rows among themselves: {found['twins'] or 0:,})" if not keyed else "")
        + f": they would be judged by what was learned by heart. To judge on new rows, {remedy}"
    )


def _texts(table: Any, names: list[str]) -> dict[str, Any]:
    """Columns as text; missing elements of lists keep their places."""
    cells = {name: table[name] for name in names}
    for name, cell in cells.items():
        if cell.type().is_array():
            cells[name] = cell.map(lambda element: element.fill_null("\x00")).join(BETWEEN)
    return cells


def _in_two_splits(
    rows: Any, names: list[str], events: Any, keyed: bool
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """How many rows are equal in `names` to one of another split, and the first pair of such rows.

    None where there are no more of them than equal training rows suggest.
    """
    rows = rows.left_join(events.select("row", "split"), [(ROW, "row")])
    dropped = rows.split.isnull() & rows.main  # as a duplicate, before: a twin of what is left
    trains = rows.split.isin((0, 3)).fill_null(False) | dropped
    validates, tests = ((rows.split == n).fill_null(False) for n in (1, 2))
    null = ibis.null("int64")
    groups = rows.group_by(names).agg(
        train=trains.sum(),
        validation=validates.sum(),
        test=tests.sum(),
        first=ibis.ifelse(trains | validates, rows[ROW], null).min(),
        twin=ibis.ifelse(validates | tests, rows[ROW], null).max(),
    )
    judged = groups.validation + groups.test
    shared = (groups.train > 0) & (judged > 0)
    if keyed:
        shared |= (groups.validation > 0) & (groups.test > 0)
    (found,) = (
        groups.agg(
            train=groups.train.sum(),
            judged=judged.sum(),
            twins=ibis.ifelse(groups.train > 1, groups.train, 0).sum(),
            shared=ibis.ifelse(shared, judged, 0).sum(),
        )
        .to_pyarrow()
        .to_pylist()
    )
    limit = 0.0
    if not keyed:
        limit = 5 * (found["twins"] or 0) / max(found["train"] or 0, 1) + 0.01
    share = (found["shared"] or 0) / max(found["judged"] or 0, 1)
    if share <= limit:
        return None
    return found, groups.filter(shared).order_by("first").limit(1).to_pyarrow().to_pylist()[0]
