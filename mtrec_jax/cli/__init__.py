"""`mtrec`: the same names as in Python, from a raw log to recommendations.

Heavy imports stand inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtrec_jax.cli.data import SHOPS, fetch, generate_shop
from mtrec_jax.cli.options import (
    Config,
    DataFolder,
    EngineOption,
    Master,
    Memory,
    MovedFolder,
    PreparedFolder,
    RunFolder,
    RunOption,
    Set,
)
from mtrec_jax.cli.plan import plan
from mtrec_jax.errors import Error, Stalled
from mtrec_jax.interrupts import unwinding
from mtrec_jax.quiet import quieten

app = typer.Typer(
    name="mtrec",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""From raw behaviour logs to a trained multi-task recommender, its honest evaluation and
its recommendations.

CONFIG is a TOML file or a built-in one: **shop**, **shop-social**, **ml-1m**, **census-income**.

Start with `mtrec run shop`, then `mtrec recommend runs/shop --users u00007 --k 5`.

Exit status: 0 done · 1 a bug · 2 wrong usage or input · 3 no network · 129, 130, 143 stopped
by SIGHUP, Ctrl-C, SIGTERM: training is saved, other commands leave nothing partial.
""",
)


@app.command()
def data(
    name: Annotated[str, typer.Argument(help="shop, shop-social, ml-1m, ml-100k … or list.")],
    to: Annotated[Path, typer.Option(help="Folder that receives NAME/.")] = Path("data"),
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the generated shop; default 0.")
    ] = None,
) -> None:
    """Fetch a public data set by its hash and print its terms, or generate the shop's logs."""
    from mtrec_jax.data import public

    if seed is not None and name not in SHOPS:
        raise typer.BadParameter(f"--seed is for the generated shop, not for {name}: remove it")
    if name == "list":
        for known in public.PUBLIC.values():
            typer.echo(f"{known.name:16} {known.title}. Terms: {known.terms}.")
        return
    if name in SHOPS:
        generate_shop(to, name, seed or 0)
    else:
        fetch(name, to)


@app.command()
def prepare(
    config: Config,
    data: DataFolder = Path("data"),
    out: Annotated[Path | None, typer.Option(help="Default prepared/NAME.")] = None,
    grow_from: Annotated[
        Path | None,
        typer.Option(help="Prepared folder whose ids, bins and scales stay; new values follow."),
    ] = None,
    overrides: Set = None,
    engine: EngineOption = "duckdb",
    memory: Memory = "",
    master: Master = "local[*]",
) -> None:
    """Clean, split and index raw files into a prepared folder, with a report of every change."""
    from mtrec_jax.experiments import load_experiment

    experiment = load_experiment(config, overrides or [], choose=False)
    out = out or Path("prepared") / experiment.name
    remedy = "Name another folder with --out"
    _prepare(experiment, data, out, None, remedy, engine, memory, master, grow_from)


@app.command()
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
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.experiments import load_experiment

    experiment = load_experiment(config, overrides or [])
    opened = open_prepared(prepared or Path("prepared") / experiment.name)
    _train(experiment, opened, run or Path("runs") / experiment.name, init_from)


@app.command()
def evaluate(
    run: RunFolder,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="The test set's looks are counted.")
    ] = "validation",
    prepared: MovedFolder = None,
) -> None:
    """Evaluate the best checkpoint beside the baselines, under one protocol."""
    from mtrec_jax.train.run import open_run

    _evaluate(open_run(run, prepared), split)


@app.command()
def predict(
    run: RunFolder,
    rows: Annotated[
        Path,
        typer.Option(
            help="Raw rows like the training ones, or user, item pairs: .csv, .tsv, .jsonl (also "
            ".gz, .zst) or .parquet; otherwise in the training files' format."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A .csv, .jsonl or .parquet file.")],
    prepared: MovedFolder = None,
) -> None:
    """Write every task's prediction for given rows or (user, item) pairs."""
    from mtrec_jax.serving.recommender import Recommender, predict_file
    from mtrec_jax.train.run import open_run

    result = predict_file(Recommender(open_run(run, prepared)), rows)
    if "known" in result.columns:
        unknown = result["known"].count(False)
        if unknown:
            _say(
                f"mtrec: {unknown} pairs have a user or an item that is not in the prepared data; "
                "their column 'known' is false"
            )
    result.save(out)
    typer.echo(f"{len(result):,} predictions in {out}", err=True)


@app.command()
def recommend(
    run: RunFolder,
    users: Annotated[list[str] | None, typer.Option(help="Raw user ids.")] = None,
    more_users: Annotated[list[str] | None, typer.Argument(help="Further user ids.")] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, help="Items a user; fewer where the filters leave fewer.")
    ] = 10,
    all_users: Annotated[bool, typer.Option("--all-users", help="Every user in the data.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .csv, .jsonl or .parquet file.")] = None,
    blocked: Annotated[
        list[str] | None, typer.Option(help="Item id never to show; repeat it.")
    ] = None,
    allowed: Annotated[
        list[str] | None, typer.Option(help="Item id to choose from; repeat it.")
    ] = None,
    exclude_seen: Annotated[
        bool,
        typer.Option("--exclude-seen/--include-seen", help="Leave out the items of the history."),
    ] = True,
    prepared: MovedFolder = None,
) -> None:
    """Recommend items to users: `mtrec recommend runs/ml-1m --users 1m_1 1m_2 --k 5`."""
    from mtrec_jax import processes
    from mtrec_jax.serving.recommender import Recommender
    from mtrec_jax.serving.result import print_recommendations, save_tables
    from mtrec_jax.train.run import open_run

    if more_users and (not users or blocked or allowed):
        raise typer.BadParameter(
            f"unexpected {' '.join(more_users)}: repeat the option for each id, as in "
            "--users u1 --users u2 --blocked i1 --blocked i2"
        )
    chosen = list(dict.fromkeys([*(users or []), *(more_users or [])]))
    if bool(chosen) == all_users:
        raise typer.BadParameter("name --users, or ask for --all-users (with --out FILE)")
    if processes.count() > 1 and not all_users:
        raise typer.BadParameter("several processes share --all-users; name --users to one process")
    if all_users and out is None:
        raise typer.BadParameter("--all-users writes a file: add --out FILE")
    recommender = Recommender(open_run(run, prepared))
    filters: dict[str, Any] = {"allowed": allowed, "blocked": blocked or ()}
    filters["exclude_seen"] = exclude_seen
    if all_users:
        assert out is not None
        tables = recommender.recommend_all(k, **filters)
        rows = save_tables(_progress(tables, recommender), processes.own_file(out))
        rows, wanted = processes.total(rows), k * recommender.prepared.manifest.users
    else:
        result = recommender.recommend(chosen, k, **filters)
        rows, wanted = len(result), k * len(chosen)
        known = recommender.prepared.user_ids
        _warn_unknown([u for u in chosen if u not in known])
        if out is not None:
            result.save(out)
        else:
            print_recommendations(result)
    if out is not None:
        typer.echo(f"{rows:,} recommendations in {out}", err=True)
    if rows < wanted:
        hint = ", and items of the history are left out: --include-seen keeps them"
        _say(
            f"mtrec: some users get fewer than {k} items: the catalogue and the filters leave no "
            f"more{hint if exclude_seen else ''}"
        )


@app.command()
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
    """All at once: data, prepare, train, evaluate on validation."""
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.train.loop import check_start

    experiment = load_experiment(config, overrides or [])
    folder = run or Path("runs") / experiment.name
    out = prepared or Path("prepared") / experiment.name
    check_start(experiment, folder)
    public = experiment.data.public
    if public in SHOPS and (data / public / "events.csv").exists():
        _say(
            f"{public} in {data / public} is there already and stays as it is; "
            f"`mtrec data {public} --to {data}` generates it anew"
        )
    elif public in SHOPS:
        generate_shop(data, public, 0)
    elif public:
        fetch(public, data)
    remedy = "Name other folders for the new data with --run and --prepared"
    whole = load_experiment(config, overrides or [], choose=False)  # of which training chooses
    opened = _prepare(whole, data, out, folder, remedy, engine, memory, master)
    _evaluate(_train(experiment, opened, folder), "validation")


app.command()(plan)


def main(begin: Callable[[], None] | None = None) -> None:
    """Entry point of the `mtrec` command: our own errors become one message and exit status 2.

    `begin` is called first, and its errors are treated alike.
    """
    quieten()
    with unwinding() as received:
        try:
            if begin:
                begin()
            app()
        except BaseException as error:
            done = isinstance(error, SystemExit) and not error.code
            if received and not done:  # whatever a library has made of the interrupt
                typer.echo("mtrec: interrupted", err=True)
                sys.stdout.flush()
                os._exit(128 + received[0])  # XLA's threads may crash an interpreter's shutdown
            if isinstance(error, Error):
                typer.echo(f"mtrec: {error}", err=True)
                status = getattr(error, "status", 2)
                if isinstance(error, Stalled):
                    os._exit(status)
                if status <= 128:  # in the others all processes have stopped at the same step
                    _leave(status)
                sys.exit(status)
            if not isinstance(error, SystemExit):
                traceback.print_exc()
                _leave(1)
                sys.exit(1)
            raise


def _leave(status: int) -> None:
    """One of several processes that fails does not wait for the others."""
    if "jax" in sys.modules:
        from mtrec_jax import processes

        processes.leave(status)


def _prepare(
    experiment: Any,
    data: Path,
    out: Path,
    run: Path | None,
    remedy: str,
    engine: Literal["duckdb", "spark"],
    memory: str,
    master: str,
    grow_from: Path | None = None,
) -> Any:
    from mtrec_jax.data.prepare import prepare as prepare_data
    from mtrec_jax.data.report import print_report
    from mtrec_jax.train.run import check_replacement

    def accept(new: Any) -> None:
        beside = run.parent.glob("*") if run else ()
        check_replacement(out, new, run, (*Path("runs").glob("*"), *beside), remedy)

    folder = data / experiment.data.public if experiment.data.public else data
    opened = prepare_data(
        experiment, folder, out, None, _say, engine, memory, master, accept, grow_from
    )
    print_report(opened.manifest)
    typer.echo(f"{opened!r} in {out}; report: {out / 'report.html'}", err=True)
    return opened


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _train(experiment: Any, prepared: Any, folder: Path, init_from: Path | None = None) -> Any:
    from mtrec_jax import processes
    from mtrec_jax.train.loop import train as train_run

    finished = train_run(experiment, prepared, folder, init_from=init_from)
    if processes.is_first():
        typer.echo(f"trained: {folder}", err=True)
    return finished


def _evaluate(opened: Any, split: str) -> None:
    from mtrec_jax.evaluation.tables import print_evaluation
    from mtrec_jax.train.run import evaluate_run

    evaluation, looks = evaluate_run(opened, split)
    print_evaluation(opened.experiment, evaluation)
    _say(f"looks at the test set so far: {looks} · {opened.folder / 'evaluation.json'}")


def _progress(tables: Any, recommender: Any) -> Any:
    from rich.console import Console
    from rich.progress import track

    from mtrec_jax import processes
    from mtrec_jax.serving.requests import BATCH

    total = -(-recommender.prepared.manifest.users // (BATCH * processes.count()))
    return track(tables, "recommending", total=total, console=Console(stderr=True))


def _warn_unknown(users: list[str]) -> None:
    if users:
        shown = ", ".join(repr(user) for user in users[:5]) + (" …" if len(users) > 5 else "")
        _say(
            f"mtrec: {len(users)} unknown user{'s' if len(users) > 1 else ''} ({shown}): not in "
            "the prepared data; the most popular items stand in, and 'known' is false"
        )
