"""What recommended lists are like beside their hits: reach, novelty, variety, exposure; alarms.

A list holds the K items of one query, best first, as catalogue indexes, -1 where there are fewer.
Nothing here is of the size of users times items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int, Num

from mtrec_jax.config import Experiment, seen_behaviours
from mtrec_jax.data.dataset import SHOWN, SPLITS, IdField, Prepared
from mtrec_jax.evaluation.collect import met_items, people
from mtrec_jax.evaluation.metrics import Statistic, mean_statistic, ratio_statistic
from mtrec_jax.types import FIRST

# Of what chance leaves open, more than this share in common is an alarm: between the lists of two
# users, and between a user's list and the most popular items that the user may be shown. On the
# built-in shop item-kNN has .47 and .65, popularity .82 and 1; on MovieLens-1M .14, .34, .40 and 1.
SAME, POPULAR = 0.6, 0.8


@dataclass(frozen=True)
class Background:
    """What the lists of a split are judged against: the same for a model and all baselines.

    A user has an item where an event makes it seen, as `evaluate.seen` says.
    """

    share: np.ndarray  # [N] of the training users, how many have each item
    least: float  # share of an item that one training user has
    own: np.ndarray  # [U] mean share of the items that each user has before the split, nan: none
    place: np.ndarray  # [N] of each item by falling share, of equals the lower index first
    alike: Any  # [N, W] array or sparse: rows of length 1, or 0 where nothing is known of an item
    left_out: np.ndarray  # [n] user index * N + place of what users are not to be shown, sorted


def make_background(
    experiment: Experiment, prepared: Prepared, split: str, vectors: Callable[[], np.ndarray]
) -> Background:
    """What is known of users and items when a split is judged.

    Args:
      experiment: what makes an item seen, and whether seen ones are shown; kinds of features.
      prepared: the data.
      split: of the lists. Where it is "train", users have what they have in training.
      vectors: gives the item vectors [N, D] of a model, where items have no features to compare.
    """
    n, users = prepared.manifest.items, prepared.manifest.users
    items, splits, counted = met_items(prepared, seen_behaviours(experiment))
    of_users = slice(items.offsets[0], items.offsets[-1])  # others are of nobody known
    owner = np.repeat(np.arange(len(items)), np.diff(items.offsets))
    item, splits = items.values[of_users].astype(np.int64) - FIRST, splits[of_users]
    counted = counted[of_users] & (item >= 0)
    code = SPLITS.index(split)
    train = counted & (splits == 0)
    before = counted & ((splits < code) | ((splits == SHOWN) & (code > 0)))
    keys = owner * n + item
    pairs = _different(keys[train])
    shown = pairs if np.array_equal(train, before) else _different(keys[before])
    trained = int(np.count_nonzero(np.bincount(pairs // n, minlength=users)))
    share = np.bincount(pairs % n, minlength=n) / (trained or np.nan)  # undefined without users
    place = np.empty(n, np.int64)
    place[np.argsort(-share, kind="stable")] = np.arange(n)
    had = shown if code else pairs
    sizes = np.bincount(had // n, minlength=users).astype(np.float64)
    sizes[sizes == 0] = np.nan
    hidden = shown if experiment.evaluate.exclude_seen else shown[:0]
    return Background(
        share=share,
        least=1 / max(trained, 1),
        own=np.bincount(had // n, share[had % n], users) / sizes,
        place=place,
        alike=_alike(experiment, prepared, vectors),
        left_out=np.sort(hidden // n * n + place[hidden % n]),
    )


def _different(keys: np.ndarray) -> np.ndarray:
    """Each once, in rising order: of whole numbers many times faster than `np.unique`."""
    keys = np.sort(keys)
    return keys[np.append(True, keys[1:] != keys[:-1])[: len(keys)]]


def _alike(experiment: Experiment, prepared: Prepared, vectors: Callable[[], np.ndarray]) -> Any:
    """Rows of length 1 [N, W] by which items are compared: their values of the features with
    several, such as genres; without such of those with one, such as brands; without any the
    vectors of a model."""
    n = prepared.manifest.items
    fields = [field for field in prepared.manifest.item_ids if isinstance(field, IdField)]
    for kind in ("multi_valued", "categorical"):
        chosen = [f for f in fields if getattr(experiment.features[f.name], "kind", "") == kind]
        if chosen:
            return _unit(_values(prepared, chosen, n))
    return _unit(np.asarray(vectors(), np.float64))


def _values(prepared: Prepared, fields: list[IdField], n: int) -> Any:
    """Which values each item has [N, W], as a sparse matrix of 0 and 1."""
    ids, slots = prepared.catalogue()["ids"][FIRST : n + FIRST], {}
    start = 0
    for field in prepared.manifest.item_ids:
        slots[field.name] = slice(start, start + field.slots)
        start += field.slots
    parts = []
    for field in fields:
        own = ids[:, slots[field.name]]
        row, slot = np.nonzero(own >= FIRST)
        value = own[row, slot]
        size = int(own.max(initial=0)) + 1
        parts.append(sp.csr_array((np.ones(len(row)), (row, value)), (n, size)))
    found = sp.hstack(parts, format="csr")
    found.data[:] = 1
    return found


def _unit(rows: Any) -> Any:
    squares = rows.multiply(rows) if sp.issparse(rows) else rows * rows
    norms = np.sqrt(np.asarray(squares.sum(axis=1), np.float64).reshape(-1))
    scale = 1 / np.where(norms > 0, norms, 1)
    return sp.diags_array(scale) @ rows if sp.issparse(rows) else rows * scale[:, None]


def list_statistics(
    lists: Int[np.ndarray, "n K"],
    users: Int[np.ndarray, " n"],
    background: Background,
    ks: Iterable[int],
) -> dict[str, Statistic]:
    """Metrics of recommended lists as functions of query weights `[n]`; of lists that are cut at k:

    - coverage@k: the share of the catalogue that is in some list (Ge, Delgado-Battenfeld and
      Jannach, "Beyond accuracy", RecSys 2010).
    - novelty@k: the mean of -log2 of the share of training users who have an item, in bits (Zhou et
      al., PNAS 2010; Vargas and Castells, RecSys 2011, as free discovery). An item that no training
      user has counts as one that a single user has.
    - diversity@k: the mean of 1 - cosine over the pairs of a list (Ziegler et al., WWW 2005), of
      `Background.alike`. An item of which nothing is known is like no other.
    - popularity@k: the mean share of training users who have the recommended items, over that of
      what the users have themselves: 1 is as popular as their own past. It is 1 + the lift of
      Abdollahpouri et al., "The unfairness of popularity bias in recommendation" (RMSE workshop at
      RecSys 2019), and its numerator their ARP. Users without a past are left out.
    - gini@k: of how often each item of the catalogue is recommended (Shani and Gunawardana,
      "Evaluating recommendation systems", 2011): 0 all alike, 1 one alone.

    Means are over lists, so that each query counts alike; a list that is too short to have a value
    is left out.

    Args:
      lists: catalogue indexes, -1 where a list is shorter.
      users: id of the user of each list.
      background: what they are judged against.
      ks: cut-offs.
    """
    found: dict[str, Statistic] = {}
    known = users >= FIRST
    own = np.full(len(users), np.nan)
    own[known] = background.own[users[known] - FIRST]
    bits = -np.log2(np.maximum(background.share, background.least))
    for k in ks:
        top = lists[:, :k]
        size = (top >= 0).sum(axis=1)
        counts = exposure(top, len(bits))
        compared = (size > 0) & ~np.isnan(own)
        popular = np.where(compared, _mean_of(background.share, top, size), 0)
        found |= {
            f"coverage@{k}": _of_exposure(counts, _covered),
            f"novelty@{k}": _mean_where(_mean_of(bits, top, size), size > 0),
            f"diversity@{k}": _mean_where(*_diversity(top, background.alike)),
            f"popularity@{k}": ratio_statistic(popular, np.where(compared, own, 0)),
            f"gini@{k}": _of_exposure(counts, gini),
        }
    return found


def exposure(
    lists: Int[np.ndarray, "n K"], items: int
) -> Callable[[Float[np.ndarray, " n"]], Num[np.ndarray, " N"]]:
    """How often each item stands in the lists, as a function of their weights.

    >>> exposure(np.array([[0, 2], [2, -1]]), 3)(np.array([1.0, 1.0])).tolist()
    [1.0, 0.0, 2.0]
    """
    row, place = np.nonzero(lists >= 0)
    item = lists[row, place]
    return lambda weights: np.bincount(item, weights[row], items)


def gini(counts: Num[np.ndarray, " N"]) -> float:
    """The Gini coefficient of amounts: half their mean absolute difference over their mean.

    >>> gini(np.array([1.0, 1.0, 1.0])), gini(np.array([0.0, 0.0, 4.0, 4.0]))
    (0.0, 0.5)
    """
    n, total = len(counts), float(counts.sum())
    places = 2 * np.arange(1, n + 1) - n - 1
    return float((places * np.sort(counts)).sum() / (n * total)) if total > 0 else float("nan")


def _covered(counts: np.ndarray) -> float:
    return float(np.count_nonzero(counts) / len(counts)) if counts.any() else float("nan")


def _of_exposure(
    counts: Callable[[np.ndarray], np.ndarray], of: Callable[[np.ndarray], float]
) -> Statistic:
    return lambda weights: of(counts(weights.astype(np.float64)))


def _mean_of(values: np.ndarray, lists: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The mean value of each list's items [n], 0 for an empty one."""
    return np.where(lists >= 0, values[lists], 0).sum(axis=1) / np.maximum(size, 1)


def _mean_where(values: np.ndarray, defined: np.ndarray) -> Statistic:
    if defined.all():
        return mean_statistic(values)
    return ratio_statistic(np.where(defined, values, 0), defined.astype(np.float64))


def _diversity(lists: np.ndarray, alike: Any) -> tuple[np.ndarray, np.ndarray]:
    """1 - the mean cosine of the pairs of each list [n], and whether it has pairs.

    The sum of all cosines of a list, those of items with themselves among them, is the squared
    length of the sum of its rows.
    """
    row, place = np.nonzero(lists >= 0)
    item, n = lists[row, place], len(lists)
    members = sp.csr_array((np.ones(len(row)), (row, item)), (n, alike.shape[0]))
    size = np.bincount(row, minlength=n)
    known = np.asarray((alike.multiply(alike) if sp.issparse(alike) else alike**2).sum(axis=1))
    sums = members @ alike
    squares = sums.multiply(sums) if sp.issparse(sums) else sums**2
    cosines = np.asarray(squares.sum(axis=1)).reshape(-1) - members @ known.reshape(-1)
    return 1 - cosines / np.maximum(size * (size - 1), 1), size > 1


# --- Alarms


def alarms(
    name: str,
    lists: Int[np.ndarray, "n K"],
    users: Int[np.ndarray, " n"],
    background: Background,
    k: int,
) -> list[str]:
    """What is wrong with lists that are nearly the same for everyone, or the popularity list.

    Overlaps are compared with chance, as lists of ten of twenty items share five however different
    the users are: of what chance leaves open, more than `SAME` in common between two users, or more
    than `POPULAR` between a user's list and the most popular items that this user may be shown.

    Args:
      name: of the order of the lists, for the messages.
      lists, users, background: as `list_statistics` takes them.
      k: lists are cut there.

    Returns:
      Messages with the measured values, the threshold, and what to look at; [] where all is well.
    """
    top, found = lists[:, :k], list[str]()
    n, length = len(background.share), float((top >= 0).sum(axis=1).mean()) if len(top) else 0.0
    if not length:
        return found
    shared, chance = overlap_of_users(top, users, n), length / n
    if _beyond(shared, chance) > SAME:
        different = len(np.unique(top[top >= 0]))
        found.append(
            f"{name}: nearly everyone gets the same list. Two users share {shared:.0%} of their "
            f"{length:.3g} items ({chance:.0%} by chance; the alarm is at {SAME:.0%} of what "
            f"chance leaves open), and all lists together hold {different:,} of {n:,} items. See "
            "whether the losses in metrics.jsonl have fallen, whether histories reach the model "
            "(data.history_length, the split), and whether lists differ with other train.negatives"
        )
    shared, chance = overlap_with_popular(top, users, background)
    if _beyond(shared, chance) > POPULAR:
        found.append(
            f"{name}: the lists are the popularity list. A user's list holds {shared:.0%} of the "
            f"most popular items that the user may be shown ({chance:.0%} by chance; the alarm is "
            f"at {POPULAR:.0%} of what chance leaves open). Compare ndcg@{k} and popularity@{k} "
            "with those of the baselines popularity and item_knn: where the model is no better "
            "than popularity, train longer or with another rate, or take harder negatives "
            "(train.negatives.kind = 'popular' or 'mixed')"
        )
    return found


def _beyond(shared: float, chance: float) -> float:
    """The part of what chance leaves open."""
    return (shared - chance) / (1 - chance) if chance < 1 else 0.0


def overlap_of_users(
    lists: Int[np.ndarray, "n K"], users: Int[np.ndarray, " n"], items: int
) -> float:
    """The share of their items that the lists of two different users have in common, over all
    pairs; nan where there is one user alone. Queries of nobody known are users of their own.

    Each item that stands in c lists is shared by c² pairs of them, those within a user taken out.

    >>> lists = np.array([[0, 1], [0, 2], [0, 3]])
    >>> overlap_of_users(lists, np.array([2, 3, 3]), 4)  # the pairs (0, 1) and (0, 2)
    0.5
    """
    who = np.unique(people(users), return_inverse=True)[1]
    row, place = np.nonzero(lists >= 0)
    item, owner = lists[row, place].astype(np.int64), who[row]
    in_all = np.bincount(item, minlength=items).astype(np.float64)
    within = np.unique(owner * items + item, return_counts=True)[1].astype(np.float64)
    of_user = np.bincount(who).astype(np.float64)
    pairs = len(lists) ** 2 - (of_user**2).sum()
    length = len(row) / max(len(lists), 1)
    if not pairs or not length:
        return float("nan")
    return float(((in_all**2).sum() - (within**2).sum()) / pairs / length)


def overlap_with_popular(
    lists: Int[np.ndarray, "n K"], users: Int[np.ndarray, " n"], background: Background
) -> tuple[float, float]:
    """The mean share of each list's items that are among the as many most popular ones that its
    user may be shown; and what it would be by chance.

    An item is one of them where fewer items before it, by falling popularity, are left to show.
    """
    n = len(background.share)
    row, place = np.nonzero(lists >= 0)
    size = (lists >= 0).sum(axis=1)
    rank = background.place[lists[row, place]]
    user = np.maximum(users.astype(np.int64) - FIRST, -1)  # of nobody known nothing is left out
    below, first, last = (
        np.searchsorted(background.left_out, keys)
        for keys in (user[row] * n + rank, user * n, (user + 1) * n)
    )
    first, last = np.where(user < 0, 0, first), np.where(user < 0, 0, last)
    hidden = np.where(user[row] < 0, 0, below - first[row])
    hit = rank - hidden < size[row]
    listed = size > 0
    shares = np.bincount(row, hit, len(lists))[listed] / size[listed]
    chance = size[listed] / np.maximum(n - (last - first)[listed], 1)
    return float(shares.mean()), float(np.minimum(chance, 1).mean())
