"""What an order is worth, and what fusions are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Term(NamedTuple):
    """One task's part of the utility: its worth times the probability that all of `path` happen."""

    task: str
    worth: float
    path: tuple[
        str, ...
    ]  # binary tasks, the first of the funnel first; (): certain, given the root


class Utility(NamedTuple):
    """The declared worth of showing an item to a user: sum over terms of worth x p(path).

    With a `root` all of it is given that the item is the next one, so that the probability of that,
    which the retrieval task scores, multiplies the sum.
    """

    root: str  # the retrieval task, or ""
    terms: tuple[Term, ...]

    def __str__(self) -> str:
        """The formula.

        >>> buy = Term("buy", 5.0, ("click", "buy"))
        >>> str(Utility("", (Term("click", 1.0, ("click",)), buy)))
        '1 p(click) + 5 p(click) p(buy | click)'
        >>> str(Utility("next", (Term("next", 1.0, ()), Term("like", 2.0, ("like",)))))
        'p(next) (1 + 2 p(like | next))'
        """
        parts = []
        for _, worth, path in self.terms:
            before = [*([self.root] if self.root else []), *path]
            shown = [f"{worth:g}"]
            for place, task in enumerate(path, bool(self.root)):
                given = f" | {before[place - 1]}" if place else ""
                shown.append(f"p({task}{given})")
            parts.append(" ".join(shown))
        total = " + ".join(parts)
        return f"p({self.root}) ({total})" if self.root else total


class FusionSizes(NamedTuple):
    """`options.make(sizes, dtype=..., rngs=...)` gives a module `Fusing -> (fused [n], weights
    [n, T])`: larger is better, and the weights say what part of it is whose; rows sum to 1.

    `options.learns` says whether the module has parameters; they are taught the declared utility
    (`losses/fusion.py`), by a softmax over lists where the utility has a root, and else by the
    cross-entropy of the fused score as the log-odds of the worth, scaled to [0, 1].
    """

    state: int  # S
    hidden: int  # H; 1 where the towers give none
    tasks: tuple[str, ...]  # all T, in the order of the weights
    utility: Utility  # with one term or more


def log_probability(
    scores: Mapping[str, Float[Array, " n"]], path: Sequence[str]
) -> Float[Array, " n"]:
    """log p of all tasks of a path, whose scores are log-odds: the sum along the funnel."""
    start = jnp.zeros_like(next(iter(scores.values())))
    return sum((jax.nn.log_sigmoid(scores[task]) for task in path), start)


def in_columns(tasks: Sequence[str], of: Mapping[str, Float[Array, " n"]]) -> Float[Array, "n T"]:
    """Values of some tasks side by side with zeros for the others."""
    zero = jnp.zeros_like(next(iter(of.values())))
    return jnp.stack([of.get(task, zero) for task in tasks], axis=-1)
