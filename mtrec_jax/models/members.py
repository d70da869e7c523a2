"""Members of an ensemble in one model: they share all weights but a few of their own.

Wen et al., ICLR 2020 (BatchEnsemble) scale what goes into shared layers, member by member;
Gorishniy et al., ICLR 2025 (TabM) found that scaling what enters the first one, with heads of their
own, does nearly as well as scaling each layer (their TabM-mini). That works with towers of any
kind, which are run on n K pairs in the place of n.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.losses.tasks import head_of
from mtrec_jax.models.layers import normal, signs
from mtrec_jax.models.towers import TowerInput, TowerOutput, TowerTask


class Members(nnx.Module):
    """What each of K members has of its own: scales of the towers' input x, first of random signs,
    and a head a task, which is added to the towers' own."""

    def __init__(
        self,
        count: int,
        inputs: int,
        hidden: Mapping[str, int],
        tasks: Mapping[str, TowerTask],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.count = count
        self.kinds = tuple((name, task.kind, task.loss) for name, task in tasks.items())
        self.scales = nnx.Param(signs(rngs, (count, inputs), dtype))
        self.names = tuple(hidden)
        shapes = [(count, size, tasks[name].outputs) for name, size in hidden.items()]
        self.heads = nnx.List([nnx.Param(normal(rngs, s, s[1] ** -0.5, dtype)) for s in shapes])

    def given(self, pairs: TowerInput) -> TowerInput:
        """The pairs of each member, [n, ...] -> [n K, ...]: those of an example stay together."""
        repeated = jax.tree.map(lambda array: jnp.repeat(array, self.count, axis=0), pairs)

        def scaled(x: jax.Array) -> jax.Array:
            each = x[:, None] * self.scales[...][None]  # (n, K, I)
            return each.reshape(-1, x.shape[-1])

        own = {task: scaled(x) for task, x in pairs.own.items()}
        return repeated._replace(x=scaled(pairs.x), own=own)

    def logits(self, found: TowerOutput) -> dict[str, jax.Array]:
        """What each member says: {task: [n, K]}, or [n, K, C]."""
        each = {}
        for task, shared in found.logits.items():
            each[task] = self._by_member(shared)
            if task in found.hidden:
                hidden, head = found.hidden[task], self.heads[self.names.index(task)][...]
                own = jnp.einsum("nkh,khc->nkc", self._by_member(hidden), head)
                each[task] += own.reshape(each[task].shape)
        return each

    def together(self, found: TowerOutput, each: Mapping[str, jax.Array]) -> TowerOutput:
        """The answer of all: hidden vectors and diagnostics are means."""

        def mean(array: jax.Array) -> jax.Array:
            return jnp.mean(self._by_member(array), axis=1)

        return TowerOutput(
            {task: mean_answer(kind, each[task], loss) for task, kind, loss in self.kinds},
            jax.tree.map(mean, found.hidden),
            jax.tree.map(mean, found.diagnostics),
        )

    def _by_member(self, array: jax.Array) -> jax.Array:
        return array.reshape(-1, self.count, *array.shape[1:])


def mean_answer(kind: str, logits: jax.Array, loss: str = "") -> jax.Array:
    """The logits [n] of the mean of K members' probabilities, given logits [n, K]; of classes [n,
    C] of [n, K, C]. Other predictions are averaged themselves.

    >>> even, sure = 0.0, 2.1972246  # probabilities .5 and .9, whose mean is .7
    >>> round(float(jax.nn.sigmoid(mean_answer("binary", jnp.array([[even, sure]])))[0]), 4)
    0.7
    """
    return jnp.asarray(head_of(kind, loss).mean(logits))
