"""How long does a training step of a causal Transformer over histories take?

128 users of 200 events, 64 wide, two blocks of one head, dropout .1, Adam: every position predicts
the next event among 512 shared sampled items, or among all 3,416 items of ML-1M. A call is
`STEPS` steps on batches that are in memory. The torch loops have its fused attention with the
causal flag, as it is and compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

STEPS, RATE, TEMPERATURE, DROPOUT = 3, 1e-3, 0.05, 0.1


class Size(NamedTuple):
    """One model; with `negatives` = 0 the softmax is over all items."""

    batch: int = 128
    length: int = 200
    width: int = 64
    blocks: int = 2
    items: int = 3416
    negatives: int = 512


CASES = {
    "quick": (Size(batch=8, length=50, items=500, negatives=64),),
    "step": (Size(), Size(negatives=0)),
}
BLAS: tuple[str, ...] = ()
BOUNDS: tuple[str, ...] = ()

Call = Callable[[], float]  # -> the mean loss of the steps


class Problem(NamedTuple):
    """Item ids 2 .. items + 1 of users' events and of what follows each."""

    case: Size
    events: np.ndarray  # [8, B, L]
    targets: np.ndarray  # [8, B, L]


def problem(case: Size) -> Problem:
    """Walks through the catalogue, of which the next step can be learned."""
    rng = np.random.default_rng(0)
    steps = rng.integers(1, 4, (8, case.batch, case.length + 1))
    start = rng.integers(0, case.items, (8, case.batch, 1))
    walk = ((start + np.cumsum(steps, axis=-1)) % case.items + 2).astype(np.int32)
    return Problem(case, walk[..., :-1], walk[..., 1:])


def check(problem: Problem, answer: float) -> None:
    """A loss that starts near that of a guess."""
    guess = np.log(problem.case.negatives or problem.case.items)
    assert 0 < answer < 3 * guess, (answer, guess)


# --- Ours


def _ours(problem: Problem) -> Call:
    from mtrec_jax.models.model import make_catalogue, make_model
    from mtrec_jax.train.step import make_step

    negatives = problem.case.negatives
    model = {"encoder": {"kind": "transformer", "layers": problem.case.blocks, "heads": 1}}
    negatives_kind = {"count": negatives} if negatives else "all"
    tables = {"tables": {"item": {"update": "dense"}}}
    experiment, manifest = _declared(problem.case, model, {"negatives": negatives_kind}, tables)
    made = make_model(experiment, manifest)

    def step_of(mesh: Any) -> Any:
        return make_step(experiment, made, mesh, 1000)

    return _steps(problem, step_of, make_catalogue)


def _before(problem: Problem) -> Call:
    """The same by the calls that commit 44dfaab had, which knew sampled negatives alone."""
    if not problem.case.negatives:
        raise ValueError("no full softmax in training")
    nn, step = (importlib.import_module(f"mtrec_jax.{name}") for name in ("nn.model", "train.step"))
    model = {"layers": problem.case.blocks, "item_placement": "dense"}
    experiment, manifest = _declared(problem.case, model, {"negatives": problem.case.negatives})
    made = nn.make_model(experiment, manifest)

    def step_of(mesh: Any) -> Any:
        return step.make_step(experiment, manifest, made, mesh, 1000)

    return _steps(problem, step_of, nn.make_catalogue, by_key=True)


def _declared(
    case: Size, model: dict[str, Any], train: dict[str, Any], more: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """An experiment, and what preparation would have learned."""
    from mtrec_jax.experiments import parse_experiment
    from tests import tiny

    experiment = parse_experiment(
        {
            "name": "sequence",
            "data": {
                "user": "user",
                "item": "item",
                "time": "time",
                "history_length": case.length,
            },
            "tasks": {"next": {"kind": "retrieval"}},
            "model": {"width": case.width, "dropout": DROPOUT, "temperature": TEMPERATURE, **model},
            "train": {
                "steps": 1000,
                "batch_size": case.batch,
                "learning_rate": RATE,
                **train,
            },
            **(more or {}),
        }
    )
    known: dict[str, Any] = {
        "items": case.items,
        "trained_items": case.items,
        "history_length": case.length,
    }
    known["positions"] = {"train": case.length}
    return experiment, dataclasses.replace(tiny.manifest(features=False), **known)


def _steps(
    problem: Problem,
    step_of: Callable[[Any], Any],
    make_catalogue: Any,
    by_key: bool = False,
) -> Call:
    """Calls that take `STEPS` steps on batches that are on the device."""
    import jax

    from mtrec_jax.sharding import make_mesh, put_batch, replicate

    with contextlib.suppress(ImportError):  # as commands of the library do, since they do
        from mtrec_jax.machine import keep_freed_memory

        keep_freed_memory()
    mesh, items = make_mesh((1, 1)), problem.case.items
    nothing: dict[str, np.ndarray] = {
        "ids": np.zeros((items + 2, 0), np.int32),
        "numbers": np.zeros((items + 2, 0)),
    }
    counts = np.ones(items, np.int64)
    catalogue = replicate(make_catalogue(nothing, counts, items, 0.0, "float32"), mesh)
    step = step_of(mesh)
    batches = [put_batch(_batch(*both), mesh) for both in zip(*problem[1:], strict=True)]
    seed = jax.random.key(0, impl="rbg") if by_key else 0
    state, done, before = step.init(seed), 0, np.zeros(2)

    def call() -> float:
        nonlocal state, done, before
        for _ in range(STEPS):
            state = step.update(state, batches[done % len(batches)], catalogue)
            done += 1
        sums = np.asarray(jax.device_get(state.sums["next"]))
        (total, weight), before = sums - before, sums
        return float(total / weight)

    return call


def _batch(events: np.ndarray, targets: np.ndarray) -> Any:
    from mtrec_jax.types import Batch

    ones = np.ones(targets.shape, np.float32)
    moments: dict[str, Any] = {"request": {}} if "request" in Batch._fields else {}  # 44dfaab: none
    return Batch(
        context={},
        **moments,
        events={"item": events},
        cutoff=np.tile(np.arange(1, events.shape[1] + 1, dtype=np.int32), (len(events), 1)),
        candidate=targets,
        labels={"next": ones},
        mask={"next": ones},
        user=np.arange(2, len(events) + 2, dtype=np.int32),
        weight=ones,
        row=np.arange(targets.size).reshape(targets.shape),
    )


# --- Theirs


def _torch(compiled: bool) -> Callable[[Problem], Call]:
    def start(problem: Problem) -> Call:
        torch = importlib.import_module("torch")
        torch.manual_seed(0)
        nn, case, functional = torch.nn, problem.case, torch.nn.functional
        width = case.width

        class Block(nn.Module):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
                self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
                self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

            def forward(self, x: Any) -> Any:
                query, key, value = self.into(self.first(x)).chunk(3, dim=-1)
                mixed = functional.scaled_dot_product_attention(
                    query[:, None], key[:, None], value[:, None], is_causal=True
                )[:, 0]
                x = x + functional.dropout(self.out(mixed), DROPOUT)
                hidden = functional.relu(self.up(self.second(x)))
                return x + functional.dropout(self.down(hidden), DROPOUT)

        class Net(nn.Module):  # type: ignore[name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.items = nn.Embedding(case.items + 2, width)
                self.places = nn.Parameter(0.02 * torch.randn(case.length, width))
                self.blocks = nn.ModuleList([Block() for _ in range(case.blocks)])
                self.last = nn.LayerNorm(width)

            def forward(self, events: Any, targets: Any, negatives: Any) -> Any:
                x = self.items(events) * width**0.5 + self.places
                x = functional.dropout(x, DROPOUT)
                for block in self.blocks:
                    x = block(x)
                users = functional.normalize(self.last(x), dim=-1).reshape(-1, width) / TEMPERATURE
                targets = targets.reshape(-1)
                if not case.negatives:
                    items = functional.normalize(self.items.weight[2:], dim=-1)
                    return functional.cross_entropy(users @ items.T, targets - 2)
                own = functional.normalize(self.items(targets), dim=-1)
                others = functional.normalize(self.items(negatives), dim=-1)
                correction = float(np.log(case.negatives / case.items))
                logits = users @ others.T - correction
                logits = logits.masked_fill(negatives[None] == targets[:, None], float("-inf"))
                positive = (users * own).sum(dim=-1, keepdim=True)
                every = torch.cat([positive, logits], dim=1)
                return functional.cross_entropy(every, torch.zeros_like(targets))

        net = Net()
        loss_of = torch.compile(net) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        batches = [
            (torch.from_numpy(events).long(), torch.from_numpy(targets).long())
            for events, targets in zip(*problem[1:], strict=True)
        ]
        done = 0

        def call() -> float:
            nonlocal done
            losses = []
            for _ in range(STEPS):
                negatives = torch.randint(2, case.items + 2, (max(1, case.negatives),))
                loss = loss_of(*batches[done % len(batches)], negatives)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                done += 1
            return float(np.mean(losses))

        return call

    return start


CONTESTANTS: dict[str, Callable[[Problem], Call]] = {
    "mtrec_jax": _ours,
    "torch": _torch(compiled=False),
    "torch compiled": _torch(compiled=True),
}
BEFORE: dict[str, Callable[[Problem], Call]] = {"mtrec_jax": _before}
