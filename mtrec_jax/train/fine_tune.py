"""A BERT whose vectors of items learn from events who follows whom, with a rate of its own."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtrec_jax.arguments import a_path, a_whole_number, argument, shown
from mtrec_jax.data.clean import appears_whole, check_own, put_in_place
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.features.text import joined
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.models.text.bert import (
    TUNED_ON,
    Bert,
    BertSizes,
    encode_packed,
    load_bert,
    save_bert,
    weights_digest,
)
from mtrec_jax.models.text.vectors import ROW, SHORTEST, packed, side_by_side, text_vectors
from mtrec_jax.types import FIRST, PyTree

TEMPERATURE = 0.05  # of the cosine, as sentence models are trained
CHOICES = 64  # texts among which that of a held-out pair is looked for
_HELD = 64 * CHOICES  # held-out pairs at most
_WARM, _DECAY, _NORM = 0.1, 0.01, 1.0  # share of the steps, weight decay, the longest gradient


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """What `fine_tune` has made."""

    folder: Path  # of the weights: the `encoder` of a feature kind = "text"
    pairs: int  # of items that follow each other in training
    before: float | None  # of held-out pairs: how often the text that follows is the nearest of 64
    after: float | None  # the same with the new weights; None: no events are held out


class _Pairs(NamedTuple):
    """Items that follow each other, by their rows in the table of items."""

    first: np.ndarray  # [n]
    second: np.ndarray  # [n]

    def take(self, chosen: np.ndarray) -> _Pairs:
        return _Pairs(self.first[chosen], self.second[chosen])


def fine_tune(
    prepared: Prepared,
    weights: str | Path,
    out: str | Path,
    *,
    column: str = "title",
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 2e-5,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> FineTuned:
    """Train the weights of a BERT further, so that texts of items that follow each other in users'
    training events lie close together, and write them as a folder of weights.

    A batch has B pairs of items; each text has to be nearer to that of its pair than to those of
    the other B - 1, in both directions (in-batch softmax with logQ correction, as in the two-tower
    model of Yi et al., RecSys 2019). Events that the split holds back are not read, except to say
    what was gained: pairs of a user's last training event and the validation event behind it.

    Args:
      prepared: with users, items and their texts.
      weights: a folder, as `load_bert` takes it.
      out: the folder to write; an older one of this function is replaced.
      column: "title", or the name of a feature kind = "text".
      steps: of AdamW, a tenth of them to warm up, then falling linearly to 0.
      batch_size: B, at least 2.
      learning_rate: the highest.
      seed: of the order of pairs.
      progress: called with (step, loss).

    Raises:
      ConfigError: a number is out of its bounds, or the libraries of `[text]` are not installed.
      DataError: there are no texts or no pairs, weights cannot be read or `out` not be written.
    """
    out = a_path("out", out)
    a_whole_number("steps", steps, 1, 10**7, "10,000,000", ConfigError)
    a_whole_number("batch_size", batch_size, 2, 1 << 16, "65,536", ConfigError)
    if not 0 < learning_rate < 1:
        raise ConfigError(f"{argument('learning_rate')} {shown(learning_rate)}: between 0 and 1")
    check_own(out, TUNED_ON, "a folder of fine-tuned weights")
    bert, texts = load_bert(weights), _texts(prepared, column)
    there = np.array([bool(text) for text in texts])
    pairs, held = (_pairs(prepared, split, there) for split in (0, 1))
    if len(pairs.first) < batch_size:
        raise DataError(
            f"{prepared.folder}: {len(pairs.first)} pairs of items with texts follow each "
            f"other in training, fewer than the {batch_size} of a batch; set "
            f"{argument('batch_size')}, or take weights as they are"
        )
    chosen = np.random.default_rng(seed).permutation(len(held.first))[:_HELD]
    held = held.take(np.sort(chosen[: len(chosen) // CHOICES * CHOICES]))
    before = _nearest(bert, texts, held)
    params = _trained(bert, texts, pairs, steps, batch_size, learning_rate, seed, progress)
    tuned = bert._replace(params=params)
    after = _nearest(tuned, texts, held)
    with appears_whole(out) as partial:
        save_bert(tuned, weights, partial)
        manifest = prepared.manifest
        note = {
            "event_files": manifest.event_files,
            "split": manifest.split.fingerprint,
            "split_kind": manifest.split.kind,
            "prepared": manifest.fingerprint,
            "weights": weights_digest(weights),
            "column": column,
            "settings": [steps, batch_size, learning_rate, seed],
        }
        (partial / TUNED_ON).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        put_in_place(partial, out)
    return FineTuned(folder=out, pairs=len(pairs.first), before=before, after=after)


def _texts(prepared: Prepared, column: str) -> list[str]:
    """The text of each item, "" where there is none."""
    known = {
        name.removeprefix("text_"): name
        for name in prepared.items.column_names
        if name == "title" or name.startswith("text_")
    }
    if column not in known:
        raise DataError(
            f"{argument('column')} {shown(column)}: {prepared.folder} has no such texts of items; "
            f"it has {', '.join(known) or 'none'}. Declare them: features.{column} = "
            '{ on = "item", kind = "text" }, and prepare anew'
        )
    texts = [joined(cell) for cell in prepared.items[known[column]].to_pylist()]
    if not any(texts):
        raise DataError(f"{prepared.folder}: no item has a text in '{column}'")
    return texts


def _pairs(prepared: Prepared, split: int, there: np.ndarray) -> _Pairs:
    """The item of each training event with that of the user's next event, if it is of `split`."""
    if "event_item" not in prepared.users.column_names:
        raise DataError(f"{prepared.folder} has no events of users, from which texts could learn")
    items, splits = prepared.user_lists("event_item"), prepared.user_lists("split").values
    user = np.repeat(np.arange(len(items)), np.diff(items.offsets))
    row = items.values.astype(np.int64) - FIRST
    known = (row >= 0) & there[np.maximum(row, 0)]
    follows = (user[1:] == user[:-1]) & (splits[:-1] == 0) & (splits[1:] == split)
    follows &= known[1:] & known[:-1] & (row[1:] != row[:-1])
    return _Pairs(row[:-1][follows], row[1:][follows])


def _nearest(bert: Bert, texts: list[str], held: _Pairs) -> float | None:
    """The share of pairs whose second text is nearer to the first than those of the 63 others,
    but for the same two items once more."""
    if not len(held.first):
        return None
    used, place = np.unique(np.concatenate(held), return_inverse=True)
    vectors = text_vectors([texts[row] for row in used], bert)
    a, b = (of.reshape(-1, CHOICES) for of in np.split(place, 2))
    scores = np.einsum("gid,gjd->gij", vectors[a], vectors[b])
    own = np.einsum("gii->gi", scores)[:, :, None]
    no_rival = (b[:, :, None] == b[:, None]) | (a[:, :, None] == b[:, None])
    return float(np.mean(np.all((scores < own) | no_rival, axis=2)))


class _Batch(NamedTuple):
    """The texts of B pairs: those of their first items, then those of their second ones."""

    ids: np.ndarray  # [R, S] tokens, several texts a row
    owner: np.ndarray  # [R, S] as `encode_packed` takes it
    at: np.ndarray  # [2 B] number of each text among the K of each row, row by row
    rows: np.ndarray  # [2 B] items
    log_q: np.ndarray  # [2 B] log of the share of such items in this place of a pair


def _trained(
    bert: Bert,
    texts: list[str],
    pairs: _Pairs,
    steps: int,
    size: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int, float], None] | None,
) -> PyTree:
    """The parameters after the steps."""
    tokens = bert.tokens(texts)
    shares = [np.bincount(of, minlength=len(texts)) / len(of) for of in pairs]
    warm = math.ceil(_WARM * steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(learning_rate / warm, learning_rate, warm),
            optax.linear_schedule(learning_rate, 0, max(1, steps - warm)),
        ],
        [warm],
    )
    rule = optax.chain(
        optax.clip_by_global_norm(_NORM), optax.adamw(rate, b2=0.98, weight_decay=_DECAY)
    )
    step = jax.jit(
        functools.partial(_step, rule=rule),
        static_argnames=("sizes", "each"),
        donate_argnums=(0, 1),
    )
    params = jax.tree.map(jnp.copy, bert.params)
    state = rule.init(params)
    for number in range(1, steps + 1):
        drawn = np.random.default_rng((seed, number)).integers(len(pairs.first), size=size)
        batch, each = _batch(tokens, pairs.take(drawn), shares)
        params, state, loss = step(params, state, batch, sizes=bert.sizes, each=each)
        if progress is not None:
            progress(number, float(loss))
    return params


def _batch(tokens: list[np.ndarray], pairs: _Pairs, shares: list[np.ndarray]) -> tuple[_Batch, int]:
    """The pairs' texts side by side in rows, and the most texts of a row."""
    rows = np.concatenate(pairs)
    texts = [tokens[row] for row in rows]
    lengths = np.array([len(of) for of in texts])
    size = ROW
    while size < lengths.max():
        size *= 2
    found = packed(lengths, np.arange(len(texts)), size)
    count = -(-len(found) // 4) * 4  # so that few programs are compiled
    ids, owner = side_by_side(texts, found, count, size)
    each, at = size // SHORTEST, np.zeros(len(texts), np.int32)
    for r, row in enumerate(found):
        at[row] = r * each + np.arange(len(row))
    log_q = np.concatenate([np.log(of[row]) for of, row in zip(shares, pairs, strict=True)])
    return _Batch(ids, owner, at, rows.astype(np.int32), log_q.astype(np.float32)), each


def _step(
    params: PyTree,
    state: optax.OptState,
    batch: _Batch,
    *,
    rule: optax.GradientTransformation,
    sizes: BertSizes,
    each: int,
) -> tuple[PyTree, optax.OptState, jax.Array]:
    """One step: new parameters, new state of the optimizer, loss."""

    def loss_of(params: PyTree) -> jax.Array:
        ids, owner = jnp.asarray(batch.ids), jnp.asarray(batch.owner)
        vectors = encode_packed(params, ids, owner, sizes, each).reshape(-1, sizes.width)
        return _loss(vectors[batch.at], jnp.asarray(batch.rows), jnp.asarray(batch.log_q))

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, state = rule.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def _loss(vectors: jax.Array, rows: jax.Array, log_q: jax.Array) -> jax.Array:
    """The mean cross-entropy of B pairs [2 B, D], in both directions."""
    first, second = jnp.split(vectors, 2)
    cosines, items, shares = first @ second.T / TEMPERATURE, jnp.split(rows, 2), jnp.split(log_q, 2)
    losses = []
    for scores, asked, found in ((cosines, 0, 1), (cosines.T, 1, 0)):
        a, b = items[asked], items[found]
        same = (b[:, None] == b[None]) | (a[:, None] == b[None])  # no rivals: the two once more
        scores = jnp.where(
            same & ~jnp.eye(len(a), dtype=bool), -jnp.inf, scores - shares[found][None]
        )
        losses.append(jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores))
    return jnp.mean(jnp.concatenate(losses))
