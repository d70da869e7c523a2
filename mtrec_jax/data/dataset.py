"""The prepared folder: what `prepare` writes and everything else reads.

```
manifest.json                     Manifest below, as JSON; written last, so that a folder is whole
quarantine.parquet                every raw row that was removed: row int64, source string, file
                                  string, line int64, reason string, evidence string
train.parquet validation.parquet test.parquet        one row an example, in seeded random order:
    user          int32           0 when the data has no users
    context_<f>   [S]             of the user: S ids (int32, 0: padding) or S scaled numbers
                                  (float32), the slots of feature f; a plain column where S is 1
    request_<f>   [P * S]         of the moment of each position, likewise
    length        int32           places of the past, or positions if these are more, that are not
                                  padding; only where there is a past
    skipped       int32           events before the past, which is cut off; only where there is one
    event_item    int32[L]        the past, oldest first, 0: none
    event_<f>     int32[L * S]    what each event of the past shows
    cutoff        int32[P]        position p sees the first cutoff[p] events
    candidate     int32[P]        item at position p, 0: none or padding
    label_<task>  float32[P]      NaN where missing, outside the sample space, or padding
    reference_<task> float32[P]   only where the task declares a reference
    weight_<task> float32[P]      only where the task declares a weight_column
    time          float64[P]      seconds, NaN on padding; only where the data has a time
    row           int64[P]        source row (0-based, over the event files in order), -1: padding
items.parquet                     the catalogue, row r is item id r + 2; trained items come first,
                                  new ones, which no event has, last:
    id string, title string, count int64 (training events), item_<f> [S], text_<f>
users.parquet                     row r is user id r + 2, every event in time order:
    id string, context_<f> [S], text_<f>, event_item large_list<int32>, event_<f> likewise (of lists
    of S where S is above 1), did_<task> large_list<bool> (label 1, of binary tasks), split
    large_list<int8>
                                  (split: 0 train, 1 validation, 2 test, 3 shown in histories only)
vocabularies/<feature>.parquet    row r is local id r + 2: value string, count int64 (training rows)
                                  of texts, or lower edges of bins; "": the id of missing values
                                  (numeric and hashed features have no such file)
item_vocabulary.parquet           only where the folder continues another one: row r is row r + 2 of
                                  the items' own table: value string. Otherwise it has the trained
                                  items, in the order of their ids
past/<feature>.parquet            what new requests are told: value string, number float64; the last
                                  row, of value null, is for values without training rows
```
The folder is a superset: a column a feature and a task, so that `Prepared.chosen` can leave out
what an experiment does not use, and nothing reads it. Fixed-size columns are Parquet fixed-size
lists, so that reading them is a reshape. Examples are split into byte planes and packed by LZ4,
which is fast to read. Without a user, an item or a history there is no `event_*` column.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from mtrec_jax import choices
from mtrec_jax.arguments import a_path
from mtrec_jax.config import Experiment, Task, to_dict
from mtrec_jax.data.features import KINDS, IdField, NumberField, one_array
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.losses.tasks import TaskField
from mtrec_jax.types import FIRST, PAD, UNKNOWN, Lists

FORMAT = 6
FIELDS = (  # the groups of fields of a manifest
    *("context_ids", "context_numbers", "request_ids", "request_numbers"),
    *("item_ids", "item_numbers", "history"),
)
FREE = ("public", "reference")  # keys of [data] that change nothing in a folder
BLOCK = 4096  # examples a Parquet row group holds
SPLITS = ("train", "validation", "test")
NEWER = "newer"  # events of `Recommender.with_events`, which stand in no folder
SHOWN = 3  # the split of events that are seen in histories, and neither train nor judge


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the cleaning report."""

    rule: str
    rows: int  # rows removed, or values concerned
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What a split has made of the events."""

    kind: str
    seed: int
    sizes: dict[str, int]  # events of "train", "validation", "test", and "shown" if there are any
    fingerprint: str  # 16 hex digits over all pairs of source row and split
    times: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    # {split: seconds of its first and last event}, if the data has a time; NEWER: of those that
    # answers know beside them


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the report shows beside the rules."""

    labels: dict[str, dict[str, tuple[int, float | None]]]  # {task: {split: (labels, their mean)}}
    start: float  # seconds: where the first bar begins, at midnight UTC
    width: float  # seconds of a bar, whole days; 0 without times
    counts: dict[str, list[int]]  # {split: events of each bar}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a reader of the folder must know."""

    format: int
    name: str
    protocol: str  # one readable sentence: cleaning, split, order, what a history may hold
    fingerprint: str  # 16 hex digits over protocol, configuration and contents of the raw files
    cleaned: str  # fingerprint of the clean events
    config: dict[str, Any]  # data, clean, split, features, tasks as plain values
    users: int
    items: int  # that have events: the catalogue of training and evaluation
    trained_items: int  # of them with training events: ids FIRST .. FIRST + trained_items - 1
    events: int  # rows after cleaning, all splits
    quarantined: int  # raw rows that were removed
    split: SplitInfo
    history_length: int  # L: the longest history, at most data.history_length; 0: no histories
    examples: dict[str, int]  # {split: rows of its Parquet file}
    positions: dict[str, int]  # {split: P}
    targets: dict[str, int]  # {split: positions that are not padding}
    context_ids: tuple[IdField, ...] = ()
    context_numbers: tuple[NumberField, ...] = ()
    request_ids: tuple[IdField, ...] = ()
    request_numbers: tuple[NumberField, ...] = ()
    item_ids: tuple[IdField, ...] = ()
    item_numbers: tuple[NumberField, ...] = ()
    history: tuple[IdField, ...] = ()
    tasks: dict[str, TaskField] = dataclasses.field(default_factory=dict)
    report: tuple[Rule, ...] = ()
    bounds: dict[str, tuple[float | None, float | None]] = dataclasses.field(default_factory=dict)
    summary: Summary | None = None
    continues: str = ""  # fingerprint of the folder whose vocabularies have grown to these
    item_values: int = 0  # rows of item_vocabulary.parquet, where there is one
    new_items: int = 0  # that stand in the table of items alone; their ids follow the others
    event_files: tuple[str, ...] = ()  # SHA-256 of the files of events, in the order of their rows

    @property
    def fields(self) -> list[IdField | NumberField]:
        """All features that the model reads."""
        return [field for group in FIELDS for field in getattr(self, group)]

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into the folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Prepared:
    """An opened prepared folder."""

    folder: Path
    manifest: Manifest
    extensions: tuple[type, ...] = ()  # classes of kinds of features beside the package's
    # tables in the place of a folder's own "users", "items" and "item_vocabulary"
    replaced: dict[str, pa.Table] = dataclasses.field(default_factory=dict, compare=False)
    learned: Path | None = None  # the folder with the vocabularies, where it is another one

    def __repr__(self) -> str:
        m = self.manifest
        return (
            f"Prepared({m.name!r}: {m.users:,} users, {m.items:,} items, {m.events:,} events; "
            f"train {m.targets['train']:,}, validation {m.targets['validation']:,}, "
            f"test {m.targets['test']:,} targets; {m.fingerprint})"
        )

    def chosen(self, experiment: Experiment) -> Prepared:
        """The folder as an experiment sees it: its tasks and features alone, in its order.

        Raises:
          ConfigError: a task or feature is not here, or means something else here, or the data was
            cleaned or split otherwise; or this is a view for answers, whose examples say something
            else than its users and items.
        """
        if self.replaced or self.learned:
            raise ConfigError(
                f"the data of {self.folder} are seen here as a trained model answers with them, "
                f"and train none: open_prepared({str(self.folder)!r})"
            )
        here, wanted = self.manifest.config, configuration(experiment)
        problems = []
        for section in ("data", "clean", "split"):
            keys = {*wanted[section], *here[section]} - set(FREE)
            problems += [
                f"{section}.{key}: {here[section].get(key)!r} there, {wanted[section].get(key)!r} "
                "here"
                for key in sorted(keys)
                if here[section].get(key) != wanted[section].get(key)
            ]
        for section in ("tasks", "features"):
            for name, meaning in wanted[section].items():
                problems += _otherwise(
                    f"{section}.{name}", here[section].get(name), meaning, wanted
                )
        if problems:
            shown = "\n".join(f"  {problem}" for problem in problems[:8])
            raise ConfigError(
                f"{self.folder} was prepared for another experiment than '{experiment.name}':\n"
                f"{shown}\nPrepare it anew: mtrec prepare, with these settings"
            )
        m, features = self.manifest, list(wanted["features"])

        groups: dict[str, Any] = {}
        for group in FIELDS:
            kept = [field for field in getattr(m, group) if field.name in features]
            groups[group] = tuple(sorted(kept, key=lambda field: features.index(field.name)))
        view = dataclasses.replace(
            m,
            # tasks that are left out stay declared: what they count makes items seen
            config=here | {"features": {n: here["features"][n] for n in features}},
            tasks={name: m.tasks[name] for name in wanted["tasks"]},
            **groups,
        )
        return Prepared(self.folder, view, extensions_of(experiment))

    def with_new_items(self) -> Prepared:
        """The folder with the new items in the catalogue, as answers have them."""
        m = self.manifest
        whole = dataclasses.replace(m, items=m.items + m.new_items, new_items=0)
        return dataclasses.replace(self, manifest=whole) if m.new_items else self

    def columns(self, references: bool = False) -> list[str]:
        """The columns of an example that this view reads, in their order in the files."""
        m = self.manifest
        names, sides = ["user"], ("context", "request")
        for side in sides:
            ids, numbers = getattr(m, f"{side}_ids"), getattr(m, f"{side}_numbers")
            names += [f"{side}_{field.name}" for field in (*ids, *numbers)]
        names += ["event_item"] * (m.history_length > 0) + [f"event_{f.name}" for f in m.history]
        names += ["cutoff", "candidate", *(f"label_{task}" for task in m.tasks)]
        declared = m.config.get("tasks", {})
        for key, role in (("weight_column", "weight"), *[("reference", "reference")] * references):
            names += [f"{role}_{t}" for t in m.tasks if declared.get(t, {}).get(key)]
        return [*names, "row"]

    def parquet(self, split: str) -> pq.ParquetFile:
        """The Parquet file of a split's examples, with all columns that there are."""
        return pq.ParquetFile(self.folder / f"{split}.parquet")

    def blocks(
        self, split: str, columns: Sequence[str] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The examples of a split in file order, as dicts of arrays `[n, ...]`, a column each."""
        file, names = self.parquet(split), columns or self.columns(references=True)
        for index in range(file.num_row_groups):
            yield to_arrays(file.read_row_group(index, columns=names).select(names))

    @functools.cached_property
    def items(self) -> pa.Table:
        """The catalogue and the new items, row r is item id r + 2."""
        return self._side("items")

    @functools.cached_property
    def users(self) -> pa.Table:
        """All users, row r is user id r + 2."""
        return self._side("users")

    def _side(self, name: str) -> pa.Table:
        """A file of users or items, with the columns of the chosen features alone."""
        if name in self.replaced:
            return self.replaced[name]
        path, features = self.folder / f"{name}.parquet", self.manifest.config.get("features", {})
        chosen = {"item", *features, *(field.name for field in self.manifest.fields)}
        columns = []
        for column in pq.read_schema(path).names:
            role, _, feature = column.partition("_")
            free = role not in ("context", "event", "item", "text")
            if role != "did" and (free or feature in chosen):  # `behaviour` reads these
                columns.append(column)
        return pq.read_table(path, columns=columns)

    def user_lists(self, column: str) -> Lists:
        """A list column of `users.parquet`, e.g. `event_item` or `split`."""
        array = self.users.column(column).combine_chunks()
        values = array.flatten()
        if pa.types.is_fixed_size_list(values.type):
            values = values.flatten().to_numpy().reshape(-1, values.type.list_size)
        else:
            values = values.to_numpy(zero_copy_only=False)  # truth values are bits
        return Lists(values, array.offsets.to_numpy() - array.offsets[0].as_py())

    @property
    def behaviours(self) -> list[str]:
        """The binary tasks of which `behaviour` knows the labels."""
        stored = pq.read_schema(self.folder / "users.parquet").names
        columns = self.replaced["users"].column_names if "users" in self.replaced else []
        names = [c.removeprefix("did_") for c in (*stored, *columns) if c.startswith("did_")]
        return list(dict.fromkeys(names))

    def behaviour(self, task: str) -> np.ndarray:
        """Whether a binary task's label is 1, of each event in `users.parquet`: [n] bool.

        Raises:
          DataError: the folder does not know the task, or was prepared before this was kept.
        """
        path, name = self.folder / "users.parquet", f"did_{task}"
        if name in self.replaced.get("users", pa.table({})).column_names:
            return self.user_lists(name).values
        if name not in pq.read_schema(path).names:
            raise DataError(
                f"{self.folder} does not say which past events have a 1 in '{task}'. Prepare it "
                "anew with this task, or let any event make an item seen: evaluate.seen = "
                '["any"]'
            )
        lists = pq.read_table(path, columns=[name])[name].combine_chunks()
        return np.asarray(lists.flatten().to_numpy(zero_copy_only=False), bool)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The binary task of which a 1 makes an event one that the retrieval is to find; (): any
        event is."""
        tasks = self.manifest.config["tasks"].values()
        return tuple(t["where"] for t in tasks if t["kind"] == "retrieval" and t.get("where"))

    @functools.cached_property
    def user_names(self) -> list[str]:
        """Raw id of each user, in the order of ids."""
        return self.users.column("id").to_pylist()

    @functools.cached_property
    def item_names(self) -> list[str]:
        """Raw id of each catalogue item, in the order of ids."""
        return self.items.column("id").to_pylist()

    @functools.cached_property
    def user_ids(self) -> dict[str, int]:
        """{raw user id: id}."""
        return {raw: i + FIRST for i, raw in enumerate(self.user_names)}

    @functools.cached_property
    def item_ids(self) -> dict[str, int]:
        """{raw item id: id}."""
        return {raw: i + FIRST for i, raw in enumerate(self.item_names)}

    @functools.cached_property
    def titles(self) -> list[str]:
        """Title of each catalogue item, or its raw id when the data has no titles."""
        pairs = zip(*(self.items.column(c).to_pylist() for c in ("title", "id")), strict=True)
        return [title or raw for title, raw in pairs]

    def has_vocabulary(self, feature: str) -> bool:
        """Whether the feature has values or edges, so that `vocabulary` gives them."""
        return self._values_of(feature).is_file()

    def vocabulary(self, feature: str) -> pa.Table:
        """Values of a feature, row r is local id r + 2."""
        return pq.read_table(self._values_of(feature))

    def _values_of(self, feature: str) -> Path:
        return (self.learned or self.folder) / "vocabularies" / f"{feature}.parquet"

    @functools.cached_property
    def item_vocabulary(self) -> pa.ChunkedArray:
        """Raw id of each row of the items' own table, row r is local id r + 2."""
        if "item_vocabulary" in self.replaced:
            return self.replaced["item_vocabulary"]["value"]
        path = self.folder / "item_vocabulary.parquet"
        if path.is_file():
            return pq.read_table(path)["value"]
        return self.items["id"].slice(0, self.manifest.trained_items)

    def item_rows(self) -> np.ndarray:
        """The row of each item in their own table, by item id: [N + 2]; unknown without one."""
        found = pc.index_in(self.items["id"], value_set=self.item_vocabulary.combine_chunks())
        rows = pc.fill_null(found, UNKNOWN - FIRST).to_numpy() + FIRST
        return np.concatenate([[PAD, UNKNOWN], rows]).astype(np.int32)

    def catalogue(self) -> dict[str, np.ndarray]:
        """Item features by item id: `{"ids": [N + 2, M], "numbers": [N + 2, C]}`; 0, 1 are zero."""
        m = self.manifest
        groups = {"ids": [f.name for f in m.item_ids], "numbers": [f.name for f in m.item_numbers]}
        found = {part: _side_by_side(self.items, "item", group) for part, group in groups.items()}
        found["ids"] = found["ids"].astype(np.int32)  # also where there are none
        return {name: np.pad(table, ((FIRST, 0), (0, 0))) for name, table in found.items()}

    def user_context(self) -> dict[str, np.ndarray]:
        """Context features of all users: `{"ids": [U, M], "numbers": [U, C]}`, absent parts left
        out; row r is user id r + 2."""
        ids = [field.name for field in self.manifest.context_ids]
        numbers = [field.name for field in self.manifest.context_numbers]
        groups = {"ids": ids, "numbers": numbers}
        return {
            part: _side_by_side(self.users, "context", group)
            for part, group in groups.items()
            if group
        }

    def interactions(self, split: str = "train") -> dict[str, np.ndarray]:
        """Targets of a split, one entry each: `user`, `candidate`, `row`, `label_<task>`."""
        parts: dict[str, list[np.ndarray]] = {}
        labels = [n for n in self.columns(True) if n.startswith(("label_", "reference_"))]
        for block in self.blocks(split, ["user", "candidate", "row", *labels]):
            keep = block["row"] >= 0
            block["user"] = np.broadcast_to(block["user"][:, None], keep.shape)
            for name, array in block.items():
                parts.setdefault(name, []).append(array[keep])
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def times(self, split: str = "train") -> np.ndarray | None:
        """Seconds of the targets of a split, in the order of `interactions`; None: there are none,
        also in folders of earlier versions."""
        if "time" not in self.parquet(split).schema_arrow.names:
            return None
        blocks = self.blocks(split, ["row", "time"])
        return np.concatenate([block["time"][block["row"] >= 0] for block in blocks])


def _side_by_side(table: pa.Table, role: str, features: list[str]) -> np.ndarray:
    """The columns of features beside each other: [n, slots] of ids, or of numbers."""
    arrays = to_arrays(table.select([f"{role}_{name}" for name in features])).values()
    columns = [array.reshape(len(table), -1) for array in arrays]
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(table), 0), np.float32)


def grouped(fields: Mapping[str, Iterable[IdField | NumberField]]) -> dict[str, Any]:
    """{group of a manifest: its fields}, from {what features are on: their fields}."""
    found: dict[str, Any] = {}
    for on, some in fields.items():
        ids = tuple(field for field in some if isinstance(field, IdField))
        if on == "history":
            found["history"] = ids
            continue
        found[f"{on}_ids"] = ids
        found[f"{on}_numbers"] = tuple(f for f in some if isinstance(f, NumberField))
    return found


def configuration(experiment: Experiment) -> dict[str, Any]:
    """The part of the experiment that preparation depends on."""
    kept = {k: to_dict(experiment)[k] for k in ("data", "clean", "split", "features", "tasks")}
    for task in kept["tasks"].values():
        for key in ("weight", "loss", "lists", "pointwise"):
            del task[key]
        for key in ("weight_column", "duration"):  # nothing has changed where there is none
            if not task[key]:
                del task[key]
    for feature in kept["features"].values():
        if feature["kind"] == "text" and not feature["encoder"]:
            del feature["encoder"]
    return kept


def _otherwise(
    key: str, there: dict[str, Any] | None, here: dict[str, Any], wanted: dict[str, Any]
) -> list[str]:
    """How what a folder holds differs from the meaning of a task or feature here."""
    if there is None:
        return [f"{key}: not there"]
    return [
        f"{key}.{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
        # the labels of a sample space stay what they are without the task that defines it
        and not (name == "where" and not here[name] and there[name] not in wanted["tasks"])
    ]


def extensions_of(experiment: Experiment) -> tuple[type, ...]:
    """The classes of an experiment's features that are not the package's."""
    kinds = dict.fromkeys(type(feature) for feature in experiment.features.values())
    return tuple(kind for kind in kinds if kind not in KINDS.values())


def is_one(task: Task, text: str) -> bool:
    """Whether a cell makes the label of a binary task 1, as in preparation."""
    if task.equals is not None:
        return text == task.equals.strip()
    try:
        number = {"true": 1.0, "false": 0.0}.get(text.lower())
        number = float(text) if number is None else number
    except ValueError:
        return False
    return number == 1 if task.at_least is None else number >= task.at_least


def described(prepared: Prepared) -> Experiment:
    """What a folder was prepared with, as an experiment without a model."""
    values = {"name": prepared.manifest.name, **prepared.manifest.config}
    found: Experiment = choices.read(Experiment, values, str(prepared.folder), prepared.extensions)
    return found


def open_prepared(folder: str | Path, extensions: Iterable[type] = ()) -> Prepared:
    """Open a folder that `prepare` has written, with the classes of kinds of features of your own.

    Raises:
      DataError: the folder is missing, unfinished, or of another format.
    """
    path = a_path("folder", folder) / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{folder} is no prepared folder (no manifest.json). Run: mtrec prepare CONFIG"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise DataError(
                f"{path}: format {values.get('format')}, this version reads {FORMAT}: prepare"
            )
        manifest = pydantic.TypeAdapter(Manifest).validate_python(values)
    except (json.JSONDecodeError, UnicodeDecodeError, pydantic.ValidationError) as error:
        raise DataError(f"{path} is damaged: {error}. Prepare anew") from error
    return Prepared(Path(folder), manifest, tuple(extensions))


def to_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """Arrow columns as NumPy arrays; fixed-size lists become `[n, size]`, without a copy."""
    arrays = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        whole = column.chunk(0) if column.num_chunks == 1 else one_array(column)
        if pa.types.is_fixed_size_list(whole.type):
            flat = whole.flatten().to_numpy(zero_copy_only=False)
            arrays[name] = flat.reshape(len(whole), whole.type.list_size)
        else:
            arrays[name] = whole.to_numpy(zero_copy_only=False)
    return arrays


def fixed_size(array: np.ndarray) -> pa.FixedSizeListArray:
    """`[n, size]` as an Arrow fixed-size list column."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    item = pa.field("item", flat.type, nullable=False)  # no null flags to decode
    return pa.FixedSizeListArray.from_arrays(flat, type=pa.list_(item, array.shape[1]))
