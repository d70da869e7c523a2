"""A user's friends, and how they responded, which `data.social` computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mtrec_jax.data.features.base import Amount, Count, Feature
from mtrec_jax.data.features.categorical import Categorical

_OF_USERS = "friends are a context of the users"


@dataclass(frozen=True, kw_only=True)
class Ties(Categorical):
    """The user's friends, an id each."""

    kind: Literal["ties"] = "ties"  # type: ignore[assignment]
    max_values: Count = 8  # further friends are dropped

    places = ("context",)
    because = _OF_USERS
    imputes = ("none",)
    computed = True

    def origin(self, name: str, data: Any) -> tuple[str, str]:
        """The friends in the ties."""
        return "ties", data.friend


@dataclass(frozen=True, kw_only=True)
class FriendsTaste(Feature):
    """How friends responded (`label`) to each frequent value of the items' `column`, as numbers."""

    kind: Literal["friends_taste"] = "friends_taste"
    label: str  # which task's
    bins: Count = 32  # the most frequent values
    min_count: Count = 1  # rarer ones are left out
    smoothing: Amount = 20.0  # events that the overall mean counts for

    places = ("context",)
    because = _OF_USERS
    gives_numbers = True
    coded = True
    computed = True
    fitted = False

    def origin(self, name: str, data: Any) -> tuple[str, str]:
        """A column of the items."""
        return "items", self.column or name
