"""Do DuckDB and Spark prepare the same folder, table by table and value by value?

Raw files of public data sets are looked for under data/ (`mtrec data NAME` brings them); the shop
is generated. Both engines start from the same files on this machine.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

NAMES = ("shop", "census-income", "ml-1m")


def answer(quick: bool) -> list[dict[str, Any]]:
    """A row a data set: seconds of each engine, tables compared, and which of them differ."""
    from mtrec_jax.data.prepare import prepare
    from mtrec_jax.data.shop import generate
    from mtrec_jax.experiments import load_experiment

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES[:1] if quick else NAMES:
            experiment = load_experiment(name)
            raw = Path("data") / experiment.data.public
            if name == "shop":
                raw = Path(folder) / "raw"
                generate(raw)
            elif not raw.is_dir():
                results.append({"data": name, "answer": f"missing; run: mtrec data {name}"})
                continue
            seconds, out = {}, {}
            for engine in ("duckdb", "spark"):
                start = time.perf_counter()
                out[engine] = Path(folder) / f"{name}-{engine}"
                prepare(experiment, raw, out[engine], engine=engine)
                seconds[engine] = time.perf_counter() - start
            tables, differ = differences(out["duckdb"], out["spark"])
            results.append(
                {
                    "data": name,
                    "duckdb s": seconds["duckdb"],
                    "spark s": seconds["spark"],
                    "tables": tables,
                    "answer": f"different: {', '.join(differ)}" if differ else "equal",
                }
            )
    return results


def differences(one: Path, other: Path) -> tuple[int, list[str]]:
    """How many tables two prepared folders have, and the names of those that are not equal."""
    from mtrec_jax.data.dataset import open_prepared

    manifests = [dataclasses.asdict(open_prepared(folder).manifest) for folder in (one, other)]
    differ = ["manifest.json"] if manifests[0] != manifests[1] else []
    names = [{p.relative_to(f) for p in f.rglob("*.parquet")} for f in (one, other)]
    for name in sorted(names[0] | names[1]):
        both = name in names[0] and name in names[1]
        if not both or not _equal(pq.read_table(one / name), pq.read_table(other / name)):
            differ.append(str(name))
    return len(names[0] | names[1]), differ


def _equal(one: Any, other: Any) -> bool:
    """Equal columns of equal types and values; NaN is equal to NaN."""
    if one.schema != other.schema or len(one) != len(other):
        return False
    for name in one.column_names:
        a, b = one[name].combine_chunks(), other[name].combine_chunks()
        if a.equals(b):
            continue
        x, y = (np.asarray(c.flatten() if hasattr(c, "flatten") else c) for c in (a, b))
        if x.dtype.kind != "f" or not np.array_equal(x, y, equal_nan=True):
            return False
    return True
