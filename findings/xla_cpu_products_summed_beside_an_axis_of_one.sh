#!/usr/bin/env bash
# jax 0.10.2, jaxlib 0.10.2, CPU: the sum of a product, (a * b).sum(0), of float32 [8192, 1, 132]
# takes some thirty times as long as that of [8192, 132], the same numbers in the same order. So does
# (a * b).sum(-1), and so does [1, 8192, 132]; the sum of a alone does not. What is slow are the
# fusions that XLA hands to YNNPACK, which it does by default: without them, with the flag
# --xla_cpu_experimental_ynn_fusion_type= (empty), both shapes take alike. Seen on two threads of an
# AMD EPYC, ms: 8.7 against .24, and .59 against .57 without. The backward pass of a layer norm over
# [batch, 1, features] has four such sums, and lost a third of a training step to them; reshaping
# to a matrix before it and back behind it is the cure.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2
cat > "$work/sums.py" <<'PY'
import sys
import time

import jax
import jax.numpy as jnp


def fastest(array):
    program = jax.jit(lambda a, b: (a * b).sum(0))
    times = []
    for _ in range(50):
        start = time.perf_counter()
        jax.block_until_ready(program(array, array))
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


matrix = jnp.ones((8192, 132))
flat, between = fastest(matrix), fastest(matrix[:, None])
print(f"{sys.argv[1]}: {flat:.2f} ms as a matrix, {between:.2f} ms with an axis of one between")
if sys.argv[1] == "by default":
    assert between > 5 * flat, "the axis of one costs little now"
else:
    assert between < 4 * flat, "the axis of one costs much without these fusions, too"
PY
unset XLA_FLAGS
"$work/venv/bin/python" "$work/sums.py" "by default"
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= "$work/venv/bin/python" "$work/sums.py" "without"
