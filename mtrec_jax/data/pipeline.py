"""Prepared examples to batches: batch number s of a run is a pure function of (seed, s).

An epoch visits the blocks (Parquet row groups) of a split in a seeded random order and permutes the
examples inside each; preparation has already written the examples in random order, so this is
close to a global shuffle while only a few blocks are in memory at a time. Batch s is found without
reading the batches before it, which makes the cursor of a run one number. What a block needs, it
gets once for all of its batches, in a thread of its own while the block before is trained on:
decoding, labels apart from masks, the permutation. A batch then is a slice of one block, or of a
few, which is cheaper than handing batches from thread to thread.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from mtrec_jax.data.dataset import IdField, Manifest, NumberField, Prepared, to_arrays
from mtrec_jax.errors import Stalled
from mtrec_jax.types import Batch

if TYPE_CHECKING:
    import grain

CACHE_BYTES = 1 << 30  # a split that takes less, with its masks, stays in memory, decoded
_PATIENCE = 60  # seconds between notes that nothing comes
_READER = ThreadPoolExecutor(1, "mtrec-reader")  # one: files and caches are its alone


class BatchSource:
    """Random access to the batches of a split: `len(source)`, `source[s] -> Batch` of NumPy arrays.

    Threads may share it and take turns. The arrays of a batch may be views: leave them as they are.

    Args:
      prepared: the data; of it, the columns of the chosen tasks and features are read.
      split: "train", "validation" or "test".
      batch_size: B; the last batch of an epoch is filled up with examples of weight 0.
      seed: of the order; None keeps the order on disk.
      epochs: how many times the split is visited.
      dtype: of floating-point arrays.
      timeout: seconds without an answer of the storage before a batch raises `Stalled`; 0: never.
        Each minute a note goes to standard error.
      buckets: batches of this many shapes: examples with a shorter past come in larger batches, of
        which padding is cut off. Batches of all shapes are mixed inside of a block, and each is of
        one block.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str,
        batch_size: int,
        seed: int | None = None,
        epochs: int = 1,
        dtype: str = "float32",
        timeout: int = 0,
        buckets: int = 1,
    ):
        self._timeout, self._prepared = timeout, prepared
        self._file, self._lock = prepared.parquet(split), threading.Lock()
        self._seed, self._batch_size, self._dtype = seed, batch_size, dtype
        groups = [self._file.metadata.row_group(g) for g in range(self._file.num_row_groups)]
        self._sizes = np.array([group.num_rows for group in groups], int)
        self._shapes = _Shapes(prepared.manifest.history_length, batch_size, buckets)
        self._classes = self._classes_of_blocks() if buckets > 1 else []
        batches = -(-int(self._sizes.sum()) // batch_size)
        if self._classes:
            self._batches = np.array([self._shapes.batches(of).sum() for of in self._classes])
            batches = int(self._batches.sum())
        self.batches_per_epoch = max(1, batches)
        self._length = self.batches_per_epoch * epochs
        small = sum(map(self._bytes, groups)) < CACHE_BYTES / 2
        self._keep = small and epochs > 1
        self._decoded: dict[int, Batch] = {}
        self._order = (-1, np.empty(0, int), np.empty(0, int))  # epoch, blocks, their ends
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}  # epoch, place in its order
        self._empty = self._decode(None)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, s: int) -> Batch:
        with self._lock:
            return self._batch(int(s))

    def empty(self, size: int) -> Batch:
        """Examples of weight 0."""
        return _padding(self._empty, size)

    def _classes_of_blocks(self) -> list[np.ndarray]:
        """The class of shapes of each example of each block."""
        read = self._file.read_row_group
        lengths = (read(g, ["length"])["length"].to_numpy() for g in range(len(self._sizes)))
        return [self._shapes.of(each) for each in lengths]

    def _batch(self, s: int) -> Batch:
        epoch, index = divmod(s, self.batches_per_epoch)
        return self._of_one_shape(epoch, index) if self._classes else self._of_blocks(epoch, index)

    def _of_one_shape(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch: of one block and one class."""
        order = self._blocks_of(epoch)[0]
        ends = np.cumsum(self._batches[order])
        place = int(np.searchsorted(ends, index, side="right"))
        block = int(order[place])
        within = index - int(ends[place] - self._batches[block])
        plan = self._shapes.plan(self._classes[block])
        turn = self._permutation(len(plan), epoch, block, 1)[within]
        number, start, stop = plan[turn]
        classes = self._classes[block]
        if self._seed is not None:
            classes = classes[self._permutation(int(self._sizes[block]), epoch, block)]
        rows = np.flatnonzero(classes == number)[start:stop]
        found = jax.tree.map(lambda array: array.take(rows, axis=0), self._block(epoch, place))
        size, length = self._shapes.size(number), self._shapes.length(number)
        if len(rows) < size:
            padding = _padding(self._empty, size - len(rows))
            found = jax.tree.map(lambda *arrays: np.concatenate(arrays), found, padding)
        return _cut(found, length)

    def _of_blocks(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch, of one block or several."""
        ends = self._blocks_of(epoch)[1]
        start, parts, missing = index * self._batch_size, [], self._batch_size
        place = int(np.searchsorted(ends, start, side="right"))
        while missing and place < len(ends):
            examples = self._block(epoch, place)
            begin = start + self._batch_size - missing - int(ends[place] - len(examples.user))
            parts.append(_slice(examples, begin, begin + missing))
            missing -= len(parts[-1].user)
            place += 1
        if missing:
            parts.append(_padding(self._empty, missing))
        if len(parts) == 1:
            return parts[0]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def _blocks_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order in which an epoch visits them, and where each ends."""
        if self._order[0] != epoch:
            order = self._permutation(len(self._sizes), epoch)
            self._order = (epoch, order, np.cumsum(self._sizes[order]))
        return self._order[1:]

    def _permutation(self, size: int, *where: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(size)
        return np.random.default_rng([self._seed, *where]).permutation(size)

    def _block(self, epoch: int, place: int) -> Batch:
        """The examples of a block as an epoch visits them; the block after it is begun."""
        last = place + 1 == len(self._sizes)
        wanted = [(epoch, place), (epoch + 1, 0) if last else (epoch, place + 1)]
        if last and (epoch + 1) * self.batches_per_epoch >= self._length:
            wanted.pop()
        self._ahead = {key: self._ahead.get(key) or self._begin(*key) for key in wanted}
        return self._answer(self._ahead[epoch, place])

    def _answer(self, reading: Future[Batch]) -> Batch:
        """What is read, once it is there: storage that hangs must not hang a run in silence."""
        patience, waited = min(_PATIENCE, self._timeout or _PATIENCE), 0
        while not wait([reading], patience).done:
            waited += patience
            if self._timeout and waited >= self._timeout:
                raise Stalled(
                    f"no batch came for {waited} s: the storage of the prepared data does not "
                    "answer. Run the same command to continue from the last checkpoint, or raise "
                    "train.input_timeout"
                )
            print(f"waiting for a batch, {waited} s so far: is the storage slow?", file=sys.stderr)
        return reading.result()

    def _begin(self, epoch: int, place: int) -> Future[Batch]:
        same = epoch == self._order[0]
        order = self._order[1] if same else self._permutation(len(self._sizes), epoch)
        return _READER.submit(self._read, epoch, int(order[place]))

    def _read(self, epoch: int, block: int) -> Batch:
        found = self._decoded.get(block)
        if found is None:
            found = self._decode(block)
            if self._keep:
                self._decoded[block] = found
        if self._seed is None:
            return found
        rows = self._permutation(int(self._sizes[block]), epoch, block)
        return jax.tree.map(lambda array: array.take(rows, axis=0), found)

    def _bytes(self, group: Any) -> int:
        """What the columns that are read take of a block, decoded."""
        names = set(self._prepared.columns())
        columns = map(group.column, range(group.num_columns))
        return sum(
            c.total_uncompressed_size
            for c in columns
            if c.path_in_schema.split(".list.")[0] in names
        )

    def _decode(self, block: int | None) -> Batch:
        """A block as it is on disk; None: no examples, of the same shapes."""
        names = self._prepared.columns()
        if block is None:
            table = self._file.schema_arrow.empty_table()
        else:
            table = self._file.read_row_group(block, names, use_threads=False)  # columns are small
        return to_batch(to_arrays(table.select(names)), self._prepared.manifest, self._dtype)


class _Shapes(NamedTuple):
    """Classes of examples by the length of their past, in equal steps; 0 has the whole length L."""

    whole: int  # L
    batch: int  # examples of a batch of class 0
    classes: int

    def length(self, number: int) -> int:
        """Places of the past in a class."""
        return -(-self.whole * (self.classes - number) // self.classes)

    def size(self, number: int) -> int:
        """Examples of a batch of a class: about as many places in all as in the others, and a
        number that 8 devices divide if they divide the others'."""
        even = math.gcd(self.batch, 8)
        return self.batch * self.whole // self.length(number) // even * even

    def of(self, lengths: np.ndarray) -> np.ndarray:
        """The class of examples with so many places."""
        edges = [self.length(number) for number in range(self.classes)][::-1]
        return self.classes - 1 - np.searchsorted(edges, lengths)

    def batches(self, classes: np.ndarray) -> np.ndarray:
        """Batches of each class."""
        counts = np.bincount(classes, minlength=self.classes)
        return -(-counts // [self.size(number) for number in range(self.classes)])

    def plan(self, classes: np.ndarray) -> list[tuple[int, int, int]]:
        """(class, begin, end) of each batch among the examples of the class."""
        return [
            (number, self.size(number) * turn, self.size(number) * (turn + 1))
            for number, batches in enumerate(self.batches(classes))
            for turn in range(batches)
        ]


def _cut(batch: Batch, length: int) -> Batch:
    """The first places of the past and of the positions, behind which there is padding alone."""

    def first(array: Any) -> Any:
        return array[:, :length]

    of_places = batch._replace(context={}, user=np.zeros((0, 0)))  # all else is [B, places, ...]
    return jax.tree.map(first, of_places)._replace(context=batch.context, user=batch.user)


def training_batches(source: BatchSource) -> grain.DatasetIterator:
    """Iterate over a source; `get_state` / `set_state` hold the exact position."""
    import grain  # only training needs it

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the source reads ahead
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def to_batch(arrays: dict[str, np.ndarray], manifest: Manifest, dtype: str = "float32") -> Batch:
    """Columns of the prepared format as a batch of n examples, with the fields of the manifest."""
    m, n, positions = manifest, len(arrays["user"]), arrays["row"].shape[1]
    labels = {task: arrays[f"label_{task}"] for task in m.tasks}
    observed = {task: ~np.isnan(values) for task, values in labels.items()}
    looked_up = [field for field in m.history if field.size]
    events = {"ids": _joined(arrays, "event_", looked_up, (n, m.history_length))}
    if m.history_length:
        events = {"item": arrays["event_item"], **events}
    for field in m.history:
        if not field.size:
            events["moment"] = arrays[f"event_{field.name}"]
    return Batch(
        context=_inputs(arrays, "context_", m.context_ids, m.context_numbers, (n,), dtype),
        request=_inputs(
            arrays, "request_", m.request_ids, m.request_numbers, (n, positions), dtype
        ),
        events={name: values for name, values in events.items() if values is not None},
        cutoff=arrays["cutoff"],
        candidate=arrays["candidate"],
        labels={t: np.where(observed[t], a, 0).astype(dtype) for t, a in labels.items()},
        mask={task: there.astype(dtype) for task, there in observed.items()},
        user=arrays["user"],
        weight=(arrays["row"] >= 0).astype(dtype),
        row=arrays["row"],
        weights={
            task: np.nan_to_num(arrays[f"weight_{task}"]).astype(dtype)
            for task in m.tasks
            if f"weight_{task}" in arrays
        },
    )


def _inputs(
    arrays: dict[str, np.ndarray],
    prefix: str,
    ids: Sequence[IdField],
    numbers: Sequence[NumberField],
    shape: tuple[int, ...],
    dtype: str,
) -> dict[str, np.ndarray]:
    parts = {
        "ids": _joined(arrays, prefix, ids, shape),
        "numbers": _joined(arrays, prefix, numbers, shape, dtype),
    }
    return {name: values for name, values in parts.items() if values is not None}


def _joined(
    arrays: dict[str, np.ndarray],
    prefix: str,
    fields: Sequence[IdField | NumberField],
    shape: tuple[int, ...],
    dtype: str = "int32",
) -> np.ndarray | None:
    """The slots of some fields beside each other `[*shape, M]`; None for no field."""
    if not fields:
        return None
    parts = [arrays[prefix + field.name].reshape(*shape, field.slots) for field in fields]
    return np.concatenate(parts, axis=-1, dtype=dtype)


def _slice(batch: Batch, start: int, stop: int) -> Batch:
    return jax.tree.map(lambda array: array[start:stop], batch)


def _padding(like: Batch, size: int) -> Batch:
    zeros = jax.tree.map(lambda array: np.zeros((size, *array.shape[1:]), array.dtype), like)
    return zeros._replace(row=zeros.row - 1)
