"""Raw data for the commands: fetched, or generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

SHOPS = ("shop", "shop-social")  # generated, from a seed


def generate_shop(to: Path, name: str, seed: int) -> None:
    """Generate a shop's logs into `to`/`name`, unless they are there; say how well one can do."""
    from mtrec_jax.data import shop

    folder, social = to / name, name == "shop-social"
    if shop.is_generated(folder, seed, social):
        typer.echo(f"{name} in {folder} is there already (generated, seed {seed})", err=True)
        return
    truth = shop.generate(folder, seed=seed, social=social)
    best = ", ".join(
        f"{task} {metric} {value:.4f}"
        for task, metrics in truth["best"].items()
        for metric, value in metrics.items()
    )
    typer.echo(f"{name} in {folder} (generated, seed {seed}). Best possible: {best}", err=True)


def fetch(name: str, to: Path) -> None:
    """Fetch a public data set into `to`/`name` and print its terms."""
    from mtrec_jax.data import public

    with _download_bar() as bar:
        task = bar.add_task(f"fetch {name}", total=None)
        folder = public.fetch(
            name, to, lambda done, total: bar.update(task, completed=done, total=total)
        )
    typer.echo(f"{name} in {folder}. Terms: {public.PUBLIC[name].terms}", err=True)


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
