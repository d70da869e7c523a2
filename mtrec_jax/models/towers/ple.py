"""Progressive layered extraction (Tang et al., RecSys 2020), two levels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.models.layers import Experts, Hidden, MaybeHidden, TaskHeads, linear, mix
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes


@dataclass(frozen=True, kw_only=True)
class PLE:
    """`[model.towers] kind = "ple"`."""

    kind: Literal["ple"] = "ple"
    experts: Annotated[int, Field(ge=1)] = 4  # shared
    task_experts: Annotated[int, Field(ge=1)] = 1  # of each task
    expert_hidden: Hidden = (128, 64)  # the first is of level one, the others of level two
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> PLETowers:
        """The towers."""
        return PLETowers(self, sizes, dtype=dtype, rngs=rngs)


class PLETowers(nnx.Module):
    """On the first level each task's gate mixes its own and the shared experts, and the shared gate
    mixes *all* experts, those of every task among them. The second level reads these mixtures;
    there only the tasks' gates remain.

    Diagnostics: "gates" [n, T, own + shared], "gate_shared" [n, all], "gates_2" as "gates".
    """

    def __init__(self, options: PLE, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        tasks, inputs = len(sizes.tasks), sizes.inputs
        self.tasks, self.shared_count, self.task_count = (
            tasks,
            options.experts,
            options.task_experts,
        )
        first, second = options.expert_hidden[:1], options.expert_hidden[1:]
        second = second or first

        made = functools.partial(linear, dtype=dtype, rngs=rngs)

        def expert(count: int, i: int, h: Sequence[int]) -> Experts:
            return Experts(count, i, h, dtype=dtype, rngs=rngs)

        visible, width = self.shared_count + self.task_count, first[-1]
        self.shared_1 = expert(self.shared_count, inputs, first)
        self.own_1 = expert(tasks * self.task_count, inputs, first)
        self.gate_tasks_1 = made(inputs, tasks * visible)
        self.gate_shared_1 = made(inputs, self.shared_count + tasks * self.task_count)
        self.shared_2 = expert(self.shared_count, width, second)
        self.own_2 = nnx.List([expert(self.task_count, width, second) for _ in range(tasks)])
        self.gate_2 = nnx.List([made(width, visible) for _ in range(tasks)])
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(second[-1], outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        x = given.x
        shared, own = self.shared_1(x), self.own_1(x)
        visible = self.task_count + self.shared_count  # own experts first, then the shared ones
        gates = jax.nn.softmax(self.gate_tasks_1(x).reshape(-1, self.tasks, visible), axis=-1)
        gate_shared = jax.nn.softmax(self.gate_shared_1(x), axis=-1)
        shared_2 = self.shared_2(mix(gate_shared, own + shared))
        mixed, gates_2 = [], []
        for t in range(self.tasks):
            mine = own[t * self.task_count : (t + 1) * self.task_count]
            task_input = mix(gates[:, t], mine + shared)
            gate = jax.nn.softmax(self.gate_2[t](task_input), axis=-1)
            mixed.append(mix(gate, self.own_2[t](task_input) + shared_2))
            gates_2.append(gate)
        found = {"gates": gates, "gate_shared": gate_shared, "gates_2": jnp.stack(gates_2, axis=1)}
        return TowerOutput(*self.heads(mixed), found)
