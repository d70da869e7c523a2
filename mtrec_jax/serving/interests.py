"""What each of a user's interests is: the events it is of, the items near it, what these share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import IdField, Prepared
from mtrec_jax.evaluation.segments import value_names
from mtrec_jax.types import PAD, UNKNOWN

NEAR = 20  # items near an interest, whose values name it
LEAST = 0.3  # share of them that have a value which names it
VALUES = 3  # at most


def shared_values(
    experiment: Experiment, prepared: Prepared, near: Int[np.ndarray, "I n"], most: int = VALUES
) -> list[str]:
    """What items have in common that others do not: up to `most` values of their features a row,
    such as "genre Horror, year from 1990".

    A value counts that at least `LEAST` of the items have; those come first whose share is highest
    as a multiple of that in the catalogue, and none whose share is not higher at all.

    Args:
      experiment: which features items have.
      prepared: the data.
      near: catalogue indexes.
      most: values a row.
    """
    found: list[list[tuple[float, str]]] = [[] for _ in near]
    for field in prepared.manifest.item_ids:
        if not isinstance(field, IdField) or not field.size:
            continue
        column = prepared.items[f"item_{field.name}"].combine_chunks()
        flat = column.flatten() if isinstance(column, pa.FixedSizeListArray) else column
        ids = flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
        names = value_names(experiment, prepared, field)
        usual = _shares(ids[: prepared.manifest.items], len(names))
        for row, items in enumerate(near):
            share = _shares(ids[items], len(names))
            share[[PAD, UNKNOWN]] = 0
            for value in np.flatnonzero((share >= LEAST) & (share > usual)):
                found[row].append((share[value] / usual[value], f"{field.name} {names[value]}"))
    ordered = (sorted(of, key=lambda pair: (-pair[0], pair[1]))[:most] for of in found)
    return [", ".join(name for _, name in of) for of in ordered]


def _shares(ids: np.ndarray, values: int) -> Float[np.ndarray, " V"]:
    """The share of items [n, S] that have each value, once or more often."""
    item = np.repeat(np.arange(len(ids)), ids.shape[1])
    pairs = np.unique(item * values + ids.reshape(-1))
    return np.bincount(pairs % values, minlength=values) / max(1, len(ids))


def events_of(
    interests: Float[np.ndarray, "K D"], events: Float[np.ndarray, "L D"]
) -> Int[np.ndarray, " L"]:
    """The interest that each event's item vector is nearest to, by cosine.

    >>> events_of(np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.2, 0.1], [0.0, 0.1]])).tolist()
    [0, 1]
    """
    length = np.linalg.norm(interests, axis=1, keepdims=True)
    return (events @ (interests / np.maximum(length, 1e-12)).T).argmax(axis=1)


def table_of(
    experiment: Experiment,
    prepared: Prepared,
    users: list[str],
    events: list[np.ndarray],
    near: Int[np.ndarray, "U K n"],
) -> pa.Table:
    """A row an interest, those of a user by falling number of events.

    Args:
      experiment, prepared: names of values and items.
      users: raw ids.
      events: of each user, which interest each event belongs to.
      near: catalogue indexes of the items near each interest, nearest first.
    """
    count, rows = near.shape[1], list[dict[str, Any]]()
    names = shared_values(experiment, prepared, near.reshape(-1, near.shape[-1]))
    for user, (name, own) in enumerate(zip(users, events, strict=True)):
        sizes = np.bincount(own, minlength=count)
        for place, k in enumerate(np.argsort(-sizes, kind="stable")):
            shown = near[user, k, :5]
            rows.append(
                {
                    "user": name,
                    "interest": place + 1,
                    "events": int(sizes[k]),
                    "values": names[user * count + k],
                    "items": ", ".join(prepared.titles[i] for i in shown),
                }
            )
    schema = {"user": pa.string(), "interest": pa.int64(), "events": pa.int64()}
    schema |= {"values": pa.string(), "items": pa.string()}
    return pa.Table.from_pylist(rows, pa.schema(list(schema.items())))
