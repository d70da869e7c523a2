"""`mtrec plan`: what a run would take on devices that need not be here."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtrec_jax.arguments import bytes_text, parse_bytes
from mtrec_jax.cli.options import Config, PreparedFolder, Set, say
from mtrec_jax.errors import ConfigError

if TYPE_CHECKING:
    from mtrec_jax.planner import DevicePlan


def plan(
    config: Config,
    devices: Annotated[
        int, typer.Option(min=0, help="How many there would be; 0: those of this machine.")
    ] = 0,
    device_memory: Annotated[str, typer.Option(help="Of one device.")] = "80GB",
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Size of a table: item=1e6, user=1e9. May be repeated."),
    ] = None,
    prepared: PreparedFolder = None,
    overrides: Set = None,
) -> None:
    """Where each table goes on the devices, and what a step takes: memory, bytes exchanged.

    Nothing is allocated, so a pod can be planned on a laptop: the step is compiled over virtual
    devices. With a prepared folder (by default prepared/NAME, where it is there) tables have its
    sizes, and the buffers of the exchange are those that training will measure on its first
    batches. Without one, name the sizes:

    `mtrec plan shop --devices 256 --rows item=1e6 --rows segment=1e9 ... --set
    train.batch_size=65536`

    Tables with update = "sparse" are split by row as `--set train.mesh=[2,128]` says. What does not
    fit is refused (exit status 2), with the settings that would matter.
    """
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.planner import plan as plan_run

    memory, sizes = parse_bytes("--device-memory", device_memory), parse_rows(rows or [])
    experiment = load_experiment(config, overrides or [])
    folder = prepared or Path("prepared") / experiment.name
    opened = open_prepared(folder) if prepared or (folder / "manifest.json").exists() else None
    say("compiling the step …")
    show(plan_run(experiment, devices, opened, sizes, memory))


def parse_rows(texts: Iterable[str]) -> dict[str, int]:
    """Table sizes from texts such as "item=1e9".

    Raises:
      ConfigError: a text is no name and number, or a name comes twice.

    >>> parse_rows(["item=1e9", "user=20_000"])
    {'item': 1000000000, 'user': 20000}
    """
    found: dict[str, int] = {}
    for text in texts:
        name, _, size = (part.strip() for part in text.partition("="))
        if name in found:
            raise ConfigError(f"--rows {text}: {name} has been given {found[name]:,} rows already")
        try:
            found[name] = int(float(size))
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"--rows {text}: write it as item=1e9") from error
    return found


def show(found: DevicePlan) -> None:
    """Print where tables go, the memory of a device, and what it exchanges."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=100)
    data, table = found.mesh
    console.print(
        f"{found.experiment.name}: {data * table} devices of {bytes_text(found.device_memory)}, "
        f"train.mesh = [{data}, {table}]",
        markup=False,
    )
    shown = _columns("Tables", "table", "rows >", "updated", "split over >", "a device >")
    for each in found.tables:
        how = f"{'dense' if each.stack == 'dense' else 'sparse'}, {each.rule}"
        shown.add_row(each.name, f"{each.rows:,}", how, str(each.split), bytes_text(each.bytes))
    console.print(shown)
    shown = _columns("Memory of a device", "what", "bytes >")
    for what, size in found.memory.items():
        if size:
            shown.add_row(what, bytes_text(size))
    used = found.bytes / found.device_memory
    shown.add_row(f"in all, {used:.0%} of it", bytes_text(found.bytes), style="bold")
    console.print(shown)
    if not found.collectives:
        return
    shown = _columns("A device sends in a step", "collective", "over >", "times >", "bytes >")
    for moved in found.collectives:
        sent = bytes_text(moved.sent)
        shown.add_row(moved.how, str(moved.over), str(moved.times), sent)
    shown.add_row("in all", "", "", bytes_text(sum(m.sent for m in found.collectives)))
    console.print(shown)
    if table > 1:
        measured = "measured on the first batches" if found.buffers else "for ids that all differ"
        console.print(f"Buffers of the exchange of rows: {measured}.")


def _columns(title: str, *columns: str) -> Any:
    """A table without lines; columns that end in ">" are aligned on the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        name = column.removesuffix(" >")
        table.add_column(name, justify="left" if name == column else "right", no_wrap=True)
    return table
