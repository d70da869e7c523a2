"""The trained model for its users: raw ids in, raw ids and titles out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import html
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from mtrec_jax import choices, diversity, processes
from mtrec_jax.arguments import a_list, a_path, a_whole_number, argument, one_of, shown
from mtrec_jax.choices import Choice
from mtrec_jax.compilation import use_compilation_cache
from mtrec_jax.config import seen_behaviours
from mtrec_jax.data import features
from mtrec_jax.data.dataset import SPLITS, Prepared
from mtrec_jax.diversity import DIVERSIFIERS
from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.evaluation.answers import CHOSEN, FUSED, Answers, described
from mtrec_jax.evaluation.collect import met_items, ordering
from mtrec_jax.kernels import ItemIndex
from mtrec_jax.kernels.constrained import Picks, Quotas
from mtrec_jax.losses.tasks import class_numbers, labelled
from mtrec_jax.models import interests
from mtrec_jax.models.serve import Answer, look_names, pad_rows, prepared_serving
from mtrec_jax.result import Result
from mtrec_jax.serving.filters import (
    Allowed,
    AtMost,
    Ids,
    UnknownItems,
    lists_of,
    read_filters,
    read_quotas,
)
from mtrec_jax.serving.interests import NEAR, events_of, table_of
from mtrec_jax.serving.requests import (
    BATCH,
    SIZES,
    Encoder,
    History,
    Moments,
    Requests,
    check_id,
    not_there,
    portions,
    raw_text,
    raw_texts,
)
from mtrec_jax.train.run import Run, load_answers, load_best, open_run, shared_mesh
from mtrec_jax.types import FIRST, UNKNOWN, UserStates

WIDE = 512  # candidates of a wider answer than `evaluate.candidates`; then 8 times as many, …
_ASK_POPULAR = 'Pass on_unknown="popular" for the most popular items, or to answer by a history'
CONFIGURED, PLAIN = "configured", "none"  # of `diversify`
_UNSCORED = "a new item, of which no feature is known"
SEEN = (1024, 4096)  # bounds of the seen items of a user that are taken out by a list


@dataclass(frozen=True)
class _Question:
    """What `recommend` is asked of all its users."""

    k: int
    mask: np.ndarray  # [N] bool: items that may be shown
    exclude_seen: bool
    order_by: str  # a task, "fused" or "chosen"
    popular: bool  # strangers without a history get the most popular items
    diversifier: Any  # puts the lists together; None: they are in the plain order
    ignored: dict[str, int]  # ids in each filter that are not in the catalogue
    own: dict[str, np.ndarray] | None  # of each user, the catalogue indexes to choose from
    quotas: Quotas | None


@dataclass(frozen=True)
class _Masks:
    """Which items the users of a batch may get."""

    mask: np.ndarray  # [N] bool
    seen: list[np.ndarray]  # catalogue indexes that each must not be shown
    own: list[np.ndarray] | None  # and those to choose from

    def of(self, row: int | np.integer) -> np.ndarray:
        """[N] bool: those of one user."""
        mask = self.mask.copy()
        if self.own is not None:
            mask[:] = False
            mask[self.own[row]] = self.mask[self.own[row]]
        mask[self.seen[row]] = False
        return mask


class Recommender:
    """Recommendations and predictions of a trained run.

    Programs are compiled when they are first needed, or all at once by `warm_up`, as `load` does.
    Threads may share one: answers are the same, and come one after the other, as each uses all
    cores.

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
        self.answers = load_answers(self.run, self.step) or Answers(step=self.step)
        params = self._serving.calibrated(params, self.answers.calibration)
        vectors = self._serving.item_vectors(params, tables)
        self._shared = params, tables, vectors  # by all processes, where there are several
        self._params = self._serving.own(params)
        self._vectors = self._serving.own(vectors) if self.prepared.manifest.items else vectors
        self._index = ItemIndex(self._serving.compared(self._vectors)[FIRST:])
        sizes = SIZES if mesh is None else (BATCH,)  # over devices a batch comes in equal parts
        behaviours = seen_behaviours(self.experiment)
        precision = self.experiment.train.precision
        self._encoder = Encoder(self.prepared, precision, sizes, behaviours)
        self._compiled: set[tuple[int, int]] | None = None  # (users, candidates), once warm
        self._before: Recommender | None = None  # whose events `with_events` has added to

    def __repr__(self) -> str:
        tasks = ", ".join(self.experiment.tasks)
        return (
            f"Recommender({self.experiment.name!r}, step {self.step}: {tasks}; {self.prepared!r})"
        )

    def order(self, order_by: str = CHOSEN, diversify: Any = CONFIGURED) -> str:
        """One line for people: by which order it recommends, why, what the declared utility is, and
        what puts lists together.

        Args:
          order_by, diversify: as `recommend` takes them.
        """
        return described(self.experiment, self.answers, order_by, self._diversifier(diversify))

    def _diversifier(self, asked: Any, at_most: AtMost = None) -> Any:
        """What `recommend(diversify=)` names; None: nothing, as quotas decide what is in a list."""
        if at_most:
            if isinstance(asked, str) and asked in (CONFIGURED, PLAIN):
                return None
            raise ConfigError("diversify: at_most decides what is in a list; give one of the two")
        if isinstance(asked, str) and asked in (CONFIGURED, PLAIN):
            return self.experiment.evaluate.diversify if asked == CONFIGURED else None
        return choices.read(Choice(DIVERSIFIERS), asked, argument("diversify"))

    def warm_up(self) -> float:
        """Compile what requests need, so that none has to wait: the seconds it took.

        That is up to 512 users or pairs at once, any history, filters and quotas, `predict` without
        looks, `similar_items`, and k up to 512. What is larger, and `recommend_all`, compiles once
        for batches of 256, and a larger k once for each of 4,096, 32,768, …; both say so. Lists of
        users compile when they first come.
        """
        start = time.perf_counter()
        size = self._encoder.sizes[0]
        states = self._states(self._encoder.empty(size))
        self._answer(states, np.full((size, 1), UNKNOWN))
        compiled = {(size, 0)}
        if self._has_retrieval:
            mask, nothing = np.ones(len(self._index), bool), [np.zeros(0, np.int64)] * size
            for width in sorted({self._width(1), self._width(min(WIDE, len(self._index)))}):
                found = self._search(np.asarray(states.vectors)[:, 0], width, nothing, mask)
                self._answer(states, found)
                compiled.add((size, width))
            self._vectors_of(np.full(1, FIRST))
        self._compiled = compiled
        return time.perf_counter() - start

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
            log's columns of user, item, time and the features of the history (after `fit`, the
            labels too, as past ones are such features). Items and values that the model has never
            seen count as unknown.

        Raises:
          ConfigError: the data has no users or items, or features that look back on the whole log.
          DataError: a missing column, or an event without user, item or time.
        """
        from mtrec_jax.data.new_rows import with_events  # loads an engine

        return self._with(with_events(self.prepared, events))

    def with_users(self, users: Any) -> Recommender:
        """A recommender of the same model that knows users by these features.

        Those who are in the data keep their history; new ones have none, and are answered by their
        features, `known` being true.

        Args:
          users: a pandas, Polars or Arrow table, or the path of a file, a row a user, with the
            columns of the user and of all features `on = "context"`.

        Raises:
          ConfigError: the data has no users.
          DataError: a missing column, a user twice, or a cell that is no number, where one is
            needed.
        """
        from mtrec_jax.data.new_rows import with_users  # loads an engine

        return self._with(with_users(self.prepared, users))

    def _with(self, prepared: Prepared) -> Recommender:
        found = copy.copy(self)
        found.prepared = prepared
        found.run = dataclasses.replace(self.run, prepared=found.prepared)
        found._encoder = self._encoder.of(found.prepared)
        for of_users in ("_users", "_users_index"):
            found.__dict__.pop(of_users, None)
        found._before = self  # a temporary folder lives as long as the recommender of `fit`
        return found

    def recommend(
        self,
        users: Iterable[Any],
        k: int = 10,
        *,
        histories: Sequence[History] | None = None,
        request: Moments = None,
        allowed: Allowed = None,
        blocked: Ids = (),
        at_most: AtMost = None,
        exclude_seen: bool = True,
        order_by: str = CHOSEN,
        diversify: Any = CONFIGURED,
        on_unknown: Literal["popular", "model", "error"] = "popular",
        unknown_items: UnknownItems = "ignore",
        new_items: bool = True,
    ) -> Result:
        """The k best items of each user, in the order that was worth most on validation.

        Candidates are the nearest items by cosine; the towers predict every task for them and the
        fusion puts them in order, unless one task's own order has a higher declared utility on
        validation. A user who is not in the data gets the most popular items, of
        which the model says nothing: score and predictions are null. With a history such a user
        gets a real answer. In both cases `known` is false.

        Args:
          users: raw user ids, length U.
          k: items a user. Fewer are returned, without an error, where `exclude_seen`, `allowed`,
            `blocked` and `at_most` leave fewer: often so with a small catalogue.
          histories: instead of the stored ones, for each user the raw item ids, oldest first; or a
            mapping {"item": [...], "<history feature>": [...]}.
          request: what is known of the moment, {"<request feature, or its column>": value}, for all
            users, or a list with one each; what is left out is missing.
          allowed: raw item ids to choose from, or a `pathlib.Path` of a file of them: an id a line,
            or a .csv, .tsv, .jsonl or .parquet with the data's column of items; None: the whole
            catalogue. A mapping {user: such ids} has a list for each of the users.
          blocked: raw item ids never to be shown, or such a file.
          at_most: how many items of a value of a column a list may hold, {"author": 2}. The columns
            are categorical or multi_valued features of items; of those with several values an item
            counts for each. An item without a value is not limited, and values that the model does
            not know count as one. The list is taken greedily in its order; where that leaves it
            short, further candidates are asked for, until no item is left.
          exclude_seen: leave out what the user has seen, as the run's `evaluate.seen` says.
          order_by: "chosen": what training has found best on validation, as `order()` says;
            "fused": the fusion in any case; or a task whose prediction puts them in order.
          diversify: what puts lists together so that their items differ, from the candidates in
            that order and the cosines of item vectors: a kind ("mmr", "dpp"), a table such as
            {"kind": "mmr", "trade": 0.5}, or an instance, also of a class of your own; "none":
            nothing; "configured": what the run's `evaluate.diversify` says, nothing with `at_most`.
            Scores are as they are, so that they no longer fall along a list. The most popular items
            stay in their order.
          on_unknown: of a user who is neither in the data nor has a history: "popular"; "model"
            asks the model about a stranger; "error" raises for any user who is not in the data.
          unknown_items: "error" refuses ids of the filters and histories that are not in the
            catalogue; "ignore" counts them in `Result.ignored`: in a filter they mean nothing, in a
            history an unknown item, as in `with_events`.
          new_items: also items that have never trained, by their features alone; False: none.

        Returns:
          A `Result`, whose `order` says which order it is, a row an item: user, known, rank, item,
          title, score, every task's prediction, the fusion's weight of each task, and new: whether
          the item has never trained, and is known by its features alone. The score is the one of
          the final order: the fused one, or the prediction of a task (of classes, the expected
          number).

        Raises:
          ConfigError: the run has no retrieval task, no such task to order by, no such column, or
            an option is none of those above.
          DataError: k is below 1 or above the catalogue; ids that are not in the catalogue, with
            unknown_items="error"; no item is left; unknown users with on_unknown="error"; a text
            instead of a list of ids.
        """
        users = raw_texts("users", users)
        one_of("on_unknown", on_unknown, ("popular", "model", "error"))
        filters = allowed, blocked, unknown_items, at_most
        orders = order_by, self._diversifier(diversify, at_most)
        asked = self._question(k, filters, exclude_seen, orders, new_items, on_unknown == "popular")
        lists_of(users, asked.own)
        if histories is not None:
            histories = a_list("histories", histories)
            if len(histories) != len(users):
                raise DataError(
                    f"histories: {len(histories)} given for {len(users)} users; pass a list of "
                    "histories, one a user, as in histories=[[1, 2], [3]]"
                )
        moments = moments_of(request, len(users))
        if on_unknown == "error":
            self._refuse_unknown(users)
        tables, unknown = [], set[str]()
        for part in portions(len(users), self._encoder.sizes):
            fresh = None if histories is None else histories[part]
            encoded = self._encoder.users(users[part], fresh, moments[part])
            if encoded.unknown and unknown_items == "error":
                raise not_there(self.prepared, "histories", encoded.unknown[0])
            unknown.update(encoded.unknown)
            tables.append(self._recommend_batch(users[part], encoded, asked))
        in_histories = {"histories": len(unknown)} if unknown else {}
        order = described(self.experiment, self.answers, order_by, asked.diversifier)
        return Result(pa.concat_tables(tables), asked.ignored | in_histories, order)

    def recommend_all(
        self,
        k: int = 10,
        *,
        request: Mapping[str, Any] | None = None,
        allowed: Allowed = None,
        blocked: Ids = (),
        at_most: AtMost = None,
        exclude_seen: bool = True,
        order_by: str = CHOSEN,
        diversify: Any = CONFIGURED,
        unknown_items: UnknownItems = "ignore",
        new_items: bool = True,
    ) -> Iterator[pa.Table]:
        """`recommend` for every user in the data, a table per few hundred users; `request` is what
        is known of the moment of all of them.

        Several processes share the users: each gets tables of its own part, equally many.
        """
        users = self.prepared.user_names
        filters = allowed, blocked, unknown_items, at_most
        orders = order_by, self._diversifier(diversify, at_most)
        asked = self._question(k, filters, exclude_seen, orders, new_items)
        lists_of(users, asked.own)
        first = processes.index() * BATCH
        for start in range(first, first + len(users), processes.count() * BATCH):
            part = users[start : start + BATCH]
            encoded = self._encoder.users(part, None, moments_of(request, len(part)))
            yield self._recommend_batch(part, encoded, asked)

    def predict(
        self,
        users: Iterable[Any],
        items: Iterable[Any],
        *,
        request: Moments = None,
        on_unknown: Literal["null", "model"] = "null",
        looks: bool = False,
    ) -> Result:
        """Every task's prediction for (user, item) pairs, given the users' stored histories.

        Stored histories hold every event of the log. A prediction for a pair that is in the log
        therefore knows its outcome: it says nothing of the model's quality, `evaluate` does.

        Args:
          users, items: raw ids, equally many.
          request: what is known of the moments, as in `recommend`.
          on_unknown: predictions of a pair whose user or item is not in the data are null; "model":
            what the model says of one that it does not know.
          looks: also what happens inside, by a program that is compiled when it is first asked for:
            the fusion's weight of each task, and gates, attention and propensities as columns
            "gates/TASK/EXPERT" and the like, of members "gates/member 1/TASK/EXPERT".

        Returns:
          A `Result`, a row a pair in the given order: user, item, known (both are in the data),
          every task's prediction: probability, value in the label's unit, cosine, or one column
          per class, of ordered classes beside their expected number; new (the item has never
          trained); and reason: why the predictions are null, as they are for a new item of which
          no feature is known.

        Raises:
          ConfigError: the data has no users or no items, use `predict_rows`; or an option is none
            of those above.
          DataError: different lengths, or a text instead of a list of ids.
        """
        if not self._has_pairs:
            raise ConfigError("this run predicts rows, not (user, item) pairs: use predict_rows")
        one_of("on_unknown", on_unknown, ("null", "model"))
        one_of("looks", looks, (True, False))
        users, items = raw_texts("users", users), raw_texts("items", items)
        if len(users) != len(items):
            raise DataError(f"predict: {len(users)} users and {len(items)} items; give pairs")
        tables, moments = [], moments_of(request, len(users))
        for part in portions(len(users), self._encoder.sizes):
            pairs = items[part]
            encoded = self._encoder.users(users[part], None, moments[part], pairs)
            ids = np.array([self.prepared.item_ids.get(i, UNKNOWN) for i in pairs], np.int32)
            known = encoded.known & (ids >= FIRST)
            columns: dict[str, Any] = {"user": users[part], "item": pairs, "known": known}
            told = known | (on_unknown == "model")
            asked = self._states(encoded), ids[:, None], told & ~self._unscored[ids]
            predicted = self._told(*asked, looks)
            tables.append(pa.table(columns | predicted | self._marks(encoded.known, ids, told)))
        return Result(pa.concat_tables(tables))

    def predict_rows(
        self, rows: Any, *, on_unknown: Literal["null", "model"] = "null", looks: bool = False
    ) -> Result:
        """Every task's prediction for raw rows: features of the request, and where the data has
        them user and item; a user's stored history and features are used.

        Args:
          rows: a pandas, Polars or Arrow table, or the path of a file: .csv, .tsv, .jsonl or
            .parquet, the first three also .gz or .zst; with another suffix it is of the training
            files' format.
          on_unknown, looks: as in `predict`.

        Returns:
          A `Result`, a row each in the given order: row, where the data has users or items known
          (they are in the data), and every task's prediction as in `predict`; with items also new
            and reason.

        Raises:
          ConfigError: an option is none of those above.
          DataError: a missing file or column, a cell that is no number where one is needed, or
            times of another unit.
        """
        from mtrec_jax.data.new_rows import encode_requests  # loads an engine

        one_of("on_unknown", on_unknown, ("null", "model"))
        one_of("looks", looks, (True, False))
        bias, data = self.experiment.model.bias, self.experiment.data
        arrays = encode_requests(self.prepared, rows, bias.features if bias else ())
        n = len(arrays["user"])
        known = np.ones(n, bool)
        for asked, ids in ((data.user, arrays["user"]), (data.item, arrays["candidate"][:, 0])):
            known &= (ids >= FIRST) | (not asked)
        tables = []
        for place in portions(n, self._encoder.sizes):
            part = {name: a[place] for name, a in arrays.items()}
            columns: dict[str, Any] = {"row": np.arange(place.start, place.stop)}
            if data.user or data.item:
                columns["known"] = known[place]
            told, marks = known[place] | (on_unknown == "model"), {}
            if data.item:
                items = part["candidate"][:, 0]
                users = (part["user"] >= FIRST) | (not data.user)
                marks = self._marks(users, items, told)
                told = told & ~self._unscored[items]
            states = self._states(self._encoder.rows(part))
            predicted = self._told(states, part["candidate"], told, looks)
            tables.append(pa.table(columns | predicted | marks))
        return Result(pa.concat_tables(tables))

    def similar_items(self, item: Any, k: int = 10) -> Result:
        """The k items whose vectors are nearest to an item's, itself left out.

        Raises:
          DataError: an unknown item, or a new one of which no feature is known; or k is below 1 or
            above the catalogue.
        """
        k = self._checked(k, True)
        check_id("item", item)
        raw_item = raw_text(item)
        if raw_item not in self.prepared.item_ids:
            raise not_there(self.prepared, "item", raw_item)
        own = np.array([self.prepared.item_ids[raw_item]])
        if self._unscored[own].any():
            raise DataError(f"item {item!r} is {_UNSCORED}: nothing is known to be near it")
        mask = ~self._unscored[FIRST:]
        mask[own - FIRST] = False
        queries = self._vectors_of(own)
        width = self._width(k)
        with_none = [np.zeros(0, np.int64)] * len(queries)
        scores, index = self._nearest(queries, width, with_none, mask)
        found = index[0][:k]
        found = found[found >= 0]
        raw = self.prepared.item_names
        columns = {
            "rank": np.arange(1, len(found) + 1),
            "item": [raw[i] for i in found],
            "title": [self.prepared.titles[i] for i in found],
            "cosine": scores[0][: len(found)],
        }
        return Result(pa.table(columns))

    def similar_users(self, user: Any, k: int = 10) -> Result:
        """The k users whose vectors are nearest to a user's, itself left out, each with its stored
        history; with several interests a user, by the mean cosine of those of the same number.

        The vectors of all users are computed at the first call, as long as `recommend_all` takes.

        Returns:
          A `Result`, a row a user: rank, user, cosine.

        Raises:
          ConfigError: the run has no retrieval task.
          DataError: an unknown user; or k is below 1 or above the number of other users.
        """
        self._checked(1, True)
        check_id("user", user)
        others = self.prepared.manifest.users - 1
        k = a_whole_number("k", k, 1, others, f"the {others:,} other users")
        raw_user = raw_text(user)
        self._refuse_unknown([raw_user], "Pass one who is")
        own = np.array([[self.prepared.user_ids[raw_user] - FIRST]])
        scores, found = self._users_index.search(self._users[own[0]], k, own)
        columns = {
            "rank": np.arange(1, k + 1),
            "user": [self.prepared.user_names[i] for i in found[0]],
            "cosine": scores[0],
        }
        return Result(pa.table(columns))

    def interests(self, users: Iterable[Any]) -> Result:
        """What each of a user's `model.interests` is: the one vector of most models, or several.

        Args:
          users: raw ids of users of the data.

        Returns:
          A `Result`, a row an interest, those of a user by falling number of events: user,
          interest (1, 2, …), events (how many of the model's history are nearer to it than to the
          others), values (what the items near it have in common, see `shared_values`) and items
          (titles of the nearest).

        Raises:
          ConfigError: the run has no retrieval task.
          DataError: a user who is not in the data.
        """
        users = raw_texts("users", users)
        size = self._checked(min(NEAR, int((~self._unscored[FIRST:]).sum())), True)
        if not self.prepared.manifest.history_length:
            raise ConfigError("interests: this run reads no history, so that there are none")
        self._refuse_unknown(users, "Strangers have no events to be told apart")
        width = self._serving.model.layout.width
        events: list[np.ndarray] = []
        near = [np.zeros((0, self.experiment.model.interests, size), np.int64)]
        for part in portions(len(users), self._encoder.sizes):
            n = part.stop - part.start
            encoded = self._encoder.users(users[part], None, [{}] * n)
            vectors = np.asarray(self._states(encoded).vectors)[:, 0]
            each = vectors.reshape(len(vectors), -1, width)
            scored = ~self._unscored[FIRST:]
            found = self._index.search(each.reshape(-1, width), size, allowed=scored)[1]
            near.append(found.reshape(*each.shape[:2], size)[:n])
            met = jnp.take(self._vectors, jnp.asarray(encoded.batch.events["item"]), axis=0)
            past, lengths = np.asarray(self._serving.compared(met)), encoded.batch.cutoff[:, 0]
            events += [events_of(each[row], past[row, : lengths[row]]) for row in range(n)]
        given = self.experiment, self.prepared, users, events, np.concatenate(near)
        return Result(table_of(*given))

    def _recommend_batch(self, users: list[str], encoded: Requests, asked: _Question) -> pa.Table:
        n = len(users)
        states = self._states(encoded)
        queries = np.asarray(states.vectors)[:, 0]
        seen = self._seen_of(encoded, asked, len(queries))
        width, own = self._width(asked.k), lists_of(users, asked.own)
        candidates = self._search(queries, width, seen, asked.mask, own)[:n]
        # without any history the model has nothing to say: popularity keeps its order
        nothing = asked.popular & ~encoded.known & (encoded.batch.cutoff[:n, 0] == 0)
        masks = _Masks(asked.mask, seen, own)
        for stranger in np.flatnonzero(nothing):
            candidates[stranger] = self._popular(masks.of(stranger), width)
        ordered = functools.partial(self._ordered, states, nothing, asked.order_by)
        answer, key, score = ordered(candidates)
        real = candidates >= FIRST
        if asked.quotas is not None:
            again = functools.partial(self._again, queries, width, nothing, masks)
            picks = _within(asked.quotas, asked.k, candidates, key, lambda c: ordered(c)[1], again)
            candidates = np.full_like(candidates, UNKNOWN)
            for own_list, pick in zip(candidates, picks, strict=True):
                own_list[: len(pick.places)] = np.array(pick.places, int) + FIRST
            answer, key, score = ordered(candidates)
            real = candidates >= FIRST
        order = diversity.falling(key, real)[:, : asked.k]
        if asked.diversifier is not None:
            vectors, k = self._host_vectors[candidates], min(asked.k, width)
            places = diversity.diversify(asked.diversifier, key, real, vectors, k)
            order = np.where(nothing[:, None], order, places)
        row, rank = np.nonzero(np.take_along_axis(real, order, axis=1))
        place = order[row, rank]
        chosen, told = candidates[row, place] - FIRST, ~nothing[row]
        raw, titles = self.prepared.item_names, self.prepared.titles
        columns: dict[str, Any] = {
            "user": pa.array([users[i] for i in row], pa.string()),  # of a type, even if empty
            "known": encoded.known[row],
            "rank": rank + 1,
            "item": pa.array([raw[i] for i in chosen], pa.string()),
            "title": pa.array([titles[i] for i in chosen], pa.string()),
            "score": pa.array(score[row, place], mask=~told),
        }
        columns |= self._task_columns(answer, (row, place), told)
        columns |= self._weight_columns(answer, (row, place), told)
        return pa.table(columns | {"new": self._is_new[chosen + FIRST]})

    def _ordered(
        self, states: UserStates, nothing: np.ndarray, order_by: str, candidates: np.ndarray
    ) -> tuple[Answer, np.ndarray, np.ndarray]:
        """What is said of candidates [n, K]; what they are ordered by, and the score shown."""
        answer = self._answer(states, candidates)
        key, score = self._order(answer, order_by, len(candidates))
        places = -np.arange(candidates.shape[1], dtype=key.dtype)
        return answer, np.where(nothing[:, None], places, key), score

    def _again(
        self,
        queries: np.ndarray,
        width: int,
        nothing: np.ndarray,
        masks: _Masks,
        row: int,
        left: np.ndarray,
    ) -> np.ndarray:
        """Further candidates [width] of one user, among the items that are left."""
        mask = masks.of(row) & left
        if nothing[row]:
            return self._popular(mask, width)
        found = self._alone(queries[row], width, mask)[1]
        return np.where(found >= 0, found + FIRST, UNKNOWN).astype(np.int32)

    def _width(self, k: int) -> int:
        """Candidates that are put in order: `evaluate.candidates`, or the first of 512, 4,096, …
        that has room for k; few compiled shapes."""
        width = self.experiment.evaluate.candidates
        wider = WIDE
        while width < k:
            width, wider = max(width, wider), 8 * wider
        return min(width, len(self._index))

    def _seen_of(self, encoded: Requests, asked: _Question, size: int) -> list[np.ndarray]:
        """Catalogue indexes, each once, that each of a batch must not be shown."""
        seen = [np.zeros(0, np.int64)] * size
        if asked.exclude_seen:
            for i in range(len(encoded.known)):
                items = np.unique(encoded.seen[i])
                seen[i] = items[items >= FIRST] - FIRST
        return seen

    def _search(
        self,
        queries: np.ndarray,
        width: int,
        seen: list[np.ndarray],
        mask: np.ndarray,
        own: list[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Item ids [B, width] by falling cosine, unknown (1) where there are fewer."""
        found = self._nearest(queries, width, seen, mask, own)[1]
        return np.where(found >= 0, found + FIRST, UNKNOWN).astype(np.int32)

    def _nearest(
        self,
        queries: np.ndarray,
        width: int,
        seen: list[np.ndarray],
        mask: np.ndarray,
        own: list[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and catalogue indexes [B, width], -1 where there are fewer; `own` are the lists
        of the first users, where these have any.

        A user who has seen more than a list holds is asked for alone, with a mask: the sizes, and
        so the programs, are always the same.
        """
        if own is not None:
            left = [np.setdiff1d(*pair) for pair in zip(own, seen, strict=False)]
            left += [np.zeros(0, np.int64)] * (len(queries) - len(left))
            return interests.search(self._index, queries, width, None, mask, left)
        room = self._room
        exclude = np.full((len(queries), room), -1, np.int32)
        for row, items in enumerate(seen):
            if len(items) <= room:
                exclude[row, : len(items)] = items
        self._announce(len(queries), width)
        scores, found = interests.search(self._index, queries, width, exclude, mask)
        masks = _Masks(mask, seen, None)
        for row in (row for row, items in enumerate(seen) if len(items) > room):
            scores[row], found[row] = self._alone(queries[row], width, masks.of(row))
        return scores, found

    def _alone(
        self, query: np.ndarray, width: int, mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`_nearest` of one user among the items of a mask."""
        alone = np.repeat(query[None], self._encoder.sizes[0], axis=0)
        none = np.full((len(alone), self._room), -1, np.int32)
        scores, found = interests.search(self._index, alone, width, none, mask)
        return scores[0], found[0]

    @functools.cached_property
    def _room(self) -> int:
        """How many seen items a list holds; it stays when users have met more, as do programs."""
        room = SEEN[0] if self._encoder.most_seen <= SEEN[0] else SEEN[1]
        return min(room, 1 << (len(self._index) - 1).bit_length())

    def _announce(self, size: int, width: int = 0) -> None:
        """A word about programs that were not compiled ahead."""
        if self._compiled is not None and (size, width) not in self._compiled:
            self._compiled.add((size, width))
            what = f", {width:,} candidates each" if width else ""
            _say(f"compiling for batches of {size}{what}; the next ones do without")

    def _order(self, answer: Answer, order_by: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """What candidates are ordered by, and the score that is shown: [n, K] both."""
        order_by = self.answers.order if order_by == CHOSEN else order_by
        if order_by == FUSED:
            fused = np.asarray(answer.fused)[:n]
            return fused, fused
        logits = np.asarray(answer.logits[order_by])[:n]
        score = ordering(self.experiment, self.prepared.manifest)[order_by](logits)
        predicted = np.asarray(answer.predictions[order_by])[:n]
        return score, predicted if predicted.ndim == 2 else score

    def _popular(self, free: np.ndarray, width: int) -> np.ndarray:
        """Item ids [width] of a mask by falling number of training events that the retrieval is to
        find, unknown where there are fewer."""
        items = np.flatnonzero(free)
        best = items[np.argsort(-self._training_counts[items], kind="stable")[:width]]
        found = np.full(width, UNKNOWN, np.int32)
        found[: len(best)] = best + FIRST
        return found

    @functools.cached_property
    def _training_counts(self) -> np.ndarray:
        if not self.prepared.wanted:
            return self.prepared.items.column("count").to_numpy()
        items, splits, counted = met_items(self.prepared, self.prepared.wanted)
        found = items.values[counted & (splits == SPLITS.index("train"))]
        return np.bincount(found[found >= FIRST] - FIRST, minlength=self.prepared.manifest.items)

    def _vectors_of(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of item ids, as many as the smallest batch has: [B, D]."""
        places = pad_rows(ids.astype(np.int32), self._encoder.sizes[0], FIRST)
        return np.asarray(self._serving.compared(jnp.take(self._vectors, places, axis=0)))

    @functools.cached_property
    def _host_vectors(self) -> np.ndarray:
        """Vectors by item id [N + 2, D], for what compares the items of a list with each other."""
        return np.asarray(self._serving.compared(self._vectors))

    @functools.cached_property
    def _users(self) -> np.ndarray:
        """Vectors of all users [U, K * D], each of the K of length 1."""
        names, found = self.prepared.user_names, []
        for start in range(0, len(names), BATCH):
            part = names[start : start + BATCH]
            encoded = self._encoder.users(part, None, moments_of(None, len(part)))
            found.append(np.asarray(self._states(encoded).vectors)[: len(part), 0])
        each = np.concatenate(found).reshape(len(names) * self.experiment.model.interests, -1)
        length = np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12)
        return (each / length).reshape(len(names), -1)

    @functools.cached_property
    def _users_index(self) -> ItemIndex:
        return ItemIndex(self._users)

    def _states(self, encoded: Requests) -> UserStates:
        self._announce(len(encoded.batch.user))
        return self._serving.states(*self._shared, encoded.batch)

    def _answer(self, states: UserStates, candidates: np.ndarray) -> Answer:
        ids = pad_rows(np.asarray(candidates, np.int32), states.cutoff.shape[0])
        return self._serving.answer(self._params, states, self._vectors, ids)

    def _told(
        self, states: UserStates, candidates: np.ndarray, told: np.ndarray, looks: bool
    ) -> dict[str, pa.Array]:
        """Columns of predictions of each user's one candidate [n, 1], and of what is inside, null
        where nothing can be told."""
        where = np.arange(len(candidates)), np.zeros(len(candidates), int)
        answer = self._answer(states, candidates)
        columns = self._task_columns(answer, where, told)
        if not looks:
            return columns
        columns |= self._weight_columns(answer, where, told)
        ids = pad_rows(np.asarray(candidates, np.int32), states.cutoff.shape[0])
        found = self._serving.looks(self._params, states, self._vectors, ids)
        tasks = [n for n, task in self.experiment.tasks.items() if task.kind != "retrieval"]
        for name, numbers in found.items():
            values = np.asarray(numbers)[where].astype(np.float32)
            names = look_names(name, values.shape[1:], tasks, self.experiment.model.members)
            flat = values.reshape(len(values), len(names))
            for number, column in enumerate(names):
                columns[column] = pa.array(flat[:, number].copy(), mask=~told)
        return columns

    def _weight_columns(
        self, answer: Answer, where: tuple[np.ndarray, np.ndarray], told: np.ndarray
    ) -> dict[str, pa.Array]:
        """The fusion's weight of each task at (rows, places)."""
        weights = np.asarray(answer.weights)[where]
        return {
            f"weight {task}": pa.array(weights[:, i].copy(), mask=~told)
            for i, task in enumerate(self.experiment.tasks)
        }

    def _task_columns(
        self, answer: Answer, where: tuple[np.ndarray, np.ndarray], told: np.ndarray
    ) -> dict[str, pa.Array]:
        """Predictions at (rows, places) as columns, in the order of the tasks, null where nothing
        can be told; a column per class for multiclass and ordinal, beside the expected number."""
        columns = {}
        for task in self.experiment.tasks:
            values = np.asarray(answer.predictions[task])[where].astype(np.float32)
            if values.ndim == 1:
                columns[task] = pa.array(values, mask=~told)
                continue
            classes = self.prepared.manifest.tasks[task].classes
            if self.experiment.tasks[task].kind in labelled("levels"):
                expected = values @ np.array(class_numbers(classes), np.float32)
                columns[task] = pa.array(expected, mask=~told)
            for c, name in enumerate(classes):
                columns[f"{task} {name}"] = pa.array(values[:, c].copy(), mask=~told)
        return columns

    def _checked(self, k: int, exclude_seen: bool) -> int:
        """k, of a run that can recommend."""
        one_of("exclude_seen", exclude_seen, (True, False))
        if not self._has_retrieval:
            raise ConfigError("this run has no retrieval task, so it cannot recommend; use predict")
        n = self.prepared.manifest.items
        return a_whole_number("k", k, 1, n, f"the {n:,} items of the catalogue")

    def _question(
        self,
        k: int,
        filters: tuple[Allowed, Ids, UnknownItems, AtMost],
        exclude_seen: bool,
        orders: tuple[str, Any],
        new_items: bool,
        popular: bool = True,
    ) -> _Question:
        """What is asked of the items that `filters` leave, in the order of their annotation, with
        `orders` (order_by, diversifier).

        Raises:
          ConfigError, DataError: what `recommend` refuses.
        """
        order_by, diversifier = orders
        tasks = ordering(self.experiment, self.prepared.manifest)
        one_of("order_by", order_by, (CHOSEN, FUSED, *tasks))
        k = self._checked(k, exclude_seen)
        allowed, blocked, unknown_items, at_most = filters
        found = read_filters(self.prepared, allowed, blocked, unknown_items)
        one_of("new_items", new_items, (True, False))
        mask = found.mask & ~(self._unscored if new_items else self._is_new)[FIRST:]
        if not mask.any():
            raise DataError(
                "the filters allowed and blocked leave no item that the model can score"
            )
        ignored = {name: len(ids) for name, ids in found.ignored.items()}
        quotas = read_quotas(self.prepared, at_most)
        filtered = ignored, found.own, quotas
        return _Question(k, mask, exclude_seen, order_by, popular, diversifier, *filtered)

    @property
    def _has_retrieval(self) -> bool:
        return any(t.kind == "retrieval" for t in self.experiment.tasks.values())

    @functools.cached_property
    def _is_new(self) -> np.ndarray:
        """By item id [N + 2]: items that have never trained, and have no row of their own."""
        rows = self.prepared.item_rows()
        return (np.arange(len(rows)) >= FIRST) & (rows == UNKNOWN)

    @functools.cached_property
    def _unscored(self) -> np.ndarray:
        """By item id [N + 2]: new items of which the model knows no feature either, but unknown
        values, and what it takes missing ones for."""
        known, m = self.prepared.catalogue(), self.prepared.manifest
        names = [field.name for group in (m.item_ids, m.item_numbers) for field in group]
        empty = dict.fromkeys(names, pa.nulls(1, pa.string()))
        encodings = [features.restore(self.prepared, name) for name in names]
        ids, numbers = features.encode_all(encodings, empty, 1)
        told = (known["ids"] >= FIRST) & (known["ids"] != ids)
        return self._is_new & ~told.any(axis=1) & (known["numbers"] == numbers).all(axis=1)

    def _marks(self, users: np.ndarray, items: np.ndarray, told: np.ndarray) -> dict[str, pa.Array]:
        """Columns of predictions for pairs [n] of users (whether they are known) and item ids:
        which items are new, and why nothing is said of some."""
        missing = [~users & (items < FIRST), ~users]
        names = ["neither user nor item is", "the user is not"]
        reasons = np.select([told, *missing], ["", *names], "the item is not")
        reasons = np.where(told, "", np.strings.add(reasons, " in the data"))
        reasons = np.where(self._unscored[items], _UNSCORED, reasons)
        return {
            "new": pa.array(self._is_new[items]),
            "reason": pa.array([text or None for text in reasons.tolist()], pa.string()),
        }

    @property
    def _has_pairs(self) -> bool:
        return bool(self.experiment.data.user and self.experiment.data.item)

    def _refuse_unknown(self, users: Sequence[str], remedy: str = _ASK_POPULAR) -> None:
        for user in users:
            if user not in self.prepared.user_ids:
                hint = nearest(user, list(self.prepared.user_ids)[:20_000])
                raise DataError(
                    f"user {user!r} is not in the data of {self.run.folder}.{hint} {remedy}"
                )


def _within(
    quotas: Quotas,
    k: int,
    candidates: np.ndarray,
    key: np.ndarray,
    keys_of: Callable[[np.ndarray], np.ndarray],
    again: Callable[[int, np.ndarray], np.ndarray],
) -> list[Picks]:
    """The list of each user, greedily by falling key, within quotas.

    Whose list is short gets further candidates from `again(user, items that are left)`. Each round
    adds an item at least, as the first of them has room, until there are k or no items are left.

    Args:
      candidates, key: [n, K] item ids, unknown where there are fewer, and what orders them.
      keys_of: the keys of other candidates.
    """
    picks, asked = [Picks(quotas, k) for _ in candidates], list(range(len(candidates)))
    while asked:
        for row in asked:
            order = np.argsort(-key[row], kind="stable")
            ids = candidates[row][order]
            picks[row].take(key[row][order][ids >= FIRST], ids[ids >= FIRST] - FIRST)
        asked = [i for i in asked if not picks[i].is_full and (candidates[i] >= FIRST).all()]
        if asked:
            candidates = np.full_like(candidates, UNKNOWN)
            for row in asked:
                candidates[row] = again(row, picks[row].left())
            key = keys_of(candidates)
    return picks


def _say(text: str) -> None:
    print(f"mtrec: {text}", file=sys.stderr)


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
    folder: str | Path,
    prepared: str | Path | None = None,
    extensions: Iterable[type] = (),
    warm: bool = True,
) -> Recommender:
    """The recommender of a run folder, ready to answer.

    Args:
      folder: of a run, or what `fit` was given.
      prepared, extensions: as `open_run` takes them.
      warm: compile now what requests need (`Recommender.warm_up`), and say on standard error how
        long it took; False: when they come, which is faster where only one does. Programs are kept
        for the next process, as those of the commands are.
    """
    use_compilation_cache()
    recommender = Recommender(open_run(folder, prepared, extensions))
    if warm:
        _say(f"compiled for all requests in {recommender.warm_up():.1f} s")
    return recommender


def predict_file(
    recommender: Recommender,
    rows: str | Path,
    on_unknown: Literal["null", "model"] = "null",
    looks: bool = False,
) -> Result:
    """Predictions for a file: raw rows, or pairs in the columns of user and item; `on_unknown` and
    `looks` as in `Recommender.predict`.

    Raises:
      DataError: the file is missing, of an unknown format, or has no such columns.
    """
    config, manifest = recommender.experiment.data, recommender.prepared.manifest
    if not (config.user and config.item) or manifest.request_ids or manifest.request_numbers:
        return recommender.predict_rows(rows, on_unknown=on_unknown, looks=looks)
    from mtrec_jax.data.new_rows import read_columns  # loads an engine

    table = read_columns(recommender.experiment, rows, [config.user, config.item])
    users, items = (table.column(c).to_pylist() for c in (config.user, config.item))
    return recommender.predict(users, items, on_unknown=on_unknown, looks=looks)
