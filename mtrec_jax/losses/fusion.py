"""What teaches the fused order of candidates. Only the fusion's own parameters learn from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mtrec_jax.models.layers import unit_length
from mtrec_jax.sharding import AXES

CANDIDATES = 16  # the target and its hardest sampled negatives, at one position an example


def utility(
    objective: dict[str, float],
    labels: dict[str, Float[Array, "B P"]],
    mask: dict[str, Float[Array, "B P"]],
) -> tuple[Float[Array, "B P"], Float[Array, "B P"]]:
    """Worth of what happened at each position, scaled to [0, 1], and where anything was observed.

    A label outside its sample space (no purchase without a click) counts as not having happened.
    """
    total = sum(objective.values())
    worth = sum(objective[t] / total * labels[t] * mask[t] for t in objective)
    seen = jnp.max(jnp.stack([mask[t] for t in objective]), axis=0)
    return jnp.asarray(worth), seen


def chosen_position(weight: Float[Array, "B P"], lottery: Float[Array, "B P"]) -> Int[Array, "B 1"]:
    """One random position an example, of those that have a weight."""
    return jnp.argmax(lottery * (weight > 0), axis=1)[:, None]


def hardest(
    user: Float[Array, "B D"],
    target: Float[Array, "B D"],
    target_id: Int[Array, "B 1"],
    negatives: Float[Array, "n D"],
    negative_ids: Int[Array, " n"],
    mesh: Mesh,
) -> tuple[Int[Array, "B K"], Float[Array, " B"]]:
    """The sampled negatives that the retrieval scores highest, and whether it would bring the
    target beside them.

    Only such targets teach, as only they are put in order: with the others, a low cosine would be
    the mark of a target.
    """
    scores = jnp.einsum("bd,nd->bn", user, unit_length(negatives))
    scores = jnp.where(target_id == negative_ids[None], -jnp.inf, scores)
    count = min(CANDIDATES - 1, scores.shape[1])
    # XLA does not split top_k over devices by itself.
    split = jax.shard_map(
        lambda part: jax.lax.top_k(part, count), mesh=mesh, in_specs=P(AXES), out_specs=P(AXES)
    )
    best, places = split(scores)
    own = jnp.sum(user * unit_length(target), axis=-1)
    return places, (own >= best[:, -1]).astype(user.dtype)


def listwise(
    fused: Float[Array, "B K"], ids: Int[Array, "B K"], weight: Float[Array, " B"]
) -> Float[Array, ""]:
    """Softmax cross-entropy of the fused score; the target stands first. The weighted sum.

    Where negatives are few, the target itself can be among the hardest: it is left out there.
    """
    again = (ids == ids[:, :1]).at[:, 0].set(False)
    logits = jnp.where(again, -jnp.inf, fused)
    return jnp.sum((jax.nn.logsumexp(logits, axis=1) - logits[:, 0]) * weight)
