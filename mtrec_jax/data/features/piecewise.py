"""Numbers as piecewise linear codes over quantile bins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa

from mtrec_jax.data.features.base import Codes, Count, Counts, Encoding, Feature
from mtrec_jax.data.features.binned import edges_of, quantiles, with_edges
from mtrec_jax.data.features.numeric import (
    IMPUTES,
    NO_HISTORY,
    OF_IDS,
    filled,
    learned,
    marked,
)


@dataclass(frozen=True, kw_only=True)
class Piecewise(Feature):
    """1 for bins below a number, a fraction for its own, 0 for those above.

    Gorishniy et al. 2022, "On Embeddings for Numerical Features in Tabular Deep Learning"; here
    numbers beyond the training range are held at its ends, and a missing one is all 0.
    """

    kind: Literal["piecewise"] = "piecewise"
    bins: Count = 32  # quantile bins of the training values, a number each

    places = NO_HISTORY
    because = OF_IDS
    imputes = IMPUTES
    of_numbers = True
    gives_numbers = True
    coded = True

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Lower edges of bins that hold about equally many training values, and the last upper."""
        encoding, values, sizes = learned(name, self, cells, counts)
        edges = np.unique(np.append(quantiles(self.bins, values, sizes), values[-1]))
        edges = edges if len(edges) > 1 else np.append(edges, edges + 1)
        slots = len(edges) - 1 + (self.impute == "own")
        return replace(with_edges(encoding, edges, values, sizes), slots=slots)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """A code a cell."""
        numbers, there = filled(encoding, cells)
        edges = edges_of(encoding)
        numbers = np.nan_to_num(np.clip(numbers, edges[0], edges[-1]), nan=edges[0])
        inside = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
        code = (np.arange(len(edges) - 1) < inside[:, None]).astype(np.float32)
        low, high = edges[inside], edges[inside + 1]
        code[np.arange(len(numbers)), inside] = (numbers - low) / (high - low)
        return marked(encoding, code, there)
