"""What the model reads: its tables and groups of lookups, and rows as vectors."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtrec_jax.arguments import argument
from mtrec_jax.config import Experiment, Model, table_of, utility_of
from mtrec_jax.data.dataset import IdField, Manifest, NumberField
from mtrec_jax.errors import ConfigError, nearest
from mtrec_jax.losses.negatives import Pool, state_before
from mtrec_jax.losses.tasks import KINDS, class_levels, head_of
from mtrec_jax.mixing import mixed_bits
from mtrec_jax.models.fusions import Utility
from mtrec_jax.models.layers import layer_norm, linear
from mtrec_jax.models.numbers import NumberSizes
from mtrec_jax.models.towers import TowerTask
from mtrec_jax.tables.layout import DENSE, Layout, TableSize, make_layout, pool
from mtrec_jax.types import FIRST, UNKNOWN, Array, Batch, Catalogue, PyTree, Wanted

ITEM = "item"  # the items' own table, and the group that looks it up
CUT = 5.0  # standard deviations at which numbers are cut off


class Inputs(NamedTuple):
    """What follows from the configuration and the manifest."""

    layout: Layout
    numbers: dict[str, tuple[int, ...]]  # {side: numbers of each feature}
    order: tuple[str, ...]  # all tasks
    tasks: dict[str, TowerTask]  # tasks with a tower: all but retrieval
    levels: dict[str, tuple[float, ...]]  # {task with classes: what each of them counts as}
    retrieval: str | None
    id_dropout: dict[str, float]  # {table: share of ids that training takes for unknown}
    has_items: bool
    has_events: bool
    trained: int  # items that training has seen, which come first
    thresholds: dict[str, tuple[float, ...]]  # {ordinal task: of a fresh model}
    # {side: {"ids", "numbers": which of the batch's moments are its}}, where the moments are those
    # of several sides, "request", "bias" and "asked"; {}: all are of the first
    places: Mapping[str, Mapping[str, tuple[int, ...]]] = {}
    read: Mapping[str, tuple[str, int]] = {}  # {feature that towers read by name: (side, place)}
    # who has tables of its own beside the shared ones: tasks, or members after the first
    own: tuple[str, ...] = ()
    utility: Utility = Utility("", ())  # what an order is worth
    coded: Mapping[str, tuple[bool, ...]] = {}  # {side: whether a feature's numbers are a code}

    @property
    def lists_items(self) -> bool:
        """Whether a step computes the vector of every item once, and points into them.

        For a dense table of a few thousand items this is less work than the batch's own places,
        which repeat the same items, and every row is updated anyway. Otherwise each place of the
        batch has its own, so that no device needs another's.
        """
        return self.has_items and self.layout.places[ITEM].stack == DENSE


def side_group(side: str) -> str:
    """The group of lookups of a side's features: items have one of their own rows as well."""
    return "item_features" if side == "item" else side


def own_name(name: str, whose: str) -> str:
    """The own table or group of lookups of a task or member, in the place of the shared one; "":
    the shared one.

    >>> own_name("brand", "click"), shared_name("brand:click"), own_name("brand", "")
    ('brand:click', 'brand', 'brand')
    """
    return f"{name}:{whose}" if whose else name


def shared_name(name: str) -> str:
    """The table or group beside which somebody has an own one; features have no ":" in theirs."""
    return name.partition(":")[0]


def owner_of(name: str) -> str:
    """The task or member whose own table or group it is; "" of the shared ones."""
    return name.partition(":")[2]


def make_inputs(experiment: Experiment, manifest: Manifest) -> Inputs:
    """Lay out the tables and collect the sizes of a model.

    Raises:
      ConfigError: there are more values than a table's capacity.
    """
    biased = experiment.model.bias.features if experiment.model.bias else ()
    sides = _sides(manifest, biased)
    codes = {name for name, feature in experiment.features.items() if feature.coded}
    _check_moments(experiment)
    has_items = manifest.items > 0
    has_events = experiment.model.encoder.kind != "none" and manifest.history_length > 0
    tables: dict[str, TableSize] = {}
    groups = {side_group(s): [(f.name, f.slots) for f in ids] for s, (ids, _) in sides.items()}
    if not has_events:
        groups.pop("history")
    if has_items:
        values = manifest.item_values or manifest.trained_items
        tables[ITEM] = _size(experiment, ITEM, FIRST + values)
        groups |= {ITEM: [(ITEM, 1)]}
        if tables[ITEM].rule != DENSE:
            groups |= {"negative": [(ITEM, 1)], "negative_features": groups["item_features"]}
    for side, (ids, _) in sides.items():
        if side != "history" or has_events:
            tables |= {f.name: _size(experiment, f.name, f.size) for f in ids}
    kinds = {name: task.kind for name, task in experiment.tasks.items()}
    learned = {name: manifest.tasks[name] for name, kind in kinds.items() if kind in KINDS}
    towers = experiment.model.towers
    own = _owners(experiment.model, kinds) if learned else ()
    kept = {"history", "bias"}  # which no tower reads
    if not experiment.model.fusion.learns:  # only then towers score negatives
        kept |= {"negative", "negative_features"}
    _add_own(tables, groups, own, kept)
    return Inputs(
        layout=make_layout(tables, groups, experiment.model.width),
        numbers={s: tuple(f.slots for f in numbers) for s, (_, numbers) in sides.items()},
        coded={s: tuple(f.name in codes for f in numbers) for s, (_, numbers) in sides.items()},
        order=tuple(experiment.tasks),
        tasks={
            name: TowerTask(kinds[name], KINDS[kinds[name]].outputs(of), task.where, task.loss)
            for name, of in learned.items()
            for task in (experiment.tasks[name],)
        },
        levels={name: class_levels(of.classes) for name, of in learned.items() if of.classes},
        thresholds={
            name: cut(of) for name, of in learned.items() if (cut := KINDS[kinds[name]].thresholds)
        },
        retrieval=next((name for name, kind in kinds.items() if kind == "retrieval"), None),
        utility=utility_of(experiment),
        id_dropout={
            name: share for name in tables if (share := table_of(experiment, name).id_dropout)
        },
        has_items=has_items,
        has_events=has_events,
        trained=manifest.trained_items,
        places=_places(manifest, biased),
        read=_read(getattr(towers, "reads", ()), groups),
        own=own,
    )


def _sides(
    manifest: Manifest, biased: tuple[str, ...]
) -> dict[str, tuple[tuple[IdField, ...], tuple[NumberField, ...]]]:
    """The features of each side; those of the moments are of two where some are of the bias."""
    ids, numbers = manifest.request_ids, manifest.request_numbers
    return {
        "context": (manifest.context_ids, manifest.context_numbers),
        "request": (
            tuple(f for f in ids if f.name not in biased and f.size),
            tuple(f for f in numbers if f.name not in biased),
        ),
        "bias": (
            tuple(f for f in ids if f.name in biased),
            tuple(f for f in numbers if f.name in biased),
        ),
        "item": (manifest.item_ids, manifest.item_numbers),
        "history": (tuple(f for f in manifest.history if f.size), ()),
    }


def _owners(model: Model, kinds: Mapping[str, str]) -> tuple[str, ...]:
    """Who has tables of its own: each task with a tower, or each member after the first."""
    members = model.members if model.members_share == "encoder" else 1
    if getattr(model.towers, "task_tables", False):
        if members > 1:
            raise ConfigError(
                f"model.members_share: 'encoder', but model.towers.kind = '{model.towers.kind}' "
                "has tables of each task already; set members_share = 'layers', or take other "
                "towers"
            )
        return tuple(name for name, kind in kinds.items() if kind != "retrieval")
    return tuple(f"member {number}" for number in range(2, members + 1))


def _add_own(
    tables: dict[str, TableSize],
    groups: dict[str, list[tuple[str, int]]],
    own: tuple[str, ...],
    kept: Collection[str],
) -> None:
    """Tables of each owner beside all that towers read, and groups that look them up; groups of
    `kept` have none."""
    for group in [group for group in groups if group not in kept]:
        for whose in own:
            groups[own_name(group, whose)] = [
                (own_name(name, whose), slots) for name, slots in groups[group]
            ]
            tables |= {own_name(name, whose): tables[name] for name, _ in groups[group]}


def _read(
    names: Sequence[str], groups: Mapping[str, Sequence[tuple[str, int]]]
) -> dict[str, tuple[str, int]]:
    """Where the features that towers read by their names stand among those of their side."""
    known = {
        name: (side, place)
        for side in ("context", "request", "item")
        for place, (name, _) in enumerate(groups.get(side_group(side), ()))
    }
    for name in names:
        if name not in known:
            raise ConfigError(
                f"model.towers: it reads '{name}', which is no feature of the context, the request "
                "or the item with an embedding, or one that the bias tower has taken "
                f"(model.bias.features).{nearest(name, known)} Such features are "
                f"{', '.join(known) or 'missing here'}"
            )
    return {name: known[name] for name in names}


def _places(manifest: Manifest, biased: tuple[str, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Which slots of the moments are features of the request, which of the bias, and which is the
    time of the query; {} where all are of the request."""

    def side(field: IdField | NumberField) -> str:
        if isinstance(field, IdField) and not field.size:
            return "asked"
        return "bias" if field.name in biased else "request"

    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part, fields in (("ids", manifest.request_ids), ("numbers", manifest.request_numbers)):
        of_slot = [side(f) for f in fields for _ in range(f.slots)]
        for name in dict.fromkeys(of_slot):
            places = tuple(i for i, is_of in enumerate(of_slot) if is_of == name)
            found[name] = found.get(name, {}) | {part: places}
    return {"request": {}} | found if found.keys() - {"request"} else {}


def side_of(inputs: Inputs, batch: Batch, side: str) -> Mapping[str, Array]:
    """The ids and numbers of a side, as far as it has any: "context", "request", "bias", "asked" or
    "history"."""
    if side in inputs.places:
        places = inputs.places[side]
        return {part: jnp.asarray(batch.request[part])[..., at] for part, at in places.items()}
    return batch.events if side == "history" else getattr(batch, side)


def _check_moments(experiment: Experiment) -> None:
    """Refuse what would tell the target from other candidates of the same moment."""
    data, tasks = experiment.data, experiment.tasks
    if not any(task.kind == "retrieval" for task in tasks.values()):
        return
    for name, feature in experiment.features.items():
        if feature.on == "request" and data.item and (feature.column or name) == data.item:
            raise ConfigError(
                f"features.{name}: column '{data.item}' is the target's own item, and what it says "
                "of a moment would stand beside all candidates of the retrieval task, and give the "
                "target away. Leave the feature out (features = [...]), use on = 'history', or "
                "train without the retrieval task (tasks = [...])"
            )


def group_slots(experiment: Experiment, manifest: Manifest) -> dict[str, int]:
    """{task whose head is `grouped`: which of an item's ids is that of its `duration`}."""
    fields = manifest.item_ids
    starts = np.cumsum([0, *(field.slots for field in fields)]).tolist()
    slots = dict(zip((field.name for field in fields), starts, strict=False))
    return {
        name: slots[task.duration]
        for name, task in experiment.tasks.items()
        if task.kind in KINDS and head_of(task.kind, task.loss).grouped
    }


def with_group(logits: jax.Array, group: jax.Array) -> jax.Array:
    """Logits [...] of a task and its items' groups [...] as [..., 2], which its head reads."""
    return jnp.stack([logits, group.astype(logits.dtype)], axis=-1)


def _size(experiment: Experiment, name: str, ids: int) -> TableSize:
    """The rows of a table with so many ids."""
    table = table_of(experiment, name)
    if table.capacity and ids > FIRST + table.capacity:
        carries = argument("init_from")
        rest = f"; rows of an earlier run are then carried over by training with {carries}"
        raise ConfigError(
            f"tables.{name}.capacity: {ids - FIRST:,} values have a row of their own, more than "
            f"{table.capacity:,}. Raise it{rest if carries else ''}"
        )
    rule = table.rule if table.update == "sparse" else DENSE
    if table.hash_rows:
        return TableSize(rule, FIRST + table.hash_rows, table.hash_functions)
    return TableSize(rule, max(ids, FIRST + table.capacity))


# --- What a batch looks up


def find_ids(
    inputs: Inputs,
    batch: Batch,
    catalogue: Catalogue,
    negatives: Any,
    key: jax.Array | None,
    drawing: PyTree = None,
) -> Wanted:
    """All ids that a batch looks up, by group; with a key, negatives are drawn and ids dropped."""
    ids: dict[str, jax.Array] = {}
    candidate = jnp.asarray(batch.candidate)
    drawn = listed = jnp.zeros((0,), jnp.int32)
    expected = jnp.zeros((0,), jnp.asarray(catalogue.log_probability).dtype)
    if inputs.has_items:
        if key is not None and inputs.retrieval:
            there = jnp.asarray(batch.mask[inputs.retrieval]) * jnp.asarray(batch.weight)
            pool = Pool(catalogue, inputs.trained, candidate, there)
            if drawing is None:  # nobody keeps what a way to draw remembers
                drawing = state_before(negatives, len(catalogue.row) - FIRST)
            (drawn, expected), drawing = negatives.draw(pool, drawing, key)
        if inputs.lists_items:
            listed = jnp.arange(catalogue.row.shape[0], dtype=jnp.int32)
        else:
            places = [jnp.asarray(batch.events["item"])] if inputs.has_events else []
            listed = jnp.concatenate([*places, candidate], axis=1)
            ids |= item_ids(inputs, drawn, catalogue, "negative")
        ids |= item_ids(inputs, listed, catalogue)
    for side in ("context", "request", "bias", "history"):
        if side in inputs.layout.groups:
            ids[side] = jnp.asarray(side_of(inputs, batch, side)["ids"])
    if key is not None and inputs.id_dropout:
        ids = _dropped(inputs, ids, jax.random.fold_in(key, 1))
    events = listed.shape[1] - candidate.shape[1] if listed.ndim == 2 else 0
    return Wanted(own_too(inputs, ids, events), listed, drawn, expected, drawing)


def own_too(inputs: Inputs, ids: Mapping[str, jax.Array], events: int = 0) -> dict[str, jax.Array]:
    """The same ids in each owner's tables as well; of items [B, L + P] those of the candidates,
    behind so many events, which no tower reads."""
    found = dict(ids)
    for group, of in ids.items():
        part = of[:, events:] if events and group in (ITEM, "item_features") else of
        own = (own_name(group, whose) for whose in inputs.own)
        found |= {name: part for name in own if name in inputs.layout.groups}
    return found


def item_ids(
    inputs: Inputs, items: Array, catalogue: Catalogue, group: str = ITEM
) -> dict[str, jax.Array]:
    """Ids of items' own rows [..., 1] and of their features [..., M], by group."""
    found = {group: jnp.asarray(catalogue.row)[items][..., None]}
    if f"{group}_features" in inputs.layout.groups:
        found[f"{group}_features"] = jnp.asarray(catalogue.ids)[items]
    return found


def _dropped(inputs: Inputs, ids: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Some ids of the tables with `id_dropout` become unknown, so that features have to do."""
    found = {}
    for number, (group, of) in enumerate(sorted(ids.items())):
        shares = [
            inputs.id_dropout.get(slots.place.name, 0.0)
            for slots in inputs.layout.groups[group]
            for _ in range(slots.ids)
        ]
        if any(shares):
            least = np.array([min(round(s * 2**32), 2**32 - 1) for s in shares], np.uint32)
            bits = mixed_bits(of.shape, jax.random.fold_in(key, number))
            of = jnp.where((bits < jnp.broadcast_to(least, of.shape)) & (of > UNKNOWN), UNKNOWN, of)
        found[group] = of
    return found


def hidden_events(share: float, batch: Batch, key: jax.Array) -> Batch:
    """The batch with some of the positions' own events hidden, `events["masked"]` [B, L + 1] by
    place of the event, and no weight on the other positions."""
    length, cutoff = jnp.asarray(batch.events["item"]).shape[1], jnp.asarray(batch.cutoff)
    weight = jnp.asarray(batch.weight)
    drawn = jax.random.uniform(key, weight.shape) < share
    taken = drawn & (weight > 0)
    places = jnp.zeros((len(cutoff), length + 1), bool)
    masked = jax.vmap(lambda of, at, which: of.at[at].max(which))(places, cutoff, taken)
    heard = jax.vmap(lambda of, at: of[at])(masked, cutoff)
    return batch._replace(
        events={**batch.events, "masked": masked}, weight=weight * heard.astype(weight.dtype)
    )


# --- Rows to vectors


class SideFeatures(nnx.Module):
    """Features of the user, or of the moment, side by side: [..., F].

    Embeddings are normalised together. Numbers are standardised already and say something by their
    size, so they stay outside, cut off at five standard deviations. `outputs` is F, and `fields`
    says how many vectors of width D stand first.
    """

    def __init__(
        self,
        inputs: Inputs,
        side: str,
        numbers: Any,
        whose: str = "",
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.side, self.rows = inputs, side, own_name(side, whose)
        self.group = inputs.layout.groups.get(self.rows, ())
        self.numbers = _numbers(inputs, side, numbers, dtype, rngs)
        embedded = len(self.group) * inputs.layout.width
        self.norm = layer_norm(embedded, dtype=dtype, rngs=rngs) if embedded else None
        self.outputs = embedded + (self.numbers.outputs if self.numbers else 0)
        self.fields = len(self.group) + (self.numbers.fields if self.numbers else 0)

    def __call__(self, batch: Batch, rows: Mapping[str, jax.Array], dtype: jnp.dtype) -> jax.Array:
        """[B, F] of the user, [B, P, F] of the moments; F may be 0."""
        part = side_of(self.inputs, batch, self.side)
        shape = batch.cutoff.shape[: 1 if self.side == "context" else 2]
        parts = [jnp.zeros((*shape, 0), dtype)]
        if self.norm is not None:
            pooled = pool(self.group, jnp.asarray(part["ids"]), rows[self.rows])
            # As a matrix: XLA sums products over the axes of [B, 1, F] far slower on CPUs.
            flat = self.norm(pooled.reshape(-1, self.norm.num_features))
            parts.append(flat.reshape(*shape, -1))
        if self.numbers is not None:
            parts.append(self.numbers(clipped(part["numbers"])))
        return jnp.concatenate(parts, axis=-1)


def clipped(numbers: Array) -> jax.Array:
    """Standardised numbers, cut off at five standard deviations."""
    return jnp.clip(jnp.asarray(numbers), -CUT, CUT)


def _numbers(inputs: Inputs, side: str, options: Any, dtype: jnp.dtype, rngs: nnx.Rngs) -> Any:
    """How a side's numbers are taken; None where it has none."""
    slots = inputs.numbers[side]
    if not slots:
        return None
    coded = inputs.coded.get(side, (False,) * len(slots))
    return options.make(NumberSizes(slots, inputs.layout.width, coded), dtype=dtype, rngs=rngs)


class ItemTower(nnx.Module):
    """An item's own row and its features to its vector."""

    def __init__(
        self,
        inputs: Inputs,
        id_scale: float,
        numbers: Any,
        whose: str = "",
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.id_scale = id_scale
        self.group = inputs.layout.groups.get(own_name("item_features", whose), ())
        self.numbers = _numbers(inputs, "item", numbers, dtype, rngs)
        width, slots = inputs.layout.width, inputs.numbers["item"]
        coded = inputs.coded.get("item", (False,) * len(slots))
        self.most = tuple(  # of each number: vectors of texts are no standardised numbers
            np.repeat([math.inf if code else CUT for code in coded], slots).tolist()
        )
        size = len(self.group) * width + (self.numbers.outputs if self.numbers else 0)
        self.features = linear(size, width, dtype=dtype, rngs=rngs) if size else None

    def __call__(
        self, own: jax.Array, rows: jax.Array | None, ids: jax.Array, numbers: jax.Array
    ) -> jax.Array:
        """Own rows [..., D], rows of features [..., M, D], their ids and numbers -> [..., D]."""
        if self.features is None:
            return own
        parts = []
        if self.numbers is not None:
            most = jnp.broadcast_to(jnp.asarray(self.most, own.dtype), numbers.shape)
            parts = [self.numbers(jnp.clip(numbers.astype(own.dtype), -most, most))]
        if rows is not None:
            pooled = pool(self.group, ids, rows)
            features = pooled.shape[-2] * pooled.shape[-1]  # there may be no items
            parts.append(pooled.reshape(*own.shape[:-1], features))
        return self.id_scale * own + self.features(jnp.concatenate(parts, axis=-1))
