"""Counts and rates of earlier events with the same value; `data.past` computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pyarrow as pa

from mtrec_jax.data.features.base import Amount, Codes, Counts, Encoding
from mtrec_jax.data.features.binned import Binned
from mtrec_jax.data.features.numeric import Scale, encode_scaled, fit_scaled, logarithm


@dataclass(frozen=True, kw_only=True)
class PastCount(Binned):
    """Earlier events with the same value of `column`: a number on a log scale on the request; in
    bins on the history, which takes ids."""

    kind: Literal["past_count"] = "past_count"  # type: ignore[assignment]

    places = ("request", "history")
    because = (
        "counts and rates of the past belong to a moment; as a feature of a user or an item they "
        "would contain the outcome of the target itself"
    )
    computed = True
    looks_back = True
    scales: ClassVar[tuple[Scale, ...]] = (logarithm,)

    @property
    def gives_numbers(self) -> bool:  # type: ignore[override]
        """On the request."""
        return self.on == "request"

    @property
    def room(self) -> int:
        """One number, or the bins."""
        return 1 if self.gives_numbers else self.bins

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Mean and standard deviation, or bins."""
        if self.gives_numbers:
            return fit_scaled(name, self, cells, counts, *self.scales)
        return super().fit(name, cells, counts)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """Scaled numbers, or the ids of bins."""
        if self.gives_numbers:
            return encode_scaled(encoding, cells, *self.scales)
        return super().encode(encoding, cells)


@dataclass(frozen=True, kw_only=True)
class PastRate(PastCount):
    """Smoothed mean of the labels of task `label` over them."""

    kind: Literal["past_rate"] = "past_rate"  # type: ignore[assignment]
    label: str  # which task's
    smoothing: Amount = 20.0  # events that the overall mean counts for

    scales = ()
