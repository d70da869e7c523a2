"""One shared network for all tasks (Caruana 1997, \"Multitask Learning\")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.layers import MLP, Hidden, MaybeHidden, TaskHeads
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes


@dataclass(frozen=True, kw_only=True)
class SharedBottom:
    """`[model.towers] kind = "shared_bottom"`."""

    kind: Literal["shared_bottom"] = "shared_bottom"
    expert_hidden: Hidden = (128, 64)  # of the shared network
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> SharedBottomTowers:
        """The towers."""
        return SharedBottomTowers(self, sizes, dtype=dtype, rngs=rngs)


class SharedBottomTowers(nnx.Module):
    """Every task's tower reads the same hidden vector."""

    def __init__(
        self, options: SharedBottom, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        hidden = options.expert_hidden
        self.bottom = MLP(sizes.inputs, hidden, dtype=dtype, rngs=rngs)
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(hidden[-1], outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        shared = self.bottom(given.x)
        return TowerOutput(*self.heads([shared] * len(self.heads.names)), {})
