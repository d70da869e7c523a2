"""The engines, for tests of single expressions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mtrec_jax.data.engine import Engine, open_engine


@pytest.fixture
def duckdb(tmp_path: Path) -> Iterator[Engine]:
    """DuckDB with an empty working folder."""
    with open_engine(tmp_path / "duckdb", memory="500MB") as opened:
        yield opened


@pytest.fixture(scope="module")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Spark on two threads of this machine; tests that use it are left out where it is missing."""
    pytest.importorskip("pyspark", reason="Spark comes with: pip install 'mtrec_jax[spark]'")
    with open_engine(tmp_path_factory.mktemp("spark"), "spark", "1GB", "local[2]") as opened:
        opened.backend.raw_sql("SET spark.sql.shuffle.partitions = 2")
        yield opened
