"""The pytrees that travel between data, model, training and evaluation.

Axes, everywhere in this package: B examples, P positions, L history, M ids in a bag, C numbers or
classes, D width, E experts, T tasks, H hidden, V table rows, N catalogue items, Q queries,
K results, S text tokens.

The containers are not annotated with shapes (annotated pytrees break under `jax.vmap` and
`jax.eval_shape`); functions check shapes at their boundaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any

PAD, UNKNOWN, FIRST = 0, 1, 2  # ids: 0 is padding, 1 is unknown, real ids start at 2


class Lists:
    """Variable-length integer lists in one flat array: `lists[i]` is a view."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | np.integer) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class Batch(NamedTuple):
    """One batch of examples. Absent parts are left out; shapes never change within a run.

    Ids and numbers stand slot by slot in the order of the manifest's fields of that role.
    """

    context: Mapping[str, Array]  # {"ids": [B, M] int32, "numbers": [B, C]}: the user
    request: Mapping[str, Array]  # {"ids": [B, P, M], "numbers": [B, P, C]}: each position's moment
    events: Mapping[str, Array]  # {"item": [B, L], "ids": [B, L, M]}: the past in time order
    cutoff: Array  # [B, P] int32: position p may see events[:, :cutoff]
    candidate: Array  # [B, P] int32: the item at position p, 0 for none
    labels: Mapping[str, Array]  # {task: [B, P]}, 0 where masked
    mask: Mapping[str, Array]  # {task: [B, P]} 1 where the label exists and is in the sample space
    user: Array  # [B] int32
    weight: Array  # [B, P] 0 on padding
    row: Array | None  # [B, P] int64 source row, -1 on padding; None on devices
    weights: Mapping[str, Array] = {}  # {task: [B, P]} of examples in its loss; 1 of other tasks


class Catalogue(NamedTuple):
    """What is known of every item, by item id; rows 0 (padding) and 1 (unknown) are zero."""

    ids: Array  # [N + 2, M] int32 local ids of the item features
    numbers: Array  # [N + 2, C]
    row: Array  # [N + 2] int32: the item's own row in its table; unknown for untrained items
    cumulative: Array  # [N + 2] uint32: distribution function of the negatives, times 2^32
    log_probability: Array  # [N + 2]: log of the sampling probability, -inf where never sampled


class Wanted(NamedTuple):
    """What a batch looks up, before any row is fetched."""

    ids: dict[str, jax.Array]  # {group of tables: ids [..., M]}
    items: jax.Array  # item ids: [N + 2] of all, or where their table is sparse [B, L + P]
    negatives: jax.Array  # [n] item ids of the negatives that all positions share
    log_expected: jax.Array  # [n]: log of how often each is expected among them
    drawing: PyTree  # what the way to draw them remembers after it


class Shared(NamedTuple):
    """The shared representation: what the encoders hand to the towers and to the retrieval loss.

    Balancing methods that need a gradient of each task by itself take it here.
    """

    users: jax.Array  # [B, P, K * D]: interests, compared with item vectors by cosine
    context: jax.Array  # [B, F], those of the shared tables, then those of each task's own
    request: jax.Array  # [B, P, R], likewise
    events: jax.Array  # [B, L, D]
    outcomes: jax.Array  # [B, L, D]
    candidates: jax.Array  # [B, P, W]; [B, 0, D] where the data has no items
    negatives: jax.Array  # [n, W]: D that retrieval compares, and what towers alone read
    bias: jax.Array  # [B, P, F]: of each position's moment, for the bias tower alone


class UserStates(NamedTuple):
    """What the encoder knows about the user at each position."""

    vectors: Array  # [B, P, K * D]: K interests, the best of which is compared with an item
    context: Array  # [B, F]: the user's features, for the ranking towers, as in `Shared`
    request: Array  # [B, P, R]: those of the moment
    events: Array  # [B, L, D]: item vectors of the past, which candidates are compared with
    outcomes: Array  # [B, L, D]: what happened at each event
    cutoff: Array  # [B, P]: position p may see the first cutoff events


class Fusing(NamedTuple):
    """What the fusion is given, of n pairs."""

    state: jax.Array  # [n, S] the user, the moment
    hidden: dict[str, jax.Array]  # {task: [n, H]} of the towers
    scores: dict[str, jax.Array]  # {task: [n]} calibrated logits, of classes the expected level
    units: dict[str, jax.Array]  # {task: [n]} the same between 0 and 1, see `Network.in_unit`


class Outputs(NamedTuple):
    """What the towers say about each candidate."""

    logits: dict[str, jax.Array]  # {task: [B, P]}, or [B, P, C] for multiclass
    fused: jax.Array  # [B, P]: the final order, larger is better
    fusion: jax.Array  # [B, P, T] weights of the tasks in it, rows sum to 1
    diagnostics: dict[str, jax.Array]  # gates and similar [B, P, ...], of K members [B, P, K, ...]
    members: dict[str, jax.Array]  # {task: [B, P, K], or [B, P, K, C]} logits; {}: there are none


class TrainState(NamedTuple):
    """Everything that a step reads and replaces; all of it is in a checkpoint."""

    params: PyTree  # dense parameters
    tables: dict[str, jax.Array]  # {stack: [V, D]} row-wise updated tables
    slots: dict[str, PyTree]  # {stack: optimizer slots of the rows}
    scratch: dict[str, jax.Array]  # {stack: [V] int32} work space of the exact dedup
    optimizer: PyTree  # optax state of the dense parameters
    balance: PyTree  # task balancing state
    drawing: PyTree  # what the way to draw negatives remembers
    key: jax.Array  # PRNG key of the run
    step: jax.Array  # [] int32
    sums: dict[str, jax.Array]  # {task: [2]} loss numerator and weight since the last record
    rounds: jax.Array  # [] int32: of the slowest exchange of rows since the last record
    bad: jax.Array  # [2] int32: steps left out as something was not finite; the first or last
