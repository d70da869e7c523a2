"""Arguments, options and words that several commands of `mtrec` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Config = Annotated[str, typer.Argument(help="A TOML file, or a built-in name such as shop.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, such as runs/shop.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key: model.towers=ple. May be repeated."),
]
DataFolder = Annotated[Path, typer.Option("--data", help="Folder of the raw files.")]
PreparedFolder = Annotated[
    Path | None, typer.Option("--prepared", help="Prepared folder; default prepared/NAME.")
]
MovedFolder = Annotated[
    Path | None,
    typer.Option(
        "--prepared", help="Prepared folder, if it has moved; or newer data of the same features."
    ),
]
NewEvents = Annotated[
    Path | None,
    typer.Option("--events", help="File of new events, which follow the stored ones of each user."),
]
NewUsers = Annotated[
    Path | None,
    typer.Option("--profiles", help="File of users and their features; new users as well."),
]
EngineOption = Annotated[
    Literal["duckdb", "spark"],
    typer.Option("--engine", help="Both give the same folder; spark needs mtrec_jax[spark]."),
]
Memory = Annotated[
    str, typer.Option(help="Most memory of the engine, as 4GB; default a quarter of the machine's.")
]
Master = Annotated[str, typer.Option(help="Of Spark; a cluster must see data and out.")]
RunOption = Annotated[Path | None, typer.Option("--run", help="Run folder; default runs/NAME.")]


def say(text: str) -> None:
    """Tell a person something that is no result."""
    typer.echo(text, err=True)
