"""One pass of the model over a split: predictions, ranks and orders of every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from mtrec_jax import processes
from mtrec_jax.config import Experiment, seen_behaviours
from mtrec_jax.data.dataset import SHOWN, SPLITS, Manifest, Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.diversity import diversify, falling
from mtrec_jax.errors import ConfigError
from mtrec_jax.kernels import ItemIndex
from mtrec_jax.losses.tasks import Head, TaskField, class_numbers, head_of
from mtrec_jax.models import interests
from mtrec_jax.models.serve import Answer, Serving, pad_rows
from mtrec_jax.types import FIRST, Batch, Lists, PyTree, UserStates

ABSENT = np.iinfo(np.int32).max  # rank of a target that is not among the candidates
OrderOf = Callable[[np.ndarray], np.ndarray]
QUERIES = 256  # targets that are ranked at once, in one program of the index


@dataclass
class Collected:
    """A split's targets and what the model says about them, one entry each, in file order."""

    user: np.ndarray  # [n]
    candidate: np.ndarray  # [n]
    labels: dict[str, np.ndarray]  # {task: [n]}, nan where there is none
    logits: dict[str, np.ndarray]  # {task: [n] or [n, C]} as in `Answer`
    fused: np.ndarray  # [n]
    retrieved: np.ndarray  # [n] bool: a target of the retrieval task
    ranks: np.ndarray  # [n] among all items by cosine, ABSENT where not retrieved, or seen before
    order_ranks: dict[str, np.ndarray]  # {order: [n]} among the candidates, ABSENT as well
    # {order: [n, K] the first catalogue indexes of its list, -1 where there are fewer, or none}
    lists: dict[str, np.ndarray] = field(default_factory=dict)


class Ways(NamedTuple):
    """The ways to put candidates in order."""

    sorted_by: Mapping[str, OrderOf]  # {task: of its logits}; beside them the fused one
    length: int = 0  # K of the lists that are kept; 0: none are
    diversifier: Any = None  # puts the list of one order together anew; None: of none
    diversified: str = ""  # that order
    vectors: np.ndarray | None = None  # [N, D] by which it compares items

    @property
    def names(self) -> list[str]:
        """All orders."""
        plain = ["fused", *self.sorted_by]
        own = recommended_name(self.diversified, self.diversifier)
        return plain if self.diversifier is None else [*plain, own]


def recommended_name(order: str, diversifier: Any) -> str:
    """What an order is called whose lists a diversifier, if there is one, puts together.

    >>> from mtrec_jax.diversity import Mmr
    >>> recommended_name("fused", Mmr()), recommended_name("click", None)
    ('fused, mmr', 'click')
    """
    return order if diversifier is None else f"{order}, {diversifier.kind}"


def collect(
    experiment: Experiment,
    prepared: Prepared,
    serving: Serving,
    params: PyTree,
    tables: dict[str, jax.Array],
    split: str,
    orders: bool,
    recommended: str = "",
) -> Collected:
    """Run the model over a split.

    Args:
      experiment, prepared, serving, params, tables, split: what is run over what.
      orders: also put the retrieved candidates of each target in order, by each way.
      recommended: with `orders`, the order that `recommend` takes: the lists of all orders are kept
        as far as metrics look, and that of `evaluate.diversify` upon this order; "": neither.
    """
    vectors = serving.item_vectors(params, tables)
    own_vectors = serving.own(vectors) if prepared.manifest.items else vectors
    own_params = serving.own(params)
    index = ItemIndex(serving.compared(own_vectors)[FIRST:])
    retrieval = _retrieval(experiment)
    ways = _ways(experiment, prepared, serving.compared(own_vectors), recommended)
    exclude_seen = retrieval is not None and experiment.evaluate.exclude_seen
    everyone = np.arange(prepared.manifest.users) + FIRST
    seen = left_out_items(experiment, prepared, split, everyone) if exclude_seen else None
    mask, last = candidates_of(experiment, prepared), last_targets(experiment, prepared, split)
    widest = 0 if seen is None else int(np.diff(seen.offsets).max(initial=0))
    parts: list[Collected] = []
    alone = last if len(experiment.tasks) == 1 and serving.mesh is None else None
    for batch in _own_batches(experiment, prepared, serving, split, alone):
        states = serving.states(params, tables, vectors, batch)
        part = _predicted(batch, serving.answer(own_params, states, own_vectors, batch.candidate))
        r, p = np.nonzero(np.asarray(batch.weight) > 0)
        if retrieval is not None:
            observed = np.asarray(batch.mask[retrieval])[r, p] > 0
            part.retrieved = observed & (part.candidate >= FIRST)
            if mask is not None:
                part.retrieved &= mask[np.maximum(part.candidate - FIRST, 0)]
            if last is not None:
                assert batch.row is not None
                part.retrieved &= np.isin(np.asarray(batch.row)[r, p], last)
            if orders:
                part.order_ranks = {n: np.full(len(r), ABSENT, np.int64) for n in ways.names}
            if ways.length:
                part.lists = {n: np.full((len(r), ways.length), -1, np.int32) for n in ways.names}
            rows = np.flatnonzero(part.retrieved)
            for start in range(0, len(rows), QUERIES):
                chosen = rows[start : start + QUERIES]
                places = pad_rows(np.stack([r, p])[:, chosen].T, QUERIES)
                queries = serving.moments(states, places)
                exclude = _exclude(seen, widest, part, chosen)
                targets = pad_rows(part.candidate[chosen] - FIRST, QUERIES).astype(np.int32)
                users, most = queries.vectors[:, 0], max(experiment.evaluate.ks, default=1)
                ranks = interests.ranks(index, users, targets, exclude, mask, most)
                part.ranks[chosen] = missed(ranks[: len(chosen)], targets, exclude)
                if orders:
                    reranked = min(experiment.evaluate.candidates, prepared.manifest.items)
                    k = max(reranked, ways.length)
                    found = interests.search(index, users, k, exclude, mask)[1]
                    given = serving, own_params, part, chosen, queries, own_vectors
                    _rerank(*given, found[:, :reranked], ways)
                    if ways.length:  # by cosine, as ranks are: no fewer than metrics look at
                        part.lists[retrieval][chosen] = found[: len(chosen), : ways.length]
        parts.append(part)
    asked = _in_file_order(parts)
    return asked if alone is None else _among_all(asked, prepared.interactions(split), alone)


def candidates_of(experiment: Experiment, prepared: Prepared) -> np.ndarray | None:
    """[N] bool: the items that targets are ranked among, and which targets have to be one of; None:
    all.

    Raises:
      ConfigError: every item has trained.
    """
    if experiment.evaluate.among == "all":
        return None
    n, trained = prepared.manifest.items, prepared.manifest.trained_items
    if trained == n:
        raise ConfigError(
            "evaluate.among: 'untrained', but every item has training events; prepare with "
            "split.kind = 'cold_item', or take 'all'"
        )
    return np.arange(n) >= trained


def _retrieval(experiment: Experiment) -> str | None:
    return next((n for n, t in experiment.tasks.items() if t.kind == "retrieval"), None)


def last_targets(experiment: Experiment, prepared: Prepared, split: str) -> np.ndarray | None:
    """Source rows of the targets that are ranked, of each user the last that can be; None: all."""
    if experiment.evaluate.targets == "all" or not _retrieval(experiment):
        return None
    found = _rankable(experiment, prepared, split)
    return found["row"][_is_last(found["user"])]


def _is_last(user: np.ndarray) -> np.ndarray:
    """Whether no other target of the same user follows, the users' targets in one piece; targets of
    nobody known are on their own."""
    return np.append(user[1:] != user[:-1], np.ones(min(1, len(user)), bool)) | (user < FIRST)


def _rankable(experiment: Experiment, prepared: Prepared, split: str) -> dict[str, np.ndarray]:
    """The targets of a split that can be ranked, user by user in the order of time."""
    found, times = prepared.interactions(split), prepared.times(split)
    found["time"] = np.zeros(len(found["user"])) if times is None else times
    kept = ~np.isnan(found[f"label_{_retrieval(experiment)}"]) & (found["candidate"] >= FIRST)
    mask = candidates_of(experiment, prepared)
    if mask is not None:
        kept &= mask[np.maximum(found["candidate"] - FIRST, 0)]
    order = np.lexsort((found["row"], found["time"], found["user"]))
    return {name: array[order][kept[order]] for name, array in found.items()}


def people(user: np.ndarray) -> np.ndarray:
    """Whose each target is, as numbers [n]: a target of nobody known is on its own.

    >>> people(np.array([5, 0, 5, 1])).tolist()
    [5, -2, 5, -4]
    """
    return np.where(user >= FIRST, user.astype(np.int64), -1 - np.arange(len(user)))


def _own_batches(
    experiment: Experiment,
    prepared: Prepared,
    serving: Serving,
    split: str,
    alone: np.ndarray | None,
) -> Iterator[Batch]:
    """This process's batches of a split, without targets of other rows than those that are asked
    for alone; the processes take turns and have equally many."""
    devices = 1 if serving.mesh is None else serving.mesh.size // processes.count()
    size = -(-experiment.evaluate.batch_size // devices) * devices
    config = experiment.train
    source = BatchSource(
        prepared, split, size, dtype=config.precision, timeout=config.input_timeout
    )
    if alone is not None:
        yield from _together(source, alone, size)
        return
    for first in range(0, len(source), processes.count()):
        number = first + processes.index()
        yield source[number] if number < len(source) else source.empty(size)


def _together(source: BatchSource, rows: np.ndarray, size: int) -> Iterator[Batch]:
    """Full batches of the examples of these rows, the last one filled up."""
    kept = source.empty(0)
    for number in range(len(source)):
        batch = source[number]
        chosen = np.flatnonzero(np.isin(np.asarray(batch.row), rows).any(axis=1))
        kept = _one_after(kept, _cut(batch, chosen))
        if len(kept.user) >= size:
            yield _cut(kept, slice(size))
            kept = _cut(kept, slice(size, None))
    yield _one_after(kept, source.empty(size - len(kept.user)))


def _cut(batch: Batch, chosen: np.ndarray | slice) -> Batch:
    cut: Batch = jax.tree.map(lambda array: array[chosen], batch)
    return cut


def _one_after(first: Batch, second: Batch) -> Batch:
    both: Batch = jax.tree.map(lambda *arrays: np.concatenate(arrays), first, second)
    return both


def _among_all(found: Collected, every: dict[str, np.ndarray], alone: np.ndarray) -> Collected:
    """What was asked for some rows alone in its place among all targets of the split; of the others
    nothing is predicted."""
    asked = np.isin(every["row"], alone)

    def spread(values: np.ndarray, rest: Any) -> np.ndarray:
        whole = np.full((len(asked), *values.shape[1:]), rest, values.dtype)
        whole[asked] = values
        return whole

    return Collected(
        user=every["user"],
        candidate=every["candidate"],
        labels={n: every[f"label_{n}"] for n in found.labels},
        logits={n: spread(v, np.nan) for n, v in found.logits.items()},
        fused=spread(found.fused, np.nan),
        retrieved=spread(found.retrieved, False),
        ranks=spread(found.ranks, ABSENT),
        order_ranks={n: spread(v, ABSENT) for n, v in found.order_ranks.items()},
        lists={n: spread(v, -1) for n, v in found.lists.items()},
    )


def _predicted(batch: Batch, answer: Answer) -> Collected:
    """A batch's targets and predictions, nothing retrieved yet."""
    r, p = np.nonzero(np.asarray(batch.weight) > 0)
    mask = {n: np.asarray(m)[r, p] > 0 for n, m in batch.mask.items()}
    labels = {n: np.asarray(v)[r, p] for n, v in batch.labels.items()}
    return Collected(
        user=np.asarray(batch.user)[r],
        candidate=np.asarray(batch.candidate)[r, p],
        labels={n: np.where(mask[n], labels[n], np.nan) for n in labels},
        logits={n: np.asarray(v)[r, p] for n, v in answer.logits.items()},
        fused=np.asarray(answer.fused)[r, p],
        retrieved=np.zeros(len(r), bool),
        ranks=np.full(len(r), ABSENT, np.int64),
        order_ranks={},
    )


def _in_file_order(parts: list[Collected]) -> Collected:
    """All batches of all processes as one: the same arrays in each process."""
    joined = jax.tree.map(lambda *a: np.concatenate(a), *(vars(part) for part in parts))
    turn = np.repeat(np.arange(len(parts)), [len(part.user) for part in parts])
    number = turn * processes.count() + processes.index()
    order = np.argsort(np.concatenate(processes.gathered(number)), kind="stable")
    merged = jax.tree.map(lambda a: np.concatenate(processes.gathered(a))[order], joined)
    return Collected(**merged)


def left_out_items(
    experiment: Experiment, prepared: Prepared, split: str, users: np.ndarray
) -> Lists:
    """What each user's targets are not ranked among: `seen_items`, and where of each user the last
    target alone is ranked, also the items of those before it."""
    seen = seen_items(prepared, split, users, seen_behaviours(experiment))
    if experiment.evaluate.targets == "all":
        return seen
    found = _rankable(experiment, prepared, split)
    counted = ~_is_last(found["user"])
    if behaviours := seen_behaviours(experiment):
        counted &= np.any([found[f"label_{task}"] == 1 for task in behaviours], axis=0)
    owner, items = found["user"][counted], found["candidate"][counted] - FIRST
    begin, end = (np.searchsorted(owner, users, side) for side in ("left", "right"))
    between = _stretches(items.astype(np.int64), begin, end - begin)
    whose = [np.repeat(np.arange(len(users)), np.diff(of.offsets)) for of in (seen, between)]
    order = np.argsort(np.concatenate(whose), kind="stable")
    values = np.concatenate([seen.values, between.values])[order]
    return Lists(values, seen.offsets + between.offsets)


def seen_items(
    prepared: Prepared, split: str, users: np.ndarray, behaviours: tuple[str, ...] = ()
) -> Lists:
    """Catalogue indexes that each user has seen in the splits before this one, a list per target.

    Seen is the item of an event with a 1 in one of the binary tasks `behaviours`; (): of any event.
    Events that are only shown come before validation and test.
    """
    seen, known = counted_items(prepared, behaviours, split), users >= FIRST
    index = np.where(known, users - FIRST, 0)
    start, end = seen.offsets[index], seen.offsets[index + 1]
    values = seen.values.astype(np.int64) - FIRST
    return _stretches(values, start, np.where(known, end - start, 0))


def counted_items(prepared: Prepared, behaviours: tuple[str, ...] = (), before: str = "") -> Lists:
    """Item ids that each user has seen, a list a user: of the events that count, see `seen_items`;
    in the splits before one, or in all."""
    items, splits, counted = met_items(prepared, behaviours)
    if before:
        code = SPLITS.index(before)
        counted = counted & ((splits < code) | ((splits == SHOWN) & (code > 0)))
    return Lists(items.values[counted], np.concatenate([[0], np.cumsum(counted)])[items.offsets])


def met_items(
    prepared: Prepared, behaviours: tuple[str, ...] = ()
) -> tuple[Lists, np.ndarray, np.ndarray]:
    """Item ids that each user has met, a list a user; the split of each of them; and whether its
    event has a 1 in one of the binary tasks `behaviours`, always where these are ()."""
    if "event_item" in prepared.users.column_names:
        items = prepared.user_lists("event_item")
        counted = np.full(len(items.values), not behaviours)
        for task in behaviours:
            counted |= prepared.behaviour(task)
        return items, prepared.user_lists("split").values, counted
    parts = [prepared.interactions(name) for name in SPLITS]  # of data without histories
    user, item = (np.concatenate([part[n] for part in parts]) for n in ("user", "candidate"))
    counted = np.full(len(user), not behaviours)
    for task in behaviours:
        counted |= _ones(prepared, task)
    splits = np.repeat(np.arange(len(parts)), [len(part["user"]) for part in parts])
    order = np.argsort(user, kind="stable")
    offsets = np.searchsorted(user[order], np.arange(prepared.manifest.users + 1) + FIRST)
    return Lists(item[order], offsets), splits[order], counted[order]


def _ones(prepared: Prepared, task: str) -> np.ndarray:
    """Whether the label of a task is 1, of the targets of all splits."""
    label = f"label_{task}"
    blocks = [block for split in SPLITS for block in prepared.blocks(split, ["row", label])]
    return np.concatenate([block[label][block["row"] >= 0] for block in blocks]) == 1


def _stretches(values: np.ndarray, start: np.ndarray, length: np.ndarray) -> Lists:
    """Copies of values[start : start + length], a list per pair."""
    offsets = np.concatenate([[0], np.cumsum(length)])
    position = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, length)
    return Lists(values[position], offsets)


def _exclude(
    seen: Lists | None, widest: int, part: Collected, chosen: np.ndarray
) -> np.ndarray | None:
    """Seen catalogue indexes [QUERIES, widest], filled with -1.

    `seen` holds the indexes of every user, in the order of their ids.
    """
    if seen is None or not widest:
        return None
    found = np.full((QUERIES, widest), -1, np.int32)
    for i, user in enumerate(part.user[chosen]):
        if user >= FIRST:
            values = seen[user - FIRST]
            found[i, : len(values)] = values
    return found


def missed(ranks: np.ndarray, targets: np.ndarray, exclude: np.ndarray | None) -> np.ndarray:
    """Ranks [n] as int64, ABSENT for a target that is itself excluded: it cannot be recommended.

    >>> missed(np.array([3, 0]), np.array([7, 8]), np.array([[1, 7], [1, -1]])).tolist()
    [2147483647, 0]
    """
    ranks = np.asarray(ranks).astype(np.int64)
    if exclude is None:
        return ranks
    seen = (exclude[: len(ranks)] == targets[: len(ranks), None]).any(axis=1)
    return np.where(seen, ABSENT, ranks)


def _rerank(
    serving: Serving,
    params: PyTree,
    part: Collected,
    chosen: np.ndarray,
    queries: UserStates,
    vectors: jax.Array | np.ndarray,
    found: np.ndarray,
    ways: Ways,
) -> None:
    """Fill in the rank of each chosen target among its retrieved candidates, in each order, and
    the first places of each order where these are kept."""
    ids = (found + FIRST).astype(np.int32)  # the filling -1 becomes unknown
    answer = serving.answer(params, queries, vectors, ids)
    scores = {"fused": np.asarray(answer.fused)}
    for name, order in ways.sorted_by.items():
        scores[name] = order(np.asarray(answer.logits[name]))
    n = len(chosen)
    hit, real = ids[:n] == part.candidate[chosen][:, None], ids[:n] >= FIRST
    for name, score in scores.items():
        part.order_ranks[name][chosen] = rank_in_list(score[:n], hit, real)
        if ways.length:
            places = falling(score[:n], real)[:, : ways.length]
            _list(part, name, chosen, found[:n], places)
    if ways.diversifier is not None:
        assert ways.vectors is not None
        score, k = scores[ways.diversified][:n], min(ways.length, found.shape[1])
        places = diversify(ways.diversifier, score, real, ways.vectors[found[:n]], k)
        name = recommended_name(ways.diversified, ways.diversifier)
        _list(part, name, chosen, found[:n], places)
        hit = np.take_along_axis(hit, places, axis=1)
        part.order_ranks[name][chosen] = np.where(hit.any(axis=1), hit.argmax(axis=1), ABSENT)


def _list(
    part: Collected, order: str, chosen: np.ndarray, found: np.ndarray, places: np.ndarray
) -> None:
    """Keep the candidates at these places as the lists of an order."""
    part.lists[order][chosen, : places.shape[1]] = np.take_along_axis(found, places, axis=1)


def _ways(experiment: Experiment, prepared: Prepared, vectors: Any, recommended: str) -> Ways:
    """The ways to put candidates in order, and how long lists are kept of them."""
    sorted_by = ordering(experiment, prepared.manifest)
    if not recommended:
        return Ways(sorted_by)
    length = min(max(experiment.evaluate.ks), prepared.manifest.items)
    if experiment.evaluate.among != "all":  # what is usual among all items says nothing of these
        length = 0
    diversifier = experiment.evaluate.diversify
    if diversifier is None:
        return Ways(sorted_by, length)
    return Ways(sorted_by, length, diversifier, recommended, np.asarray(vectors)[FIRST:])


def ordering(experiment: Experiment, manifest: Manifest) -> dict[str, OrderOf]:
    """The tasks that can put items in order, and what makes one number [...] to sort by of their
    logits: of classes the expected number. Classes that are not all numbers have no order."""
    found: dict[str, OrderOf] = {}
    for name, task in experiment.tasks.items():
        learned = manifest.tasks[name]
        if task.kind == "retrieval":
            found[name] = np.asarray
        elif not learned.classes or class_numbers(learned.classes):
            found[name] = _order_of(head_of(task.kind, task.loss), learned)
    return found


def _order_of(head: Head, learned: TaskField) -> OrderOf:
    return lambda logits: np.asarray(head.order(logits, learned))


def rank_in_list(scores: np.ndarray, hit: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Rank of the marked candidate by score, ties by retrieval order; a large rank if absent."""
    scores = np.where(real, scores, -np.inf)
    place = hit.argmax(axis=1)[:, None]
    own = np.take_along_axis(scores, place, axis=1)
    earlier = np.arange(scores.shape[1])[None] < place
    rank = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return np.where(hit.any(axis=1), rank, ABSENT)
