"""Adaptive information transfer along a funnel (Xi et al., KDD 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.layers import MLP, Hidden, MaybeHidden, TaskHeads, linear
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes, TowerTask
from mtrec_jax.models.towers.esmm import funnel_of, over_impressions, path_to

ALMOST = 1e-6  # -log of the largest conditional probability


@dataclass(frozen=True, kw_only=True)
class AITM:
    """`[model.towers] kind = "aitm"`: each step of a funnel learns from the step before it.

    The steps are binary tasks: along their `where`; or where none has one, those named in `steps`,
    first to last, each label being about all impressions and none 1 where the one before is 0.
    Other tasks have a network of their own.

    Towers and losses are about all impressions, as in the paper: p(purchase), not p(purchase |
    click). A task with `where` predicts p(purchase) / p(click) nevertheless, the conditional
    probability, as it does with any other towers. The calibrator is the extra loss
    max(p(later step) - p(earlier step), 0), without which that ratio could pass 1.
    """

    kind: Literal["aitm"] = "aitm"
    steps: tuple[str, ...] = ()  # binary tasks in their order; (): along `where`
    calibrator_weight: Annotated[float, Field(ge=0)] = 0.6
    expert_hidden: Hidden = (128, 64)  # of each task's network
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> AITMTowers:
        """The towers.

        Raises:
          ConfigError: no steps are declared, in both ways, or such as are no binary tasks.
        """
        before = steps_before(sizes.tasks, self.steps)
        return AITMTowers(self, sizes, before, dtype=dtype, rngs=rngs)


def steps_before(tasks: Mapping[str, TowerTask], steps: tuple[str, ...]) -> dict[str, str]:
    """{task: the step before it}, along `where` or the declared steps.

    Raises:
      ConfigError: neither says an order of binary tasks, or both do.

    >>> steps_before({"view": TowerTask("binary"), "stay": TowerTask("binary")}, ("view", "stay"))
    {'stay': 'view'}
    """
    funnel = funnel_of(tasks)
    if not funnel and not steps:
        raise ConfigError(
            'model.towers: kind = "aitm" needs to know which step follows which: give a binary '
            'task its sample space, such as tasks.buy = { kind = "binary", where = "click" }, or '
            'name the tasks in their order, model.towers.steps = ["click", "buy"]'
        )
    if funnel and steps:
        raise ConfigError(
            f"model.towers.steps: tasks.{next(iter(funnel))}.where says the order already; leave "
            "steps out"
        )
    binary = [name for name, task in tasks.items() if task.kind == "binary"]
    if steps and (len(steps) < 2 or len({*steps} & {*binary}) < len(steps)):
        raise ConfigError(
            f"model.towers.steps: {', '.join(steps)}: name two or more of the binary tasks "
            f"({', '.join(binary)}), each once"
        )
    return funnel or dict(zip(steps[1:], steps, strict=False))


class AITMTowers(nnx.Module):
    """Diagnostics: "attention" [n, S, 2], what each step that has one before it takes from there
    and from its own network, in the order of the tasks; "marginal/TASK" [n], the logit of a task
    with `where` over all impressions."""

    def __init__(
        self,
        options: AITM,
        sizes: TowerSizes,
        before: dict[str, str],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.before, self.tasks = before, tuple(sizes.tasks)
        self.where = funnel_of(sizes.tasks)
        self.weight = options.calibrator_weight
        self.extra_losses = ("calibrator",) if self.weight else ()
        self.logits_of = {f"marginal/{name}": name for name in self.where}
        self.loss_inputs = tuple(self.logits_of)
        hidden, width = options.expert_hidden, options.expert_hidden[-1]
        self.networks = nnx.List(
            [MLP(sizes.inputs, hidden, dtype=dtype, rngs=rngs) for _ in sizes.tasks]
        )
        self.transfers = nnx.List([Transfer(width, dtype=dtype, rngs=rngs) for _ in before])
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        self.heads = TaskHeads(width, outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        known = {
            name: network(given.x) for name, network in zip(self.tasks, self.networks, strict=True)
        }
        transfers, attention = dict(zip(self.before, self.transfers, strict=True)), {}
        for name in sorted(self.before, key=lambda name: len(path_to(name, self.before))):
            earlier = known[self.before[name]]
            known[name], attention[name] = transfers[name](earlier, known[name])
        logits, hidden = self.heads([known[name] for name in self.tasks])
        looks = {"attention": jnp.stack([attention[name] for name in self.before], axis=1)}
        looks |= {f"marginal/{name}": logits[name] for name in self.where}
        given_earlier = {n: conditional(logits[n], logits[w]) for n, w in self.where.items()}
        return TowerOutput(logits | given_earlier, hidden, looks)

    def losses(
        self,
        logits: Mapping[str, jax.Array],
        labels: Mapping[str, jax.Array],
        mask: Mapping[str, jax.Array],
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Cross-entropy of each step with `where` over all impressions, and the calibrator where
        the label of a first step is known: {loss: ([B, P], [B, P])}, given logits and marginal
        ones, labels and masks, all [B, P]."""
        marginal = {n: logits[f"marginal/{n}" if n in self.where else n] for n in self.tasks}
        found = {}
        for name in self.where:
            label, counts = over_impressions(path_to(name, self.where), labels, mask)
            found[name] = optax.sigmoid_binary_cross_entropy(marginal[name], label), counts
        if self.weight:
            pairs = list(self.before.items())
            hinges = [later_above_earlier(marginal[n], marginal[w]) for n, w in pairs]
            first = [mask[w] for _, w in pairs if w not in self.before]
            known = jnp.max(jnp.stack(first), axis=0)
            found["calibrator"] = self.weight * jnp.sum(jnp.stack(hinges), axis=0), known
        return found


class Transfer(nnx.Module):
    """The AIT module: attention over what the step before passes on and what this one knows."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.passed = MLP(width, (width,), dtype=dtype, rngs=rngs)
        self.value, self.key, self.query = (
            linear(width, width, dtype=dtype, rngs=rngs) for _ in range(3)
        )

    def __call__(
        self, earlier: Float[Array, "n k"], own: Float[Array, "n k"]
    ) -> tuple[Float[Array, "n k"], Float[Array, "n 2"]]:
        """z = sum of w_u h1(u) over u in {p, q}, with w the softmax of h2(u) . h3(u) / sqrt(k), p
        the transferred and q the step's own vector; z and w."""
        both = jnp.stack([self.passed(earlier), own], axis=1)  # (n, 2, k)
        agree = jnp.sum(self.key(both) * self.query(both), axis=-1) / both.shape[-1] ** 0.5
        weights = jax.nn.softmax(agree, axis=-1)
        return jnp.sum(weights[..., None] * self.value(both), axis=1), weights


def conditional(later: Float[Array, "*B"], earlier: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The logit of p(later) / p(earlier), which stays below 1, from the logits of both.

    >>> odds = conditional(jnp.log(jnp.array([1 / 9])), jnp.log(jnp.array([1 / 4])))  # .1 / .2
    >>> abs(round(float(odds[0]), 3))
    0.0
    """
    ratio = jnp.minimum(jax.nn.log_sigmoid(later) - jax.nn.log_sigmoid(earlier), -ALMOST)
    return ratio - jnp.log(-jnp.expm1(ratio))


def later_above_earlier(
    later: Float[Array, "*B"], earlier: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """max(p(later) - p(earlier), 0), from the logits of both."""
    return jnp.maximum(jax.nn.sigmoid(later) - jax.nn.sigmoid(earlier), 0)
