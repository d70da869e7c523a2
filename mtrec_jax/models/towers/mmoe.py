"""Multi-gate mixture of experts: each task's gate mixes all experts (Ma et al., KDD 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.layers import Experts, Hidden, MaybeHidden, TaskHeads, linear, mix, product
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes


@dataclass(frozen=True, kw_only=True)
class MMoE:
    """`[model.towers] kind = "mmoe"`.

    The paper's experts are not normalised: `normalise = false`.
    """

    kind: Literal["mmoe"] = "mmoe"
    experts: Annotated[int, Field(ge=1)] = 4
    expert_hidden: Hidden = (128, 64)
    tower_hidden: MaybeHidden = (32,)
    normalise: bool = True  # the experts' outputs; false: as in the paper

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MMoETowers:
        """The towers."""
        return MMoETowers(self, sizes, dtype=dtype, rngs=rngs)


class MMoETowers(nnx.Module):
    """Diagnostics: "gates" [n, T, E]."""

    def __init__(self, options: MMoE, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inputs, count, hidden = sizes.inputs, options.experts, options.expert_hidden
        self.count = count
        self.experts = Experts(count, inputs, hidden, options.normalise, dtype=dtype, rngs=rngs)
        self.gate = linear(inputs, len(sizes.tasks) * count, dtype=dtype, rngs=rngs)
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(hidden[-1], outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        tasks = len(self.heads.names)
        both = product(given.x, [*self.experts.firsts, self.gate])
        sizes = [both.shape[1] - tasks * self.count, tasks * self.count]
        firsts, gates = jax.lax.split(both, sizes, axis=1)
        gates = jax.nn.softmax(gates.reshape(-1, tasks, self.count), axis=-1)
        experts = self.experts.behind(firsts)
        mixed = [mix(gates[:, t], experts) for t in range(tasks)]
        return TowerOutput(*self.heads(mixed), {"gates": gates})
