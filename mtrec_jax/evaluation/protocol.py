"""The rules of a measurement: scores are comparable where these are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtrec_jax.config import ANY, Experiment, Rules, seen_behaviours
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the data was cleaned and split, and what a target is ranked among."""

    data: str  # the prepared folder's sentence: cleaning, split, order, past, sizes
    split: str  # its kind
    validation: float  # shares
    test: float
    order: Literal["time", "place"]  # of events: by time, or by place in the source
    past: Literal["rolling", "frozen"]  # what judged events know
    targets: tuple[str, ...] = ()  # what the label of each task is
    task: str = ""  # the retrieval task; "": nothing is ranked
    ranked: Literal["all", "last"] = "all"  # of each user's targets
    candidates: str = "all items"
    items: int = 0  # size of the catalogue
    exclude_seen: bool = False  # seen items of earlier splits are no candidates
    seen: tuple[str, ...] = ()  # binary tasks of which a 1 makes an item seen, or "any" event
    seen_targets: str = ""  # a target that was seen: "missed", as nobody could recommend it
    query_time: Literal["unknown", "known"] = "unknown"  # to the retrieval
    ties: str = "lower item first"
    ks: tuple[int, ...] = ()
    reranked: int = 0  # nearest items that the orders of several tasks are compared on

    def __str__(self) -> str:
        """One sentence."""
        data = "; ".join([self.data, *self.targets])
        if not self.task:
            return data
        seen = "seen ones as well"
        if self.exclude_seen:
            of = "" if self.seen == (ANY,) else f" with {' or '.join(self.seen)}"
            seen = f"those of earlier splits{of} left out (targets too: {self.seen_targets})"
        when = ", the time of the query known" if self.query_time == "known" else ""
        which = ", the last of each user," if self.ranked == "last" else ""
        return (
            f"{data}; {self.task}{which} ranked among {self.candidates} ({self.items:,}), {seen}, "
            f"of equals the {self.ties}, at {', '.join(map(str, self.ks))}{when}"
        )

    @property
    def hash(self) -> str:
        """8 hex digits that change with any of the rules."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def other_than(self, rules: Rules) -> dict[str, tuple[Any, Any]]:
        """Those of the rules that are other ones here: {name: (there, here)}.

        >>> own = Protocol(data="", split="time", validation=0.0, test=0.1, order="time",
        ...                past="rolling")
        >>> own.other_than(Rules(split="leave_one_out", query_time="unknown"))
        {'split': ('leave_one_out', 'time')}
        """
        said = {n: v for n, v in dataclasses.asdict(rules).items() if v not in ("", None)}
        if self.split == "leave_one_out":  # where each user has one target
            said.pop("ranked", None)
        here = {name: getattr(self, name) for name in said}
        return {name: (said[name], here[name]) for name in said if said[name] != here[name]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the sentence and the hash."""
        return {"sentence": str(self), "hash": self.hash, **dataclasses.asdict(self)}


def protocol_of(experiment: Experiment, manifest: Manifest) -> Protocol:
    """The protocol by which an experiment's models are measured on a prepared folder."""
    split, data, evaluate = experiment.split, experiment.data, experiment.evaluate
    retrieval = [name for name, task in experiment.tasks.items() if task.kind == "retrieval"]
    ranked: dict[str, Any] = {}
    if retrieval:
        ranked = {"task": retrieval[0], "items": manifest.items, "ks": evaluate.ks}
        ranked["ranked"] = evaluate.targets
        if evaluate.among == "untrained":
            ranked["candidates"] = "items without training events"
            ranked["items"] -= manifest.trained_items
        if len(experiment.tasks) > 1:
            ranked["reranked"] = min(evaluate.candidates, ranked["items"])
        if any(not field.size for field in manifest.request_ids):
            ranked["query_time"] = "known"
    if retrieval and evaluate.exclude_seen:
        seen = seen_behaviours(experiment) or (ANY,)
        ranked |= {"exclude_seen": True, "seen": seen, "seen_targets": "missed"}
    return Protocol(
        data=manifest.protocol,
        split=split.kind,
        validation=split.validation,
        test=split.test,
        order="time" if data.time else "place",
        past=data.past,
        targets=tuple(_target(name, manifest.config) for name in experiment.tasks),
        **ranked,
    )


def protocol_from(values: Mapping[str, Any]) -> Protocol:
    """The protocol that `Protocol.to_dict` gave, also after JSON; rules that it does not name are
    as they were before they could be chosen.

    >>> rules = Protocol(
    ...     data="", split="time", validation=0.1, test=0.1, order="time", past="rolling", ks=(5,)
    ... )
    >>> protocol_from(json.loads(json.dumps(rules.to_dict()))) == rules
    True
    """
    known = {field.name for field in dataclasses.fields(Protocol)}
    rules: dict[str, Any] = {}
    for name in known & values.keys():
        rule = values[name]
        rules[name] = tuple(rule) if isinstance(rule, list) else rule
    return Protocol(**rules)


def _target(name: str, config: Mapping[str, Any]) -> str:
    """What the label of a task is, as it was prepared.

    >>> like = {"kind": "binary", "column": "rating", "at_least": 4, "where": "buy"}
    >>> _target("like", {"data": {}, "tasks": {"like": like}})
    'like: binary, rating >= 4, where buy'
    """
    task = config["tasks"][name]
    column = task.get("column") or name
    label = config["data"].get("derive", {}).get(column, column)
    if "at_least" in task:
        label = f"{label} >= {task['at_least']:g}"
    if "equals" in task:
        label = f"{label} = {task['equals']!r}"
    where = task.get("where")
    parts = [task["kind"]] if task["kind"] == "retrieval" else [task["kind"], label]
    return f"{name}: {', '.join([*parts, *([f'where {where}'] if where else [])])}"


def check_same(protocols: Mapping[str, Protocol]) -> None:
    """Refuse to put scores side by side that were measured by other rules.

    Args:
      protocols: {what was measured: by which rules}.

    Raises:
      ConfigError: two of them differ, with the rules that do.
    """
    (first, one), *others = protocols.items()
    for name, other in others:
        differ = [
            f"{field.name}: {getattr(one, field.name)!r} and {getattr(other, field.name)!r}"
            for field in dataclasses.fields(Protocol)
            if getattr(one, field.name) != getattr(other, field.name)
        ]
        if differ:
            raise ConfigError(
                f"'{first}' and '{name}' were measured by other protocols: {'; '.join(differ)}. "
                "Show them in tables of their own"
            )
