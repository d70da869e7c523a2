"""A trained model's jitted forward passes, shared by evaluation and the recommender."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest, Prepared
from mtrec_jax.models.model import Model, gather_rows, make_catalogue, make_model
from mtrec_jax.sharding import AXES, own_copy, own_part, put_own, replicate
from mtrec_jax.types import FIRST, Array, Batch, Catalogue, Outputs, PyTree, UserStates

ITEM_CHUNK = 65_536  # items whose vectors are computed at once


@dataclass(frozen=True)
class Inference:
    """Compiled functions of one model; build it once and pass the parameters of the moment.

    Over a mesh, what depends on the tables (item vectors, `states`) is computed by all devices of
    all processes together, which therefore have to call it equally often; the rest is each one's.
    """

    model: Model
    catalogue: Catalogue
    items: Callable[[PyTree, dict[str, jax.Array], Array], jax.Array]  # item ids -> [n, D]
    users: Callable[[PyTree, dict[str, jax.Array], Array, Batch], UserStates]
    rank: Callable[[PyTree, UserStates, Array, Array], Outputs]  # candidate ids [B, P]
    mesh: Mesh | None = None  # of the parameters and tables; None: one device

    def own(self, tree: PyTree) -> PyTree:
        """What every device holds whole, such as `params`, as `rank` wants it."""
        return tree if self.mesh is None else own_copy(tree, self.mesh)

    def states(
        self, params: PyTree, tables: dict[str, jax.Array], vectors: Array, batch: Batch
    ) -> UserStates:
        """`users` of this process's batch; batches of all processes are equally long."""
        if self.mesh is None:
            return self.users(params, tables, vectors, batch)
        found = self.users(params, tables, vectors, put_own(batch, self.mesh))
        return own_part(found, self.mesh)

    def item_vectors(
        self, params: PyTree, tables: dict[str, jax.Array]
    ) -> Float[jax.Array, "N2 D"]:
        """Vectors of all items by item id: [N + 2, D], computed in chunks of one shape."""
        n = self.catalogue.row.shape[0]
        devices = 1 if self.mesh is None else self.mesh.size
        chunk = -(-min(ITEM_CHUNK, n) // devices) * devices
        parts = []
        for start in range(0, n, chunk):
            ids = np.minimum(np.arange(start, start + chunk), n - 1).astype(np.int32)
            parts.append(self.items(params, tables, ids))
        return jnp.concatenate(parts)[:n] if len(parts) > 1 else parts[0][:n]


def make_inference(model: Model, catalogue: Catalogue, mesh: Mesh | None = None) -> Inference:
    """Compile the passes of a model over a catalogue, on one device or over a mesh."""
    whole = None if mesh is None else NamedSharding(mesh, P())
    split = None if mesh is None else NamedSharding(mesh, P(AXES))

    @functools.partial(jax.jit, out_shardings=whole)
    def items(
        known: Catalogue, params: PyTree, tables: dict[str, jax.Array], ids: Array
    ) -> jax.Array:
        ids = jnp.asarray(ids) if split is None else lax.with_sharding_constraint(ids, split)
        rows = gather_rows(params, tables, model.item_lookups(ids, known))
        return model.items(params, rows, known, ids)

    @functools.partial(jax.jit, out_shardings=split)
    def users(
        known: Catalogue, params: PyTree, tables: dict[str, jax.Array], vectors: Array, batch: Batch
    ) -> UserStates:
        looked = model.lookups(batch, known, None)
        wanted = ("context", "history")
        found = {
            stack: {role: a for role, a in roles.items() if role in wanted}
            for stack, roles in looked.addresses.items()
        }
        rows = gather_rows(params, tables, found)
        none = jnp.zeros((batch.user.shape[0], 0, vectors.shape[1]), vectors.dtype)
        past = batch.events.get("item")
        events = none if past is None else jnp.take(vectors, jnp.asarray(past), axis=0)
        return model.users(params, rows, events, batch, None)

    @jax.jit
    def rank(params: PyTree, states: UserStates, vectors: Array, candidates: Array) -> Outputs:
        found = jnp.take(vectors, candidates, axis=0) if vectors.shape[0] else None
        return model.rank(params, states, found, None)

    of_items, of_users = (functools.partial(passed, catalogue) for passed in (items, users))
    return Inference(model, catalogue, of_items, of_users, rank, mesh)


def load_catalogue(prepared: Prepared, experiment: Experiment) -> Catalogue:
    """The catalogue of a prepared folder as arrays by item id."""
    counts = prepared.items.column("count").to_numpy()
    return make_catalogue(
        prepared.catalogue(),
        counts,
        prepared.manifest.trained_items,
        experiment.train.negative_power,
        experiment.train.precision,
        prepared.item_rows(),
    )


def prepared_inference(
    experiment: Experiment, prepared: Prepared, mesh: Mesh | None = None
) -> Inference:
    """Model and catalogue of an experiment, compiled for inference."""
    model = make_model(experiment, prepared.manifest)
    catalogue = load_catalogue(prepared, experiment)
    return make_inference(model, replicate(catalogue, mesh) if mesh else catalogue, mesh)


def predictions(
    experiment: Experiment, manifest: Manifest, logits: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Logits to what people read: probabilities, class probabilities, values in the label's unit,
    and the cosine for retrieval. Shapes stay, in float64."""
    found = {}
    for name, raw in logits.items():
        x = np.asarray(raw, np.float64)
        kind, learned = experiment.tasks[name].kind, manifest.tasks[name]
        if kind == "binary":
            found[name] = 0.5 * (1 + np.tanh(x / 2))
        elif kind == "regression":
            found[name] = x * learned.std + learned.mean
        elif kind == "retrieval":
            found[name] = x * experiment.model.temperature
        else:
            exponential = np.exp(x - x.max(axis=-1, keepdims=True))
            found[name] = exponential / exponential.sum(axis=-1, keepdims=True)
    return found


def pad_rows(array: np.ndarray, size: int, fill: int | float = 0) -> np.ndarray:
    """`[n, ...]` filled up to `[size, ...]`, so that compiled shapes stay few."""
    if len(array) == size:
        return array
    padding = np.full((size - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, padding])


def to_index(items: np.ndarray) -> np.ndarray:
    """Item ids to catalogue indexes: padding and unknown become negative."""
    return items - FIRST
