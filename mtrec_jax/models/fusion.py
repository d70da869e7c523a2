"""Attention over the tasks' outputs: one score, and how much each task contributed to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class AttentionFusion(nnx.Module):
    """A user-dependent weighting of the task scores into the final order.

    The user's state asks, each task answers with a key made of its identity and its hidden vector;
    the softmax over tasks weighs the calibrated scores: fused = sum_t a_t (g_t s_t + b_t), g_t > 0.
    All inputs are cut off from the gradient, so the fusion learns its declared objective without
    disturbing the tasks that it fuses.
    """

    def __init__(self, context: int, tasks: int, hidden: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        size = 16
        self.query = nnx.Linear(context, size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(hidden, size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.identity = nnx.Param(0.02 * jax.random.normal(rngs.params(), (tasks, size), dtype))
        self.gain = nnx.Param(jnp.full((tasks,), 0.5413, dtype))  # softplus(0.5413) = 1
        self.bias = nnx.Param(jnp.zeros((tasks,), dtype))

    def __call__(
        self, context: jax.Array, hidden: list[jax.Array | None], scores: list[jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Context [n, I], per task hidden [n, H] (or None) and score [n] -> fused [n], weights
        [n, T]."""
        context, hidden, scores = jax.lax.stop_gradient((context, hidden, scores))
        query = self.query(context) * self.identity[...].shape[1] ** -0.5
        logits = []
        for t, vector in enumerate(hidden):
            own = self.identity[...][t][None]
            key = own if vector is None else self.key(vector) + own
            logits.append(jnp.sum(query * key, axis=-1))
        weights = jax.nn.softmax(jnp.stack(logits, axis=-1), axis=-1)
        gain, bias = jax.nn.softplus(self.gain[...]), self.bias[...]
        calibrated = [gain[t] * score + bias[t] for t, score in enumerate(scores)]
        fused = sum(weights[:, t] * score for t, score in enumerate(calibrated))
        return jnp.asarray(fused), weights
