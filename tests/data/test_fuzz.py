"""Damaged files through the whole preparation: data that can be read, or an error with a remedy.

The suite takes a sample. All 2,000 files: `MTREC_FUZZ=2000 pytest -q tests/data/test_fuzz.py`.
"""

from __future__ import annotations

import contextlib
import gzip
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.config import Experiment, Files
from mtrec_jax.data.dataset import SPLITS, open_prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.data.prepare import prepare
from mtrec_jax.data.read import stage
from mtrec_jax.errors import DataError, Error
from mtrec_jax.experiments import parse_experiment
from tests.disks import small_disk

SAMPLES = int(os.environ.get("MTREC_FUZZ", "8"))
COLUMNS = ("user", "item", "rating", "kind", "price", "time")
Random = np.random.Generator


def log(random: Random, rows: int = 60) -> str:
    lines = [",".join(COLUMNS)]
    for n in range(rows):
        user, item, price = random.integers(8), random.integers(12), random.integers(1, 999) / 10
        kind = ("view", "cart", "buy")[random.integers(3)]
        lines.append(f"u{user},i{item},{random.integers(1, 6)},{kind},{price},{1_700_000_000 + n}")
    return "\n".join(lines) + "\n"


def experiment(random: Random, form: str, name: str, items: str = "") -> Experiment:
    """One of the shapes an experiment may have, over the columns of the log."""
    kinds = ("leave_one_out", "time", "user_ratio", "random", "folds", "user_holdout")
    sections: dict[str, Any] = {
        "name": "fuzz",
        "tasks": {
            "next": {"kind": "retrieval"},
            "like": {"kind": "binary", "column": "rating", "at_least": 4},
            "cost": {"kind": "regression", "column": "price"},
        },
        "features": {
            "kind": {"on": "history", "min_count": 2},
            "price": {"on": "history", "kind": "binned", "bins": 4},
        },
        "clean": {"max_bad_fraction": float(random.choice([0.01, 0.9, 1.0]))},
        "split": {"kind": str(random.choice(kinds))},
        "train": {"epochs": 1},
    }
    data: dict[str, Any] = {
        "events": {"files": [name], "format": form},
        "user": "user",
        "item": "item",
        "time": "time",
        "history_length": 5,
    }
    if random.random() < 0.3:
        sections["clean"] |= {
            "min_user_events": 2,
            "latest": "now",
            "max_user_events_a_day": 50,
            "values": {"price": {"column": "price", "bounds": "mad"}, "ok": {"valid": "price > 0"}},
        }
        data["derive"] = {"cheap": "price < 20"}
    if random.random() < 0.3:
        data |= {"history_length": 0}
        sections |= {"model": {"encoder": "none"}, "split": {"kind": "random"}}
        del sections["tasks"]["next"]
        sections["features"] = {
            "kind": {"on": "request", "kind": "hashed", "buckets": 8},
            "user": {"min_count": 2},
            "price": {"on": "request", "kind": "numeric", "scale": "log", "impute": "median"},
        }
        sections["tasks"]["cost"] = {"kind": "multiclass", "column": "item"}
    if items:
        data |= {"items": {"files": [items]}, "title": "title"}
        sections["features"] |= {
            "genre": {"on": "item", "kind": "multi_valued"},
            "year": {"on": "item", "kind": "binned", "bins": 3},
        }
    return parse_experiment({**sections, "data": data})


ODD = (
    "inf", "-inf", "nan", "NaN", "1e400", "1e39", "-1e308", "1e-400", "0x1F", "1_000", "١٢", "1,5",
    "five", "1e", "--1", "9" * 400, "", " ", "NULL", "null", "None", "true", "\\N", "'; DROP",
    "%s", "{}", "\u202eabc", "e\u0301", "\ufeff", "🙂" * 9, "\x1b[31m", "a\u2028b", "\\", "`", "$1",
    "1e18", "-1e12", "9999-12-31", "0000-00-00", "2020-02-30", "2024-13-01T25:61:00", "292278-01",
    "2024-05-01T12:00:00+99:99", "-9223372036854775808", "9223372036854775808", "1700000000000",
)  # fmt: skip


def lines_of(data: bytes) -> list[bytes]:
    return data.split(b"\n")


def replace_cells(data: bytes, random: Random, share: float, cell: Callable[[], str]) -> bytes:
    lines = lines_of(data)
    for n in range(1, len(lines)):
        if lines[n] and random.random() < share:
            cells = lines[n].split(b",")
            cells[random.integers(len(cells))] = cell().encode("utf-8", "surrogatepass")
            lines[n] = b",".join(cells)
    return b"\n".join(lines)


def odd_cells(data: bytes, random: Random) -> bytes:
    return replace_cells(data, random, random.choice([0.05, 1.0]), lambda: str(random.choice(ODD)))


def odd_column(data: bytes, random: Random) -> bytes:
    """The same odd cell all the way down a column."""
    lines, odd = lines_of(data), str(random.choice(ODD)).encode()
    place = random.integers(len(COLUMNS))
    for n in range(1, len(lines) - 1):
        lines[n] = b",".join(odd if p == place else c for p, c in enumerate(lines[n].split(b",")))
    return b"\n".join(lines)


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.integers(len(data) + 1)]


def delimiter(data: bytes, random: Random) -> bytes:
    lines = lines_of(data)
    for n in range(int(random.integers(2)), len(lines)):
        lines[n] = lines[n].replace(b",", random.choice([b";", b"\t", b"|", b" ", b"::"]))
    return b"\n".join(lines)


def encodings(data: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return data.decode(errors="replace").encode(
            str(random.choice(["utf-16", "utf-32", "cp500"])), "replace"
        )
    return replace_cells(data, random, 0.2, lambda: "é\udce9"[random.integers(2) :])


def nul_bytes(data: bytes, random: Random) -> bytes:
    return insert(data, random, b"\0", 3)


def insert(data: bytes, random: Random, what: bytes, times: int) -> bytes:
    for _ in range(times):
        place = int(random.integers(len(data) + 1))
        data = data[:place] + what + data[place:]
    return data


def huge_field(data: bytes, random: Random) -> bytes:
    size = int(random.choice([1 << 16, 1 << 18, 1 << 22]))
    return insert(data, random, b"x" * size, 1)


def header(data: bytes, random: Random) -> bytes:
    first, _, rest = data.partition(b"\n")
    names = first.split(b",")
    kind = random.integers(6)
    if kind == 0:
        names[random.integers(len(names))] = names[0]  # twice
    elif kind == 1:
        names = [str(n).encode() for n in random.permutation([n.decode("latin1") for n in names])]
    elif kind == 2:
        names[random.integers(len(names))] = random.choice([b"", b"USER", b"_row", b'"', b"x\xff"])
    elif kind == 3:
        return rest
    elif kind == 4:
        names = names[:-1]
    else:
        names += [b"extra%d" % n for n in range(random.choice([1, 300, 20_000]))]
    return b",".join(names) + b"\n" + rest


def swapped(data: bytes, random: Random) -> bytes:
    lines = lines_of(data)
    for n in range(1, len(lines)):
        if random.random() < 0.5:
            lines[n] = b",".join(reversed(lines[n].split(b",")))
    return b"\n".join(lines)


def constant(data: bytes, random: Random) -> bytes:
    """Everything in a column is the same; or the rows are."""
    lines = lines_of(data)
    if random.random() < 0.3:
        return b"\n".join([lines[0], *lines[1:2] * len(lines), b""])
    place = random.integers(len(COLUMNS))
    first = [*lines[-1 if len(lines) < 2 else 1].split(b","), *[b""] * len(COLUMNS)][place]
    return b"\n".join(
        [lines[0], *(b",".join(first if p == place else c for p, c in enumerate(x.split(b",")))
        for x in lines[1:-1]), b""]
    )  # fmt: skip


def short(data: bytes, random: Random) -> bytes:
    kept = lines_of(data)[: random.integers(6)]
    return random.choice([b"", b"\n", b"\n\n\n", b"\n".join(kept)])


def quotes(data: bytes, random: Random) -> bytes:
    return insert(data, random, random.choice([b'"', b'""', b"'", b'"\n"']), 4)


def line_ends(data: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return data.replace(b"\n", random.choice([b"\r", b"\r\n", b"\n\n", b"\x0b", b"\r\r\n"]))
    return insert(data, random, random.choice([b"\r", b"\n", b"\x0c", b"\x1a", b"\x85"]), 5)


def flipped(data: bytes, random: Random) -> bytes:
    raw = np.frombuffer(data + b"\n", np.uint8).copy()
    places = random.integers(0, len(raw), int(random.choice([1, 5, 100])))
    raw[places] = random.integers(0, 256, len(places))
    return raw.tobytes()[:-1]


def unharmed(data: bytes, random: Random) -> bytes:
    return data


TEXT = (odd_cells, odd_column, cut, delimiter, encodings, nul_bytes, huge_field, header, swapped,
        constant, short, quotes, line_ends, flipped, unharmed)  # fmt: skip
BYTES = (cut, flipped, nul_bytes, short, unharmed)  # of packed and binary files


def as_format(data: bytes, form: str) -> bytes:
    """The CSV text in another format, as far as it can still be read as CSV."""
    if form in ("csv", "tsv"):
        return data if form == "csv" else data.replace(b",", b"\t")
    table = pa.csv.read_csv(pa.BufferReader(data))
    if form == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=20)
        return sink.getvalue().to_pybytes()
    return table.to_pandas().to_json(orient="records", lines=True).encode()


def sample(seed: int, folder: Path) -> Experiment:
    """Write one damaged file to `folder`; what is done to it depends on the seed alone."""
    random = np.random.default_rng(seed)
    data, form, name = log(random).encode(), "csv", "log.csv"
    damage = TEXT[seed % len(TEXT)]
    if seed % 7 == 6:  # the items, and not the events
        (folder / name).write_bytes(data)
        lines = (f"i{n},film {n},a b{n % 3},{1990 + n},," for n in range(12))
        items = "\n".join(["item,title,genre,year,x,y", *lines, ""]).encode()
        (folder / "items_log.csv").write_bytes(damage(items, random))
        return experiment(random, form, name, "items_log.csv")
    if random.random() < 0.7:
        data = damage(data, random)
        if random.random() < 0.3:
            data = TEXT[random.integers(len(TEXT))](data, random)
        if random.random() < 0.1:
            data, form = data.replace(b",", b"\t"), "tsv"
    else:
        form = str(random.choice(["tsv", "jsonl", "parquet"]))
        with contextlib.suppress(pa.ArrowException):
            data = as_format(odd_cells(data, random) if random.random() < 0.5 else data, form)
        data = BYTES[random.integers(len(BYTES))](data, random)
    if random.random() < 0.1:
        data, name = gzip.compress(data), "log.csv.gz"
        data = BYTES[random.integers(len(BYTES))](data, random)
    (folder / name).write_bytes(data)
    return experiment(random, form, name)


def outcome(made: Experiment, folder: Path, out: Path, tables: Any = None) -> str:
    """ "": prepared, and every batch can be read; else the text of the error."""
    before = {p.name for p in out.parent.iterdir()} | {"cleaned"}  # whole, and of use again
    try:
        prepare(made, folder, out, tables, memory="500MB")
    except Error as error:
        left = {p.name for p in out.parent.iterdir()}
        assert left | {"cleaned"} == before, "partial output"
        text = str(error)
        places = (
            "log.csv",
            "log",
            "events",
            "data.",
            "clean",
            "split",
            "task",
            "feature",
            "label",
            "disk",
        )
        assert any(place in text for place in places), text
        assert len(text) < 5000
        return text
    assert sorted(p.name for p in out.parent.iterdir()) == sorted({*before, out.name})
    prepared = open_prepared(out)
    for split in SPLITS:
        rows = [b["row"] for b in prepared.blocks(split)]
        assert sum(len(r) for r in rows) == prepared.manifest.examples[split]
        source = BatchSource(prepared, split, 8)
        for batch in (source[s] for s in range(len(source))):
            assert all(np.isfinite(np.asarray(v)).all() for v in batch.context.values())
            for name, mask in batch.mask.items():
                labels = np.asarray(batch.labels[name])[np.asarray(mask) > 0]
                assert np.isfinite(labels).all()
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SAMPLES))
def test_a_damaged_file_is_prepared_or_refused(seed: int, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "there").mkdir()
    made = sample(seed, tmp_path / "raw")
    outcome(made, tmp_path / "raw", tmp_path / "there" / "out")


@pytest.mark.slow
def test_the_sample_holds_both_outcomes(tmp_path: Path) -> None:
    """A preparation that refuses everything would pass the test above."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "log.csv").write_text(log(np.random.default_rng(0)))
    made = experiment(np.random.default_rng(1), "csv", "log.csv")
    assert not outcome(made, tmp_path / "raw", tmp_path / "out")
    (tmp_path / "raw" / "log.csv").unlink()
    (tmp_path / "raw" / "log.csv").mkdir()
    assert "is a folder" in outcome(made, tmp_path / "raw", tmp_path / "out2")


VALUE = st.one_of(st.none(), st.sampled_from(ODD), st.text(max_size=5), st.floats(), st.integers())


@pytest.mark.slow
@settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(*[VALUE] * len(COLUMNS)), min_size=1, max_size=20), st.integers(0, 99))
def test_any_values_in_memory(tmp_path: Path, rows: list[tuple[Any, ...]], seed: int) -> None:
    columns: dict[str, Any] = {}
    for name, cells in zip(COLUMNS, zip(*rows, strict=True), strict=True):
        try:
            columns[name] = pa.array(cells)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # mixed types
            texts = [None if c is None else str(c) for c in cells]
            columns[name] = pa.array([t and t.encode("utf-8", "replace") for t in texts]).cast(
                "string"
            )
    out = tmp_path / "there" / "out"
    out.parent.mkdir(exist_ok=True)
    made = experiment(np.random.default_rng(seed), "csv", "log.csv")
    outcome(made, None, out, {"events": pa.table(columns)})  # type: ignore[arg-type]


@pytest.mark.slow
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.one_of(st.binary(max_size=60), st.text(st.sampled_from('a,"\t\r\n[]{}:1é '), max_size=60)),
    st.sampled_from(["csv", "tsv", "jsonl", "parquet", "atomic"]),
    st.sampled_from(["", "::", "é"]),
)
def test_any_bytes_are_staged_or_refused(
    tmp_path: Path, content: bytes | str, form: Any, mark: str
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "log").write_bytes(data)
    files = Files(files=("log",), format=form, separator=mark if form == "csv" else "")
    try:
        staged = stage("events", files, tmp_path, None, 0, tmp_path / "work", "", ())
    except DataError:
        return
    rows = [r for part in staged.parts for r in pq.read_table(part)["_row"].to_pylist()]
    bad = pq.read_table(staged.malformed)["row"].to_pylist()
    assert len(rows) + len(bad) == staged.rows == len({*rows, *bad})
    assert all(0 <= row < staged.next_row for row in (*rows, *bad))
    assert len(bad) == staged.bad


@pytest.mark.slow
@pytest.mark.parametrize("size", ["8k", "64k", "160k", "240k", "360k", "4m"])
def test_a_full_disk_leaves_nothing_behind(size: str, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "log.csv").write_text(log(np.random.default_rng(0), rows=4000))
    made = experiment(np.random.default_rng(1), "csv", "log.csv")
    with small_disk(tmp_path / "disk", size) as disk:
        text = outcome(made, tmp_path / "raw", disk / "out")
        if size in ("8k", "64k"):
            assert "space" in text
            assert "disk" in text
