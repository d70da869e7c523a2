"""What a batch teaches: the sums and weights of its losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtrec_jax.config import Experiment, fusion_objective
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.nn.layers import unit_length
from mtrec_jax.nn.model import Model, Rows
from mtrec_jax.train.losses import sampled_softmax, task_loss, utility
from mtrec_jax.types import Batch, Catalogue, Lookups, Outputs, PyTree, UserStates

FUSION_CANDIDATES = 16  # the target and its hardest sampled negatives, at one position an example

Sums = dict[str, tuple[jax.Array, jax.Array]]  # {task: (sum of weighted losses, sum of weights)}


def loss_names(experiment: Experiment) -> tuple[str, ...]:
    """Tasks, and "fusion" where a fused order is trained."""
    ranked = any(task.kind != "retrieval" for task in experiment.tasks.values())
    fused = experiment.model.fusion != "none" and ranked and fusion_objective(experiment)
    return (*experiment.tasks, "fusion") if fused else tuple(experiment.tasks)


class Draws(NamedTuple):
    """What chance decides in a batch besides its negatives."""

    users: jax.Array  # key of the dropout in the encoder
    rank: jax.Array  # key of the dropout before the towers
    lottery: jax.Array  # [B, P]: the fusion learns at the position that has the largest


def draw(key: jax.Array, batch: Batch) -> Draws:
    """The draws of a whole batch."""
    key_users, key_rank, key_fusion = jax.random.split(key, 3)
    shape, dtype = batch.weight.shape, batch.weight.dtype
    return Draws(key_users, key_rank, jax.random.uniform(key_fusion, shape, dtype))


def known_weights(experiment: Experiment, batch: Batch) -> dict[str, jax.Array]:
    """Sum of the weights of each loss, where it does not depend on the model: {task: []}.

    It does for a fusion that learns lists, as only retrieved targets count there.
    """
    found = {n: jnp.sum(jnp.asarray(batch.weight * batch.mask[n])) for n in experiment.tasks}
    if "fusion" in loss_names(experiment) and _listed(experiment) is None:
        objective = fusion_objective(experiment)
        _, seen = utility(objective, batch.labels, batch.mask)  # type: ignore[arg-type]
        found["fusion"] = jnp.sum(seen * batch.weight)
    return found


def batch_losses(
    experiment: Experiment,
    manifest: Manifest,
    model: Model,
    params: PyTree,
    fusing: PyTree,
    rows: Rows,
    looked: Lookups,
    batch: Batch,
    catalogue: Catalogue,
    draws: Draws,
) -> Sums:
    """Forward pass and every loss of a batch, as sums and weights.

    `fusing` are the parameters of the network once more, for the lists of the fusion: so their
    gradient can be had apart from that of the other losses.
    """
    vectors = model.items(params, rows, catalogue, looked.item_ids)
    states = model.users(params, rows, vectors, looked.event_index, batch, draws.users)
    candidates = None
    if vectors.shape[0]:
        candidates = jnp.take(vectors, looked.candidate_index, axis=0)
    outputs = model.rank(params, states, candidates, draws.rank)
    sums: Sums = {}
    for name, task in experiment.tasks.items():
        weight = batch.weight * batch.mask[name]
        if task.kind == "retrieval":
            assert candidates is not None
            total = sampled_softmax(
                jnp.asarray(states.vectors),
                candidates,
                jnp.asarray(batch.candidate),
                jnp.take(vectors, looked.negative_index, axis=0),
                looked.negatives,
                catalogue,
                experiment.model.temperature,
                jnp.asarray(weight),
            )
        else:
            logits, labels = outputs.logits[name], jnp.asarray(batch.labels[name])
            total = jnp.sum(task_loss(task, manifest.tasks[name], logits, labels) * weight)
        sums[name] = (total, jnp.sum(weight))
    if "fusion" in loss_names(experiment):
        sums["fusion"] = _fusion_loss(
            experiment, model, fusing, states, outputs, vectors, looked, batch, draws.lottery
        )
    return sums


def _fusion_loss(
    experiment: Experiment,
    model: Model,
    params: PyTree,
    states: UserStates,
    outputs: Outputs,
    vectors: jax.Array,
    looked: Lookups,
    batch: Batch,
    lottery: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Teach the fused score its objective.

    The worth of an example is the worth-weighted mean of the objective's labels. With a retrieval
    task in the objective the fused score must put the target above hard negatives, the more the
    target is worth: at one random position an example, a softmax over the target and the sampled
    negatives that the retrieval scores highest. Without one it is the log-odds of the worth at
    every observed position.
    """
    objective, retrieval = fusion_objective(experiment), _listed(experiment)
    worth, seen = utility(objective, batch.labels, batch.mask)  # type: ignore[arg-type]
    if retrieval is None:
        losses = optax.sigmoid_binary_cross_entropy(outputs.fused, worth)
        weight = seen * batch.weight
        return jnp.sum(losses * weight), jnp.sum(weight)
    weight = worth * batch.mask[retrieval] * batch.weight
    return _listwise_loss(model, params, states, vectors, looked, batch, weight, lottery)


def _listed(experiment: Experiment) -> str | None:
    """The retrieval task in the objective of the fusion, which makes it learn lists."""
    objective = fusion_objective(experiment)
    return next((n for n in objective if experiment.tasks[n].kind == "retrieval"), None)


def _listwise_loss(
    model: Model,
    params: PyTree,
    states: UserStates,
    vectors: jax.Array,
    looked: Lookups,
    batch: Batch,
    weight: jax.Array,
    lottery: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy of the fused score at one position an example: sum and weight."""
    states, vectors = jax.lax.stop_gradient((states, vectors))
    chosen = jnp.argmax(lottery * (weight > 0), axis=1)[
        :, None
    ]  # one random position of those that count
    weight = jnp.take_along_axis(weight, chosen, axis=1)[:, 0]
    user = jnp.take_along_axis(states.vectors, chosen[..., None], axis=1)  # (B, 1, D)
    target = jnp.take_along_axis(jnp.asarray(looked.candidate_index), chosen, axis=1)  # (B, 1)
    target_id = jnp.take_along_axis(jnp.asarray(batch.candidate), chosen, axis=1)
    negatives = unit_length(jnp.take(vectors, looked.negative_index, axis=0))
    scores = jnp.einsum("bd,nd->bn", user[:, 0], negatives)
    scores = jnp.where(target_id == looked.negatives[None], -jnp.inf, scores)
    hard_scores, hardest = jax.lax.top_k(scores, min(FUSION_CANDIDATES - 1, scores.shape[1]))
    # Only targets that would be retrieved beside these negatives teach, as only they are reranked:
    # with the others, a low cosine would be the mark of a target.
    own = jnp.take(vectors, target[:, 0], axis=0)
    retrieved = jnp.sum(user[:, 0] * unit_length(own), axis=-1) >= hard_scores[:, -1]
    weight = weight * retrieved
    index = jnp.concatenate([target, looked.negative_index[hardest]], axis=1)  # (B, K)
    users = jnp.broadcast_to(user, (*index.shape, user.shape[-1]))
    candidates = jnp.take(vectors, index, axis=0)
    cutoff = jnp.take_along_axis(jnp.asarray(states.cutoff), chosen, axis=1)
    alone = states._replace(vectors=users, cutoff=jnp.broadcast_to(cutoff, index.shape))
    outputs = model.rank(params, alone, candidates, None)
    # where negatives are few, the target itself can be among the hardest
    ids = jnp.concatenate([target_id, looked.negatives[hardest]], axis=1)
    again = (ids == target_id).at[:, 0].set(False)
    logits = jnp.where(again, -jnp.inf, outputs.fused)
    losses = jax.nn.logsumexp(logits, axis=1) - logits[:, 0]
    return jnp.sum(losses * weight), jnp.sum(weight)
