"""`mtrec plan`: what a run would take on devices that need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtrec_jax.cli.options import Config, PreparedFolder, Set


def plan(
    config: Config,
    devices: Annotated[
        int, typer.Option(min=0, help="How many there would be; 0: those of this machine.")
    ] = 0,
    device_memory: Annotated[str, typer.Option(help="Of one device.")] = "80GB",
    memory_bandwidth: Annotated[str, typer.Option(help="Of one device's memory.")] = "2TB/s",
    bandwidth: Annotated[str, typer.Option(help="Of one device's network.")] = "25GB/s",
    flops: Annotated[str, typer.Option(help="Of one device, float32 products.")] = "50TFLOP/s",
    rows: Annotated[
        list[str] | None,
        typer.Option(help="Size of a table: item=1e6, user=1e9. May be repeated."),
    ] = None,
    prepared: PreparedFolder = None,
    overrides: Set = None,
) -> None:
    """Where each table goes, and what a step takes: memory, bytes exchanged, time, and its bound.

    Nothing is allocated, so a pod can be planned on a laptop. With a prepared folder (by default
    prepared/NAME, where it is there) tables have its sizes, and the buffers of the exchange are
    those that training will measure on its first batches. Without one, name the sizes:

    `mtrec plan shop --devices 256 --rows item=1e6 --rows segment=1e9 ... --set
    train.batch_size=65536`

    Tables with placement = sparse are split by row over as few devices as hold them, or as
    `--set train.mesh=[2,128]` says. What does not fit is refused (exit status 2), and the nearest
    change that fits is named: more table shards, bfloat16 rows, row-wise Adagrad, more devices.
    """
    from mtrec_jax.data.dataset import open_prepared
    from mtrec_jax.experiments import load_experiment
    from mtrec_jax.planner import Device
    from mtrec_jax.planner import plan as plan_run
    from mtrec_jax.planner_tables import print_plan
    from mtrec_jax.quantities import parse_quantity, parse_rows

    experiment = load_experiment(config, overrides or [])
    device = Device(
        memory=parse_quantity("--device-memory", device_memory, "B"),
        memory_bandwidth=parse_quantity("--memory-bandwidth", memory_bandwidth, "B/s"),
        bandwidth=parse_quantity("--bandwidth", bandwidth, "B/s"),
        flops=parse_quantity("--flops", flops, "FLOP/s"),
    )
    typer.echo("compiling the step for one device's share of a batch …", err=True)
    folder = prepared or Path("prepared") / experiment.name
    opened = open_prepared(folder) if prepared or (folder / "manifest.json").exists() else None
    print_plan(plan_run(experiment, devices, opened, parse_rows(rows or []), device))
