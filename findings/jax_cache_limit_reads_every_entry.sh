#!/usr/bin/env bash
# jax 0.10.2 (CPU): with jax_compilation_cache_max_size set, each program that is stored first reads
# the access time of every program that is there, however far the limit is: to keep n programs takes
# n (n - 1) / 2 reads, all under one lock of the folder. Tests that compile tiny programs took
# several times as long beside some thousand kept ones. Without the limit nothing is read.
# Seen: 120 programs, 7140 reads of access times with a limit of 4 GiB, 0 without one.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 filelock
cd "$work"
cat > programs.py <<'PY'
import os
import sys

import jax

reads = 0


def count(event, arguments):
    global reads
    path = str(arguments[0]) if event == "open" else ""
    reads += path.endswith("-atime") and "r" in str(arguments[1])


jax.config.update("jax_compilation_cache_dir", os.path.abspath("kept-" + sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_compilation_cache_max_size", int(sys.argv[1]))
sys.addaudithook(count)
for n in range(120):
    jax.jit(lambda: n + 0.5).lower().compile()
kept = sum(name.endswith("-cache") for name in os.listdir("kept-" + sys.argv[1]))
print(kept, "programs,", reads, "reads of access times")
PY
for limit in 4294967296 -1; do
  expected="120 programs, $([ "$limit" = -1 ] && echo 0 || echo 7140) reads of access times"
  found="$(JAX_PLATFORMS=cpu "$work/venv/bin/python" programs.py "$limit")"
  echo "limit $limit: $found"
  [ "$found" = "$expected" ] || { echo "it is otherwise now"; exit 1; }
done
