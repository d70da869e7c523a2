"""What a batch teaches: the sums and weights of its losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtrec_jax.config import Experiment, fusion_objective
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.losses.fusion import fusion_loss, listed
from mtrec_jax.losses.tasks import sampled_softmax, task_loss, utility
from mtrec_jax.models.model import Model, Rows
from mtrec_jax.sharding import replicated
from mtrec_jax.types import Batch, Catalogue, Lookups, PyTree

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
    if "fusion" in loss_names(experiment) and listed(experiment) is None:
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
    mesh: jax.sharding.Mesh,
) -> Sums:
    """Forward pass and every loss of a batch, as sums and weights.

    `fusing` are the parameters of the network once more, for the lists of the fusion: so their
    gradient can be had apart from that of the other losses.
    """
    vectors = model.batch_items(params, rows, catalogue, looked, batch)
    # Each example meets all negatives.
    shared = replicated((vectors.negatives, looked.negatives), mesh)
    vectors, looked = vectors._replace(negatives=shared[0]), looked._replace(negatives=shared[1])
    states = model.users(params, rows, vectors.events, batch, draws.users)
    outputs = model.rank(params, states, vectors.candidates, draws.rank)
    sums: Sums = {}
    for name, task in experiment.tasks.items():
        weight = batch.weight * batch.mask[name]
        if task.kind == "retrieval":
            assert vectors.candidates is not None
            total = sampled_softmax(
                jnp.asarray(states.vectors),
                vectors.candidates,
                jnp.asarray(batch.candidate),
                vectors.negatives,
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
        lottery = draws.lottery
        sums["fusion"] = fusion_loss(
            experiment, model, fusing, states, outputs, vectors, looked, batch, lottery, mesh
        )
    return sums
