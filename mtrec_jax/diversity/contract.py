"""What a diversifier is given and gives: the places of candidates, one list a user.

Candidates are those that the model has retrieved, so what is left out of them is in no list.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

LAST = np.finfo(np.float64).min  # the gain of a place without a candidate


class Diversifier(Protocol):
    """Options with a `kind` that put lists together, for all users at once."""

    kind: str

    def choose(
        self,
        relevance: Float[np.ndarray, "B C"],
        vectors: Float[np.ndarray, "B C D"],
        real: Bool[np.ndarray, "B C"],
        k: int,
    ) -> Int[np.ndarray, "B K"]:
        """k different places of each user's candidates, the first of the list first.

        `relevance` falls from 1 to 0, and `vectors` have length 1. Where `real` is false there is
        no candidate: such places come after all real ones.
        """


def diversify(
    diversifier: Any,
    scores: Float[np.ndarray, "B C"],
    real: Bool[np.ndarray, "B C"],
    vectors: Float[np.ndarray, "B C D"],
    k: int,
) -> Int[np.ndarray, "B K"]:
    """The places of the k items of each user's list among the candidates.

    Scores of any unit become a relevance between 0 and 1 among each user's candidates (the lowest
    and the highest of them), so that a diversifier can weigh it against cosines.

    Args:
      diversifier: options with `choose`.
      scores: what the candidates are ordered by, larger first, of equals the first.
      real: where there is a candidate.
      vectors: of the candidates, of any length, which is not looked at.
      k: places of a list, at most C.

    >>> from mtrec_jax.diversity import Mmr
    >>> scores = np.array([[3.0, 2.9, 1.0]])  # the second is the first again, the third is not
    >>> vectors = np.array([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])
    >>> diversify(Mmr(trade=0.5), scores, np.full((1, 3), True), vectors, 2).tolist()
    [[0, 2]]
    """
    order = falling(scores, real)
    there = np.take_along_axis(real, order, axis=1)
    rated = np.take_along_axis(scores, order, axis=1).astype(np.float64)
    high = np.where(there, rated, -np.inf).max(axis=1, keepdims=True)
    low = np.where(there, rated, np.inf).min(axis=1, keepdims=True)
    spread = np.where(high > low, high - low, 1)
    relevance = np.where(there, (rated - low) / spread, 0)
    own = vectors[np.arange(len(order))[:, None], order]
    lengths = np.sqrt((own * own).sum(axis=2, keepdims=True))
    places = diversifier.choose(relevance, own / np.where(lengths > 0, lengths, 1), there, k)
    return np.take_along_axis(order, places, axis=1)


def falling(
    scores: Float[np.ndarray, "B C"], real: Bool[np.ndarray, "B C"]
) -> Int[np.ndarray, "B C"]:
    """Places by falling score, of equals the first; those without a candidate come last.

    >>> falling(np.array([[1.0, 9.0, 3.0, 3.0]]), np.array([[True, False, True, True]])).tolist()
    [[2, 3, 0, 1]]
    """
    return np.argsort(-np.where(real, scores, -np.inf), axis=1, kind="stable")


def best_left(
    gain: Float[np.ndarray, "B C"], real: Bool[np.ndarray, "B C"], taken: Bool[np.ndarray, "B C"]
) -> Int[np.ndarray, " B"]:
    """The place of the highest gain that is not taken, of equals the first; it is taken now."""
    best = np.where(taken, -np.inf, np.where(real, gain, LAST)).argmax(axis=1)
    taken[np.arange(len(taken)), best] = True
    return best


def cosines(
    vectors: Float[np.ndarray, "B C D"], place: Int[np.ndarray, " B"]
) -> Float[np.ndarray, "B C"]:
    """Of each user's candidates with the one at a place, of vectors of length 1."""
    one = vectors[np.arange(len(vectors)), place]
    return (vectors @ one[..., None])[..., 0]


def described(diversifier: Any) -> str:
    """Kind and options, for people.

    >>> from mtrec_jax.diversity import Mmr
    >>> described(Mmr(trade=0.5))
    'mmr (trade = 0.5)'
    """
    options = {f.name: getattr(diversifier, f.name) for f in dataclasses.fields(diversifier)}
    shown = ", ".join(f"{name} = {value}" for name, value in options.items() if name != "kind")
    return f"{diversifier.kind} ({shown})" if shown else str(diversifier.kind)
