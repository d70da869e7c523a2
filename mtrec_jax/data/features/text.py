"""Text that is kept as it is, for encoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mtrec_jax.data.features.base import Feature


@dataclass(frozen=True, kw_only=True)
class Text(Feature):
    """Stored beside the users or items; no input by itself."""

    kind: Literal["text"] = "text"

    places = ("context", "item")
    because = "texts are kept for items and users, not for every event"
    takes_lists = True
    fitted = False
