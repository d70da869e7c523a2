"""The next item before each negative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from mtrec_jax.losses.retrieval.contract import Compared, over_pairs


@dataclass(frozen=True, kw_only=True)
class BPR:
    """`[train.retrieval] kind = "bpr"`: Bayesian personalised ranking (Rendle et al., UAI 2009),
    the mean over the negatives of -log sigmoid of the difference of logits."""

    kind: Literal["bpr"] = "bpr"

    def loss(self, compared: Compared) -> jax.Array:
        """The mean over pairs of the positive and a negative."""

        def losses(own: jax.Array, others: jax.Array, counts: jax.Array) -> jax.Array:
            worse = jax.nn.softplus((others - own[..., None]) * compared.scale)
            return jnp.sum(worse * counts, axis=-1) / others.shape[-1]

        return over_pairs(compared, losses)
