"""Seconds since the user's previous event, in bins; `data.past` computes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from mtrec_jax.data.features.binned import Binned
from mtrec_jax.data.features.clock import OF_EVENTS


@dataclass(frozen=True, kw_only=True)
class Gap(Binned):
    """The bin of a gap; it has no column."""

    kind: Literal["gap"] = "gap"  # type: ignore[assignment]

    places = ("request", "history")
    because = OF_EVENTS
    computed = True
    looks_back = True

    def origin(self, name: str, data: Any) -> tuple[str, str]:
        """The time of the events."""
        return "events", data.time

    def problems(self, name: str, data: Any) -> Iterator[str]:
        """Users and a time are needed."""
        yield from super().problems(name, data)
        if not (data.user and data.time):
            yield ".kind: 'gap' needs data.user and data.time"
