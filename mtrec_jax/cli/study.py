"""`mtrec study`: many runs over one prepared folder, or over the folds of one log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtrec_jax.cli.options import Config, DataFolder, PreparedFolder, Set, say

study = typer.Typer(
    name="study",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Many runs that answer one question. The same command continues a study that was stopped.",
)
Out = Annotated[Path | None, typer.Option(help="Folder of the study; default studies/NAME-….")]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings of each, from train.seed on.")]


@study.command()
def tune(
    config: Config,
    prepared: PreparedFolder = None,
    out: Out = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--range", help="KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A,B. Repeatable."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="In all, finished ones among them; default 20.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    overrides: Set = None,
) -> None:
    """Search ranges of settings for the best value of select.metric on validation.

    `mtrec study tune shop --range train.learning_rate=1e-3..2e-2:log --range
    model.towers=mmoe,ple --range model.width=16..64 --trials 20`

    Ranges may stand in the configuration as well, in `[tune.ranges]`. Trial 0 is the configuration
    as it is, so that the best one is never worse. A trial that is worse than the median of the
    others after as many evaluations is ended early. The best configuration is written to
    OUT/best.toml: `mtrec train OUT/best.toml`. A search that was stopped or killed goes on with the
    same command: what was under way is continued, and nothing is tried twice. Needs
    mtrec_jax[tune].
    """
    from rich.console import Console

    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.experiments import cut, load_experiment
    from mtrec_jax.studies.tune import tune as search

    use_compilation_cache()
    experiment = load_experiment(config, overrides or [])
    opened = open_prepared(prepared or Path("prepared") / experiment.name)
    declared = dict(experiment.tune.ranges) if experiment.tune else {}
    declared |= dict(cut(text, "ranges") for text in ranges or [])
    folder = out or Path("studies") / f"{experiment.name}-tune"
    found = search(experiment, opened, folder, declared, trials, seed, say)
    Console().print(found.trials.rich())
    shown = " ".join(f"--set {key}={value}" for key, value in found.settings.items())
    say(f"best on validation: {found.value:.5f} with {shown or 'the defaults'}")
    say(f"its run: {found.run} · its configuration: {folder / 'best.toml'}")


@study.command()
def crossval(
    configs: Annotated[
        list[str], typer.Argument(metavar="CONFIG...", help="TOML files or built-in names.")
    ],
    folds: Annotated[int, typer.Option(min=2, help="How many.")] = 5,
    seeds: Seeds = 3,
    by: Annotated[
        Literal["event", "user", "time"],
        typer.Option(help="Folds of events, of whole users, or windows of time."),
    ] = "event",
    stratify: Annotated[
        str, typer.Option(help="Binary task of whose labels each fold has its share.")
    ] = "",
    hold_back: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the other folds that validates; default a fold."),
    ] = None,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="Looks at the test folds are counted.")
    ] = "validation",
    data: DataFolder = Path("data"),
    out: Out = None,
    overrides: Set = None,
) -> None:
    """Repeat a training over folds and seeds; several configurations are compared in pairs.

    `mtrec study crossval census-income --folds 5 --seeds 3 --stratify income`

    The log is cleaned once, each fold is prepared once, and every run is an ordinary run folder in
    OUT/runs. The table has means, deviations over folds and over seeds. Of two configurations it
    says by how much the first is better, with an interval over users (a paired bootstrap) and a
    test over folds (corrected for their overlap and for the number of comparisons). Choose by the
    validation folds; look at the test folds once, with `--split test`.
    """
    from rich.console import Console

    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.errors import ConfigError
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.studies.crossval import crossval as run

    use_compilation_cache()
    named: dict[str, Any] = {}
    whole: dict[str, Any] = {}
    for config in configs:
        experiment = load_experiment(config, overrides or [])
        name = Path(config).stem if experiment.name in named else experiment.name
        if name in named:
            raise ConfigError(
                f"{config}: another configuration is called '{name}', too; give it a name of its "
                "own, or its file"
            )
        named[name] = experiment
        whole[name] = load_experiment(config, overrides or [], choose=False)
    public = next(iter(named.values())).data.public
    folder = out or Path("studies") / f"{next(iter(named))}-crossval"
    raw = data / public if public else data
    how = folds, seeds, by, stratify, hold_back, split
    found = run(named, raw, folder, *how, whole=whole, say=say)
    console = Console()
    console.print(found.scores.rich(len(found.scores)))
    if found.pairs is not None:
        console.print(found.pairs.rich(len(found.pairs)))
    say(f"looks at the test folds so far: {found.test_looks} · {folder / 'crossval.json'}")


@study.command()
def transfer(
    config: Config,
    prepared: PreparedFolder = None,
    out: Out = None,
    seeds: Seeds = 3,
    weights: Annotated[
        str, typer.Option(help="Factors of each task's weight in turn, such as 0.25,4.")
    ] = "",
    twins: Annotated[
        list[str] | None,
        typer.Option("--twin-set", help="Setting of the twins: model.towers=shared_bottom."),
    ] = None,
    cosines: Annotated[bool, typer.Option(help="Record gradient cosines.")] = True,
    overrides: Set = None,
) -> None:
    """Ask whether tasks help or hurt each other: single-task twins beside the joint model.

    `mtrec study transfer shop --seeds 3 --weights 0.25,4`

    All runs read one prepared folder and have the same steps. The table has a row a task: what it
    gains by sharing, with an interval over users; "hurts" is negative transfer. Cosines below 0 say
    which tasks pull against each other, and when. Gates say who uses which expert. Weights give a
    front of what static weighting alone can reach. The picture is OUT/transfer.png (needs
    mtrec_jax[plots]).
    """
    from rich.console import Console

    from mtrec_jax.compilation import use_compilation_cache
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.errors import ConfigError
    from mtrec_jax.experiments import cut, load_experiment
    from mtrec_jax.studies.picture import draw_transfer
    from mtrec_jax.studies.transfer import transfer as run

    use_compilation_cache()
    experiment = load_experiment(config, overrides or [])
    opened = open_prepared(prepared or Path("prepared") / experiment.name)
    folder = out or Path("studies") / f"{experiment.name}-transfer"
    try:
        factors = [float(text) for text in weights.split(",") if text.strip()]
    except ValueError as error:
        raise ConfigError(f"--weights {weights}: write factors such as 0.25,4") from error
    settings = dict(cut(text, "twins") for text in twins or [])
    found = run(experiment, opened, folder, seeds, factors, settings, cosines, say)
    console = Console()
    for title, table in (
        ("What each task gains by sharing", found.tasks),
        ("Gradient cosines", found.cosines),
        ("Gates", found.gates),
        ("Static weights", found.weights),
    ):
        if table is not None:
            console.print(f"[bold]{title}[/bold]")
            console.print(table.rich())
    try:
        drawn = f" · {draw_transfer(folder)}"
    except ConfigError as error:  # the tables are there all the same
        drawn = f" · {error}"
    say(f"{folder / 'transfer.json'}{drawn}")
