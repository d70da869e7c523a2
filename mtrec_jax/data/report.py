"""What preparation did: a table on the terminal, and a page to read and to pass on."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtrec_jax.data.dataset import IdField, Manifest, NumberField, Prepared, Summary
from mtrec_jax.data.fit import Labels
from mtrec_jax.types import FIRST

_BARS = 96  # of the chart at most
_DAY = 86_400
_BLOCKS = 16  # training blocks in which missing values are counted; they are in random order
_EXAMPLES = 3
_CODES = {0: "train", 1: "validation", 2: "test", 3: "shown"}
_STYLE = """
:root { --ink: #1d2430; --soft: #5c6675; --line: #dfe3e8; --page: #fff; --card: #f5f7f9;
  --train: #3f6fa8; --validation: #d99a2b; --test: #b4483c; --shown: #8c97a5;
  color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #313a46; --page: #14181e; --card: #1d232b;
    --train: #6f9fd8; --validation: #e3b04f; --test: #dd786c; --shown: #78838f } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem } h2 { margin: 2.4rem 0 .6rem; font-size: 1.15rem }
p { margin: .4rem 0; color: var(--soft) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem;
  margin: 1.4rem 0 0 }
.cards div { background: var(--card); border-radius: .6rem; padding: .7rem .9rem }
.cards dt { color: var(--soft); font-size: .82rem } .cards dd { margin: 0; font-size: 1.3rem;
  font-variant-numeric: tabular-nums }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .9rem }
th { text-align: left; font-weight: 500; color: var(--soft); white-space: nowrap }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap }
code { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; display: block }
svg { display: block; width: 100%; height: 11rem }
.ends { display: flex; justify-content: space-between; font-size: .82rem; margin: .2rem 0 }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; font-size: .85rem; color: var(--soft) }
.key span::before { content: ""; display: inline-block; width: .7rem; height: .7rem;
  margin-right: .4rem; border-radius: .15rem; background: var(--c) }
footer { margin-top: 3rem; font-size: .82rem; color: var(--soft); overflow-wrap: anywhere }
"""


def print_report(manifest: Manifest) -> None:
    """Print what preparation did, rule by rule, to standard error."""
    table = Table(box=None, pad_edge=False, title=manifest.protocol, title_justify="left")
    table.add_column("rule")
    table.add_column("rows", justify="right")
    table.add_column("examples", style="dim")
    for rule in manifest.report:
        table.add_row(rule.rule, f"{rule.rows:,}", Text("; ".join(rule.examples)))
    Console(stderr=True).print(table)


def summarize(events: Any, labels: Labels) -> Summary:
    """Labels by split, and events over time, counted by the engine.

    Args:
      events: Ibis table with split and, if the data has a time, time in seconds.
      labels: of each task and split, as `fit_tasks` counts them; means are shown with six digits.
    """
    shown = {
        name: {
            _CODES[code]: (n, None if mean is None else float(f"{mean:.6g}"))
            for code, (n, mean) in by_split.items()
        }
        for name, by_split in labels.items()
    }
    start, width = 0.0, 0.0
    counts: dict[str, list[int]] = {}
    if "time" in events.columns:
        (span,) = events.agg(low=events.time.min(), high=events.time.max()).to_pyarrow().to_pylist()
        start = float(np.floor((span["low"] or 0.0) / _DAY) * _DAY)
        days = int(((span["high"] or 0.0) - start) // _DAY) + 1
        width = float(-(-days // _BARS) * _DAY)
        bar = ((events.time - start) / width).floor().cast("int64")
        found = events.group_by("split", bar=bar).agg(n=events.count()).to_pyarrow().to_pylist()
        bars = int(-(-days * _DAY // width))
        for row in sorted(found, key=lambda row: row["split"]):
            counts.setdefault(_CODES[row["split"]], [0] * bars)[row["bar"]] = int(row["n"])
    return Summary(labels=shown, start=start, width=width, counts=counts)


def write_report(prepared: Prepared, path: Path) -> None:
    """Write one HTML page about a prepared folder: no scripts, and nothing to load."""
    m = prepared.manifest
    splits = {name: n for name, n in m.split.sizes.items() if n}
    read = sum(rule.rows for rule in m.report if rule.rule.endswith(": rows read"))
    figures = {"rows read": read} if read else {}
    figures |= {"events kept": m.events, "rows in quarantine": m.quarantined}
    figures |= {"users": m.users, "items": m.items}
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{n:,}</dd></div>" for name, n in figures.items()
    )
    removed = [(r.rule, f"{r.rows:,}", _lines(r.examples)) for r in m.report]
    sections = [
        ("Events over time", _chart(m.summary, m.split.sizes) if m.summary else ""),
        ("Splits", _table(("split", "#events", "#share", "#examples", "#targets"), [
            (name, f"{n:,}", f"{n / max(m.events, 1):.1%}", _count(m.examples.get(name)),
             _count(m.targets.get(name))) for name, n in splits.items()])),
        ("Rules", _table(("rule", "#rows", "examples"), removed)),
        ("Quarantine", _table(("source", "reason", "#rows", "examples"), _quarantine(prepared))),
        ("Tasks", _table(("task", "kind", *(f"#{s}" for s in splits)), _tasks(m, list(splits)))),
        ("Features", _table(
            ("feature", "on", "kind", "#values", "#known", "most frequent in training"),
            _features(prepared))),
    ]  # fmt: skip
    body = "".join(f"<h2>{escape(t)}</h2>{content}" for t, content in sections if content)
    name = escape(m.name)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}: prepared data'
        f'</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{name}</h1><p>{escape(m.protocol)}</p>"
        f'<dl class="cards">{cards}</dl>{body}<footer>Data {escape(m.fingerprint)} · split '
        f"{escape(m.split.kind)}, seed {m.split.seed}, {escape(m.split.fingerprint)} · format "
        f"{m.format}</footer></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


class _Html(str):
    """Text that is HTML already."""


def _lines(texts: Iterable[str]) -> _Html:
    return _Html("".join(f"<code>{escape(text)}</code>" for text in texts))


def _count(n: int | None) -> str:
    return "" if n is None else f"{n:,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; "#name" is a column of numbers. Nothing for no rows."""
    if not rows:
        return ""
    of = [' class="n"' if name.startswith("#") else "" for name in header]
    pairs = list(zip(of, header, strict=True))
    lines = ["".join(f"<th{c}>{escape(name.lstrip('#'))}</th>" for c, name in pairs)]
    for row in rows:
        cells = (cell if isinstance(cell, _Html) else escape(cell) for cell in row)
        lines.append("".join(f"<td{c}>{cell}</td>" for c, cell in zip(of, cells, strict=True)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table>{body}</table></div>'


def _chart(summary: Summary, sizes: dict[str, int]) -> str:
    """Events by time as stacked bars, one colour a split."""
    if not summary.counts:
        return ""
    splits = [name for name in _CODES.values() if name in summary.counts]
    heights = np.array([summary.counts[name] for name in splits])
    bars, most = heights.shape[1], int(heights.sum(0).max())
    width, height, gap = 960 / bars, 180, min(2.0, 192 / bars)
    shapes = []
    for i in range(bars):
        begin, base = summary.start + i * summary.width, float(height)
        told = [
            f"{n:,} {name}" for name, n in zip(splits, heights[:, i].tolist(), strict=True) if n
        ]
        shapes.append(f"<g><title>{_date(begin)}: {', '.join(told) or 'no event'}</title>")
        for name, n in zip(splits, heights[:, i].tolist(), strict=True):
            tall = n / most * height
            base -= tall
            shapes.append(
                f'<rect x="{i * width:.2f}" y="{base:.2f}" width="{max(width - gap, 0.5):.2f}" '
                f'height="{tall:.2f}" fill="var(--{name})"/>'
            )
        shapes.append("</g>")
    last = _date(summary.start + (bars - 1) * summary.width)
    days = round(summary.width / _DAY)
    what = "events a day" if days == 1 else f"events in {days} days"
    key = "".join(
        f'<span style="--c: var(--{name})">{name} {sizes.get(name, 0):,}</span>' for name in splits
    )
    return (
        f'<p class="ends"><span>most: {most:,} {what}</span></p><svg viewBox="0 0 960 {height}" '
        f'preserveAspectRatio="none" role="img" aria-label="{what}, by split">{"".join(shapes)}'
        f'</svg><p class="ends"><span>{_date(summary.start)}</span><span>{last}</span></p>'
        f'<div class="key">{key}</div>'
    )


def _date(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.6g} s"


def _quarantine(prepared: Prepared) -> list[tuple[str, ...]]:
    """(source, reason, rows, first examples) of the removed rows, most frequent first."""
    path = prepared.folder / "quarantine.parquet"
    counts: dict[tuple[str, str], int] = {}
    first: dict[tuple[str, str], list[str]] = {}
    file = pq.ParquetFile(path) if path.is_file() else None
    for batch in file.iter_batches() if file else ():
        groups = pa.table(batch).group_by(["source", "reason"]).aggregate([([], "count_all")])
        few = False
        for group in groups.to_pylist():
            pair = (group["source"], group["reason"])
            counts[pair] = counts.get(pair, 0) + group["count_all"]
            few |= len(first.setdefault(pair, [])) < _EXAMPLES
        for row in batch.to_pylist() if few else ():
            found = first[row["source"], row["reason"]]
            if len(found) < _EXAMPLES:
                place = f"{row['file']} line {row['line']}" if row["file"] else f"row {row['row']}"
                evidence = f": {row['evidence'][:80]!r}" if row["evidence"] else ""
                found.append(place + evidence)
    order = sorted(counts, key=lambda pair: (-counts[pair], pair))
    return [(*pair, f"{counts[pair]:,}", _lines(first[pair])) for pair in order]


def _tasks(m: Manifest, splits: Sequence[str]) -> list[tuple[str, ...]]:
    """A row a task: how many labels each split has, and their mean or the number of classes."""
    rows: list[tuple[str, ...]] = []
    for name, by_split in (m.summary.labels if m.summary else {}).items():
        kind = m.config["tasks"][name]["kind"]
        cells = []
        for split in splits:
            n, mean = by_split.get(split, (0, None))
            shown = "{:.1%}" if kind == "binary" else "mean {:.4g}"
            known = kind != "retrieval" and mean is not None
            cells.append(f"{n:,}{' · ' + shown.format(mean) if known else ''}")
        many = len(m.tasks[name].classes)
        classes = f", {many} classes" if many else ""
        rows.append((name, kind + classes, *cells))
    return rows


def _features(prepared: Prepared) -> list[tuple[str, ...]]:
    """A row for each feature that the model reads, by what it is on."""
    m = prepared.manifest
    known = _known(prepared)
    rows: list[tuple[str, ...]] = []
    every: dict[str, tuple[IdField | NumberField, ...]] = {
        "context": (*m.context_ids, *m.context_numbers),
        "request": (*m.request_ids, *m.request_numbers),
        "item": (*m.item_ids, *m.item_numbers),
        "history": m.history,
    }
    for on, fields in every.items():
        for field in fields:
            declared = m.config["features"].get(field.name, {})
            values, often = "", ""
            if isinstance(field, IdField):
                values = f"{field.size - FIRST:,}" if field.size else ""
                often = "" if "bins" in declared else _frequent(prepared, field.name)
            else:
                often = f"{field.mean:.4g} ± {field.std:.3g}"
            share = known.get((on, field.name))
            shown = "" if share is None else f"{share:.1%}"
            rows.append((field.name, on, declared.get("kind", ""), values, shown, often))
    return rows


def _frequent(prepared: Prepared, feature: str) -> str:
    if not prepared.has_vocabulary(feature):
        return ""
    table = prepared.vocabulary(feature).slice(0, _EXAMPLES).to_pylist()
    return ", ".join(f"{(r['value'] or 'missing')[:40]} ({r['count']:,})" for r in table)


def _known(prepared: Prepared) -> dict[tuple[str, str], float]:
    """{(on, feature): share of cells that are not missing} of the features that are looked up.

    Of the items' features: a share of the catalogue. Of others: of training examples or of the
    events in their histories, in the first of the randomly ordered blocks.
    """
    m, hits = prepared.manifest, dict[tuple[str, str], list[int]]()

    def add(on: str, field: IdField, ids: np.ndarray) -> None:
        ids = ids.reshape(-1, field.slots)
        there = ((ids != 0) & ((ids != field.missing) | (field.missing == 0))).any(1)
        pair = hits.setdefault((on, field.name), [0, 0])
        pair[0] += int(there.sum())
        pair[1] += len(there)

    items, start = prepared.catalogue()["ids"][FIRST:], 0
    for field in m.item_ids:
        add("item", field, items[:, start : start + field.slots])
        start += field.slots
    for _, block in zip(range(_BLOCKS), prepared.blocks("train"), strict=False):
        for field in m.context_ids:
            add("context", field, block[f"context_{field.name}"])
        real = block["row"] >= 0
        for field in m.request_ids:
            ids = block[f"request_{field.name}"].reshape(*real.shape, field.slots)
            add("request", field, ids[real])
        events = block.get("event_item", real) != 0
        for field in m.history:
            ids = block[f"event_{field.name}"].reshape(*events.shape, field.slots)
            add("history", field, ids[events])
    return {pair: n / total for pair, (n, total) in hits.items() if total}
