"""What callers of the kernels hand over, checked on the host: an error names place and remedy."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from mtrec_jax.errors import ConfigError, DataError, nearest
from mtrec_jax.kernels.constrained import NO_LIMIT, Quotas
from mtrec_jax.types import Array

_MOST = 1 << 24  # results of a query


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise `ConfigError` for a value that is not among the allowed ones."""
    if value not in allowed:
        raise ConfigError(
            f"no {name} '{value}': use one of {', '.join(allowed)}.{nearest(str(value), allowed)}"
        )


def concrete(name: str, array: Any) -> None:
    """Raise `DataError` for what is no array, or has no values yet."""
    if not isinstance(array, Array):
        raise DataError(
            f"{name} is a {type(array).__name__}; pass a NumPy or JAX array, e.g. "
            f"np.asarray({name})"
        )
    if isinstance(array, jax.core.Tracer):
        raise DataError(
            f"{name} is traced, and its values cannot be checked; inside jax.jit call "
            "mtrec_jax.kernels.streaming"
        )


def matrix(name: str, vectors: Any, axes: str) -> None:
    """Raise `DataError` unless the array has two axes and holds numbers."""
    concrete(name, vectors)
    if vectors.ndim != 2:
        raise DataError(
            f"{name} must have two axes {axes}, but its shape is {vectors.shape}; "
            "a single vector is vector[None, :]"
        )
    if not any(jnp.issubdtype(vectors.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise DataError(
            f"{name} has dtype {vectors.dtype}; convert it to a floating or integer one"
        )


def queries(vectors: Any, items: tuple[int, ...]) -> None:
    """Raise `DataError` unless the queries are a matrix as wide as the items of that shape."""
    matrix("queries", vectors, "[Q, D]")
    if vectors.shape[1] != items[1]:
        raise DataError(
            f"queries {vectors.shape} and items {items} differ in width: both need the same "
            "second axis D"
        )


def positive(k: Any) -> int:
    """k as an integer of at least 1."""
    try:
        number = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        number = 0
    if not 1 <= number <= _MOST:
        raise ConfigError(f"k is {k!r}; it must be an integer of at least 1, and {_MOST:,} at most")
    return number


def native(array: np.ndarray) -> np.ndarray:
    """The array in this machine's order of bytes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def score_dtype(*dtypes: Any) -> np.dtype:
    """float32, or float64 if one of them is and 64-bit JAX is on."""
    wide: Any = jnp.float32
    for dtype in dtypes:
        wide = jnp.promote_types(wide, dtype)
    return np.dtype(jax.dtypes.canonicalize_dtype(wide))


def not_finite(name: str, row: int, dtype: np.dtype) -> DataError:
    """The error for the first row with NaN or infinity."""
    return DataError(
        f"{name} row {row} holds NaN or a number that is infinite in {dtype}; "
        "remove the row or replace it by zeros (cosine 0 with everything)"
    )


def largest_product(queries: float, items: float, dtype: np.dtype) -> float:
    """A bound of all |query| |item|, with what is lost of numbers too small for the dtype."""
    limits = np.finfo(dtype)
    if queries * items > float(limits.max) / 4:
        raise DataError(
            f"dot products of queries with norms up to {queries:.2g} and items up to {items:.2g} "
            f"overflow {dtype}; divide one of them by a constant"
        )
    return queries * items + float(limits.tiny / limits.eps) * (queries + items)


def finite(name: str, vectors: Array, dtype: np.dtype) -> np.ndarray:
    """Vectors on the host in the dtype of scores; raises `DataError` for NaN and infinity."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite
        rows = np.asarray(vectors).astype(dtype)
    if (bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))).size:
        raise not_finite(name, int(bad[0]), dtype)
    return rows


def indices(
    name: str, values: Any, shape: tuple[int, ...], lowest: int, count: int
) -> Int[np.ndarray, " ..."]:
    """Item indices on the host as int32, of the given shape, in lowest .. count-1."""
    concrete(name, values)
    found = np.asarray(values)
    if found.shape != shape or not np.issubdtype(found.dtype, np.integer):
        wanted = "[Q, X]" if len(shape) == 2 else "[Q]"
        raise DataError(
            f"{name} must hold integers {wanted} with Q={shape[0]}, one per query, but has shape "
            f"{found.shape} and dtype {found.dtype}"
        )
    is_bad = (found < lowest) | (found >= count)
    if is_bad.any():
        place = tuple(int(i) for i in np.argwhere(is_bad)[0])
        padding = ", or -1 for padding" if lowest < 0 else ""
        raise DataError(
            f"{name}{list(place)} is {found[place]}, but there are {count} items: use indices "
            f"0 .. {count - 1}{padding}"
        )
    return found.astype(np.int32)


def item_ids(values: Any, count: int) -> np.ndarray:
    """Raw ids of the items, one each: integers or texts."""
    found = np.asarray(values)
    if found.dtype.kind == "u" and found.size and found.max() <= np.iinfo(np.int64).max:
        found = found.astype(np.int64)
    if found.shape != (count,) or found.dtype.kind not in "iU":
        raise DataError(
            f"ids: shape {found.shape} and dtype {found.dtype}; one integer or text for each of "
            f"the {count} items is needed"
        )
    different, first = np.unique(found, return_index=True)
    if len(different) < count:
        again = np.setdiff1d(np.arange(count), first)[0]
        raise DataError(f"ids[{again}] is {found[again]!r}, which another item has already")
    nothing = "" if found.dtype.kind == "U" else -1
    if (taken := np.flatnonzero(found == nothing)).size:
        raise DataError(f"ids[{taken[0]}] is {nothing!r}, which stands for no item in results")
    return found


def masks(
    allowed: Any, group: Any, queries: int, count: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """`allowed` as [G, N], and which of its rows is whose; raises `DataError`."""
    if allowed is None:
        if group is not None:
            raise DataError("group: which row of `allowed` is whose; pass allowed=[G, N] too")
        return None, None
    concrete("allowed", allowed)
    mask = np.asarray(allowed)
    wanted = (count,) if group is None else (*mask.shape[:1], count)
    if mask.dtype != bool or mask.shape != wanted:
        shape = "[N], or [G, N] with group=[Q]," if group is None else "[G, N]"
        raise DataError(
            f"allowed must hold booleans {shape} with N={count}, but has shape {mask.shape} and "
            f"dtype {mask.dtype}"
        )
    if group is None:
        return mask[None], None
    return mask, indices("group", group, (queries,), 0, len(mask))


def id_lists(name: str, lists: Any, queries: int) -> list[np.ndarray]:
    """An array of ids for each query; raises `DataError`."""
    try:
        found = [np.asarray(lists[row]) for row in range(len(lists))]
    except TypeError:
        raise DataError(
            f"{name} is a {type(lists).__name__}; pass a list of arrays of ids, one a query"
        ) from None
    if len(found) != queries:
        raise DataError(
            f"{name} holds {len(found)} lists for {queries} queries; pass one a query, as in "
            f"{name}=[ids] * {queries}"
        )
    for row, part in enumerate(found):
        if part.ndim != 1 or (part.size and part.dtype.kind not in "iuU"):
            raise DataError(
                f"{name}[{row}] has shape {part.shape} and dtype {part.dtype}; each list is an "
                "array of ids with one axis, and a mask of booleans belongs into `allowed`"
            )
    return found


def quotas(groups: Any, at_most: Any, count: int) -> Quotas | None:
    """`groups` and `at_most` as arrays, or None; raises `DataError` and `ConfigError`."""
    if groups is None or at_most is None:
        if groups is not at_most:
            raise DataError("groups and at_most belong together: pass both, or none")
        return None
    concrete("groups", groups)
    found = np.asarray(groups)
    if found.ndim not in (1, 2) or len(found) != count or found.dtype.kind not in "iu":
        raise DataError(
            f"groups must hold integers [N], or [N, S] for several of an item, with N={count}, but "
            f"has shape {found.shape} and dtype {found.dtype}"
        )
    most = int(found.max(initial=-1))
    if found.min(initial=-1) < -1 or most >= max(found.size, 1):
        wrong = most if most >= max(found.size, 1) else int(found.min())
        raise DataError(
            f"groups holds {wrong}; number groups from 0 on, with -1 for none, as "
            "np.unique(groups, return_inverse=True)[1] does"
        )
    limits = np.append(_limits(at_most, most + 1), NO_LIMIT)
    return Quotas(found.reshape(count, -1).astype(np.int32), limits)


def _limits(at_most: Any, groups: int) -> np.ndarray:
    """The quota of each group, as a number, a mapping or an array says."""
    if isinstance(at_most, Mapping):
        limits = np.full(groups, NO_LIMIT)
        for group, most in at_most.items():
            if not _is_whole(group):
                raise ConfigError(f"at_most: {group!r} is no group; groups are numbered from 0 on")
            if not _is_whole(most):
                raise ConfigError(f"at_most[{group}] is {most!r}; quotas are integers from 0 on")
            if group < groups:
                limits[group] = most
        return limits
    limits = np.asarray(at_most)
    if limits.dtype.kind not in "iu" or limits.ndim > 1 or limits.min(initial=0) < 0:
        raise ConfigError(
            f"at_most is {at_most!r}; quotas are integers from 0 on: one for all groups, a mapping "
            "{group: quota}, or an array with one for each group"
        )
    if limits.ndim and len(limits) < groups:
        raise ConfigError(
            f"at_most holds {len(limits)} quotas for {groups} groups; give each one, or a mapping "
            "of those that have one"
        )
    return limits[:groups] if limits.ndim else np.full(groups, limits)


def _is_whole(value: Any) -> bool:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_whole and bool(value >= 0)
