"""Hierarchy of multi-gate experts (HoME, Wang et al. 2024): experts of all, of groups, of tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.layers import (
    MLP,
    Hidden,
    MaybeHidden,
    TaskHeads,
    layer_norm,
    lecun_normal,
    linear,
    mix,
)
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes, TowerTask
from mtrec_jax.models.towers.esmm import funnel_of, path_to

_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class HoME:
    """`[model.towers] kind = "home"`.

    Two differences from the paper: experts are normalised over their own width, not over the batch,
    so that each example stays by itself; and the feature gates' rank is an option instead of the
    input's width / `feature_gates`.
    """

    kind: Literal["home"] = "home"
    groups: tuple[tuple[str, ...], ...] = ()  # of tasks; (): those of a funnel, others by kind
    experts: _Count = 2  # of each group and of all tasks, on each of the two levels
    task_experts: _Count = 1
    feature_gates: _Count = 2  # low-rank gates that are mixed, before each set of experts
    rank: _Count = 16
    expert_hidden: Hidden = (128, 64)  # the first is of level one, the others of level two
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> HoMETowers:
        """The towers.

        Raises:
          ConfigError: `groups` does not name every task that has a tower once.
        """
        groups = self.groups or default_groups(sizes.tasks)
        named = Counter(task for group in groups for task in group)
        wrong = [t for t in {**named, **sizes.tasks} if named[t] != (t in sizes.tasks)]
        if wrong:
            raise ConfigError(
                f"model.towers.groups: {', '.join(wrong)}: name each of {', '.join(sizes.tasks)} "
                "once and nothing else, or leave groups out"
            )
        return HoMETowers(self, sizes, groups, dtype=dtype, rngs=rngs)


def default_groups(tasks: Mapping[str, TowerTask]) -> tuple[tuple[str, ...], ...]:
    """The tasks of each funnel together, the others by kind.

    >>> default_groups({
    ...     "click": TowerTask("binary"), "stars": TowerTask("regression"),
    ...     "buy": TowerTask("binary", where="click"), "like": TowerTask("binary")})
    (('click', 'buy'), ('stars',), ('like',))
    """
    funnel = funnel_of(tasks)
    groups: dict[tuple[str, str], list[str]] = {}
    for name, task in tasks.items():
        start = path_to(name, funnel)[0]
        linked = name in funnel or name in funnel.values()
        groups.setdefault(("funnel", start) if linked else ("kind", task.kind), []).append(name)
    return tuple(map(tuple, groups.values()))


class HoMETowers(nnx.Module):
    """Level one, of meta experts, on x: each group's gate mixes the group's experts and those of
    all, the gate of all mixes the experts of every group too. Level two: each task's gate, on its
    group's mixture beside that of all, mixes experts of the task and of its group, which read the
    group's mixture, and experts of all, which read theirs. So a task never sees another group's
    experts but through those of all (the hierarchy mask). Each set of experts looks at its input
    through a feature gate of its own. Beside the mixtures, self gates hand on a group's own meta
    experts, those of all, and a task's own experts.

    Diagnostics: "gates" [n, T, own + group + all] and "self_gates" [n, T, own] of the tasks,
    "gates_meta" [n, G, group + all] of the groups and "gate_shared" [n, all sets].
    """

    def __init__(
        self,
        options: HoME,
        sizes: TowerSizes,
        groups: Sequence[Sequence[str]],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        first, second = options.expert_hidden[:1], options.expert_hidden[1:]
        second = second or first
        count, own, n_groups = options.experts, options.task_experts, len(groups)
        inputs, width = sizes.inputs, first[-1]
        self.group_of = tuple(
            next(g for g, group in enumerate(groups) if name in group) for name in sizes.tasks
        )

        def experts(count: int, inputs: int, hidden: Sequence[int]) -> ExpertSet:
            return ExpertSet(options, count, inputs, hidden, dtype=dtype, rngs=rngs)

        def gate(inputs: int, count: int) -> nnx.Linear:
            return linear(inputs, count, dtype=dtype, rngs=rngs)

        def self_gate(inputs: int, count: int) -> SelfGate:
            return SelfGate(inputs, count, dtype=dtype, rngs=rngs)

        self.meta = nnx.List([experts(count, inputs, first) for _ in groups])
        self.meta_shared = experts(count, inputs, first)
        self.meta_self = nnx.List([self_gate(inputs, count) for _ in (*groups, "all")])
        self.meta_gates = nnx.List([gate(inputs, 2 * count) for _ in groups])
        self.gate_shared = gate(inputs, (n_groups + 1) * count)
        self.groups = nnx.List([experts(count, width, second) for _ in groups])
        self.shared = experts(count, width, second)
        self.own = nnx.List([experts(own, width, second) for _ in sizes.tasks])
        self.own_self = nnx.List([self_gate(width, own) for _ in sizes.tasks])
        self.gates = nnx.List([gate(2 * width, own + 2 * count) for _ in sizes.tasks])
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(second[-1], outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        x = given.x
        meta, of_all = [experts(x) for experts in self.meta], self.meta_shared(x)
        through = [
            gate(x, mine)[0] for gate, mine in zip(self.meta_self, [*meta, of_all], strict=True)
        ]
        meta_gates = [jax.nn.softmax(gate(x)) for gate in self.meta_gates]
        group_states = [
            mix(gate, mine + of_all) + handed
            for gate, mine, handed in zip(meta_gates, meta, through[:-1], strict=True)
        ]
        gate_shared = jax.nn.softmax(self.gate_shared(x))
        everyone = [expert for mine in meta for expert in mine] + of_all
        shared_state = mix(gate_shared, everyone) + through[-1]
        of_groups = [experts(z) for experts, z in zip(self.groups, group_states, strict=True)]
        shared = self.shared(shared_state)
        mixed, gates, self_gates = [], [], []
        for t, g in enumerate(self.group_of):
            z = group_states[g]
            gate = jax.nn.softmax(self.gates[t](jnp.concatenate([z, shared_state], axis=-1)))
            mine = self.own[t](z)
            handed, self_gate = self.own_self[t](z, mine)
            mixed.append(mix(gate, mine + of_groups[g] + shared) + handed)
            gates.append(gate)
            self_gates.append(self_gate)
        found = {
            "gates": jnp.stack(gates, axis=1),
            "self_gates": jnp.stack(self_gates, axis=1),
            "gates_meta": jnp.stack(meta_gates, axis=1),
            "gate_shared": gate_shared,
        }
        return TowerOutput(*self.heads(mixed), found)


class ExpertSet(nnx.Module):
    """Experts on one input, behind a feature gate: [n, in] -> E times [n, H], each of them
    swish(norm(dense(...)))."""

    def __init__(
        self,
        options: HoME,
        count: int,
        inputs: int,
        hidden: Sequence[int],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kept, last = hidden[:-1], hidden[-1]
        before = kept[-1] if kept else inputs
        self.feature_gate = FeatureGate(
            options.feature_gates, options.rank, inputs, dtype=dtype, rngs=rngs
        )
        self.mlps = nnx.List([MLP(inputs, kept, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.lasts = nnx.List([linear(before, last, dtype=dtype, rngs=rngs) for _ in range(count)])
        self.norms = nnx.List([layer_norm(last, dtype=dtype, rngs=rngs) for _ in range(count)])

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        seen = self.feature_gate(x)
        parts = zip(self.mlps, self.lasts, self.norms, strict=True)
        return [jax.nn.silu(norm(last(mlp(seen)))) for mlp, last, norm in parts]


class SelfGate(nnx.Module):
    """What is handed on of a set of experts whatever other gates do: [n, in] and E times [n, H] ->
    [n, H] and the gate [n, E], a softmax, for a single expert a sigmoid."""

    def __init__(self, inputs: int, count: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.gate = linear(inputs, count, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, experts: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        scores = self.gate(x)
        gate = jax.nn.sigmoid(scores) if len(experts) == 1 else jax.nn.softmax(scores)
        return mix(gate, experts), gate


class FeatureGate(nnx.Module):
    """x times a mixture of low-rank gates 2 sigmoid(x B A): [n, in] -> [n, in]. Each expert set so
    has an input of its own, and does not hand conflicting gradients to all features alike."""

    def __init__(self, count: int, rank: int, inputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def matrix(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=False,
                dtype=dtype,
                param_dtype=dtype,
                kernel_init=lecun_normal,
                rngs=rngs,
            )

        self.down = nnx.List([matrix(inputs, rank) for _ in range(count)])
        self.up = nnx.List([matrix(rank, inputs) for _ in range(count)])
        self.gate = linear(inputs, count, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        each = [
            2 * jax.nn.sigmoid(up(down(x))) for down, up in zip(self.down, self.up, strict=True)
        ]
        return x * mix(jax.nn.softmax(self.gate(x)), each)
