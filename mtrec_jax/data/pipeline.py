"""Prepared examples to batches: batch number s of a run is a pure function of (seed, s).

An epoch visits the blocks (Parquet row groups) of a split in a seeded random order and permutes the
examples inside each; preparation has already written the examples in random order, so this is
close to a global shuffle while only a few blocks are in memory at a time. Batch s is found without
reading the batches before it, which makes the cursor of a run one number. What a block needs, it
gets once for all of its batches: decoding, labels apart from masks, the permutation. A batch then
is a slice of one block, or of a few.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grain
import jax
import numpy as np

from mtrec_jax.data.dataset import Prepared, to_arrays
from mtrec_jax.types import Batch

CACHE_BYTES = 1 << 30  # a split that takes less, with its masks, stays in memory, decoded


class BatchSource:
    """Random access to the batches of a split: `len(source)`, `source[s] -> Batch` of NumPy arrays.

    Threads may share it and take turns. The arrays of a batch may be views: leave them as they are.

    Args:
      prepared: the data.
      split: "train", "validation" or "test".
      batch_size: B; the last batch of an epoch is filled up with examples of weight 0.
      seed: of the order; None keeps the order on disk.
      epochs: how many times the split is visited.
      dtype: of floating-point arrays.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str,
        batch_size: int,
        seed: int | None = None,
        epochs: int = 1,
        dtype: str = "float32",
    ):
        self._file, self._lock = prepared.parquet(split), threading.Lock()
        self._seed, self._batch_size, self._dtype = seed, batch_size, dtype
        groups = [self._file.metadata.row_group(g) for g in range(self._file.num_row_groups)]
        self._sizes = np.array([group.num_rows for group in groups], int)
        self.batches_per_epoch = max(1, -(-int(self._sizes.sum()) // batch_size))
        self._length = self.batches_per_epoch * epochs
        small = sum(group.total_byte_size for group in groups) < CACHE_BYTES / 2
        self._keep = small and epochs > 1
        self._decoded: dict[int, Batch] = {}
        self._order = (-1, np.empty(0, int), np.empty(0, int))  # epoch, blocks, their ends
        self._current = (-1, -1, self._decode(None))  # epoch, block, its examples as visited

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, s: int) -> Batch:
        with self._lock:
            return self._batch(int(s))

    def _batch(self, s: int) -> Batch:
        epoch, index = divmod(s, self.batches_per_epoch)
        if self._order[0] != epoch:
            order = self._permutation(len(self._sizes), epoch)
            self._order = (epoch, order, np.cumsum(self._sizes[order]))
        _, order, ends = self._order
        start, parts, missing = index * self._batch_size, [], self._batch_size
        position = int(np.searchsorted(ends, start, side="right"))
        while missing and position < len(order):
            block = int(order[position])
            begin = start + self._batch_size - missing - int(ends[position] - self._sizes[block])
            parts.append(_slice(self._block(epoch, block), begin, begin + missing))
            missing -= len(parts[-1].user)
            position += 1
        if missing:
            parts.append(_padding(self._current[2], missing))
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def _permutation(self, size: int, *where: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(size)
        return np.random.default_rng([self._seed, *where]).permutation(size)

    def _block(self, epoch: int, block: int) -> Batch:
        """All examples of a block in the order in which the epoch visits them."""
        if self._current[:2] != (epoch, block):
            found = self._decoded.get(block)
            if found is None:
                found = self._decode(block)
                if self._keep:
                    self._decoded[block] = found
            if self._seed is not None:
                rows = self._permutation(int(self._sizes[block]), epoch, block)
                found = jax.tree.map(lambda array: array.take(rows, axis=0), found)
            self._current = (epoch, block, found)
        return self._current[2]

    def _decode(self, block: int | None) -> Batch:
        """A block as it is on disk; None: no examples, of the same shapes."""
        if block is None:
            return to_batch(to_arrays(self._file.schema_arrow.empty_table()), self._dtype)
        return to_batch(to_arrays(self._file.read_row_group(block)), self._dtype)


def training_batches(source: BatchSource) -> grain.DatasetIterator:
    """Iterate over a source with prefetching; `get_state` / `set_state` hold the exact position."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def evaluation_batches(
    prepared: Prepared, split: str, batch_size: int, dtype: str = "float32"
) -> Iterator[Batch]:
    """Every example of a split once, in file order; the last batch is filled with weight 0."""
    source = BatchSource(prepared, split, batch_size, dtype=dtype)
    return (source[s] for s in range(len(source)))


def to_batch(arrays: dict[str, np.ndarray], dtype: str = "float32") -> Batch:
    """Columns of the prepared format `[n, ...]` as a batch of n examples."""
    labels = _named(arrays, "label_")
    observed = {name: ~np.isnan(values) for name, values in labels.items()}
    context = _named(arrays, "context_")
    return Batch(
        context={
            name: values.astype(dtype, copy=False) if name == "numbers" else values
            for name, values in context.items()
        },
        events=_named(arrays, "event_"),
        cutoff=arrays["cutoff"],
        candidate=arrays["candidate"],
        labels={n: np.where(observed[n], a, 0).astype(dtype) for n, a in labels.items()},
        mask={name: there.astype(dtype) for name, there in observed.items()},
        user=arrays["user"],
        weight=(arrays["row"] >= 0).astype(dtype),
        row=arrays["row"],
    )


def _named(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    return jax.tree.map(lambda array: array[start:stop], batch)


def _padding(like: Batch, size: int) -> Batch:
    zeros = jax.tree.map(lambda array: np.zeros((size, *array.shape[1:]), array.dtype), like)
    return zeros._replace(row=zeros.row - 1)
