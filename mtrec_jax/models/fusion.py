"""Attention over the tasks' outputs: one score, and how much each task contributed to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.models.layers import linear, normal
from mtrec_jax.types import Fusing


class AttentionFusion(nnx.Module):
    """A user-dependent weighting of the task scores into the final order.

    The user's state asks, each task answers with a key made of its identity and its hidden vector;
    the softmax over tasks weighs the calibrated scores: fused = sum_t a_t (g_t s_t + b_t), g_t > 0.
    All inputs are cut off from the gradient, so the fusion learns its declared objective without
    disturbing the tasks that it fuses.
    """

    def __init__(
        self,
        state: int,
        tasks: tuple[str, ...],
        hidden: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        size = 16
        self.tasks = tasks
        self.query = linear(state, size, dtype=dtype, rngs=rngs)
        self.key = linear(hidden, size, dtype=dtype, rngs=rngs)
        identity = normal(rngs, (len(tasks), size), 0.02, dtype)
        self.identity = nnx.Param(identity)
        self.gain = nnx.Param(jnp.full((len(tasks),), 0.5413, dtype))  # softplus(0.5413) = 1
        self.bias = nnx.Param(jnp.zeros((len(tasks),), dtype))

    def __call__(self, given: Fusing) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and weights of the tasks [n, T]."""
        state, hidden, scores = jax.lax.stop_gradient(given)
        query = self.query(state) * self.identity[...].shape[1] ** -0.5
        logits = []
        for t, task in enumerate(self.tasks):
            own = self.identity[...][t][None]
            key = self.key(hidden[task]) + own if task in hidden else own
            logits.append(jnp.sum(query * key, axis=-1))
        weights = jax.nn.softmax(jnp.stack(logits, axis=-1), axis=-1)
        gain, bias = jax.nn.softplus(self.gain[...]), self.bias[...]
        calibrated = [gain[t] * scores[task] + bias[t] for t, task in enumerate(self.tasks)]
        fused = sum(weights[:, t] * score for t, score in enumerate(calibrated))
        return jnp.asarray(fused), weights
