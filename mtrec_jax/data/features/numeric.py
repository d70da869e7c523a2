"""Numbers as they are, or scaled to mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Float32, Int

from mtrec_jax.data.features.base import Codes, Counts, Encoding, Feature, as_numbers
from mtrec_jax.errors import DataError

IMPUTES: tuple[str, ...] = ("none", "median", "mode", "constant", "own")
NO_HISTORY = ("context", "request", "item")
OF_IDS = "the history takes ids, such as those of kind 'binned'"
Values = Float[np.ndarray, " v"]  # distinct
Sizes = Int[np.ndarray, " v"]
Scale = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Numeric(Feature):
    """One number a cell."""

    kind: Literal["numeric"] = "numeric"
    scale: Literal["standard", "log", "none"] = "standard"  # log: sign(x) log(1 + |x|)

    places = NO_HISTORY
    because = OF_IDS
    imputes = IMPUTES
    of_numbers = True
    gives_numbers = True

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Mean and standard deviation."""
        encoding = fit_scaled(name, self, cells, counts, logarithm if self.scale == "log" else None)
        return replace(encoding, mean=0.0, std=1.0) if self.scale == "none" else encoding

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """Scaled numbers; a missing one is the mean, unless it is imputed."""
        return encode_scaled(encoding, cells, logarithm if self.scale == "log" else None)


def fit_scaled(
    name: str, feature: Feature, cells: pa.Array, counts: Counts, scale: Scale | None = None
) -> Encoding:
    """Mean and standard deviation of the training numbers, on their scale."""
    encoding, values, sizes = learned(name, feature, cells, counts)
    scaled = scale(values) if scale else values
    mean = float((scaled * sizes).sum() / sizes.sum())
    std = float(np.sqrt((np.square(scaled - mean) * sizes).sum() / sizes.sum()))
    return replace(encoding, mean=mean, std=std or 1.0, slots=1 + (feature.impute == "own"))


def encode_scaled(
    encoding: Encoding, cells: pa.Array, scale: Scale | None = None
) -> Float32[np.ndarray, "n slots"]:
    """(x - mean) / std, x on its scale."""
    numbers, there = filled(encoding, cells)
    scaled = ((scale(numbers) if scale else numbers) - encoding.mean) / encoding.std
    return marked(encoding, np.nan_to_num(scaled)[:, None].astype(np.float32), there)


def logarithm(numbers: np.ndarray) -> np.ndarray:
    """sign(x) log(1 + |x|)."""
    return np.sign(numbers) * np.log1p(np.abs(numbers))


def learned(
    name: str, feature: Feature, cells: pa.Array, counts: Counts
) -> tuple[Encoding, Values, Sizes]:
    """What a missing number is taken for; the distinct training numbers, and how often they occur.

    Raises:
      DataError: there is none, or more cells hold text.
    """
    numbers = as_numbers(cells)
    known = ~np.isnan(numbers)
    is_text = ~known & np.asarray(cells.is_valid())
    texts = sorted({str(text)[:40] for text in cells.filter(pa.array(is_text)).to_pylist()})
    unreadable, unread = int(counts[is_text].sum()), tuple(map(repr, texts[:3]))
    if not known.any():
        hint = "Use kind = 'categorical', or " if feature.reads_numbers else ""
        shown = f", e.g. {', '.join(unread)}; it has a decimal point and no unit" if unread else ""
        raise DataError(
            f"feature '{name}': no training value of column '{feature.column or name}' is a "
            f"number{shown}. {hint}{'remove' if hint else 'Remove'} the feature"
        )
    values, inverse = np.unique(numbers[known], return_inverse=True)
    sizes = np.bincount(inverse, counts[known]).astype(np.int64)
    if unreadable > (readable := int(sizes.sum())):
        raise DataError(
            f"feature '{name}': {unreadable:,} of {unreadable + readable:,} training values of "
            f"column '{feature.column or name}' are no numbers, e.g. {', '.join(unread)}. Mend "
            "them (a decimal point, no unit), or use kind = 'categorical'"
        )
    fill = float("nan")
    if feature.impute == "median":
        below, total = np.cumsum(sizes), int(sizes.sum())
        middle = np.searchsorted(below, [(total - 1) // 2, total // 2], side="right")
        fill = float(values[middle].mean())
    elif feature.impute == "mode":
        fill = float(values[sizes.argmax()])
    elif feature.impute == "constant":
        fill = float(feature.constant)
    missing = 0 if feature.impute == "none" else int(counts[~known].sum())
    encoding = Encoding(name, feature, missing=fill, imputed=missing)
    return replace(encoding, unreadable=unreadable, unread=unread), values, sizes


def filled(
    encoding: Encoding, cells: pa.Array
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The numbers of cells, with what missing ones are taken for, and which are there."""
    numbers = as_numbers(cells)
    there = ~np.isnan(numbers)
    return np.where(there, numbers, encoding.missing), there


def marked(
    encoding: Encoding, code: Float32[np.ndarray, "n m"], there: Bool[np.ndarray, " n"]
) -> Float32[np.ndarray, "n slots"]:
    """With impute = "own", a last slot that is 1 where the number is missing."""
    own = [~there[:, None]] if encoding.feature.impute == "own" else []
    return np.concatenate([code, *own], axis=1, dtype=np.float32)
