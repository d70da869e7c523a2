"""Checkpoints: one atomic Orbax step holds everything that a run needs to continue exactly.

With the arrays goes a digest of each; with the position in the data and the notes of the loop goes
one of their text. What is restored has to have the same.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mtrec_jax import processes
from mtrec_jax.errors import CheckpointError, Error
from mtrec_jax.sharding import by_row_on, whole_on
from mtrec_jax.tables.update import new_scratch
from mtrec_jax.types import PyTree, TrainState

if TYPE_CHECKING:
    import grain

_CHUNK = 2**26  # bytes of an array that are compressed and written at a time
_PLACES = np.arange(2**16, dtype=np.uint32)  # in a piece that a digest adds up at a time
_ADDED = ("cursor", "digests", "checksum")  # to the notes of the loop


def open_manager(folder: Path, notes: Mapping[str, Any] | None = None) -> ocp.CheckpointManager:
    """A manager of a run's steps.

    Args:
      folder: of the checkpoints.
      notes: the loop's, which `save` is given as well: whenever a step is saved, the two latest
        steps are kept and the one that `notes["best_step"]` names then. None: the manager reads,
        creates nothing, and leaves alone what another process is writing at this moment.
    """
    writes = notes is not None

    class LatestAndBest:
        def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
            best, latest = (notes or {}).get("best_step"), checkpoints[-2:]
            return [c.step == best or c in latest for c in checkpoints]

    options = ocp.CheckpointManagerOptions(
        preservation_policy=LatestAndBest(), cleanup_tmp_directories=writes, create=writes
    )
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    batches: grain.DatasetIterator,
    notes: dict[str, Any],
) -> None:
    """Save the state, the data cursor and the notes as step `state.step`.

    Args:
      manager: from `open_manager`.
      state: saved whole but for the scratch, which holds nothing between steps.
      batches: the training iterator, just after the batch of this step was drawn.
      notes: of the loop, as JSON takes them: metrics written so far, early stopping, best step.
    """
    parts = {"model": _model_part(state), "trainer": _trainer_part(state)}
    # A copy, as it is written later, by a thread.
    all_notes = {**notes, "cursor": json.dumps(batches.get_state()), "digests": digests(parts)}
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            model=_written(parts["model"]),
            trainer=_written(parts["trainer"]),
            meta=ocp.args.JsonSave({**all_notes, "checksum": _checksum(all_notes)}),
        ),
    )


def _written(tree: PyTree) -> ocp.args.PyTreeSave:
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    return ocp.args.PyTreeSave(tree, save_args=chunks, ocdbt_target_data_file_size=2 * _CHUNK)


def _read(like: PyTree) -> ocp.args.PyTreeRestore:
    """`like` holds shapes, types and shardings."""
    how = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(like, restore_args=how)


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    like: TrainState,
    batches: grain.DatasetIterator,
) -> tuple[TrainState, dict[str, Any]]:
    """Restore a step into the shapes and shardings of `like`, and move `batches` to its position.

    Nothing is read from `like`: it may be abstract.

    Raises:
      CheckpointError: the step is damaged or was written by another model.
    """
    items = {
        "model": _read(_abstract(_model_part(like))),
        "trainer": _read(_abstract(_trainer_part(like))),
        "meta": ocp.args.JsonRestore(),
    }
    found = _restore(manager, step, items)
    _verify(manager, step, found)
    batches.set_state(json.loads(found["meta"]["cursor"]))
    shardings = jax.tree.map(lambda x: x.sharding, like.scratch)
    scratch = jax.jit(lambda: new_scratch(like.tables), out_shardings=shardings)()
    state = TrainState(**found["model"], **found["trainer"], scratch=scratch)
    meta = {name: value for name, value in found["meta"].items() if name not in _ADDED}
    return state, meta


def restore_latest(
    manager: ocp.CheckpointManager,
    like: TrainState,
    batches: grain.DatasetIterator,
    note: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any]] | None:
    """`restore` the latest step that is whole; None where there is no step.

    Damaged steps after it are moved into the folder `damaged` beside the checkpoints, and said so.

    Raises:
      CheckpointError: no step can be restored; nothing was moved.
      Error: storage fails, or memory does not suffice; nothing was moved.
    """
    first: CheckpointError | None = None
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = restore(manager, step, like, batches)
        except CheckpointError as error:
            first, damaged = first or error, [*damaged, step]
            continue
        folder = Path(manager.directory)
        for number in damaged if processes.is_first() else ():
            _set_aside(folder / str(number), note, f"; going on from step {step}")
        if damaged:
            processes.wait("damaged checkpoints are moved")
            manager.reload()
        return found
    if first is not None:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {manager.directory} can be restored; "
            f"nothing was moved. Train into a new run folder. The latest: {first}"
        ) from first
    return None


def _set_aside(path: Path, note: Callable[[str], None], what_next: str) -> None:
    """Move a step into the folder `damaged` beside the checkpoints, under a name that is free."""
    folder = path.parent.parent / "damaged"
    folder.mkdir(exist_ok=True)
    numbers = (f"{path.name}.{n}" if n else path.name for n in itertools.count())
    place = next(folder / name for name in numbers if not (folder / name).exists())
    path.rename(place)
    note(f"checkpoint {path} is damaged and was moved to {place}{what_next}")


def restore_model(
    manager: ocp.CheckpointManager,
    step: int,
    like: tuple[PyTree, PyTree],
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Restore only (params, sparse tables), into the shapes of `like`, which may be abstract.

    They come to one device, or over a mesh as a training state does.

    Raises:
      CheckpointError: the step is damaged or was written by another model.
      Error: the devices have too little memory.
    """
    params, tables = like
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    whole, by_row = (one, one) if mesh is None else (whole_on(mesh), by_row_on(mesh))

    def placed(tree: PyTree, where: jax.sharding.Sharding) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    wanted = {"params": placed(params, whole), "tables": placed(tables, by_row)}
    items = {"model": _read(wanted), "meta": ocp.args.JsonRestore()}
    found = _restore(manager, step, items)
    _verify(manager, step, found)
    return found["model"]["params"], found["model"]["tables"]


def _restore(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> Any:
    found, failed = None, None
    try:
        found = manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and tensorstore raise many kinds for damaged files
        failed = error
    worst = processes.largest(_kind(failed))  # all of them go the same way
    if not worst:
        return found
    what = _first_line(failed) if failed else "another process could not read its part"
    if worst == _NO_MEMORY:
        raise Error(
            f"checkpoint {manager.directory / str(step)} does not fit in the memory of the "
            f"devices ({what}). It needs as many as in training: see train.mesh, mtrec plan"
        ) from failed
    if worst == _NO_STORAGE:
        raise Error(
            f"checkpoint {manager.directory / str(step)} could not be read: {what}. That says "
            "nothing about what it holds, and nothing was moved. Run the same command again when "
            "the storage answers"
        ) from failed
    raise _damaged(manager, step, what) from failed


_DAMAGE, _NO_STORAGE, _NO_MEMORY = 1, 2, 3


def _kind(error: Exception | None) -> int:
    if error is None:
        return 0
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in _first_line(error):
        return _NO_MEMORY
    return _NO_STORAGE if _storage_failed(error) else _DAMAGE


def _storage_failed(error: BaseException | None) -> bool:
    """Whether the system could not read, as shared storage that is away for a moment cannot; a
    file that is missing or short is damage."""
    missing = (errno.ENOENT, errno.ENOTDIR)
    while error is not None:
        if isinstance(error, OSError) and error.errno and error.errno not in missing:
            return True
        # of tensorstore, which raises errors of its own: "... [os_error_code='5'] ..."
        numbers = [int(n) for n in re.findall(r"os_error_code='(\d+)'", str(error))]
        if any(number not in missing for number in numbers):
            return True
        error = error.__cause__ or error.__context__
    return False


def _damaged(manager: ocp.CheckpointManager, step: int, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {manager.directory / str(step)} cannot be restored. It is damaged (then move "
        "it away to continue from the step before it) or was written by another version of the "
        f"model (then train into a new run folder). What went wrong: {what}"
    )


# --- Digests


def digests(tree: PyTree) -> dict[str, int]:
    """A 32-bit digest of each array, by its path; the same however the array is split.

    The sum of all 32-bit words times odd numbers that differ by place: any single wrong bit shows.
    Each process adds up what its own devices hold, piece by piece and without a program for it.
    """
    leaves = jax.tree.leaves_with_path(tree)
    sums = np.array([_digest(leaf) for _, leaf in leaves], np.uint32)
    if not all(leaf.is_fully_addressable for _, leaf in leaves):
        whole = np.array([leaf.is_fully_addressable for _, leaf in leaves])
        every = np.stack(processes.gathered(sums)).sum(0, dtype=np.uint32)
        sums = np.where(whole, sums, every)
    return {jax.tree_util.keystr(path): int(sums[n]) for n, (path, _) in enumerate(leaves)}


def _digest(array: jax.Array) -> int:
    """Of the parts of an array that are here, each once."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    total = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            starts = tuple(part.start or 0 for part in shard.index)
            for place, part in _runs(np.asarray(shard.data), starts, array.shape):
                total += _weighted(_words(part), place * max(1, part.itemsize // 4))
    return total % 2**32


def _runs(
    part: np.ndarray, starts: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """Elements of a part that follow each other in the whole array, and the place of the first."""
    stride = math.prod(shape[1:])
    if part.shape[1:] == shape[1:]:
        yield (starts[0] if starts else 0) * stride, part.reshape(-1)
    else:
        for number, row in enumerate(part, starts[0]):
            for place, run in _runs(row, starts[1:], shape[1:]):
                yield number * stride + place, run


def _words(elements: np.ndarray) -> np.ndarray:
    """Elements of 8 bytes are two words, others are one."""
    size = elements.itemsize
    return elements.view(np.uint32 if size >= 4 else f"uint{8 * size}")


def _weighted(words: np.ndarray, first: int) -> int:
    """The words times 1 + K x their place, K even."""
    plain, by_place = 0, 0
    for start in range(0, len(words), len(_PLACES)):
        piece = words[start : start + len(_PLACES)].astype(np.uint32, copy=False)
        here = int(piece.sum(dtype=np.uint32))
        plain += here
        by_place += int(np.dot(piece, _PLACES[: len(piece)])) + (first + start) * here
    return plain + by_place * 2654435762


def _verify(manager: ocp.CheckpointManager, step: int, found: Any) -> None:
    """Raise `CheckpointError` unless notes and digests are those that were saved."""
    notes = {name: value for name, value in found["meta"].items() if name != "checksum"}
    if found["meta"].get("checksum") != _checksum(notes):
        raise _damaged(manager, step, "its notes are not what was saved")
    parts = {name: found[name] for name in ("model", "trainer") if found.get(name) is not None}
    for name, value in digests(parts).items():
        if notes["digests"].get(name) != value:
            raise _damaged(manager, step, f"{name} is not what was saved")


def _checksum(notes: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


def _model_part(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "tables": state.tables}


def _trainer_part(state: TrainState) -> dict[str, Any]:
    """Everything else but the scratch, which holds nothing between steps."""
    skipped = ("params", "tables", "scratch")
    return {name: part for name, part in state._asdict().items() if name not in skipped}


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def best_or_latest(manager: ocp.CheckpointManager, folder: Path) -> int:
    """The step that the latest whole notes call the best, or the latest where they name none.

    Raises:
      CheckpointError: the folder has no whole checkpoint.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    for step in steps:
        try:
            found = _restore(manager, step, {"meta": ocp.args.JsonRestore()})
            _verify(manager, step, found)
        except CheckpointError:
            continue
        best = found["meta"]["best_step"]
        return int(best if best in steps else step)
    if steps:
        raise _damaged(manager, steps[0], "its notes cannot be read")
    raise CheckpointError(
        f"{folder} has no checkpoint yet. Run: mtrec train CONFIG --run {folder.parent}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
