"""`mtrec train`, `evaluate`, `compare` and `run`: from a prepared folder to a judged model."""

from __future__ import annotations

from collections.abc import Sequence
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
    PreparedFolder,
    RunFolder,
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
    run: RunFolder,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="The test set's looks are counted.")
    ] = "validation",
    prepared: Annotated[
        Path | None,
        typer.Option(help="Prepared folder, if it has moved; with --under, one by those rules."),
    ] = None,
    under: Annotated[
        list[str] | None,
        typer.Option(help="Another rule: evaluate.exclude_seen=false. May be repeated."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw reliability diagrams: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Evaluate the best checkpoint beside the baselines, under one protocol."""
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.train.run import open_run

    use_compilation_cache()
    opened = open_run(run, None if under else prepared)
    found = _evaluate(opened, split, under or (), prepared if under else None)
    if picture:
        from mtrec_jax.evaluation.picture import draw_reliability

        draw_reliability(found, picture)


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders, such as runs/shop.")
    ],
    split: Annotated[
        Literal["validation", "test"],
        typer.Option(help="The test set's looks are counted, of runs that are evaluated anew."),
    ] = "validation",
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", help="task/metric to compare; default all. May be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the table to a .csv, .jsonl or .parquet file.")
    ] = None,
) -> None:
    """One table of several runs: differences to the first, with paired tests over users, corrected
    for their number; refuses other protocols or data, and says how they differ."""
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.evaluation.tables import print_compared
    from mtrec_jax.train.run import compare as compare_runs

    use_compilation_cache()
    found = compare_runs(runs, split, metrics or ())
    if out:
        found.save(out)
    else:
        print_compared(found, split)


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


def _evaluate(
    opened: Any, split: str, under: Sequence[str] = (), prepared: Path | None = None
) -> Any:
    from mtrec_jax.evaluation.tables import print_evaluation
    from mtrec_jax.train.run import evaluate_run

    not_stored: list[str] = []
    evaluation, looks = evaluate_run(opened, split, not_stored.append, under, prepared)
    print_evaluation(opened.experiment, evaluation)
    where = "" if not_stored else f" · {opened.folder / 'evaluation.json'}"
    say(f"looks at the test set so far: {looks}{where}")
    for line in not_stored:
        say(f"mtrec: {line}")
    return evaluation


def fine_tune(
    prepared: Annotated[Path, typer.Argument(help="A prepared folder with texts of items.")],
    out: Annotated[Path, typer.Option(help="Folder of the new weights.")],
    weights: Annotated[Path, typer.Option(help="Folder of the weights to begin with.")] = Path(
        "data/all-minilm-l6-v2"
    ),
    column: Annotated[str, typer.Option(help="title, or a feature kind = 'text'.")] = "title",
    steps: Annotated[int, typer.Option(min=1, help="The last nine tenths slow down to 0.")] = 300,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs of items a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Of the weights, the highest.")] = 2e-5,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of pairs.")] = 0,
) -> None:
    """Train a BERT further on the texts of items that users take one after the other.

    `mtrec fine-tune prepared/ml-1m --out weights/ml-1m`

    Only training events are read. Then name the new folder as the encoder of a text, and prepare:
    `features.words={ on="item", kind="text", column="title", encoder="weights/ml-1m" }`. Weights of
    one split are refused for another of the same files. Needs mtrec_jax[text].
    """
    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.train.fine_tune import fine_tune as tune
    from mtrec_jax.train.progress import Progress

    use_compilation_cache()
    opened = open_prepared(prepared)
    with Progress(steps, 0, True, f"texts of {opened.manifest.name}") as progress:
        found = tune(
            opened,
            weights,
            out,
            column=column,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            progress=lambda step, loss: progress.advance(step, {"pairs": loss}),
        )
    say(f"weights in {found.folder}, learned from {found.pairs:,} pairs of items")
    if found.before is not None and found.after is not None:
        say(
            f"of held-out pairs, the text that follows is the nearest of 64: {found.before:.3f} "
            f"before, {found.after:.3f} now"
        )
