"""Run folders: whose they are, how they are opened, and how their best model is judged."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq

from mtrec_jax import choices, processes
from mtrec_jax.arguments import a_list, a_path, argument, one_of
from mtrec_jax.baselines import BASELINES
from mtrec_jax.config import Experiment, to_dict, to_toml
from mtrec_jax.data.dataset import SPLITS, Manifest, Prepared, open_prepared
from mtrec_jax.data.newer import in_terms_of
from mtrec_jax.diversity import DIVERSIFIERS
from mtrec_jax.errors import CheckpointError, ConfigError, DataError
from mtrec_jax.evaluation.answers import Answers, from_json
from mtrec_jax.evaluation.evaluate import Evaluation, evaluate, judged
from mtrec_jax.evaluation.protocol import protocol_of
from mtrec_jax.evaluation.tables import comparable, compared, same_events
from mtrec_jax.experiments import check, cut, load_experiment
from mtrec_jax.models.model import Model, make_model
from mtrec_jax.models.serve import prepared_serving
from mtrec_jax.result import Result
from mtrec_jax.sharding import make_mesh
from mtrec_jax.train import checkpoint
from mtrec_jax.train.records import read_json, write_json
from mtrec_jax.train.step import model_shapes
from mtrec_jax.types import PyTree

# what a start that failed before its first checkpoint leaves behind
_OWN_FILES = (
    *("prepared.json", "config.toml", "metrics.jsonl", "init_from.json"),
    *("checkpoints", "damaged", "lock"),
)

_USERS = "users-{}.parquet"  # of a split: what each user adds to the metrics
ANSWERS = "answers.json"  # calibrations and the chosen order of the best checkpoint

# where and how a run goes on, not what it learns
_MAY_CHANGE = ("train.mesh", "train.input_timeout", "train.checkpoint_wait")


@dataclass(frozen=True)
class Run:
    """A run folder: what was trained, on what, and its best parameters."""

    folder: Path
    experiment: Experiment
    prepared: Prepared

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {self.experiment.name}, {self.prepared!r})"


def open_run(
    folder: str | Path, prepared: str | Path | None = None, extensions: Iterable[type] = ()
) -> Run:
    """Open a run folder.

    Args:
      folder: a folder that `train` has written, or one that `fit` was given.
      prepared: where its prepared data is now, by default where it was; or newer data of the same
        features, prepared: answers are then given for its users, histories and catalogue.
      extensions: the classes of kinds of your own that its configuration names.

    Raises:
      CheckpointError: no run there.
      ConfigError: the prepared data is neither what the run was trained on nor newer data of the
        same features, or what it was trained on is gone.
    """
    folder = a_path("folder", folder)
    if (folder / "run" / "config.toml").is_file():  # of `fit`; it may have been moved as a whole
        folder, prepared = folder / "run", prepared or folder / "prepared"
    if not (folder / "config.toml").is_file():
        raise CheckpointError(
            f"{folder} is no run folder (no config.toml). Run: mtrec train CONFIG --run {folder}"
        )
    experiment = load_experiment(folder / "config.toml", extensions=extensions)
    notes = read_json(folder / "prepared.json")
    there = a_path("prepared", prepared or notes["folder"])
    if prepared is None and not (there / "manifest.json").is_file():
        raise DataError(
            f"{folder} was trained on {there}, where no prepared folder is any more; say where it "
            f"is now: {argument('prepared')}"
        )
    opened = open_prepared(there, extensions)
    if opened.manifest.fingerprint == notes["fingerprint"]:
        return Run(folder, experiment, opened.chosen(experiment))
    own = _what_it_learned(folder, opened, notes)
    return Run(folder, experiment, in_terms_of(opened, own.chosen(experiment)))


def _what_it_learned(folder: Path, newer: Prepared, notes: dict[str, Any]) -> Prepared:
    """The data that a run was trained on, without which newer data say nothing to it."""
    what = (
        f"{newer.folder} holds other data ({newer.manifest.fingerprint}) than {folder} was trained "
        f"on ({notes['fingerprint']})"
    )
    try:
        there = Path(notes["folder"])
        if not (there / "manifest.json").is_file():  # `fit` keeps it beside the run, moved or not
            there = folder.parent / "prepared"
        own = open_prepared(there)
    except DataError as error:
        raise ConfigError(
            f"{what}. To read newer data its own vocabularies are needed, and {notes['folder']} is "
            f"gone: bring it back; or pass the right folder: {argument('prepared')}"
        ) from error
    if own.manifest.fingerprint != notes["fingerprint"]:
        raise ConfigError(
            f"{what}, and so does {own.folder}; pass the right folder: {argument('prepared')}"
        )
    return own


def load_best(
    run: Run, mesh: jax.sharding.Mesh | None = None, model: Model | None = None
) -> tuple[PyTree, dict[str, jax.Array], int]:
    """(params, sparse tables, step) of the run's best checkpoint, on one device or over a mesh.

    `model` saves time where it is there already.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    model = model or make_model(run.experiment, run.prepared.manifest)
    like = model_shapes(run.experiment, model)
    folder = run.folder / "checkpoints"
    while True:
        with checkpoint.open_manager(folder) as manager:
            best = checkpoint.best_or_latest(manager, folder)
            try:
                return *checkpoint.restore_model(manager, best, like, mesh), best
            except CheckpointError:
                if (folder / str(best)).exists():
                    raise  # otherwise training goes on, and has found a better one


def best_step(run: Run) -> int:
    """The step of the run's best checkpoint, or of its latest where none is called the best.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """
    folder = run.folder / "checkpoints"
    with checkpoint.open_manager(folder) as manager:
        return checkpoint.best_or_latest(manager, folder)


def load_answers(run: Run, step: int) -> Answers | None:
    """How the parameters of a step answer, as training has found on validation and stored in
    `answers.json`. None where it has found nothing for this step: it was stopped before its end,
    or had no validation events.

    Raises:
      CheckpointError: the file is damaged, or of another version.
    """
    path = run.folder / ANSWERS
    if not path.is_file():
        return None
    try:
        found = from_json(read_json(path), run.experiment.train.precision)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not what this version writes ({error!r}). Remove it and train on, by the "
            "same command: it is then found anew"
        ) from error
    return found if found.step == step else None


def evaluate_run(
    run: Run | str | Path,
    split: str = "validation",
    note: Callable[[str], Any] = warnings.warn,
    under: Sequence[str] | Mapping[str, Any] = (),
    prepared: str | Path | None = None,
) -> tuple[Evaluation, int]:
    """Evaluate a run's best checkpoint, write `evaluation.json`, and count looks at the test set.

    Args:
      run: from `train` or `open_run`, or the path of a run folder.
      split: "validation" or "test".
      note: is told where the folder cannot be written, so that nothing was stored.
      under: other rules than those of its configuration, which become part of the protocol, as
        overrides such as "evaluate.exclude_seen=false"; see `measured_under`.
      prepared: for other rules of `data` and `split`, a folder that was prepared by them.

    Returns:
      The evaluation, and how often the test set has been looked at, this time included.

    Raises:
      CheckpointError: the run has no usable checkpoint.
      ConfigError: there is no such split, or it has no targets, or the data are newer ones (also
        by `with_events` and `with_users`), which answers are given for, or the model cannot be
        measured by these rules.
    """
    one_of("split", split, SPLITS)
    run = run if isinstance(run, Run) else open_run(a_path("run", run))
    _check_targets(run, split)
    if under or prepared is not None:
        run = measured_under(run, under, prepared, split)
    mesh = shared_mesh(run.experiment)
    serving = prepared_serving(run.experiment, run.prepared, mesh)
    params, tables, step = load_best(run, mesh, serving.model)
    parts = run.experiment, run.prepared, serving, params, tables, split
    evaluation = evaluate(*parts, answers=load_answers(run, step) or Answers(step=step))
    path = run.folder / "evaluation.json"
    looks = int(read_json(path)["test_looks"]) if path.exists() else 0
    looks += split == "test"
    processes.wait("the looks are read")
    if processes.is_first():
        try:
            found = {**evaluation.to_dict(), "step": step, "test_looks": looks}
            write_json(path, found)
            _write_users(run.folder / _USERS.format(split), evaluation, found)
        except OSError as error:
            uncounted = ", this look at the test set among it" if split == "test" else ""
            note(f"nothing was stored in {run.folder}{uncounted}: {error.strerror or error}")
    return evaluation, looks


def measured_under(
    run: Run,
    under: Sequence[str] | Mapping[str, Any],
    prepared: str | Path | None,
    split: str,
) -> Run:
    """A run as it is measured by other rules, where its model allows that.

    Args:
      run: what was trained.
      under: keys of `[evaluate]` (ks, exclude_seen, seen, candidates, segments, …), which need
        nothing else; `data.past`, `data.hide_ties` and keys of `[split]`, which say what judges and
        what is known then, and need a folder that was prepared by them.
      prepared: that folder. It has to have learned the same from its training rows (vocabularies,
        scales, items), and judge by no row that this run was trained on.
      split: what will be measured.

    Raises:
      ConfigError: another key, which would be another model; or no such folder, or one whose ids
        mean something else to this model, or whose judges it has been trained on.
    """
    values = dict(under) if isinstance(under, Mapping) else dict(map(cut, under))
    sections: dict[str, dict[str, Any]] = {"evaluate": {}, "data": {}, "split": {}}
    for key, value in values.items():
        section, _, rest = key.partition(".")
        if section not in ("evaluate", "split") and key not in ("data.past", "data.hide_ties"):
            raise ConfigError(
                f"{argument('under')} {key}: what a model was trained with cannot be changed by "
                "measuring it; keys of evaluate and split, data.past and data.hide_ties can. For "
                "others train another run"
            )
        sections[section][rest or "kind"] = value
    e, needs = run.experiment, bool(sections["data"] or sections["split"])
    if needs != (prepared is not None):
        raise ConfigError(
            f"{argument('under')} {', '.join(values)}: "
            + (
                "other judges, or another past, are prepared first: mtrec prepare CONFIG --set "
                f"{next(k for k in values if not k.startswith('evaluate'))}=… --out FOLDER; then "
                f"pass {argument('prepared')} FOLDER"
                if needs
                else f"needs no other folder; leave {argument('prepared')} out, or say by which "
                "rules of split or data it was prepared"
            )
        )
    of_package = (*BASELINES.values(), *DIVERSIFIERS.values())
    own = [kind for kind in choices.chosen_kinds(e.evaluate) if kind not in of_package]
    changed = {
        name: choices.read(
            type(getattr(e, name)),
            {**vars(getattr(e, name)), **new},
            argument("under"),
            own,
        )
        for name, new in sections.items()
        if new
    }
    experiment = dataclasses.replace(e, **changed)
    check(experiment)
    if prepared is None:
        return dataclasses.replace(run, experiment=experiment)
    other = open_prepared(a_path("prepared", prepared), run.prepared.extensions).chosen(experiment)
    _check_understood(run, other, split)
    return Run(run.folder, experiment, other)


def _check_understood(run: Run, other: Prepared, split: str) -> None:
    """Raise `ConfigError` unless another folder says the same of every id as the one that a model
    was trained on, and judges by events that it has not been trained on."""
    own = run.prepared
    there, here = other.manifest, own.manifest
    differ = ["files of events"] if there.event_files != here.event_files else []
    if not own.items["id"].equals(other.items["id"]) or here.trained_items != there.trained_items:
        differ.append("items")
    if there.history_length != here.history_length:
        differ.append("the length of histories")
    differ += [f"feature {f.name}" for f in here.fields if f not in there.fields]
    differ += [f"task {n}" for n, field in here.tasks.items() if there.tasks.get(n) != field]
    vocabularies = [f.name for f in here.fields if own.has_vocabulary(f.name)]
    differ += [
        f"values of {name}"
        for name in vocabularies
        if not own.vocabulary(name).equals(other.vocabulary(name))
    ]
    if differ:
        raise ConfigError(
            f"{other.folder} has learned other things from its training rows than {own.folder}, "
            f"which {run.folder} was trained on ({', '.join(differ[:8])}), so that its ids and "
            "scales mean something else to this model. A split that other rows train needs a run "
            "of its own"
        )
    trained = own.interactions("train")["row"]
    judging = other.interactions(split)["row"]
    known = int(np.isin(judging, trained).sum())
    if known:
        raise ConfigError(
            f"{known:,} of the {len(judging):,} events that judge in {other.folder} have trained "
            f"{run.folder}: the score would mean nothing. Train a run on that split"
        )


def _write_users(path: Path, evaluation: Evaluation, found: dict[str, Any]) -> None:
    """Write the sums of each user, and in the notes of the file the whole evaluation."""
    if evaluation.users is None:
        return
    partial = path.with_suffix(".partial")
    notes = {"evaluation": json.dumps(found)}
    pq.write_table(evaluation.users.replace_schema_metadata(notes), partial, compression="zstd")
    partial.replace(path)


def _kept(run: Run, split: str) -> Evaluation | None:
    """The evaluation of a split that the folder keeps, if it is of the best checkpoint of now, by
    the rules of now."""
    path = run.folder / _USERS.format(split)
    if not path.is_file():
        return None
    users = pq.read_table(path)
    notes = json.loads(users.schema.metadata[b"evaluation"])
    evaluation = Evaluation.from_dict(notes, users.replace_schema_metadata(None))
    now = evaluation.protocol == protocol_of(run.experiment, run.prepared.manifest)
    same = evaluation.fingerprint == run.prepared.manifest.fingerprint
    return evaluation if now and same and notes["step"] == best_step(run) else None


def compare(
    runs: Iterable[Run | str | Path] | Mapping[str, Run | str | Path],
    split: str = "validation",
    metrics: Iterable[str] = (),
    note: Callable[[str], Any] = warnings.warn,
) -> Result:
    """Several runs in one table, each beside the first, with paired tests over users.

    What a run's folder keeps of its last evaluation is used; where there is none of its best
    checkpoint, by its rules, the run is evaluated, which counts as a look at the test set.

    Args:
      runs: two or more, from `train_run` or `open_run`, or paths of run folders; or {name: run}.
      split: "validation" or "test".
      metrics: "task/metric" of those to compare; (): all that the runs share. p values are
        corrected for all comparisons of the table, so name those that you mean to look at.
      note: is told where a folder cannot be written.

    Returns:
      The table of `evaluation.tables.compared`.

    Raises:
      CheckpointError: a run has no usable checkpoint.
      ConfigError: fewer than two runs, or they were not measured by the same rules on the same
        events, with what differs; nothing has been evaluated then.

    Example:
      ```
      mtrec_jax.compare(["runs/shop", "runs/shop-ple"], metrics=["click/auc", "buy/auc"])
      ```
    """
    one_of("split", split, SPLITS)
    named = _named(runs)
    if len(named) < 2:
        raise ConfigError(f"{argument('runs')} {', '.join(named)}: name two or more to compare")
    for run in named.values():
        _check_targets(run, split)
    parts = {name: (run.experiment, run.prepared.manifest) for name, run in named.items()}
    comparable({name: (protocol_of(*of), list(of[0].tasks)) for name, of in parts.items()})
    same_events({name: judged(manifest) for name, (_, manifest) in parts.items()})
    found = {
        name: _kept(run, split) or evaluate_run(run, split, note)[0] for name, run in named.items()
    }
    return compared(found, a_list("metrics", metrics, ConfigError))


def _named(runs: Iterable[Run | str | Path] | Mapping[str, Run | str | Path]) -> dict[str, Run]:
    """Runs by their names, opened; by the names of their folders where none are given."""
    if not isinstance(runs, Mapping):
        listed = a_list("runs", runs, ConfigError)
        folders = [r.folder if isinstance(r, Run) else a_path("runs", r) for r in listed]
        names = [folder.name for folder in folders]
        names = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
        if len(set(names)) < len(names):
            raise ConfigError(f"{argument('runs')} {', '.join(names)}: a run is named twice")
        runs = dict(zip(names, listed, strict=True))
    return {
        name: run if isinstance(run, Run) else open_run(a_path("runs", run))
        for name, run in runs.items()
    }


def _check_targets(run: Run, split: str) -> None:
    """Raise `ConfigError` where a run cannot be evaluated."""
    if run.prepared.learned or run.prepared.replaced:
        raise ConfigError(
            f"{run.folder} was not trained on these data ({run.prepared.folder}, seen with what "
            "came later): newer data serve for recommendations and predictions, not for an "
            "evaluation; open the run without them"
        )
    if not run.prepared.manifest.targets[split]:
        raise ConfigError(
            f"there is nothing to evaluate {run.folder} on: '{split}' has no events "
            f"(split.validation = {run.experiment.split.validation:g}, "
            f"split.test = {run.experiment.split.test:g})"
        )


def shared_mesh(experiment: Experiment) -> jax.sharding.Mesh | None:
    """The devices that evaluate and recommend: all of them where there are several processes, in
    one process as many as hold the tables in training. None: one device does.

    Tables are split as in training, as far as that divides the devices that are here.
    """
    devices = jax.device_count()
    table = math.gcd(experiment.train.mesh[1] or devices, devices)
    if processes.count() == 1:
        return make_mesh((1, table)) if table > 1 else None
    return make_mesh((devices // table, table))


def check_folder(folder: Path, experiment: Experiment) -> None:
    """Raise `ConfigError` unless the folder is free, or holds a run of this experiment."""
    path = folder / "config.toml"
    if has_checkpoint(folder) and not path.exists():
        raise ConfigError(
            f"{folder} has checkpoints but no config.toml, which says what they are of; bring it "
            f"back, or pass another {argument('run')}"
        )
    if has_checkpoint(folder):
        keys = _differences(_stored(path, experiment), to_dict(experiment))
        keys = [key for key in keys if not _may_change(key[0]) and not _is_longer(*key)]
        if keys:
            shown = "\n".join(f"  {k}: {a!r} there, {b!r} here" for k, a, b in keys[:8])
            raise ConfigError(
                f"{folder} is a run of another configuration:\n{shown}\n"
                f"Pass another {argument('run')}, or the configuration it was started with"
            )
    elif folder.exists() and any(
        p.name.removesuffix(".partial") not in _OWN_FILES for p in folder.iterdir()
    ):
        raise ConfigError(
            f"{folder} is not empty and no run folder; pass another {argument('run')}"
        )


def _stored(path: Path, experiment: Experiment) -> dict[str, Any]:
    """The configuration of a run, with the defaults of keys that its version did not have yet."""
    with path.open("rb") as file:
        values = tomllib.load(file)
    kinds = {kind for kind in choices.chosen_kinds(experiment) if not _is_ours(kind)}
    try:
        return to_dict(choices.read(Experiment, values, str(path), kinds))
    except ConfigError:  # keys that are gone, or classes that are not here: they are the difference
        return values


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def check_data(folder: Path, prepared: Prepared) -> None:
    """Raise `ConfigError` unless the data are those of a run that is in the folder."""
    trained_on = _trained_on(folder)
    if trained_on and trained_on["fingerprint"] != prepared.manifest.fingerprint:
        raise ConfigError(
            f"{folder} was trained on other data ({trained_on['fingerprint']}) than "
            f"{prepared.folder} holds ({prepared.manifest.fingerprint}); pass another "
            f"{argument('run')}"
        )


def check_replacement(
    out: Path,
    new: Manifest,
    run: Path | None,
    others: Iterable[Path] = (),
    remedy: str = "Name other folders for the new data",
) -> None:
    """Raise `ConfigError` if new data would take from a run what it was trained on.

    Args:
      out: the prepared folder that is about to be replaced.
      new: of the new data.
      run: the run folder that is to be trained on the new data; None: none is.
      others: folders that may hold runs which were trained on what `out` holds now.
      remedy: what the message advises besides removing the run.
    """
    trained_on = _trained_on(run) if run else None
    if trained_on and trained_on["fingerprint"] != new.fingerprint:
        raise ConfigError(
            f"{run} was trained on other data ({trained_on['fingerprint']}) than the new ones "
            f"({new.fingerprint}). Nothing was replaced. {remedy}, or remove {run}"
        )
    try:
        old = open_prepared(out).manifest.fingerprint
    except DataError:  # there is nothing that a run could use
        return
    if old == new.fingerprint:
        return
    for other in others:
        trained_on = _trained_on(other)
        if trained_on and trained_on == {"folder": str(out.resolve()), "fingerprint": old}:
            raise ConfigError(
                f"{out} holds the data ({old}) that {other} was trained on, and the new ones are "
                f"others ({new.fingerprint}). Nothing was replaced. {remedy}, or remove {other}"
            )


def _trained_on(folder: Path) -> dict[str, Any] | None:
    """Folder and fingerprint of the data of a run; None where there is no run."""
    if not (folder / "config.toml").is_file() or not has_checkpoint(folder):
        return None
    return read_json(folder / "prepared.json")


def claim(folder: Path, experiment: Experiment, prepared: Prepared) -> str:
    """Write configuration and origin of the data into a new run folder, each file whole.

    Of a run that has begun, and is to become longer than it was, the configuration is written
    anew; returns what to say of it.
    """
    longer = ""
    if not processes.is_first():
        return longer
    if has_checkpoint(folder):
        there = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        keys = [key for key in _differences(there, to_dict(experiment)) if _is_longer(*key)]
        longer = ", ".join(f"{key} grows from {old} to {new}" for key, old, new in keys)
        if not longer:
            return longer
    else:
        folder.mkdir(parents=True, exist_ok=True)
        notes = {
            "folder": str(prepared.folder.resolve()),
            "fingerprint": prepared.manifest.fingerprint,
        }
        write_json(folder / "prepared.json", notes)
    partial = folder / "config.toml.partial"
    partial.write_text(to_toml(experiment), encoding="utf-8")
    partial.replace(folder / "config.toml")
    return longer


def _may_change(key: str) -> bool:
    """Whether a run goes on where this differs: it does not act on what is learned."""
    return key in _MAY_CHANGE or key.partition(".")[0] == "tune"


def _is_longer(key: str, old: Any, new: Any) -> bool:
    """Whether a difference lengthens a run."""
    return key in ("train.epochs", "train.steps") and 0 < (old or 0) < (new or 0)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run has begun: a start that failed before has nothing to lose."""
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir())


def _differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))
        return found
    return [] if old == new else [(where, old, new)]
