"""Cells with several values: lists, or text with a separator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mtrec_jax.data.features.base import Count
from mtrec_jax.data.features.categorical import Categorical


@dataclass(frozen=True, kw_only=True)
class MultiValued(Categorical):
    """An id for each value of a cell; without any, one id of a missing value."""

    kind: Literal["multi_valued"] = "multi_valued"  # type: ignore[assignment]
    separator: Annotated[str, Field(min_length=1)] = " "  # between the values of a cell
    max_values: Count = 8  # further values are dropped

    encoded_once = True

    def problems(self, name: str, data: Any) -> Iterator[str]:
        """On the history, only what users searched for has several values."""
        yield from super().problems(name, data)
        if self.on == "history" and self.origin(name, data)[0] != "queries":
            yield ".kind: one value an event on the history, such as 'categorical'"
