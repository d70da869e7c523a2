"""Equal layers one above the other, side by side in the program or as a loop over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Apply = Callable[[Any, jax.Array, "jax.Array | None"], jax.Array]  # layer, x, key -> x


def split(key: jax.Array | None, layers: int) -> tuple[jax.Array | None, jax.Array | None]:
    """A key for the inputs and those of so many layers; None stays None."""
    if key is None:
        return None, None
    keys = jax.random.split(key, layers + 1)
    return keys[0], keys[1:]


class Stack(nnx.Module):
    """Layers whose parameters have the same shapes.

    With `deep`, the parameters of all layers stand in one array each, [layers, ...], and the
    program is a loop that keeps the input of each layer and makes all else again on the way back:
    compile time does not grow with the layers, nor does memory but by these inputs.
    """

    def __init__(self, layers: Sequence[nnx.Module], deep: bool):
        self.count, self.deep = len(layers), deep
        if not deep:
            self.layers = nnx.List(list(layers))
            return
        graph = nnx.split(layers[0])[0]
        states = [nnx.split(layer)[1] for layer in layers]
        self.loop = nnx.merge(graph, jax.tree.map(lambda *parts: jnp.stack(parts), *states))

    def __call__(self, x: jax.Array, keys: jax.Array | None, apply: Apply) -> jax.Array:
        """x through `apply` of each layer, with a key of `keys` [layers] each, if there are any."""
        if not self.deep:
            for number, layer in enumerate(self.layers):
                x = apply(layer, x, None if keys is None else keys[number])
            return x
        graph, parameters = nnx.split(self.loop)

        @jax.checkpoint
        def one(x: jax.Array, given: tuple[Any, jax.Array | None]) -> tuple[jax.Array, None]:
            own, key = given
            return apply(nnx.merge(graph, own), x, key), None

        return jax.lax.scan(one, x, (parameters, keys))[0]
