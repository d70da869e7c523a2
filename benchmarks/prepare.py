"""How many events a second does preparation take, in how much memory, beside pandas?

A generated log (user, item, behaviour, time; 1 % repeated lines) goes from CSV to histories
of 50 as Parquet: repeats out, 5-core, leave-one-out, ids. Both at 5 million events, ours at 50
million too. Memory is the peak of the process and its children, in MiB: `rss` counts mapped files,
which the system may drop at any time, `anonymous` does not.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

BEHAVIOURS = ("view", "favourite", "cart", "purchase")
HISTORY = 50
SLICE = 1_000_000  # events that are generated at a time


def answer(
    quick: bool, events: int = 50_000_000, folder: Path | None = None
) -> list[dict[str, Any]]:
    """A row a job; `folder` receives everything, 10 GB of it for 50 million events."""
    compared, events = (200_000, 1_000_000) if quick else (min(events, 5_000_000), events)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=folder) as work:
        for count, jobs in ((compared, (_ours, _pandas)), (events, (_ours,))):
            if results and count == compared:
                break
            log = Path(work) / "events.csv"
            generate(log, count)
            for job in jobs:
                name = f"{'mtrec_jax' if job is _ours else 'pandas'} {count / 1e6:g} M"
                results.append({"task": name} | _watched(job, log, count))
                shutil.rmtree(Path(work) / "out", ignore_errors=True)
    return results


def generate(path: Path, count: int) -> None:
    """Write a log of `count` events: how often users and items occur is log-normal."""
    rng = np.random.default_rng(0)
    users = _drawn(rng, max(count // 50, 1), count, spread=1.5)
    items = _drawn(rng, min(max(count // 100, 1), 500_000), count, spread=2.0)
    texts = [(name, pa.string()) for name in ("user", "item", "behaviour")]
    schema = pa.schema([*texts, ("time", pa.int64())])
    with pyarrow.csv.CSVWriter(path, schema) as writer:
        for start in range(0, count, SLICE):
            n = min(SLICE, count - start)
            columns = [
                _names("user", users[start : start + n]),
                _names("item", items[start : start + n]),
                pa.array(BEHAVIOURS).take(pa.array(np.minimum(rng.geometric(0.6, n) - 1, 3))),
                pa.array(rng.integers(1_700_000_000, 1_731_536_000, n)),
            ]
            row = np.arange(n)
            row[rng.random(n) < 0.01] -= 1
            table = pa.Table.from_arrays(columns, schema=schema)
            writer.write_table(table.take(pa.array(np.maximum(row, 0))))


def _drawn(rng: np.random.Generator, kinds: int, count: int, spread: float) -> np.ndarray:
    """`count` numbers below `kinds`, of very different frequency."""
    weight = rng.lognormal(sigma=spread, size=kinds)
    times = rng.poisson(count * weight / weight.sum())
    drawn = np.repeat(np.arange(kinds, dtype=np.int32), times)
    rng.shuffle(drawn)
    return np.resize(drawn, count)


def _names(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pc.binary_join_element_wise(prefix, pa.array(numbers).cast(pa.string()), "")


def _watched(job: Callable[[Path, Path], int], log: Path, count: int) -> dict[str, Any]:
    """Run a job in a fresh process, and look at its memory five times a second."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_timed, args=(job, log, log.with_name("out"), sender))
    process.start()
    peak = {"rss": 0, "anonymous": 0}
    while not receiver.poll(0.2):
        if not process.is_alive():
            raise RuntimeError(f"{job.__name__} ended with status {process.exitcode}")
        for name, value in _memory(psutil.Process(process.pid)).items():
            peak[name] = max(peak[name], value)
    seconds, processor, examples = receiver.recv()
    process.join()
    return {
        "rows/s": round(count / seconds),
        "seconds": round(seconds, 1),
        "processor s": round(processor, 1),
        "examples": examples,
        **{f"{name} MiB": value >> 20 for name, value in peak.items()},
    }


def _memory(process: psutil.Process) -> dict[str, int]:
    """Bytes that a process and its children hold now."""
    found = {"rss": 0, "anonymous": 0}
    for one in (process, *process.children(recursive=True)):
        try:
            rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        kilobytes = {w[0]: int(w[1]) for w in map(str.split, rollup.splitlines()[1:])}
        found["rss"] += kilobytes["Rss:"] << 10
        found["anonymous"] += kilobytes["Anonymous:"] << 10
    return found


def _timed(job: Callable[[Path, Path], int], log: Path, out: Path, sender: Connection) -> None:
    started, processor = time.perf_counter(), time.process_time()
    examples = job(log, out)
    sender.send((time.perf_counter() - started, time.process_time() - processor, examples))


def _ours(log: Path, out: Path) -> int:
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.experiments import parse_experiment

    experiment = parse_experiment(
        {
            "name": "generated",
            "data": {
                "user": "user",
                "item": "item",
                "time": "time",
                "history_length": HISTORY,
                "events": {"files": [log.name]},
            },
            "clean": {"min_user_events": 5, "min_item_events": 5},
            "features": {"behaviour": {"on": "history"}},
            "tasks": {
                "next_item": {"kind": "retrieval"},
                "buy": {"kind": "binary", "column": "behaviour", "equals": "purchase"},
            },
            "train": {"steps": 1},
        }
    )
    return sum(prepare(experiment, log.parent, out).manifest.examples.values())


def _pandas(log: Path, out: Path) -> int:
    out.mkdir()
    events = pd.read_csv(log, engine="pyarrow").drop_duplicates()
    for name in ("user", "item", "behaviour"):
        events[name] = pd.factorize(events[name])[0].astype(np.int32)
    count = 0
    while count != len(events):
        count = len(events)
        for name in ("user", "item"):
            events = events[events.groupby(name)[name].transform("size") >= 5]
    events = events.sort_values(["user", "time"], kind="stable", ignore_index=True)
    after = events.groupby("user").cumcount(ascending=False)
    split = np.minimum(after.to_numpy(), 2)  # 0 test, 1 validation, 2 train
    ids = events.loc[split == 2, "item"].value_counts().index
    events["item"] = pd.Series(np.arange(len(ids)) + 2, ids).reindex(events["item"]).to_numpy()
    events["item"] = events["item"].fillna(1).astype(np.int32)
    first = events["user"].drop_duplicates().index.to_numpy()
    begins = first[np.searchsorted(first, events.index, side="right") - 1]
    examples = 0
    for part, name in enumerate(("test", "validation", "train")):
        targets = np.flatnonzero(split == part)
        size = HISTORY if name == "train" else 1
        last = targets[(after.to_numpy()[targets] - part) % size == 0]
        order = np.random.default_rng(0).permutation(len(last))
        _write_histories(out / f"{name}.parquet", events, begins, last[order], size)
        examples += len(last)
    return examples


def _write_histories(
    path: Path, events: pd.DataFrame, begins: np.ndarray, last: np.ndarray, size: int
) -> None:
    """One row an example: up to `size` targets that end at `last`, and the 50 events before it."""

    def lists(column: str, place: np.ndarray, start: np.ndarray) -> pa.Array:
        values = np.where(place >= start[:, None], events[column].to_numpy()[place], 0)
        return pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])

    writer = None
    for begin in range(0, len(last), 1 << 16):
        chosen = last[begin : begin + (1 << 16)]
        start = begins[chosen]
        target = chosen[:, None] - np.arange(size)[::-1]
        seen = chosen[:, None] - 1 - np.arange(HISTORY)[::-1]
        table = pa.table(
            {
                "user": events["user"].to_numpy()[chosen],
                "event_item": lists("item", seen, start),
                "event_behaviour": lists("behaviour", seen, start),
                "candidate": lists("item", target, start),
                "behaviour": lists("behaviour", target, start),
                "time": lists("time", target, start),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()
