"""Calibration: what turns a task's logits into probabilities that come true as often as they say.

Fitted in NumPy on the labels of validation, applied in NumPy or JAX, stored with the run. A
calibration never turns an order: it only says what the scores are worth beside those of other
tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

_STEPS = 50  # of Newton's method, which takes about 8


class Scaling(NamedTuple):
    """logit -> gain * logit + bias: Platt scaling; with bias 0 a temperature of 1 / gain."""

    gain: Any  # above 0
    bias: Any = 0.0


class Isotonic(NamedTuple):
    """logit -> the straight line between knots, beyond them the first and the last one."""

    x: Any  # [K] rising logits
    y: Any  # [K] rising logits


Calibration = Scaling | Isotonic


def apply(calibration: Calibration | None, logits: Any, xp: Any = np) -> Any:
    """Calibrated logits in the shape of `logits`; None leaves them as they are.

    >>> float(apply(Scaling(0.5, 1.0), np.array(4.0)))
    3.0
    >>> line = Isotonic(np.array([0.0, 1.0]), np.array([-1.0, 1.0]))
    >>> apply(line, np.array([-9, 0.5, 9])).tolist()
    [-1.0, 0.0, 1.0]
    """
    if calibration is None:
        return logits
    if isinstance(calibration, Isotonic):
        return xp.interp(logits, calibration.x, calibration.y)
    return calibration.gain * logits + calibration.bias


def fit_binary(
    kind: str, logits: Float[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"]
) -> Calibration | None:
    """The calibration of a binary task's logits; None where there are not both labels.

    Args:
      kind: "platt", "temperature" or "isotonic".
      logits: of the examples that have a label.
      labels: 0 or 1.
    """
    positive = labels == 1
    if not positive.any() or positive.all():
        return None
    x = logits.astype(np.float64)
    if kind == "isotonic":
        return isotonic(x, positive.astype(np.float64))
    if kind == "temperature":
        (gain,) = _logistic(x[:, None], positive.astype(np.float64), np.array([1.0]))
        return Scaling(float(gain)) if gain > 0 else None
    return platt(x, positive)


def platt(logits: Float[np.ndarray, " n"], positive: Shaped[np.ndarray, " n"]) -> Scaling:
    """Gain and bias of the highest likelihood (Platt 1999), with his targets: not 1 and 0 but
    (N+ + 1) / (N+ + 2) and 1 / (N- + 2), so that few labels cannot make anything certain.

    Where labels contradict the order of the logits, only the bias is fitted.
    """
    ones, n = int(positive.sum()), len(positive)
    target = np.where(positive, (ones + 1) / (ones + 2), 1 / (n - ones + 2))
    gain, bias = _logistic(np.stack([logits, np.ones(n)], axis=1), target, np.array([1.0, 0.0]))
    if gain > 0:
        return Scaling(float(gain), float(bias))
    (bias,) = _logistic(np.ones((n, 1)), target, np.zeros(1), logits)
    return Scaling(1.0, float(bias))


def isotonic(logits: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]) -> Isotonic:
    """The rising function of least squares (Zadrozny and Elkan 2002) by pooling adjacent violators.

    A knot stands at the mean logit of each pool (Oron and Flournoy 2017), so that scores within a
    pool keep their order. The share of a pool is kept half an example away from 0 and 1.

    >>> knots = isotonic(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0, 1.0]))
    >>> knots.x.tolist(), np.round(1 / (1 + np.exp(-knots.y)), 3).tolist()
    ([0.0, 1.5, 3.0], [0.125, 0.5, 0.875])
    """
    n = len(logits)
    level, first, counts = np.unique(logits, return_inverse=True, return_counts=True)
    ones = np.bincount(first, labels)
    pools: list[tuple[float, float, float]] = []  # (examples, ones, sum of logits)
    for x, size, hits in zip(level, counts, ones, strict=True):
        pool = (float(size), float(hits), float(size * x))
        while pools and pools[-1][1] * pool[0] >= pool[1] * pools[-1][0]:
            pool = tuple(map(sum, zip(pools.pop(), pool, strict=True)))  # type: ignore[assignment]
        pools.append(pool)
    size, hits, total = np.array(pools).T
    share = np.clip(hits / size, 1 / (2 * n), 1 - 1 / (2 * n))
    return Isotonic(total / size, np.log(share) - np.log1p(-share))


def fit_classes(logits: Float[np.ndarray, "n C"], labels: Int[np.ndarray, " n"]) -> Scaling | None:
    """The temperature (Guo et al. 2017) of softmax logits; -inf is no class of that example.

    None where no temperature is better than another, or the worse ones are.
    """
    z = logits.astype(np.float64)
    own = np.take_along_axis(z, labels[:, None].astype(np.int64), axis=1)
    z = np.where(np.isfinite(z), z - own, -np.inf)  # of the label: 0
    finite, gain = np.where(np.isfinite(z), z, 0.0), 1.0
    for _ in range(_STEPS if len(z) else 0):
        scaled = np.where(np.isfinite(z), gain * finite, -np.inf)
        p = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        mean = (p * finite).sum(axis=1)
        slope, curve = mean.sum(), (p * (finite - mean[:, None]) ** 2).sum()
        if curve <= 1e-12 * len(z):
            return None
        step = np.clip(slope / curve, -gain, 0.5 * gain)  # never to 0
        gain -= step
        if abs(step) < 1e-9 * gain:
            break
    return Scaling(float(gain)) if gain > 1e-3 else None


def _logistic(
    x: Float[np.ndarray, "n k"],
    target: Float[np.ndarray, " n"],
    start: Float[np.ndarray, " k"],
    offset: float | Float[np.ndarray, " n"] = 0.0,
) -> Float[np.ndarray, " k"]:
    """Coefficients of the logistic regression on shares, by Newton's method with halved steps.

    A touch of shrinkage towards `start` keeps separable labels finite.
    """

    def loss(w: np.ndarray) -> float:
        z = x @ w + offset
        fit = np.logaddexp(0, z).sum() - target @ z
        return float(fit + 0.5 * shrink * ((w - start) ** 2).sum())

    shrink, w = 1e-3, start.astype(np.float64)
    for _ in range(_STEPS):
        p = 0.5 * (1 + np.tanh((x @ w + offset) / 2))
        gradient = x.T @ (p - target) + shrink * (w - start)
        curve = (x * (p * (1 - p))[:, None]).T @ x + shrink * np.eye(len(w))
        step, before = np.linalg.solve(curve, gradient), loss(w)
        while loss(w - step) > before and np.abs(step).max() > 1e-9:
            step = step / 2
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    return w


def to_json(calibrations: Mapping[str, Calibration]) -> dict[str, dict[str, Any]]:
    """Plain values: {task: {"gain": …, "bias": …}} or {task: {"x": […], "y": […]}}."""
    plain: dict[str, dict[str, Any]] = {}
    for name, of in calibrations.items():
        plain[name] = {k: np.asarray(v, np.float64).tolist() for k, v in of._asdict().items()}
    return plain


def from_json(plain: Mapping[str, Mapping[str, Any]], dtype: str) -> dict[str, Calibration]:
    """What `to_json` gave, as arrays of a type."""
    made: dict[str, Calibration] = {}
    for name, of in plain.items():
        values = {key: np.asarray(value, dtype) for key, value in of.items()}
        made[name] = Isotonic(**values) if "x" in values else Scaling(**values)
    return made
