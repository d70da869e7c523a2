"""Experts and task towers: shared-bottom, MMoE and PLE.

Each maps the shared input [n, I] to a list of one hidden vector a task, T times [n, H], and reports
its gates. Lists, not stacked axes: products over small inner axes are slow on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.layers import MLP, Experts, mix


class SharedBottom(nnx.Module):
    """One shared network for all tasks (Caruana 1997)."""

    def __init__(
        self, inputs: int, tasks: int, hidden: Sequence[int], *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.tasks = tasks
        self.bottom = MLP(inputs, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        return [self.bottom(x)] * self.tasks, {}


class MMoE(nnx.Module):
    """Multi-gate mixture of experts (Ma et al., KDD 2018): each task's gate mixes all experts."""

    def __init__(
        self,
        inputs: int,
        tasks: int,
        experts: int,
        hidden: Sequence[int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.tasks, self.count = tasks, experts
        self.experts = Experts(experts, inputs, hidden, dtype=dtype, rngs=rngs)
        self.gate = nnx.Linear(inputs, tasks * experts, dtype=dtype, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        gates = jax.nn.softmax(self.gate(x).reshape(-1, self.tasks, self.count), axis=-1)
        experts = self.experts(x)
        mixed = [mix(gates[:, t], experts) for t in range(self.tasks)]
        return mixed, {"gates": gates}


class PLE(nnx.Module):
    """Progressive layered extraction (Tang et al., RecSys 2020), two levels.

    On the first level each task's gate mixes its own and the shared experts, and the shared gate
    mixes *all* experts, those of every task among them. The second level reads these mixtures;
    there only the tasks' gates remain.
    """

    def __init__(
        self,
        inputs: int,
        tasks: int,
        experts: int,
        task_experts: int,
        hidden: Sequence[int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.tasks, self.shared_count, self.task_count = tasks, experts, task_experts
        first, second = hidden[:1], hidden[1:] or hidden[:1]

        def linear(i: int, o: int) -> nnx.Linear:
            return nnx.Linear(i, o, dtype=dtype, param_dtype=dtype, rngs=rngs)

        def expert(count: int, i: int, h: Sequence[int]) -> Experts:
            return Experts(count, i, h, dtype=dtype, rngs=rngs)

        everyone = experts + tasks * task_experts
        self.shared_1 = expert(experts, inputs, first)
        self.own_1 = expert(tasks * task_experts, inputs, first)
        self.gate_tasks_1 = linear(inputs, tasks * (experts + task_experts))
        self.gate_shared_1 = linear(inputs, everyone)
        self.shared_2 = expert(experts, first[-1], second)
        self.own_2 = nnx.List([expert(task_experts, first[-1], second) for _ in range(tasks)])
        self.gate_2 = nnx.List([linear(first[-1], experts + task_experts) for _ in range(tasks)])

    def __call__(self, x: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
        shared, own = self.shared_1(x), self.own_1(x)
        visible = self.task_count + self.shared_count  # own experts first, then the shared ones
        gates = jax.nn.softmax(self.gate_tasks_1(x).reshape(-1, self.tasks, visible), axis=-1)
        gate_shared = jax.nn.softmax(self.gate_shared_1(x), axis=-1)
        shared_2 = self.shared_2(mix(gate_shared, own + shared))
        hidden, gates_2 = [], []
        for t in range(self.tasks):
            mine = own[t * self.task_count : (t + 1) * self.task_count]
            task_input = mix(gates[:, t], mine + shared)
            gate = jax.nn.softmax(self.gate_2[t](task_input), axis=-1)
            hidden.append(mix(gate, self.own_2[t](task_input) + shared_2))
            gates_2.append(gate)
        found = {"gates": gates, "gate_shared": gate_shared, "gates_2": jnp.stack(gates_2, axis=1)}
        return hidden, found
