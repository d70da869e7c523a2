"""Losses and gradients of a batch, at once or in parts one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtrec_jax.balance.balance import Balancer
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.models.model import Model, Rows, gather_rows
from mtrec_jax.sharding import cut_examples
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import Addresses, BuffersOf, Fetched, fetch
from mtrec_jax.train.objective import Draws, Sums, batch_losses, draw, known_weights, loss_names
from mtrec_jax.types import Batch, Catalogue, Lookups, PyTree, TrainState


class Differentiated(NamedTuple):
    """What a batch says, before anything is changed."""

    fetched: Fetched
    sums: Sums
    balance: PyTree
    to_params: PyTree
    to_rows: Rows


Differentiate = Callable[[TrainState, Batch, Catalogue], Differentiated]


def make_differentiate(
    experiment: Experiment,
    manifest: Manifest,
    model: Model,
    mesh: jax.sharding.Mesh,
    balancer: Balancer,
    buffers: BuffersOf,
) -> Differentiate:
    """Losses and gradients of a batch as a function of the state; to be compiled.

    With `train.accumulate` = K the activations of one K-th of the batch exist at a time. Gradients
    are linear in the sums of the losses: those of the whole batch are the sum of those of its
    parts, where each loss is divided by its weight in the whole batch. That is known beforehand
    but for a fusion that learns lists; its gradient is summed apart, and divided at the end. All
    parts have the same negatives. Dropout alone depends on K.
    """
    names, parts = loss_names(experiment), experiment.train.accumulate

    def differentiate(state: TrainState, batch: Batch, catalogue: Catalogue) -> Differentiated:
        key_rows, key_loss = jax.random.split(jax.random.fold_in(state.key, state.step))
        weights = dict(zip(names, balancer.weights(state.balance), strict=True))
        known = known_weights(experiment, batch)
        scales = {n: _share(weights[n], known[n]) if n in known else 1.0 for n in names}

        def lookups(batch: Batch) -> Lookups:
            return model.lookups(batch, catalogue, key_rows)

        def objective(
            params: PyTree, fusing: PyTree, rows: Rows, batch: Batch, draws: Draws
        ) -> tuple[jax.Array, Sums]:
            looked = lookups(batch)
            rows = rows | gather_rows(params, {}, _of_stacks(looked, dense=True))
            given = params, fusing, rows, looked, batch, catalogue, draws, mesh
            sums = batch_losses(experiment, manifest, model, *given)
            return jnp.sum(jnp.stack([scales[n] * sums[n][0] for n in names])), sums

        fusing = {"network": state.params["network"]}

        def found(rows: Rows, batch: Batch, draws: Draws) -> tuple[PyTree, Rows]:
            gradient = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)
            (to_params, to_fusing, to_rows), sums = gradient(
                state.params, fusing, rows, batch, draws
            )
            return (sums, to_params, to_fusing), to_rows

        draws, search = draw(key_loss, batch), lookups
        if parts > 1:
            batch, draws = _cut(batch, draws, parts, mesh)
            # parts are the second axis of rows, so that each device looks up its own examples
            search, found = jax.vmap(lookups, out_axes=1), _added_up(found)
        addresses = _of_stacks(search(batch), dense=False)
        fetched = fetch(state.tables, state.scratch, addresses, mesh, buffers)
        (sums, to_params, to_fusing), to_rows = found(fetched.rows, batch, draws)
        if "fusion" in names and "fusion" not in known:
            scale = _share(weights["fusion"], sums["fusion"][1])
            both = to_params["network"], to_fusing["network"]
            to_network = jax.tree.map(lambda own, more: own + scale * more, *both)
            to_params = to_params | {"network": to_network}
        means = jnp.stack([_share(*sums[n]) for n in names])
        observed = jnp.stack([sums[n][1] > 0 for n in names])
        balance = balancer.learn(state.balance, means, observed)
        return Differentiated(fetched, sums, balance, to_params, to_rows)

    return differentiate


def _share(value: jax.Array, weight: jax.Array) -> jax.Array:
    return value / jnp.maximum(weight, 1e-9)


def _of_stacks(looked: Lookups, dense: bool) -> Addresses:
    return {stack: a for stack, a in looked.addresses.items() if (stack == DENSE) == dense}


def _cut(batch: Batch, draws: Draws, parts: int, mesh: jax.sharding.Mesh) -> tuple[Batch, Draws]:
    batch, lottery = cut_examples((batch, draws.lottery), parts, mesh)
    users, rank = (jax.random.split(key, parts) for key in (draws.users, draws.rank))
    return batch, Draws(users, rank, lottery)


def _added_up(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply to each part; what is found first is summed over them, the second has their axis.

    Parts are the second axis of the rows and of their gradients, and the first of all else.
    """

    def of_all(rows: Rows, batch: Batch, draws: Draws) -> tuple[PyTree, Rows]:
        arguments = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), rows), batch, draws

        def add(total: PyTree, part: tuple[PyTree, ...]) -> tuple[PyTree, PyTree]:
            found, own = function(*part)
            return jax.tree.map(jnp.add, total, found), own

        first = jax.eval_shape(lambda: function(*jax.tree.map(lambda a: a[0], arguments))[0])
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), first)
        total, own = jax.lax.scan(add, zeros, arguments)
        return total, jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), own)

    return of_all
