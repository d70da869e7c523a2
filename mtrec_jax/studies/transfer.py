"""Does sharing help? Each task's single-task twin beside the joint model, at equal budget.

A study is a folder:

```
runs/NAME/SEED              run folders: joint, only-TASK, and joint@… of static weights
kept/NAME/SEED.parquet      what each run says of the validation targets
kept/joint/SEED.jsonl       gradient cosines at each evaluation
transfer.json, transfer.png the report
```
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_mapping, a_path, a_whole_number, instance, setting
from mtrec_jax.config import Experiment, main_metric
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.metrics import metric_named
from mtrec_jax.experiments import chosen, overridden
from mtrec_jax.models.model import make_model
from mtrec_jax.models.serve import prepared_serving
from mtrec_jax.result import Result
from mtrec_jax.studies.conflict import Cosines, make_probe
from mtrec_jax.studies.runs import (
    Difference,
    Predicted,
    difference,
    json_rows,
    metrics_by_run,
    predicted,
    trained,
)
from mtrec_jax.train.loop import OnEvaluation
from mtrec_jax.train.records import write_json
from mtrec_jax.train.run import Run, load_best, shared_mesh
from mtrec_jax.types import Array, TrainState

Say = Callable[[str], None]
JOINT = "joint"


@dataclass(frozen=True)
class Transfer:
    """What a study of transfer has found, on validation."""

    tasks: Result  # a row a task: joint and alone (means over seeds), gain, low, high, verdict
    cosines: Result | None  # a row a seed, evaluation and pair of losses
    gates: Result | None  # a row a gate, member, task and expert: mean, deviation over examples
    weights: Result | None  # a row a setting of the weights: the metrics, and the front's
    differences: dict[str, Difference]  # {task: joint against alone}


def transfer(
    experiment: Experiment,
    prepared: Prepared,
    out: str | Path,
    seeds: int = 3,
    weights: Sequence[float] = (),
    twins: Mapping[str, Any] | None = None,
    cosines: bool = True,
    say: Say = lambda text: None,
    show_progress: bool = True,
) -> Transfer:
    """Train the joint model and a twin of each task alone, and say what each task gains by sharing.

    Twins have the features, layers, steps and seeds of the joint model. Every run is judged by its
    best checkpoint; a twin chooses it by its own task, the joint model by `select.metric`. Runs
    that are there already are not trained again.

    Args:
      experiment: the joint model.
      prepared: the data of all runs.
      out: folder of the study.
      seeds: trainings of each, from `train.seed` on.
      weights: factors, such as (0.25, 4): the joint model is also trained by `train.balance =
        "static"` with each task's weight times each of them in turn, and where it is balanced
        otherwise, as declared as well, for a front of static weightings. All have the first seed
        alone, and no interval: neither the chance of training nor that of users is in it.
      twins: settings of the twins, such as {"model.towers": "shared_bottom"} where the joint
        model's towers need several tasks.
      cosines: record gradient cosines at each evaluation; see `conflict.make_probe` for what they
        mean and cost.
      say: is told what happens.
      show_progress: of each training.

    Raises:
      ConfigError: there is one task only, or the data are of another experiment.

    Example:
      ```
      found = mtrec_jax.study_transfer(experiment, prepared, "studies/shop", seeds=3)
      print(found.tasks)
      ```
    """
    instance("experiment", experiment, Experiment, "pass what load_experiment gives")
    instance("prepared", prepared, Prepared, "pass what prepare or open_prepared gives")
    folder, e = a_path("out", out), replace(experiment, tune=None)
    a_whole_number("seeds", seeds, 1, 1000, "1,000", ConfigError)
    if len(e.tasks) < 2:
        raise ConfigError(f"transfer: '{e.name}' has one task; there is nothing to share")
    example = setting("twins", "model.towers", "shared_bottom")
    plans = _plans(e, weights, a_mapping("twins", twins or {}, example))
    for name, plan in plans.items():
        try:
            make_model(plan, prepared.chosen(plan).manifest)
        except ConfigError as error:
            if name.startswith("only-"):
                raise ConfigError(
                    f"transfer: the twin {name} cannot be trained: {error}. Give the twins other "
                    f"towers: {example}"
                ) from error
            raise
    kept: dict[str, list[Predicted]] = {}
    gates = None
    for name, plan in plans.items():
        first = e.train.seed
        for seed in range(first, first + (seeds if "@" not in name else 1)):
            one = replace(plan, train=replace(plan.train, seed=seed))
            say(f"{name}: seed {seed}")
            notes = folder / "kept" / name / f"{seed}.jsonl"
            watch = _recorder(one, prepared, notes) if name == JOINT and cosines else None
            run = trained(one, prepared, folder / "runs" / name / str(seed), watch, show_progress)
            path = notes.with_suffix(".parquet")
            kept.setdefault(name, []).append(predicted(run, "validation", path))
            if name == JOINT and seed == first:
                gates = gate_use(run)
    differences = {task: _gain(e, kept, task) for task in e.tasks}
    found = Transfer(
        tasks=_tasks(e, kept, differences),
        cosines=_read_cosines(folder / "kept" / JOINT) if cosines else None,
        gates=gates,
        weights=_front(e, plans, kept) if weights else None,
        differences=differences,
    )
    write_json(folder / "transfer.json", _plain(e, found))
    return found


def _plans(
    e: Experiment, weights: Sequence[float], twins: Mapping[str, Any]
) -> dict[str, Experiment]:
    """{name: what is trained}."""
    plans = {JOINT: e}
    for task in e.tasks:
        plans[f"only-{task}"] = overridden(chosen(e, tasks=[task]), twins)
    balance = {"train.balance": "static"}
    if weights and e.train.balance.kind != "static":
        plans[f"{JOINT}@static"] = overridden(e, balance)
    for task, declared in e.tasks.items():
        for factor in weights:
            one = balance | {f"tasks.{task}.weight": declared.weight * factor}
            plans[f"{JOINT}@{task}x{factor:g}"] = overridden(e, one)
    return plans


def _recorder(experiment: Experiment, prepared: Prepared, path: Path) -> OnEvaluation:
    """Appends the cosines of each evaluation to a file."""
    made: list[Callable[[TrainState], Cosines]] = []
    path.parent.mkdir(parents=True, exist_ok=True)

    def record(step: int, value: float, state: TrainState) -> None:
        if not made:  # compiled where it is needed: a finished run has no evaluation
            made.append(make_probe(experiment, prepared.chosen(experiment)))
        found = made[0](state)
        with path.open("a", encoding="utf-8") as file:
            for i, first in enumerate(found.names):
                for j, second in enumerate(found.names[i + 1 :], i + 1):
                    line: dict[str, Any] = {"seed": experiment.train.seed, "step": step}
                    line |= {"first": first, "second": second}
                    line |= {"representation": float(found.representation[i, j])}
                    line |= {"parameters": float(found.parameters[i, j])}
                    file.write(json.dumps(line) + "\n")

    return record


def _read_cosines(folder: Path) -> Result | None:
    """What all seeds have recorded; of a step that was done twice the last."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text("utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                one = json.loads(line)
                lines[tuple(one[key] for key in ("seed", "first", "second", "step"))] = one
    rows = [lines[key] for key in sorted(lines)]
    return Result(pa.Table.from_pylist(rows)) if rows else None


def _gain(e: Experiment, kept: Mapping[str, list[Predicted]], task: str) -> Difference:
    pairs = list(zip(kept[JOINT], kept[f"only-{task}"], strict=True))
    metric = main_metric(e, task)
    return difference(pairs, task, e.tasks[task].kind, metric, e.evaluate.ks, e.evaluate.bootstrap)


def _tasks(
    e: Experiment, kept: Mapping[str, list[Predicted]], gains: Mapping[str, Difference]
) -> Result:
    rows = []
    for task, declared in e.tasks.items():
        metric, gain = main_metric(e, task), gains[task]
        means = {}
        for name in (JOINT, f"only-{task}"):
            runs = dict(enumerate(kept[name]))
            values = metrics_by_run(runs, task, declared.kind, e.evaluate.ks).values()
            means[name] = float(np.mean([found[metric] for found in values]))
        deviation = float(np.std(gain.each, ddof=1)) if len(gain.each) > 1 else None
        rows.append(
            {
                "task": task,
                "metric": metric,
                "joint": means[JOINT],
                "alone": means[f"only-{task}"],
                "gain": gain.value,
                "low": gain.low,
                "high": gain.high,
                "over seeds": deviation,
                "verdict": {"better": "helps", "worse": "hurts"}.get(gain.verdict, gain.verdict),
            }
        )
    return Result(pa.Table.from_pylist(rows))


def _front(
    e: Experiment, plans: Mapping[str, Experiment], kept: Mapping[str, list[Predicted]]
) -> Result:
    """The joint model's metrics by static weights, first seed, and the settings that no static one
    beats in all tasks; where the joint model is balanced otherwise, it is a point beside them."""
    names = [name for name in plans if name == JOINT or "@" in name]
    values, signs = [], []
    for task, declared in e.tasks.items():
        metric = main_metric(e, task)
        runs = {name: kept[name][0] for name in names}
        found = metrics_by_run(runs, task, declared.kind, e.evaluate.ks)
        values.append([found[name][metric] for name in names])
        signs.append(1.0 if metric_named(metric).larger_is_better else -1.0)
    table = np.array(values).T  # [settings, tasks]
    static = [plans[name].train.balance.kind == "static" for name in names]
    front = not_dominated(table * np.array(signs), np.array(static))
    rows = []
    for number, name in enumerate(names):
        weights = {f"weight {t}": task.weight for t, task in plans[name].tasks.items()}
        metrics = {
            f"{task} {main_metric(e, task)}": float(value)
            for task, value in zip(e.tasks, table[number], strict=True)
        }
        balance = {"balance": plans[name].train.balance.kind}
        rows.append(
            {**balance, **weights, **metrics, "on the front": "yes" if front[number] else ""}
        )
    return Result(pa.Table.from_pylist(rows))


def not_dominated(values: np.ndarray, by: np.ndarray | None = None) -> np.ndarray:
    """Which of n points [n, T] no other one equals or beats in all T, and beats in one.

    `by` [n] bool: those that can beat; None: all.

    >>> not_dominated(np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 2.0]])).tolist()
    [True, True, False]
    """
    others, own = values[None], values[:, None]
    no_worse = np.all(others >= own, axis=-1)  # [i, j]: j is nowhere worse than i
    beaten = no_worse & np.any(others > own, axis=-1)
    if by is not None:
        beaten &= by
    return np.asarray(~np.any(beaten, axis=1))


def gate_use(run: Run) -> Result | None:
    """What the towers' gates choose on validation: mean and deviation over examples of the weight
    that each task gives to each expert, of each member by itself; None where the towers have no
    gates."""
    mesh = shared_mesh(run.experiment)
    serving = prepared_serving(run.experiment, run.prepared, mesh)
    params, tables, _ = load_best(run, mesh, serving.model)
    vectors = serving.item_vectors(params, tables)
    own, own_vectors = serving.own(params), serving.own(vectors) if len(vectors) else vectors

    config = run.experiment
    source = BatchSource(
        run.prepared, "validation", config.evaluate.batch_size, dtype=config.train.precision
    )
    total: Any = None
    for batch in (source[n] for n in range(len(source))):
        states = serving.states(params, tables, vectors, batch)
        looks = serving.looks(own, states, own_vectors, np.asarray(batch.candidate))
        found = _sums({n: gate for n, gate in looks.items() if "gate" in n}, batch.weight)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    tasks = [name for name, task in config.tasks.items() if task.kind != "retrieval"]
    weight, gates = jax.tree.map(np.asarray, total or (0, {}))
    rows = _gate_rows(float(weight), gates, tasks, config.model.members)
    return Result(pa.Table.from_pylist(rows)) if rows else None


@jax.jit
def _sums(gates: dict[str, jax.Array], weight: Array) -> Any:
    """The sum of weights [B, P], and {gate: weighted sums of its values, and of their squares}."""

    def of(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = jnp.reshape(weight, (*weight.shape, *[1] * (gate.ndim - 2)))
        return jnp.sum(gate * w, axis=(0, 1)), jnp.sum(gate**2 * w, axis=(0, 1))

    return jnp.sum(jnp.asarray(weight)), {name: of(gate) for name, gate in gates.items()}


def _gate_rows(
    weight: float,
    sums: Mapping[str, tuple[np.ndarray, np.ndarray]],
    tasks: Sequence[str],
    members: int,
) -> list[dict[str, Any]]:
    """A row a gate, member, task and expert, of {gate: weighted sums of its values and of their
    squares}: [T, E] or [E], of several members [K, T, E] or [K, E]."""
    rows = []
    for name, (one, two) in sums.items():
        mean = one / weight
        deviation = np.sqrt(np.maximum(two / weight - mean**2, 0))
        if members == 1:
            mean, deviation = mean[None], deviation[None]
        of_tasks = mean.ndim == 3 and mean.shape[1] == len(tasks)
        for place, value in np.ndenumerate(mean):
            task = tasks[place[1]] if of_tasks else ""
            row = {"gate": name, "member": place[0] + 1, "task": task, "expert": place[-1]}
            rows.append(row | {"mean": float(value), "deviation": float(deviation[place])})
    return rows


def _plain(e: Experiment, found: Transfer) -> dict[str, Any]:
    """For JSON."""
    parts: dict[str, Any] = {"name": e.name, "split": "validation"}
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if isinstance(value, Result):
            parts[field.name] = json_rows(value)
    each: Iterable[tuple[str, Difference]] = found.differences.items()
    return parts | {"seeds": {task: list(difference.each) for task, difference in each}}
