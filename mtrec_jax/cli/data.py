"""`mtrec data`, `clean` and `prepare`: from raw files to a prepared folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtrec_jax.cli.options import Config, DataFolder, EngineOption, Master, Memory, Set, say

SHOPS = ("shop", "shop-social", "shop-requests")  # generated, from a seed


def data(
    name: Annotated[str, typer.Argument(help="shop, shop-requests, ml-1m, ml-100k … or list.")],
    to: Annotated[Path, typer.Option(help="Folder that receives NAME/.")] = Path("data"),
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the generated shop; default 0.")
    ] = None,
) -> None:
    """Fetch a public data set, or weights, by its hash and print its terms, or generate the shop's
    logs."""
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


def clean(
    config: Config,
    data: DataFolder = Path("data"),
    out: Annotated[Path | None, typer.Option(help="Default prepared/cleaned/NAME.")] = None,
    overrides: Set = None,
    engine: EngineOption = "duckdb",
    memory: Memory = "",
    master: Master = "local[*]",
) -> None:
    """The first half of `prepare`: raw files to clean, ordered events, which all splits share.

    `mtrec prepare` does it by itself where it is needed, and says when it uses the events again.
    Do it apart to look at them, or to keep them elsewhere: `mtrec prepare CONFIG --cleaned FOLDER`.
    """
    from mtrec_jax.data.clean import clean as clean_data
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.train.progress import never_silent

    experiment = load_experiment(config, overrides or [], choose=False)
    out = out or Path("prepared") / "cleaned" / experiment.name
    raw = _raw_folder(experiment, data)
    with never_silent(say, "cleaning") as tell:
        notes = clean_data(experiment, raw, out, None, tell, engine, memory, master).notes
    say(f"{notes.events:,} events in {out}; {notes.quarantined:,} rows in its quarantine.parquet")


def prepare(
    config: Config,
    data: DataFolder = Path("data"),
    out: Annotated[Path | None, typer.Option(help="Default prepared/NAME.")] = None,
    cleaned: Annotated[
        Path | None,
        typer.Option(help="Folder of the clean events, shared by splits; default cleaned/ by OUT."),
    ] = None,
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
    prepare_folder(experiment, data, out, None, remedy, engine, memory, master, grow_from, cleaned)


def prepare_folder(
    experiment: Any,
    data: Path,
    out: Path,
    run: Path | None,
    remedy: str,
    engine: Literal["duckdb", "spark"],
    memory: str,
    master: str,
    grow_from: Path | None = None,
    cleaned: Path | None = None,
    again: bool = True,
) -> Any:
    """Prepare raw data into `out`, unless that takes from a run what it was trained on.

    Without `again`, a folder that holds what would be made of them now is used as it is.
    """
    from mtrec_jax.data.prepare import prepare as prepare_data
    from mtrec_jax.data.prepare import up_to_date
    from mtrec_jax.data.report import print_report
    from mtrec_jax.train.progress import never_silent
    from mtrec_jax.train.run import check_replacement

    def accept(new: Any) -> None:
        beside = run.parent.glob("*") if run else ()
        check_replacement(out, new, run, (*Path("runs").glob("*"), *beside), remedy)

    raw, how = _raw_folder(experiment, data), (engine, memory, master)
    if not again and (found := up_to_date(experiment, raw, out)):
        say(f"{out} is up to date with {raw} ({found.manifest.fingerprint}): not prepared again")
        return found
    with never_silent(say, "preparing") as tell:
        opened = prepare_data(experiment, raw, out, None, tell, *how, accept, grow_from, cleaned)
    print_report(opened.manifest)
    say(f"{opened!r} in {out}; report: {out / 'report.html'}")
    return opened


def _raw_folder(experiment: Any, data: Path) -> Path:
    return data / experiment.data.public if experiment.data.public else data


def generate_shop(to: Path, name: str, seed: int) -> None:
    """Generate a shop's logs into `to`/`name`, unless they are there; say how well one can do."""
    from mtrec_jax.data import shop

    folder, planted = to / name, shop.SHOPS[name]
    if shop.is_generated(folder, seed, **planted):
        say(f"{name} in {folder} is there already (generated, seed {seed})")
        return
    truth = shop.generate(folder, seed=seed, **planted)
    best = ", ".join(
        f"{task} {metric} {value:.4f}"
        for task, metrics in truth["best"].items()
        for metric, value in metrics.items()
    )
    say(f"{name} in {folder} (generated, seed {seed}). Best possible: {best}")


def fetch(name: str, to: Path) -> None:
    """Fetch a public data set into `to`/`name` and print its terms."""
    from mtrec_jax.data import public

    with _download_bar() as bar:
        task = bar.add_task(f"fetch {name}", total=None)
        folder = public.fetch(
            name, to, lambda done, total: bar.update(task, completed=done, total=total)
        )
    say(f"{name} in {folder}. Terms: {public.PUBLIC[name].terms}")


def _download_bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)
