"""Search over declared ranges: the defaults are trial 0, and hopeless trials end early.

A study is a folder:

```
study.db       the trials, Optuna's own SQLite file: any dashboard of it can read them
trials/NNNN/   run folders; the checkpoints of all but the best trial are removed
best.toml      the configuration of the best trial: mtrec train best.toml
```

What the next trial is, is a function of the trials that are finished and of the seed alone. So a
study that was killed draws what it would have drawn, and no trial twice: a trial that was under way
is marked as failed in Optuna's list, its work is taken up by a new entry with the same parameters,
and its run continues from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import pyarrow as pa

from mtrec_jax.arguments import a_path, a_whole_number, argument, instance
from mtrec_jax.config import Experiment, selection, to_dict, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import CheckpointError, ConfigError, DataError, Error, nearest
from mtrec_jax.experiments import overridden
from mtrec_jax.result import Result
from mtrec_jax.studies.runs import trained
from mtrec_jax.train.loop import is_better
from mtrec_jax.train.records import read_records, write_json
from mtrec_jax.train.stopping import Stopped

STARTUP = 5  # finished trials before any is ended early
_DRAWS = 50  # attempts at parameters that no trial has had
_BELONG = ("model", "train", "tables")  # sections that may be searched
_NUMBER = re.compile(r"\s*([^\s.][^\s]*?)\.\.([^\s:]+?)(:log)?\s*")

Say = Callable[[str], None]
# (values of the keys, run folder, value reported by each evaluation so far) -> value of the trial
Objective = Callable[[dict[str, Any], Path, Callable[[list[float]], None]], float]


class Range(NamedTuple):
    """What a key may be: one of `values`, or a number between two bounds."""

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False  # drawn evenly on a logarithmic scale
    whole: bool = False


@dataclass(frozen=True)
class Tuned:
    """What a search has found."""

    trials: Result  # a row a trial: number, value, state, reason, and each key
    value: float  # of the best trial, on validation
    settings: dict[str, Any]  # of the best trial, {} for the defaults
    experiment: Experiment  # with these settings
    run: Path  # its run folder


def tune(
    experiment: Experiment,
    prepared: Prepared,
    out: str | Path,
    ranges: Mapping[str, Any] | None = None,
    trials: int | None = None,
    seed: int = 0,
    say: Say = lambda text: None,
) -> Tuned:
    """Search the ranges for the best value of the metric that selects, on validation.

    Optuna's tree-structured Parzen estimator draws (Bergstra et al. 2011, "Algorithms for
    hyper-parameter optimization", NeurIPS). A trial is ended when its best value is worse than the
    median of the finished ones after as many evaluations. A combination that cannot work, or whose
    loss is not finite, counts as a bad trial; so does a value that is NaN or infinite.

    Args:
      experiment: the defaults, which are trial 0.
      prepared: the data of all trials.
      out: folder of the study. One that is there is continued.
      ranges: {key: "low..high", "low..high:log" or a list of values}; None: those of `[tune]`.
        Keys of whole numbers are drawn as such.
      trials: how many in all, those that are finished among them; None: as `[tune]` says.
      seed: of the draws.
      say: is told what happens.

    Raises:
      ConfigError: a range is none or does not hold the default; the study was begun with other
        ranges, data or defaults; or Optuna is not installed.
      Stopped: a signal arrived; the same call continues.

    Example:
      ```
      ranges = {"train.learning_rate": "1e-4..1e-2:log", "model.towers": ["mmoe", "ple"]}
      found = mtrec_jax.study_tune(experiment, prepared, "studies/shop", ranges, trials=20)
      ```
    """
    instance("experiment", experiment, Experiment, "pass what load_experiment gives")
    instance("prepared", prepared, Prepared, "pass what prepare or open_prepared gives")
    folder, declared = a_path("out", out), experiment.tune
    ranges = (declared.ranges if declared else {}) if ranges is None else ranges
    trials = (declared.trials if declared else 20) if trials is None else trials
    a_whole_number("trials", trials, 1, 10**6, "1,000,000", ConfigError)
    e = replace(experiment, tune=None)
    if not e.split.validates:
        raise ConfigError("tune: there are no validation events to choose by; set split.validation")
    read = read_ranges(ranges)
    defaults = default_values(e, read)
    read = {key: as_key(key, each, defaults[key]) for key, each in read.items()}
    check_values(e, read)
    chosen = prepared.chosen(e)
    by = selection(e)

    def objective(
        values: dict[str, Any], run: Path, report: Callable[[list[float]], None]
    ) -> float:
        one = overridden(e, values)
        trained(one, prepared, run, lambda *_: report(seen(run)), show_progress=False)
        report(seen(run))
        return best_of(seen(run), by.larger)

    def seen(run: Path) -> list[float]:
        return selected_values(run, e)

    begun = {"configuration": to_toml(e), "data": chosen.manifest.fingerprint, "seed": seed}
    found = search(read, defaults, objective, by.larger, folder, trials, seed, begun, say)
    best = found["best"]
    settings = {key: value for key, value in best["values"].items() if value != defaults[key]}
    tuned = overridden(e, settings)
    partial = folder / "best.toml.partial"
    partial.write_text(to_toml(tuned), encoding="utf-8")
    partial.replace(folder / "best.toml")
    run = folder / "trials" / best["run"]
    return Tuned(_table(found["trials"]), best["value"], settings, tuned, run)


def read_ranges(declared: Mapping[str, Any]) -> dict[str, Range]:
    """Ranges from what a configuration or a command says.

    Raises:
      ConfigError: one of them is none, or its key is not of the model or its training.

    >>> read_ranges({"train.learning_rate": "1e-4..1e-2:log"})["train.learning_rate"].log
    True
    >>> read_ranges({"model.width": "8..64"})["model.width"].whole
    True
    >>> read_ranges({"model.towers": "mmoe, ple"})["model.towers"].values
    ('mmoe', 'ple')
    """
    if not declared:
        raise ConfigError(
            f"tune: nothing to search; name a range, {argument('ranges')} "
            "train.learning_rate=1e-4..1e-2:log, or declare [tune.ranges]"
        )
    found = {}
    for key, value in declared.items():
        section, _, rest = key.partition(".")
        if section not in _BELONG and not (section == "tasks" and rest.endswith(".weight")):
            raise ConfigError(
                f"tune: {key} is not of the model or its training; keys of "
                f"{', '.join(_BELONG)}, and tasks.NAME.weight, can be searched"
            )
        found[key] = _numbers(key, value) if isinstance(value, str) else _categories(key, value)
    return found


def _numbers(key: str, text: str) -> Range:
    match = _NUMBER.fullmatch(text)
    if not match and "," in text:
        return _categories(key, [_plain(part.strip()) for part in text.split(",")])
    try:
        low, high = (float(match[n]) for n in (1, 2)) if match else (math.nan, math.nan)
    except ValueError:
        low = high = math.nan
    if match and low >= high:
        raise ConfigError(f"tune: {key} = {text!r}: the first bound has to be below the second")
    if not match or not low < high or not math.isfinite(high) or (match[3] and low <= 0):
        raise ConfigError(
            f"tune: {key} = {text!r} is no range; write 8..64, 0..0.5, 1e-4..1e-2:log (above 0) "
            'or a list of values, ["mmoe", "ple"]'
        )
    whole = all(re.fullmatch(r"-?\d[\d_]*", match[n]) for n in (1, 2))
    return Range((), low, high, bool(match[3]), whole)


def _categories(key: str, values: Any) -> Range:
    listed = tuple(values) if isinstance(values, (list, tuple)) else ()
    if len(listed) < 2:
        raise ConfigError(f"tune: {key} = {values!r}: a list of two values or more is needed")
    return Range(listed)


def _plain(text: str) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def default_values(experiment: Experiment, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """What the experiment says of each key that is searched; of a choice its kind.

    Raises:
      ConfigError: there is no such key, or its range does not hold what the experiment says.
    """
    found = {}
    for key, each in ranges.items():
        task = key.removeprefix("tasks.").removesuffix(".weight")
        if key.startswith("tasks.") and task not in experiment.tasks:
            raise ConfigError(
                f"tune: {key}: there is no task '{task}'.{nearest(task, experiment.tasks)} "
                f"The tasks are {', '.join(experiment.tasks)}"
            )
        there: Any = to_dict(experiment)
        for part in key.split("."):
            there = there.get(part) if isinstance(there, dict) else None
        if there is None:
            overridden(experiment, {key: each.values[0] if each.values else each.low})
            raise ConfigError(
                f"tune: {key} is not set, and the defaults are the first trial; set it to a value "
                f"of its range: {argument('overrides')} {key}=…"
            )
        if isinstance(there, dict) and "kind" in there and there not in each.values:
            there = there["kind"]
        inside = there in each.values if each.values else each.low <= there <= each.high
        if not inside:
            raise ConfigError(
                f"tune: {key} = {there!r}, the first trial, is outside of its range; widen the "
                f"range, or set it: {argument('overrides')} {key}=…"
            )
        found[key] = there
    return found


def as_key(key: str, each: Range, default: Any) -> Range:
    """The range as the key takes it: whole numbers, or any between the bounds.

    Raises:
      ConfigError: the key takes whole numbers, and the bounds are none.

    >>> as_key("model.dropout", Range((), 0.0, 1.0, False, True), 0.1).whole
    False
    """
    if each.values or not isinstance(default, int):
        return each._replace(whole=False)
    if not each.whole:
        raise ConfigError(f"tune: {key} takes whole numbers; write its bounds as such: 8..64")
    return each


def check_values(experiment: Experiment, ranges: Mapping[str, Range]) -> None:
    """Every value of a list, and the ends of the others, beside the defaults of all else.

    A value that goes with one of another key alone, such as heads that divide no other width, is
    none to refuse; what then does not fit is a bad trial.

    Raises:
      ConfigError: the configuration does not take one of them, beside whatever value of a key.
    """

    def refused(values: dict[str, Any]) -> ConfigError | None:
        try:
            overridden(experiment, values)
        except ConfigError as error:
            return error
        return None

    for key, each in ranges.items():
        beside = [{other: v} for other in ranges if other != key for v in _ends(ranges[other])]
        for value in _ends(each):
            error = refused({key: value})
            if error and all(refused({key: value} | other) for other in beside):
                raise ConfigError(f"tune: {key} cannot be {value!r}: {error}") from error


def _ends(each: Range) -> list[Any]:
    """The values of a list; of numbers the least and the largest that may be drawn."""
    if each.values:
        return list(each.values)
    if each.whole:
        return [int(each.low), int(each.high)]
    inside = (each.high - each.low) / 2**20  # a bound itself is hardly ever drawn
    return [each.low + inside, each.high - inside]


def selected_values(run: Path, experiment: Experiment) -> list[float]:
    """The value that selects, of each evaluation that a run has recorded."""
    by, steps = selection(experiment), dict[int, dict[str, dict[str, float]]]()
    path = run / "metrics.jsonl"
    for record in read_records(path) if path.exists() else []:
        if record["split"] == "validation":
            value = math.nan if record["value"] is None else record["value"]
            of_step = steps.setdefault(record["step"], {})
            of_step.setdefault(record["task"], {})[record["metric"]] = value
    return [by.value(steps[step]) for step in sorted(steps)]


def best_of(values: Iterable[float], larger: bool) -> float:
    """The best finite value; nan where there is none.

    >>> best_of([0.5, float("inf"), 0.7, float("nan")], larger=True)
    0.7
    """
    finite = [value for value in values if math.isfinite(value)]
    return (max(finite) if larger else min(finite)) if finite else math.nan


def search(
    ranges: Mapping[str, Range],
    defaults: Mapping[str, Any],
    objective: Objective,
    larger: bool,
    folder: Path,
    trials: int,
    seed: int,
    begun: Mapping[str, Any],
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Run trials until `trials` are finished, in a folder that may have some already.

    Args:
      ranges: what is searched.
      defaults: values of trial 0.
      objective: makes a trial; `report(values so far)` ends it early by an exception of Optuna's.
      larger: is better.
      folder: of the study.
      trials: how many in all.
      seed: of the draws.
      begun: what the study depends on besides the ranges; another one is refused.
      say: is told of each trial.

    Returns:
      {"trials": [a dict each], "best": the best of them}.

    Raises:
      ConfigError: another study is there, another process works on it, or no trial has a value.
    """
    optuna = _optuna()
    declared = {"ranges": {key: each._asdict() for key, each in ranges.items()}, **begun}
    with _sole(folder), _opened(optuna, folder, larger, declared) as study:
        _repair(optuna, study, say)
        distributions = {key: _distribution(optuna, each) for key, each in ranges.items()}
        while len(done := finished(study)) < trials:
            if not study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
                params = _encoded(defaults, ranges) if not done else None
                params = params or draw(done, distributions, larger, seed)
                if params is None:
                    say(f"all that the ranges hold has been tried: {len(done)} trials")
                    break
                study.enqueue_trial(params, user_attrs={"run": f"{len(done):04d}"})
            _run_trial(optuna, study, distributions, ranges, objective, folder, say)
            _keep_best(study, folder, larger)
        rows = [_row(trial, ranges) for trial in finished(study)]
    known = [row for row in rows if row["value"] is not None]
    if not known:
        raise ConfigError(f"tune: none of the {len(rows)} trials in {folder} has a value")
    best = known[0]
    for row in known[1:]:
        if is_better(row["value"], best["value"], larger):
            best = row
    write_json(folder / "tune.json", {"best": best, "trials": rows})
    return {"trials": rows, "best": best}


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError(
            "searches need Optuna, which is not installed: pip install 'mtrec_jax[tune]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _sole(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which a process that dies gives back."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock", blocking=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ConfigError(
            f"another process works on the study {folder}; wait for it, or pass another "
            f"{argument('out')}"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _opened(optuna: Any, folder: Path, larger: bool, declared: Mapping[str, Any]) -> Iterator[Any]:
    """The study in a folder, if it is the declared one."""
    text = json.dumps(declared, sort_keys=True)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder.resolve() / 'study.db'}")
    try:
        study = optuna.create_study(
            storage=storage,
            study_name="tune",
            direction="maximize" if larger else "minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=2),
            load_if_exists=True,
        )
        there = study.user_attrs.get("declared")
        if there is None:
            study.set_user_attr("declared", text)
        elif there != text:
            old = json.loads(there)
            differ = [
                f"  {key}: {old.get(key)!r} there, {declared.get(key)!r} here"
                for key in sorted({*old, *declared} - {"configuration"})
                if old.get(key) != json.loads(text).get(key)
            ] or ["  the defaults (the configuration)"]
            raise ConfigError(
                f"{folder} is a study of something else:\n" + "\n".join(differ) + "\nTrials of "
                f"other ranges do not compare: pass another {argument('out')}, or what it was "
                "begun with"
            )
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _repair(optuna: Any, study: Any, say: Say) -> None:
    """Entries that a killed process left behind fail; what they were about is done again."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
        params, run = trial.system_attrs.get("fixed_params"), trial.user_attrs.get("run")
        if params and run:
            study.enqueue_trial(params, user_attrs={"run": run})
            say(f"trial {int(run)} was interrupted; it goes on")


def finished(study: Any) -> list[Any]:
    """The trials with an outcome, in their order: completed, or ended for being bad."""
    names = ("COMPLETE", "PRUNED")
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name in names]
    return sorted(trials, key=lambda trial: trial.number)


def draw(
    done: list[Any], distributions: Mapping[str, Any], larger: bool, seed: int
) -> dict[str, Any] | None:
    """The parameters that follow on finished trials: those that no trial has had; None without.

    The sampler is made anew with a seed of `seed` and their number, so that neither a killed
    process nor a resumed one changes what is drawn.
    """
    optuna = _optuna()
    had = {json.dumps(trial.params, sort_keys=True) for trial in done}
    for attempt in range(_DRAWS):
        state = np.random.SeedSequence([seed, len(done), attempt]).generate_state(1)
        sampler = optuna.samplers.TPESampler(seed=int(state[0]))
        direction = "maximize" if larger else "minimize"
        memory = optuna.create_study(direction=direction, sampler=sampler)
        memory.add_trials(done)
        params: dict[str, Any] = memory.ask(dict(distributions)).params
        if json.dumps(params, sort_keys=True) not in had:
            return params
    return None


def _distribution(optuna: Any, each: Range) -> Any:
    of = optuna.distributions
    if each.values:
        return of.CategoricalDistribution([json.dumps(value) for value in each.values])
    if each.whole:
        return of.IntDistribution(int(each.low), int(each.high), log=each.log)
    return of.FloatDistribution(each.low, each.high, log=each.log)


def _encoded(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Values as Optuna keeps them: those of lists as JSON."""
    return {key: json.dumps(values[key]) if ranges[key].values else values[key] for key in ranges}


def _decoded(params: Mapping[str, Any], ranges: Mapping[str, Range]) -> dict[str, Any]:
    return {key: json.loads(params[key]) if ranges[key].values else params[key] for key in ranges}


def _run_trial(
    optuna: Any,
    study: Any,
    distributions: Mapping[str, Any],
    ranges: Mapping[str, Range],
    objective: Objective,
    folder: Path,
    say: Say,
) -> None:
    """One trial, from the queue to its outcome."""
    trial = study.ask(dict(distributions))
    values, run = _decoded(trial.params, ranges), str(trial.user_attrs["run"])
    told = [0]

    def report(so_far: list[float]) -> None:
        for number, value in enumerate(so_far, 1):
            if number > told[0] and math.isfinite(value):
                trial.report(value, number)
        told[0] = max(told[0], len(so_far))
        if trial.should_prune():
            raise optuna.TrialPruned

    shown = ", ".join(f"{key} = {value}" for key, value in values.items())
    say(f"trial {int(run)}: {shown}")
    reason, value = "", math.nan
    try:
        value = objective(values, folder / "trials" / run, report)
        reason = "" if math.isfinite(value) else "its value is not finite"
    except optuna.TrialPruned:
        reason = "worse than the median"
    except (Stopped, CheckpointError, DataError):
        raise
    except Error as error:  # this combination cannot be trained
        reason = str(error)
    if reason:
        trial.set_user_attr("reason", reason)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        say(f"trial {int(run)}: ended, {one_line(reason)}")
    else:
        study.tell(trial, value)
        say(f"trial {int(run)}: {value:.5f}")


def one_line(text: str) -> str:
    """The lines of a reason, one behind the other.

    >>> one_line("experiment 'mine':\\n  model.width: must be at least 1")
    "experiment 'mine': model.width: must be at least 1"
    """
    return " ".join(text.split())


def _keep_best(study: Any, folder: Path, larger: bool) -> None:
    """Remove the checkpoints of all but the best trial: tables may be large."""
    best: Any = None
    for trial in finished(study):
        completed = trial.state.name == "COMPLETE"
        if completed and is_better(trial.value, best and best.value, larger):
            best = trial
    for trial in finished(study):
        if trial is not best:
            run = folder / "trials" / trial.user_attrs["run"]
            shutil.rmtree(run / "checkpoints", ignore_errors=True)


def _row(trial: Any, ranges: Mapping[str, Range]) -> dict[str, Any]:
    completed = trial.state.name == "COMPLETE"
    return {
        "trial": int(trial.user_attrs["run"]),
        "value": trial.value if completed else None,
        "evaluations": len(trial.intermediate_values),
        "reason": trial.user_attrs.get("reason", ""),
        "run": trial.user_attrs["run"],
        "values": _decoded(trial.params, ranges),
    }


def _table(rows: Iterable[Mapping[str, Any]]) -> Result:
    """A row a trial, a column a key."""
    plain = []
    for row in rows:
        values = {
            key: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for key, value in row["values"].items()
        }
        kept = {key: row[key] for key in ("trial", "value", "evaluations")}
        plain.append({**kept, **values, "reason": one_line(row["reason"])})
    keys = list(plain[0])
    columns: dict[str, Any] = {}
    for key in keys:
        cells = [row[key] for row in plain]
        alike = len({type(cell) for cell in cells if cell is not None}) < 2
        columns[key] = pa.array(cells if alike else [str(cell) for cell in cells])
    return Result(pa.table(columns))
