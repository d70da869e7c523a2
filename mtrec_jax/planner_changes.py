"""What may be changed where a plan does not fit its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from mtrec_jax.config import Experiment

_MOST_DEVICES = 1 << 20  # where the search for more devices ends


def placements_of(experiment: Experiment) -> tuple[str, ...]:
    """Where its tables lie: what decides how large gradients are.

    >>> placements_of(Experiment(name="a"))
    ('sparse',)
    """
    features = (feature.placement for feature in experiment.features.values())
    return (experiment.model.item_placement, *features)


def changes(
    experiment: Experiment, devices: int, dense: bool = False
) -> Iterator[tuple[str, Experiment, int]]:
    """From cheap to dear: (overrides in words, experiment, devices).

    Args:
      experiment: what does not fit.
      devices: how many there are.
      dense: its dense tables are worth to be made sparse.

    >>> from mtrec_jax.config import Experiment
    >>> next(changes(Experiment(name="a"), 8))[::2]
    ('', 8)
    """
    variants = list(_variants(experiment))
    variants = variants if dense else variants[:4]
    for words, changed in variants:
        yield words, changed, devices
    count = 2 * devices
    while count <= _MOST_DEVICES:
        if experiment.train.batch_size % (count * experiment.train.accumulate) == 0:
            for words, changed in variants[::3]:  # as it is, with all of a table's savings, sparse
                yield f"{count} devices with {words}", changed, count
        count *= 2


def _variants(experiment: Experiment) -> Iterator[tuple[str, Experiment]]:
    """From cheap to dear: (overrides in words, experiment)."""
    low, rule = "train.row_precision=bfloat16 ", "train.row_optimizer=rowwise_adagrad "
    coarse: dict[str, Any] = {"row_precision": "bfloat16"}
    small: dict[str, Any] = {"row_optimizer": "rowwise_adagrad", "row_optimizers": {}}
    sparse = dataclasses.replace(
        experiment,
        features={
            name: dataclasses.replace(feature, placement="sparse")
            for name, feature in experiment.features.items()
        },
        model=dataclasses.replace(experiment.model, item_placement="sparse"),
    )
    placed = "model.item_placement=sparse and placement=sparse of the features, "
    yield "", experiment
    yield low, _training(experiment, **coarse)
    yield rule, _training(experiment, **small)
    yield low + rule, _training(experiment, **coarse, **small)
    yield placed, sparse
    yield placed + low, _training(sparse, **coarse)
    yield placed + low + rule, _training(sparse, **coarse, **small)


def _training(experiment: Experiment, **keys: Any) -> Experiment:
    return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, **keys))
