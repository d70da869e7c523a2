"""Sizes of a model and its dense layers; the tables live outside."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import IdField, Manifest
from mtrec_jax.errors import ConfigError
from mtrec_jax.models.encoders.transformer import LastSearch, TargetAttention, Transformer
from mtrec_jax.models.fusion import AttentionFusion
from mtrec_jax.models.layers import MLP, dropout, unit_length
from mtrec_jax.models.towers.towers import PLE, MMoE, SharedBottom
from mtrec_jax.tables.layout import DENSE, Field, Group, layout, pool
from mtrec_jax.types import FIRST, UNKNOWN, Array, Batch, Outputs, UserStates


class Plan(NamedTuple):
    """Sizes and places that follow from the configuration and the manifest."""

    fields: dict[str, Field]
    rows: dict[str, int]  # {stack: V}
    context: Group
    item: Group
    history: Group
    history_columns: tuple[str, ...]  # names of its slots among the events
    task_names: tuple[str, ...]
    tower_tasks: tuple[str, ...]  # tasks with a tower: all but retrieval
    classes: dict[str, int]  # {multiclass task: C}
    has_items: bool
    has_events: bool


def make_plan(experiment: Experiment, manifest: Manifest) -> Plan:
    """Lay out the tables and collect the sizes of a model."""
    has_items = manifest.items > 0
    owners = []
    if has_items:
        stack = _stack(experiment, "item", experiment.model.item_placement)
        owners.append(("item", stack, _item_rows(experiment, manifest), 1))
    roles: dict[str, tuple[IdField, ...]] = {
        "context": manifest.context_ids,
        "item": manifest.item_ids,
        "history": manifest.history,
    }
    for role, declared in roles.items():
        for f in declared:
            stack = _stack(experiment, f.name, f.placement)
            owners.append((f"{role}.{f.name}", stack, f.rows, f.slots))
    by_row = {owner.split(".", 1)[-1] for owner, stack, _, _ in owners if stack != DENSE}
    if unknown := set(experiment.train.row_optimizers) - by_row:
        raise ConfigError(
            f"train.row_optimizers.{min(unknown)}: no table of this name is updated row by row; "
            f"there are {', '.join(sorted(by_row)) or 'none: set placement = sparse'}"
        )
    fields, rows = layout(owners)
    for role, declared in roles.items():
        for f in declared:
            owner = f"{role}.{f.name}"
            fields[owner] = replace(fields[owner], functions=f.hash_functions)
    group = {
        role: Group(tuple(fields[f"{role}.{f.name}"] for f in declared))
        for role, declared in roles.items()
    }
    tasks = experiment.tasks
    return Plan(
        fields=fields,
        rows=rows,
        context=group["context"],
        item=group["item"],
        history=group["history"],
        history_columns=tuple(column for f in manifest.history for column in f.columns),
        task_names=tuple(tasks),
        tower_tasks=tuple(n for n, t in tasks.items() if t.kind != "retrieval"),
        classes={
            n: len(manifest.tasks[n].classes) for n, t in tasks.items() if t.kind == "multiclass"
        },
        has_items=has_items,
        has_events=experiment.model.encoder != "none",
    )


def _item_rows(experiment: Experiment, manifest: Manifest) -> int:
    """Rows of the items' own table; `ConfigError` where there are more than its capacity."""
    values = manifest.item_values or manifest.trained_items
    capacity = experiment.model.item_capacity
    if capacity and values > capacity:
        raise ConfigError(
            f"item: {values:,} items have a row of their own, more than model.item_capacity = "
            f"{capacity:,}. Raise it; rows of an earlier run are then carried over by "
            "mtrec train --init-from"
        )
    return FIRST + max(values, capacity)


def _stack(experiment: Experiment, name: str, placement: str) -> str:
    config = experiment.train
    return DENSE if placement == DENSE else config.row_optimizers.get(name, config.row_optimizer)


def history_ids(plan: Plan, batch: Batch) -> jax.Array:
    """Ids of the history features, slot by slot, side by side: [B, L, M]."""
    return jnp.stack([jnp.asarray(batch.events[name]) for name in plan.history_columns], axis=-1)


class Network(nnx.Module):
    """The dense layers; tables live outside."""

    def __init__(
        self, experiment: Experiment, manifest: Manifest, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        config, plan = experiment.model, make_plan(experiment, manifest)
        d = config.width
        self.config, self.plan = config, plan
        self.kinds = {name: task.kind for name, task in experiment.tasks.items()}
        context = len(plan.context.fields) * d + sum(f.slots for f in manifest.context_numbers)
        item = len(plan.item.fields) * d + sum(f.slots for f in manifest.item_numbers)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.item_features = linear(item, d) if item else None
        numbers = sum(f.slots for f in manifest.context_numbers)
        self.user_numbers = linear(numbers, d) if numbers and plan.has_events else None
        searches = experiment.data.queries is not None and plan.has_events and plan.history.fields
        self.search = LastSearch(d, dtype=dtype, rngs=rngs) if searches else None
        self.user_context = linear(context, d) if context and plan.has_items else None
        if plan.has_events:
            self.start = nnx.Param(0.02 * jax.random.normal(rngs.params(), (d,), dtype))
            self.target_attention = TargetAttention(d, dtype=dtype, rngs=rngs)
            if plan.history.fields:
                self.behaviour = linear(d, d)
            self.transformer = Transformer(
                d,
                config.layers,
                config.heads,
                experiment.data.history_length + 1,
                config.dropout,
                dtype=dtype,
                rngs=rngs,
            )
        embedded = len(plan.context.fields) * d
        self.context_norm = (
            nnx.LayerNorm(embedded, dtype=dtype, param_dtype=dtype, rngs=rngs) if embedded else None
        )
        inputs = context + (3 * d + 1 if plan.has_items else 0) + (d if plan.has_events else 0)
        self._make_towers(inputs, context, dtype=dtype, rngs=rngs)

    def _make_towers(self, inputs: int, context: int, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        config, count = self.config, len(self.plan.tower_tasks)
        if not count:
            return
        hidden = config.expert_hidden
        if config.towers == "shared_bottom":
            self.experts: nnx.Module = SharedBottom(inputs, count, hidden, dtype=dtype, rngs=rngs)
        elif config.towers == "mmoe":
            self.experts = MMoE(inputs, count, config.experts, hidden, dtype=dtype, rngs=rngs)
        else:
            self.experts = PLE(
                inputs, count, config.experts, config.task_experts, hidden, dtype=dtype, rngs=rngs
            )
        outputs = [self.plan.classes.get(name, 1) for name in self.plan.tower_tasks]
        self.towers = nnx.List(
            [MLP(hidden[-1], config.tower_hidden, dtype=dtype, rngs=rngs) for _ in range(count)]
        )
        last = config.tower_hidden[-1] if config.tower_hidden else hidden[-1]
        self.heads = nnx.List(
            [nnx.Linear(last, o, dtype=dtype, param_dtype=dtype, rngs=rngs) for o in outputs]
        )
        if config.fusion == "attention":
            state = (config.width if self.plan.has_items else 0) + context
            self.fusion = AttentionFusion(
                state, len(self.plan.task_names), last, dtype=dtype, rngs=rngs
            )

    def item_vectors(
        self, own: jax.Array, feature_rows: dict[str, jax.Array], ids: jax.Array, numbers: jax.Array
    ) -> jax.Array:
        """Own rows [..., D] and features -> item vectors [..., D]."""
        if self.item_features is None:
            return own
        parts = [numbers.astype(own.dtype)]
        if self.plan.item.fields:
            pooled = pool(self.plan.item, ids, feature_rows)
            features = pooled.shape[-2] * pooled.shape[-1]  # there may be no items
            parts.append(pooled.reshape(*own.shape[:-1], features))
        return self.config.item_id_scale * own + self.item_features(jnp.concatenate(parts, axis=-1))

    def context_vector(self, batch: Batch, rows: dict[str, jax.Array]) -> jax.Array | None:
        """Context features side by side: [B, F]; None when there are none.

        Embeddings are normalised together. Numbers are standardised already and say something by
        their size, so they stay outside, cut off at five standard deviations.
        """
        parts = []
        if self.context_norm is not None:
            pooled = pool(self.plan.context, jnp.asarray(batch.context["ids"]), rows)
            parts.append(self.context_norm(pooled.reshape(pooled.shape[0], -1)))
        if "numbers" in batch.context:
            parts.append(self._numbers(batch))
        return jnp.concatenate(parts, axis=-1) if parts else None

    def user_states(
        self,
        batch: Batch,
        rows: dict[str, dict[str, jax.Array]],
        events: Array,
        key: jax.Array | None,
    ) -> UserStates:
        """Encode context and the events' item vectors [B, L, D]: vectors [B, P, D] at each
        position, context [B, F]."""
        b, p = batch.cutoff.shape
        context = self.context_vector(batch, rows.get("context", {}))
        projected = None
        if context is not None and self.user_context is not None:
            projected = self.user_context(context)
        if context is None:
            context = jnp.zeros((b, 0), events.dtype)
        if not self.plan.has_events:
            states = jnp.zeros((b, self.config.width), events.dtype)
            states = states if projected is None else projected
            none = jnp.zeros((b, 0, self.config.width), events.dtype)
            states = jnp.broadcast_to(states[:, None], (b, p, states.shape[1]))
            return UserStates(states, context, none, none, jnp.asarray(batch.cutoff))
        tokens = events = jnp.asarray(events)
        if self.plan.history.fields:
            ids = history_ids(self.plan, batch)
            behaviour = pool(self.plan.history, ids, rows["history"]).sum(axis=-2)
            if self.search is not None:  # it is of no item, and stands where its words are
                searched = jnp.asarray(batch.events["item"]) == UNKNOWN
                tokens = events = jnp.where(searched[..., None], behaviour, events)
            # What happened must multiply what it happened to: a sum of "clicked" and "books" says
            # nothing of whether books were clicked.
            tokens = tokens * (1 + self.behaviour(behaviour * self.config.width**0.5)) + behaviour
        tokens = jnp.where((jnp.asarray(batch.events["item"]) > 0)[..., None], tokens, 0)
        tokens = tokens * self.config.width**0.5
        start = jnp.broadcast_to(self.start[...][None], (b, self.config.width))
        start = start if projected is None else start + projected
        # (B, 1 + L, D): state s has seen s events
        hidden = self.transformer(jnp.concatenate([start[:, None], tokens], axis=1), key)
        # Whole rows are gathered, each example's from its own: none comes from another device.
        states = jax.vmap(lambda seen, cutoff: seen[cutoff])(hidden, jnp.asarray(batch.cutoff))
        if self.search is not None:
            states = states + self.search(behaviour, searched, jnp.asarray(batch.cutoff))
        if self.user_numbers is not None:  # they belong to this example's time, not to the start
            states = states + self.user_numbers(self._numbers(batch))[:, None]
        return UserStates(states, context, events, tokens, jnp.asarray(batch.cutoff))

    def _numbers(self, batch: Batch) -> jax.Array:
        return jnp.clip(jnp.asarray(batch.context["numbers"]), -5, 5)

    def outputs(
        self, states: UserStates, candidates: jax.Array | None, key: jax.Array | None
    ) -> Outputs:
        """Score candidates [B, P, D] for the states: every task's logits and the fused order."""
        b, p, d = states.vectors.shape
        n = b * p
        context = jnp.broadcast_to(states.context[:, None], (b, p, states.context.shape[1]))
        parts, logits = [context.reshape(n, -1)], {}
        if self.plan.has_items and candidates is not None:
            user = jnp.asarray(states.vectors).reshape(n, d)
            item = candidates.reshape(n, d)
            user_unit, item_unit = unit_length(user), unit_length(item)
            cosine = jnp.sum(user_unit * item_unit, axis=-1, keepdims=True)
            parts += [user, item_unit * d**0.5, user_unit * item_unit * d, cosine]
            for name, kind in self.kinds.items():
                if kind == "retrieval":
                    logits[name] = (cosine / self.config.temperature).reshape(b, p)
            if self.plan.has_events:
                past = [jnp.asarray(x) for x in (states.events, states.outcomes, states.cutoff)]
                parts.append(self.target_attention(candidates, *past).reshape(n, d))
        x = jnp.concatenate(parts, axis=-1)
        if not self.plan.tower_tasks:
            score = logits[self.plan.task_names[0]]
            return Outputs(logits, score, jnp.ones((b, p, 1), score.dtype), {})
        mixed, gates = self.experts(dropout(x, self.config.dropout, key))
        hidden = {}
        for t, name in enumerate(self.plan.tower_tasks):
            hidden[name] = self.towers[t](mixed[t])
            out = self.heads[t](hidden[name])
            logits[name] = out.reshape(b, p, -1) if name in self.plan.classes else out.reshape(b, p)
        attended = jnp.concatenate(parts[:2] if self.plan.has_items else parts[:1], axis=-1)
        fused, weights = self._fuse(attended, hidden, logits)
        return Outputs(logits, fused.reshape(b, p), weights.reshape(b, p, -1), gates)

    def _fuse(
        self, state: jax.Array, hidden: dict[str, jax.Array], logits: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Fused score [n] and task weights [n, T]; without fusion the tasks weigh the same."""
        scores = []
        for name in self.plan.task_names:
            score = logits[name]
            if name in self.plan.classes:  # the expected class
                score = jax.nn.softmax(score) @ jnp.arange(score.shape[-1], dtype=score.dtype)
            scores.append(score.reshape(-1))
        if self.config.fusion == "none":
            stacked = jnp.stack(scores, axis=-1)
            weights = jnp.full(stacked.shape, 1 / stacked.shape[1], stacked.dtype)
            return jnp.sum(weights * stacked, axis=-1), weights
        return self.fusion(state, [hidden.get(name) for name in self.plan.task_names], scores)
