"""A catalogue onto the devices, and what one pass over it tells: norms, rows with NaN."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.kernels import arithmetic, checks
from mtrec_jax.types import Array

_PAGE = 1 << 21  # bytes of a large page
_LARGE = 8 * _PAGE  # less memory than this is left where it is
EXTREME = 1e15  # of norms: beyond it, or below its inverse, their squares leave float32


def all_axes(mesh: Mesh | None) -> tuple[str, ...] | None:
    """The names of all axes of a mesh."""
    return None if mesh is None else tuple(mesh.axis_names)


def put(array: Any, mesh: Mesh | None, spec: P) -> jax.Array:
    """An array on the device, or over the mesh."""
    if mesh is None:
        return jnp.asarray(array)
    # On CPUs, JAX would share the caller's memory.
    own = np.array(array) if isinstance(array, np.ndarray) else array
    return jax.device_put(own, NamedSharding(mesh, spec))


def placed(items: Array, mesh: Mesh | None) -> jax.Array:
    """Rows on the devices; of NumPy arrays as many as their bucket has, the last ones zero.

    Few sizes mean few programs. A JAX array is taken as it is, where it divides over the devices.
    """
    count = items.shape[0]
    parts = 1 if mesh is None else mesh.size
    step = max(1 << max(count.bit_length() - 7, 0), 1)
    size = count if isinstance(items, jax.Array) else -(-count // step) * step
    size = -(-size // parts) * parts
    if isinstance(items, np.ndarray):
        items = checks.native(items)
        kind = jax.dtypes.canonicalize_dtype(items.dtype)
        if items.dtype.kind in "iu" and kind.itemsize < items.dtype.itemsize:
            kind = np.dtype(np.float32)  # 32 bits would wrap around
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, reported later
            items = widened(items.astype(kind, copy=False), size, axis=0)
    elif size != count:
        items = jnp.pad(items, ((0, size - count), (0, 0)))
    if isinstance(items, np.ndarray) and mesh is None:
        return in_large_pages(items)
    return put(items, mesh, P(all_axes(mesh), None))


def in_large_pages(rows: np.ndarray | jax.Array) -> jax.Array:
    """A copy on the device; where that is a CPU, in large pages of memory if the system has them.

    NumPy asks Linux for pages of 2 MiB, XLA does not. Where reading the catalogue is what a search
    takes, as with one query, they make it up to 1.4 times as fast. XLA takes memory over without
    a copy if it begins at a multiple of 64 bytes.
    """
    if jax.default_backend() != "cpu" or rows.nbytes < _LARGE:
        return jnp.array(rows)  # which copies; `asarray` may share the caller's memory
    memory = np.empty(rows.nbytes + _PAGE, np.uint8)
    start = -memory.ctypes.data % _PAGE
    copy = memory[start : start + rows.nbytes].view(rows.dtype).reshape(rows.shape)
    copy[...] = rows
    return jax.device_put(copy)


def widened(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    """The array with zeros behind it."""
    missing = [(0, size - n if i == axis else 0) for i, n in enumerate(array.shape)]
    return np.pad(array, missing) if size != array.shape[axis] else array


def survey(
    vectors: jax.Array, dtype: np.dtype, metric: str
) -> tuple[jax.Array | None, float, np.ndarray]:
    """Inverse norms, or None if they are not to be had; the longest norm; rows that are not finite.

    One pass over the vectors, where none is zero or has a square that is out of range.
    """
    scale, longest, odd = _norms(vectors, dtype)
    if not bool(odd):
        return (scale if metric == "cosine" else None), float(longest), np.zeros(0, int)
    largest, norms = (np.asarray(a) for a in _careful_norms(vectors, dtype))
    bad = np.flatnonzero(~np.isfinite(largest))
    norms = np.where(np.isfinite(largest), norms, 0)
    is_zero = largest < np.finfo(dtype).tiny
    extreme = ((norms > EXTREME) | (norms < 1 / EXTREME)) & ~is_zero & np.isfinite(largest)
    if metric == "dot" or extreme.any():
        return None, float(norms.max(initial=0)), bad
    inverse = np.where(is_zero | ~np.isfinite(largest), 0, 1 / np.where(norms > 0, norms, 1))
    return jax.device_put(inverse.astype(dtype), scale.sharding), 1.0, bad


@functools.partial(jax.jit, static_argnames="dtype")
def _norms(vectors: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows = vectors.astype(dtype)
    squares = jnp.sum(rows * rows, axis=1)
    odd = ~jnp.all((squares > 1 / EXTREME**2) & (squares < EXTREME**2))
    return lax.rsqrt(squares), jnp.sqrt(jnp.max(squares, initial=0)) * 1.001, odd


@functools.partial(jax.jit, static_argnames="dtype")
def _careful_norms(vectors: jax.Array, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    rows = vectors.astype(dtype)
    finite = jnp.all(jnp.isfinite(rows), axis=1)  # a maximum may lose NaN
    largest = jnp.where(finite, jnp.max(jnp.abs(rows), axis=1, initial=0), jnp.inf)
    scaled = rows / jnp.where(largest > 0, largest, 1)[:, None]
    return largest, largest * jnp.sqrt(jnp.sum(scaled * scaled, axis=1))


@functools.partial(jax.jit, static_argnames="dtype")
def unit_rows(vectors: jax.Array, dtype: np.dtype) -> jax.Array:
    """A copy with rows of length 1; rows that are not finite become zero."""
    rows = vectors.astype(dtype)
    finite = jnp.all(jnp.isfinite(rows), axis=1)
    return arithmetic.normalise(jnp.where(finite[:, None], rows, 0))
