#!/usr/bin/env bash
# pyarrow 26.0.1, pandas 3.1.1: where pandas is installed, PyArrow imports it with the first value it
# makes, even pyarrow.scalar(1) or pyarrow.array([1, 2]), so that a command which uses no pandas
# starts later by its import (0.2 to 0.3 s seen). Files do not: ParquetFile(...).read() and
# csv.read_csv import none; parquet.read_table does, as pyarrow.dataset makes a scalar when it is
# imported. Seen: True for scalar, array, table and read_table; False for ParquetFile and read_csv.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyarrow==26.0.1 pandas==3.1.1
cd "$work"
printf 'a\n1\n' > log.csv
"$work/venv/bin/python" - <<'PY'
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet

pyarrow.parquet.write_table(pa.table({"a": [1]}), "log.parquet")
CALLS = {
    "pyarrow.scalar(1)": True,
    "pyarrow.array([1, 2])": True,
    "pyarrow.table({'a': [1]})": True,
    "pyarrow.parquet.read_table('log.parquet')": True,
    "pyarrow.parquet.ParquetFile('log.parquet').read()": False,
    "pyarrow.csv.read_csv('log.csv')": False,
}
for call, expected in CALLS.items():
    code = (
        "import sys, pyarrow.parquet, pyarrow.csv\n"
        f"assert 'pandas' not in sys.modules\n{call}\nprint('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    print(f"{call}: {done.stdout.strip()}")
    if done.stdout.strip() != str(expected):
        raise SystemExit(f"{call} is otherwise now")
PY
