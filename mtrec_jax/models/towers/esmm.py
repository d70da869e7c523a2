"""Entire-space multi-task model (Ma et al., SIGIR 2018): probabilities multiply in the funnel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtrec_jax.errors import ConfigError
from mtrec_jax.models.layers import MLP, MaybeHidden, TaskHeads
from mtrec_jax.models.towers.contract import TowerInput, TowerOutput, TowerSizes, TowerTask


@dataclass(frozen=True, kw_only=True)
class ESMM:
    """`[model.towers] kind = "esmm"`: for a binary task `where` another one is 1, such as a
    purchase after a click.

    Each task has a network of its own over the shared embeddings. The logit of the purchase is that
    of its probability given a click, but what it is taught by is the probability of both,
    p(click) p(purchase | click), over *all* impressions, and never the conditional one over clicks
    alone: so it is learned without the bias of that selection.
    """

    kind: Literal["esmm"] = "esmm"
    expert_hidden: MaybeHidden = (128, 64)  # of each task's network
    tower_hidden: MaybeHidden = (32,)

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> ESMMTowers:
        """The towers.

        Raises:
          ConfigError: no binary task has a sample space (`where`).
        """
        return ESMMTowers(
            self, sizes, needed_funnel(sizes.tasks, self.kind), dtype=dtype, rngs=rngs
        )


class ESMMTowers(nnx.Module):
    """A network a task, and the losses of the funnel."""

    def __init__(
        self,
        options: ESMM,
        sizes: TowerSizes,
        funnel: dict[str, str],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.funnel = funnel
        hidden = options.expert_hidden
        self.networks = nnx.List(
            [MLP(sizes.inputs, hidden, dtype=dtype, rngs=rngs) for _ in sizes.tasks]
        )
        outputs = {name: task.outputs for name, task in sizes.tasks.items()}
        last = hidden[-1] if hidden else sizes.inputs
        self.heads = TaskHeads(last, outputs, options.tower_hidden, dtype=dtype, rngs=rngs)

    def __call__(self, given: TowerInput) -> TowerOutput:
        return TowerOutput(*self.heads([network(given.x) for network in self.networks]), {})

    def losses(
        self,
        logits: Mapping[str, jax.Array],
        labels: Mapping[str, jax.Array],
        mask: Mapping[str, jax.Array],
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """The loss of each task of the funnel over all impressions, and where it counts: {task:
        ([B, P], [B, P])}, given logits, labels and masks {task: [B, P]}."""
        found = {}
        for name in self.funnel:
            path = path_to(name, self.funnel)
            label, counts = over_impressions(path, labels, mask)
            found[name] = product_cross_entropy([logits[task] for task in path], label), counts
        return found


def funnel_of(tasks: Mapping[str, TowerTask]) -> dict[str, str]:
    """{binary task: the one before it}, of those whose sample space is another task.

    >>> funnel_of({"click": TowerTask("binary"), "buy": TowerTask("binary", where="click")})
    {'buy': 'click'}
    """
    return {
        name: task.where
        for name, task in tasks.items()
        if task.kind == "binary" and task.where in tasks
    }


def needed_funnel(tasks: Mapping[str, TowerTask], kind: str) -> dict[str, str]:
    """`funnel_of` for towers that cannot do without.

    Raises:
      ConfigError: no binary task has a sample space (`where`).
    """
    funnel = funnel_of(tasks)
    if not funnel:
        raise ConfigError(
            f'model.towers: kind = "{kind}" needs a binary task whose sample space is another '
            'one, such as tasks.buy = { kind = "binary", where = "click" }'
        )
    return funnel


def path_to(task: str, funnel: Mapping[str, str]) -> list[str]:
    """From the first task of the funnel to this one.

    >>> path_to("buy", {"buy": "cart", "cart": "click"})
    ['click', 'cart', 'buy']
    """
    path = [task]
    while path[0] in funnel:
        path.insert(0, funnel[path[0]])
    return path


def over_impressions(
    path: list[str], labels: Mapping[str, jax.Array], mask: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Whether everything on the path happened, and where that is known; both [B, P], given labels
    and masks {task: [B, P]}."""
    label, counts = labels[path[0]], mask[path[0]]
    for task in path[1:]:  # what has not happened before cannot happen after
        counts = jnp.where(label > 0, mask[task], counts)
        label = label * labels[task]
    return label, counts


def product_cross_entropy(
    logits: list[Float[Array, "*B"]], label: Float[Array, "*B"]
) -> Float[Array, "*B"]:
    """Cross-entropy of the product of probabilities that are given as logits.

    >>> one = product_cross_entropy([jnp.array([0.0]), jnp.array([0.0])], jnp.array([1.0]))
    >>> round(float(one[0]), 4)  # -log(1/2 * 1/2)
    1.3863
    """
    log_all = jnp.zeros_like(logits[0])
    log_not = jnp.full_like(logits[0], -jnp.inf)  # of not all: this one fails after those before
    for logit in logits:
        log_not = jnp.logaddexp(log_not, log_all + jax.nn.log_sigmoid(-logit))
        log_all = log_all + jax.nn.log_sigmoid(logit)
    return -label * log_all - (1 - label) * log_not
