"""Losses and gradients of a batch, at once or in parts one after the other.

The losses are taken in two halves: `encode` up to the shared representation, `losses` behind it. So
a balancing method may have the gradient of each task there for a backward pass through the towers
alone, and whatever it makes of them goes through the encoders once. A method that takes gradients
at the shared parameters, as the papers do, has a pass through everything for each task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from mtrec_jax.balance import Gradients, Pullback
from mtrec_jax.balance.contract import At, Weights
from mtrec_jax.models.inputs import owner_of
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


# {group: gradients of its rows} -> that of the dense tables as a part of the dense parameters
ToDense = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]


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
    to_dense: ToDense,
    at: At = "representation",
) -> Back:
    """Losses of a batch, each divided by its weight in `weights`, and the way back.

    With more than one part the activations of one part exist at a time (`train.accumulate`). `at`
    is where the balancing method takes gradients, see `balance.contract.Gradients`.
    """
    totals = {name: jnp.maximum(weight, 1e-9) for name, weight in weights.items()}
    if parts > 1:
        return _in_parts(model, given, catalogue, totals, parts, mesh, to_dense)
    halves = _halves(model, given, catalogue, totals, mesh)
    if at == "parameters":
        return _at_parameters(halves, given, to_dense, model)
    return _at_representation(halves, given, to_dense)


class _Halves(NamedTuple):
    """The losses of a batch in two halves, and that of the fusion, as functions of parameters."""

    encode: Callable[[PyTree, dict[str, jax.Array]], PyTree]  # network, rows -> shared
    # network, shared -> the losses and what the fusion is given
    behind: Callable[[PyTree, PyTree], tuple[tuple[jax.Array, ...], PyTree]]
    fusion: Callable[[PyTree, PyTree, PyTree], jax.Array] | None  # its parameters, shared, given


def _halves(
    model: Model,
    given: Given,
    catalogue: Catalogue,
    totals: dict[str, jax.Array],
    mesh: jax.sharding.Mesh,
) -> _Halves:
    network, _, batch, wanted, draws = given
    # each example meets all negatives
    wanted = wanted._replace(negatives=replicated(wanted.negatives, mesh))

    def encode(network: PyTree, rows: dict[str, jax.Array]) -> PyTree:
        params = {"network": network}
        shared = model.encode(params, rows, batch, catalogue, wanted, draws.users)
        return shared._replace(negatives=replicated(shared.negatives, mesh))

    def behind(network: PyTree, shared: PyTree) -> tuple[tuple[jax.Array, ...], PyTree]:
        params = {"network": network}
        sums, fusing = model.losses(params, shared, batch, catalogue, wanted, draws.rank)
        return tuple(sums[n] / totals[n] for n in model.names), fusing

    def fusion(part: PyTree, shared: PyTree, fusing: PyTree) -> jax.Array:
        params = {"network": network | {"fusion": part}}
        assert model.fusion_loss is not None
        loss = model.fusion_loss(params, shared, fusing, batch, wanted, draws.lottery, mesh)
        return loss / totals["fusion"]

    return _Halves(encode, behind, fusion if model.fuses else None)


def _at_representation(halves: _Halves, given: Given, to_dense: ToDense) -> Back:
    shared, through_encoder = jax.vjp(halves.encode, given.network, given.rows)
    losses, through_heads, fusing = jax.vjp(halves.behind, given.network, shared, has_aux=True)

    def pullback(weights: Weights) -> Gradients:
        def some(network: PyTree, shared: PyTree) -> tuple[jax.Array, ...]:
            return _parts_of(halves.behind(network, shared)[0], weights)

        known = isinstance(weights, np.ndarray)
        through = jax.vjp(some, given.network, shared)[1] if known else through_heads
        return Gradients(jnp.stack(losses), *through(_cotangents(losses, weights)))

    def finish(combined: Gradients) -> tuple[PyTree, dict[str, jax.Array], jax.Array]:
        of_encoder, of_rows = through_encoder(combined.shared)
        of_network = jax.tree.map(jnp.add, combined.heads, of_encoder)
        of_network, loss = _with_fusion(halves, given, of_network, shared, fusing)
        return {"network": of_network} | to_dense(of_rows), of_rows, loss

    return Back(pullback, finish)


def _at_parameters(halves: _Halves, given: Given, to_dense: ToDense, model: Model) -> Back:
    def everything(network: PyTree, rows: dict[str, jax.Array]) -> tuple[PyTree, PyTree]:
        shared = halves.encode(network, rows)
        losses, fusing = halves.behind(network, shared)
        return losses, (shared, fusing)

    made = jax.vjp(everything, given.network, given.rows, has_aux=True)
    losses, through, (shared, fusing) = made

    def of_tasks(network: PyTree) -> tuple[jax.Array, ...]:
        return everything(network, given.rows)[0][: len(model.tasks)]

    common = used_by_several(of_tasks, given.network)
    # Tables of a task, and what encodes their rows and its numbers, are its own, although all read
    # them: beside the shared ones in one array, which the operations do not tell apart.
    alone = {group for group in given.rows if owner_of(group) in model.tasks}
    if set(model.owners) & set(model.tasks):
        common = jax.tree.map_with_path(
            lambda path, several: several and not path[0].key.startswith("own_"), common
        )

    def pullback(weights: Weights) -> Gradients:
        def some(network: PyTree, rows: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
            return _parts_of(everything(network, rows)[0], weights)

        known = isinstance(weights, np.ndarray)
        back = jax.vjp(some, given.network, given.rows)[1] if known else through
        of_network, of_rows = back(_cotangents(losses, weights))

        def those(wanted: bool) -> PyTree:
            def part(gradient: jax.Array, is_common: bool) -> jax.Array:
                return gradient if is_common == wanted else jnp.zeros_like(gradient)

            tables = to_dense({g: part(row, g not in alone) for g, row in of_rows.items()})
            if not wanted and not alone:  # of which XLA would make a scatter of zeros
                tables = jax.tree.map(jnp.zeros_like, tables)
            return {"network": jax.tree.map(part, of_network, common)} | tables

        return Gradients(jnp.stack(losses), those(False), those(True), of_rows)

    def finish(combined: Gradients) -> tuple[PyTree, dict[str, jax.Array], jax.Array]:
        to_params = jax.tree.map(jnp.add, combined.heads, combined.shared)
        of_network, loss = _with_fusion(halves, given, to_params["network"], shared, fusing)
        return to_params | {"network": of_network}, combined.carried, loss

    return Back(pullback, finish)


def _parts_of(losses: tuple[jax.Array, ...], weights: Weights) -> tuple[jax.Array, ...]:
    """The losses with a weight, if it is known which; XLA computes what they share once."""
    pairs = zip(losses, weights, strict=True)
    known = isinstance(weights, np.ndarray)
    return tuple(loss for loss, weight in pairs if not known or weight != 0)


def _cotangents(losses: tuple[jax.Array, ...], weights: Weights) -> tuple[jax.Array, ...]:
    cast = tuple(jnp.asarray(w, loss.dtype) for w, loss in zip(weights, losses, strict=True))
    return _parts_of(cast, weights)


def _with_fusion(
    halves: _Halves, given: Given, of_network: PyTree, shared: PyTree, fusing: PyTree
) -> tuple[PyTree, jax.Array]:
    """The gradient with that of the fusion, whose loss touches nothing else, and this loss."""
    if halves.fusion is None:
        return of_network, jnp.zeros(())
    loss, own = jax.value_and_grad(halves.fusion)(given.network["fusion"], shared, fusing)
    return of_network | {"fusion": own}, loss


def used_by_several(losses: Callable[[PyTree], tuple[jax.Array, ...]], params: PyTree) -> PyTree:
    """Which arrays at least two of the losses have gradients for, as the operations that make them
    show; of a single loss, all that it has any for. An array of which every loss has columns of its
    own, such as the gates of an MMoE, is used by all.

    >>> def losses(p):
    ...     return p["both"] * p["one"], p["both"] * p["other"]
    >>> used_by_several(losses, {"both": 1.0, "one": 2.0, "other": 3.0})
    {'both': True, 'one': False, 'other': False}
    """
    leaves, structure = jax.tree.flatten(params)
    traced = jax.make_jaxpr(lambda *flat: losses(jax.tree.unflatten(structure, flat)))(
        *leaves
    ).jaxpr
    reached = {var: {number} for number, var in enumerate(traced.invars)}
    for equation in traced.eqns:
        if equation.primitive.name == "stop_gradient":
            continue
        inputs = (var for var in equation.invars if not isinstance(var, Literal))
        found = set[int]().union(*(reached.get(var, set()) for var in inputs))
        reached |= dict.fromkeys(equation.outvars, found)
    outputs = [var for var in traced.outvars if not isinstance(var, Literal)]
    uses = Counter(number for var in outputs for number in reached.get(var, ()))
    enough = min(2, len(outputs))
    return jax.tree.unflatten(structure, [uses[n] >= enough for n in range(len(leaves))])


def _in_parts(
    model: Model,
    given: Given,
    catalogue: Catalogue,
    totals: dict[str, jax.Array],
    parts: int,
    mesh: jax.sharding.Mesh,
    to_dense: ToDense,
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

    def pullback(weights: Weights) -> Gradients:
        def of_part(part: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
            (own_rows, batch, lottery), key_users, key_rank, own_places = part
            wanted = given.wanted._replace(ids={}, items=places if listed else own_places)
            draws = Draws(key_users, key_rank, lottery)
            one = Given(given.network, common | own_rows, batch, wanted, draws)
            halves = _halves(model, one, catalogue, totals, mesh)
            back = _at_representation(halves, one, lambda rows: {})  # tables: all parts at once
            pulled = back.pullback(weights)
            to_params, of_rows, fusion = back.finish(pulled)
            shared_rows = {group: of_rows.pop(group) for group in common}
            return (pulled.losses, to_params, shared_rows, fusion), of_rows

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
            found, of_rows = of_part(part)
            return jax.tree.map(jnp.add, total, found), of_rows

        sequence = cut, *keys, None if listed else places
        first = jax.eval_shape(of_part, jax.tree.map(lambda a: a[0], sequence))[0]
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), first)
        total, of_rows = jax.lax.scan(add, zeros, sequence)
        losses, to_params, shared_rows, fusion = total
        of_rows = joined_examples(of_rows, mesh) | shared_rows
        return Gradients(losses, (to_params | to_dense(of_rows), of_rows, fusion), ())

    return Back(pullback, lambda combined: combined.heads)
