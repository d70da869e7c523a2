"""The training run: batches in, steps, records, evaluations, checkpoints, and a clean stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import optax

from mtrec_jax.config import Experiment, select_metric
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource, training_batches
from mtrec_jax.errors import ConfigError, Error
from mtrec_jax.evaluation.evaluate import evaluate
from mtrec_jax.evaluation.inference import load_catalogue, make_inference
from mtrec_jax.nn.model import make_model
from mtrec_jax.sharding import check_batch_size, make_mesh, put_batch, replicate
from mtrec_jax.train import checkpoint
from mtrec_jax.train.progress import Progress
from mtrec_jax.train.records import Records
from mtrec_jax.train.run import Run, claim
from mtrec_jax.train.step import make_step
from mtrec_jax.types import TrainState

STEPS_IN_FLIGHT = 4  # more un-awaited collectives than a few can starve virtual CPU devices
STOPPED_BY: dict[int, int] = {
    signal.SIGINT: 130,
    signal.SIGTERM: 143,
}  # exit status of a run that was asked to stop


class Stopped(Error):
    """The run was asked to stop; everything is saved and the same command continues it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def train(
    experiment: Experiment,
    prepared: Prepared,
    run: str | Path,
    optimizer: optax.GradientTransformation | None = None,
    show_progress: bool = True,
) -> Run:
    """Train an experiment into a run folder; a folder with a checkpoint of it is continued.

    Args:
      experiment: what to train; stored as `config.toml`.
      prepared: data that were prepared by the same experiment.
      run: the run folder, created if missing.
      optimizer: optax chain for the dense parameters instead of the configured one. It is not
        stored: pass the same one to continue.
      show_progress: draw a progress bar on a terminal.

    Raises:
      ConfigError: the run folder belongs to another configuration, or the data was prepared by
        another one.
      CheckpointError: a checkpoint is damaged.
      Stopped: SIGINT or SIGTERM arrived; the state is saved.
    """
    folder = Path(run)
    if experiment.train.precision == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "train.precision: 'float64' needs 64-bit JAX; set JAX_ENABLE_X64=1 in the environment"
        )
    claim(folder, experiment, prepared)
    started = time.perf_counter()
    mesh = make_mesh(experiment.train.mesh)
    check_batch_size(experiment.train.batch_size, mesh)
    source, total, every = _schedule(experiment, prepared)
    batches = training_batches(source)
    model = make_model(experiment, prepared.manifest)
    step = make_step(experiment, prepared.manifest, model, mesh, total, optimizer)
    catalogue = replicate(load_catalogue(prepared, experiment), mesh)
    inference = make_inference(model, catalogue)
    task, metric, larger = select_metric(experiment)
    state = step.init(jax.random.key(experiment.train.seed, impl="rbg"))
    records = Records(folder / "metrics.jsonl")
    meta: dict[str, Any] = {"threads": os.cpu_count(), "best": None, "stale": 0, "done": False}
    with checkpoint.open_manager(folder / "checkpoints", larger) as manager:
        latest = manager.latest_step()
        if latest is not None:
            state, meta = checkpoint.restore(manager, latest, state, batches)
        number = int(state.step)
        bar = Progress(total, number, show_progress, experiment.name)
        if number >= total or meta["done"]:
            bar.note(f"{folder} is trained already, up to step {number}: nothing to do")
            return Run(folder, experiment, prepared)
        records.truncate(meta.get("bytes", 0))

        def save(selected: float | None) -> None:
            meta["bytes"] = records.size()
            checkpoint.save(manager, state, batches, meta, selected)

        with _stop_signals() as stopped, bar:
            while number < total and not meta["done"]:
                batch = put_batch(next(batches), mesh)
                state = step.update(state, batch, catalogue)
                number += 1
                if number % STEPS_IN_FLIGHT == 0:
                    jax.block_until_ready(state.step)
                bar.advance(number, records.last_losses)
                if number % experiment.train.log_every == 0 or number == total:
                    state = _log_losses(records, state, number)
                evaluated = None
                if number % every == 0 or number == total:
                    bar.say("evaluating")
                    evaluated = _evaluate(
                        experiment, prepared, inference, state, records, number, f"{task}/{metric}"
                    )
                    _judge(meta, evaluated, larger, experiment.train.patience)
                    bar.evaluated(f"{task}/{metric}", evaluated, meta["best"])
                keep_every = experiment.train.checkpoint_every
                if evaluated is not None or (keep_every and number % keep_every == 0):
                    save(evaluated)
                if stopped and number < total and not meta["done"]:
                    if manager.latest_step() != number:
                        save(None)
                    raise _stopped_at(number, total, folder, stopped[0])
        records.add_timing(number, "seconds", time.perf_counter() - started)
    return Run(folder, experiment, prepared)


def _stopped_at(number: int, total: int, folder: Path, by: int) -> Stopped:
    return Stopped(
        f"stopped at step {number} of {total}; everything is saved in {folder}. "
        "Run the same command to continue",
        STOPPED_BY[by],
    )


def _schedule(experiment: Experiment, prepared: Prepared) -> tuple[BatchSource, int, int]:
    """Training batches, steps in all, steps between evaluations."""
    config = experiment.train
    one = BatchSource(prepared, "train", config.batch_size)
    epochs = config.epochs or -(-config.steps // one.batches_per_epoch)
    total = config.steps or epochs * one.batches_per_epoch
    source = BatchSource(
        prepared, "train", config.batch_size, config.seed, epochs, config.precision
    )
    return source, total, config.evaluate_every or one.batches_per_epoch


def _log_losses(records: Records, state: TrainState, number: int) -> TrainState:
    """Write each task's mean loss since the last record, and start the sums anew."""
    sums = {name: jax.device_get(value) for name, value in state.sums.items()}
    for name, (numerator, weight) in sums.items():
        records.add(number, "train", name, "loss", float(numerator / max(weight, 1e-9)))
    zeros = {name: jax.numpy.zeros_like(value) for name, value in state.sums.items()}
    placed = {n: jax.device_put(z, state.sums[n].sharding) for n, z in zeros.items()}
    return state._replace(sums=placed)


def _evaluate(
    experiment: Experiment,
    prepared: Prepared,
    inference: Any,
    state: TrainState,
    records: Records,
    number: int,
    selected: str,
) -> float:
    """Record all validation metrics; return the one that selects."""
    started = time.perf_counter()
    found = evaluate(
        experiment, prepared, inference, state.params, state.tables, "validation", full=False
    )
    for task, metrics in found.tasks.items():
        for metric, value in metrics.items():
            records.add(number, "validation", task, metric, value)
    records.add_timing(number, "evaluation seconds", time.perf_counter() - started)
    task, _, metric = selected.partition("/")
    return found.tasks[task][metric]


def _judge(meta: dict[str, Any], value: float, larger: bool, patience: int) -> None:
    """Early stopping: count the evaluations since the last improvement."""
    best = meta["best"]
    if best is None or (value > best if larger else value < best):
        meta["best"], meta["stale"] = value, 0
    else:
        meta["stale"] += 1
    meta["done"] = bool(patience and meta["stale"] >= patience)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one has its usual effect."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may install handlers
        return
    previous: dict[int, Any] = {}

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in STOPPED_BY:
        previous[number] = signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
