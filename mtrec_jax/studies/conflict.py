"""How far tasks pull in different directions: cosines between their gradients, on fixed batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mtrec_jax.balance.contract import each_alone, gram_of
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.models.model import make_model
from mtrec_jax.models.serve import load_catalogue
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import lookup
from mtrec_jax.tables.update import dense_gradient
from mtrec_jax.train.gradients import Given, backward, draw
from mtrec_jax.train.loop import exchange_buffers
from mtrec_jax.types import Batch, Catalogue, PyTree, TrainState


class Cosines(NamedTuple):
    """Between the gradients of each two losses; 1: one direction, below 0: against each other."""

    names: tuple[str, ...]  # of the losses, T
    representation: np.ndarray  # [T, T] at the shared representation, example by example
    parameters: np.ndarray  # [T, T] at the dense parameters that both losses act on
    norms: np.ndarray  # [T] of the gradients at these parameters


def make_probe(
    experiment: Experiment, prepared: Prepared, batches: int = 4
) -> Callable[[TrainState], Cosines]:
    """A function of a training state: how the losses' gradients lie to each other.

    It takes the same `batches` training batches each time, with the same negatives and dropout. At
    the representation the gradients of all examples stand side by side, as balancing methods see
    them; at the parameters, layers and dense tables, they are added up over the examples. There a
    negative cosine says that a step for one task undoes the other's; where a shared part cannot
    serve both, the two cancel in the end, and it tends to -1. Rows of sparse tables are left out.

    Args:
      experiment: of the state.
      prepared: the data it trains on.
      batches: more are less noisy.
    """
    model, mesh = make_model(experiment, prepared.manifest), make_mesh(experiment.train.mesh)
    config = experiment.train
    source = BatchSource(prepared, "train", config.batch_size, config.seed + 1, 1, config.precision)
    items = load_catalogue(prepared, experiment)
    buffers = exchange_buffers(model, items, source, mesh, config.seed)
    catalogue = replicate(items, mesh)
    fixed = [put_batch(source[n], mesh) for n in range(min(batches, source.batches_per_epoch))]

    @jax.jit
    def gradients(
        state: TrainState, batch: Batch, known: Catalogue, number: jax.Array
    ) -> tuple[jax.Array, list[PyTree]]:
        keys = jax.random.split(jax.random.fold_in(state.key, number), 2)
        batch = model.altered(batch, keys[0])
        wanted = model.ids(batch, known, keys[0], state.drawing)
        stacks = state.tables | {n: state.params[n] for n in (DENSE,) if n in state.params}
        rows, ticket = lookup(model.layout, stacks, state.scratch, wanted.ids, mesh, buffers)
        draws = draw(keys[1], batch)
        weights = model.weights(batch, draws.lottery)
        given = Given(state.params["network"], rows, batch, wanted, draws)

        def to_dense(of_rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
            if DENSE not in state.params:
                return {}
            return {DENSE: dense_gradient(model.layout, ticket, of_rows)}

        back = backward(model, given, known, weights, 1, mesh, to_dense)
        alone = each_alone(back.pullback, jnp.ones(len(model.names)))
        found = []
        for each in alone:
            to_params = back.finish(each)[0]
            network = {n: part for n, part in to_params["network"].items() if n != "fusion"}
            found.append(to_params | {"network": network})
        return gram_of(alone), found

    def probe(state: TrainState) -> Cosines:
        parts = [
            gradients(state, batch, catalogue, jnp.asarray(number))
            for number, batch in enumerate(fixed)
        ]
        gram = np.sum([np.asarray(of, np.float64) for of, _ in parts], axis=0)
        total = [
            np.sum([_flat(each) for each in of_task], axis=0)
            for of_task in zip(*(found for _, found in parts), strict=True)
        ]
        whole = np.stack(total)
        norms = np.linalg.norm(whole, axis=1) / len(parts)
        return Cosines(model.names, from_gram(gram), shared_cosines(whole), norms)

    return probe


def from_gram(gram: Float[np.ndarray, "T T"]) -> Float[np.ndarray, "T T"]:
    """Cosines from inner products; 0 where a gradient is zero.

    >>> from_gram(np.array([[4.0, -3.0], [-3.0, 9.0]])).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return np.asarray(np.where(scale > 0, gram / np.where(scale > 0, scale, 1), 0))


def shared_cosines(gradients: Float[np.ndarray, "T n"]) -> Float[np.ndarray, "T T"]:
    """Cosines between gradients [T, n], each over the parameters that both losses act on: where
    neither is 0. A task's own tower so counts for nobody's distance.

    >>> two = np.array([[3.0, 0.0, 1.0], [-2.0, 5.0, 0.0]])  # only the first is shared
    >>> float(shared_cosines(two)[0, 1])
    -1.0
    """
    acts = (gradients != 0).astype(np.float64)
    squares = (gradients**2) @ acts.T  # [i, j]: of gradient i where j acts
    scale = np.sqrt(squares * squares.T)
    products = gradients @ gradients.T
    return np.asarray(np.where(scale > 0, products / np.where(scale > 0, scale, 1), 0))


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(tree)])
