"""Prepared examples to batches: batch number s of a run is a pure function of (seed, s).

An epoch visits the blocks (Parquet row groups) of a split in a seeded random order and permutes the
examples inside each; preparation has already written the examples in random order, so this is
close to a global shuffle while only a few blocks are read at a time. Batch s is found without
reading the batches before it, which makes the cursor of a run one number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import grain
import numpy as np
import pyarrow.parquet as pq

from mtrec_jax.data.dataset import Manifest, Prepared, to_arrays
from mtrec_jax.types import Batch

CACHE_BYTES = 1 << 30  # decoded blocks kept in memory


class BatchSource:
    """Random access to the batches of a split: `len(source)`, `source[s] -> Batch` of NumPy arrays.

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
        self._prepared, self._split, self._file = prepared, split, prepared.parquet(split)
        self._seed, self._batch_size, self._dtype = seed, batch_size, dtype
        groups = range(self._file.num_row_groups)
        self._sizes = np.array([self._file.metadata.row_group(g).num_rows for g in groups], int)
        self.batches_per_epoch = max(1, -(-int(self._sizes.sum()) // batch_size))
        self._length = self.batches_per_epoch * epochs
        self._cache: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        total = sum(self._file.metadata.row_group(g).total_byte_size for g in groups)
        self._keep = len(groups) if total < CACHE_BYTES / 4 else 8

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, s: int) -> Batch:
        epoch, index = divmod(int(s), self.batches_per_epoch)
        order = self._permutation(len(self._sizes), epoch)
        ends = np.cumsum(self._sizes[order])
        start = index * self._batch_size
        stop = min(start + self._batch_size, int(ends[-1]) if len(ends) else 0)
        parts = []
        for position in range(np.searchsorted(ends, start, side="right"), len(order)):
            block, end = int(order[position]), int(ends[position])
            begin = end - int(self._sizes[block])
            if begin >= stop:
                break
            inside = self._permutation(int(self._sizes[block]), epoch, block)
            rows = inside[max(start, begin) - begin : min(stop, end) - begin]
            parts.append({name: a[rows] for name, a in self._block(block).items()})
        if not parts:
            parts = [to_arrays(self._file.schema_arrow.empty_table())]
        arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return to_batch(arrays, self._prepared.manifest, self._batch_size, self._dtype)

    def _permutation(self, size: int, *where: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(size)
        return np.random.default_rng([self._seed, *where]).permutation(size)

    def _block(self, block: int) -> dict[str, np.ndarray]:
        found = self._cache.get(block)
        if found is None:
            # a reader of its own for each call: the object is not safe to share between threads
            file = pq.ParquetFile(self._prepared.folder / f"{self._split}.parquet")
            found = to_arrays(file.read_row_group(block))
            self._cache[block] = found
            while len(self._cache) > self._keep:
                self._cache.popitem(last=False)
        return found


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


def to_batch(
    arrays: dict[str, np.ndarray], manifest: Manifest, batch_size: int, dtype: str = "float32"
) -> Batch:
    """Columns of the prepared format `[n, ...]`, n <= B, to a batch of exactly B examples."""
    n = len(arrays["user"])

    def take(name: str, fill: int | float = 0) -> np.ndarray:
        array = arrays[name]
        if array.dtype.kind == "f":
            array = array.astype(dtype, copy=False)
        if n == batch_size:
            return array
        padding = np.full((batch_size - n, *array.shape[1:]), fill, array.dtype)
        return np.concatenate([array, padding])

    row = take("row", fill=-1)
    found = [name for name in arrays if name.startswith("label_")]
    labels = {name.removeprefix("label_"): take(name, fill=np.nan) for name in found}
    observed = {name: ~np.isnan(values) for name, values in labels.items()}
    context = {}
    if manifest.context_ids:
        context["ids"] = take("context_ids")
    if manifest.context_numbers:
        context["numbers"] = take("context_numbers")
    return Batch(
        context=context,
        events={n.removeprefix("event_"): take(n) for n in arrays if n.startswith("event_")},
        cutoff=take("cutoff"),
        candidate=take("candidate"),
        labels={name: np.where(observed[name], labels[name], 0) for name in labels},
        mask={name: observed[name].astype(dtype) for name in labels},
        user=take("user"),
        weight=(row >= 0).astype(dtype),
        row=row,
    )
