"""A baseline as a recommender: what a deep model has to beat, also in daily use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mtrec_jax import choices
from mtrec_jax.arguments import a_whole_number, instance
from mtrec_jax.baselines import BASELINES, Predicts, Ranks, SimilarItems, SimilarUsers
from mtrec_jax.config import Experiment, seen_behaviours
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.evaluation.collect import counted_items
from mtrec_jax.evaluation.comparison import training_interactions
from mtrec_jax.evaluation.ranking import top_items
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
from mtrec_jax.serving.requests import check_id, raw_text, raw_texts
from mtrec_jax.types import FIRST, UNKNOWN, Lists


@dataclass(frozen=True)
class BaselineRecommender:
    """A fitted baseline that is asked in raw ids."""

    prepared: Prepared
    fitted: Ranks | Predicts
    behaviours: tuple[str, ...] = ()  # binary tasks of which a 1 makes an item seen; (): any event

    def recommend(
        self,
        users: Iterable[Any],
        k: int = 10,
        *,
        allowed: Allowed = None,
        blocked: Ids = (),
        at_most: AtMost = None,
        exclude_seen: bool = True,
        unknown_items: UnknownItems = "ignore",
    ) -> Result:
        """The k best items of each user, given the user's whole stored history, of which events
        count that the retrieval is to find.

        Args:
          users: raw user ids; one who is not in the data has no history.
          k: items a user; fewer come back where there are fewer.
          allowed, blocked, at_most, unknown_items: as in `Recommender.recommend`.
          exclude_seen: leave out what the user has seen, as `evaluate.seen` says.

        Returns:
          A `Result`, a row an item: user, known, rank, item, title, score.

        Raises:
          ConfigError: the baseline does not rank items, or there is no such column.
          DataError: k is below 1 or above the catalogue, or what `Recommender.recommend` refuses of
            filters.
        """
        if not isinstance(self.fitted, Ranks):
            raise ConfigError(f"{type(self.fitted).__name__} predicts labels, it ranks no items")
        prepared, names = self.prepared, raw_texts("users", users)
        n = prepared.manifest.items
        k = a_whole_number("k", k, 1, n, f"the {n:,} items of the catalogue")
        ids = np.array([prepared.user_ids.get(name, UNKNOWN) for name in names], np.int64)
        met, seen_of = (counted_items(prepared, of) for of in (prepared.wanted, self.behaviours))
        past = [met[user - FIRST] if user >= FIRST else met.values[:0] for user in ids]
        history = _joined(past)
        seen = None
        if exclude_seen:
            known = [seen_of[user - FIRST] if user >= FIRST else met.values[:0] for user in ids]
            seen = _joined([items.astype(np.int64) - FIRST for items in known])
        scorer = self.fitted.scorer(ids, history)
        filters = read_filters(prepared, allowed, blocked, unknown_items)
        own, quotas = lists_of(names, filters.own), read_quotas(prepared, at_most)
        limits = filters.mask, own, quotas
        scores, found = top_items(scorer, np.arange(len(ids)), k, seen, n, *limits)
        row, place = np.nonzero(found >= 0)
        items = found[row, place]
        columns: dict[str, Any] = {
            "user": pa.array([names[i] for i in row], pa.string()),
            "known": ids[row] >= FIRST,
            "rank": place + 1,
            "item": pa.array([prepared.item_names[i] for i in items], pa.string()),
            "title": pa.array([prepared.titles[i] for i in items], pa.string()),
            "score": scores[row, place],
        }
        ignored = {name: len(unknown) for name, unknown in filters.ignored.items()}
        return Result(pa.table(columns), ignored)

    def similar_items(self, item: Any, k: int = 10) -> Result:
        """The k items most like an item, itself left out: rank, item, title, score. Fewer where
        fewer have anything in common with it.

        Raises:
          ConfigError: the baseline does not say which items are alike.
          DataError: an unknown item, or k is below 1 or above the number of other items.
        """
        prepared, names = self.prepared, self.prepared.item_names
        ask = self.fitted.similar_items if isinstance(self.fitted, SimilarItems) else None
        found, scores = self._alike(ask, "item", item, k, prepared.item_ids)
        columns = {
            "rank": np.arange(1, len(found) + 1),
            "item": [names[i] for i in found],
            "title": [prepared.titles[i] for i in found],
            "score": scores,
        }
        return Result(pa.table(columns))

    def similar_users(self, user: Any, k: int = 10) -> Result:
        """The k users most like a user: rank, user, score; as `similar_items`."""
        names = self.prepared.user_names
        ask = self.fitted.similar_users if isinstance(self.fitted, SimilarUsers) else None
        found, scores = self._alike(ask, "user", user, k, self.prepared.user_ids)
        columns = {"rank": np.arange(1, len(found) + 1), "user": [names[i] for i in found]}
        return Result(pa.table(columns | {"score": scores}))

    def _alike(
        self, ask: Callable[..., Any] | None, what: str, value: Any, k: int, ids: Mapping[str, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indexes and scores of what is most like a raw id."""
        if ask is None:
            raise ConfigError(f"{type(self.fitted).__name__} does not say which {what}s are alike")
        check_id(what, value)
        raw = raw_text(value)
        if raw not in ids:
            hint = nearest(raw, list(ids)[:20_000])
            raise DataError(f"{what} {raw!r} is not in the data of {self.prepared.folder}.{hint}")
        m = self.prepared.manifest
        known = m.items if what == "item" else m.users
        if ids[raw] - FIRST >= known:
            raise DataError(f"{what} {raw!r} is new: it has no events, by which others are like it")
        others = known - 1
        k = a_whole_number("k", k, 1, others, f"the {others:,} other {what}s")
        scores, found = ask(np.array([ids[raw]]), k)
        there = found[0] >= FIRST
        return found[0][there] - FIRST, scores[0][there]


def _joined(parts: list[np.ndarray]) -> Lists:
    values = np.concatenate([np.zeros(0, np.int64), *parts])
    return Lists(values, np.cumsum([0, *map(len, parts)]))


def fit_baseline(
    experiment: Experiment, prepared: Prepared, baseline: str | Mapping[str, Any] | Any
) -> BaselineRecommender:
    """Fit a baseline on the training split of a prepared folder.

    Args:
      experiment: its tasks are what the baseline learns.
      prepared: from `prepare` or `open_prepared`.
      baseline: a kind such as "item_knn", a table such as {"kind": "item_knn", "neighbours": 50},
        or an instance, also of a class of your own.

    Raises:
      ConfigError: there is no such baseline or option; or the folder was prepared for another
        experiment.
      DataError: it cannot be fitted to this data.
    """
    instance("experiment", experiment, Experiment, "pass what load_experiment gives")
    instance("prepared", prepared, Prepared, "pass what prepare or open_prepared gives")
    options = choices.read(choices.Choice(BASELINES), baseline, "baseline")
    prepared = prepared.chosen(experiment)
    fitted = options.fit(training_interactions(experiment, prepared))
    return BaselineRecommender(prepared, fitted, seen_behaviours(experiment))
