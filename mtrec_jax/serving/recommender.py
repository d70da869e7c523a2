"""The trained model for its users: raw ids in, raw ids and titles out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_jax import processes
from mtrec_jax.arguments import a_list, a_path, a_whole_number, one_of, shown
from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.kernels import ItemIndex
from mtrec_jax.models.serve import Answer, pad_rows, prepared_serving
from mtrec_jax.serving.requests import (
    BATCH,
    SIZES,
    Encoder,
    History,
    Moments,
    Requests,
    check_id,
    raw_texts,
)
from mtrec_jax.serving.result import Result
from mtrec_jax.train.run import Run, load_best, open_run, shared_mesh
from mtrec_jax.types import FIRST, UNKNOWN, UserStates


class Recommender:
    """Recommendations and predictions of a trained run.

    Args:
      run: from `train` or `open_run`, or the path of a run folder.

    Raises:
      CheckpointError: the run has no usable checkpoint.
    """

    def __init__(self, run: Run | str | Path):
        self.run = run if isinstance(run, Run) else open_run(a_path("run", run))
        self.experiment = self.run.experiment
        self.prepared = self.run.prepared.with_new_items()
        mesh = shared_mesh(self.experiment)
        self._serving = prepared_serving(self.experiment, self.prepared, mesh)
        params, tables, self.step = load_best(self.run, mesh, self._serving.model)
        vectors = self._serving.item_vectors(params, tables)
        self._shared = params, tables, vectors  # by all processes, where there are several
        self._params = self._serving.own(params)
        self._vectors = self._serving.own(vectors) if self.prepared.manifest.items else vectors
        self._index = ItemIndex(self._vectors[FIRST:])
        sizes = SIZES if mesh is None else (BATCH,)  # over devices a batch comes in equal parts
        self._before: Recommender | None = None  # whose events `with_events` has added to
        self._encoder = Encoder(self.prepared, self.experiment.train.precision, sizes)

    def __repr__(self) -> str:
        tasks = ", ".join(self.experiment.tasks)
        return (
            f"Recommender({self.experiment.name!r}, step {self.step}: {tasks}; {self.prepared!r})"
        )

    def _repr_html_(self) -> str:
        m = self.prepared.manifest
        figures = {
            "run": f"{self.run.folder}, step {self.step}",
            "tasks": ", ".join(f"{n} ({t.kind})" for n, t in self.experiment.tasks.items()),
            "data": f"{m.users:,} users, {m.items:,} items, {m.events:,} events",
            "prepared": f"{self.prepared.folder}, {m.fingerprint}",
        }
        pairs = (
            f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>"
            for name, text in figures.items()
        )
        title = html.escape(f"Recommender {self.experiment.name}")
        return f"<table><caption>{title}</caption>{''.join(pairs)}</table>"

    def with_events(self, events: Any) -> Recommender:
        """A recommender of the same model whose users have met more.

        New events follow the stored ones of their user, in the order of time. Pass only what is not
        stored yet; for a whole newer log prepare it, and `load(run, prepared=…)`. Users who were
        not in the data become known by their history.

        Args:
          events: a pandas, Polars or Arrow table, or the path of a file, a row an event, with the
            log's columns of user, item, time and the features of the history; labels are not
            needed. Items and values that the model has never seen count as unknown.

        Raises:
          ConfigError: the data has no users or items, or features that look back on the whole log.
          DataError: a missing column, or an event without user, item or time.
        """
        from mtrec_jax.data.new_rows import with_events  # loads an engine

        found = copy.copy(self)
        found.prepared = with_events(self.prepared, events)
        found.run = dataclasses.replace(self.run, prepared=found.prepared)
        found._encoder = self._encoder.of(found.prepared)
        found._before = self  # a temporary folder lives as long as the recommender of `fit`
        return found

    def recommend(
        self,
        users: Iterable[Any],
        k: int = 10,
        *,
        histories: Sequence[History] | None = None,
        request: Moments = None,
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
          k: items a user. Fewer are returned, without an error, where `exclude_seen`, `allowed` and
            `blocked` leave fewer: often so with a small catalogue.
          histories: instead of the stored ones, for each user the raw item ids, oldest first; or a
            mapping {"item": [...], "<history feature>": [...]}.
          request: what is known of the moment, {"<request feature, or its column>": value}, for all
            users, or a list with one each; what is left out is missing.
          allowed: raw item ids to choose from; None: the whole catalogue.
          blocked: raw item ids never to be shown.
          exclude_seen: leave out what the user's history holds.
          on_unknown: "error" raises for a user who is not in the data.

        Returns:
          A `Result`, a row an item: user, known, rank, item, title, score, every task's
          prediction, the fusion's weight of each task, and new: whether the item has never
          trained, and is known by its features alone. The score is the one of the final
          order: the fused one, or for a user without data and history the item's training events.

        Raises:
          ConfigError: the run has no retrieval task, or `on_unknown` is neither of the two.
          DataError: k is below 1 or above the catalogue; unknown item ids in the filters or the
            histories; unknown users with on_unknown="error"; a text instead of a list of ids.
        """
        users = raw_texts("users", users)
        one_of("on_unknown", on_unknown, ("popular", "error"))
        k, subset = self._admissible(k, allowed, blocked, exclude_seen)
        if histories is not None:
            histories = a_list("histories", histories)
            if len(histories) != len(users):
                raise DataError(f"histories: {len(histories)} given for {len(users)} users")
        moments = moments_of(request, len(users))
        if on_unknown == "error":
            self._refuse_unknown(users)
        tables = []
        for start in range(0, max(len(users), 1), BATCH):
            part = users[start : start + BATCH]
            fresh = None if histories is None else histories[start : start + BATCH]
            encoded = self._encoder.users(part, fresh, moments[start : start + BATCH])
            tables.append(self._recommend_batch(part, k, encoded, subset, exclude_seen))
        return Result(pa.concat_tables(tables))

    def recommend_all(
        self,
        k: int = 10,
        *,
        allowed: Iterable[Any] | None = None,
        blocked: Iterable[Any] = (),
        exclude_seen: bool = True,
    ) -> Iterator[pa.Table]:
        """`recommend` for every user in the data, a table per few hundred users.

        Several processes share the users: each gets tables of its own part, equally many.
        """
        users = self.prepared.user_names
        k, subset = self._admissible(k, allowed, blocked, exclude_seen)
        first = processes.index() * BATCH
        for start in range(first, first + len(users), processes.count() * BATCH):
            part = users[start : start + BATCH]
            encoded = self._encoder.users(part, None, moments_of(None, len(part)))
            yield self._recommend_batch(part, k, encoded, subset, exclude_seen)

    def predict(
        self, users: Iterable[Any], items: Iterable[Any], *, request: Moments = None
    ) -> Result:
        """Every task's prediction for (user, item) pairs, given the users' stored histories.

        Stored histories hold every event of the log. A prediction for a pair that is in the log
        therefore knows its outcome: it says nothing of the model's quality, `evaluate` does.

        Args:
          users, items: raw ids, equally many.
          request: what is known of the moments, as in `recommend`.

        Returns:
          A `Result`, a row a pair in the given order: user, item, known (both are in the data),
          every task's prediction: probability, value in the label's unit, cosine, or one column
          per class; new (the item has never trained); and reason: why the predictions are null,
          as they are for a new item of which no feature is known.

        Raises:
          ConfigError: the data has no users or no items; use `predict_rows`.
          DataError: different lengths, or a text instead of a list of ids.
        """
        if not self._has_pairs:
            raise ConfigError("this run predicts rows, not (user, item) pairs: use predict_rows")
        users, items = raw_texts("users", users), raw_texts("items", items)
        if len(users) != len(items):
            raise DataError(f"predict: {len(users)} users and {len(items)} items; give pairs")
        tables, moments = [], moments_of(request, len(users))
        for start in range(0, max(len(users), 1), BATCH):
            part = users[start : start + BATCH]
            pairs = items[start : start + BATCH]
            encoded = self._encoder.users(part, None, moments[start : start + BATCH], pairs)
            ids = np.array([self.prepared.item_ids.get(i, UNKNOWN) for i in pairs], np.int32)
            columns: dict[str, Any] = {"user": part, "item": pairs}
            columns["known"] = encoded.known & (ids >= FIRST)
            answer = self._answer(self._states(encoded), ids[:, None])
            table = pa.table(columns | self._task_columns(answer, len(part)))
            tables.append(self._marked(table, ids))
        return Result(pa.concat_tables(tables))

    def predict_rows(self, rows: Any) -> Result:
        """Every task's prediction for raw rows: features of the request, and where the data has
        them user and item; a user's stored history and features are used.

        Args:
          rows: a pandas, Polars or Arrow table, or the path of a file: .csv, .tsv, .jsonl or
            .parquet, the first three also .gz or .zst; with another suffix it is of the training
            files' format.

        Returns:
          A `Result`, a row each in the given order: row, where the data has users or items known
          (they are in the data), and every task's prediction as in `predict`.

        Raises:
          DataError: a missing file or column, or a cell that is no number where one is needed.
        """
        from mtrec_jax.data.new_rows import encode_requests  # loads an engine

        arrays, data = encode_requests(self.prepared, rows), self.experiment.data
        n = len(arrays["user"])
        known = np.ones(n, bool)
        for asked, ids in ((data.user, arrays["user"]), (data.item, arrays["candidate"][:, 0])):
            known &= (ids >= FIRST) | (not asked)
        tables = []
        for start in range(0, max(n, 1), BATCH):
            part = {name: a[start : start + BATCH] for name, a in arrays.items()}
            count = len(part["user"])
            answer = self._answer(self._states(self._encoder.rows(part)), part["candidate"])
            columns: dict[str, Any] = {"row": np.arange(start, start + count)}
            if data.user or data.item:
                columns["known"] = known[start : start + count]
            tables.append(pa.table(columns | self._task_columns(answer, count)))
        return Result(pa.concat_tables(tables))

    def similar_items(self, item: Any, k: int = 10) -> Result:
        """The k items whose vectors are nearest to an item's, itself left out.

        Raises:
          DataError: an unknown item, or k is below 1 or above the catalogue.
        """
        k, _ = self._admissible(k, None, ())
        check_id("item", item)
        own = self._encoder.item_ids([item], "item")
        query = self._vectors[own]
        scores, index = self._index.search(query, k, (own - FIRST)[:, None])
        found = np.asarray(index[0])
        found = found[found >= 0]
        raw = self.prepared.item_names
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
        encoded: Requests,
        subset: np.ndarray,
        exclude_seen: bool,
    ) -> pa.Table:
        states = self._states(encoded)
        candidates = self._candidates(encoded, states, k, subset, exclude_seen)
        answer = self._answer(states, candidates)
        n = len(candidates)
        real = candidates >= FIRST
        fused = np.where(real, np.asarray(answer.fused)[:n], -np.inf)
        # without any history the model has nothing to say: popularity keeps its order
        nothing = ~encoded.known & (encoded.batch.cutoff[:n, 0] == 0)
        popularity = self._popularity()[candidates].astype(fused.dtype)
        fused = np.where(nothing[:, None] & real, popularity, fused)
        order = np.argsort(-fused, axis=1, kind="stable")[:, :k]
        row, rank = np.nonzero(np.take_along_axis(real, order, axis=1))
        place = order[row, rank]
        chosen = candidates[row, place] - FIRST
        raw, titles = self.prepared.item_names, self.prepared.titles
        columns: dict[str, Any] = {
            "user": pa.array([users[i] for i in row], pa.string()),  # of a type, even if empty
            "known": encoded.known[row],
            "rank": rank + 1,
            "item": pa.array([raw[i] for i in chosen], pa.string()),
            "title": pa.array([titles[i] for i in chosen], pa.string()),
            "score": fused[row, place],
        }
        columns |= self._task_columns(answer, n, (row, place))
        weights = np.asarray(answer.weights)[:n][row, place]
        columns |= {f"weight {t}": weights[:, i] for i, t in enumerate(self.experiment.tasks)}
        return pa.table(columns | {"new": self._is_new[chosen + FIRST]})

    def _candidates(
        self,
        encoded: Requests,
        states: UserStates,
        k: int,
        subset: np.ndarray,
        exclude_seen: bool,
    ) -> np.ndarray:
        """Item ids [n, K] to put in order, unknown (1) where there are fewer.

        K is `evaluate.candidates`, doubled until k fit in: few compiled shapes.
        """
        n, count = len(encoded.known), self.experiment.evaluate.candidates
        while count < k:
            count *= 2
        count = min(count, len(self._index))
        allowed = np.zeros(len(self._index), bool)
        allowed[subset - FIRST] = True
        width = max(int(np.diff(encoded.seen.offsets).max(initial=0)), 1)
        width = 1 << (width - 1).bit_length()  # few compiled shapes
        exclude = np.full((len(encoded.batch.user), width), -1, np.int32)
        if exclude_seen:
            for i in range(n):
                seen = encoded.seen[i]
                exclude[i, : len(seen)] = np.maximum(seen - FIRST, -1)
        queries = np.asarray(states.vectors)[:, 0]
        found = self._index.search(queries, count, exclude, allowed)[1][:n]
        nothing = np.flatnonzero(~encoded.known & (encoded.batch.cutoff[:n, 0] == 0))
        for row in nothing:
            free = np.setdiff1d(subset, encoded.seen[row]) if exclude_seen else subset
            best = free[np.argsort(-self._popularity()[free], kind="stable")[:count]]
            found[row] = -1
            found[row, : len(best)] = best - FIRST
        return np.where(found >= 0, found + FIRST, UNKNOWN).astype(np.int32)

    def _popularity(self) -> np.ndarray:
        counts = self.prepared.items.column("count").to_numpy()
        return np.concatenate([np.zeros(FIRST, counts.dtype), counts])

    def _states(self, encoded: Requests) -> UserStates:
        return self._serving.states(*self._shared, encoded.batch)

    def _answer(self, states: UserStates, candidates: np.ndarray) -> Answer:
        ids = pad_rows(np.asarray(candidates, np.int32), states.cutoff.shape[0])
        return self._serving.answer(self._params, states, self._vectors, ids)

    def _task_columns(
        self, answer: Answer, n: int, where: tuple[np.ndarray, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Predictions as columns, in the order of the tasks; a column per class for multiclass."""
        rows, places = where if where is not None else (np.arange(n), np.zeros(n, int))
        columns = {}
        for task in self.experiment.tasks:
            values = np.asarray(answer.predictions[task])[rows, places]
            if values.ndim == 1:
                columns[task] = values.astype(np.float32)
            else:
                for c, name in enumerate(self.prepared.manifest.tasks[task].classes):
                    columns[f"{task} {name}"] = values[:, c].astype(np.float32)
        return columns

    def _admissible(
        self,
        k: int,
        allowed: Iterable[Any] | None,
        blocked: Iterable[Any] | None,
        exclude_seen: bool = True,
    ) -> tuple[int, np.ndarray]:
        """k, and the item ids that may be recommended, sorted."""
        one_of("exclude_seen", exclude_seen, (True, False))
        if not any(t.kind == "retrieval" for t in self.experiment.tasks.values()):
            raise ConfigError("this run has no retrieval task, so it cannot recommend; use predict")
        n = self.prepared.manifest.items
        k = a_whole_number("k", k, 1, n, f"the {n:,} items of the catalogue")
        ids = np.flatnonzero(self._scorable)
        if allowed is not None:
            ids = np.intersect1d(ids, self._encoder.item_ids(allowed, "allowed"))
        if blocked is not None:
            ids = np.setdiff1d(ids, self._encoder.item_ids(blocked, "blocked"))
        if not len(ids):
            raise DataError("the filters allowed and blocked leave no item")
        return k, ids

    @functools.cached_property
    def _is_new(self) -> np.ndarray:
        """By item id [N + 2]: items that have never trained, and have no row of their own."""
        rows = self.prepared.item_rows()
        return (np.arange(len(rows)) >= FIRST) & (rows == UNKNOWN)

    @functools.cached_property
    def _scorable(self) -> np.ndarray:
        """By item id [N + 2]: items of which the model knows something, themselves or a feature."""
        known = self.prepared.catalogue()
        told = (known["ids"] >= FIRST).any(axis=1) | (known["numbers"] != 0).any(axis=1)
        return (np.arange(len(told)) >= FIRST) & (~self._is_new | told)

    def _marked(self, table: pa.Table, items: np.ndarray) -> pa.Table:
        """Predictions for items [n], null where nothing can be said of a new one, and why."""
        unscored = self._is_new[items] & ~self._scorable[items]
        for place, name in enumerate(table.column_names):
            if name not in ("user", "item", "known"):
                null = pa.scalar(None, table.schema.field(name).type)
                table = table.set_column(
                    place, name, pc.if_else(pa.array(~unscored), table[name], null)
                )
        reason = "a new item, of which no feature is known"
        why = [reason if no else None for no in unscored.tolist()]
        table = table.append_column("new", pa.array(self._is_new[items]))
        return table.append_column("reason", pa.array(why, pa.string()))

    @property
    def _has_pairs(self) -> bool:
        return bool(self.experiment.data.user and self.experiment.data.item)

    def _refuse_unknown(self, users: Sequence[str]) -> None:
        for user in users:
            if user not in self.prepared.user_ids:
                hint = nearest(user, list(self.prepared.user_ids)[:20_000])
                raise DataError(
                    f"user {user!r} is not in the data of {self.run.folder}.{hint} Pass a history, "
                    'or on_unknown="popular" for the most popular items'
                )


def moments_of(request: Moments, n: int) -> list[Mapping[str, Any]]:
    """What is known of each of n moments.

    Raises:
      DataError: not one mapping, and not one for each.
    """
    if request is None or isinstance(request, Mapping):
        return [request or {}] * n
    moments = a_list("request", request)
    if len(moments) != n or not all(isinstance(moment, Mapping) for moment in moments):
        raise DataError(
            f"request: {shown(request)}; pass a mapping such as {{'device': 'phone'}}, or a list "
            f"of {n:,} of them, one for each"
        )
    return moments


def load(
    folder: str | Path, prepared: str | Path | None = None, extensions: Iterable[type] = ()
) -> Recommender:
    """The recommender of a run folder.

    Args:
      folder: of a run, or what `fit` was given.
      prepared, extensions: as `open_run` takes them.
    """
    folder = a_path("folder", folder)
    if (folder / "run" / "config.toml").is_file():  # of `fit`; it may have been moved as a whole
        folder, prepared = folder / "run", prepared or folder / "prepared"
    return Recommender(open_run(folder, prepared, extensions))


def predict_file(recommender: Recommender, rows: str | Path) -> Result:
    """Predictions for a file: raw rows, or pairs in the columns of user and item.

    Raises:
      DataError: the file is missing, of an unknown format, or has no such columns.
    """
    config, manifest = recommender.experiment.data, recommender.prepared.manifest
    if not (config.user and config.item) or manifest.request_ids or manifest.request_numbers:
        return recommender.predict_rows(rows)
    from mtrec_jax.data.new_rows import read_columns  # loads an engine

    table = read_columns(recommender.experiment, rows, [config.user, config.item])
    users, items = (table.column(c).to_pylist() for c in (config.user, config.item))
    return recommender.predict(users, items)
