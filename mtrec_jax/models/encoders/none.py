"""No encoder: histories are not read, users are their context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class NoEncoder:
    """`[model.encoder] kind = "none"`."""

    kind: Literal["none"] = "none"
