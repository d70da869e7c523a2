"""Losses and gradients of a batch, at once or in parts one after the other.

The losses are taken in two halves: `encode` up to the shared representation, `losses` behind it. So
a balancing method may have the gradient of each task there for a backward pass through the towers
alone, and whatever it makes of them goes through the encoders once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtrec_jax.balance import Gradients, Pullback
from mtrec_jax.models.model import Model
from mtrec_jax.sharding import cut_examples, joined_examples, replicated
from mtrec_jax.types import Batch, Catalogue, PyTree, Wanted


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


class Back(NamedTuple):
    """The way back: `pullback` for the balancing method, and `finish(its gradients)`, which gives
    the gradients of the dense parameters and of the rows, and the loss of the fusion."""

    pullback: Pullback
    finish: Callable[[Gradients], tuple[PyTree, dict[str, jax.Array], jax.Array]]


class Given(NamedTuple):
    """What a batch is taught with."""

    network: PyTree  # dense parameters of the layers
    rows: dict[str, jax.Array]
    batch: Batch
    wanted: Wanted
    draws: Draws


def backward(
    model: Model,
    given: Given,
    catalogue: Catalogue,
    weights: dict[str, jax.Array],
    parts: int,
    mesh: jax.sharding.Mesh,
) -> Back:
    """Losses of a batch, each divided by its weight in `weights`, and the way back.

    With more than one part the activations of one part exist at a time (`train.accumulate`).
    """
    totals = {name: jnp.maximum(weight, 1e-9) for name, weight in weights.items()}
    if parts == 1:
        return _whole(model, given, catalogue, totals, mesh)
    return _in_parts(model, given, catalogue, totals, parts, mesh)


def _whole(
    model: Model,
    given: Given,
    catalogue: Catalogue,
    totals: dict[str, jax.Array],
    mesh: jax.sharding.Mesh,
) -> Back:
    network, rows, batch, wanted, draws = given
    # each example meets all negatives
    wanted = wanted._replace(negatives=replicated(wanted.negatives, mesh))

    def encode(network: PyTree, rows: dict[str, jax.Array]) -> PyTree:
        params = {"network": network}
        shared = model.encode(params, rows, batch, catalogue, wanted, draws.users)
        return shared._replace(negatives=replicated(shared.negatives, mesh))

    def behind(network: PyTree, shared: PyTree) -> tuple[jax.Array, PyTree]:
        params = {"network": network}
        sums, fusing = model.losses(params, shared, batch, catalogue, wanted, draws.rank)
        return jnp.stack([sums[n] / totals[n] for n in model.names]), fusing

    shared, through_encoder = jax.vjp(encode, network, rows)
    losses, through_heads, fusing = jax.vjp(behind, network, shared, has_aux=True)

    def pullback(weights: jax.Array) -> Gradients:
        return Gradients(losses, *through_heads(weights))

    def fusion_loss(part: PyTree) -> jax.Array:
        params = {"network": network | {"fusion": part}}
        given = params, shared, fusing, batch, wanted, draws.lottery, mesh
        assert model.fusion_loss is not None
        return model.fusion_loss(*given) / totals["fusion"]

    def finish(combined: Gradients) -> tuple[PyTree, dict[str, jax.Array], jax.Array]:
        of_encoder, of_rows = through_encoder(combined.shared)
        of_network = jax.tree.map(jnp.add, combined.heads, of_encoder)
        if not model.fuses:
            return of_network, of_rows, jnp.zeros(())
        loss, own = jax.value_and_grad(fusion_loss)(network["fusion"])  # it touches nothing else
        return of_network | {"fusion": own}, of_rows, loss

    return Back(pullback, finish)


def _in_parts(
    model: Model,
    given: Given,
    catalogue: Catalogue,
    totals: dict[str, jax.Array],
    parts: int,
    mesh: jax.sharding.Mesh,
) -> Back:
    """Gradients are linear in the losses: those of the whole batch are sums of those of its parts,
    where each loss is divided by the weight of the whole batch. All parts have the same negatives;
    dropout alone depends on their number.
    """
    rows, draws = given.rows, given.draws
    split = {group: r for group, r in rows.items() if group in model.by_example}
    common = {group: r for group, r in rows.items() if group not in split}
    listed = given.wanted.items.ndim == 1  # every item once, for all parts
    cut = cut_examples((split, given.batch, draws.lottery), parts, mesh)
    places = given.wanted.items if listed else cut_examples(given.wanted.items, parts, mesh)
    keys = [jax.random.split(key, parts) for key in (draws.users, draws.rank)]

    def pullback(weights: jax.Array) -> Gradients:
        def of_part(part: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
            (own_rows, batch, lottery), key_users, key_rank, own_places = part
            wanted = given.wanted._replace(ids={}, items=places if listed else own_places)
            draws = Draws(key_users, key_rank, lottery)
            one = Given(given.network, common | own_rows, batch, wanted, draws)
            back = _whole(model, one, catalogue, totals, mesh)
            pulled = back.pullback(weights)
            of_network, of_rows, fusion = back.finish(pulled)
            shared_rows = {group: of_rows.pop(group) for group in common}
            return (pulled.losses, of_network, shared_rows, fusion), of_rows

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
            found, of_rows = of_part(part)
            return jax.tree.map(jnp.add, total, found), of_rows

        sequence = cut, *keys, None if listed else places
        first = jax.eval_shape(of_part, jax.tree.map(lambda a: a[0], sequence))[0]
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), first)
        total, of_rows = jax.lax.scan(add, zeros, sequence)
        losses, of_network, shared_rows, fusion = total
        of_rows = joined_examples(of_rows, mesh) | shared_rows
        return Gradients(losses, (of_network, of_rows, fusion), ())

    return Back(pullback, lambda combined: combined.heads)
