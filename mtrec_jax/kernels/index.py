"""A catalogue prepared for search: what can be paid once is paid once."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from mtrec_jax.errors import DataError
from mtrec_jax.kernels import candidates, checks, constrained, programs, streaming
from mtrec_jax.kernels.blocks import Admissible, Items
from mtrec_jax.kernels.constrained import NEVER, Asked, Pairs
from mtrec_jax.kernels.placing import (
    all_axes,
    in_large_pages,
    placed,
    put,
    survey,
    unit_rows,
    widened,
)
from mtrec_jax.types import Array, Lists

METRICS = ("cosine", "dot")
_FIXED = 4096  # columns of exclude lists whose sizes are kept, however few of them are filled
_UNREADABLE = (
    *(OSError, ValueError, KeyError, EOFError, TypeError, IndexError),
    *(NotImplementedError, zipfile.BadZipFile),
)


class ItemIndex:
    """Items that are searched by exact cosine, or dot product, as often as one likes.

    Norms, the check for NaN, padding and the place on the devices are paid once, here. NumPy arrays
    are copied; for cosine, float32 rows become rows of length 1. Arrays of JAX and rows of fewer
    bits stay as they are, with their inverse norms beside them. Searches keep up to 128 MB of
    memory for scores, as long as the index lives. Threads may share an index: answers are the same,
    and come one after the other, as each search uses all cores.

    Args:
      items: [N, D], floating or integer; N may be 0.
      ids: what search returns for each item, [N] different integers or texts; None: 0 .. N-1.
      metric: "cosine", 0 where a vector is zero; or "dot".
      mesh: rows are split over all devices of this mesh; None: one device.
      nan: "error"; or "drop": items with NaN or infinity are never found.

    Raises:
      DataError: wrong axes or dtype; ids that are repeated, or not one an item; NaN.
      ConfigError: an unknown metric or `nan`.

    >>> index = ItemIndex(np.array([[1, 0], [1, 1], [2, 2], [0, 1]]), ids=["a", "b", "c", "d"])
    >>> scores, ids = index.search(np.array([[2, 2]]), k=3, exclude=np.array([["c"]]))
    >>> ids.tolist(), scores.round(3).tolist()
    ([['b', 'a', 'd']], [[1.0, 0.707..., 0.707...]])
    """

    def __init__(
        self,
        items: Array,
        ids: Any = None,
        metric: str = "cosine",
        mesh: Mesh | None = None,
        nan: str = "error",
    ):
        checks.one_of("metric", metric, METRICS)
        checks.one_of("nan", nan, ("error", "drop"))
        checks.matrix("items", items, "[N, D]")
        self.metric, self.mesh, self.shape = metric, mesh, (int(items.shape[0]), items.shape[1])
        self.ids = None if ids is None else checks.item_ids(ids, len(self)).copy()
        vectors = placed(items, mesh)
        self._dtype = checks.score_dtype(vectors.dtype)
        scale, self._longest, bad = survey(vectors, self._dtype, metric)
        if len(bad) and nan == "error":
            raise checks.not_finite("items", int(bad[0]), self._dtype)
        # Rows of length 1 are multiplied a little faster. They take the place of our own copy of
        # NumPy's, but do not double what is on the device already, or is stored in fewer bits.
        is_own = isinstance(items, np.ndarray) and vectors.dtype == self._dtype
        is_own &= not jax.config.read("jax_enable_x64")  # queries may be more precise than that
        if metric == "cosine" and (scale is None or is_own):
            vectors, scale = unit_rows(vectors, self._dtype), None
            vectors = in_large_pages(vectors) if is_own and mesh is None else vectors
        self._items = Items(vectors, scale, 1.0)
        self._memory = programs.Memory()
        self._stop: Any = None if len(vectors) == len(self) else np.int32(len(self))
        self._real: np.ndarray | None = None  # [M], the rows that are found, if some are dropped
        if len(bad):
            self._real = np.ones(len(vectors), bool)
            self._real[bad] = False
        self._order = np.argsort(self.ids) if self.ids is not None else np.zeros(0, int)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        kind = f"{len(self):,} items of width {self.shape[1]}, {self._items.vectors.dtype}"
        where = f", over {self.mesh.size} devices" if self.mesh else ""
        return f"ItemIndex({kind}, metric={self.metric!r}{where})"

    def search(
        self,
        queries: Array,
        k: int,
        exclude: Array | None = None,
        allowed: Array | None = None,
        group: Array | None = None,
        among: Any = None,
        groups: Array | None = None,
        at_most: Any = None,
    ) -> tuple[Float[np.ndarray, "Q K"], np.ndarray]:
        """The k items with the highest score per query: scores [Q, K], and ids [Q, K].

        Args:
          queries: [Q, D], floating or integer; Q may be 0.
          k: results per query. Places that no admissible item can fill, as with k > N, hold the
            score -inf and the id -1 ("" where ids are texts). The larger k, the fewer queries go
            through a program at a time, so that the vectors of k items of each fit 128 MB, or those
            of one query.
          exclude: [Q, X] ids that a query must not get, filled up with -1 ("" for texts).
          allowed: [N] booleans, which items may be found; or [G, N], one row a group of queries.
          group: [Q], which row of `allowed` holds for a query.
          among: a list of ids for each query, outside of which nothing is found: Q arrays, or
            `Lists`; -1 ("" for texts) and repeats mean nothing. What a list costs follows from its
            length, and not from N.
          groups: [N], the number of each item's group, such as its author, from 0 on; -1: none. Or
            [N, S], several groups of each, filled up with -1.
          at_most: how many items of a group a query may get: a number for all groups; a mapping of
            those that have one; or an array [G]. Items are taken by falling score as long as their
            groups have room. That is the best list there is, at every place of it, if items have
            one group each; with several, another list may have a higher sum of scores.

        Raises:
          DataError: wrong axes, widths that differ, NaN in a query, an id that is not there, not
            one list a query, groups that are not numbered from 0 on.
          ConfigError: k or a quota is not such a number.

        >>> index = ItemIndex(np.array([[1.0, 0], [2, 1], [1, 1], [0, 1]]))
        >>> index.search(np.array([[1, 0]]), 2, among=[[1, 2, 3]])[1].tolist()
        [[1, 2]]
        >>> books = np.array([0, 0, 1, 1])  # by their author
        >>> index.search(np.array([[1, 0]]), 3, groups=books, at_most=1)[1].tolist()
        [[0, 2, -1]]
        """
        checks.queries(queries, self.shape)
        k, count = checks.positive(k), len(self)
        quotas = checks.quotas(groups, at_most, count)
        asked = self._asked(queries, exclude, allowed, group)
        kept = min(k, count) or 1  # devices are not asked for places that nothing can fill
        if among is None or not count:
            found = constrained.best(self._top, asked, kept, quotas if count else None, count)
        else:
            lists, pairs = self._own(among, len(queries)), self._pairs(asked.queries)
            found = constrained.among(self._top, pairs, asked, kept, lists, quotas, count)
        scores = np.full((len(queries), k), -np.inf, self._score_dtype(queries))
        ids = np.full((len(queries), k), -1, np.int32)
        scores[:, :kept], ids[:, :kept] = found
        return scores, self._raw(ids)

    def rank(
        self,
        queries: Array,
        targets: Array,
        exclude: Array | None = None,
        allowed: Array | None = None,
        group: Array | None = None,
    ) -> Int[np.ndarray, " Q"]:
        """How many items stand before each query's target in the order of `search`: 0 = first.

        An item that is excluded or not allowed does not count; the target keeps its place even if
        it is one of them.

        Args:
          queries, exclude, allowed, group: as in `search`.
          targets: [Q] ids.

        Raises:
          DataError: as `search`, or a target that is no item.
        """
        checks.queries(queries, self.shape)
        wanted = self._places("targets", targets, (len(queries),), may_lack=False)
        found = self._run("rank", self._asked(queries, exclude, allowed, group), wanted)
        return np.concatenate([np.zeros(0, np.int32), *found])

    def save(self, path: str | Path) -> None:
        """Write vectors, ids and metric as one .npz file, which holds arrays and no code."""
        vectors, is_unit = np.asarray(self._items.vectors), self._is_unit
        if is_unit and self._real is not None:
            vectors = np.where(self._real[:, None], vectors, np.nan)  # what was dropped
        vectors = vectors[: len(self)]
        if (kind := vectors.dtype.name) not in np.sctypeDict:  # NumPy's format has no bfloat16
            vectors = vectors.view(np.uint16)
        ids = np.zeros(0) if self.ids is None else self.ids
        partial = Path(path).with_name(f"{Path(path).name}.partial")
        with partial.open("wb") as file:
            np.savez(
                file, vectors=vectors, dtype=kind, ids=ids, metric=self.metric, is_unit=is_unit
            )
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, mesh: Mesh | None = None) -> ItemIndex:
        """Read what `save` has written.

        Raises:
          DataError: the file is not there, or is no such file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                vectors, ids = file["vectors"], file["ids"]
                kind, metric = str(file["dtype"]), str(file["metric"])
                is_unit = bool(file["is_unit"])
            vectors = vectors if vectors.dtype.name == kind else vectors.view(jnp.dtype(kind))
            if metric not in METRICS:
                raise ValueError(f"metric {metric!r}")
        except _UNREADABLE as error:
            raise DataError(f"{path} is no saved ItemIndex ({error}); write one by save") from error
        named = None if ids.dtype.kind == "f" else ids
        index = cls(vectors, named, "dot" if is_unit else metric, mesh, nan="drop")
        index.metric = metric  # unit rows: their dot products are the cosines, to the last bit
        return index

    @property
    def _is_unit(self) -> bool:
        return self.metric == "cosine" and self._items.scale is None

    def _score_dtype(self, queries: Array) -> np.dtype:
        return checks.score_dtype(queries.dtype, self._dtype)

    def _asked(self, queries: Array, exclude: Any, allowed: Any, group: Any) -> Asked:
        """Queries on the host, and rows of items for what they may get, all checked."""
        host = checks.native(np.asarray(queries))
        if host.dtype.kind in "iu" and host.dtype.itemsize > 4:  # a device may hold 32 bits
            host = host.astype(self._score_dtype(queries))
        if exclude is not None:
            checks.concrete("exclude", exclude)
            width = exclude.shape[1] if exclude.ndim == 2 else -1
            exclude = self._places("exclude", exclude, (len(host), width), may_lack=True)
        masks, group = checks.masks(allowed, group, len(host), len(self))
        if self._real is not None:
            masks = self._real[None, : len(self)] & (True if masks is None else masks)
        return Asked(host, exclude, masks, group)

    def _top(self, asked: Asked, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of items [Q, k]."""
        found = self._run("topk", asked, k)
        if not found:
            return np.zeros((0, k), self._score_dtype(asked.queries)), np.zeros((0, k), np.int32)
        scores, places = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return scores, places

    def _run(self, what: str, asked: Asked, goal: Any) -> list[Any]:
        """The answer for each chunk of queries, on the host."""
        host, exclude, masks, group = asked
        shown: Any = None
        if masks is not None:
            masks = widened(masks, len(self._items.vectors), axis=1)
            shown = put(masks, self.mesh, P(None, all_axes(self.mesh)))
        answers: list[Any] = []
        program = programs.program(self.mesh, what, self._memory)
        size = streaming.group_size(goal) if what == "topk" else streaming.RANK_GROUP
        kept = goal if what == "topk" else 1
        for chunk in programs.chunks(len(host), self._items, size, self.mesh, kept):
            rows, items = self._ready(host, chunk)
            admissible = _lists(None if exclude is None else _padded(exclude, chunk, NEVER))
            its: Any = None if group is None else _padded(group, chunk, 0)
            admissible = admissible._replace(allowed=shown, group=its, stop=self._stop)
            one = goal if what == "topk" else _padded(goal, chunk, 0)
            answers.append((program(rows, items, one, admissible), chunk))
        return [
            jax.tree.map(lambda a, n=c.stop - c.start: np.asarray(a)[:n], a) for a, c in answers
        ]

    def _ready(self, host: np.ndarray, chunk: slice) -> tuple[jax.Array, Items]:
        """A chunk of queries as they are multiplied, and the items with a bound of the products."""
        dtype = self._score_dtype(host)
        rows, *told = programs.prepared(_padded(host, chunk), dtype, self.metric)
        first_bad, longest = jax.device_get(told)
        if first_bad >= 0:
            raise checks.not_finite("queries", chunk.start + int(first_bad), dtype)
        largest = 1.0
        if self.metric == "dot":
            largest = checks.largest_product(float(longest), self._longest, dtype)
        return rows, self._items._replace(largest=largest)

    def _pairs(self, host: np.ndarray) -> Pairs:
        """What scores pairs of these queries with items."""
        if not len(host):
            return Pairs(lambda query, item, exact: np.zeros(0, self._score_dtype(host)), 0.0)
        rows, items = self._ready(host, slice(0, len(host)))
        score = functools.partial(programs.pair_scores, self.mesh, rows, items)
        return Pairs(score, float(candidates.error_bound(rows, items)))

    def _own(self, among: Any, queries: int) -> Lists:
        """Each query's list as rows of items, ascending, each once."""
        lists, empty = checks.id_lists("among", among, queries), np.zeros(0, np.int64)
        places = [
            self._places(f"among[{row}]", ids, ids.shape, may_lack=True) if ids.size else empty
            for row, ids in enumerate(lists)
        ]
        item = np.concatenate([empty, *places])
        query = np.repeat(np.arange(queries, dtype=np.int64), [len(ids) for ids in lists])
        pairs = query << 32 | item
        if (item == NEVER).any():
            pairs = pairs[item != NEVER]
        if not (pairs[1:] > pairs[:-1]).all():
            pairs = np.sort(pairs)  # faster than `unique`
            pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        query, item = _unpacked(pairs)
        return Lists(item.astype(np.int32), np.searchsorted(query, np.arange(queries + 1)))

    def _places(self, name: str, ids: Any, shape: tuple[int, ...], may_lack: bool) -> np.ndarray:
        """Row numbers of raw ids; what stands for no item is `NEVER`."""
        if self.ids is None:
            found = checks.indices(name, ids, shape, -1 if may_lack else 0, len(self))
            return np.where(found < 0, NEVER, found)
        checks.concrete(name, ids)
        raw = np.asarray(ids)
        if raw.shape != shape or raw.dtype.kind != self.ids.dtype.kind:
            raise DataError(
                f"{name}: shape {raw.shape} and dtype {raw.dtype}; ids of the kind of "
                f"{self.ids.dtype}, {list(shape)}, are needed"
            )
        order = self._order
        place = np.searchsorted(self.ids, raw, sorter=order)
        found = order[np.minimum(place, len(order) - 1)] if len(order) else np.zeros(shape, int)
        same = self.ids[found] == raw if len(order) else np.zeros(shape, bool)
        empty = (raw == ("" if raw.dtype.kind == "U" else -1)) & may_lack
        if not (same | empty).all():
            wrong = raw[~(same | empty)][0]
            raise DataError(f"{name}: {wrong!r} is no id of this index")
        return np.where(same, found, NEVER).astype(np.int32)

    def _raw(self, places: np.ndarray) -> np.ndarray:
        if self.ids is None:
            return places
        nothing = np.array("" if self.ids.dtype.kind == "U" else -1, self.ids.dtype)
        if not len(self):
            return np.full(places.shape, nothing)
        return np.where(places < 0, nothing, self.ids[places])


# --- Chunks of queries and their lists


def _lists(exclude: np.ndarray | None) -> Admissible:
    """Exclude lists [Q, X] in the two orders in which they are needed, in few sizes.

    Up to `_FIXED` columns, the sizes follow from Q and X alone: other ids compile nothing.
    """
    if exclude is None or not exclude.size:
        return Admissible()
    given = exclude != NEVER
    counts = np.count_nonzero(given, axis=1)
    query, item = np.repeat(np.arange(len(exclude)), counts), exclude[given].astype(np.int64)
    # One sort of one number a pair is far faster than sorting rows, most of which are filling.
    query, item = _unpacked(np.sort(query << 32 | item))
    least = min(exclude.shape[1], _FIXED)
    width = 1 << (max(int(counts.max()), least) - 1).bit_length()
    by_query = np.full((len(exclude), width), NEVER, np.int32)
    by_query[query, np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)] = item
    size = 1 << (max(len(item), len(exclude) * least, 256) - 1).bit_length()
    entries = np.full((2, size), NEVER, np.int32)
    entries[:, : len(item)] = _unpacked(np.sort(item << 32 | query))
    return Admissible(by_query, entries)  # type: ignore[arg-type]


def _unpacked(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pairs >> 32, pairs & 0xFFFFFFFF


def _padded(rows: np.ndarray, chunk: slice, value: int | None = None) -> np.ndarray:
    """Rows of the chunk, filled up to a power of two, so that few programs are compiled.

    The last row is repeated if no `value` is given.
    """
    part = rows[chunk]
    size = 1 << (len(part) - 1).bit_length()
    full = np.full((size, *rows.shape[1:]), part[-1] if value is None else value, rows.dtype)
    full[: len(part)] = part
    return full
