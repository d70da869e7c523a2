"""Binary cross-entropy: the next item is a yes, each negative a no."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from mtrec_jax.losses.retrieval.contract import Compared, over_pairs


@dataclass(frozen=True, kw_only=True)
class BCE:
    """`[train.retrieval] kind = "bce"`: as SASRec was published (Kang & McAuley, ICDM 2018), with
    the mean over the negatives beside the positive."""

    kind: Literal["bce"] = "bce"

    def loss(self, compared: Compared) -> jax.Array:
        """The positive's loss and the mean of the negatives'."""
        return _calibrated(compared, 1.0, 1 / len(compared.negative_ids))


@dataclass(frozen=True, kw_only=True)
class GBCE:
    """`[train.retrieval] kind = "gbce"`: generalised BCE of gSASRec (Petrov & Macdonald, RecSys
    2023), which takes back the overconfidence that few negatives of many items teach.

    The probability of the positive is raised to beta = alpha (t (1 - 1 / alpha) + 1 / alpha), where
    alpha = n / (N - 1) is the share of the items that are drawn, and t says how much is taken back.
    Losses of the positive and of the n negatives are summed, over n + 1. A logit is the scaled
    cosine plus log(beta / n), by which all are right on average from the first step on, as with the
    bias of SigLIP (Zhai et al., ICCV 2023): otherwise the vectors first have to learn, in a
    direction that all share, that nearly every pair is a no.
    """

    kind: Literal["gbce"] = "gbce"
    t: Annotated[float, Field(ge=0, le=1)] = 0.75

    def loss(self, compared: Compared) -> jax.Array:
        """The positive's loss times beta, and the negatives'."""
        count = len(compared.negative_ids)
        alpha = min(1.0, count / max(1, compared.items - 1))
        beta = alpha * (self.t * (1 - 1 / alpha) + 1 / alpha)
        return _calibrated(compared, beta / (count + 1), 1 / (count + 1))


def _calibrated(compared: Compared, of_positive: float, of_negatives: float) -> jax.Array:
    bias = math.log(of_positive / (of_negatives * len(compared.negative_ids)))  # 0 of `BCE`

    def losses(own: jax.Array, others: jax.Array, counts: jax.Array) -> jax.Array:
        yes = jax.nn.softplus(-own * compared.scale - bias)
        no = jax.nn.softplus(others * compared.scale + bias)
        return of_positive * yes + of_negatives * jnp.sum(no * counts, axis=-1)

    return over_pairs(compared, losses)
