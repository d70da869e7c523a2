"""The dense layers: inputs -> encoder -> interaction -> towers -> fusion. Tables live outside."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.config import Model as ModelConfig
from mtrec_jax.errors import ConfigError
from mtrec_jax.losses.tasks import head_of
from mtrec_jax.models import calibration
from mtrec_jax.models.attention import LastSearch, TargetAttention
from mtrec_jax.models.bias import BiasTower
from mtrec_jax.models.calibration import Calibration
from mtrec_jax.models.encoders import Behaviour, EncoderSizes
from mtrec_jax.models.fusions import FusionSizes
from mtrec_jax.models.fusions.none import NoFusion
from mtrec_jax.models.inputs import Inputs, ItemTower, SideFeatures, clipped, side_of
from mtrec_jax.models.interactions import InteractionSizes
from mtrec_jax.models.interests import Interests, nearest
from mtrec_jax.models.layers import Thresholds, dropout, linear, normal, unit_length
from mtrec_jax.models.members import Members, together
from mtrec_jax.models.towers import TowerInput, TowerOutput, TowerSizes
from mtrec_jax.models.views import View
from mtrec_jax.tables.layout import pool
from mtrec_jax.types import UNKNOWN, Array, Batch, Fusing, Outputs, UserStates

EVENTS = 1 << 16  # draw of the events that are hidden; encoders split the same key


class Network(nnx.Module):
    """All dense layers of a model."""

    def __init__(
        self,
        config: ModelConfig,
        inputs: Inputs,
        history_length: int,
        searches: bool,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.config, self.inputs, self.dtype = config, inputs, dtype
        d = config.width

        made = functools.partial(linear, dtype=dtype, rngs=rngs)

        taken = config.numbers
        self.items = ItemTower(inputs, config.item_id_scale, taken, dtype=dtype, rngs=rngs)
        self.context = SideFeatures(inputs, "context", taken, dtype=dtype, rngs=rngs)
        self.request = SideFeatures(inputs, "request", taken, dtype=dtype, rngs=rngs)
        self._make_own(dtype, rngs)
        shown = config.bias
        self.bias = BiasTower(inputs, shown, taken, dtype=dtype, rngs=rngs) if shown else None
        context, numbers = self.context.outputs, sum(inputs.numbers["context"])
        self.user_numbers = made(numbers, d) if numbers and inputs.has_events else None
        self.user_context = made(context, d) if context and inputs.has_items else None
        searches = searches and inputs.has_events and "history" in inputs.layout.groups
        self.search = LastSearch(d, dtype=dtype, rngs=rngs) if searches else None
        learns = bool(inputs.retrieval) and config.learn_temperature
        self.log_scale = nnx.Param(jnp.zeros((), dtype)) if learns else None
        if inputs.has_events:
            self._make_encoder(history_length, dtype, rngs)
        alone = config.members if inputs.tasks and config.members_share == "encoder" else 1
        of_context = self.user_context is not None and not inputs.has_events
        self.other_users = nnx.List([made(context, d) for _ in range(1, alone) if of_context])
        if not inputs.tasks:
            return
        sizes = tower_sizes(inputs, self.context.outputs, self.request.outputs, d)
        fields = self.context.fields + self.request.fields + 2 * inputs.has_items
        crossed = InteractionSizes(sizes.inputs, fields, d)
        self.interactions = nnx.List(
            [config.interaction.make(crossed, dtype=dtype, rngs=rngs) for _ in range(alone)]
        )
        sizes = sizes._replace(inputs=self.interactions[0].outputs)
        self.towers = config.towers.make(sizes, dtype=dtype, rngs=rngs)
        self.other_towers = nnx.List(
            [config.towers.make(sizes, dtype=dtype, rngs=rngs) for _ in range(1, alone)]
        )
        hidden = _hidden_sizes(self.towers, sizes, dtype)
        scaled = config.members > alone
        if scaled and hasattr(self.towers, "loss_inputs") and self.towers.loss_inputs:
            raise ConfigError(
                f"model.members: {config.members}, but the losses of model.towers.kind = "
                f"'{config.towers.kind}' read more than the logits that members change; set "
                "members_share = 'encoder', or members = 1"
            )
        own = config.members, sizes.inputs, hidden, inputs.tasks
        self.members = Members(*own, dtype=dtype, rngs=rngs) if scaled else None
        self.thresholds = nnx.List([Thresholds(t, dtype=dtype) for t in inputs.thresholds.values()])
        state = sizes.context + sizes.request + sizes.width
        of_task = next(iter(hidden.values()), 1)
        fused = FusionSizes(state, of_task, inputs.order, inputs.utility)
        options = config.fusion if inputs.utility.terms else NoFusion()  # nothing has a worth
        self.fusion = options.make(fused, dtype=dtype, rngs=rngs)

    def _make_encoder(self, history_length: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """What reads the events of the past."""
        config, d = self.config, self.config.width
        self.start = nnx.Param(normal(rngs, (d,), 0.02, dtype))
        self.target_attention = TargetAttention(d, dtype=dtype, rngs=rngs)
        if "history" in self.inputs.layout.groups:
            self.behaviour = linear(d, d, dtype=dtype, rngs=rngs)
        seen, count = EncoderSizes(d, history_length + 1, config.dropout), config.interests
        self.encoder = config.encoder.make(seen, dtype=dtype, rngs=rngs)
        self.interests = Interests(count, d, dtype=dtype, rngs=rngs) if count > 1 else None

    def _make_own(self, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        """What reads the tables of each owner, as `items`, `context` and `request` read the shared
        ones."""
        inputs, scale, taken = self.inputs, self.config.item_id_scale, self.config.numbers
        with_items, made = inputs.own if inputs.has_items else (), {"dtype": dtype, "rngs": rngs}
        self.own_items = nnx.List([ItemTower(inputs, scale, taken, t, **made) for t in with_items])
        self.own_context, self.own_request = (
            nnx.List([SideFeatures(inputs, side, taken, t, **made) for t in inputs.own])
            for side in ("context", "request")
        )

    def users(
        self, batch: Batch, rows: Mapping[str, jax.Array], events: Array, key: jax.Array | None
    ) -> UserStates:
        """Encode context, moments and the events' item vectors [B, L, D]."""
        b, p = batch.cutoff.shape
        d, cutoff = self.config.width, jnp.asarray(batch.cutoff)
        context, request = (
            [of(batch, rows, self.dtype) for of in (shared, *own)]
            for shared, own in ((self.context, self.own_context), (self.request, self.own_request))
        )
        projected = jnp.zeros((b, d), self.dtype)
        if self.user_context is not None:
            projected = self.user_context(context[0])
        features = jnp.concatenate(context, axis=-1), jnp.concatenate(request, axis=-1)
        if not self.inputs.has_events:
            none = jnp.zeros((b, 0, d), self.dtype)
            states = jnp.broadcast_to(projected[:, None], (b, p, d))
            return UserStates(states, *features, none, none, cutoff)
        tokens, events, behaviour = self._tokens(batch, rows, jnp.asarray(events))
        there = jnp.asarray(batch.events["item"]) > 0
        moments = _with_start(batch.events.get("moment"))
        times = moments, self._asked(batch, moments, there)
        if key is not None and self.config.event_dropout:
            there = there & self._kept(there.shape, key)
            tokens = jnp.where(there[..., None], tokens, 0)
        start = self.start[...][None] + projected
        # (B, 1 + L, D): state s has seen s events
        known = jnp.pad(there, ((0, 0), (1, 0)), constant_values=True)
        past = Behaviour(jnp.concatenate([start[:, None], tokens], axis=1), known, *times)
        if hasattr(self.encoder, "at"):
            masked = batch.events.get("masked")
            masked = None if masked is None else jnp.asarray(masked)
            states = self.encoder.at(past, cutoff, masked, key)
        else:
            hidden = self.encoder(past, key)
            if self.interests is not None:
                hidden = self.interests(past.tokens, known, hidden)
            # Whole rows are gathered, each example's from its own: none comes from another device.
            states = jax.vmap(lambda seen, cutoff: seen[cutoff])(hidden, cutoff)
        if self.search is not None:
            searched = jnp.asarray(batch.events["item"]) == UNKNOWN
            states = states + self._to_each(self.search(behaviour, searched, cutoff))
        if self.user_numbers is not None:  # they belong to this example's time, not to the start
            numbers = self.user_numbers(clipped(batch.context["numbers"]))
            states = states + self._to_each(numbers)[:, None]
        return UserStates(states, *features, events, tokens, cutoff)

    def _kept(self, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Which events [B, L] training does not hide from the encoder."""
        rate = self.config.event_dropout
        return jax.random.bernoulli(jax.random.fold_in(key, EVENTS), 1 - rate, shape)

    def state_after(self, view: View, key: jax.Array | None) -> jax.Array:
        """The state [B, D] after a stranger's events; the interests side by side, if there are
        several."""
        start = jnp.broadcast_to(self.start[...], (len(view.tokens), 1, view.tokens.shape[-1]))
        known = jnp.pad(view.there, ((0, 0), (1, 0)), constant_values=True)
        past = Behaviour(
            jnp.concatenate([start, view.tokens], axis=1), known, _with_start(view.moments)
        )
        hidden = self.encoder(past, key)
        if self.interests is not None:
            hidden = self.interests(past.tokens, known, hidden)
        return jnp.take_along_axis(hidden, view.size[:, None, None], axis=1)[:, 0]

    def _to_each(self, part: jax.Array) -> jax.Array:
        """What is added to each interest [..., D], as often as there are any."""
        return jnp.concatenate([part] * self.config.interests, axis=-1)

    def _asked(self, batch: Batch, moments: jax.Array | None, there: jax.Array) -> jax.Array | None:
        """When what follows each token is asked for [B, S]: at the time of the query where there
        is one and it has a time, else of the event that follows [B, L], else of the last event."""
        if "asked" not in self.inputs.places or moments is None:
            return None
        following = jnp.pad(moments[:, 1:], ((0, 0), (0, 1)))
        follows = jnp.pad(there, ((0, 0), (0, 1)))
        asked = side_of(self.inputs, batch, "asked")["ids"]
        places = jnp.zeros_like(moments)
        given = jax.vmap(lambda at, cutoff, time: at.at[cutoff].max(time))(
            places, jnp.asarray(batch.cutoff), asked[..., 0]
        )
        return jnp.where(given > 0, given, jnp.where(follows, following, moments))

    def _tokens(
        self, batch: Batch, rows: Mapping[str, jax.Array], events: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Events as tokens of the encoder, as what candidates are compared with, and what happened
        at each, all [B, L, D]."""
        tokens, behaviour = events, jnp.zeros_like(events)
        if "history" in self.inputs.layout.groups:
            group = self.inputs.layout.groups["history"]
            ids = jnp.asarray(batch.events["ids"])
            behaviour = pool(group, ids, rows["history"]).sum(axis=-2)
            if self.search is not None:  # it is of no item, and stands where its words are
                searched = jnp.asarray(batch.events["item"]) == UNKNOWN
                tokens = events = jnp.where(searched[..., None], behaviour, events)
            # What happened must multiply what it happened to: a sum of "clicked" and "books" says
            # nothing of whether books were clicked.
            scale = self.config.width**0.5
            tokens = tokens * (1 + self.behaviour(behaviour * scale)) + behaviour
        tokens = jnp.where((jnp.asarray(batch.events["item"]) > 0)[..., None], tokens, 0)
        return tokens * self.config.width**0.5, events, behaviour

    def outputs(
        self,
        states: UserStates,
        candidates: jax.Array | None,
        key: jax.Array | None,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> tuple[Outputs, Fusing | None]:
        """Score candidates [B, P, W] for the states: every task's logits, and the fused order of
        them calibrated; and what the fusion was given."""
        (b, p), d = states.vectors.shape[:2], self.config.width
        n, versions = b * p, 1 + len(self.inputs.own)  # the shared tables, then those of each owner
        context = jnp.broadcast_to(states.context[:, None], (b, p, states.context.shape[1]))
        contexts, requests = (
            jnp.split(jnp.asarray(side).reshape(n, -1), versions, axis=-1)
            for side in (context, states.request)
        )
        user = jnp.zeros((n, 0), self.dtype)
        users, pairs, logits = [user] * versions, [list[jax.Array]()] * versions, {}
        items = users
        if self.inputs.has_items and candidates is not None:
            user = nearest(jnp.asarray(states.vectors), candidates[..., :d]).reshape(n, d)
            items = jnp.split(candidates.reshape(n, -1), candidates.shape[-1] // d, axis=-1)
            others = [of(c) for of, c in zip(self.other_users, contexts[1:], strict=False)]
            users = [user, *(others or [user] * (versions - 1))]  # own where all known of them is
            pairs = [_paired(of, item) for of, item in zip(users, items, strict=False)]
            if self.inputs.retrieval:
                logits[self.inputs.retrieval] = pairs[0][-1][:, 0] / self.config.temperature
            if self.inputs.has_events:
                past = [jnp.asarray(x) for x in (states.events, states.outcomes, states.cutoff)]
                met = self.target_attention(candidates[..., :d], *past).reshape(n, d)
                pairs = [[*pair, met] for pair in pairs]
        if not self.inputs.tasks:
            score = logits[str(self.inputs.retrieval)].reshape(b, p)
            name = str(self.inputs.retrieval)
            return Outputs({name: score}, score, jnp.ones((b, p, 1), score.dtype), {}, {}), None
        inputs = self._crossed(contexts, requests, pairs)
        context, request = contexts[0], requests[0]
        read = self._read_by_name(contexts, requests, items[versions:])
        if self.other_towers:
            each_input = zip(inputs, contexts, requests, users, items, read, strict=False)
            given = [TowerInput(*of_member) for of_member in each_input]
        else:
            of_tasks = dict(zip(self.inputs.own, inputs[1:], strict=True))
            given = [TowerInput(inputs[0], context, request, user, items[0], read[0], of_tasks)]
        found, each = self._answers(given, key)
        logits |= found.logits
        names, known = self.inputs.order, calibrations or {}
        right = {t: calibration.apply(known.get(t), logits[t], jnp) for t in names}
        scores = {t: self.score_of(t, right[t]) for t in names}
        fusing = Fusing(
            jnp.concatenate([context, request, user], axis=-1),
            {t: found.hidden[t] for t in names if t in found.hidden},
            scores,
            {t: self.in_unit(t, score) for t, score in scores.items()},
        )
        fused, weights = self.fusion(fusing)
        looks = {n: v.reshape(b, p, *v.shape[1:]) for n, v in found.diagnostics.items()}
        return Outputs(
            {t: logits[t].reshape(b, p, *logits[t].shape[1:]) for t in names},
            fused.reshape(b, p),
            weights.reshape(b, p, -1),
            looks,
            {t: v.reshape(b, p, *v.shape[1:]) for t, v in each.items()},
        ), fusing

    def _crossed(
        self, contexts: list[jax.Array], requests: list[jax.Array], pairs: list[list[jax.Array]]
    ) -> list[jax.Array]:
        """All that towers know of n pairs, behind the interaction, by each version of the tables:
        [n, I] each."""
        d, found = self.config.width, []
        crossing = itertools.cycle(self.interactions)  # one for all, or one a member
        for context, request, pair in zip(contexts, requests, pairs, strict=True):
            fields = [context[:, : self.context.fields * d], request[:, : self.request.fields * d]]
            fields += pair[:2]  # the user, the candidate
            crossed = jnp.concatenate(fields, axis=-1).reshape(len(context), -1, d)
            whole = jnp.concatenate([context, request, *pair], axis=-1)
            found.append(next(crossing)(whole, crossed))
        return found

    def _read_by_name(
        self, contexts: list[jax.Array], requests: list[jax.Array], items: list[jax.Array]
    ) -> list[dict[str, jax.Array]]:
        """The features [n, D] that the towers read by their names, by each version of the tables;
        of items in their order."""
        of_items, d, found = iter(items), self.config.width, []
        for context, request in zip(contexts, requests, strict=True):
            sides = {"context": context, "request": request}
            named = {
                name: next(of_items) if side == "item" else sides[side][:, p * d : (p + 1) * d]
                for name, (side, p) in self.inputs.read.items()
            }
            found.append(named)
        return found

    def _answers(
        self, given: list[TowerInput], key: jax.Array | None
    ) -> tuple[TowerOutput, dict[str, jax.Array]]:
        """What the towers say of n pairs, and what each member of an ensemble says; `given` is of
        each member that has towers of its own."""
        found = []
        for number, (towers, pairs) in enumerate(
            zip((self.towers, *self.other_towers), given, strict=True)
        ):
            pairs = pairs if self.members is None else self.members.given(pairs)
            drawn = jax.random.fold_in(key, number) if key is not None and number else key
            x, own = jax.tree.map(
                lambda known, drawn=drawn: dropout(known, self.config.dropout, drawn),
                (pairs.x, pairs.own),
            )
            found.append(towers(pairs._replace(x=x, own=own)))
        if self.members is not None:
            found = self.members.answers(found[0])
        found = [one._replace(logits=self._cut(one.logits)) for one in found]
        return (found[0], {}) if len(found) == 1 else together(found, self.inputs.tasks)

    def _cut(self, logits: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Scores of ordinal tasks as logits, one a threshold."""
        cuts = zip(self.inputs.thresholds, self.thresholds, strict=True)
        return logits | {task: cut(logits[task]) for task, cut in cuts}

    def scale(self) -> jax.Array | float:
        """What multiplies cosines in the loss of the retrieval: 1 over the temperature."""
        declared = 1 / self.config.temperature
        return declared if self.log_scale is None else declared * jnp.exp(self.log_scale[...])

    def score_of(self, name: str, logits: jax.Array) -> jax.Array:
        """One number an example [n], of logits [n] or [n, C]; of classes the expected level."""
        if name == self.inputs.retrieval:
            return logits
        task = self.inputs.tasks[name]
        return head_of(task.kind, task.loss).score(logits, self.inputs.levels.get(name, ()))

    def in_unit(self, name: str, score: jax.Array) -> jax.Array:
        """A task's score [n] between 0 and 1, so that a mean over tasks means something.

        (1 + cosine) / 2 of the retrieval; of the others see `losses.tasks`.
        """
        if name == self.inputs.retrieval:
            return (1 + self.config.temperature * score) / 2
        task = self.inputs.tasks[name]
        return head_of(task.kind, task.loss).unit(score, self.inputs.levels.get(name, ()))


def tower_sizes(inputs: Inputs, context: int, request: int, d: int) -> TowerSizes:
    """How wide the parts of a `TowerInput` are: beside the features, user, item, their product and
    cosine, and what happened at similar events."""
    pair = (3 * d + 1) * inputs.has_items + d * inputs.has_events
    return TowerSizes(
        inputs=context + request + pair,
        context=context,
        request=request,
        width=d * inputs.has_items,
        tasks=inputs.tasks,
        features=dict.fromkeys(inputs.read, d),
        own=tuple(name for name in inputs.own if name in inputs.tasks),
    )


def _with_start(moments: Array | None) -> jax.Array | None:
    """Times [B, L] with that of the start token, which is the first event's."""
    return None if moments is None else jnp.pad(jnp.asarray(moments), ((0, 0), (1, 0)), mode="edge")


def _paired(user: jax.Array, item: jax.Array) -> list[jax.Array]:
    """A user's state and an item's vector [n, D] for towers: as they are, their product, and last
    their cosine [n, 1]."""
    d, user_unit, item_unit = user.shape[1], unit_length(user), unit_length(item)
    cosine = jnp.sum(user_unit * item_unit, axis=-1, keepdims=True)
    return [user, item_unit * d**0.5, user_unit * item_unit * d, cosine]


def _hidden_sizes(towers: nnx.Module, sizes: TowerSizes, dtype: jnp.dtype) -> dict[str, int]:
    """H of each task's hidden vectors, from an abstract pass."""
    widths = sizes.inputs, sizes.context, sizes.request, sizes.width, sizes.width
    named = sizes.features, dict.fromkeys(sizes.own, sizes.inputs)
    given: Any = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1, w), dtype), (*widths, *named))
    found = nnx.eval_shape(lambda towers, given: towers(given), towers, TowerInput(*given))
    return {task: hidden.shape[-1] for task, hidden in found.hidden.items()}
