#!/usr/bin/env bash
# jax 0.10.2, optax 0.2.8, CPU: a jitted step of optax.adam with an all-finite check over 100 small
# arrays compiles to several times as many HLO instructions as the same over optax.flatten, which
# sees one vector, and takes far longer to compile. Nothing merges the arrays: XLA makes a fusion of
# its own for each. Seen: 68,329 instructions against 23,484, 32 seconds of processor time against 12.7.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jax==0.10.2 jaxlib==0.10.2 optax==0.2.8
"$work/venv/bin/python" - <<'PY'
import time

import jax
import jax.numpy as jnp
import optax

params = {f"w{i}": jnp.ones((8 + i % 7, 16)) for i in range(100)}


def compiled(optimizer):
    @jax.jit
    def step(params, state, grads):
        updates, after = optimizer.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]))
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), (new, after), (params, state))

    lowered = step.lower(params, optimizer.init(params), params)
    start = time.process_time()
    text = lowered.compile().as_text()
    return sum(" = " in line for line in text.splitlines()), time.process_time() - start


each, seconds_each = compiled(optax.adam(1e-3))
flat, seconds_flat = compiled(optax.flatten(optax.adam(1e-3)))
print(f"instructions: {each} by array, {flat} as one vector")
print(f"compilation, processor seconds: {seconds_each:.1f} and {seconds_flat:.1f}")
assert each > 2 * flat, "the arrays are merged now"
PY
