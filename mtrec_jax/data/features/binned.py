"""Numbers in quantile bins, which are looked up like categories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from mtrec_jax.data.features.base import Codes, Count, Counts, Encoding, Feature, as_numbers
from mtrec_jax.data.features.numeric import IMPUTES, Sizes, Values, learned
from mtrec_jax.types import FIRST, UNKNOWN

Edges = Float[np.ndarray, " m"]


@dataclass(frozen=True, kw_only=True)
class Binned(Feature):
    """The bin of a number; those below the first bin belong to it."""

    kind: Literal["binned"] = "binned"
    bins: Count = 32  # quantile bins of the training values

    imputes = IMPUTES
    of_numbers = True

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Lower edges of bins that hold about equally many training values."""
        encoding, values, sizes = learned(name, self, cells, counts)
        edges, place, missing = quantiles(self.bins, values, sizes), 0, encoding.imputed
        encoding = with_edges(encoding, edges, values, sizes)
        texts, inner = encoding.values.to_pylist(), encoding.counts
        if self.impute == "own":
            place = FIRST + len(texts) if missing else UNKNOWN
            texts, inner = texts + [""] * (missing > 0), np.append(inner, [missing] * (missing > 0))
        elif self.impute != "none":
            nearest = max(int(np.searchsorted(edges, encoding.missing, side="right")) - 1, 0)
            place = FIRST + nearest
            inner[nearest] += missing
        return replace(encoding, values=pa.array(texts, pa.string()), counts=inner, missing=place)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """The id of each number's bin."""
        numbers = as_numbers(cells)
        bins = np.maximum(np.searchsorted(edges_of(encoding), numbers, side="right") - 1, 0)
        ids = np.where(np.isnan(numbers), int(encoding.missing), bins + FIRST)
        return ids.astype(np.int32)[:, None]


def quantiles(bins: int, values: Values, sizes: Sizes) -> Edges:
    """Lower edges at the quantiles k / bins of the values; equal edges are one bin."""
    below = np.cumsum(sizes)
    wanted = np.arange(bins) * below[-1] / bins
    return np.unique(values[np.searchsorted(below, wanted, side="right")])


def with_edges(encoding: Encoding, edges: Edges, values: Values, sizes: Sizes) -> Encoding:
    """With these edges as its vocabulary, and how many training numbers follow each."""
    inside = np.searchsorted(edges, values, side="right") - 1
    inner = np.bincount(inside, sizes, len(edges)).astype(np.int64)
    texts = pa.array([repr(float(edge)) for edge in edges], pa.string())
    return replace(encoding, values=texts, counts=inner)


def edges_of(encoding: Encoding) -> Edges:
    """The edges as numbers."""
    return np.array([float(text) for text in encoding.values.to_pylist() if text])
