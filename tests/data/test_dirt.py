"""Known dirt in a clean log: each kind is counted exactly, quarantined with its line, and gone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import SPLITS, Prepared
from mtrec_jax.data.prepare import prepare
from mtrec_jax.experiments import parse_experiment

HEADER = "user,item,time,rating,price,dwell"
DAY = 86_400
START = 1_700_000_000 // DAY * DAY
FEW, MANY, NOT_UTF8 = "too few cells", "too many cells", "not UTF-8"
NUL, LARGE = "NUL byte", "cell too large"
OPEN = "unclosed quote (text over several lines needs Parquet or JSON lines)"
CORE = "outside the core (clean.min_user_events = 3, clean.min_item_events = 3)"
BOT = "bot: more than 20 events a day"


def experiment() -> Experiment:
    return parse_experiment(
        {
            "name": "dirt",
            "data": {
                "events": {"files": ["log.csv"]},
                "user": "user",
                "item": "item",
                "time": "time",
                "history_length": 8,
            },
            "clean": {
                "earliest": "2020-01-01",
                "latest": "2024-12-31T23:59",
                "max_user_events_a_day": 20,
                "min_user_events": 3,
                "min_item_events": 3,
                "max_bad_fraction": 0.5,
                "values": {
                    "stars": {"valid": "1 <= rating <= 5 or rating == -7", "column": "rating"},
                    "unlikely stars": {"column": "rating", "low": -5, "action": "missing"},
                    "paid and left": {"valid": "not (price > 90 and dwell < 1)"},
                    "price": {"column": "price", "low": 0, "high": 500},
                    "expensive": {"column": "price", "bounds": "quantiles", "high": 0.95},
                    "long": {"column": "dwell", "bounds": "mad", "deviations": 5.5},
                },
            },
            "features": {"rating": {"on": "history"}, "price": {"on": "history", "kind": "binned"}},
            "tasks": {"next": {"kind": "retrieval"}, "rating": {"kind": "regression"}},
            "train": {"epochs": 1},
        }
    )


def clean_lines(rng: np.random.Generator) -> list[bytes]:
    """40 users with 40 events each, a few a day; one price in ten is the highest, 100."""
    lines = []
    for user in range(40):
        days = np.sort(rng.integers(0, 60, 40))
        for n, day in enumerate(days):
            seconds = START + int(day) * DAY + n * 60 + user
            price = 100 if rng.random() < 0.1 else int(rng.integers(1, 100))
            dwell = round(float(np.clip(rng.normal(60, 10), 25, 95)), 2)
            stars = int(rng.integers(1, 6))
            lines.append(f"u{user:02},i{rng.integers(30):02},{seconds},{stars},{price},{dwell}")
    return [line.encode() for line in lines]


def dirt() -> list[tuple[str, bytes]]:
    """(reason, line) of rows that are wrong by themselves."""
    time, cells = START + 5, "3,50,60"
    found = {
        f"malformed line ({FEW})": ["u01,i01,1700000000", "u01,i01", "u01"],
        f"malformed line ({MANY})": [f"u01,i01,{time},{cells},9", f"u01,i01,{time},{cells},,,"],
        f"malformed line ({NUL})": [f"u01,i\x0001,{time},{cells}"],
        f"malformed line ({OPEN})": [f'u01,"i01,{time},{cells}'],
        f"malformed line ({LARGE})": [f"u01,{'i' * (1 << 21)},{time},{cells}"],
        "missing user": [
            f",i01,{time},{cells}",
            f"  ,i01,{time},{cells}",
            f'"",i01,{time},{cells}',
        ],
        "missing item": [f"u01,,{time},{cells}"],
        "missing time": [f"u01,i01,,{cells}"],
        "malformed time": [
            f"u01,i01,yesterday,{cells}",
            f"u01,i01,2024-13-45,{cells}",
            f"u01,i01,12:30,{cells}",
        ],
        "time before clean.earliest": [f"u01,i01,0,{cells}", f"u01,i01,1999-12-31,{cells}"],
        "time after clean.latest": [
            f"u01,i01,1700000000000,{cells}",
            f"u01,i01,2031-01-01,{cells}",
        ],
        "malformed label of rating": [
            f"u01,i01,{time},{bad},50,60" for bad in ("five", "inf", "nan", "1e99", "3;5", "0x3")
        ],
        "values: stars": [f"u01,i01,{time},{bad},50,60" for bad in ("0", "6", "5.5", "-1")],
        "values: paid and left": [f"u01,i01,{time},3,95,0.5"],
        "values: price": [f"u01,i01,{time},3,{bad},60" for bad in ("-1", "501", "1e9")],
        "values: expensive": [f"u01,i01,{time},3,{bad},60" for bad in ("101", "400")],
        "values: long": [f"u01,i01,{time},3,50,{bad}" for bad in ("900", "0", "7200")],
    }
    rows = [(reason, line.encode()) for reason, lines in found.items() for line in lines]
    return [
        *rows,
        (f"malformed line ({NOT_UTF8})", f"u01,i\xe901,{time},{cells}".encode("latin-1")),
    ]


def crowds(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    """(reason, line) of rows that are wrong as a group: a bot, a rare user and a rare item."""
    bot = [f"bot,i{n % 30:02},{START + n},3,50,60" for n in range(25)]
    rare = [f"rare,i{n:02},{START + n * DAY},3,50,60" for n in range(2)]
    rare += [f"u{n:02},rare,{START + 70 * DAY},3,50,60" for n in range(2)]
    return [(BOT, line.encode()) for line in bot] + [(CORE, line.encode()) for line in rare]


def mixed() -> tuple[list[bytes], list[bytes], list[str], int]:
    """Clean lines, dirty lines, the reason of each dirty line ("": none), values taken away."""
    rng = np.random.default_rng(0)
    clean = clean_lines(rng)
    taken = rng.choice(len(clean), 12, replace=False)
    dirty = [(line, "") for line in clean]
    for n in taken:  # a value that is taken away is the same as none
        cells = clean[n].split(b",")
        clean[n] = b",".join([*cells[:3], b"", *cells[4:]])
        dirty[n] = (b",".join([*cells[:3], b"-7", *cells[4:]]), "")
    untouched = np.setdiff1d(np.arange(len(clean)), taken)
    for n in sorted(rng.choice(untouched, 20, replace=False))[::-1]:
        cells = dirty[n][0].split(b",")
        again = [dirty[n][0], b" , ".join(cells), b",".join(b'"%s"' % cell for cell in cells)]
        after = int(rng.integers(n + 1, len(clean) + 1))
        dirty.insert(after, (again[n % 3], "duplicate row"))
    for reason, line in [*dirt(), *crowds(rng)]:
        dirty.insert(int(rng.integers(len(dirty) + 1)), (line, reason))
    for _ in range(5):
        dirty.insert(int(rng.integers(len(dirty) + 1)), (b"   ", "blank"))
    return clean, [line for line, _ in dirty], [reason for _, reason in dirty], len(taken)


def run(folder: Path, lines: list[bytes], end: bytes) -> Prepared:
    folder.mkdir()
    (folder / "log.csv").write_bytes(end.join([HEADER.encode(), *lines, b""]))
    return prepare(experiment(), folder, folder / "out")


def test_dirt_is_counted_quarantined_and_gone(tmp_path: Path) -> None:
    clean, dirty, reasons, taken = mixed()
    expected = run(tmp_path / "clean", clean, b"\n")
    found = run(tmp_path / "dirty", dirty, b"\r\n")

    counts = Counter(reason for reason in reasons if reason not in ("", "blank"))
    report = {rule.rule.removeprefix("events: "): rule.rows for rule in found.manifest.report}
    assert {reason: report.get(reason) for reason in counts if reason != CORE} == {
        reason: n for reason, n in counts.items() if reason != CORE
    }
    limits = CORE.removeprefix("outside the core ")
    assert report[f"users removed {limits}"] == 1
    assert report[f"items removed {limits}"] == 1
    assert report[f"events removed {limits}"] == 4
    assert report["values: unlikely stars (rating set to missing)"] == taken
    assert report["users removed as bots"] == 1
    assert report["rows read"] == len(dirty) - reasons.count("blank")

    # exactly the dirty rows are in quarantine, each with its line (the header is line 1)
    table = pq.read_table(found.folder / "quarantine.parquet")
    wanted = [(row + 2, r) for row, r in enumerate(reasons) if r not in ("", "blank")]
    assert list(zip(table["line"].to_pylist(), table["reason"].to_pylist(), strict=True)) == wanted
    assert set(table["file"].to_pylist()) == {"log.csv"}
    assert found.manifest.quarantined == len(wanted)
    assert expected.manifest.quarantined == 0

    # what remains is the clean log, bit by bit; only the numbers of the rows have moved
    moved = np.flatnonzero(np.array(reasons) == "")
    for split in SPLITS:
        a, b = (pq.read_table(p.folder / f"{split}.parquet") for p in (expected, found))
        rows = np.asarray(a["row"].combine_chunks().flatten())
        rows = np.where(rows >= 0, moved[rows], -1)
        assert np.array_equal(rows, np.asarray(b["row"].combine_chunks().flatten()))
        assert same(a.drop_columns("row"), b.drop_columns("row"))
    for name in ("items", "users", "vocabularies/rating", "vocabularies/price"):
        a, b = (pq.read_table(p.folder / f"{name}.parquet") for p in (expected, found))
        assert same(a, b)


def same(a: pa.Table, b: pa.Table) -> bool:
    """Equal bytes of equal columns, NaN included."""

    def buffers(table: pa.Table) -> list[bytes]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        return [sink.getvalue().to_pybytes()]

    return a.schema.equals(b.schema) and buffers(a) == buffers(b)
