"""Personalised embeddings and parameters: gates from what is known beforehand (PEPNet).

Chang et al., "PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized
Prior Information", KDD 2023.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.layers import Hidden, linear
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes


@dataclass(frozen=True, kw_only=True)
class PEPNet:
    """`[model.towers] kind = "pepnet"`: a network a task, whose input and layers are scaled, number
    by number, between 0 and 2.

    The gate of the input (EPNet, the same for all tasks) is told the `domain`, such as the scene or
    the page; those of the tasks' layers (PPNet) are told the `priors`: features of the user, the
    moment or the item, such as its author.
    """

    kind: Literal["pepnet"] = "pepnet"
    domain: tuple[str, ...] = ()  # features that gate the input; (): it is not gated
    priors: tuple[str, ...] = ()  # that gate the layers; (): the user's state, the item's vector
    gate_hidden: Annotated[int, Field(ge=1)] = 64
    tower_hidden: Hidden = (128, 64)  # of each task's network

    @property
    def reads(self) -> tuple[str, ...]:
        """The features that it wants one by one."""
        return (*self.domain, *(name for name in self.priors if name not in self.domain))

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> PEPNetTowers:
        """The towers."""
        return PEPNetTowers(self, sizes, dtype=dtype, rngs=rngs)


class GateUnit(nnx.Module):
    """The paper's Gate NU, 2 sigmoid(W' relu(W x + b) + b'): [n, in] to [n, out], from 0 to 2."""

    def __init__(self, inputs: int, hidden: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.first = linear(inputs, hidden, dtype=dtype, rngs=rngs)
        self.second = linear(hidden, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return 2 * jax.nn.sigmoid(self.second(jax.nn.relu(self.first(x))))


class PEPNetTowers(nnx.Module):
    """With E the input x, d and p the domain's and the priors' embeddings, stop(.) what lets no
    gradient through, and * number by number:

        O = gate(d, stop(E)) * E                          EPNet
        H1_t = act(W1_t O + b1_t), H'l_t = gate_l(p, stop(O))_t * Hl_t         PPNet
        H(l+1)_t = act(W(l+1)_t H'l_t + b(l+1)_t)

    so that the embeddings of the input learn from what they say, and not from how they gate.

    Diagnostics: "scale_input" [n, I] with a domain, and "scales_1", "scales_2", … [n, T, H] of the
    layers.
    """

    def __init__(self, options: PEPNet, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def width(names: tuple[str, ...]) -> int:
            return sum(sizes.features[name] for name in names)

        def gate(told: int, outputs: int) -> GateUnit:
            hidden = options.gate_hidden
            return GateUnit(told + sizes.inputs, hidden, outputs, dtype=dtype, rngs=rngs)

        self.domain, self.priors = options.domain, options.priors
        widths, tasks = (sizes.inputs, *options.tower_hidden), len(sizes.tasks)
        priors = width(self.priors) if self.priors else 2 * sizes.width
        self.gate = gate(width(self.domain), sizes.inputs) if self.domain else None
        self.gates = nnx.List([gate(priors, tasks * h) for h in options.tower_hidden])
        self.layers = nnx.List(
            [
                nnx.List([linear(a, b, dtype=dtype, rngs=rngs) for _ in sizes.tasks])
                for a, b in itertools.pairwise(widths)
            ]
        )
        self.outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = nnx.List(
            [linear(widths[-1], count, dtype=dtype, rngs=rngs) for count in self.outputs.values()]
        )

    def __call__(self, given: TowerInput) -> TowerOutput:
        x, looks = given.x, {}
        if self.gate is not None:
            domain = [given.features[name] for name in self.domain]
            told = jnp.concatenate([*domain, jax.lax.stop_gradient(x)], axis=-1)
            looks["scale_input"] = self.gate(told)
            x = looks["scale_input"] * x
        priors = [given.features[name] for name in self.priors] or [given.user, given.item]
        told = jnp.concatenate([*priors, jax.lax.stop_gradient(x)], axis=-1)
        hidden = [x] * len(self.heads)
        for number, (layers, gate) in enumerate(zip(self.layers, self.gates, strict=True), 1):
            scale = gate(told).reshape(len(x), len(hidden), -1)
            looks[f"scales_{number}"] = scale
            hidden = [
                scale[:, t] * jax.nn.silu(layer(h))
                for t, (layer, h) in enumerate(zip(layers, hidden, strict=True))
            ]
        logits = {}
        for name, head, h in zip(self.outputs, self.heads, hidden, strict=True):
            out = head(h)
            logits[name] = out[:, 0] if out.shape[1] == 1 else out
        return TowerOutput(logits, dict(zip(self.outputs, hidden, strict=True)), looks)
