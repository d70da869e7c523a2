"""What towers are made from, what they are given, and what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax


class TowerTask(NamedTuple):
    """A task with a tower: every kind but retrieval."""

    kind: str
    outputs: int = 1  # logits an example; C for multiclass
    where: str = ""  # its sample space: the binary task that has to be 1
    loss: str = ""  # tasks.NAME.loss


class TowerSizes(NamedTuple):
    """`options.make(sizes, dtype=..., rngs=...)` gives a module `TowerInput -> TowerOutput`.

    A module may have losses of its own: `losses(logits, labels, mask) -> {task: (values [B, P],
    mask [B, P])}` with logits {task: [B, P], or [B, P, C]} of all positions of a batch, and
    `labels`, `mask` {task: [B, P]}. They stand in the place of the task's own, and their masks must
    not depend on the logits. Losses that are of no task are named in an attribute,
    `extra_losses = ("name", ...)`: they weigh 1 and are not balanced. Diagnostics [n] that `losses`
    is to have among its logits, as [B, P], are named in another one, `loss_inputs = ("name", ...)`;
    those that are a logit of a task, taught in the place of its own, also in
    `logits_of = {"name": task}`, so that `model.bias` is added to them as well.

    The logit of a task with `where` is that of its probability given `where`, whatever the losses.

    The options may have two attributes: `reads`, the names of features with an embedding that the
    module wants one by one; and `task_tables = True`, if each task is to have tables of its own
    beside the shared ones, of all features and items that towers read.
    """

    inputs: int  # I
    context: int  # F
    request: int  # R
    width: int  # D, of user and item; 0 where the data has no items
    tasks: dict[str, TowerTask]
    features: Mapping[str, int] = {}  # {feature of `reads`: D}
    own: tuple[str, ...] = ()  # with `task_tables` all tasks, else ()


class TowerInput(NamedTuple):
    """What is known of n pairs of a user and a candidate, at a moment."""

    x: jax.Array  # [n, I] all of it side by side
    context: jax.Array  # [n, F] the user's features
    request: jax.Array  # [n, R] those of the moment
    user: jax.Array  # [n, D] the encoder's state
    item: jax.Array  # [n, D] the candidate's vector
    features: Mapping[str, jax.Array] = {}  # {feature of `reads`: [n, D]}
    own: Mapping[str, jax.Array] = {}  # {task: x [n, I] of its own tables}


class TowerOutput(NamedTuple):
    """What the towers say."""

    logits: dict[str, jax.Array]  # {task: [n], or [n, C]}
    hidden: dict[str, jax.Array]  # {task: [n, H]}: for the fusion; a task may have none
    diagnostics: dict[str, jax.Array]  # gates and similar, [n, ...], for people who look inside
