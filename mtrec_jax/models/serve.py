"""The trained model as it answers: one path for evaluation, recommendations and predictions.

vectors = serving.item_vectors(params, tables)                  once a model
states  = serving.states(params, tables, vectors, batch)        histories, once a request
answer  = serving.answer(params, states, vectors, candidates)   probabilities and order
looks   = serving.looks(params, states, vectors, candidates)    gates and similar, if asked for
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest, Prepared
from mtrec_jax.losses.tasks import head_of
from mtrec_jax.models import calibration
from mtrec_jax.models.calibration import Calibration
from mtrec_jax.models.inputs import group_slots, shared_name, with_group
from mtrec_jax.models.model import CALIBRATION, Model, make_catalogue, make_model
from mtrec_jax.sharding import AXES, own_copy, own_part, put_own, replicate
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.types import FIRST, Array, Batch, Catalogue, Outputs, PyTree, UserStates

ITEM_CHUNK = 65_536  # items whose vectors are computed at once
Tables = dict[str, jax.Array]


class Answer(NamedTuple):
    """What the model says of candidates [B, K]."""

    predictions: dict[str, jax.Array]  # {task: [B, K], or [B, K, C]}: see `predictions`
    fused: jax.Array  # [B, K]: the final order, larger is better
    weights: jax.Array  # [B, K, T] of the tasks in it
    logits: dict[str, jax.Array]  # {task: [B, K], or [B, K, C]} as the task's head reads them


@dataclass(frozen=True)
class Serving:
    """Compiled functions of one model; build it once and pass the parameters of the moment.

    Over a mesh, what depends on the tables (item vectors, `states`) is computed by all devices of
    all processes together, which therefore have to call it equally often; the rest is each one's.
    """

    model: Model
    catalogue: Catalogue
    items: Callable[[PyTree, Tables, Array], jax.Array]  # item ids -> [n, W]
    users: Callable[[PyTree, Tables, Array, Batch], UserStates]
    answer: Callable[[PyTree, UserStates, Array, Array], Answer]  # candidate ids [B, K]
    looks: Callable[[PyTree, UserStates, Array, Array], dict[str, jax.Array]]  # `diagnostics`
    moments: Callable[[UserStates, Array], UserStates]  # of [n, 2] (example, position): [n, 1, …]
    mesh: Mesh | None = None  # of the parameters and tables; None: one device

    def calibrated(self, params: PyTree, calibrations: Mapping[str, Calibration]) -> PyTree:
        """Parameters with which `answer` calibrates logits: for the fused order always, for
        predictions where `evaluate.calibrate` says so. Logits stay as they are."""
        placed = replicate(dict(calibrations), self.mesh) if self.mesh else dict(calibrations)
        return params | {CALIBRATION: placed}

    def own(self, tree: PyTree) -> PyTree:
        """What every device holds whole, such as `params`, as `answer` wants it."""
        return tree if self.mesh is None else own_copy(tree, self.mesh)

    def states(self, params: PyTree, tables: Tables, vectors: Array, batch: Batch) -> UserStates:
        """`users` of this process's batch; batches of all processes are equally long."""
        if self.mesh is None:
            return self.users(params, tables, vectors, batch._replace(row=None))
        found = self.users(params, tables, vectors, put_own(batch, self.mesh))
        return own_part(found, self.mesh)

    def item_vectors(self, params: PyTree, tables: Tables) -> Float[jax.Array, "N2 W"]:
        """Vectors of all items by item id: [N + 2, W], computed in chunks of one shape.

        The first D numbers are what retrieval compares, see `compared`; the others, if any, are
        read by towers alone. [0, D] where the data has no items.
        """
        n = self.catalogue.row.shape[0]
        if "item" not in self.model.layout.groups:
            return jnp.zeros((0, self.model.layout.width), jnp.float32)
        devices = 1 if self.mesh is None else self.mesh.size
        chunk = -(-min(ITEM_CHUNK, n) // devices) * devices
        parts = []
        for start in range(0, n, chunk):
            ids = np.minimum(np.arange(start, start + chunk), n - 1).astype(np.int32)
            parts.append(self.items(params, tables, ids))
        return jnp.concatenate(parts)[:n] if len(parts) > 1 else parts[0][:n]

    def compared(self, vectors: Array) -> Array:
        """What retrieval compares of items' vectors: [..., W] to [..., D]."""
        width = self.model.layout.width
        return vectors if vectors.shape[-1] == width else vectors[..., :width]


def make_serving(
    experiment: Experiment,
    manifest: Manifest,
    model: Model,
    catalogue: Catalogue,
    mesh: Mesh | None = None,
) -> Serving:
    """Compile the passes of a model over a catalogue, on one device or over a mesh."""
    whole = None if mesh is None else NamedSharding(mesh, P())
    split = None if mesh is None else NamedSharding(mesh, P(AXES))

    @functools.partial(jax.jit, out_shardings=whole)
    def items(known: Catalogue, params: PyTree, tables: Tables, ids: Array) -> jax.Array:
        ids = jnp.asarray(ids) if split is None else lax.with_sharding_constraint(ids, split)
        rows = fetch(model.layout, _stacks(params, tables), model.item_ids(ids, known))
        return model.items(params, rows, known, ids)

    @functools.partial(jax.jit, out_shardings=split)
    def users(
        known: Catalogue, params: PyTree, tables: Tables, vectors: Array, batch: Batch
    ) -> UserStates:
        wanted = model.ids(batch, known, None).ids
        read = ("context", "request", "history")
        sides = {group: ids for group, ids in wanted.items() if shared_name(group) in read}
        rows = fetch(model.layout, _stacks(params, tables), sides)
        none = jnp.zeros((batch.user.shape[0], 0, model.layout.width), vectors.dtype)
        past = batch.events.get("item")
        if past is None:
            return model.users(params, rows, none, batch, None)
        events = jnp.take(vectors, jnp.asarray(past), axis=0)[..., : model.layout.width]
        return model.users(params, rows, events, batch, None)

    slots = group_slots(experiment, manifest)
    groups = {task: np.asarray(catalogue.ids)[:, slot] for task, slot in slots.items()}

    def scored(params: PyTree, states: UserStates, vectors: Array, candidates: Array) -> Outputs:
        """Users [B, P] and as many candidates, or one moment a user and any number of them."""
        found = jnp.take(vectors, candidates, axis=0) if vectors.shape[0] else None
        return model.score(params, repeated(states, candidates.shape[1]), found)

    @jax.jit
    def answer(
        groups: dict[str, Array],
        params: PyTree,
        states: UserStates,
        vectors: Array,
        candidates: Array,
    ) -> Answer:
        outputs = scored(params, states, vectors, candidates)
        logits = dict(outputs.logits)
        for task, of in groups.items():
            logits[task] = with_group(logits[task], jnp.take(of, candidates, axis=0))
        known = params.get(CALIBRATION, {}) if experiment.evaluate.calibrate else {}
        told = {n: calibration.apply(known.get(n), x, jnp) for n, x in logits.items()}
        read = predictions(experiment, manifest, told, jnp)
        return Answer(read, outputs.fused, outputs.fusion, logits)

    @jax.jit
    def looks(
        params: PyTree, states: UserStates, vectors: Array, candidates: Array
    ) -> dict[str, jax.Array]:
        """A program of its own, so that answers do without."""
        return scored(params, states, vectors, candidates).diagnostics

    of_items, of_users = (functools.partial(passed, catalogue) for passed in (items, users))
    of_pairs = functools.partial(answer, groups)
    return Serving(model, catalogue, of_items, of_users, of_pairs, looks, _moments, mesh)


@jax.jit
def _moments(states: UserStates, places: Array) -> UserStates:
    row, position = places[:, 0], places[:, 1]
    picked = jax.tree.map(lambda array: jnp.asarray(array)[row], states)
    vectors, request, cutoff = (
        jax.vmap(lambda of, p: of[p][None])(array, position)
        for array in (picked.vectors, picked.request, picked.cutoff)
    )
    return picked._replace(vectors=vectors, request=request, cutoff=cutoff)


def _stacks(params: PyTree, tables: Tables) -> Tables:
    return tables | ({DENSE: params[DENSE]} if DENSE in params else {})


def repeated(states: UserStates, count: int) -> UserStates:
    """States of one moment a user, for so many candidates; others stay as they are."""
    if states.cutoff.shape[1] == count:
        return states

    def spread(array: Array) -> jax.Array:
        return jnp.broadcast_to(array, (array.shape[0], count, *array.shape[2:]))

    return states._replace(
        vectors=spread(states.vectors),
        request=spread(states.request),
        cutoff=spread(states.cutoff),
    )


def load_catalogue(prepared: Prepared, experiment: Experiment, draws: bool = True) -> Catalogue:
    """The catalogue of a prepared folder as arrays by item id; new items are not in it.

    Negatives are drawn from it by how often an item is what the retrieval has to find in training,
    an item that never is as if once; without `draws` they are all alike, which needs no counting.
    """
    m, power = prepared.manifest, experiment.train.negatives.power if draws else 0.0
    counts = prepared.items.column("count").to_numpy()[: m.items]
    retrieval = [name for name, task in experiment.tasks.items() if task.kind == "retrieval"]
    if power and retrieval and prepared.wanted:
        counts, label = np.zeros(m.items, np.int64), f"label_{retrieval[0]}"
        for block in prepared.blocks("train", ["candidate", label]):
            found = block["candidate"][~np.isnan(block[label])]
            counts += np.bincount(found[found >= FIRST] - FIRST, minlength=m.items)
        counts = np.maximum(counts, 1)
    return make_catalogue(
        {part: table[: m.items + FIRST] for part, table in prepared.catalogue().items()},
        counts,
        m.trained_items,
        power,
        experiment.train.precision,
        prepared.item_rows()[: m.items + FIRST],
    )


def prepared_serving(
    experiment: Experiment, prepared: Prepared, mesh: Mesh | None = None
) -> Serving:
    """Model and catalogue of an experiment, compiled to answer."""
    model = make_model(experiment, prepared.manifest)
    catalogue = load_catalogue(prepared, experiment, draws=False)
    placed = replicate(catalogue, mesh) if mesh else catalogue
    return make_serving(experiment, prepared.manifest, model, placed, mesh)


def predictions(
    experiment: Experiment, manifest: Manifest, logits: Mapping[str, Any], xp: Any = np
) -> dict[str, Any]:
    """Logits to what people read: probabilities, class probabilities, values in the label's unit,
    and the cosine for retrieval. Types stay.

    Args:
      experiment, manifest: tasks and what preparation has learned of them.
      logits: {task: array} as in `Answer`.
      xp: NumPy, or `jax.numpy` inside of a compiled function.
    """
    found = {}
    for name, x in logits.items():
        task = experiment.tasks[name]
        if task.kind == "retrieval":
            found[name] = x * experiment.model.temperature
        else:
            found[name] = head_of(task.kind, task.loss).predict(x, manifest.tasks[name], xp)
    return found


def look_names(name: str, shape: Sequence[int], tasks: Sequence[str], members: int) -> list[str]:
    """What people call each number of a diagnostic of one pair, in the array's order: the member,
    of several, the task where there is an axis of them, and the number of the expert or the like.

    >>> look_names("gates", (2, 2), ["click", "buy"], members=1)
    ['gates/click/0', 'gates/click/1', 'gates/buy/0', 'gates/buy/1']
    >>> look_names("gate_shared", (2, 1), ["click"], members=2)
    ['gate_shared/member 1/0', 'gate_shared/member 2/0']
    """
    axes = [[str(number) for number in range(size)] for size in shape]
    if members > 1:
        axes[0] = [f"member {number + 1}" for number in range(members)]
    if len(axes) == 2 + (members > 1) and len(axes[-2]) == len(tasks):
        axes[-2] = list(tasks)
    return ["/".join([name, *parts]) for parts in itertools.product(*axes)]


def pad_rows(array: np.ndarray, size: int, fill: int | float = 0) -> np.ndarray:
    """`[n, ...]` filled up to `[size, ...]`, so that compiled shapes stay few."""
    if len(array) == size:
        return array
    padding = np.full((size - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, padding])
