"""Checkpoints: one atomic Orbax step holds everything that a run needs to continue exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from mtrec_jax.errors import CheckpointError
from mtrec_jax.train.step import new_scratch
from mtrec_jax.types import PyTree, TrainState


def open_manager(
    folder: Path, larger_is_better: bool = True, read_only: bool = False
) -> ocp.CheckpointManager:
    """A manager that keeps the best step and the two latest ones.

    `read_only` creates nothing, and leaves alone what another process is writing at this moment.
    """
    policies = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(n=2),
            checkpoint_managers.BestN(
                get_metric_fn=_selected,
                reverse=not larger_is_better,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies,
        best_fn=_selected,
        best_mode="max" if larger_is_better else "min",
        cleanup_tmp_directories=not read_only,
        create=not read_only,
    )
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    batches: grain.DatasetIterator,
    meta: dict[str, Any],
    selected: float | None,
) -> None:
    """Save the state, the data cursor and `meta` as step `state.step`.

    Args:
      manager: from `open_manager`.
      state: saved whole but for the scratch, which holds nothing between steps.
      batches: the training iterator, just after the batch of this step was drawn.
      meta: JSON-able notes of the loop (metrics written so far, early stopping).
      selected: value of the selection metric where this step was evaluated, else None.
    """
    metrics = None if selected is None else {"selected": selected}
    manager.save(
        int(state.step),
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(_model_part(state)),
            trainer=ocp.args.StandardSave(_trainer_part(state)),
            data=grain.checkpoint.CheckpointSave(batches),
            meta=ocp.args.JsonSave(dict(meta)),  # written later, by a thread,
        ),
        metrics=metrics,
    )


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    like: TrainState,
    batches: grain.DatasetIterator,
) -> tuple[TrainState, dict[str, Any]]:
    """Restore a step into the shapes and shardings of `like`, and move `batches` to its position.

    Raises:
      CheckpointError: the step is damaged or was written by another model.
    """
    items = {
        "model": ocp.args.StandardRestore(_abstract(_model_part(like))),
        "trainer": ocp.args.StandardRestore(_abstract(_trainer_part(like))),
        "meta": ocp.args.JsonRestore(),
        "data": grain.checkpoint.CheckpointRestore(batches),
    }
    found = _restore(manager, step, items)
    state = TrainState(**found["model"], **found["trainer"], scratch={})
    scratch = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), new_scratch(state.tables), like.scratch
    )
    return state._replace(scratch=scratch), found["meta"]


def restore_model(
    manager: ocp.CheckpointManager, step: int, like: tuple[PyTree, PyTree]
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Restore only (params, sparse tables), into the shapes of `like`, which may be abstract.

    Raises:
      CheckpointError: the step is damaged or was written by another model.
    """
    params, tables = like
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        {"params": params, "tables": tables},
    )
    found = _restore(manager, step, {"model": ocp.args.StandardRestore(wanted)})["model"]
    return found["params"], found["tables"]


def _restore(manager: ocp.CheckpointManager, step: int, items: dict[str, Any]) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and tensorstore raise many kinds for damaged files
        folder = manager.directory / str(step)
        raise CheckpointError(
            f"checkpoint {folder} cannot be restored. It is damaged (then move it away to continue "
            "from the step before it) or was written by another version of the model (then train "
            f"into a new --run folder). What went wrong: {_first_line(error)}"
        ) from error


def _model_part(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "tables": state.tables}


def _trainer_part(state: TrainState) -> dict[str, Any]:
    """Everything else but the scratch, which holds nothing between steps."""
    skipped = ("params", "tables", "scratch")
    return {name: part for name, part in state._asdict().items() if name not in skipped}


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def best_or_latest(manager: ocp.CheckpointManager, folder: Path) -> int:
    """The step with the best selection metric, or the latest when none was evaluated.

    Raises:
      CheckpointError: the folder has no whole checkpoint.
    """
    step = manager.best_step()
    step = manager.latest_step() if step is None else step
    if step is None:
        raise CheckpointError(
            f"{folder} has no checkpoint yet. Run: mtrec train CONFIG --run {folder.parent}"
        )
    return int(step)


def _selected(metrics: PyTree) -> float:
    return float(metrics["selected"])


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
