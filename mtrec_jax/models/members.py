"""Members of an ensemble in one model, which share the layers of the towers, or nothing of them.

Wen et al., ICLR 2020 (BatchEnsemble) scale what goes into shared layers, member by member;
Gorishniy et al., ICLR 2025 (TabM) found that scaling what enters the first one, with heads of their
own, does nearly as well as scaling each layer (their TabM-mini). That works with towers of any
kind, which are run on n K pairs in the place of n.

Where embeddings are most of a model, members that share them err together. With `members_share =
"encoder"` each has tables (as in the multi-embedding of Guo et al., ICML 2024) and towers of its
own, as in a deep ensemble (Lakshminarayanan et al., NeurIPS 2017).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.losses.tasks import head_of
from mtrec_jax.models.layers import normal, signs
from mtrec_jax.models.towers import TowerInput, TowerOutput, TowerTask


class Members(nnx.Module):
    """What each of K members has of its own where the towers are shared: scales of their input x,
    first of random signs, and a head a task, which is added to the towers' own."""

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

    def answers(self, found: TowerOutput) -> list[TowerOutput]:
        """What each member says, of what the towers say of its pairs."""
        logits = {task: self._by_member(shared) for task, shared in found.logits.items()}
        for task, head in zip(self.names, self.heads, strict=True):
            own = jnp.einsum("nkh,khc->nkc", self._by_member(found.hidden[task]), head[...])
            logits[task] += own.reshape(logits[task].shape)
        rest = jax.tree.map(self._by_member, (found.hidden, found.diagnostics))
        each = TowerOutput(logits, *rest)
        return [jax.tree.map(lambda of, k=k: of[:, k], each) for k in range(self.count)]

    def _by_member(self, array: jax.Array) -> jax.Array:
        return array.reshape(-1, self.count, *array.shape[1:])


def together(
    members: Sequence[TowerOutput], tasks: Mapping[str, TowerTask]
) -> tuple[TowerOutput, dict[str, jax.Array]]:
    """The answer of all, with means of hidden vectors, and what each member says: {task: [n, K]},
    or [n, K, C]. Diagnostics stay each member's, [n, K, ...]: the first expert of one member has
    nothing in common with that of another."""
    each = jax.tree.map(lambda *of: jnp.stack(of, axis=1), *members)
    hidden = jax.tree.map(lambda of: jnp.mean(of, axis=1), each.hidden)
    logits = {
        task: mean_answer(tasks[task].kind, of, tasks[task].loss)
        for task, of in each.logits.items()
    }
    return TowerOutput(logits, hidden, each.diagnostics), each.logits


def mean_answer(kind: str, logits: jax.Array, loss: str = "") -> jax.Array:
    """The logits [n] of the mean of K members' probabilities, given logits [n, K]; of classes [n,
    C] of [n, K, C]. Other predictions are averaged themselves.

    >>> even, sure = 0.0, 2.1972246  # probabilities .5 and .9, whose mean is .7
    >>> round(float(jax.nn.sigmoid(mean_answer("binary", jnp.array([[even, sure]])))[0]), 4)
    0.7
    """
    return jnp.asarray(head_of(kind, loss).mean(logits))
