"""`mtrec train`, `evaluate` and `run`: from a prepared folder to a judged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtrec_jax.cli.data import SHOPS, fetch, generate_shop, prepare_folder
from mtrec_jax.cli.options import (
    Config,
    DataFolder,
    EngineOption,
    Master,
    Memory,
    MovedFolder,
    PreparedFolder,
    RunOption,
    Set,
    say,
)


def train(
    config: Config,
    prepared: PreparedFolder = None,
    run: RunOption = None,
    overrides: Set = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Run whose best parameters and tables a new RUN begins with."),
    ] = None,
) -> None:
    """Train; a RUN with a checkpoint of the same configuration is continued by itself."""
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.experiments import load_experiment

    use_compilation_cache()
    experiment = load_experiment(config, overrides or [])
    opened = open_prepared(prepared or Path("prepared") / experiment.name)
    _train(experiment, opened, run or Path("runs") / experiment.name, init_from)


def evaluate(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, such as runs/shop.")
    ],
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="The test set's looks are counted.")
    ] = "validation",
    prepared: MovedFolder = None,
) -> None:
    """Evaluate the best checkpoint beside the baselines, under one protocol; several runs also in
    one table."""
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.evaluation.protocol import protocol_of
    from mtrec_jax.evaluation.tables import comparable, print_side_by_side
    from mtrec_jax.train.run import open_run

    use_compilation_cache()
    names = [run.name for run in runs]
    names = names if len(set(names)) == len(names) else [str(run) for run in runs]
    opened = {name: open_run(run, prepared) for name, run in zip(names, runs, strict=True)}
    if len(opened) > 1:  # before a look at the test set
        parts = {name: (run.experiment, run.prepared.manifest) for name, run in opened.items()}
        comparable({name: (protocol_of(*of), list(of[0].tasks)) for name, of in parts.items()})
    found = {name: _evaluate(run, split) for name, run in opened.items()}
    if len(found) > 1:
        print_side_by_side(found)


def run(
    config: Config,
    run: RunOption = None,
    overrides: Set = None,
    data: DataFolder = Path("data"),
    prepared: PreparedFolder = None,
    engine: EngineOption = "duckdb",
    memory: Memory = "",
    master: Master = "local[*]",
) -> None:
    """All at once: data, prepare, train, evaluate on validation.

    A prepared folder that is up to date with the raw files is not prepared again.
    """
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.train.loop import check_start

    use_compilation_cache()
    experiment = load_experiment(config, overrides or [])
    folder = run or Path("runs") / experiment.name
    out = prepared or Path("prepared") / experiment.name
    check_start(experiment, folder)
    public = experiment.data.public
    if public in SHOPS and (data / public / "events.csv").exists():
        say(
            f"{public} in {data / public} is there already and stays as it is; "
            f"`mtrec data {public} --to {data}` generates it anew"
        )
    elif public in SHOPS:
        generate_shop(data, public, 0)
    elif public:
        fetch(public, data)
    remedy = "Name other folders for the new data with --run and --prepared"
    whole = load_experiment(config, overrides or [], choose=False)  # of which training chooses
    how = remedy, engine, memory, master
    opened = prepare_folder(whole, data, out, folder, *how, again=False)
    finished = _train(experiment, opened, folder)
    if experiment.split.validates:
        _evaluate(finished, "validation")


def _train(experiment: Any, prepared: Any, folder: Path, init_from: Path | None = None) -> Any:
    from mtrec_jax import processes
    from mtrec_jax.train.loop import train as train_run

    finished = train_run(experiment, prepared, folder, init_from=init_from)
    if processes.is_first():
        say(f"trained: {folder}")
    return finished


def _evaluate(opened: Any, split: str) -> Any:
    from mtrec_jax.evaluation.tables import print_evaluation
    from mtrec_jax.train.run import evaluate_run

    not_stored: list[str] = []
    evaluation, looks = evaluate_run(opened, split, not_stored.append)
    print_evaluation(opened.experiment, evaluation)
    where = "" if not_stored else f" · {opened.folder / 'evaluation.json'}"
    say(f"looks at the test set so far: {looks}{where}")
    for line in not_stored:
        say(f"mtrec: {line}")
    return evaluation
