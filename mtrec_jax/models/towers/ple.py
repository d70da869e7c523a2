"""Progressive layered extraction (Tang et al., RecSys 2020): levels of shared and own experts."""

from __future__ import annotations

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
    """`[model.towers] kind = "ple"`; with `levels = 1` it is CGC (customized gate control).

    The paper's experts are not normalised: `normalise = false`.
    """

    kind: Literal["ple"] = "ple"
    levels: Annotated[int, Field(ge=1)] = 2
    experts: Annotated[int, Field(ge=1)] = 4  # shared, on each level
    task_experts: Annotated[int, Field(ge=1)] = 1  # of each task, on each level
    expert_hidden: Hidden = (128, 64)  # one width a level, and what is left over on the last
    tower_hidden: MaybeHidden = (32,)
    normalise: bool = True  # the experts' outputs; false: as in the paper

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> PLETowers:
        """The towers."""
        return PLETowers(self, sizes, dtype=dtype, rngs=rngs)

    def widths(self) -> list[tuple[int, ...]]:
        """The hidden layers of an expert on each level; levels beyond the widths repeat the last.

        >>> PLE(levels=2, expert_hidden=(128, 64)).widths()
        [(128,), (64,)]
        >>> PLE(levels=2, expert_hidden=(128, 64, 32)).widths()
        [(128,), (64, 32)]
        >>> PLE(levels=3, expert_hidden=(64,)).widths()
        [(64,), (64,), (64,)]
        """
        hidden, before = self.expert_hidden, self.levels - 1
        first = [(hidden[min(level, len(hidden) - 1)],) for level in range(before)]
        return [*first, hidden[before:] or hidden[-1:]]


class PLETowers(nnx.Module):
    """On each level a task's gate mixes its own and the shared experts, and the shared gate mixes
    *all* experts, those of every task among them; the next level reads these mixtures. A gate reads
    what its own experts read. The last level has the tasks' gates only.

    Diagnostics: "gates" [n, T, own + shared] and "gate_shared" [n, all] of the first level, with
    "_2", "_3" and so on of the others.
    """

    def __init__(self, options: PLE, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, inputs = options.widths(), sizes.inputs
        levels = []
        for level, hidden in enumerate(widths):
            last = level == options.levels - 1
            levels.append(
                Level(options, len(sizes.tasks), inputs, hidden, last, dtype=dtype, rngs=rngs)
            )
            inputs = hidden[-1]
        self.levels = nnx.List(levels)
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(inputs, outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        mixed, shared = [given.x] * len(self.heads.names), given.x
        found: dict[str, jax.Array] = {}
        for number, level in enumerate(self.levels, 1):
            mixed, shared, gates = level(mixed, shared)
            found |= {f"{name}_{number}" if number > 1 else name: g for name, g in gates.items()}
        return TowerOutput(*self.heads(mixed), found)


class Level(nnx.Module):
    """T inputs [n, in] of the tasks and one of the shared experts [n, in] -> their mixtures."""

    def __init__(
        self,
        options: PLE,
        tasks: int,
        inputs: int,
        hidden: Sequence[int],
        last: bool,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shared, own = options.experts, options.task_experts

        def experts(count: int) -> Experts:
            return Experts(count, inputs, hidden, options.normalise, dtype=dtype, rngs=rngs)

        def gate(count: int) -> nnx.Linear:
            return linear(inputs, count, dtype=dtype, rngs=rngs)

        self.shared = experts(shared)
        self.own = nnx.List([experts(own) for _ in range(tasks)])
        self.gates = nnx.List([gate(own + shared) for _ in range(tasks)])
        self.gate_shared = None if last else gate(tasks * own + shared)

    def __call__(
        self, inputs: Sequence[jax.Array], shared_input: jax.Array
    ) -> tuple[list[jax.Array], jax.Array, dict[str, jax.Array]]:
        """Mixtures of the tasks, that of the shared experts, and the gates."""
        shared = self.shared(shared_input)
        own = [experts(x) for experts, x in zip(self.own, inputs, strict=True)]
        gates = [jax.nn.softmax(gate(x)) for gate, x in zip(self.gates, inputs, strict=True)]
        mixed = [mix(g, mine + shared) for g, mine in zip(gates, own, strict=True)]
        found = {"gates": jnp.stack(gates, axis=1)}
        if self.gate_shared is None:
            return mixed, shared_input, found
        gate_shared = jax.nn.softmax(self.gate_shared(shared_input))
        everyone = [expert for mine in own for expert in mine] + shared
        return mixed, mix(gate_shared, everyone), found | {"gate_shared": gate_shared}
