"""DuckDB and Spark prepare equal folders from the same raw files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.engines import differences
from mtrec_jax.data.prepare import prepare
from mtrec_jax.data.shop import generate
from mtrec_jax.experiments import load_experiment

pytest.importorskip("pyspark", reason="PySpark is not installed: pip install 'mtrec_jax[spark]'")

SETTINGS = [
    "clean.min_user_events=5",
    "clean.max_user_events_a_day=12",
    "split.kind=user_ratio",
    "data.derive.liked=stars >= 4 and not is_missing(stars)",
    "clean.values.cheap.valid=p_click > 0.02",
    "features.liked.on=history",
    "features.weekday.on=history",
    "features.weekday.kind=weekday",
    "features.gap.on=history",
    "features.gap.kind=gap",
    "features.seen.on=history",
    "features.seen.kind=past_count",
    "features.seen.column=item",
    "features.clicked.on=request",
    "features.clicked.kind=past_rate",
    "features.clicked.column=item",
    "features.clicked.label=click",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.slow
def test_duckdb_and_spark_prepare_equal_folders(tmp_path: Path) -> None:
    generate(tmp_path, seed=3, users=80, items=90, impressions=30, social=True)
    with (tmp_path / "events.csv").open("a") as file:
        file.write("u00001,,5,1,,,,.5,,\nu00001,i0001,yesterday,1,,,,.5,,\nbroken\n")
    experiment = load_experiment("shop-social", SETTINGS)
    for engine in ("duckdb", "spark"):
        prepare(
            experiment,
            tmp_path,
            tmp_path / engine,
            engine="duckdb" if engine == "duckdb" else "spark",
            memory="1GB",
            master="local[2]",
        )
    tables, differ = differences(tmp_path / "duckdb", tmp_path / "spark")
    assert not differ
    assert tables > 15
    (tmp_path / "spark" / "quarantine.parquet").write_bytes(
        (tmp_path / "spark" / "items.parquet").read_bytes()
    )
    assert differences(tmp_path / "duckdb", tmp_path / "spark")[1] == ["quarantine.parquet"]
