"""By which rules something was measured. Scores under different protocols are not comparable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The rules of an evaluation; two with the same `hash` have measured the same thing."""

    data: str  # how the data was cleaned, split and looked back on, in words
    split: str  # kind
    shares: tuple[float, float]  # validation, test: what the kind makes of them
    rows: str  # fingerprint over which source row is in which split
    order: str  # what comes before what
    hides_ties: bool  # whether events of a target's own timestamp are hidden from it
    past: str  # rolling: targets know all that was before them; frozen: as of the split
    candidates: str = ""  # what a target is ranked among; "": nothing is ranked
    catalogue: int = 0  # N
    excludes_seen: bool = False  # items of the splits before, but for the target itself
    equal_scores: str = ""  # who is first of equals
    ks: tuple[int, ...] = ()

    @property
    def hash(self) -> str:
        """8 hex digits that change with any rule."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def sentence(self) -> str:
        """The rules in words."""
        if not self.candidates:
            return self.data
        seen = "seen ones left out" if self.excludes_seen else "seen ones too"
        return (
            f"{self.data}; ranked among {self.candidates} ({self.catalogue:,}), {seen}, of equal "
            f"scores the {self.equal_scores} first"
        )

    def to_dict(self) -> dict[str, Any]:
        """The rules, with sentence and hash, as plain values."""
        return {"sentence": self.sentence, "hash": self.hash, **dataclasses.asdict(self)}


def protocol_of(experiment: Experiment, prepared: Prepared) -> Protocol:
    """The rules by which an experiment is evaluated on a prepared folder."""
    manifest, split, data = prepared.manifest, experiment.split, experiment.data
    ranks = any(task.kind == "retrieval" for task in experiment.tasks.values())
    ranking: dict[str, Any] = {
        "candidates": "all items",
        "catalogue": manifest.items,
        "excludes_seen": experiment.evaluate.exclude_seen,
        "equal_scores": "lower item id",
        "ks": experiment.evaluate.ks,
    }
    return Protocol(
        data=manifest.protocol,
        split=split.kind,
        shares=(split.validation, split.test),
        rows=manifest.split.fingerprint,
        order="(time, source row)" if data.time else "source row",
        hides_ties=data.hide_ties,
        past=data.past,
        **(ranking if ranks else {}),
    )
