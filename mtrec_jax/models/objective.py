"""What a batch teaches: the sums of its losses, and what each is divided by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtrec_jax.config import Experiment, Task, fusion_objective
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.errors import ConfigError
from mtrec_jax.losses import fusion as order
from mtrec_jax.losses.lists import LISTS
from mtrec_jax.losses.retrieval import Compared
from mtrec_jax.losses.tasks import TaskField, class_numbers, head_of
from mtrec_jax.models.inputs import Inputs, group_slots, with_group
from mtrec_jax.models.interests import nearest
from mtrec_jax.models.layers import unit_length
from mtrec_jax.models.network import Network
from mtrec_jax.models.views import Contrast, contrast_loss, views
from mtrec_jax.types import (
    FIRST,
    Batch,
    Catalogue,
    Fusing,
    PyTree,
    Shared,
    UserStates,
    Wanted,
)

CONTRAST = "contrast"  # the loss of altered views of the histories, which is not balanced
CONTRAST_DRAW = (1 << 16) + 2  # of these views
KEPT_DRAW = (1 << 16) + 1  # of the negatives that are kept
BIAS_DRAW = 1 << 16  # of the bias tower's silence; members fold their numbers into the same key
FUSION = "fusion"  # the loss that teaches the fused order, beside the balanced ones


class Objective(NamedTuple):
    """The losses of a model as functions; see `model.Model`."""

    names: tuple[str, ...]
    fuses: bool
    weights: Callable[[Batch, jax.Array], dict[str, jax.Array]]
    losses: Callable[..., tuple[dict[str, jax.Array], Fusing | None]]
    fusion_loss: Callable[..., jax.Array] | None


def make_objective(
    experiment: Experiment,
    manifest: Manifest,
    inputs: Inputs,
    network: Callable[[PyTree], Network],
    abstract: Network,
) -> Objective:
    """The losses of an experiment's tasks, or those that its towers bring in their place.

    Args:
      experiment: tasks, their kinds and worth.
      manifest: what preparation has learned of them.
      inputs: of the model.
      network: dense parameters -> layers.
      abstract: the layers without values, for what does not depend on any.

    Raises:
      ConfigError: a loss over lists, where no example has two positions.
    """
    _check_lists(experiment, manifest)
    towers = getattr(abstract, "towers", None)
    brings, asked = getattr(towers, "losses", None), getattr(towers, "loss_inputs", ())
    contrast = experiment.train.contrast
    own_names = getattr(towers, "extra_losses", ())
    names = (*experiment.tasks, *own_names, *[CONTRAST] * (contrast is not None))
    fusion = _make_fusion(experiment, inputs, network)

    def weights(batch: Batch, lottery: jax.Array) -> dict[str, jax.Array]:
        found = {n: jnp.asarray(batch.mask[n]) * _weight(batch, n) for n in experiment.tasks}
        if brings is not None:  # their masks do not depend on the logits
            own = brings(_zeros(inputs, asked, batch), *_labels(batch))
            _check_brought(experiment, own)
            found |= {n: counts * _weight(batch, n) for n, (_, counts) in own.items()}
        if contrast is not None:
            found[CONTRAST] = _contrasted(batch)
        totals = {name: jnp.sum(found[name]) for name in names}
        return totals | ({FUSION: fusion.weight(batch, lottery)} if fusion else {})

    def losses(
        params: PyTree,
        shared: Shared,
        batch: Batch,
        catalogue: Catalogue,
        wanted: Wanted,
        key: jax.Array | None,
    ) -> tuple[dict[str, jax.Array], Fusing | None]:
        layers = network(params)
        candidates = shared.candidates if inputs.has_items else None
        outputs, fusing = layers.outputs(states_of(shared, batch), candidates, key)
        if layers.bias is not None:
            own = None if key is None else jax.random.fold_in(key, BIAS_DRAW)
            logits_of = getattr(layers.towers, "logits_of", {})
            outputs = layers.bias.added(outputs, shared.bias, own, logits_of)

        def of_tasks(names: Iterable[str], logits: dict[str, jax.Array]) -> dict[str, jax.Array]:
            given = logits, batch, catalogue
            return {n: _task_sum(experiment, manifest, n, *given) for n in names}

        def of_towers(
            logits: dict[str, jax.Array], looks: dict[str, jax.Array]
        ) -> dict[str, jax.Array]:
            sums = of_tasks(inputs.tasks, logits)
            if brings is not None:
                own = layers.towers.losses(logits | looks, *_labels(batch))
                for n, (values, counts) in own.items():
                    sums[n] = jnp.sum(values * counts * _weight(batch, n))
            return sums

        sums = _of_users(experiment, inputs, layers, shared, batch, wanted, key)
        looks = {n: outputs.diagnostics[n] for n in asked}
        if outputs.members:  # the mean of their losses, each by itself
            of_each = jax.vmap(of_towers, in_axes=2)(outputs.members, looks)
            return sums | {n: jnp.mean(each) for n, each in of_each.items()}, fusing
        return sums | of_towers(outputs.logits, looks), fusing

    return Objective(names, fusion is not None, weights, losses, fusion and fusion.loss)


def _task_sum(
    experiment: Experiment,
    manifest: Manifest,
    name: str,
    logits: dict[str, jax.Array],
    batch: Batch,
    catalogue: Catalogue,
) -> jax.Array:
    """The weighted sum of a task's own loss."""
    task, weight = experiment.tasks[name], jnp.asarray(batch.mask[name]) * _weight(batch, name)
    own = logits[name]
    if (slot := group_slots(experiment, manifest).get(name)) is not None:
        group = jnp.asarray(catalogue.ids)[:, slot][jnp.asarray(batch.candidate)]
        own = with_group(own, group)
    losses = _losses(task, manifest.tasks[name], own, batch, name, weight)
    return jnp.sum(losses * weight)


def _zeros(inputs: Inputs, asked: Iterable[str], batch: Batch) -> dict[str, jax.Array]:
    """Logits of all tasks with a tower, and the diagnostics `asked`, without a pass."""
    found = {
        n: jnp.zeros((*batch.weight.shape, *([t.outputs] * (t.outputs > 1))))
        for n, t in inputs.tasks.items()
    }
    return found | {n: jnp.zeros(batch.weight.shape) for n in asked}


def _of_users(
    experiment: Experiment,
    inputs: Inputs,
    layers: Network,
    shared: Shared,
    batch: Batch,
    wanted: Wanted,
    key: jax.Array | None,
) -> dict[str, jax.Array]:
    """The weighted sums of the losses that no tower has a part in."""
    sums, contrast = {}, experiment.train.contrast
    if inputs.retrieval:
        given = layers, shared, batch, wanted, key
        sums[inputs.retrieval] = _retrieval_sum(experiment, inputs, *given)
    if contrast is not None:
        sums[CONTRAST] = _contrast_sum(contrast, layers, shared, batch, key)
    return sums


def _retrieval_sum(
    experiment: Experiment,
    inputs: Inputs,
    layers: Network,
    shared: Shared,
    batch: Batch,
    wanted: Wanted,
    key: jax.Array | None,
) -> jax.Array:
    """The weighted sum of the loss of the retrieval."""
    negatives, options = experiment.train.negatives, experiment.train.retrieval
    compared = _compared(experiment, inputs, layers.scale(), shared, batch, wanted)
    if hasattr(negatives, "kept"):
        drawn = jax.random.key(0) if key is None else jax.random.fold_in(key, KEPT_DRAW)
        compared = negatives.kept(compared, drawn)
    total: jax.Array = options.loss(compared)
    return total


def _contrasted(batch: Batch) -> jax.Array:
    """[B]: 1 for each example of the batch with two events or more."""
    events = jnp.sum(jnp.asarray(batch.events["item"]) > 0, axis=1)
    weight = jnp.asarray(batch.weight)
    return jnp.where((events > 1) & jnp.any(weight > 0, axis=1), 1, 0).astype(weight.dtype)


def _contrast_sum(
    options: Contrast, layers: Network, shared: Shared, batch: Batch, key: jax.Array | None
) -> jax.Array:
    """The weighted sum of the loss that two views of a history are alike; without a key the views
    are those of a fixed one."""
    count = jnp.sum(jnp.asarray(batch.events["item"]) > 0, axis=1)
    drawn = jax.random.fold_in(jax.random.key(0) if key is None else key, CONTRAST_DRAW)
    states: list[jax.Array] = []
    for of_views, of_encoder in jax.random.split(drawn, (2, 2)):
        view = views(options, shared.outcomes, batch.events.get("moment"), count, of_views)
        states.append(layers.state_after(view, None if key is None else of_encoder))
    one, other = states
    users = jnp.asarray(batch.user)
    loss = contrast_loss(one, other, users, _contrasted(batch), options.temperature)
    return options.weight * loss


def _compared(
    experiment: Experiment,
    inputs: Inputs,
    scale: jax.Array | float,
    shared: Shared,
    batch: Batch,
    wanted: Wanted,
) -> Compared:
    """What the loss of the retrieval compares."""
    name, d = str(inputs.retrieval), inputs.layout.width
    there, positives = jnp.asarray(batch.mask[name]), shared.candidates[..., :d]
    return Compared(
        users=unit_length(nearest(shared.users, positives)),
        positives=unit_length(positives),
        negatives=unit_length(shared.negatives[:, :d]),
        positive_ids=jnp.asarray(batch.candidate),
        negative_ids=wanted.negatives,
        log_expected=wanted.log_expected,
        scale=scale,
        weights=there * _weight(batch, name),
        items=inputs.trained,
        shown=passed_over(experiment, name, there, batch),
    )


def passed_over(
    experiment: Experiment, name: str, there: jax.Array, batch: Batch
) -> jax.Array | None:
    """[B, P, P]: whether position p was shown the candidate of p' as well, and nobody took it."""
    of = getattr(experiment.train.retrieval, "shown", "")
    if not of:
        return None
    candidate, cutoff = jnp.asarray(batch.candidate), jnp.asarray(batch.cutoff)
    judged = jnp.asarray(batch.mask[experiment.tasks[name].where]) > 0
    passed = judged & (jnp.asarray(batch.weight) > 0) & (there == 0) & (candidate >= FIRST)
    shown = passed[:, None] & (candidate[:, :, None] != candidate[:, None])
    return shown & (cutoff[:, :, None] == cutoff[:, None]) if of == "request" else shown


def _losses(
    task: Task,
    learned: TaskField,
    logits: jax.Array,
    batch: Batch,
    name: str,
    weight: jax.Array,
) -> jax.Array:
    """The loss at each position [B, P], before its weight: its own, or that of its list."""
    labels = jnp.asarray(batch.labels[name])
    own = head_of(task.kind, task.loss).loss(logits, labels, learned)
    if task.loss not in LISTS:
        return own
    score = logits if logits.ndim == 2 else logits[..., 0]  # thresholds cancel
    cutoff = jnp.asarray(batch.cutoff if task.lists == "request" else 0 * batch.cutoff)
    together = (cutoff[:, :, None] == cutoff[:, None, :]).astype(score.dtype)
    least = min(class_numbers(learned.classes), default=0.0)
    listed = LISTS[task.loss](score, labels - least, weight, together)
    return (1 - task.pointwise) * listed + task.pointwise * own if task.pointwise else listed


def _weight(batch: Batch, name: str) -> jax.Array:
    """What each position [B, P] weighs in a loss, wherever it has a label."""
    return jnp.asarray(batch.weight * batch.weights.get(name, 1))


def _check_lists(experiment: Experiment, manifest: Manifest) -> None:
    listed = [name for name, task in experiment.tasks.items() if task.loss in LISTS]
    if listed and manifest.positions["train"] < 2:
        raise ConfigError(
            f"tasks.{listed[0]}.loss: '{experiment.tasks[listed[0]].loss}' is over lists, and no "
            "training example has more than one position (no user has two training events); set "
            "it to 'pointwise'"
        )


def _check_brought(experiment: Experiment, own: dict[str, tuple[jax.Array, jax.Array]]) -> None:
    """Losses that towers bring stand in the place of the task's own."""
    for name in own:
        if name in experiment.tasks and experiment.tasks[name].loss in LISTS:
            kind = experiment.model.towers.kind
            raise ConfigError(
                f"tasks.{name}.loss: model.towers.kind = '{kind}' brings a loss of its own for "
                "this task; set it to 'pointwise', or take other towers"
            )


class _Fusion(NamedTuple):
    """What teaches the fused order."""

    weight: Callable[[Batch, jax.Array], jax.Array]
    loss: Callable[..., jax.Array]


def _make_fusion(
    experiment: Experiment, inputs: Inputs, network: Callable[[PyTree], Network]
) -> _Fusion | None:
    """None where no fused order is taught."""
    worth, listed = fusion_objective(experiment), inputs.utility.root
    if not experiment.model.fusion.learns or not inputs.tasks or not inputs.utility.terms:
        return None

    def example_weight(batch: Batch) -> jax.Array:
        value, seen = order.utility(worth, *_labels(batch))
        return (value * batch.mask[listed] if listed else seen) * batch.weight

    def weight_of(batch: Batch, lottery: jax.Array) -> jax.Array:
        weight = example_weight(batch)
        if not listed:
            return jnp.sum(weight)
        return jnp.sum(jnp.take_along_axis(weight, order.chosen_position(weight, lottery), 1))

    def fusion_loss(
        params: PyTree,
        shared: Shared,
        fusing: Fusing,
        batch: Batch,
        wanted: Wanted,
        lottery: jax.Array,
        mesh: jax.sharding.Mesh,
    ) -> jax.Array:
        layers, weight = network(params), example_weight(batch)
        if not listed:
            value, _ = order.utility(worth, *_labels(batch))
            fused = layers.fusion(fusing)[0].reshape(value.shape)
            return jnp.sum(optax.sigmoid_binary_cross_entropy(fused, value) * weight)
        chosen = order.chosen_position(weight, lottery)
        given = layers, shared, batch, wanted, weight, chosen
        return _list_loss(*given, inputs.layout.width, mesh)

    return _Fusion(weight_of, fusion_loss)


def states_of(shared: Shared, batch: Batch) -> UserStates:
    """The shared representation as the towers take it."""
    states = shared.users, shared.context, shared.request, shared.events, shared.outcomes
    return UserStates(*states, jnp.asarray(batch.cutoff))


def _labels(batch: Batch) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Labels and masks {task: [B, P]}."""
    labels, mask = ({n: jnp.asarray(v) for n, v in of.items()} for of in (batch.labels, batch.mask))
    return labels, mask


def _list_loss(
    layers: Network,
    shared: Shared,
    batch: Batch,
    wanted: Wanted,
    weight: jax.Array,
    chosen: jax.Array,
    width: int,
    mesh: jax.sharding.Mesh,
) -> jax.Array:
    """The fused score puts the target above hard negatives, at one position `chosen` an example.

    A softmax over the target and the sampled negatives that the retrieval scores highest, weighted
    by the worth of the target.
    """
    shared = jax.lax.stop_gradient(shared)

    def at_chosen(array: jax.Array) -> jax.Array:  # (B, P, ...) -> (B, 1, ...)
        place = chosen.reshape(*chosen.shape, *[1] * (array.ndim - 2))
        return jnp.take_along_axis(array, place, axis=1)

    user, own = at_chosen(shared.users), at_chosen(shared.candidates)  # (B, 1, K * D), (B, 1, W)
    target, d = at_chosen(jnp.asarray(batch.candidate)), width
    of_target = nearest(user, own[..., :d])
    places, retrieved = order.hardest(
        of_target[:, 0], own[:, 0, :d], target, shared.negatives[:, :d], wanted.negatives, mesh
    )
    candidates = jnp.concatenate([own, jnp.take(shared.negatives, places, axis=0)], axis=1)
    shape = candidates.shape[:2]  # (B, K)
    states = states_of(shared, batch)._replace(
        vectors=jnp.broadcast_to(user, (*shape, user.shape[-1])),
        request=jnp.broadcast_to(at_chosen(shared.request), (*shape, shared.request.shape[-1])),
        cutoff=jnp.broadcast_to(at_chosen(jnp.asarray(batch.cutoff)), shape),
    )
    fused = layers.outputs(states, candidates, None)[0].fused
    ids = jnp.concatenate([target, wanted.negatives[places]], axis=1)
    return order.listwise(fused, ids, at_chosen(weight)[:, 0] * retrieved)
