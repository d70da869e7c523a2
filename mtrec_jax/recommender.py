"""The trained model for its users: raw ids in, raw ids and titles out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from mtrec_jax.config import Experiment, parse_experiment
from mtrec_jax.data.dataset import Lists, to_arrays
from mtrec_jax.data.prepare import encode_rows, prepare, read_columns
from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.evaluation.inference import pad_rows, predictions, prepared_inference
from mtrec_jax.kernels import cosine_topk
from mtrec_jax.result import Result
from mtrec_jax.train.loop import train
from mtrec_jax.train.run import Run, load_best, open_run
from mtrec_jax.types import FIRST, Batch, Outputs, UserStates

BATCH = 256  # users or pairs scored at once

History = Sequence[str] | Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class _Users:
    """Encoded users: what the model needs, and what must not be recommended to them."""

    batch: Batch
    known: np.ndarray  # [n] bool
    seen: Lists  # item ids


class Recommender:
    """Recommendations and predictions of a trained run.

    Args:
      run: from `train` or `open_run`, or the path of a run folder.

    Raises:
      CheckpointError: the run has no usable checkpoint.
    """

    def __init__(self, run: Run | str | Path):
        self.run = run if isinstance(run, Run) else open_run(run)
        self.experiment, self.prepared = self.run.experiment, self.run.prepared
        self._params, self._tables, self.step = load_best(self.run)
        self._inference = prepared_inference(self.experiment, self.prepared)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        has_items = self.prepared.manifest.items > 0
        width = self.experiment.model.width
        self._vectors = (
            self._inference.item_vectors(self._params, self._tables)
            if has_items
            else jnp.zeros((0, width))
        )
        self._lists: dict[str, Lists] = {}
        self._vocabularies: dict[str, dict[str, int]] = {}

    def __repr__(self) -> str:
        tasks = ", ".join(self.experiment.tasks)
        return (
            f"Recommender({self.experiment.name!r}, step {self.step}: {tasks}; {self.prepared!r})"
        )

    def recommend(
        self,
        users: Iterable[Any],
        k: int = 10,
        *,
        histories: Sequence[History] | None = None,
        allowed: Iterable[Any] | None = None,
        blocked: Iterable[Any] = (),
        exclude_seen: bool = True,
        on_unknown: Literal["popular", "error"] = "popular",
    ) -> Result:
        """The k best items of each user, in the fused order.

        Candidates are the nearest items by cosine; the towers predict every task for them and the
        fusion puts them in order. A user who is not in the data gets the most popular items (or,
        with a history, a real answer), and `known` is false.

        Args:
          users: raw user ids, length U.
          k: items a user; fewer are returned only when filters leave fewer.
          histories: instead of the stored ones, for each user the raw item ids, oldest first; or a
            mapping {"item": [...], "<history feature>": [...]}.
          allowed: raw item ids to choose from; None: the whole catalogue.
          blocked: raw item ids never to be shown.
          exclude_seen: leave out what the user's history holds.
          on_unknown: "error" raises for a user who is not in the data.

        Returns:
          A `Result`, a row an item: user, known, rank, item, title, score (of the final order),
          every task's prediction, and the fusion's weight of each task.

        Raises:
          ConfigError: the run has no retrieval task.
          DataError: k is below 1 or above the catalogue; unknown item ids in the filters or the
            histories; unknown users with on_unknown="error".
        """
        users = [str(u) for u in users]
        subset = self._admissible(k, allowed, blocked)
        if histories is not None and len(histories) != len(users):
            raise DataError(f"histories: {len(histories)} given for {len(users)} users")
        if on_unknown == "error":
            self._refuse_unknown(users)
        tables = []
        for start in range(0, len(users), BATCH):
            part = users[start : start + BATCH]
            fresh = None if histories is None else histories[start : start + BATCH]
            tables.append(self._recommend_batch(part, k, fresh, subset, exclude_seen))
        if not tables:
            tables = [self._recommend_batch([], k, None, subset, exclude_seen)]
        return Result(pa.concat_tables(tables))

    def recommend_all(self, k: int = 10) -> Iterator[pa.Table]:
        """`recommend` for every user in the data, a table per few hundred users."""
        users = self.prepared.users.column("id").to_pylist()
        subset = self._admissible(k, None, ())
        for start in range(0, len(users), BATCH):
            yield self._recommend_batch(users[start : start + BATCH], k, None, subset, True)

    def predict(self, users: Iterable[Any], items: Iterable[Any]) -> Result:
        """Every task's prediction for (user, item) pairs, given the users' stored histories.

        Args:
          users, items: raw ids, equally many.

        Returns:
          A `Result`, a row a pair in the given order: user, item, known (both are in the data),
          and every task's prediction: probability, value in the label's unit, cosine, or one
          column per class.

        Raises:
          ConfigError: the run was trained on rows, use `predict_rows`.
          DataError: different lengths.
        """
        if self.prepared.manifest.kind != "sequences":
            raise ConfigError("this run predicts rows, not (user, item) pairs: use predict_rows")
        users, items = [str(u) for u in users], [str(i) for i in items]
        if len(users) != len(items):
            raise DataError(f"predict: {len(users)} users and {len(items)} items; give pairs")
        tables = []
        for start in range(0, max(len(users), 1), BATCH):
            part = users[start : start + BATCH]
            pairs = items[start : start + BATCH]
            encoded = self._encode_users(part, None)
            ids = np.array([self.prepared.item_ids.get(i, 1) for i in pairs], np.int32)
            outputs = self._rank(encoded, ids[:, None])
            columns: dict[str, Any] = {"user": part, "item": pairs}
            columns["known"] = encoded.known & (ids >= FIRST)
            columns |= self._task_columns(outputs, len(part))
            tables.append(pa.table(columns))
        return Result(pa.concat_tables(tables))

    def predict_rows(self, rows: Any) -> Result:
        """Every task's prediction for raw rows of a run that was trained on rows.

        Args:
          rows: a path in the format of the training files, or a pandas, Polars or Arrow table.

        Raises:
          ConfigError: the run was trained on sequences, use `predict`.
          DataError: a missing file or column.
        """
        if self.prepared.manifest.kind != "rows":
            raise ConfigError("this run predicts (user, item) pairs, not rows: use predict")
        arrays = encode_rows(self.prepared, rows)
        n = len(arrays["user"])
        tables = []
        for start in range(0, max(n, 1), BATCH):
            part = {name: a[start : start + BATCH] for name, a in arrays.items()}
            count = len(part["user"])
            outputs = self._rank(self._encode_context(part), part["candidate"])
            columns: dict[str, Any] = {"row": np.arange(start, start + count)}
            tables.append(pa.table(columns | self._task_columns(outputs, count)))
        return Result(pa.concat_tables(tables))

    def similar_items(self, item: Any, k: int = 10) -> Result:
        """The k items whose vectors are nearest to an item's, itself left out.

        Raises:
          DataError: an unknown item, or k is below 1 or above the catalogue.
        """
        self._admissible(k, None, ())
        own = self._item_ids([item])
        query = self._vectors[own]
        scores, index = cosine_topk(query, self._vectors[FIRST:], k, (own - FIRST)[:, None])
        found = np.asarray(index[0])
        found = found[found >= 0]
        raw = self.prepared.items.column("id").to_pylist()
        columns = {
            "rank": np.arange(1, len(found) + 1),
            "item": [raw[i] for i in found],
            "title": [self.prepared.titles[i] for i in found],
            "cosine": np.asarray(scores[0])[: len(found)],
        }
        return Result(pa.table(columns))

    def _recommend_batch(
        self,
        users: list[str],
        k: int,
        histories: Sequence[History] | None,
        subset: np.ndarray,
        exclude_seen: bool,
    ) -> pa.Table:
        encoded = self._encode_users(users, histories)
        candidates = self._candidates(encoded, k, subset, exclude_seen)
        outputs = self._rank(encoded, candidates)
        n, count = candidates.shape
        real = candidates >= FIRST
        fused = np.where(real, np.asarray(outputs.fused)[:n], -np.inf)
        # without any history the model has nothing to say: popularity keeps its order
        nothing = ~encoded.known & (encoded.batch.cutoff[:n, 0] == 0)
        fused = np.where(nothing[:, None] & real, -np.arange(count, dtype=fused.dtype), fused)
        order = np.argsort(-fused, axis=1, kind="stable")[:, :k]
        row, rank = np.nonzero(np.take_along_axis(real, order, axis=1))
        place = order[row, rank]
        chosen = candidates[row, place] - FIRST
        raw, titles = self.prepared.items.column("id").to_pylist(), self.prepared.titles
        columns: dict[str, Any] = {
            "user": [users[i] for i in row],
            "known": encoded.known[row],
            "rank": rank + 1,
            "item": [raw[i] for i in chosen],
            "title": [titles[i] for i in chosen],
            "score": fused[row, place],
        }
        columns |= self._task_columns(outputs, n, (row, place))
        weights = np.asarray(outputs.fusion)[:n][row, place]
        columns |= {f"weight {t}": weights[:, i] for i, t in enumerate(self.experiment.tasks)}
        return pa.table(columns)

    def _candidates(
        self, encoded: _Users, k: int, subset: np.ndarray, exclude_seen: bool
    ) -> np.ndarray:
        """Item ids [n, K] to put in order, unknown (1) where there are fewer."""
        n = len(encoded.known)
        count = min(max(self.experiment.evaluate.candidates, k), len(subset))
        place = np.full(self.prepared.manifest.items + FIRST, -1, np.int32)
        place[subset] = np.arange(len(subset))
        width = max(int(np.diff(encoded.seen.offsets).max(initial=0)), 1)
        width = 1 << (width - 1).bit_length()  # few compiled shapes
        exclude = np.full((BATCH, width), -1, np.int32)
        if exclude_seen:
            for i in range(n):
                seen = place[encoded.seen[i]]
                exclude[i, : len(seen)] = seen
        states = self._states(encoded)
        vectors = self._vectors[subset]
        found = np.asarray(cosine_topk(states.vectors[:, 0], vectors, count, exclude)[1])[:n]
        nothing = np.flatnonzero(~encoded.known & (encoded.batch.cutoff[:n, 0] == 0))
        if len(nothing):
            popular = np.argsort(-self._popularity()[subset], kind="stable")
            found = found.copy()
            found[nothing] = popular[:count]
        return np.where(found >= 0, subset[found], 1).astype(np.int32)

    def _popularity(self) -> np.ndarray:
        counts = self.prepared.items.column("count").to_numpy()
        return np.concatenate([np.zeros(FIRST, counts.dtype), counts])

    def _states(self, encoded: _Users) -> UserStates:
        return self._inference.users(self._params, self._tables, self._vectors, encoded.batch)

    def _rank(self, encoded: _Users, candidates: np.ndarray) -> Outputs:
        states = self._states(encoded)
        ids = pad_rows(np.asarray(candidates, np.int32), BATCH)
        shape = (*ids.shape, states.vectors.shape[-1])
        states = states._replace(vectors=jnp.broadcast_to(states.vectors, shape))
        return self._inference.rank(self._params, states, self._vectors, ids)

    def _task_columns(
        self, outputs: Outputs, n: int, where: tuple[np.ndarray, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Predictions as columns, in the order of the tasks; a column per class for multiclass."""
        rows, places = where if where is not None else (np.arange(n), np.zeros(n, int))
        logits = {t: np.asarray(outputs.logits[t])[rows, places] for t in self.experiment.tasks}
        columns = {}
        for task, values in predictions(self.experiment, self.prepared.manifest, logits).items():
            if values.ndim == 1:
                columns[task] = values.astype(np.float32)
            else:
                for c, name in enumerate(self.prepared.manifest.tasks[task].classes):
                    columns[f"{task} {name}"] = values[:, c].astype(np.float32)
        return columns

    def _encode_users(self, users: list[str], histories: Sequence[History] | None) -> _Users:
        """Users to a batch of exactly BATCH examples of one position."""
        manifest, n = self.prepared.manifest, len(users)
        ids = np.array([self.prepared.user_ids.get(u, 1) for u in users], np.int32)
        known = ids >= FIRST
        fields = ["item", *(f.name for f in manifest.history)]
        length = manifest.history_length
        events = {name: np.zeros((n, length), np.int32) for name in fields}
        cutoff = np.zeros((n, 1), np.int32)
        seen = []
        for i in range(n):
            if histories is not None:
                past = self._encode_history(histories[i], fields)
            elif known[i]:
                past = {name: self._list(f"event_{name}")[ids[i] - FIRST] for name in fields}
            else:
                past = {name: np.zeros(0, np.int32) for name in fields}
            count = min(len(past["item"]), length)
            for name in fields:
                events[name][i, :count] = past[name][len(past[name]) - count :]
            cutoff[i] = count
            seen.append(past["item"])
        lengths = np.cumsum([0, *(len(s) for s in seen)])
        values = np.concatenate([np.zeros(0, np.int32), *seen])
        columns = [
            c for c in ("context_ids", "context_numbers") if c in self.prepared.users.column_names
        ]
        arrays = {}
        for name, array in to_arrays(self.prepared.users.select(columns)).items():
            chosen = array[np.maximum(ids - FIRST, 0)] if n else array[:0]
            arrays[name] = np.where(known[:, None], chosen, np.zeros((), array.dtype))
        batch = self._batch(arrays, events, cutoff, ids)
        return _Users(batch, known, Lists(values, lengths))

    def _encode_context(self, arrays: dict[str, np.ndarray]) -> _Users:
        n = len(arrays["user"])
        batch = self._batch(arrays, {}, np.zeros((n, 1), np.int32), arrays["user"])
        return _Users(batch, np.ones(n, bool), Lists(np.zeros(0, np.int32), np.zeros(n + 1, int)))

    def _batch(
        self,
        arrays: dict[str, np.ndarray],
        events: dict[str, np.ndarray],
        cutoff: np.ndarray,
        user: np.ndarray,
    ) -> Batch:
        dtype = self.experiment.train.precision
        context = {}
        if self.prepared.manifest.context_ids:
            context["ids"] = pad_rows(arrays["context_ids"], BATCH)
        if self.prepared.manifest.context_numbers:
            context["numbers"] = pad_rows(arrays["context_numbers"].astype(dtype), BATCH)
        one = np.zeros((BATCH, 1), np.int32)
        return Batch(
            context=context,
            events={name: pad_rows(a, BATCH) for name, a in events.items()},
            cutoff=pad_rows(cutoff, BATCH),
            candidate=one,
            labels={},
            mask={},
            user=pad_rows(user, BATCH),
            weight=np.ones((BATCH, 1), dtype),
            row=one,
        )

    def _encode_history(self, history: History, fields: list[str]) -> dict[str, np.ndarray]:
        columns = history if isinstance(history, Mapping) else {"item": history}
        unknown = sorted(set(columns) - set(fields))
        if unknown or "item" not in columns:
            raise DataError(f"history: has {', '.join(columns)}; it may have {', '.join(fields)}")
        past = {"item": self._item_ids(columns["item"]).astype(np.int32)}
        for name in fields[1:]:
            vocabulary = self._vocabulary(name)
            values = columns.get(name, [None] * len(past["item"]))
            ids = [0 if v is None else vocabulary.get(_text(v), 1) for v in values]
            past[name] = np.array(ids, np.int32)
            if len(past[name]) != len(past["item"]):
                raise DataError(
                    f"history: {len(past[name])} values of {name} for {len(past['item'])} items"
                )
        return past

    def _vocabulary(self, feature: str) -> dict[str, int]:
        if feature not in self._vocabularies:
            values = self.prepared.vocabulary(feature).column("value").to_pylist()
            self._vocabularies[feature] = {v: i + FIRST for i, v in enumerate(values)}
        return self._vocabularies[feature]

    def _list(self, column: str) -> Lists:
        if column not in self._lists:
            self._lists[column] = self.prepared.user_lists(column)
        return self._lists[column]

    def _admissible(
        self, k: int, allowed: Iterable[Any] | None, blocked: Iterable[Any]
    ) -> np.ndarray:
        """Item ids that may be recommended, sorted."""
        if not any(t.kind == "retrieval" for t in self.experiment.tasks.values()):
            raise ConfigError("this run has no retrieval task, so it cannot recommend; use predict")
        n = self.prepared.manifest.items
        if not 1 <= k <= n:
            raise DataError(f"k = {k}: between 1 and the {n:,} items of the catalogue")
        ids = np.arange(FIRST, n + FIRST, dtype=np.int64)
        if allowed is not None:
            ids = np.unique(self._item_ids(allowed))
        ids = np.setdiff1d(ids, self._item_ids(blocked))
        if not len(ids):
            raise DataError("the filters allowed and blocked leave no item")
        return ids

    def _item_ids(self, items: Iterable[Any]) -> np.ndarray:
        found = []
        for raw in items:
            item = self.prepared.item_ids.get(_text(raw))
            if item is None:
                hint = nearest(_text(raw), list(self.prepared.item_ids)[:20_000])
                raise DataError(f"item {raw!r} is not in the catalogue of {self.run.folder}.{hint}")
            found.append(item)
        return np.array(found, np.int64)

    def _refuse_unknown(self, users: Sequence[str]) -> None:
        for user in users:
            if user not in self.prepared.user_ids:
                hint = nearest(user, list(self.prepared.user_ids)[:20_000])
                raise DataError(
                    f"user {user!r} is not in the data of {self.run.folder}.{hint} Pass a history, "
                    'or on_unknown="popular" for the most popular items'
                )


def fit(
    events: Any,
    *,
    user: str,
    item: str,
    time: str,
    tasks: Mapping[str, str | Mapping[str, Any]],
    items: Any = None,
    title: str = "",
    users: Any = None,
    features: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    folder: str | Path | None = None,
    show_progress: bool = True,
) -> Recommender:
    """Prepare, train and load a recommender from tables in memory.

    Args:
      events: pandas, Polars or Arrow table, a row an event.
      user, item, time: its columns; time is a number (seconds) or a timestamp.
      tasks: {name: kind} or {name: {"kind": …, "column": …, …}} as in the configuration, e.g.
        `{"next_item": "retrieval", "like": {"kind": "binary", "column": "rating", "at_least": 4}}`.
      items, title: table of the items with the same item column, and its column of titles.
      users: table of the users with the same user column.
      features: further inputs, {name: {"on": …, "kind": …, "column": …}}. By default the history
        shows the tasks' label columns of past events.
      settings: further sections of the configuration, e.g. `{"train": {"epochs": 5}}`.
      folder: where prepared data and the run are kept; by default a temporary folder that lives as
        long as the recommender.
      show_progress: print progress to standard error.

    Raises:
      ConfigError, DataError: as `load_experiment`, `prepare` and `train`.
    """
    temporary = tempfile.TemporaryDirectory(prefix="mtrec-") if folder is None else None
    place = Path(temporary.name if temporary else str(folder))
    experiment = _experiment_of(user, item, time, tasks, title, features, settings)
    tables = {"events": events, "items": items, "users": users}
    tables = {name: table for name, table in tables.items() if table is not None}
    prepared = prepare(experiment, None, place / "prepared", tables=tables)
    recommender = Recommender(
        train(experiment, prepared, place / "run", show_progress=show_progress)
    )
    recommender._temporary = temporary
    return recommender


def _experiment_of(
    user: str,
    item: str,
    time: str,
    tasks: Mapping[str, str | Mapping[str, Any]],
    title: str,
    features: Mapping[str, Mapping[str, Any]] | None,
    settings: Mapping[str, Mapping[str, Any]] | None,
) -> Experiment:
    declared = {n: {"kind": t} if isinstance(t, str) else dict(t) for n, t in tasks.items()}
    if features is None:
        features = {
            t.get("column", name): {
                "on": "history",
                "kind": "categorical" if t["kind"] == "multiclass" or "equals" in t else "binned",
            }
            for name, t in declared.items()
            if t.get("kind") not in (None, "retrieval")
        }
    values: dict[str, Any] = {
        "name": "fit",
        "data": {"user": user, "item": item, "time": time, "title": title},
        "features": {name: dict(feature) for name, feature in features.items()},
        "tasks": declared,
        "train": {"epochs": 30, "patience": 4},
    }
    for section, keys in (settings or {}).items():
        values[section] = {**values.get(section, {}), **keys}
        if "steps" in keys and section == "train" and "epochs" not in keys:
            values[section]["epochs"] = 0
    return parse_experiment(values, where="fit")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def predict_file(recommender: Recommender, rows: str | Path) -> Result:
    """Predictions for a file: raw rows, or pairs in the columns of user and item.

    Raises:
      DataError: the file is missing, of an unknown format, or has no such columns.
    """
    if recommender.prepared.manifest.kind == "rows":
        return recommender.predict_rows(rows)
    config = recommender.experiment.data
    table = read_columns(recommender.experiment, Path(rows), [config.user, config.item])
    users, items = (table.column(c).to_pylist() for c in (config.user, config.item))
    return recommender.predict(users, items)
