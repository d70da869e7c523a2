"""Cosines themselves: the next item's to 1, those of negatives below a margin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.losses.retrieval.contract import Compared, over_pairs


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """`[train.retrieval] kind = "contrastive"`: the cosine contrastive loss of SimpleX (Mao et al.,
    CIKM 2021), 1 - cos+ and `weight` times the mean of what negatives' cosines are above `margin`.
    """

    kind: Literal["contrastive"] = "contrastive"
    has_temperature: ClassVar[bool] = False
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.4
    weight: Annotated[float, Field(gt=0)] = 150.0

    def loss(self, compared: Compared) -> jax.Array:
        """The temperature has no part in it."""

        def losses(own: jax.Array, others: jax.Array, counts: jax.Array) -> jax.Array:
            above = jax.nn.relu(others - self.margin) * counts
            return 1 - own + self.weight * jnp.sum(above, axis=-1) / others.shape[-1]

        return over_pairs(compared, losses)
