"""Features: fitted on training values, then applied to every value that comes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from mtrec_jax.config import Feature
from mtrec_jax.data.dataset import IdField, NumberField
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, UNKNOWN

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class Encoding:
    """A fitted feature."""

    name: str
    feature: Feature
    values: pa.StringArray  # vocabulary, or lower edges of the bins as text; row r is id r + 2
    counts: np.ndarray  # training rows of each value
    mean: float = 0.0
    std: float = 1.0

    @property
    def slots(self) -> int:
        """Ids that one row takes."""
        return self.feature.max_values if self.feature.kind == "multi_valued" else 1

    @property
    def field(self) -> IdField | NumberField:
        """What the manifest says about the feature."""
        if self.feature.kind == "numeric":
            return NumberField(name=self.name, mean=self.mean, std=self.std)
        size = FIRST + len(self.values)
        placement = self.feature.placement
        return IdField(name=self.name, size=size, slots=self.slots, placement=placement)


def fit(name: str, feature: Feature, cells: pa.Array, counts: Int[np.ndarray, " n"]) -> Encoding:
    """Learn a feature from its training cells (text or lists of text) and how often each occurs.

    Vocabularies are ordered by falling count, then by value; bins hold about equally many values.

    Raises:
      DataError: no training cell has a usable value.
    """
    column = feature.column or name
    if feature.kind in ("numeric", "binned"):
        numbers = _numbers(cells)
        known = ~np.isnan(numbers)
        if not known.any():
            raise DataError(
                f"feature '{name}': no training value of column '{column}' is a number. Use "
                f"kind = 'categorical', or remove the feature"
            )
        values, inverse = np.unique(numbers[known], return_inverse=True)
        sizes = np.bincount(inverse, counts[known]).astype(np.int64)
        if feature.kind == "binned":
            return _fit_bins(name, feature, values, sizes)
        mean = float((values * sizes).sum() / sizes.sum())
        std = float(np.sqrt((np.square(values - mean) * sizes).sum() / sizes.sum()))
        return Encoding(name, feature, pa.array([], pa.string()), sizes[:0], mean, std or 1.0)
    values, rows, _ = _values(cells, feature)
    table = pa.table({"value": values, "count": counts[rows]})
    table = table.group_by("value").aggregate([("count", "sum")])
    table = table.filter(pc.greater_equal(table["count_sum"], feature.min_count))
    if not len(table):
        raise DataError(
            f"feature '{name}': column '{column}' has no training value that occurs "
            f"{max(feature.min_count, 1)} times or more. Lower min_count, or remove the feature"
        )
    table = table.sort_by([("count_sum", "descending"), ("value", "ascending")]).combine_chunks()
    vocabulary = pa.concat_arrays(table["value"].chunks)
    return Encoding(name, feature, vocabulary, table["count_sum"].to_numpy())


def _fit_bins(
    name: str, feature: Feature, values: Float[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]
) -> Encoding:
    """Lower edges at the quantiles k / bins of the values; equal edges are one bin."""
    below = np.cumsum(sizes)
    wanted = np.arange(feature.bins) * below[-1] / feature.bins
    edges = np.unique(values[np.searchsorted(below, wanted, side="right")])
    inside = np.searchsorted(edges, values, side="right") - 1
    counts = np.bincount(inside, sizes, len(edges)).astype(np.int64)
    return Encoding(name, feature, pa.array([repr(float(e)) for e in edges], pa.string()), counts)


def encode(
    encoding: Encoding, cells: pa.Array
) -> Int[np.ndarray, "n slots"] | Float[np.ndarray, " n"]:
    """Ids `[n, slots]` (0: missing, 1: unknown or rare), or scaled numbers `[n]` (0: missing)."""
    kind = encoding.feature.kind
    if kind in ("numeric", "binned"):
        numbers = _numbers(cells)
        if kind == "numeric":
            scaled = np.nan_to_num((numbers - encoding.mean) / encoding.std)
            return scaled.astype(np.float32)
        edges = np.array([float(v) for v in encoding.values.to_pylist()])
        bins = np.maximum(np.searchsorted(edges, numbers, side="right") - 1, 0) + FIRST
        return np.where(np.isnan(numbers), 0, bins).astype(np.int32)[:, None]
    if kind == "categorical" and not pa.types.is_list(cells.type):
        return np.where(cells.is_valid(), _vocabulary_ids(encoding, cells), 0)[:, None]
    values, rows, slots = _values(cells, encoding.feature)
    ids = np.zeros((len(cells), encoding.slots), np.int32)
    ids[rows, slots] = _vocabulary_ids(encoding, values)
    return ids


def _vocabulary_ids(encoding: Encoding, values: pa.StringArray) -> Int[np.ndarray, " n"]:
    found = pc.fill_null(pc.index_in(values, value_set=encoding.values), UNKNOWN - FIRST)
    return found.to_numpy(zero_copy_only=False) + np.int32(FIRST)


def unreadable(feature: Feature, cells: pa.Array, counts: Int[np.ndarray, " n"]) -> int:
    """How many training cells of a numeric or binned feature hold text that is no number."""
    if feature.kind not in ("numeric", "binned"):
        return 0
    return int(counts[np.isnan(_numbers(cells)) & np.asarray(cells.is_valid())].sum())


def encode_all(
    encodings: list[Encoding], cells: dict[str, pa.Array], rows: int
) -> tuple[Int[np.ndarray, "n M"], Float[np.ndarray, "n C"]]:
    """All features of a table of `rows` rows: ids slot by slot, and numbers, in their order."""
    ids, numbers = [np.zeros((rows, 0), np.int32)], [np.zeros((rows, 0), np.float32)]
    for encoding in encodings:
        array = encode(encoding, cells[encoding.name])
        if encoding.feature.kind == "numeric":
            numbers.append(array[:, None])
        else:
            ids.append(array)
    return np.concatenate(ids, axis=1), np.concatenate(numbers, axis=1)


def _values(
    cells: pa.Array, feature: Feature
) -> tuple[pa.StringArray, Int[np.ndarray, " v"], Int[np.ndarray, " v"]]:
    """Every value of every cell, its row and its slot, without missing and surplus values."""
    if feature.kind == "multi_valued":
        if not pa.types.is_list(cells.type):
            cells = pc.split_pattern(cells, feature.separator)
        rows = pc.list_parent_indices(cells).to_numpy()
        values = pc.utf8_trim_whitespace(cells.flatten())
    else:
        rows, values = np.arange(len(cells)), cells
    there = pc.fill_null(pc.not_equal(values, ""), False).to_numpy(zero_copy_only=False)
    values, rows = values.filter(pa.array(there)), rows[there]
    first = np.searchsorted(rows, rows, side="left")
    slots = np.arange(len(rows)) - first
    kept = slots < (feature.max_values if feature.kind == "multi_valued" else 1)
    return values.filter(pa.array(kept)), rows[kept], slots[kept]


def _numbers(cells: pa.Array) -> Float[np.ndarray, " n"]:
    """Text as float64, NaN where it is missing or no finite number of 32 bits."""
    text = pc.if_else(pc.match_substring_regex(cells, NUMBER), cells, pa.scalar(None, pa.string()))
    numbers = pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False)
    return np.where(np.abs(numbers) <= np.finfo(np.float32).max, numbers, np.nan)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one contiguous array."""
    if isinstance(column, pa.Array):
        return column
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
