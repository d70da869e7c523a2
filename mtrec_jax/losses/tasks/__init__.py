"""Kinds of tasks, a file each: loss, prediction in the label's unit, one number to sort by.

`retrieval` has no tower and is none of them: see `losses.retrieval`.
"""

from __future__ import annotations

from mtrec_jax.losses.tasks.binary import BINARY
from mtrec_jax.losses.tasks.contract import Head, Kind, TaskField, class_levels, class_numbers
from mtrec_jax.losses.tasks.multiclass import MULTICLASS
from mtrec_jax.losses.tasks.ordinal import ORDINAL
from mtrec_jax.losses.tasks.regression import REGRESSION
from mtrec_jax.losses.tasks.watch_time import WATCH_TIME

# {tasks.NAME.kind: what it is}
KINDS: dict[str, Kind] = {
    "binary": BINARY,
    "regression": REGRESSION,
    "multiclass": MULTICLASS,
    "ordinal": ORDINAL,
    "watch_time": WATCH_TIME,
}

__all__ = [
    "KINDS",
    "Head",
    "Kind",
    "TaskField",
    "class_levels",
    "class_numbers",
    "head_of",
    "labelled",
]


def head_of(kind: str, loss: str = "") -> Head:
    """The head of a kind for a loss; for one over lists, or none that is named, its default.

    >>> head_of("ordinal").loss.__name__, head_of("ordinal", "coral").loss.__name__
    ('proportional_odds', 'coral')
    """
    heads = KINDS[kind].heads
    return heads.get(loss) or next(iter(heads.values()))


def labelled(*labels: str) -> tuple[str, ...]:
    """The kinds whose labels are "numbers", "classes" or "levels".

    >>> labelled("classes"), labelled("levels")
    (('multiclass',), ('ordinal',))
    """
    return tuple(name for name, kind in KINDS.items() if kind.labels in labels)
