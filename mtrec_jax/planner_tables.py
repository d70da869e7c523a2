"""A plan as tables for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtrec_jax.planner import DevicePlan
from mtrec_jax.quantities import quantity_text


def plan_tables(found: DevicePlan) -> RenderableType:
    """Where tables go, memory, what is exchanged, and the time of a step."""
    device, (data, table) = found.device, found.mesh
    head = (
        f"{found.experiment.name}: {data * table} devices, train.mesh = [{data}, {table}]; each "
        f"with {quantity_text(device.memory)}, {quantity_text(device.memory_bandwidth, 'B/s')} of "
        f"memory, {quantity_text(device.bandwidth, 'B/s')} of network, "
        f"{1e6 * device.latency:g} µs a collective, {quantity_text(device.flops, 'FLOP/s')}"
    )
    return Group(
        Text(head),
        _tables(found),
        _memory(found),
        _moved(found),
        Text(_time(found)),
    )


def print_plan(found: DevicePlan) -> None:
    """Print `plan_tables` to standard output."""
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(plan_tables(found))


def _tables(found: DevicePlan) -> Table:
    shown = _table("Tables", ["table", "rows", "stack", "a device", "why there"])
    for table in found.tables:
        size = quantity_text(table.per_device)
        shown.add_row(table.owner, f"{table.rows:,}", table.stack, size, table.why)
    return shown


def _memory(found: DevicePlan) -> Table:
    shown = _table("Memory of a device", ["what", "bytes"])
    for what, size in found.memory.items():
        if size:
            shown.add_row(what, quantity_text(size))
    used = found.bytes / found.device.memory
    shown.add_row(f"in all, {used:.0%} of it", quantity_text(found.bytes), style="bold")
    return shown


def _moved(found: DevicePlan) -> Table:
    basis = "measured on the first batches" if found.measured else "for ids that are all distinct"
    title = "Exchanged by a device in a step" + (f", buffers {basis}" if found.buffers else "")
    shown = _table(title, ["what", "collective", "devices", "bytes"])
    sizes: dict[tuple[str, str, int], int] = {}
    for moved in found.moved:  # of all stacks together
        kind = moved.what, moved.how, moved.over
        sizes[kind] = sizes.get(kind, 0) + moved.size
    for (what, how, over), size in sizes.items():
        shown.add_row(what, how, str(over), quantity_text(size))
    shown.add_row("in all", "", "", quantity_text(sum(m.size for m in found.moved)), style="bold")
    return shown


def _time(found: DevicePlan) -> str:
    parts = ", ".join(f"{what} {1e3 * s:.3g} ms" for what, s in found.seconds.items())
    return (
        f"A step: {parts}. Expected {1e3 * found.step_seconds:.3g} ms (reads and compute overlap), "
        f"bound by {found.bound}."
    )


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        right = column in ("rows", "a device", "bytes", "devices")
        wraps = column == "why there"
        table.add_column(column, justify="right" if right else "left", no_wrap=not wraps)
    return table
