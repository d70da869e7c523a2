"""Features: fitted on training values, then applied to every value that comes; a file a kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from mtrec_jax import choices
from mtrec_jax.data.features.base import (
    Codes,
    Encoding,
    Feature,
    IdField,
    NumberField,
    as_numbers,
    one_array,
)
from mtrec_jax.data.features.binned import Binned
from mtrec_jax.data.features.categorical import Categorical
from mtrec_jax.data.features.clock import Hour, Moment, Weekday
from mtrec_jax.data.features.gap import Gap
from mtrec_jax.data.features.hashed import Hashed
from mtrec_jax.data.features.multi_valued import MultiValued
from mtrec_jax.data.features.numeric import Numeric
from mtrec_jax.data.features.past import PastCount, PastRate
from mtrec_jax.data.features.piecewise import Piecewise
from mtrec_jax.data.features.social import FriendsTaste, Ties
from mtrec_jax.data.features.text import Text
from mtrec_jax.types import UNKNOWN

KINDS: dict[str, type[Feature]] = {
    "categorical": Categorical,
    "hashed": Hashed,
    "multi_valued": MultiValued,
    "numeric": Numeric,
    "binned": Binned,
    "piecewise": Piecewise,
    "hour": Hour,
    "weekday": Weekday,
    "moment": Moment,
    "gap": Gap,
    "past_count": PastCount,
    "past_rate": PastRate,
    "text": Text,
    "ties": Ties,
    "friends_taste": FriendsTaste,
}
_LIST = r"""^\[.*['",].*\]$"""  # as a data frame writes one into a csv
CHOICE = choices.Choice(KINDS, default="categorical")


def fit(name: str, feature: Feature, cells: pa.Array, counts: Int[np.ndarray, " n"]) -> Encoding:
    """Learn a feature from its training cells and how often each occurs.

    Cells are text, lists of text, or numbers. Vocabularies are ordered by falling count, then by
    value; bins hold about equally many values. What a missing value becomes is learned here too.

    Raises:
      DataError: no training cell has a usable value.

    >>> cells = pa.array(["red", "blue", None])
    >>> colours = fit("colour", Categorical(), cells, np.array([2, 3, 1]))
    >>> colours.values.to_pylist(), encode(colours, pa.array(["red", None, "green"])).tolist()
    (['blue', 'red'], [[3], [0], [1]])
    """
    encoding = feature.fit(name, cells, counts)
    if not feature.takes_lists or not pa.types.is_string(cells.type):
        return encoding
    alike = pc.fill_null(pc.match_substring_regex(cells, _LIST), False)
    rows = int(counts[alike.to_numpy(zero_copy_only=False)].sum())
    if rows * 10 < counts.sum():
        return encoding
    shown = tuple(repr(cell) for cell in cells.filter(alike)[:3].to_pylist())
    return dataclasses.replace(encoding, as_text=rows, listed=shown)


def encode(encoding: Encoding, cells: pa.Array) -> Codes:
    """Ids or numbers `[n, slots]` of cells: text, lists of text, or numbers.

    Ids: 0 missing (or the id it is imputed by), 1 unknown or rare. Numbers: scaled; a missing one
    is the mean, unless it is imputed; with impute = "own" the last slot is 1 where it is missing.
    Piecewise codes are 0 throughout where a number is missing.
    """
    feature = encoding.feature
    if pa.types.is_string(cells.type) and feature.encoded_once:
        cells = cells.dictionary_encode()
    if pa.types.is_dictionary(cells.type):
        known = pa.concat_arrays([cells.dictionary, pa.nulls(1, cells.dictionary.type)])
        codes = feature.encode(encoding, known)
        return codes[pc.fill_null(cells.indices, len(codes) - 1).to_numpy(zero_copy_only=False)]
    return feature.encode(encoding, cells)


def restore(prepared: Any, name: str) -> Encoding:
    """A feature as it was fitted, from a prepared folder (`data.dataset.Prepared`)."""
    manifest = prepared.manifest
    declared = manifest.config["features"][name]
    feature = choices.read(CHOICE, declared, f"features.{name}", prepared.extensions)
    [field] = (field for field in manifest.fields if field.name == name)
    learned: dict[str, Any] = {"missing": field.missing, "slots": field.slots}
    if prepared.has_vocabulary(name):
        known = prepared.vocabulary(name)
        learned |= {"values": one_array(known["value"]), "counts": known["count"].to_numpy()}
    elif isinstance(field, IdField):
        learned["size"] = field.size
    if isinstance(field, NumberField):
        learned |= {"mean": field.mean, "std": field.std}
        learned["missing"] = np.nan if field.missing is None else field.missing
    return Encoding(name, feature, **learned)


def encode_all(
    encodings: Iterable[Encoding], cells: Mapping[str, pa.Array], rows: int
) -> tuple[Int[np.ndarray, "n M"], Float[np.ndarray, "n C"]]:
    """All features of a table of `rows` rows: ids and numbers, slot by slot, in their order."""
    ids, numbers = [np.zeros((rows, 0), np.int32)], [np.zeros((rows, 0), np.float32)]
    for encoding in encodings:
        array = encode(encoding, cells[encoding.name])
        (numbers if encoding.is_number else ids).append(array)
    return np.concatenate(ids, axis=1), np.concatenate(numbers, axis=1)


def unreadable(feature: Feature, cells: pa.Array) -> Bool[np.ndarray, " n"]:
    """Which text cells are no finite number where the feature needs one.

    >>> unreadable(Numeric(), pa.array(["1", "abc", None])).tolist()
    [False, True, False]
    """
    if not feature.reads_numbers:
        return np.zeros(len(cells), bool)
    return np.isnan(as_numbers(cells)) & cells.is_valid().to_numpy(zero_copy_only=False)


def unknown_codes(prepared: Any, field: IdField | NumberField) -> np.ndarray:
    """The code [1, S] of a context feature of somebody unknown: an id that training knows, as it
    stood for its rare values; of a number what a missing one is taken for."""
    if isinstance(field, IdField):
        return (np.arange(field.slots)[None] == 0).astype(np.int32) * UNKNOWN
    encoding = restore(prepared, field.name)
    if not encoding.feature.fitted:  # of friends, of whom there are none
        return np.zeros((1, field.slots), np.float32)
    return encode(encoding, pa.nulls(1, pa.string()))
