"""A kit for whoever writes a baseline: what every one of them has to get right.

from mtrec_jax.testing import check_baseline

def test_mine():
    check_baseline(Mine(neighbours=5))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float32

from mtrec_jax.baselines import Interactions, Predicts, Ranks, Scorer
from mtrec_jax.errors import DataError
from mtrec_jax.evaluation.ranking import top_items
from mtrec_jax.types import FIRST, PAD, UNKNOWN, Lists

USERS, ITEMS = 24, 16  # a half of each is one community
GROUP = ITEMS // 2
_DAY = 86_400.0


def check_baseline(options: Any, *, personal: bool = True) -> None:
    """Fit a baseline on small data with known answers, and check what comes out.

    Two communities of users like nothing of each other's items. A baseline that ranks puts what is
    left of the own community before the other one; every list leaves out what it is told to;
    padding and unknown ids, and an empty history, change and break nothing. One that predicts says
    more of what everybody rates high. Either is the same when fitted again, and refuses ids beyond
    the users and items.

    Args:
      options: an instance with `kind` and `fit(interactions)`, as in `mtrec_jax.baselines`.
      personal: it looks at users or histories; False, as for popularity: all get the same scores.

    Raises:
      AssertionError: something is wrong; the message says what.

    >>> from mtrec_jax.baselines.item_knn import ItemKnn
    >>> check_baseline(ItemKnn(neighbours=5))
    """
    name = getattr(options, "kind", "")
    _require(bool(name) and isinstance(name, str), f"{type(options).__name__} has no kind")
    interactions, histories = two_communities()
    fitted = options.fit(interactions)
    can = isinstance(fitted, Ranks), isinstance(fitted, Predicts)
    _require(
        any(can),
        f"{name}: fit gave a {type(fitted).__name__}, which has neither scorer(users, histories) "
        "nor predict(task, users, items)",
    )
    if can[0]:
        _check_ranks(name, options, fitted, interactions, histories, personal)
    if can[1]:
        _check_predicts(name, options, fitted, interactions)
    _check_refusals(name, options, interactions)


def two_communities() -> tuple[Interactions, Lists]:
    """The data of `check_baseline`, and the history of each user, in the order of ids.

    User index u and item index i are of the same community where (u < 12) == (i < 8). Users like
    six of the eight items of their own, one a day: all but two neighbouring ones, which are others
    for each user. "stars" rates items of even index 5, of odd index 1, and "click" says which.
    """
    users, items = [], []
    for user in range(USERS):
        group = GROUP * (user >= USERS // 2)
        missing = {user % GROUP, (user + 1) % GROUP}
        liked = [group + item for item in range(GROUP) if item not in missing]
        users += [user + FIRST] * len(liked)
        items += [item + FIRST for item in liked]
    of_users, of_items = np.array(users, np.int32), np.array(items, np.int32)
    offsets = np.searchsorted(of_users, np.arange(USERS + 1) + FIRST)
    good = (of_items % 2 == 0).astype(np.float32)
    interactions = Interactions(
        users=of_users,
        items=of_items,
        liked=np.ones(len(of_users), bool),
        labels={"stars": 1 + 4 * good, "click": good},
        kinds={"stars": "regression", "click": "binary"},
        n_users=USERS,
        n_items=ITEMS,
        times=np.arange(len(of_users)) * _DAY,
    )
    return interactions, Lists(of_items.astype(np.int64), offsets)


def _check_ranks(
    name: str,
    options: Any,
    fitted: Ranks,
    interactions: Interactions,
    histories: Lists,
    personal: bool,
) -> None:
    users, queries = np.arange(USERS) + FIRST, np.arange(USERS)
    scorer = fitted.scorer(users, histories)
    scores = _scores(name, scorer, queries)
    backwards = _scores(name, scorer, queries[::-1])[::-1]
    _same(name, backwards, scores, "scores depend on the order in which queries are asked")
    again = options.fit(interactions).scorer(users, histories)
    _require(
        np.array_equal(_scores(name, again, queries), scores),
        f"{name}: fitted twice on the same data, it gives other scores; take a fixed seed",
    )
    seen = Lists(histories.values - FIRST, histories.offsets)
    best, found = top_items(scorer, queries, ITEMS, seen, ITEMS)
    for user in queries:
        listed = found[user][found[user] >= 0]
        _require(
            not np.isin(listed, seen[user]).any(),
            f"{name}: the list of user id {user + FIRST} has items that it was to leave out",
        )
        left = np.setdiff1d(np.arange(ITEMS), seen[user])
        own = left[(left < GROUP) == (user < USERS // 2)]
        if personal:
            first = listed[: len(own)]
            _require(
                set(first) == set(own) and best[user, len(own) - 1] > -np.inf,
                f"{name}: user id {user + FIRST} likes the other items of the community of "
                f"{_ids(own)}; these have to come first of what is left, not {_ids(first)}",
            )
    if not personal:
        _same(name, scores, scores[:1].repeat(USERS, 0), "not personal, but scores differ by query")
    _check_odd_histories(name, options, fitted, interactions, histories, scores)


def _check_odd_histories(
    name: str,
    options: Any,
    fitted: Ranks,
    interactions: Interactions,
    histories: Lists,
    scores: Float32[np.ndarray, "Q N"],
) -> None:
    """Padding and unknown ids, repeats, users who are not known, and histories without an item."""
    users, queries = np.arange(USERS) + FIRST, np.arange(USERS)
    strange = [np.concatenate(([PAD, UNKNOWN], histories[q], [UNKNOWN])) for q in queries]
    padded = Lists(np.concatenate(strange), histories.offsets + 3 * np.arange(USERS + 1))
    found = _scores(name, fitted.scorer(users, padded), queries)
    _same(name, found, scores, "padding and unknown ids in a history change its scores")

    log = interactions
    more = np.array([PAD, UNKNOWN], np.int32)
    rated = {task: np.append(of, [np.nan, np.nan]) for task, of in log.labels.items()}
    longer = log._replace(
        users=np.append(log.users, [FIRST, UNKNOWN]).astype(np.int32),
        items=np.append(log.items, more),
        liked=np.append(log.liked, [True, True]),
        labels=rated,
        times=None if log.times is None else np.append(log.times, log.times[-1:].repeat(2)),
    )
    found = _scores(name, options.fit(longer).scorer(users, histories), queries)
    _same(name, found, scores, "interactions with padding and unknown items change what is fitted")

    nothing = Lists(np.zeros(0, np.int64), np.zeros(4, np.int64))
    for who in (users[:3], np.array([PAD, UNKNOWN, UNKNOWN])):
        empty = fitted.scorer(who, nothing)
        _scores(name, empty, np.arange(3))
        _, listed = top_items(empty, np.arange(3), 2, None, ITEMS)
        _require(
            bool((listed < ITEMS).all()),
            f"{name}: an empty history lists items beyond the catalogue",
        )
    _scores(name, fitted.scorer(users[:0], Lists(nothing.values, nothing.offsets[:1])), queries[:0])


def _check_predicts(name: str, options: Any, fitted: Predicts, interactions: Interactions) -> None:
    users, items = (side.reshape(-1) for side in np.indices((USERS, ITEMS)) + FIRST)
    strange = np.array([PAD, UNKNOWN])
    again = options.fit(interactions)
    says_nothing = fitted.predict("no such task", users, items) is None
    _require(says_nothing, f"{name}: it predicts a task that there is not; return None")
    for task in interactions.kinds:
        values = fitted.predict(task, users, items)
        if values is None:
            continue
        _require(
            np.shape(values) == users.shape and bool(np.isfinite(values).all()),
            f"{name}: predict of '{task}' gives {np.shape(values)} values for {len(users)} "
            "pairs, or some that are not finite",
        )
        _require(
            np.array_equal(again.predict(task, users, items), values),
            f"{name}: fitted twice on the same data, it predicts other values of '{task}'",
        )
        high = items % 2 == 0
        _require(
            values[high].mean() > values[~high].mean(),
            f"{name}: '{task}' is predicted no higher for items that everybody rates high",
        )
        if interactions.kinds[task] == "binary":
            _require(
                bool(((values >= 0) & (values <= 1)).all()),
                f"{name}: predictions of the binary task '{task}' are no probabilities",
            )
        unknown = fitted.predict(task, strange, strange)
        _require(
            unknown is not None and bool(np.isfinite(unknown).all()),
            f"{name}: predict of '{task}' is not finite for padding and unknown ids",
        )


def _check_refusals(name: str, options: Any, log: Interactions) -> None:
    """An id beyond what it was told of, on either side."""

    def changed(ids: np.ndarray, wrong: int) -> np.ndarray:
        return np.append(np.int32(wrong), ids[1:])

    for wrong in (-1, USERS + FIRST, 2**31 - 1):
        _check_refused(name, options, log._replace(users=changed(log.users, wrong)), "user", wrong)
    for wrong in (-1, ITEMS + FIRST, 2**31 - 1):
        _check_refused(name, options, log._replace(items=changed(log.items, wrong)), "item", wrong)


def _check_refused(name: str, options: Any, broken: Interactions, side: str, wrong: int) -> None:
    try:
        options.fit(broken)
    except DataError:
        return
    raise AssertionError(
        f"{name}: fit takes the {side} id {wrong}, which is beyond the {side}s; call "
        "mtrec_jax.baselines.contract.check_ids first"
    )


def _scores(name: str, scorer: Any, queries: np.ndarray) -> Float32[np.ndarray, "q N"]:
    """Scores, of the right shape, without a nan."""
    _require(isinstance(scorer, Scorer), f"{name}: scorer gave something without scores(queries)")
    scores = np.asarray(scorer.scores(queries))
    _require(
        scores.shape == (len(queries), ITEMS) and scores.dtype == np.float32,
        f"{name}: scores are {scores.dtype} {scores.shape} for {len(queries)} queries and {ITEMS} "
        "items; return float32 [queries, items]",
    )
    _require(not np.isnan(scores).any(), f"{name}: a score is nan")
    return scores


def _same(name: str, found: np.ndarray, expected: np.ndarray, problem: str) -> None:
    _require(bool(np.allclose(found, expected, rtol=1e-4, atol=1e-5)), f"{name}: {problem}")


def _ids(items: np.ndarray) -> str:
    return ", ".join(str(item + FIRST) for item in items)


def _require(holds: bool | np.bool_, problem: str) -> None:
    """`assert` would be left out under `python -O`."""
    if not holds:
        raise AssertionError(problem)
