"""The declared weights, always: the baseline that balancing methods have to beat.

Xin et al. 2022, "Do Current Multi-Task Optimization Methods in Deep Learning Even Help?", NeurIPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
from jaxtyping import Array, Float

from mtrec_jax.balance.contract import Balancer, Gradients, Pullback
from mtrec_jax.types import PyTree


@dataclass(frozen=True, kw_only=True)
class Static:
    """`[train.balance] kind = "static"`: `tasks.NAME.weight` for each task."""

    kind: Literal["static"] = "static"

    def make(self, initial: Float[Array, " T"]) -> Balancer:
        """The balancer of tasks with these declared weights."""

        def combine(
            pullback: Pullback, observed: jax.Array, state: PyTree, key: jax.Array
        ) -> tuple[Gradients, PyTree]:
            return pullback(initial), state

        return Balancer(lambda params: (), combine, in_parts=True)
