"""Softmax cross-entropy over the catalogue, of which negatives are a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from mtrec_jax.kernels.softmax import softmax_loss
from mtrec_jax.losses.retrieval.contract import Compared, tile_size, tiled


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """`[train.retrieval] kind = "softmax"`: the partition function is estimated by importance
    sampling. Where item j is expected e_j times among the negatives, Z = exp(s+) + sum_j exp(s_j -
    log e_j) over the negatives that are not the positive itself (logQ correction: Bengio & Senecal
    2008; Yi et al., RecSys 2019). With all items as negatives, e_j = 1, it is the full softmax.
    """

    kind: Literal["softmax"] = "softmax"
    # What was shown and not taken are negatives of what was, beside those that are drawn: of the
    # positions of an example, or of them those of one time, where data.hide_ties is true
    shown: Literal["", "user", "request"] = ""

    def loss(self, compared: Compared) -> jax.Array:
        """Logits exist for a few positions at a time, never as B·P·n."""
        users = compared.users * compared.scale
        own = jnp.sum(users * compared.positives, axis=-1)
        listed, together = jnp.zeros((), own.dtype), own
        if compared.shown is not None:  # what was shown beside the positive is no sample
            beside = jnp.einsum("bpd,bqd->bpq", users, compared.positives)
            beside = jnp.where(compared.shown, beside, -jnp.inf)
            together = jax.nn.logsumexp(jnp.concatenate([own[..., None], beside], -1), axis=-1)
            listed = jnp.sum((together - own) * compared.weights)
        size = tile_size(compared)
        return listed + softmax_loss(
            tiled(users, size),
            compared.negatives,
            compared.negative_ids,
            tiled(compared.positive_ids, size),
            tiled(together, size),
            -compared.log_expected,
            tiled(compared.weights, size),
        )
