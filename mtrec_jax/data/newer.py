"""Data that came after training, in the terms of the data that a model was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax.arguments import argument
from mtrec_jax.data import features
from mtrec_jax.data.dataset import FIELDS, Prepared, fixed_size, to_arrays
from mtrec_jax.data.features import Binned, Encoding, IdField, NumberField
from mtrec_jax.data.growth import otherwise
from mtrec_jax.errors import ConfigError
from mtrec_jax.types import FIRST, UNKNOWN

Codes = Callable[[np.ndarray], np.ndarray]  # ids or numbers [n, S] there -> [n, S] here


def in_terms_of(newer: Prepared, own: Prepared) -> Prepared:
    """A newer folder as a model sees it that was trained on `own`.

    Users, their histories and context, the catalogue and what it says of items are the newer ones.
    Ids lead to the vocabularies, rows, bins and scales of `own`; values and items that are not
    there are unknown.

    Args:
      newer: the newer folder, whole.
      own: the view that the model was trained on.

    Raises:
      ConfigError: a feature means something else there, or has other bins; it names all of them.
    """
    problems = list(_differences(newer, own))
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:8])
        raise ConfigError(
            f"{newer.folder} cannot answer for a model that was trained on {own.folder}:\n{shown}\n"
            f"Prepare the newer data with the same features, and with {argument('grow_from')} "
            f"{own.folder}, which keeps bins and scales"
        )
    m, old = newer.manifest, own.manifest
    manifest = dataclasses.replace(
        m,
        config=old.config,
        bounds=old.bounds,
        tasks=old.tasks,
        history_length=old.history_length,
        item_values=old.item_values or old.trained_items,
        **{group: getattr(old, group) for group in FIELDS},
    )
    replaced = {
        "items": _translated(newer, own, newer.items, "item"),
        "users": _translated(newer, own, newer.users, "context", "event"),
        "item_vocabulary": pa.table({"value": own.item_vocabulary}),
    }
    return Prepared(newer.folder, manifest, own.extensions, replaced, own.learned or own.folder)


def _differences(newer: Prepared, own: Prepared) -> Iterator[str]:
    """Why ids of one folder cannot lead to those of the other."""
    there, here = newer.manifest.config, own.manifest.config
    for key in ("user", "item", "queries"):
        if bool(there["data"].get(key)) != bool(here["data"].get(key)):
            has = ["has none", "has one"]
            found, wanted = (has[bool(c["data"].get(key))] for c in (there, here))
            yield f"data.{key}: the newer data {found}, the model {wanted}"
    for name, meaning in here["features"].items():
        if name not in there["features"]:
            yield f"features.{name}: not there"
            continue
        wrong = otherwise(f"features.{name}", there["features"][name], meaning)
        column = meaning.get("column") or name
        derived = [config["data"].get("derive", {}).get(column) for config in (there, here)]
        if derived[0] != derived[1]:
            wrong.append(f"data.derive.{column}: {derived[0]!r} there, {derived[1]!r} here")
        yield from wrong
        if not wrong and (why := _other_bins(newer, own, name)):
            yield f"features.{name}: {why}"


def _other_bins(newer: Prepared, own: Prepared, name: str) -> str:
    """Why the codes of a feature cannot be translated; "" where they can."""
    if all(field.name != name for field in own.manifest.fields):
        return ""  # no input of the model
    new, old = features.restore(newer, name), features.restore(own, name)
    edges = [e.values.filter(pc.not_equal(e.values, "")) for e in (new, old)]
    if isinstance(old.feature, Binned) and not old.is_number and edges[0] != edges[1]:
        return f"its {len(edges[0])} bins there are others than the {len(edges[1])} here"
    if old.is_number and (new.values != old.values or new.slots != old.slots):
        return "its bins or values there are others than here"
    return ""


def _translated(newer: Prepared, own: Prepared, table: pa.Table, *roles: str) -> pa.Table:
    """Users or items of the newer folder with the codes of the other one."""
    fields = {field.name: field for field in own.manifest.fields}
    columns = {}
    for column in table.column_names:
        role, _, name = column.partition("_")
        if role not in roles or column == "event_item":
            if role != "text" or name in own.manifest.config["features"]:
                columns[column] = table[column]
        elif name in fields:
            columns[column] = _recoded(newer, table, column, _codes(newer, own, fields[name]))
    return pa.table(columns)


def _recoded(newer: Prepared, table: pa.Table, column: str, codes: Codes) -> pa.Array:
    if not column.startswith("event_"):
        return as_column(codes(_wide(to_arrays(table.select([column]))[column])))
    lists = newer.user_lists(column)
    flat = as_column(codes(_wide(lists.values)))
    return pa.LargeListArray.from_arrays(pa.array(lists.offsets, pa.int64()), flat)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1 if len(array) else 1)


def as_column(codes: np.ndarray) -> pa.Array:
    """Codes `[n, S]` as they are stored."""
    return pa.array(codes[:, 0]) if codes.shape[1] == 1 else fixed_size(codes)


def _codes(newer: Prepared, own: Prepared, field: IdField | NumberField) -> Codes:
    """What leads from the codes of a feature in the newer folder to those here."""
    new, old = features.restore(newer, field.name), features.restore(own, field.name)
    if isinstance(field, NumberField):
        return _numbers(new, old)
    if own.has_vocabulary(field.name):
        found = pc.fill_null(pc.index_in(new.values, value_set=old.values), UNKNOWN - FIRST)
        ids = np.concatenate([[0, UNKNOWN], found.to_numpy() + FIRST]).astype(np.int32)
    else:  # hashes, or an id for missing values behind them
        ids = np.arange(new.size, dtype=np.int32)
        ids[ids >= field.size] = UNKNOWN

    def translate(codes: np.ndarray) -> np.ndarray:
        found = ids[codes][:, : field.slots]  # as many as fit
        return np.pad(found, ((0, 0), (0, field.slots - found.shape[1])))

    return translate


def _numbers(new: Encoding, old: Encoding) -> Codes:
    """The same numbers on the other scale; a missing one, which has none, stays missing."""
    if (new.mean, new.std) == (old.mean, old.std):
        return lambda numbers: numbers
    impute = old.feature.impute

    def translate(numbers: np.ndarray) -> np.ndarray:
        found = (numbers.astype(np.float64) * new.std + new.mean - old.mean) / old.std
        found = found.astype(np.float32)
        if impute == "own":
            found[:, -1] = numbers[:, -1]  # the mark
            found[numbers[:, -1] == 1, :-1] = 0
        elif impute == "none":  # 0, as is, seldom, a number that is the mean there to all digits
            found[numbers == 0] = 0
        return found

    return translate
