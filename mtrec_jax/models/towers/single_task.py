"""Every task on its own behind the embeddings: what sharing a network has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.layers import MaybeHidden, TaskHeads
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes


@dataclass(frozen=True, kw_only=True)
class SingleTask:
    """`[model.towers] kind = "single_task"`: a network and a head a task.

    Tasks still meet in the embeddings and in the encoder. A run that chooses one task
    (`--set tasks=click`) shares nothing at all.
    """

    kind: Literal["single_task"] = "single_task"
    expert_hidden: MaybeHidden = (128, 64)  # of each task's network
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> SingleTaskTowers:
        """The towers."""
        return SingleTaskTowers(self, sizes, dtype=dtype, rngs=rngs)


class SingleTaskTowers(nnx.Module):
    """Task t: x through layers of its own; no parameter belongs to two tasks."""

    def __init__(self, options: SingleTask, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = (*options.expert_hidden, *options.tower_hidden)
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(sizes.inputs, outputs, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        return TowerOutput(*self.heads([given.x] * len(self.heads.names)), {})
