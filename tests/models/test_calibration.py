"""Calibrations: planted miscalibration is found, cases worked by hand, and no order is turned."""

from __future__ import annotations

import numpy as np
import pytest

from mtrec_jax.models import calibration
from mtrec_jax.models.calibration import Calibration, Isotonic, Scaling

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=40_000)  # log-odds
LABELS = (RNG.random(len(TRUE)) < 1 / (1 + np.exp(-TRUE))).astype(float)


def test_platt_finds_a_planted_scale_and_shift() -> None:
    """Logits that say 2 z + 1 where z is right: gain 1/2, bias -1/2."""
    found = calibration.fit_binary("platt", 2 * TRUE + 1, LABELS)
    assert isinstance(found, Scaling)
    np.testing.assert_allclose([found.gain, found.bias], [0.5, -0.5], atol=0.03)
    mean = 1 / (1 + np.exp(-calibration.apply(found, 2 * TRUE + 1)))
    assert mean.mean() == pytest.approx(LABELS.mean(), abs=1e-3)


def test_temperature_finds_a_planted_scale_and_has_no_bias() -> None:
    found = calibration.fit_binary("temperature", 3 * TRUE, LABELS)
    assert isinstance(found, Scaling)
    assert found.gain == pytest.approx(1 / 3, abs=0.01)
    assert found.bias == 0


def test_platt_has_the_targets_of_his_paper() -> None:
    """One logit for all, of three labels two are 1: the targets are 3/4, 3/4 and 1/3, whose mean
    is 11/18. Without a slope the bias alone fits it: log-odds log(11/7)."""
    found = calibration.platt(np.zeros(3), np.array([True, True, False]))
    assert found.gain == pytest.approx(1)
    assert found.bias == pytest.approx(np.log(11 / 7), abs=1e-2)


def test_labels_against_the_order_move_the_level_alone() -> None:
    found = calibration.platt(-TRUE[:4000], LABELS[:4000] == 1)
    assert found.gain == 1


def test_isotonic_pools_what_violates_the_order() -> None:
    """By hand: labels 0, 1, 0, 1, 1 at logits 0 .. 4; the second and the third are one pool of 1/2
    at 1.5. Then two of 1 are one pool at 3.5; shares are kept 1/10 from 0 and 1."""
    found = calibration.isotonic(np.arange(5.0), np.array([0.0, 1, 0, 1, 1]))
    np.testing.assert_allclose(found.x, [0, 1.5, 3.5])
    np.testing.assert_allclose(1 / (1 + np.exp(-found.y)), [0.1, 0.5, 0.9])
    odd = 0.3 * TRUE**3  # no straight line makes it right
    bent = calibration.fit_binary("isotonic", odd, LABELS)
    probability = 1 / (1 + np.exp(-calibration.apply(bent, odd)))
    assert np.abs(probability - 1 / (1 + np.exp(-TRUE))).mean() < 0.02
    assert (np.diff(probability[np.argsort(odd)]) >= 0).all()


def test_one_kind_of_label_calibrates_nothing() -> None:
    for labels in (np.ones(5), np.zeros(5), np.zeros(0)):
        assert calibration.fit_binary("platt", np.arange(float(len(labels))), labels) is None


def test_the_temperature_of_classes() -> None:
    """Logits three times too large, drawn from their softmax; one class is impossible."""
    z = RNG.normal(size=(20_000, 4))
    z[:, 3] = -np.inf
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > RNG.random((len(z), 1))).argmax(axis=1)
    found = calibration.fit_classes(3 * z, labels)
    assert found is not None
    assert found.gain == pytest.approx(1 / 3, abs=0.01)
    assert calibration.fit_classes(np.zeros((5, 3)), np.arange(5) % 3) is None


def test_json_keeps_every_kind() -> None:
    made: dict[str, Calibration] = {
        "click": Scaling(0.5, -0.25),
        "buy": Isotonic(np.array([0.0, 1.0]), np.array([-1.0, 1.0])),
    }
    again = calibration.from_json(calibration.to_json(made), "float64")
    logits = np.linspace(-2, 2, 7)
    for task, of in made.items():
        before = calibration.apply(of, logits)
        np.testing.assert_array_equal(calibration.apply(again[task], logits), before)
