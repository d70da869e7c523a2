"""Which events train, which choose, which judge: Ibis expressions in integer arithmetic."""

from __future__ import annotations

from typing import Any

import ibis
import numpy as np

from mtrec_jax.config import Experiment, Split
from mtrec_jax.data.examples import MODULUS, mix


def split_events(events: Any, experiment: Experiment) -> Any:
    """Events with their `split` (0 train, 1 validation, 2 test) in the place of their `part`.

    Args:
      events: Ibis table with row, part (1: of the test files) and, by kind, user and time.
      experiment: its `split` says how.
    """
    split = experiment.split
    if split.kind == "leave_one_out":
        one_user = ibis.window(group_by="user")
        ordered = ibis.window(group_by="user", order_by=["time", "row"])
        events = events.mutate(
            nth=ibis.row_number().over(ordered), size=events.count().over(one_user)
        )
        enough, after = events["size"] >= 3, events["size"] - 1 - events["nth"]
        test, validation = enough & (after == 0), enough & (after == 1)
    elif split.kind == "time":
        validation, test = (_since(events.time, border) for border in _borders(events, split))
    else:
        chance = mix(events.row, split.seed)
        test_share = split.test if split.kind == "random" else 0.0
        test = (events.part == 1) | (chance < round(test_share * MODULUS))
        validation = chance < round((test_share + split.validation) * MODULUS)
    chosen = ibis.cases((test, 2), (validation, 1), else_=0).cast("int8")
    return events.mutate(split=chosen).drop("part", *{"nth", "size"}.intersection(events.columns))


def _borders(events: Any, split: Split) -> list[float]:
    """The first timestamps of validation and of test: as close to the fractions as ties allow."""
    times = events.group_by("time").agg(n=events.count()).order_by("time").to_pyarrow()
    before = np.concatenate([[0], np.cumsum(times["n"].to_numpy())])
    values = np.append(times["time"].to_numpy(), np.inf)
    shares = (1 - split.validation - split.test, 1 - split.test)
    return [float(values[np.abs(before - share * before[-1]).argmin()]) for share in shares]


def _since(time: Any, border: float) -> Any:
    return time >= border if np.isfinite(border) else ibis.literal(False)
