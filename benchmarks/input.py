"""How fast do examples get from Parquet to the device, and does training ever wait for them?

Rates of generated folders, in batches of 4,096: "first pass" decodes and keeps a split that fits
into memory, "in memory" are its further passes, "streamed" is a split that does not fit. The files
themselves may be in the page cache. Training: steps a second over those of the same step on one
repeated batch, in interleaved rounds from the first step of a run on, for the public data that
`mtrec data` has put into ./data.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

BATCH = 4096
HISTORY = 50
NOMINAL, NUMBERS = 33, 7  # the columns of census-income
STEPS = 40  # a round
ROUNDS = 24  # of each kind: for census-income more than half of its whole run, decoding included
PUBLIC = ("census-income", "ml-1m")


def answer(quick: bool) -> list[dict[str, Any]]:
    """A row a shape and kind of pass, and one a public data set."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for make, unit, count in (
            (_rows, "rows/s", 2_000_000),
            (_histories, "histories/s", 400_000),
        ):
            prepared = _write(Path(folder) / make.__name__, make, count // 10 if quick else count)
            rates = _passes(prepared, rounds=2 if quick else 5)
            results += [_result(f"{unit} {name}", found) for name, found in rates.items()]
        for name in PUBLIC:
            if (Path("data") / name).is_dir():
                found = _training(name, Path(folder) / name, rounds=2 if quick else ROUNDS)
                results += [_result(f"{name} {kind}", ratios) for kind, ratios in found.items()]
    return results


def _result(task: str, values: list[float]) -> dict[str, Any]:
    median = statistics.median(values)
    figures = {"median": median, "lowest": min(values), "highest": max(values)}
    return {"task": task} | {k: round(v) if median > 100 else v for k, v in figures.items()}


def _rows(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """Rows of 40 columns, most values frequent, most numbers zero; two labels."""
    sizes = np.concatenate([rng.integers(3, 50, NOMINAL - 2), [1000, 3000]])
    numbers = np.where(rng.random((n, NUMBERS)) < 0.6, 0, rng.normal(size=(n, NUMBERS)))
    nominal = np.minimum(rng.zipf(1.5, (n, NOMINAL)), sizes)
    return {
        "user": np.zeros(n, np.int32),
        **{f"request_{i}": ids for i, ids in enumerate(nominal.astype(np.int32).T + 1)},
        **{f"request_x{i}": x for i, x in enumerate(numbers.astype(np.float32).T)},
        "cutoff": np.zeros((n, 1), np.int32),
        "candidate": np.zeros((n, 1), np.int32),
        **{f"label_{t}": (rng.random((n, 1)) < 0.1).astype(np.float32) for t in "ab"},
        "row": rng.integers(0, 1 << 24, (n, 1)),
    }


def _histories(rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    """One target each after 50 events with an item and a behaviour; a retrieval and a label."""
    return {
        "user": rng.integers(2, 100_000, n).astype(np.int32),
        **{f"context_{i}": rng.integers(2, 9, n).astype(np.int32) for i in range(3)},
        "event_item": np.minimum(rng.zipf(1.3, (n, HISTORY)), 30_000).astype(np.int32) + 1,
        "event_behaviour": rng.integers(2, 6, (n, HISTORY)).astype(np.int32),
        "cutoff": np.full((n, 1), HISTORY, np.int32),
        "candidate": np.minimum(rng.zipf(1.3, (n, 1)), 30_000).astype(np.int32) + 1,
        "label_next": np.ones((n, 1), np.float32),
        "label_like": (rng.random((n, 1)) < 0.1).astype(np.float32),
        "row": rng.integers(0, 1 << 24, (n, 1)),
    }


def _write(
    folder: Path, make: Callable[[np.random.Generator, int], dict[str, np.ndarray]], count: int
) -> Any:
    from mtrec_jax.data.dataset import BLOCK, IdField, NumberField, Prepared, TaskField
    from mtrec_jax.data.examples import write_examples
    from tests import tiny

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, count, BLOCK):
            yield make(np.random.default_rng(start), min(BLOCK, count - start))

    folder.mkdir()
    write_examples(folder / "train.parquet", blocks())
    names = make(np.random.default_rng(0), 1)
    fields: dict[str, Any] = {
        "request_ids": _ids(NOMINAL) if "request_0" in names else (),
        "request_numbers": tuple(
            NumberField(name=f"x{i}", mean=0, std=1) for i in range(NUMBERS) if "request_0" in names
        ),
        "context_ids": _ids(3) if "context_0" in names else (),
        "history": (IdField(name="behaviour", size=9, slots=1),) if "event_item" in names else (),
    }
    manifest = dataclasses.replace(
        tiny.manifest(features=False),
        history_length=HISTORY if "event_item" in names else 0,
        tasks={n.removeprefix("label_"): TaskField() for n in names if n.startswith("label_")},
        **fields,
    )
    return Prepared(folder, manifest)


def _ids(count: int) -> tuple[Any, ...]:
    from mtrec_jax.data.dataset import IdField

    return tuple(IdField(name=str(i), size=4000, slots=1) for i in range(count))


def _passes(prepared: Any, rounds: int) -> dict[str, list[float]]:
    """Examples a second from Parquet to arrays of the device, as the trainer puts them there."""
    import jax

    from mtrec_jax.data import pipeline
    from mtrec_jax.sharding import make_mesh, put_batch

    mesh = make_mesh()
    rates: dict[str, list[float]] = {"first pass": [], "in memory": [], "streamed": []}

    def epoch(batches: Any, count: int) -> float:
        started, last = time.perf_counter(), None
        for number in range(count):
            placed = put_batch(next(batches), mesh)
            if number % 4 == 0:
                last = jax.block_until_ready(placed)
        jax.block_until_ready((placed, last))
        return count * BATCH / (time.perf_counter() - started)

    kinds = (pipeline.CACHE_BYTES, ("first pass", "in memory")), (0, ("streamed",))
    for number in range(rounds + 1):
        for cache, names in kinds:
            with mock.patch.object(pipeline, "CACHE_BYTES", cache):
                source = pipeline.BatchSource(prepared, "train", BATCH, seed=number, epochs=2)
            batches = pipeline.training_batches(source)
            for name in names:
                rate = epoch(batches, source.batches_per_epoch)
                rates[name] += [rate] if number else []  # the first round warms up
    return rates


def _training(name: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Rate of training over that of its step on one batch: by the clock, and by processor time."""
    import jax

    from mtrec_jax.data.pipeline import BatchSource, training_batches
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.models.model import make_model
    from mtrec_jax.models.serve import load_catalogue
    from mtrec_jax.sharding import make_mesh, put_batch, replicate
    from mtrec_jax.train.loop import steps_in_flight
    from mtrec_jax.train.step import make_step

    experiment = load_experiment(name)
    prepared = prepare(experiment, Path("data") / name, folder)
    mesh, model = make_mesh(), make_model(experiment, prepared.manifest)
    catalogue = replicate(load_catalogue(prepared, experiment), mesh)
    total = (2 * rounds + 2) * STEPS
    step = make_step(experiment, model, mesh, total)
    batches = training_batches(
        BatchSource(prepared, "train", experiment.train.batch_size, seed=0, epochs=total)
    )
    repeated = put_batch(next(batches), mesh)
    state = step.init(0)

    def run(draw: Callable[[], Any]) -> tuple[float, float]:
        nonlocal state
        started = time.perf_counter(), time.process_time()
        for number in range(STEPS):
            state = step.update(state, draw(), catalogue)
            if number % steps_in_flight() == 0:
                jax.block_until_ready(state.step)
        jax.block_until_ready(state)
        return time.perf_counter() - started[0], time.process_time() - started[1]

    ratios: dict[str, list[float]] = {"rate": [], "processor time": []}
    draws = [lambda: repeated, lambda: put_batch(next(batches), mesh)]
    for number in range(rounds + 1):
        order = (0, 1) if number % 2 else (1, 0)  # neither is always the first of its round
        taken = {which: run(draws[which]) for which in order}
        for kind, alone, real in zip(ratios, taken[0], taken[1], strict=True):
            ratios[kind] += [alone / real] if number else []
    return ratios
