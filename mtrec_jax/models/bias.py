"""What made people act beside what was shown: learned apart, and left out of every answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.config import Bias
from mtrec_jax.models.inputs import Inputs, SideFeatures
from mtrec_jax.models.layers import MLP, dropout, linear
from mtrec_jax.types import Outputs


class BiasTower(nnx.Module):
    """A shallow tower of the bias features, whose logits are added to the tasks' in training (Zhao
    et al., "Recommending What Video to Watch Next", RecSys 2019, section 4.3).

    The tasks' own towers do not see these features, so that what the place on the page explains is
    not put down to what stood there. In a share of the positions, `dropout`, the tower says nothing
    (the paper's features are missing there): so the tasks' logits alone stay probabilities of their
    own, those of the log as a whole. Answers and evaluation are without the tower.
    """

    def __init__(
        self, inputs: Inputs, options: Bias, numbers: Any, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.rate = options.dropout
        self.outputs = {n: inputs.tasks[n].outputs for n in options.tasks or inputs.tasks}
        self.features = SideFeatures(inputs, "bias", numbers, dtype=dtype, rngs=rngs)
        width = self.features.outputs
        self.hidden = MLP(width, options.hidden, dtype=dtype, rngs=rngs)
        last = options.hidden[-1] if options.hidden else width
        self.head = linear(last, sum(self.outputs.values()), dtype=dtype, rngs=rngs)

    def __call__(self, features: jax.Array) -> dict[str, jax.Array]:
        """Features [B, P, F] to logits {task: [B, P], or [B, P, C]}."""
        out = self.head(self.hidden(features))
        found, start = {}, 0
        for task, count in self.outputs.items():
            found[task] = out[..., start] if count == 1 else out[..., start : start + count]
            start += count
        return found

    def added(
        self,
        outputs: Outputs,
        features: jax.Array,
        key: jax.Array | None,
        logits_of: Mapping[str, str] = {},
    ) -> Outputs:
        """The tasks' logits, and each member's, with the tower's; with a key it is silent at some
        positions. `logits_of` {diagnostic [B, P], of members [B, P, K]: task}: logits of tasks."""
        said = dropout(jnp.ones(features.shape[:2], features.dtype), self.rate, key) > 0
        logits, members = dict(outputs.logits), dict(outputs.members)
        looks = dict(outputs.diagnostics)
        for task, own in self(features).items():
            heard = jnp.where(said if own.ndim == 2 else said[..., None], own, 0)
            logits[task] = logits[task] + _beside(heard, logits[task])
            if members:
                members[task] = members[task] + _beside(heard[:, :, None], members[task])
            for name in (name for name, of in logits_of.items() if of == task):
                looks[name] = looks[name] + _beside(heard, looks[name])
        return outputs._replace(logits=logits, members=members, diagnostics=looks)


def _beside(own: jax.Array, logits: jax.Array) -> jax.Array:
    """One number for all thresholds of a task of ordered classes, as its towers give one score."""
    return own.reshape(*own.shape, *[1] * (logits.ndim - own.ndim))
