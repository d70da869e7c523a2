"""Bounds of numbers that are fitted on training rows: by quantiles, or by median deviations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mtrec_jax.config import Experiment, Values
from mtrec_jax.data.dataset import Rule
from mtrec_jax.data.split import split_events
from mtrec_jax.errors import DataError

Bounds = tuple[float | None, float | None]  # lowest and highest value that stays


def bounds_rule(experiment: Experiment, name: str, low: float | None, high: float | None) -> Rule:
    """What the report says of fitted bounds."""
    rule = experiment.clean.values[name]
    limits = [f"{sign} {b:.15g}" for sign, b in ((">=", low), ("<=", high)) if b is not None]
    return Rule(rule=f"values: {name}: fitted {rule.column} {' and '.join(limits)}", rows=0)


def with_bounds(experiment: Experiment, bounds: dict[str, Bounds]) -> Experiment:
    """The experiment with fitted bounds in the place of quantiles and deviations."""
    given = {
        name: dataclasses.replace(rule, bounds="given", low=bounds[name][0], high=bounds[name][1])
        if name in bounds
        else rule
        for name, rule in experiment.clean.values.items()
    }
    return dataclasses.replace(
        experiment, clean=dataclasses.replace(experiment.clean, values=given)
    )


def fitted_bounds(experiment: Experiment, events: Any) -> dict[str, Bounds]:
    """The bounds by quantiles or MAD of the training rows, as numbers.

    The training rows are those of the split over the rows that pass the rules on single rows.
    """
    train = split_events(events, experiment).filter(lambda t: t["split"] == 0)
    bounds = {}
    for name, rule in experiment.clean.values.items():
        if rule.valid or rule.bounds == "given":
            continue
        found = train.group_by(value=train[f"value_{name}"]).agg(n=train.count()).to_pyarrow()
        found = found.filter(found["value"].is_valid()).sort_by("value")
        bounds[name] = _bounds(rule, found["value"].to_numpy(), found["n"].to_numpy(), name)
    return bounds


def _bounds(rule: Values, values: np.ndarray, counts: np.ndarray, name: str) -> Bounds:
    if not len(values):
        raise DataError(
            f"clean.values.{name}: no training value of '{rule.column}' is a number. Check the "
            "column, or remove the rule"
        )
    if rule.bounds == "quantiles":
        low, high = (
            None if share is None else _quantile(values, counts, share)
            for share in (rule.low, rule.high)
        )
        return low, high
    median = _quantile(values, counts, 0.5)
    away = np.abs(values - median)
    order = np.argsort(away, kind="stable")
    spread = rule.deviations * 1.4826 * _quantile(away[order], counts[order], 0.5)
    return median - spread, median + spread


def _quantile(values: np.ndarray, counts: np.ndarray, share: float) -> float:
    """The smallest of the sorted values that at least `share` of all rows do not exceed."""
    below = np.cumsum(counts)
    return float(values[np.searchsorted(below, share * below[-1] - 1e-9)])
