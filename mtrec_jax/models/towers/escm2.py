"""ESCM²: ESMM with a counterfactual risk of the later task (Wang et al., SIGIR 2022)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from mtrec_jax.models.layers import MaybeHidden, TaskHeads
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes
from mtrec_jax.models.towers.esmm import (
    needed_funnel,
    over_impressions,
    path_to,
    product_cross_entropy,
)

_Weight = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class ESCM2:
    """`[model.towers] kind = "escm2"`: for a binary task `where` another one is 1.

    The product of probabilities alone (ESMM) leaves the conditional one without a loss of its own.
    Here it has one, which stands for the risk over *all* impressions although its label is known
    after a click only: each click counts 1 / p(click) times, the propensity being what the click's
    tower says, as a constant. The loss of such a task is

        counterfactual_weight * R + global_weight * cross-entropy of p(click) p(purchase | click)

    with R of `inverse_propensity`, or of `doubly_robust` and `imputation_weight` times
    `imputation_risk`.
    """

    kind: Literal["escm2"] = "escm2"
    estimator: Literal["ipw", "dr"] = "ipw"
    counterfactual_weight: _Weight = 0.1
    imputation_weight: _Weight = 1.0  # of what teaches the imputed error, with "dr"
    global_weight: _Weight = 1.0
    least_propensity: Annotated[float, Field(gt=0, le=1)] = 0.05  # smaller ones are raised to it
    expert_hidden: MaybeHidden = (128, 64)  # of each task's network
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> ESCM2Towers:
        """The towers.

        Raises:
          ConfigError: no binary task has a sample space (`where`).
        """
        return ESCM2Towers(
            self, sizes, needed_funnel(sizes.tasks, self.kind), dtype=dtype, rngs=rngs
        )


class ESCM2Towers(nnx.Module):
    """A network a task, and with `estimator = "dr"` one more for the error of each later task.

    Diagnostics, for each later task: "propensity/TASK" [n], and with "dr" the error that it is
    expected to have, "imputed/TASK" [n].
    """

    def __init__(
        self,
        options: ESCM2,
        sizes: TowerSizes,
        funnel: dict[str, str],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.options, self.funnel, self.tasks = options, funnel, tuple(sizes.tasks)
        self.loss_inputs = tuple(f"imputed/{t}" for t in funnel if options.estimator == "dr")
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        outputs |= dict.fromkeys(self.loss_inputs, 1)
        hidden = (*options.expert_hidden, *options.tower_hidden)
        self.heads = TaskHeads(sizes.inputs, outputs, hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        logits, hidden = self.heads([given.x] * len(self.heads.names))
        looks = {name: jax.nn.softplus(logits[name]) for name in self.loss_inputs}
        looks |= {f"propensity/{task}": self._propensity(logits, task) for task in self.funnel}
        return TowerOutput(
            {task: logits[task] for task in self.tasks},
            {task: hidden[task] for task in self.tasks},
            looks,
        )

    def losses(
        self,
        logits: Mapping[str, jax.Array],
        labels: Mapping[str, jax.Array],
        mask: Mapping[str, jax.Array],
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The loss of each task of the funnel over all impressions, and where it counts: {task:
        ([B, P], [B, P])}, given logits and imputed errors, labels and masks, all [B, P]."""
        found = {}
        for name in self.funnel:
            path = path_to(name, self.funnel)
            label, counts = over_impressions(path, labels, mask)
            happened, _ = over_impressions(path[:-1], labels, mask)  # all before it
            error = optax.sigmoid_binary_cross_entropy(logits[name], labels[name])
            weight = happened / jax.lax.stop_gradient(self._propensity(logits, name))
            if self.options.estimator == "dr":
                imputed = logits[f"imputed/{name}"]
                risk = doubly_robust(error, imputed, weight)
                risk += self.options.imputation_weight * imputation_risk(error, imputed, weight)
            else:
                risk = inverse_propensity(error, weight)
            whole = product_cross_entropy([logits[task] for task in path], label)
            options = self.options
            found[name] = (
                options.counterfactual_weight * risk + options.global_weight * whole,
                counts,
            )
        return found

    def _propensity(self, logits: Mapping[str, jax.Array], task: str) -> jax.Array:
        """The probability that the task's label is seen: of all before it, and not too small."""
        before = [jax.nn.sigmoid(logits[t]) for t in path_to(task, self.funnel)[:-1]]
        product = functools.reduce(jnp.multiply, before)
        return jnp.maximum(product, self.options.least_propensity)


def inverse_propensity(error: Float[Array, "*B"], weight: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The error where it is seen, times 1 / propensity: its mean is the risk over everything.

    Args:
      error: of the prediction, where the label is seen; any number elsewhere.
      weight: 1 / propensity where the label is seen, 0 elsewhere.
    """
    return weight * error


def doubly_robust(
    error: Float[Array, "*B"], imputed: Float[Array, "*B"], weight: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """The imputed error everywhere, corrected where the label is seen: e^ + w (e - e^).

    Its mean is the risk over everything if either the propensities or the imputed errors are right.
    As an imputed error does not depend on the prediction, its slope at the prediction is that of
    `inverse_propensity`; through `imputation_risk` alone the two differ.

    >>> x = jnp.array([1.0, 1.0])  # seen with propensity 1/2, and not seen
    >>> doubly_robust(x, 0.5 * x, jnp.array([2.0, 0.0])).tolist()  # 0.5 + 2 (0.5)
    [1.5, 0.5]
    """
    return imputed + weight * (error - imputed)


def imputation_risk(
    error: Float[Array, "*B"], imputed: Float[Array, "*B"], weight: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """What teaches the imputed error, w (e - e^)^2; as in the paper both sides of it learn."""
    return weight * jnp.square(error - imputed)
