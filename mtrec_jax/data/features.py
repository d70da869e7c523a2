"""Features: fitted on training values, then applied to every value that comes."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from mtrec_jax.config import Feature
from mtrec_jax.data.dataset import FIELDS, IdField, NumberField, Prepared
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST, UNKNOWN

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
PAST = ("past_count", "past_rate")
NUMERIC = ("numeric", "binned", "piecewise", "gap", *PAST)  # kinds whose cells are numbers
WRITTEN = ("numeric", "binned", "piecewise")  # of them: numbers that stand in the raw data
GROWING = ("categorical", "multi_valued", "ties")  # kinds whose vocabulary new data extend
MOST_IDS = 2**31 - 4  # of a hashed feature, beside padding, unknown and missing
CLOCK = {"hour": 24, "weekday": 7}  # kinds with a vocabulary that is known before, and its size


@dataclass(frozen=True)
class Encoding:
    """A fitted feature."""

    name: str
    feature: Feature
    values: pa.StringArray  # vocabulary, or the edges of the bins as text; row r is id r + 2
    counts: np.ndarray  # training rows of each value
    mean: float = 0.0
    std: float = 1.0
    missing: float | int = 0.0  # id of a missing value, or the number it is taken for (nan: none)
    imputed: int = 0  # training cells without a value that were given one
    unreadable: int = 0  # training cells whose text is no number where one is needed
    unread: tuple[str, ...] = ()  # some of these texts

    @property
    def is_number(self) -> bool:
        """Whether the model gets numbers, not ids."""
        kind = self.feature.kind
        return kind in ("numeric", "piecewise", "friends_taste") or (
            kind in PAST and self.feature.on == "request"
        )

    @property
    def slots(self) -> int:
        """Ids or numbers that one row takes."""
        if not self.is_number:
            return self.feature.max_values if self.feature.kind in ("multi_valued", "ties") else 1
        if self.feature.kind == "friends_taste":
            return len(self.values)
        codes = len(self.values) - 1 if self.feature.kind == "piecewise" else 1
        return codes + (self.feature.impute == "own")

    @property
    def field(self) -> IdField | NumberField:
        """What the manifest says about the feature."""
        if self.is_number:
            missing = None if np.isnan(self.missing) else self.missing
            return NumberField(
                name=self.name, mean=self.mean, std=self.std, slots=self.slots, missing=missing
            )
        size, missing_id = FIRST + len(self.values), int(self.missing)
        if self.feature.kind == "hashed":
            size = max(FIRST + self.feature.buckets, missing_id + 1)
        return IdField(name=self.name, size=size, slots=self.slots, missing=missing_id)


def fit(name: str, feature: Feature, cells: pa.Array, counts: Int[np.ndarray, " n"]) -> Encoding:
    """Learn a feature from its training cells and how often each occurs.

    Cells are text, lists of text, or numbers. Vocabularies are ordered by falling count, then by
    value; bins hold about equally many values. What a missing value becomes is learned here too.

    Raises:
      DataError: no training cell has a usable value.

    >>> colours = fit("colour", Feature(), pa.array(["red", "blue", None]), np.array([2, 3, 1]))
    >>> colours.values.to_pylist(), encode(colours, pa.array(["red", None, "green"])).tolist()
    (['blue', 'red'], [[3], [0], [1]])
    """
    if feature.kind in NUMERIC:
        return _fit_numbers(name, feature, cells, counts)
    values, rows, _ = _values(cells, feature)
    table = pa.table({"value": values, "count": counts[rows]})
    has = np.zeros(len(cells), bool)
    has[rows] = True
    missing = int(counts[~has].sum())
    order = [("count_sum", "descending"), ("value", "ascending")]
    ranked = table.group_by("value").aggregate([("count", "sum")]).sort_by(order)
    fill = None
    if feature.impute == "mode" and len(ranked):
        fill = ranked["value"][0].as_py()
    elif feature.impute in ("constant", "own"):
        fill = feature.constant if feature.impute == "constant" else ""
    if fill is not None and missing:
        extra = pa.table({"value": [fill], "count_sum": [missing]}).cast(ranked.schema)
        both = pa.concat_tables([ranked, extra]).group_by("value")
        ranked = both.aggregate([("count_sum", "sum")]).rename_columns(["value", "count_sum"])
        ranked = ranked.sort_by(order)
    if feature.kind in CLOCK:
        found = dict(zip(ranked["value"].to_pylist(), ranked["count_sum"].to_pylist(), strict=True))
        known = [str(v) for v in range(CLOCK[feature.kind])] + [""] * ("" in found)
        ranked = pa.table({"value": known, "count_sum": [found.get(v, 0) for v in known]})
    elif feature.kind != "hashed":
        ranked = ranked.filter(pc.greater_equal(ranked["count_sum"], feature.min_count))
        if not len(ranked):
            raise DataError(
                f"feature '{name}': column '{feature.column or name}' has no training value that "
                f"occurs {max(feature.min_count, 1)} times or more. Lower min_count, or remove the "
                "feature"
            )
    if feature.kind == "hashed":
        ranked = ranked.slice(0, 0)
    encoding = Encoding(name, feature, one_array(ranked["value"]), ranked["count_sum"].to_numpy())
    if fill is None:
        return encoding
    if feature.kind == "hashed" and feature.impute == "own":
        own = FIRST + feature.buckets if missing else UNKNOWN
    else:
        own = int(_ids(encoding, pa.array([fill], pa.string()))[0])
    return dataclasses.replace(encoding, missing=own, imputed=missing)


def _fit_numbers(
    name: str, feature: Feature, cells: pa.Array, counts: Int[np.ndarray, " n"]
) -> Encoding:
    """Statistics of the numbers that are there; a missing one is imputed afterwards."""
    numbers = as_numbers(cells)
    known = ~np.isnan(numbers)
    if not known.any():
        hint = "" if feature.kind in ("gap", *PAST) else "Use kind = 'categorical', or "
        raise DataError(
            f"feature '{name}': no training value of column '{feature.column or name}' is a "
            f"number. {hint}{'remove' if hint else 'Remove'} the feature"
        )
    values, inverse = np.unique(numbers[known], return_inverse=True)
    sizes = np.bincount(inverse, counts[known]).astype(np.int64)
    is_text = ~known & np.asarray(cells.is_valid())
    unreadable, unread = int(counts[is_text].sum()), _unread(cells.filter(pa.array(is_text)))
    if unreadable > (readable := int(sizes.sum())):
        raise DataError(
            f"feature '{name}': {unreadable:,} of {unreadable + readable:,} training values of "
            f"column '{feature.column or name}' are no numbers, e.g. {', '.join(unread)}. Mend "
            "them (a decimal point, no unit), or use kind = 'categorical'"
        )
    missing = int(counts[~known].sum())
    imputed = 0 if feature.impute == "none" else missing
    fill = _fill(feature, values, sizes)
    encoding = Encoding(
        name, feature, pa.array([], pa.string()), sizes[:0], missing=fill, imputed=imputed,
        unreadable=unreadable, unread=unread,
    )  # fmt: skip
    if encoding.is_number and feature.kind != "piecewise":
        if feature.kind == "numeric" and feature.scale == "none":
            return encoding
        scaled = _scaled(feature, values)
        mean = float((scaled * sizes).sum() / sizes.sum())
        std = float(np.sqrt((np.square(scaled - mean) * sizes).sum() / sizes.sum()))
        return dataclasses.replace(encoding, mean=mean, std=std or 1.0)
    edges = _edges(feature.bins, values, sizes)
    if feature.kind == "piecewise":  # upper edges too
        edges = np.unique(np.append(edges, values[-1]))
        edges = edges if len(edges) > 1 else np.append(edges, edges + 1)
    inside = np.searchsorted(edges, values, side="right") - 1
    inner = np.bincount(inside, sizes, len(edges)).astype(np.int64)
    texts = [repr(float(edge)) for edge in edges]
    if feature.kind != "piecewise":
        place = 0
        if feature.impute == "own":
            place = FIRST + len(texts) if missing else UNKNOWN
            texts, inner = texts + [""] * (missing > 0), np.append(inner, [missing] * (missing > 0))
        elif feature.impute != "none":
            nearest = max(int(np.searchsorted(edges, fill, side="right")) - 1, 0)
            place = FIRST + nearest
            inner[nearest] += missing
        encoding = dataclasses.replace(encoding, missing=place)
    return dataclasses.replace(encoding, values=pa.array(texts, pa.string()), counts=inner)


def _unread(cells: pa.Array) -> tuple[str, ...]:
    """The first few of these texts, for a message."""
    return tuple(repr(text) for text in sorted({str(t)[:40] for t in cells.to_pylist()})[:3])


def _fill(feature: Feature, values: Float[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]) -> float:
    """The number that a missing one is taken for; nan where none is."""
    if feature.impute == "median":
        below, total = np.cumsum(sizes), int(sizes.sum())
        middle = np.searchsorted(below, [(total - 1) // 2, total // 2], side="right")
        return float(values[middle].mean())
    if feature.impute == "mode":
        return float(values[sizes.argmax()])
    if feature.impute == "constant":
        return float(feature.constant)  # `describe.check` has seen to it
    return float("nan")


def _edges(
    bins: int, values: Float[np.ndarray, " n"], sizes: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """Lower edges at the quantiles k / bins of the values; equal edges are one bin."""
    below = np.cumsum(sizes)
    wanted = np.arange(bins) * below[-1] / bins
    return np.unique(values[np.searchsorted(below, wanted, side="right")])


def restore(prepared: Prepared, name: str) -> Encoding:
    """A feature as it was fitted, from a prepared folder."""
    manifest = prepared.manifest
    feature = Feature(**manifest.config["features"][name])
    nothing = pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})
    [field] = (f for group in FIELDS for f in getattr(manifest, group) if f.name == name)
    scaled = isinstance(field, NumberField) and feature.kind not in ("piecewise", "friends_taste")
    known = nothing if scaled or feature.kind == "hashed" else prepared.vocabulary(name)
    encoding = Encoding(name, feature, one_array(known["value"]), known["count"].to_numpy())
    if isinstance(field, IdField):
        return dataclasses.replace(encoding, missing=field.missing)
    missing = np.nan if field.missing is None else field.missing
    return dataclasses.replace(encoding, mean=field.mean, std=field.std, missing=missing)


def encode(
    encoding: Encoding, cells: pa.Array
) -> Int[np.ndarray, "n slots"] | Float[np.ndarray, "n slots"]:
    """Ids or numbers `[n, slots]` of cells: text, lists of text, or numbers.

    Ids: 0 missing (or the id it is imputed by), 1 unknown or rare. Numbers: scaled; a missing one
    is the mean, unless it is imputed; with impute = "own" the last slot is 1 where it is missing.
    Piecewise codes are 0 throughout where a number is missing.
    """
    feature = encoding.feature
    if pa.types.is_string(cells.type) and feature.kind in ("hashed", "multi_valued", "ties"):
        cells = cells.dictionary_encode()  # each text is cut and hashed once
    if pa.types.is_dictionary(cells.type):
        known = pa.concat_arrays([cells.dictionary, pa.nulls(1, cells.dictionary.type)])
        codes = _encode(encoding, known)
        return codes[pc.fill_null(cells.indices, len(codes) - 1).to_numpy(zero_copy_only=False)]
    return _encode(encoding, cells)


def _encode(
    encoding: Encoding, cells: pa.Array
) -> Int[np.ndarray, "n slots"] | Float[np.ndarray, "n slots"]:
    feature = encoding.feature
    if encoding.is_number:
        return _encode_numbers(encoding, as_numbers(cells))
    if feature.kind in NUMERIC:
        numbers = as_numbers(cells)
        edges = np.array([float(v) for v in encoding.values.to_pylist() if v])
        bins = np.maximum(np.searchsorted(edges, numbers, side="right") - 1, 0) + FIRST
        return np.where(np.isnan(numbers), int(encoding.missing), bins).astype(np.int32)[:, None]
    if encoding.slots == 1 and not pa.types.is_list(cells.type):
        there = pc.fill_null(pc.not_equal(cells, ""), False).to_numpy(zero_copy_only=False)
        return np.where(there, _ids(encoding, cells), np.int32(encoding.missing))[:, None]
    values, rows, slots = _values(cells, feature)
    ids = np.zeros((len(cells), encoding.slots), np.int32)
    ids[rows, slots] = _ids(encoding, values)
    ids[:, 0] = np.where(ids[:, 0] == 0, np.int32(encoding.missing), ids[:, 0])
    return ids


def _ids(encoding: Encoding, values: pa.StringArray) -> Int[np.ndarray, " n"]:
    """The id of each text; what the vocabulary does not hold is unknown."""
    if encoding.feature.kind == "hashed":
        buckets, texts = encoding.feature.buckets, values.to_pylist()
        return np.array([FIRST + zlib.crc32((t or "").encode()) % buckets for t in texts], np.int32)
    found = pc.fill_null(pc.index_in(values, value_set=encoding.values), UNKNOWN - FIRST)
    return found.to_numpy(zero_copy_only=False) + np.int32(FIRST)


def _encode_numbers(
    encoding: Encoding, numbers: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n slots"]:
    feature, there = encoding.feature, ~np.isnan(numbers)
    numbers = np.where(there, numbers, encoding.missing)
    if feature.kind == "piecewise":
        edges = np.array([float(v) for v in encoding.values.to_pylist()])
        code = _piecewise(edges, numbers)
    else:
        scaled = (_scaled(feature, numbers) - encoding.mean) / encoding.std
        code = np.nan_to_num(scaled)[:, None].astype(np.float32)
    own = [~there[:, None]] if feature.impute == "own" else []
    return np.concatenate([code, *own], axis=1, dtype=np.float32)


def _piecewise(
    edges: Float[np.ndarray, " m"], numbers: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n bins"]:
    """Piecewise linear code: 1 for bins below a number, a fraction for its own, 0 for those above.

    Gorishniy et al. 2022, "On Embeddings for Numerical Features in Tabular Deep Learning"; here
    numbers beyond the training range are held at its ends, and a missing one is all 0.
    """
    numbers = np.nan_to_num(np.clip(numbers, edges[0], edges[-1]), nan=edges[0])
    inside = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    code = (np.arange(len(edges) - 1) < inside[:, None]).astype(np.float32)
    low, high = edges[inside], edges[inside + 1]
    code[np.arange(len(numbers)), inside] = (numbers - low) / (high - low)
    return code


def _scaled(feature: Feature, numbers: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Numbers before they are standardised: on a log scale where that is asked for."""
    if feature.kind == "past_count" or (feature.kind == "numeric" and feature.scale == "log"):
        return np.sign(numbers) * np.log1p(np.abs(numbers))
    return numbers


def unreadable(feature: Feature, cells: pa.Array) -> Bool[np.ndarray, " n"]:
    """Which text cells are no finite number where the feature needs one.

    >>> unreadable(Feature(kind="numeric"), pa.array(["1", "abc", None])).tolist()
    [False, True, False]
    """
    if feature.kind not in WRITTEN:
        return np.zeros(len(cells), bool)
    return np.isnan(as_numbers(cells)) & cells.is_valid().to_numpy(zero_copy_only=False)


def encode_all(
    encodings: list[Encoding], cells: Mapping[str, pa.Array], rows: int
) -> tuple[Int[np.ndarray, "n M"], Float[np.ndarray, "n C"]]:
    """All features of a table of `rows` rows: ids and numbers, slot by slot, in their order."""
    ids, numbers = [np.zeros((rows, 0), np.int32)], [np.zeros((rows, 0), np.float32)]
    for encoding in encodings:
        array = encode(encoding, cells[encoding.name])
        (numbers if encoding.is_number else ids).append(array)
    return np.concatenate(ids, axis=1), np.concatenate(numbers, axis=1)


def _values(
    cells: pa.Array, feature: Feature
) -> tuple[pa.StringArray, Int[np.ndarray, " v"], Int[np.ndarray, " v"]]:
    """Every value of every cell, its row and its slot, without missing and surplus values."""
    several = feature.kind in ("multi_valued", "ties")
    if several and not pa.types.is_list(cells.type):
        cells = pc.split_pattern(cells, feature.separator)
    if pa.types.is_list(cells.type):
        rows = pc.list_parent_indices(cells).to_numpy()
        values = pc.utf8_trim_whitespace(cells.flatten())
    else:
        rows, values = np.arange(len(cells)), cells
    there = pc.fill_null(pc.not_equal(values, ""), False).to_numpy(zero_copy_only=False)
    values, rows = values.filter(pa.array(there)), rows[there]
    first = np.searchsorted(rows, rows, side="left")
    slots = np.arange(len(rows)) - first
    kept = slots < (feature.max_values if several else 1)
    return values.filter(pa.array(kept)), rows[kept], slots[kept]


def as_numbers(cells: pa.Array) -> Float[np.ndarray, " n"]:
    """Cells as float64, NaN where they are missing or no finite number of 32 bits."""
    try:  # takes what NUMBER takes, and nan and inf, which are left out below
        cast = pc.cast(cells, pa.float64())
    except pa.ArrowInvalid:
        good = pc.match_substring_regex(cells, NUMBER)
        cast = pc.cast(pc.if_else(good, cells, pa.scalar(None, cells.type)), pa.float64())
    numbers = cast.to_numpy(zero_copy_only=False)
    return np.where(np.abs(numbers) <= np.finfo(np.float32).max, numbers, np.nan)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one contiguous array."""
    if isinstance(column, pa.Array):
        return column
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
