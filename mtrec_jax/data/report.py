"""The cleaning report as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtrec_jax.data.dataset import Manifest


def print_report(manifest: Manifest) -> None:
    """Print what preparation did, rule by rule, to standard error."""
    table = Table(box=None, pad_edge=False, title=manifest.protocol, title_justify="left")
    table.add_column("rule")
    table.add_column("rows", justify="right")
    table.add_column("examples", style="dim")
    for rule in manifest.report:
        table.add_row(rule.rule, f"{rule.rows:,}", Text("; ".join(rule.examples)))
    Console(stderr=True).print(table)
