"""The comparison with tuned trees: its draws, and what a row says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import census


@pytest.mark.parametrize("library", census.RANGES)
def test_the_first_trial_has_the_defaults_and_the_others_stay_in_their_ranges(library: str) -> None:
    assert census.draw(library, 0) == {}
    drawn = [census.draw(library, number) for number in range(1, 200)]
    for name, (low, high) in census.RANGES[library].items():
        values = np.array([options[name] for options in drawn])
        assert low <= values.min() < values.max() <= high
        whole = all(isinstance(value, int) for value in (low, high))
        assert all(isinstance(options[name], int) == whole for options in drawn)
        if high > 10 * low:  # half of the draws on each side of the geometric mean
            assert abs(np.mean(values < np.sqrt(low * high)) - 0.5) < 0.15
    assert census.draw(library, 7) == census.draw(library, 7) != census.draw(library, 8)


def test_a_row_has_mean_and_deviation_over_seeds() -> None:
    """By hand: of .94, .95, .96 the mean .95 and the sample deviation .01."""
    row = census.as_row("mmoe", {("income", "validation"): [0.94, 0.95, 0.96]}, [20.0, 30.0, 40.0])
    assert row["income auc"] == pytest.approx(0.95)
    assert row["income ±"] == pytest.approx(0.01)
    assert (row["seeds"], row["seconds"]) == (3, 30.0)
