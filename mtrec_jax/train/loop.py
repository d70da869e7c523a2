"""The training run: batches in, steps, records, evaluations, checkpoints, and a clean stop."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np
import optax

from mtrec_jax import processes
from mtrec_jax.arguments import a_path, argument, instance
from mtrec_jax.config import Experiment, Selection, Task, main_metric, selection, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource, training_batches
from mtrec_jax.errors import ConfigError, Error
from mtrec_jax.evaluation.answers import find_answers, to_json
from mtrec_jax.evaluation.collect import candidates_of
from mtrec_jax.evaluation.evaluate import evaluate
from mtrec_jax.evaluation.metrics import metric_named
from mtrec_jax.experiments import without_effect
from mtrec_jax.interrupts import collecting
from mtrec_jax.losses.lists import LISTS
from mtrec_jax.models.model import Model, make_model
from mtrec_jax.models.serve import Serving, load_catalogue, make_serving
from mtrec_jax.sharding import AnyMesh, check_batch_size, make_mesh, put_batch, replicate
from mtrec_jax.tables.capacity import first_batches, measured_buffers
from mtrec_jax.tables.exchange import BuffersOf
from mtrec_jax.tables.lookup import Ids
from mtrec_jax.train import checkpoint
from mtrec_jax.train.progress import Progress
from mtrec_jax.train.records import Records, read_records, write_json
from mtrec_jax.train.run import (
    ANSWERS,
    Run,
    check_data,
    check_folder,
    claim,
    has_checkpoint,
    load_answers,
    load_best,
)
from mtrec_jax.train.step import Step, learning_rate, make_step
from mtrec_jax.train.stopping import (
    asked_to_stop,
    full_disk_named,
    full_memory_named,
    stopped_at,
)
from mtrec_jax.train.warm_start import find_source, warm_start
from mtrec_jax.types import Batch, Catalogue, TrainState

OnEvaluation = Callable[[int, float, TrainState], Any]
_MOST_LEFT_OUT = 100  # steps, with train.not_finite = "skip"


def steps_in_flight() -> int:
    """Steps that are begun before the host waits for the device: few on CPUs, whose virtual devices
    more un-awaited collectives can starve; elsewhere enough that waiting costs nothing."""
    return 4 if jax.default_backend() == "cpu" else 32


def train(
    experiment: Experiment,
    prepared: Prepared,
    run: str | Path,
    optimizer: optax.GradientTransformation | None = None,
    show_progress: bool = True,
    init_from: str | Path | Run | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> Run:
    """Train an experiment into a run folder; a folder with a checkpoint of it is continued.

    Args:
      experiment: what to train; stored as `config.toml`.
      prepared: data of which the experiment chooses tasks and features.
      run: the run folder, created if missing. One of the same experiment but for a larger
        `train.epochs` or `train.steps` is lengthened.
      optimizer: optax chain for the dense parameters instead of the configured one. It is not
        stored: pass the same one to continue.
      show_progress: draw a progress bar on a terminal.
      init_from: a run, or its folder, whose best parameters and tables the run begins with; see
        `train.warm_start`. A run that has begun already goes on from its checkpoint.
      on_evaluation: is called after each evaluation, before its checkpoint, with the step, the
        value that selects, and the state, which the next step overwrites. What it raises ends the
        run.

    Raises:
      ConfigError: the run folder belongs to another configuration, or the data was prepared by
        another one, or the run cannot begin, or has not begun, with `init_from`.
      CheckpointError: a checkpoint is damaged, or the disk is full.
      Error: the loss is not finite, or a device's memory is full.
      Stopped: SIGINT, SIGTERM or SIGHUP arrived; the state is saved.
    """
    instance("experiment", experiment, Experiment, "pass what load_experiment gives")
    instance("prepared", prepared, Prepared, "pass what prepare or open_prepared gives")
    if optimizer is not None:
        instance("optimizer", optimizer, optax.GradientTransformation, "pass an optax optimizer")
    folder = a_path("run", run)
    check_start(experiment, folder)
    prepared = prepared.chosen(experiment)
    check_data(folder, prepared)
    if not experiment.split.whole:
        candidates_of(experiment, prepared)  # refused now, not at the first evaluation
    there = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    same = to_toml(experiment), prepared.manifest.fingerprint, str(there)
    processes.check_same("what is trained", "\n".join(same))
    with (
        full_disk_named(folder),
        full_memory_named(experiment),
        _sole_trainer(folder),
        collecting() as stopped,
    ):  # from here on: compilation takes seconds, and is stopped too
        new = Run(folder, experiment, prepared)
        source = find_source(init_from, new)
        job = _train(new, optimizer, show_progress, stopped, source, on_evaluation)
        _find_answers(new, job)
    return new


@contextlib.contextmanager
def _sole_trainer(folder: Path) -> Iterator[None]:
    """Hold the run folder's lock, which a process that dies gives back."""
    lock, is_taken, failed = filelock.FileLock(folder / "lock", blocking=False), False, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if processes.is_first():
            lock.acquire()
    except filelock.Timeout:
        is_taken = True
    except OSError as error:
        failed = error.strerror or str(error)
    if processes.largest(bool(failed)):
        raise ConfigError(
            f"{folder} cannot be written{f' ({failed})' * bool(failed)}, and training writes "
            f"there; pass another {argument('run')}"
        )
    if processes.largest(is_taken):
        raise ConfigError(
            f"another process is training in {folder}; wait for it, stop it, or pass "
            f"another {argument('run')}"
        )
    try:
        yield
    finally:
        lock.release()


def check_start(experiment: Experiment, folder: Path) -> None:
    """Raise `ConfigError` for what would stop a run whatever its data, before they are prepared:
    devices, precision, and a folder that belongs to something else."""
    if experiment.train.precision == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "train.precision: 'float64' needs 64-bit JAX; set JAX_ENABLE_X64=1 in the environment"
        )
    config = experiment.train
    check_batch_size(config.batch_size, make_mesh(config.mesh), config.accumulate)
    check_folder(folder, experiment)


def _train(
    run: Run,
    optimizer: optax.GradientTransformation | None,
    show_progress: bool,
    stopped: list[int],
    source: Run | None,
    on_evaluation: OnEvaluation | None,
) -> _Job:
    """Build or restore the state, and run the steps that are left."""
    folder, experiment, prepared = run.folder, run.experiment, run.prepared
    job = _make_job(experiment, prepared, folder, optimizer, on_evaluation)
    meta: dict[str, Any] = {"best": None, "best_step": None, "stale": 0, "done": False}
    meta |= _topology(job.mesh)
    notes: list[str] = []
    with checkpoint.open_manager(folder / "checkpoints", meta) as manager:
        restored = checkpoint.restore_latest(manager, job.step.abstract, job.batches, notes.append)
        if restored:
            state = restored[0]
            meta.update(restored[1])
        else:
            state = job.step.init(experiment.train.seed)
            if source is not None:
                state = warm_start(state, run, source, job.mesh, notes.append)
        number = int(state.step)
        bar = Progress(job.total, number, show_progress and processes.is_first(), experiment.name)
        for line in notes:
            bar.note(line)
        if number >= job.total or meta["done"]:
            early = ", where early stopping ended it" if meta["done"] else ""
            bar.note(f"{folder} is trained already, up to step {number}{early}: nothing to do")
            return job
        for line in without_effect(experiment):
            bar.note(line)
        if experiment.split.validates and (undefined := _undefined(job)):
            bar.note(undefined)
        if longer := claim(folder, experiment, prepared):
            counted = number - int(state.bad[0])  # steps left out move no schedule
            bar.note(f"{folder}: {longer}{_schedule_goes_on(experiment, counted, job.total)}")
        for what, now in _topology(job.mesh).items():
            if meta.get(what) != now:
                bar.note(
                    f"this run began with {what} {meta.get(what)} and goes on with {now}: results "
                    "may differ in the last bits"
                )
        if restored is None and job.records.size():
            bar.note(f"{folder} has records and no checkpoint: it is trained anew, from step 0")
        if job.records.truncate(meta.get("bytes", 0)):
            bar.note(
                f"{job.records.path} is shorter than when step {number} was saved: some is lost"
            )
        with bar:
            number = _run_steps(job, manager, bar, state, meta, stopped)
        if meta["done"]:
            bar.note(
                f"stopped early at step {number}: no improvement in {meta['stale']} evaluations"
            )
        if processes.is_first() and experiment.split.validates:
            _record_bests(job, bar, meta["best_step"])
        job.records.add_seconds(number)
    return job


def _find_answers(run: Run, job: _Job) -> None:
    """Store how the best checkpoint answers, unless that is there already."""
    if not run.experiment.split.validates:
        return
    checkpoints = run.folder / "checkpoints"
    with checkpoint.open_manager(checkpoints) as manager:
        best = checkpoint.best_or_latest(manager, checkpoints)
    if processes.largest(load_answers(run, best) is not None):
        return
    params, tables, step = load_best(run, job.mesh, job.serving.model)
    answers = find_answers(run.experiment, run.prepared, job.serving, params, tables, step)
    if processes.is_first():
        write_json(run.folder / ANSWERS, to_json(answers))
    processes.wait("answers are stored")


def _record_bests(job: _Job, bar: Progress, kept: int | None) -> None:
    """Record at which step each task by itself was at its best, by its main metric."""
    found = read_records(job.records.path)
    said = []
    for task in job.experiment.tasks:
        metric = main_metric(job.experiment, task)
        best: dict[str, Any] | None = None
        for record in found:
            if (record["split"], record["task"], record["metric"]) != ("validation", task, metric):
                continue
            value = math.nan if record["value"] is None else record["value"]
            before = None if best is None else best["value"]
            if is_better(value, before, metric_named(metric).larger_is_better):
                best = record
        if best is not None:
            job.records.add(best["step"], "best", task, metric, best["value"])
            said.append(f"{task}/{metric} {best['value']:.4f} at step {best['step']}")
    if len(said) > 1:
        bar.note(f"kept: step {kept}. Each task by itself was best with {', '.join(said)}")


def _topology(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What the last bits of results depend on."""
    shape = list(mesh.devices.shape)
    return {"threads": os.cpu_count(), "mesh": shape, "processes": processes.count()}


def _undefined(job: _Job) -> str:
    """What to say where the labels of validation leave the selecting metric undefined."""
    summary = job.prepared.manifest.summary
    if summary is None:
        return ""
    for task, metric in job.selection.metrics:
        count, mean = summary.labels.get(task, {}).get("validation", (0, None))
        one_class = mean == 0 or (mean == 1 and count < 10**6)  # means have six digits
        if task in summary.labels and (not count or (metric == "auc" and one_class)):
            why = "all its labels there are equal" if count else "it has no labels there"
            return (
                f"{task}/{metric} is undefined on the validation set: {why}. No evaluation will "
                "choose a checkpoint or stop training early: the latest is kept. Choose another "
                "select.metric"
            )
    return ""


def _schedule_goes_on(experiment: Experiment, number: int, total: int) -> str:
    """What a longer run does to a learning rate whose schedule depends on the length."""
    if experiment.train.schedule == "constant":
        return ""
    rate = float(learning_rate(experiment.train, 0.0, total)(number))
    return f"; the schedule '{experiment.train.schedule}' goes on at {rate:.3g} and ends there"


class _Job(NamedTuple):
    """What a run is made of; built once, before its first step."""

    experiment: Experiment
    prepared: Prepared
    folder: Path
    mesh: jax.sharding.Mesh
    total: int  # steps in all
    every: int  # steps between evaluations
    epoch: int  # steps of an epoch
    batches: Any  # the training iterator
    step: Step
    catalogue: Catalogue
    serving: Serving
    records: Records
    selection: Selection
    on_evaluation: OnEvaluation | None


def _make_job(
    experiment: Experiment,
    prepared: Prepared,
    folder: Path,
    optimizer: optax.GradientTransformation | None,
    on_evaluation: OnEvaluation | None = None,
) -> _Job:
    mesh = make_mesh(experiment.train.mesh)
    source, total, every = _schedule(experiment, prepared)
    model = make_model(experiment, prepared.manifest)
    items = load_catalogue(prepared, experiment)
    if any(task.loss in LISTS for task in experiment.tasks.values()):
        check_lists(experiment, map(source.__getitem__, range(source.batches_per_epoch)))
    buffers = exchange_buffers(model, items, source, mesh, experiment.train.seed)
    catalogue = replicate(items, mesh)
    return _Job(
        experiment=experiment,
        prepared=prepared,
        folder=folder,
        mesh=mesh,
        total=total,
        every=every,
        epoch=source.batches_per_epoch,
        batches=training_batches(source),
        step=make_step(experiment, model, mesh, total, optimizer, buffers),
        catalogue=catalogue,
        serving=make_serving(experiment, prepared.manifest, model, catalogue, mesh),
        records=Records(folder / "metrics.jsonl", processes.is_first()),
        selection=selection(experiment),
        on_evaluation=on_evaluation,
    )


def check_lists(experiment: Experiment, batches: Iterable[Batch]) -> None:
    """Raise `ConfigError` for a loss over lists, and nothing beside it, that has nothing to compare
    in the batches of an epoch: it would be 0 throughout. Mostly the first batch has something."""
    left = {n: t for n, t in experiment.tasks.items() if t.loss in LISTS and not t.pointwise}
    for batch in batches:
        left = {name: task for name, task in left.items() if not _compares(name, task, batch)}
        if not left:
            return
    for name, task in left.items():
        remedy = "take loss = 'pointwise'"
        if task.lists == "request":
            remedy = (
                "The impressions of a request have one and the same time, that of the request; "
                "else take lists = 'user'"
            )
        elif experiment.data.positions:
            remedy = f"Raise data.positions, or {remedy}"
        raise ConfigError(
            f"tasks.{name}.loss: '{task.loss}' compares labels inside of a list, and no list "
            f"of the training examples has two different ones. {remedy[0].upper()}{remedy[1:]}"
        )


def _compares(name: str, task: Task, batch: Batch) -> bool:
    """Whether a list of the batch has two different labels."""
    cutoff = batch.cutoff if task.lists == "request" else 0 * batch.cutoff
    label, known = np.asarray(batch.labels[name]), np.asarray(batch.mask[name]) > 0
    pairs = known[:, :, None] & known[:, None] & (cutoff[:, :, None] == cutoff[:, None])
    return bool(np.any(pairs & (label[:, :, None] != label[:, None])))


def exchange_buffers(
    model: Model,
    items: Catalogue,
    source: BatchSource,
    mesh: AnyMesh,
    seed: int,
) -> BuffersOf:
    """Sizes of the exchange of rows, measured on the run's first batches."""
    first = first_batches(source) if mesh.shape["table"] > 1 else []

    def ids(batch: Batch, key: jax.Array) -> Ids:
        return model.ids(batch, items, key, model.drawing()).ids

    return measured_buffers(model.layout, ids, first, mesh, seed)


def _run_steps(
    job: _Job,
    manager: Any,
    bar: Progress,
    state: TrainState,
    meta: dict[str, Any],
    stopped: list[int],
) -> int:
    """Step, record, evaluate and save until the end, early stopping or a signal."""
    config, number, in_flight = job.experiment.train, int(state.step), steps_in_flight()

    def save() -> None:
        job.records.add_seconds(number)
        meta["bytes"] = job.records.size()
        checkpoint.save(manager, state, job.batches, meta)
        if config.checkpoint_wait:
            manager.wait_until_finished()

    recent: deque[Batch] = deque(maxlen=in_flight)
    left_out = int(state.bad[0])
    while number < job.total and not meta["done"]:
        recent.append(next(job.batches))
        state = job.step.update(state, put_batch(recent[-1], job.mesh), job.catalogue)
        number += 1
        due = number % job.every == 0 or number == job.total
        saves = due or (config.checkpoint_every and number % config.checkpoint_every == 0)
        if number % in_flight == 0 or saves:
            left_out = _check_finite(job, bar, state, number, recent, left_out)
        bar.advance(number, job.records.last_losses)
        if number % config.log_every == 0 or number == job.total:
            after = _log_losses(job.records, state, number, job.mesh)
            if number % config.log_every == 0:  # a longer run goes on with the sums of its end
                state = after
        if due and job.experiment.split.validates:
            bar.say("evaluating")
            evaluated = _evaluate(job, state, number)
            _judge(meta, number, evaluated, job.selection.larger, config.patience)
            bar.evaluated(job.selection.name, evaluated, meta)
            if job.on_evaluation:
                job.on_evaluation(number, evaluated, state)
        if saves:
            save()
        by = asked_to_stop(stopped, number, in_flight)
        if by and number < job.total and not meta["done"]:
            if manager.latest_step() != number:
                save()
            raise stopped_at(number, job.total, job.folder, by)
    return number


def _check_finite(
    job: _Job,
    bar: Progress,
    state: TrainState,
    number: int,
    recent: deque[Batch],
    left_out: int,
) -> int:
    """Stop, or say so, where steps since the last check were left out; returns how many in all."""
    found, last = (int(n) for n in jax.device_get(state.bad))
    if found == left_out:
        return found
    stops = job.experiment.train.not_finite == "stop"
    message = f"the loss or its gradient is not finite at step {last}"
    age = number - last + 1
    if age <= len(recent):
        before = state._replace(step=jax.numpy.full_like(state.step, last - 1))
        finite = job.step.inspect(before, put_batch(recent[-age], job.mesh), job.catalogue)
        bad = [name for name, is_finite in finite.items() if not is_finite]
        epoch, batch = divmod(last - 1, job.epoch)
        what = f"first {bad[0]}" if bad else "first the new parameters"
        if not bad and age > 1 and not stops:  # better steps have followed
            what = "with the parameters of now it would be"
        message += f" (epoch {epoch + 1}, batch {batch + 1}): {what}"
    skip = ', or leave such steps out with train.not_finite = "skip"' if stops else ""
    if stops or found > _MOST_LEFT_OUT:
        begins, rest = argument("init_from"), "in a new run"
        if begins and has_checkpoint(job.folder):
            rest = (
                f"in a new {argument('run')}; checkpoints hold only what was finite, and {begins} "
                f"{job.folder} begins it with the best one of this run"
            )
        raise Error(
            f"{message}. {'That step and the ones after it' if stops else f'{found} steps'} "
            f"changed nothing. Lower train.learning_rate or set train.clip_norm{skip}, {rest}"
        )
    bar.note(f"{message}; left out, {found} so far")
    return found


def _schedule(experiment: Experiment, prepared: Prepared) -> tuple[BatchSource, int, int]:
    """Training batches, steps in all, steps between evaluations."""
    config = experiment.train
    buckets = config.length_buckets
    one = BatchSource(prepared, "train", config.batch_size, buckets=buckets)
    epochs = config.epochs or -(-config.steps // one.batches_per_epoch)
    total = config.steps or epochs * one.batches_per_epoch
    order = config.seed, epochs, config.precision, config.input_timeout
    source = BatchSource(prepared, "train", config.batch_size, *order, buckets)
    return source, total, config.evaluate_every or one.batches_per_epoch


def _log_losses(
    records: Records, state: TrainState, number: int, mesh: jax.sharding.Mesh
) -> TrainState:
    """Write each task's mean loss since the last record, and start the sums anew.

    Where tables are split, the rounds of the slowest exchange of rows are written as well.
    """
    sums = {name: jax.device_get(value) for name, value in state.sums.items()}
    for name, (numerator, weight) in sums.items():
        if weight > 0:  # else no label was seen, or all steps were left out
            records.add(number, "train", name, "loss", float(numerator / weight))
    zeros = {name: np.zeros(value.shape, value.dtype) for name, value in state.sums.items()}
    placed = {n: jax.device_put(z, state.sums[n].sharding) for n, z in zeros.items()}
    if mesh.shape["table"] == 1:
        return state._replace(sums=placed)
    rounds = jax.device_get(state.rounds)
    records.add(number, "exchange", "run", "rounds", float(rounds))
    none = jax.device_put(np.zeros((), np.int32), state.rounds.sharding)
    return state._replace(sums=placed, rounds=none)


def _evaluate(job: _Job, state: TrainState, number: int) -> float:
    """Record all validation metrics; return what selects."""
    started = time.perf_counter()
    parts = job.experiment, job.prepared, job.serving, state.params, state.tables
    found = evaluate(*parts, "validation", full=False)
    for name, metrics in found.tasks.items():
        for which, value in metrics.items():
            job.records.add(number, "validation", name, which, value)
    job.records.add_timing(number, "evaluation seconds", time.perf_counter() - started)
    return job.selection.value(found.tasks)


def is_better(value: float, best: float | None, larger: bool) -> bool:
    """Whether an evaluation is the best so far: the first of equal ones stays, NaN never is.

    >>> is_better(0.5, None, True), is_better(0.5, 0.5, True), is_better(0.4, 0.5, larger=False)
    (True, False, True)
    """
    if not math.isfinite(value):
        return False
    return best is None or (value > best if larger else value < best)


def _judge(meta: dict[str, Any], number: int, value: float, larger: bool, patience: int) -> None:
    """Note the best step, by which checkpoints are kept, and stop early if none has come lately.

    A value that is not finite, such as the AUC of one class, judges nothing and counts as nothing.
    """
    if is_better(value, meta["best"], larger):
        meta |= {"best": value, "best_step": number, "stale": 0}
    elif math.isfinite(value):
        meta["stale"] += 1
    meta["done"] = bool(patience and meta["stale"] >= patience)
