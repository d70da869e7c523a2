"""A product of calibrated probabilities to powers, as production rankers have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.models.fusions.contract import FusionSizes
from mtrec_jax.types import Fusing

_Power = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Multiplicative:
    """`[model.fusion] kind = "multiplicative"`: p(click)^a p(buy | click)^b …, of the tasks in the
    declared utility. A power says how much a relative gain in one probability counts beside those
    in others. Powers that are not given are learned from the declared utility.
    """

    kind: Literal["multiplicative"] = "multiplicative"
    powers: Mapping[str, _Power] = field(default_factory=dict)  # {task: power}; {}: learned

    @property
    def learns(self) -> bool:
        """Whether there are powers to learn."""
        return not self.powers

    def make(self, sizes: FusionSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> ProductFusion:
        """The fusion.

        Raises:
          ConfigError: a power of a task that is no probability in the utility, or none above 0.
        """
        utility = sizes.utility
        known = [utility.root] if utility.root else []
        known += [task for term in utility.terms for task in term.path]
        known = list(dict.fromkeys(known))
        for task in self.powers:
            if task not in known:
                raise ConfigError(
                    f"model.fusion.powers: '{task}' is no probability of the utility, which has "
                    f"{', '.join(known)}.{nearest(task, known)}"
                )
        if self.powers and not any(self.powers.values()):
            raise ConfigError("model.fusion.powers: at least one must be above 0")
        return ProductFusion(sizes, known, dict(self.powers), dtype)


class ProductFusion(nnx.Module):
    """fused = sum_t power_t log p_t (+ a constant, where it is learned as log-odds). The weights
    are the powers, scaled to sum to 1."""

    def __init__(
        self, sizes: FusionSizes, known: list[str], powers: dict[str, float], dtype: jnp.dtype
    ):
        self.tasks, self.root, self.known = sizes.tasks, sizes.utility.root, tuple(known)
        self.powers = tuple(powers.get(task, 0.0) for task in known) if powers else None
        if not powers:
            self.power = nnx.Param(jnp.full((len(known),), 0.5413, dtype))  # softplus(0.5413) = 1
            self.bias = nnx.Param(jnp.zeros((), dtype))

    def __call__(self, given: Fusing) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and weights of the tasks [n, T]."""
        scores = jax.lax.stop_gradient(given.scores)
        logs = jnp.stack(
            [scores[t] if t == self.root else jax.nn.log_sigmoid(scores[t]) for t in self.known],
            axis=-1,
        )
        if self.powers is None:
            power, bias = jax.nn.softplus(self.power[...]), self.bias[...]
        else:
            power, bias = jnp.array(self.powers, logs.dtype), jnp.zeros((), logs.dtype)
        share = dict(zip(self.known, power / power.sum(), strict=True))
        weights = jnp.stack([jnp.asarray(share.get(t, 0.0), logs.dtype) for t in self.tasks])
        return logs @ power + bias, jnp.broadcast_to(weights, (len(logs), len(self.tasks)))
