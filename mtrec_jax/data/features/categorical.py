"""Categories: an id for each frequent value, by falling count, then by value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from mtrec_jax.data.features.base import Codes, Count, Counts, Encoding, Feature, one_array
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, UNKNOWN

IMPUTES: tuple[str, ...] = ("none", "mode", "constant", "own")
_ORDER = [("count_sum", "descending"), ("value", "ascending")]


@dataclass(frozen=True, kw_only=True)
class Categorical(Feature):
    """One value a cell; of a list, the first."""

    kind: Literal["categorical"] = "categorical"
    min_count: Count = 1  # rarer training values become the unknown id

    imputes = IMPUTES
    takes_lists = True
    grows = True

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """The vocabulary; and the id of missing values, which training may have made frequent."""
        table, fill, missing = ranked(self, cells, counts)
        table = table.filter(pc.greater_equal(table["count_sum"], self.min_count))
        if not len(table):
            raise DataError(
                f"feature '{name}': column '{self.column or name}' has no training value that "
                f"occurs {self.min_count} times or more. Lower min_count, or remove the feature"
            )
        return with_vocabulary(name, self, table, fill, missing)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """Ids: 0 missing (or the id it is imputed by), 1 unknown or rare."""
        return ids_of(encoding, cells, look_up)


def ranked(feature: Feature, cells: pa.Array, counts: Counts) -> tuple[pa.Table, str | None, int]:
    """Values by falling count, then by value; the one that stands for missing ones, if any; and how
    many cells have none, which then count for it."""
    values, rows, _ = _split(feature, cells)
    table = pa.table({"value": values, "count": counts[rows]}).group_by("value")
    found = table.aggregate([("count", "sum")]).sort_by(_ORDER)
    has = np.zeros(len(cells), bool)
    has[rows] = True
    missing = int(counts[~has].sum())
    fill = {"own": "", "constant": feature.constant}.get(feature.impute)
    if feature.impute == "mode" and len(found):
        fill = found["value"][0].as_py()
    if fill is not None and missing:
        extra = pa.table({"value": [fill], "count_sum": [missing]}).cast(found.schema)
        both = pa.concat_tables([found, extra]).group_by("value")
        found = both.aggregate([("count_sum", "sum")]).rename_columns(["value", "count_sum"])
        found = found.sort_by(_ORDER)
    return found, fill, missing


def with_vocabulary(
    name: str, feature: Feature, table: pa.Table, fill: str | None, missing: int
) -> Encoding:
    """A feature whose vocabulary are the rows of `table`; `fill` is the value of missing ones."""
    slots, values = getattr(feature, "max_values", 1), one_array(table["value"])
    encoding = Encoding(name, feature, values, table["count_sum"].to_numpy(), slots=slots)
    if fill is None:
        return encoding
    place = int(look_up(encoding, pa.array([fill], pa.string()))[0])
    return dataclasses.replace(encoding, missing=place, imputed=missing)


def look_up(encoding: Encoding, values: pa.StringArray) -> Int[np.ndarray, " n"]:
    """The id of each text; what the vocabulary does not hold is unknown."""
    found = pc.fill_null(pc.index_in(values, value_set=encoding.values), UNKNOWN - FIRST)
    return found.to_numpy(zero_copy_only=False) + np.int32(FIRST)


def ids_of(
    encoding: Encoding,
    cells: pa.Array,
    found: Callable[[Encoding, pa.StringArray], Int[np.ndarray, " n"]],
) -> Int[np.ndarray, "n slots"]:
    """Ids of cells, of whose values `found` gives each its own."""
    if not pa.types.is_list(cells.type) and not hasattr(encoding.feature, "separator"):
        there = pc.fill_null(pc.not_equal(cells, ""), False).to_numpy(zero_copy_only=False)
        return np.where(there, found(encoding, cells), np.int32(encoding.missing))[:, None]
    values, rows, slots = _split(encoding.feature, cells)
    ids = np.zeros((len(cells), encoding.slots), np.int32)
    ids[rows, slots] = found(encoding, values)
    ids[:, 0] = np.where(ids[:, 0] == 0, np.int32(encoding.missing), ids[:, 0])
    return ids


def _split(
    feature: Feature, cells: pa.Array
) -> tuple[pa.StringArray, Int[np.ndarray, " v"], Int[np.ndarray, " v"]]:
    """Every value of every cell, its row and its slot, without missing and surplus values."""
    separator, most = getattr(feature, "separator", ""), getattr(feature, "max_values", 1)
    if separator and not pa.types.is_list(cells.type):
        cells = pc.split_pattern(cells, separator)
    if pa.types.is_list(cells.type):
        rows = pc.list_parent_indices(cells).to_numpy()
        values = pc.utf8_trim_whitespace(cells.flatten())
    else:
        rows, values = np.arange(len(cells)), cells
    there = pc.fill_null(pc.not_equal(values, ""), False).to_numpy(zero_copy_only=False)
    values, rows = values.filter(pa.array(there)), rows[there]
    slots = np.arange(len(rows)) - np.searchsorted(rows, rows, side="left")
    kept = slots < most
    return values.filter(pa.array(kept)), rows[kept], slots[kept]
