"""The loss that teaches the fused order of candidates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from mtrec_jax.config import Experiment, fusion_objective
from mtrec_jax.losses.tasks import utility
from mtrec_jax.models.layers import unit_length
from mtrec_jax.models.model import Model
from mtrec_jax.sharding import AXES
from mtrec_jax.types import Batch, ItemVectors, Lookups, Outputs, PyTree, UserStates

FUSION_CANDIDATES = 16  # the target and its hardest sampled negatives, at one position an example


def fusion_loss(
    experiment: Experiment,
    model: Model,
    params: PyTree,
    states: UserStates,
    outputs: Outputs,
    vectors: ItemVectors,
    looked: Lookups,
    batch: Batch,
    lottery: jax.Array,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Teach the fused score its objective.

    The worth of an example is the worth-weighted mean of the objective's labels. With a retrieval
    task in the objective the fused score must put the target above hard negatives, the more the
    target is worth: at one random position an example, a softmax over the target and the sampled
    negatives that the retrieval scores highest. Without one it is the log-odds of the worth at
    every observed position.
    """
    objective, retrieval = fusion_objective(experiment), listed(experiment)
    worth, seen = utility(objective, batch.labels, batch.mask)  # type: ignore[arg-type]
    if retrieval is None:
        losses = optax.sigmoid_binary_cross_entropy(outputs.fused, worth)
        weight = seen * batch.weight
        return jnp.sum(losses * weight), jnp.sum(weight)
    weight = worth * batch.mask[retrieval] * batch.weight
    return _listwise_loss(model, params, states, vectors, looked, batch, weight, lottery, mesh)


def listed(experiment: Experiment) -> str | None:
    """The retrieval task in the objective of the fusion, which makes it learn lists."""
    objective = fusion_objective(experiment)
    return next((n for n in objective if experiment.tasks[n].kind == "retrieval"), None)


def _listwise_loss(
    model: Model,
    params: PyTree,
    states: UserStates,
    vectors: ItemVectors,
    looked: Lookups,
    batch: Batch,
    weight: jax.Array,
    lottery: jax.Array,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy of the fused score at one position an example: sum and weight."""
    states, vectors = jax.lax.stop_gradient((states, vectors))
    # one random position of those that count
    chosen = jnp.argmax(lottery * (weight > 0), axis=1)[:, None]
    weight = jnp.take_along_axis(weight, chosen, axis=1)[:, 0]
    user = jnp.take_along_axis(states.vectors, chosen[..., None], axis=1)  # (B, 1, D)
    target_id = jnp.take_along_axis(jnp.asarray(batch.candidate), chosen, axis=1)
    scores = jnp.einsum("bd,nd->bn", user[:, 0], unit_length(vectors.negatives))
    scores = jnp.where(target_id == looked.negatives[None], -jnp.inf, scores)
    count = min(FUSION_CANDIDATES - 1, scores.shape[1])
    # XLA does not split top_k over devices by itself.
    split = jax.shard_map(
        lambda part: jax.lax.top_k(part, count), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES)
    )
    hard_scores, hardest = split(scores)
    # Only targets that would be retrieved beside these negatives teach, as only they are reranked:
    # with the others, a low cosine would be the mark of a target.
    assert vectors.candidates is not None
    own = jnp.take_along_axis(vectors.candidates, chosen[..., None], axis=1)  # (B, 1, D)
    retrieved = jnp.sum(user[:, 0] * unit_length(own[:, 0]), axis=-1) >= hard_scores[:, -1]
    weight = weight * retrieved
    hard = jnp.take(vectors.negatives, hardest, axis=0)
    candidates = jnp.concatenate([own, hard], axis=1)  # (B, K, D)
    users = jnp.broadcast_to(user, candidates.shape)
    cutoff = jnp.take_along_axis(jnp.asarray(states.cutoff), chosen, axis=1)
    alone = states._replace(vectors=users, cutoff=jnp.broadcast_to(cutoff, candidates.shape[:2]))
    outputs = model.rank(params, alone, candidates, None)
    # where negatives are few, the target itself can be among the hardest
    ids = jnp.concatenate([target_id, looked.negatives[hardest]], axis=1)
    again = (ids == target_id).at[:, 0].set(False)
    logits = jnp.where(again, -jnp.inf, outputs.fused)
    losses = jax.nn.logsumexp(logits, axis=1) - logits[:, 0]
    return jnp.sum(losses * weight), jnp.sum(weight)
