"""Do predicted probabilities mean what they say?

Bins hold equally many rows (Nixon et al., 2019, "Measuring calibration in deep learning") rather
than equal widths, because predictions of clicks and conversions crowd near zero. Equal predictions
share a bin, so that the result depends neither on the order of the rows nor on how ties fall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped

from mtrec_jax.errors import ConfigError, DataError


class Reliability(NamedTuple):
    """One row per bin that holds examples, from the lowest predictions to the highest."""

    prediction: np.ndarray  # [bins] mean predicted probability
    label: np.ndarray  # [bins] mean label: the observed frequency
    examples: np.ndarray  # [bins] int64 how many


def reliability(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int = 15
) -> Reliability:
    """The table behind a reliability diagram: predicted against observed frequency.

    Args:
      labels: 0 or 1.
      probabilities: of label 1.
      bins: of equally many examples; fewer come back when predictions are equal.

    Raises:
      ConfigError: `bins` is below 1.
      DataError: lengths differ.

    >>> table = reliability(np.array([0, 1, 1, 1]), np.array([0.25, 0.25, 0.75, 0.75]), bins=2)
    >>> table.prediction.tolist(), table.label.tolist(), table.examples.tolist()
    ([0.25, 0.75], [0.5, 1.0], [2, 2])
    """
    bin_of = _equal_mass_bins(labels, probabilities, bins)
    count = np.bincount(bin_of, minlength=bins)
    filled = count > 0
    sums = [np.bincount(bin_of, np.asarray(x, np.float64), bins) for x in (probabilities, labels)]
    prediction, label = (total[filled] / count[filled] for total in sums)
    return Reliability(prediction, label, count[filled])


def calibration_error(
    labels: Shaped[np.ndarray, " n"],
    probabilities: Float[np.ndarray, " n"],
    bins: int = 15,
    weights: Num[np.ndarray, " n"] | None = None,
) -> float:
    """Expected calibration error: sum over bins of share x |mean prediction - mean label|.

    Naeini et al. (2015), "Obtaining well calibrated probabilities using Bayesian binning", with
    bins of equally many rows (Nixon et al., 2019). No rows, or a prediction that is not a number,
    give nan.

    Args:
      labels: 0 or 1.
      probabilities: of label 1.
      bins: of equally many rows, whatever their weights.
      weights: of the rows; None: all 1.

    Raises:
      ConfigError: `bins` is below 1.
      DataError: lengths differ.

    >>> calibration_error(np.array([0, 1, 1, 1]), np.array([0.25, 0.25, 0.75, 0.75]), bins=2)
    0.25
    """
    weights = np.ones(len(labels)) if weights is None else weights
    return calibration_statistic(labels, probabilities, bins)(weights)


def calibration_statistic(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int = 15
) -> Callable[[np.ndarray], float]:
    """`calibration_error` as a function of row weights `[n]`: bins are found once, here."""
    bin_of = _equal_mass_bins(labels, probabilities, bins)
    gap = np.asarray(probabilities, np.float64) - np.asarray(labels, np.float64)

    def value(weights: np.ndarray) -> float:
        total = float(weights.sum())
        if total <= 0:
            return float("nan")
        # share x |mean gap| = |sum of gaps| / total: the size of a bin cancels
        return float(np.abs(np.bincount(bin_of, weights * gap, bins)).sum() / total)

    return value


def _equal_mass_bins(
    labels: Shaped[np.ndarray, " n"], probabilities: Float[np.ndarray, " n"], bins: int
) -> Int[np.ndarray, " n"]:
    """Bin of each row by the middle of the ranks that its prediction occupies."""
    if bins < 1:
        raise ConfigError(f"calibration: bins must be 1 or more, not {bins}")
    if labels.shape != probabilities.shape:
        raise DataError(
            f"calibration: {len(labels)} labels and {len(probabilities)} predictions; pass one of "
            "each per example"
        )
    if not len(labels):
        return np.zeros(0, np.int64)
    ordered = np.sort(probabilities)
    first = np.searchsorted(ordered, probabilities, "left")
    last = np.searchsorted(ordered, probabilities, "right") - 1
    return (first + last) * bins // (2 * len(ordered))
