"""Parts of a split that are measured by themselves: by the value of a feature, cold or not."""

from __future__ import annotations

import numpy as np

from mtrec_jax.config import COLD_ITEMS, COLD_USERS, Experiment
from mtrec_jax.data.dataset import SPLITS, IdField, Prepared, to_arrays
from mtrec_jax.types import FIRST, PAD, UNKNOWN

MOST = 20  # values of a feature that are measured, those with the most targets; others are one


def segments(
    experiment: Experiment, prepared: Prepared, split: str, candidate: np.ndarray, user: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """The targets of each part that `evaluate.segments` asks for.

    Args:
      experiment: which features, or "cold_users", "cold_items".
      prepared: the data.
      split: whose targets they are.
      candidate, user: ids of each target [n], in file order.

    Returns:
      {name: {value: places of its targets}}, values with the most targets first. A target with
      several values, as tags are, stands under each; "missing" and "unknown" are values, and those
      beyond the `MOST` frequent ones are "other".
    """
    found = {}
    fields = {field.name: field for field in prepared.manifest.fields}
    for name in experiment.evaluate.segments:
        field = fields.get(name)
        if isinstance(field, IdField):
            ids = _ids(experiment, prepared, split, candidate, field)
            found[name] = _by_value(ids, value_names(experiment, prepared, field))
        else:
            ids = user if name == COLD_USERS else candidate
            cold = ~np.isin(ids, _trained(prepared, name))
            parts = {"cold": np.flatnonzero(cold), "warm": np.flatnonzero(~cold)}
            found[name] = {value: places for value, places in parts.items() if len(places)}
    return found


def _trained(prepared: Prepared, name: str) -> np.ndarray:
    """Ids of the users, or items, that have events in training."""
    if name == COLD_ITEMS:
        return np.flatnonzero(prepared.items["count"].to_numpy()) + FIRST
    if "split" not in prepared.users.column_names:
        return np.unique(prepared.interactions("train")["user"])
    lists = prepared.user_lists("split")
    owner = np.repeat(np.arange(len(lists)), np.diff(lists.offsets)) + FIRST
    return np.unique(owner[lists.values == SPLITS.index("train")])


def _ids(
    experiment: Experiment, prepared: Prepared, split: str, candidate: np.ndarray, field: IdField
) -> np.ndarray:
    """The feature's ids of each target [n, S]."""
    on = experiment.features[field.name].on
    name = f"{on}_{field.name}"
    if on == "item":
        [table] = to_arrays(prepared.items.select([name])).values()
        return np.pad(table.reshape(len(table), -1), ((FIRST, 0), (0, 0)))[candidate]
    parts = []
    for block in prepared.blocks(split, ["row", name]):
        n, positions = block["row"].shape
        ids = block[name].reshape(n, -1, field.slots)
        whole = np.broadcast_to(ids, (n, positions, field.slots))
        parts.append(whole[block["row"] >= 0])
    return np.concatenate(parts)


def value_names(experiment: Experiment, prepared: Prepared, field: IdField) -> list[str]:
    """What each id is called."""
    size = field.size
    if not prepared.has_vocabulary(field.name):
        values = [f"bucket {number}" for number in range(size - FIRST)]
    else:
        values = prepared.vocabulary(field.name)["value"].to_pylist()
        if experiment.features[field.name].of_numbers:
            values = [f"from {edge}" if edge else "" for edge in values]
    return ["missing", "unknown", *(value or "missing" for value in values)]


def _by_value(ids: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Places of the targets with each value; 0 fills the slots of a target with fewer values."""
    place, slot = np.nonzero(ids != PAD)
    place = np.concatenate([place, np.flatnonzero((ids == PAD).all(axis=1))])
    value = np.concatenate([ids[ids != PAD], np.zeros(len(place) - len(slot), ids.dtype)])
    sizes = np.bincount(value, minlength=UNKNOWN + 1)
    order = [int(v) for v in np.argsort(-sizes, kind="stable") if sizes[v]]
    found: dict[str, np.ndarray] = {}
    for number in order[:MOST]:
        own = np.unique(place[value == number])
        before = found.get(names[number], own[:0])  # "missing" may have an id of its own
        found[names[number]] = np.union1d(before, own)
    if len(order) > MOST:
        found["other"] = np.unique(place[np.isin(value, order[MOST:])])
    return found
