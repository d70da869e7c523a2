"""How long does an epoch of a small multi-task model take, and what does balancing add?

The model is an MMoE of 8 experts of 16 and towers of 8 over 33 categories, each 4 wide, and 7
numbers. A call is an epoch of 65,536 generated rows from opening the Parquet file on: reading,
shuffling, every step. torch-rechub has its own loader and trainer; the torch loops have all rows as
tensors before the first call, and only shuffle them. The second set has four tasks and one
contestant a balancing method: what each costs beside the static weighting. Its methods with
"parameters" take gradients at the shared parameters, the others at the shared representation.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.input import NOMINAL, NUMBERS, _rows, _write

EXPERTS, HIDDEN, TOWER, WIDTH = 8, 16, 8, 4
RATE = 1e-3


class Size(NamedTuple):
    """Batches of a call."""

    batch: int
    rows: int = 65_536
    tasks: int = 2
    balances: bool = False  # the contestants are balancing methods


CASES = {
    "quick": (Size(1024, 8_192),),
    "step": (Size(1024), Size(8192)),
    "balance": (Size(1024, tasks=4, balances=True), Size(8192, tasks=4, balances=True)),
}
BLAS: tuple[str, ...] = ()
BOUNDS: tuple[str, ...] = ()

Call = Callable[[], list[float]]  # -> the mean loss of each task over the epoch


class Problem(NamedTuple):
    """A folder with the rows in `train.parquet`."""

    case: Size
    prepared: Any


def problem(case: Size) -> Problem:
    """Rows whose labels numbers and categories tell to some degree."""
    folder = Path(tempfile.mkdtemp(prefix="multitask-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make = functools.partial(_labelled, case.tasks)
    written = _write(folder / "prepared", make, case.rows)
    ids = written.manifest.request_ids
    sizes = [52] * (NOMINAL - 2) + [1002, 3002]  # padding and unknown among them
    known = {
        "request_ids": tuple(map(lambda f, n: dataclasses.replace(f, size=n), ids, sizes)),
        "items": 0,
        "trained_items": 0,
    }
    manifest = dataclasses.replace(written.manifest, **known)
    return Problem(case, dataclasses.replace(written, manifest=manifest))


def _labelled(tasks: int, rng: np.random.Generator, n: int) -> dict[str, np.ndarray]:
    found = _rows(rng, n)
    numbers = np.stack([found[f"request_x{i}"] for i in range(NUMBERS)], axis=1)
    even = np.stack([found[f"request_{i}"] % 2 for i in range(8)], axis=1) - 0.5
    for t in range(2):
        found.pop(f"label_{'ab'[t]}")
    for t in range(tasks):
        score = numbers[:, t] + numbers[:, (t + 1) % NUMBERS] + 2 * even[:, t] + 2 * even[:, t + 1]
        label = rng.random(n) < 1 / (1 + np.exp(-score))
        found[f"label_t{t}"] = label.astype(np.float32)[:, None]
    return found


def check(problem: Problem, answer: list[float]) -> None:
    """In its first epoch each task gets ahead of a coin's 0.693; in eight steps of 8,192, from what
    each library begins with, it is at least not far above."""
    assert len(answer) == problem.case.tasks
    assert np.isfinite(answer).all(), answer
    assert max(answer) < (0.69 if problem.case.rows >= 50 * problem.case.batch else 0.8), answer


def contestants(case: Size) -> list[str]:
    """Who takes part."""
    return [name for name in CONTESTANTS if name.startswith("mtrec_jax ") == case.balances]


# --- Ours


def _ours(balance: Any) -> Callable[[Problem], Call]:
    def start(problem: Problem) -> Call:
        import jax

        from mtrec_jax.data.pipeline import BatchSource, training_batches
        from mtrec_jax.models.model import make_catalogue, make_model
        from mtrec_jax.sharding import make_mesh, put_batch, replicate
        from mtrec_jax.train.loop import steps_in_flight
        from mtrec_jax.train.step import make_step

        case, prepared = problem.case, problem.prepared
        experiment = _experiment(case, balance)
        mesh, model = make_mesh((1, 1)), make_model(experiment, prepared.manifest)
        nothing: dict[str, np.ndarray] = {
            "ids": np.zeros((2, 0), np.int32),
            "numbers": np.zeros((2, 0)),
        }
        items = make_catalogue(nothing, np.zeros(0), 0, 0.0, "float32")
        catalogue = replicate(items, mesh)
        step = make_step(experiment, model, mesh, 1000)
        state, epoch, known = step.init(0), 0, np.zeros((case.tasks, 2))

        def call() -> list[float]:
            nonlocal state, epoch, known
            source = BatchSource(prepared, "train", case.batch, seed=epoch)
            batches, epoch = training_batches(source), epoch + 1
            for number in range(1, len(source) + 1):
                state = step.update(state, put_batch(next(batches), mesh), catalogue)
                if number % steps_in_flight() == 0 or number == len(source):
                    assert not int(jax.device_get(state.bad)[0])
                if number % 50 == 0 or number == len(source):  # as often as it is recorded
                    sums = jax.device_get(state.sums)
            before, known = known, np.array([sums[name] for name in experiment.tasks])
            loss, weight = (known - before).T
            return [float(mean) for mean in loss / weight]

        return call

    return start


def _experiment(case: Size, balance: Any) -> Any:
    from mtrec_jax.experiments import parse_experiment

    return parse_experiment(
        {
            "name": "multitask",
            "data": {"history_length": 0},
            "split": {"kind": "random"},
            "features": {str(i): {"on": "request"} for i in range(NOMINAL)}
            | {f"x{i}": {"on": "request", "kind": "numeric"} for i in range(NUMBERS)},
            "tasks": {f"t{t}": {"kind": "binary"} for t in range(case.tasks)},
            "model": {
                "width": WIDTH,
                "dropout": 0.0,
                "fusion": "none",
                "towers": {
                    "kind": "mmoe",
                    "experts": EXPERTS,
                    "expert_hidden": [HIDDEN],
                    "tower_hidden": [TOWER],
                },
            },
            "train": {
                "steps": 1000,
                "batch_size": case.batch,
                "learning_rate": RATE,
                "balance": balance,
                # The same step in parts, whose work space stays below what malloc maps anew each
                # time; methods that need single gradients cannot, and are compared without.
                "accumulate": 1 if case.balances else max(1, case.batch // 2048),
            },
        }
    )


# --- Theirs


def _columns(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Categories [n, 33], numbers [n, 7], labels [n, T], read from the file."""
    import pyarrow.parquet as pq

    table = pq.read_table(problem.prepared.folder / "train.parquet")

    def columns(names: list[str]) -> np.ndarray:
        parts = (table[name].combine_chunks() for name in names)
        return np.stack([(p.flatten() if p.type.num_fields else p).to_numpy() for p in parts], 1)

    tasks = [f"label_t{t}" for t in range(problem.case.tasks)]
    ids = columns([f"request_{i}" for i in range(NOMINAL)])
    return ids, columns([f"request_x{i}" for i in range(NUMBERS)]), columns(tasks)


def _rechub(problem: Problem) -> Call:
    """torch-rechub's model, loader and trainer, as its example of census-income has them."""
    torch = importlib.import_module("torch")
    features = importlib.import_module("torch_rechub.basic.features")
    models = importlib.import_module("torch_rechub.models.multi_task")
    trainers = importlib.import_module("torch_rechub.trainers")
    data = importlib.import_module("torch_rechub.utils.data")
    tasks, sizes = problem.case.tasks, _columns(problem)[0].max(axis=0) + 1
    inputs = [features.SparseFeature(f"c{i}", int(n), WIDTH) for i, n in enumerate(sizes)]
    inputs += [features.DenseFeature(f"x{i}") for i in range(NUMBERS)]
    kinds, towers = ["classification"] * tasks, [{"dims": [TOWER]}] * tasks
    model = models.MMOE(inputs, kinds, EXPERTS, {"dims": [HIDDEN]}, towers)
    torch.manual_seed(0)
    trainer = trainers.MTLTrainer(model, kinds, optimizer_params={"lr": RATE}, n_epoch=1)

    def call() -> list[float]:
        ids, numbers, labels = _columns(problem)
        columns = {f"c{i}": ids[:, i] for i in range(NOMINAL)}
        columns |= {f"x{i}": numbers[:, i] for i in range(NUMBERS)}
        made = data.DataGenerator(columns, labels)
        few = {name: values[:8] for name, values in columns.items()}
        rest = {"x_val": few, "y_val": labels[:8], "x_test": few, "y_test": labels[:8]}
        loader = made.generate_dataloader(**rest, batch_size=problem.case.batch)[0]
        with contextlib.ExitStack() as quiet:
            nobody = quiet.enter_context(Path(os.devnull).open("w"))
            quiet.enter_context(contextlib.redirect_stdout(nobody))
            quiet.enter_context(contextlib.redirect_stderr(nobody))
            return [float(loss) for loss in trainer.train_one_epoch(loader)]

    return call


def _torch(one_table: bool) -> Callable[[Problem], Call]:
    """A loop over tensors that are in memory; a table a category, or one for all of them."""

    def start(problem: Problem) -> Call:
        torch = importlib.import_module("torch")
        torch.manual_seed(0)
        ids, numbers, labels = map(torch.from_numpy, _columns(problem))
        ids, sizes = ids.long(), [int(n) + 1 for n in ids.max(dim=0).values]
        if one_table:
            ids += torch.tensor(np.cumsum([0, *sizes[:-1]]))
            sizes = [sum(sizes)]
        nn, tasks, inputs = torch.nn, problem.case.tasks, NOMINAL * WIDTH + NUMBERS
        tables = nn.ModuleList([nn.Embedding(n, WIDTH) for n in sizes])
        experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU()) for _ in range(EXPERTS)]
        )
        gates = nn.ModuleList([nn.Linear(inputs, EXPERTS) for _ in range(tasks)])
        towers = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(HIDDEN, TOWER), nn.ReLU(), nn.Linear(TOWER, 1))
                for _ in range(tasks)
            ]
        )
        every = nn.ModuleList([tables, experts, gates, towers])
        optimizer = torch.optim.Adam(every.parameters(), lr=RATE)
        lossy = nn.functional.binary_cross_entropy_with_logits

        def step(rows: Any) -> Any:
            own, label = ids[rows], labels[rows]
            if one_table:
                vectors = [tables[0](own).flatten(1)]
            else:
                vectors = [table(own[:, i]) for i, table in enumerate(tables)]
            x = torch.cat([*vectors, numbers[rows]], dim=1)
            seen = torch.stack([expert(x) for expert in experts], dim=1)
            losses = []
            for t in range(tasks):
                share = torch.softmax(gates[t](x), dim=1)[:, :, None]
                logit = towers[t]((share * seen).sum(dim=1))[:, 0]
                losses.append(lossy(logit, label[:, t]))
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            return torch.stack(losses).detach()

        def call() -> list[float]:
            order = torch.randperm(len(ids))
            found = [step(rows) for rows in order.split(problem.case.batch)]
            mean: list[float] = torch.stack(found).mean(dim=0).tolist()
            return mean

        return call

    return start


_AT_PARAMETERS = ("gradnorm", "pcgrad", "cagrad", "dbmtl")
CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _ours("static"),
    "torch-rechub": _rechub,
    "torch loop": _torch(one_table=False),
    "torch loop, one table": _torch(one_table=True),
    "mtrec_jax static": _ours("static"),
    "mtrec_jax uncertainty": _ours("uncertainty"),
    "mtrec_jax dwa": _ours("dwa"),
    "mtrec_jax famo": _ours("famo"),
    **{f"mtrec_jax {kind}": _ours(kind) for kind in _AT_PARAMETERS},
    **{
        f"mtrec_jax {kind}, parameters": _ours({"kind": kind, "at": "parameters"})
        for kind in _AT_PARAMETERS
    },
}
