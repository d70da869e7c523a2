"""Which table rows a batch touches, and the sampling of negatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtrec_jax.models.network import Plan, history_ids
from mtrec_jax.tables.layout import DENSE, Group, addresses
from mtrec_jax.types import FIRST, Array, Batch, Catalogue, Lookups


def find_items(
    plan: Plan, item_ids: Array, catalogue: Catalogue, role: str = "item"
) -> dict[str, dict[str, jax.Array]]:
    """Addresses of items' own rows [...] and of their features [..., M], by stack and role."""
    found: dict[str, dict[str, jax.Array]] = {}
    own = Group((plan.fields["item"],))
    local = jnp.asarray(catalogue.row)[item_ids][..., None]
    for stack, address in addresses(own, local).items():
        found.setdefault(stack, {})[role] = address[..., 0]
    if plan.item.fields:
        feature_ids = jnp.asarray(catalogue.ids)[item_ids]
        for stack, address in addresses(plan.item, feature_ids).items():
            found.setdefault(stack, {})[f"{role}_features"] = address
    return found


def find_rows(
    plan: Plan, batch: Batch, catalogue: Catalogue, negatives_wanted: int, key: jax.Array | None
) -> Lookups:
    """All rows that a batch touches; with a key, shared negatives are sampled as well.

    Where items have a dense table every item is listed once, since every row is updated anyway;
    where it is sparse, each place of the batch lists its own, so that no device needs another's.
    """
    found: dict[str, dict[str, jax.Array]] = {}
    candidate = jnp.asarray(batch.candidate)
    events = jnp.asarray(batch.events["item"]) if plan.has_events else candidate[:, :0]
    negatives = jnp.zeros((0,), jnp.int32)
    if key is not None and plan.has_items:
        negatives = sample_negatives(catalogue, negatives_wanted, key)
    item_ids = jnp.zeros((0,), jnp.int32)
    if plan.has_items:
        if plan.fields["item"].stack == DENSE:
            item_ids = jnp.arange(catalogue.row.shape[0], dtype=jnp.int32)
            found = find_items(plan, item_ids, catalogue)
        else:
            item_ids = jnp.concatenate([events, candidate], axis=1)
            found = find_items(plan, item_ids, catalogue)
            for stack, by_role in find_items(plan, negatives, catalogue, "negative").items():
                found.setdefault(stack, {}).update(by_role)
    if plan.context.fields:
        for stack, address in addresses(plan.context, jnp.asarray(batch.context["ids"])).items():
            found.setdefault(stack, {})["context"] = address
    if plan.history.fields and plan.has_events:
        for stack, address in addresses(plan.history, history_ids(plan, batch)).items():
            found.setdefault(stack, {})["history"] = address
    return Lookups(found, item_ids, negatives)


def sample_negatives(catalogue: Catalogue, count: int, key: jax.Array) -> jax.Array:
    """`count` item ids drawn with replacement from the catalogue's sampling distribution."""
    # Whole 32-bit numbers: float32 has too few levels for a catalogue of millions.
    drawn = jnp.minimum(jax.random.bits(key, (count,), jnp.uint32), jnp.uint32(2**32 - 2))
    found = jnp.searchsorted(jnp.asarray(catalogue.cumulative), drawn, side="right")
    return jnp.maximum(found, FIRST).astype(jnp.int32)
