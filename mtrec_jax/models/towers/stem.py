"""Shared tables and tables of each task, whose gradients stay apart (STEM).

Su et al., "STEM: Unleashing the Power of Embeddings for Multi-task Recommendation", AAAI 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.layers import Experts, Hidden, MaybeHidden, TaskHeads, linear, mix
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes


@dataclass(frozen=True, kw_only=True)
class STEM:
    """`[model.towers] kind = "stem"`: every feature and item has an embedding that all share and
    one of each task, so 1 + T tables in the place of one.

    The features of the history and what retrieval compares have the shared ones alone. The paper's
    experts are not normalised: `normalise = false`.
    """

    kind: Literal["stem"] = "stem"
    experts: Annotated[int, Field(ge=1)] = 2  # of the shared embeddings
    task_experts: Annotated[int, Field(ge=1)] = 1  # of each task's own
    expert_hidden: Hidden = (128, 64)
    tower_hidden: MaybeHidden = (32,)
    normalise: bool = True  # the experts' outputs; false: as in the paper
    task_tables: ClassVar[bool] = True

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> STEMTowers:
        """The towers."""
        return STEMTowers(self, sizes, dtype=dtype, rngs=rngs)


class STEMTowers(nnx.Module):
    """Forward from all, backward to the own: a task's gate mixes the experts of every task's
    embeddings and the shared ones, but those of other tasks let no gradient through. The gate of
    task t reads x_t + x, what its own and the shared embeddings say.

    Diagnostics: "gates" [n, T, T · own + shared], the experts of the tasks first, in their order.
    """

    def __init__(self, options: STEM, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inputs, hidden, tasks = sizes.inputs, options.expert_hidden, len(sizes.tasks)
        count = tasks * options.task_experts + options.experts

        def experts(count: int) -> Experts:
            return Experts(count, inputs, hidden, options.normalise, dtype=dtype, rngs=rngs)

        self.shared = experts(options.experts)
        self.own = nnx.List([experts(options.task_experts) for _ in sizes.tasks])
        self.gates = nnx.List([linear(inputs, count, dtype=dtype, rngs=rngs) for _ in sizes.tasks])
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(hidden[-1], outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        names = self.heads.names
        shared = self.shared(given.x)
        own = [experts(given.own[name]) for name, experts in zip(names, self.own, strict=True)]
        mixed, gates = [], []
        for t, name in enumerate(names):
            seen = [
                expert if of == t else jax.lax.stop_gradient(expert)
                for of, experts in enumerate(own)
                for expert in experts
            ]
            gate = jax.nn.softmax(self.gates[t](given.own[name] + given.x), axis=-1)
            mixed.append(mix(gate, seen + shared))
            gates.append(gate)
        return TowerOutput(*self.heads(mixed), {"gates": jnp.stack(gates, axis=1)})
