"""The dense layers: inputs -> encoder -> interaction -> towers -> fusion. Tables live outside."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.config import Model as ModelConfig
from mtrec_jax.errors import ConfigError
from mtrec_jax.losses.tasks import head_of
from mtrec_jax.models.attention import LastSearch, TargetAttention
from mtrec_jax.models.encoders import EncoderSizes
from mtrec_jax.models.fusion import AttentionFusion
from mtrec_jax.models.inputs import Inputs, ItemTower, SideFeatures, clipped
from mtrec_jax.models.interactions import InteractionSizes
from mtrec_jax.models.layers import Thresholds, dropout, linear, normal, unit_length
from mtrec_jax.models.members import Members
from mtrec_jax.models.towers import TowerInput, TowerOutput, TowerSizes
from mtrec_jax.tables.layout import pool
from mtrec_jax.types import UNKNOWN, Array, Batch, Fusing, Outputs, UserStates


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
        context, numbers = self.context.outputs, sum(inputs.numbers["context"])
        self.user_numbers = made(numbers, d) if numbers and inputs.has_events else None
        self.user_context = made(context, d) if context and inputs.has_items else None
        self.search = None
        if inputs.has_events:
            self.start = nnx.Param(normal(rngs, (d,), 0.02, dtype))
            self.target_attention = TargetAttention(d, dtype=dtype, rngs=rngs)
            if "history" in inputs.layout.groups:
                self.behaviour = made(d, d)
                self.search = LastSearch(d, dtype=dtype, rngs=rngs) if searches else None
            seen = EncoderSizes(d, history_length + 1, config.dropout)
            self.encoder = config.encoder.make(seen, dtype=dtype, rngs=rngs)
        if not inputs.tasks:
            return
        sizes = tower_sizes(inputs, self.context.outputs, self.request.outputs, d)
        fields = self.context.fields + self.request.fields + 2 * inputs.has_items
        crossed = InteractionSizes(sizes.inputs, fields, d)
        self.interaction = config.interaction.make(crossed, dtype=dtype, rngs=rngs)
        sizes = sizes._replace(inputs=self.interaction.outputs)
        self.towers = config.towers.make(sizes, dtype=dtype, rngs=rngs)
        hidden = _hidden_sizes(self.towers, sizes, dtype)
        if config.members > 1 and hasattr(self.towers, "loss_inputs") and self.towers.loss_inputs:
            raise ConfigError(
                f"model.members: {config.members}, but the losses of model.towers.kind = "
                f"'{config.towers.kind}' read more than the logits that members change; set "
                "members = 1, or take other towers"
            )
        own = config.members, sizes.inputs, hidden, inputs.tasks
        self.members = Members(*own, dtype=dtype, rngs=rngs) if config.members > 1 else None
        self.thresholds = nnx.List([Thresholds(t, dtype=dtype) for t in inputs.thresholds.values()])
        if config.fusion == "attention":
            state = sizes.context + sizes.request + sizes.width
            of_task = next(iter(hidden.values()), 1)
            self.fusion = AttentionFusion(state, inputs.order, of_task, dtype=dtype, rngs=rngs)

    def users(
        self, batch: Batch, rows: Mapping[str, jax.Array], events: Array, key: jax.Array | None
    ) -> UserStates:
        """Encode context, moments and the events' item vectors [B, L, D]."""
        b, p = batch.cutoff.shape
        d, cutoff = self.config.width, jnp.asarray(batch.cutoff)
        context = self.context(batch, rows, self.dtype)
        request = self.request(batch, rows, self.dtype)
        projected = jnp.zeros((b, d), self.dtype)
        if self.user_context is not None:
            projected = self.user_context(context)
        if not self.inputs.has_events:
            none = jnp.zeros((b, 0, d), self.dtype)
            states = jnp.broadcast_to(projected[:, None], (b, p, d))
            return UserStates(states, context, request, none, none, cutoff)
        tokens, events, behaviour = self._tokens(batch, rows, jnp.asarray(events))
        start = self.start[...][None] + projected
        # (B, 1 + L, D): state s has seen s events
        hidden = self.encoder(jnp.concatenate([start[:, None], tokens], axis=1), key)
        # Whole rows are gathered, each example's from its own: none comes from another device.
        states = jax.vmap(lambda seen, cutoff: seen[cutoff])(hidden, cutoff)
        if self.search is not None:
            searched = jnp.asarray(batch.events["item"]) == UNKNOWN
            states = states + self.search(behaviour, searched, cutoff)
        if self.user_numbers is not None:  # they belong to this example's time, not to the start
            states = states + self.user_numbers(clipped(batch.context["numbers"]))[:, None]
        return UserStates(states, context, request, events, tokens, cutoff)

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
        self, states: UserStates, candidates: jax.Array | None, key: jax.Array | None
    ) -> tuple[Outputs, Fusing | None]:
        """Score candidates [B, P, D] for the states: every task's logits and the fused order; and
        what the fusion was given."""
        b, p, d = states.vectors.shape
        n = b * p
        context = jnp.broadcast_to(states.context[:, None], (b, p, states.context.shape[1]))
        context, request = context.reshape(n, -1), jnp.asarray(states.request).reshape(n, -1)
        user = item = jnp.zeros((n, 0), self.dtype)
        parts, logits = [context, request], {}
        if self.inputs.has_items and candidates is not None:
            user, item = jnp.asarray(states.vectors).reshape(n, d), candidates.reshape(n, d)
            user_unit, item_unit = unit_length(user), unit_length(item)
            cosine = jnp.sum(user_unit * item_unit, axis=-1, keepdims=True)
            parts += [user, item_unit * d**0.5, user_unit * item_unit * d, cosine]
            if self.inputs.retrieval:
                logits[self.inputs.retrieval] = cosine[:, 0] / self.config.temperature
            if self.inputs.has_events:
                past = [jnp.asarray(x) for x in (states.events, states.outcomes, states.cutoff)]
                parts.append(self.target_attention(candidates, *past).reshape(n, d))
        if not self.inputs.tasks:
            score = logits[str(self.inputs.retrieval)].reshape(b, p)
            name = str(self.inputs.retrieval)
            return Outputs({name: score}, score, jnp.ones((b, p, 1), score.dtype), {}, {}), None
        fields = [context[:, : self.context.fields * d], request[:, : self.request.fields * d]]
        fields += parts[2:4] if self.inputs.has_items else []  # the user, the candidate
        crossed = jnp.concatenate(fields, axis=-1).reshape(n, -1, d)
        x = self.interaction(jnp.concatenate(parts, axis=-1), crossed)
        found, each = self._answers(TowerInput(x, context, request, user, item), key)
        logits |= found.logits
        names = self.inputs.order
        fusing = Fusing(
            jnp.concatenate([context, request, user], axis=-1),
            {t: found.hidden[t] for t in names if t in found.hidden},
            {t: self.score_of(t, logits[t]) for t in names},
        )
        fused, weights = self.fuse(fusing)
        looks = {n: v.reshape(b, p, *v.shape[1:]) for n, v in found.diagnostics.items()}
        return Outputs(
            {t: logits[t].reshape(b, p, *logits[t].shape[1:]) for t in names},
            fused.reshape(b, p),
            weights.reshape(b, p, -1),
            looks,
            {t: v.reshape(b, p, *v.shape[1:]) for t, v in each.items()},
        ), fusing

    def _answers(
        self, given: TowerInput, key: jax.Array | None
    ) -> tuple[TowerOutput, dict[str, jax.Array]]:
        """What the towers say of n pairs, and what each member of an ensemble says."""
        rate = self.config.dropout
        if self.members is None:
            found = self.towers(given._replace(x=dropout(given.x, rate, key)))
            return found._replace(logits=self._cut(found.logits)), {}
        given = self.members.given(given)
        found = self.towers(given._replace(x=dropout(given.x, rate, key)))
        each = self._cut(self.members.logits(found))
        return self.members.together(found, each), each

    def _cut(self, logits: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Scores of ordinal tasks as logits, one a threshold."""
        cuts = zip(self.inputs.thresholds, self.thresholds, strict=True)
        return logits | {task: cut(logits[task]) for task, cut in cuts}

    def fuse(self, fusing: Fusing) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and task weights [n, T]; without fusion it is the mean of `in_unit`."""
        if self.config.fusion == "none":
            scores = [self.in_unit(task, score) for task, score in fusing.scores.items()]
            stacked = jnp.stack(scores, axis=-1)
            weights = jnp.full(stacked.shape, 1 / stacked.shape[1], stacked.dtype)
            return jnp.sum(weights * stacked, axis=-1), weights
        return self.fusion(fusing)

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
    )


def _hidden_sizes(towers: nnx.Module, sizes: TowerSizes, dtype: jnp.dtype) -> dict[str, int]:
    """H of each task's hidden vectors, from an abstract pass."""
    widths = sizes.inputs, sizes.context, sizes.request, sizes.width, sizes.width
    shapes: list[Any] = [jax.ShapeDtypeStruct((1, width), dtype) for width in widths]
    found = nnx.eval_shape(lambda towers, given: towers(given), towers, TowerInput(*shapes))
    return {task: hidden.shape[-1] for task, hidden in found.hidden.items()}
