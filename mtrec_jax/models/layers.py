"""Small layers that the encoders and the towers share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from pydantic import Field

from mtrec_jax.mixing import mixed_bits

_Width = Annotated[int, Field(ge=1)]
Hidden = Annotated[tuple[_Width, ...], Field(min_length=1)]  # widths of hidden layers, in options
MaybeHidden = tuple[_Width, ...]


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zero each entry with probability `rate`, rescale the rest; `key=None` leaves x as it is.

    The mask comes from `mixed_bits`: it does not depend on how x is split over devices.
    """
    if key is None or rate == 0:
        return x
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(mixed_bits(x.shape, key) >= threshold, x / (1 - rate), 0)


def unit_length(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors divided by their L2 norm; the zero vector stays zero, with a finite gradient.

    For training; `kernels` normalise with more care for the last bit.
    """
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)


class MLP(nnx.Module):
    """Dense layers with SiLU between them: [..., in] -> [..., hidden[-1]], activated at the end."""

    def __init__(self, inputs: int, hidden: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs):
        sizes = [inputs, *hidden]
        self.layers = nnx.List(
            [
                nnx.Linear(a, b, dtype=dtype, param_dtype=dtype, rngs=rngs)
                for a, b in itertools.pairwise(sizes)
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = jax.nn.silu(layer(x))
        return x


class Experts(nnx.Module):
    """E independent MLPs on one input: [n, in] -> E times [n, hidden[-1]].

    Each expert's output is normalised, which keeps experts from collapsing into one (HoME, Wang et
    al. 2024). Experts are a list of plain matrix products: batched products of small matrices are
    slow on CPUs.
    """

    def __init__(
        self, count: int, inputs: int, hidden: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.mlps = nnx.List([MLP(inputs, hidden, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.norms = nnx.List(
            [
                nnx.RMSNorm(hidden[-1], dtype=dtype, param_dtype=dtype, rngs=rngs)
                for _ in range(count)
            ]
        )

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        return [norm(mlp(x)) for mlp, norm in zip(self.mlps, self.norms, strict=True)]


def mix(weights: Float[Array, "n E"], experts: list[Float[Array, "n H"]]) -> Float[Array, "n H"]:
    """Weighted sum of the experts' outputs, example by example."""
    return sum((weights[:, e, None] * h for e, h in enumerate(experts)), jnp.zeros_like(experts[0]))


class TaskHeads(nnx.Module):
    """A tower and a head a task: T hidden inputs [n, H] to logits [n] or [n, C], and what is before.
    """

    def __init__(
        self,
        inputs: int,
        tasks: dict[str, int],
        hidden: Sequence[int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.names = tuple(tasks)
        self.towers = nnx.List([MLP(inputs, hidden, dtype=dtype, rngs=rngs) for _ in tasks])
        last = hidden[-1] if hidden else inputs
        self.heads = nnx.List(
            [
                nnx.Linear(last, outputs, dtype=dtype, param_dtype=dtype, rngs=rngs)
                for outputs in tasks.values()
            ]
        )

    def __call__(
        self, mixed: Sequence[jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """`mixed` holds each task's input, in order -> logits, hidden."""
        logits, hidden = {}, {}
        for t, name in enumerate(self.names):
            hidden[name] = self.towers[t](mixed[t])
            out = self.heads[t](hidden[name])
            logits[name] = out[:, 0] if out.shape[1] == 1 else out
        return logits, hidden
