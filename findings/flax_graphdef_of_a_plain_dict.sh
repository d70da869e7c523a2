#!/usr/bin/env bash
# flax 0.12.8, jax 0.10.2: an nnx.Module may have a plain dict of static values as an attribute. It
# is built, split, merged and called under nnx.jit without a word, but the GraphDef that nnx.split
# returns cannot be hashed ("unhashable type: 'dict'"), so it is no static argument of jax.jit and no
# key of a cache, which is what a GraphDef is for. The same values in nnx.Dict or in a tuple of pairs
# can be. Seen: nnx.jit gives (1, 2); jax.jit with the GraphDef static raises ValueError.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet flax==0.12.8 jax==0.10.2 jaxlib==0.10.2
cat > "$work/graphdef.py" <<'PY'
import jax
import numpy as np
from flax import nnx


class Head(nnx.Module):
    def __init__(self, sizes):
        self.layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        self.sizes = sizes


def static_call(module):
    graph, state = nnx.split(module)
    return jax.jit(lambda g, s, x: nnx.merge(g, s).layer(x), static_argnums=0)(graph, state, x)


x = np.ones((1, 2))
for kept in (nnx.Dict(wide=2), (("wide", 2),)):
    assert static_call(Head(kept)).shape == (1, 2)
plain = Head({"wide": 2})
assert nnx.merge(*nnx.split(plain)).sizes == {"wide": 2}
print("nnx.jit:", nnx.jit(lambda m, x: m.layer(x))(plain, x).shape)
try:
    hash(nnx.split(plain)[0])
except TypeError as error:
    print("hash:", error)
else:
    raise SystemExit("a plain dict can be hashed now")
try:
    static_call(plain)
except ValueError as error:
    print("jax.jit:", str(error).splitlines()[0][:52])
else:
    raise SystemExit("it can be static now")
PY
"$work/venv/bin/python" "$work/graphdef.py"
