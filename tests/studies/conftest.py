"""The planted conflict of the benchmark, small, for all studies."""

from __future__ import annotations

import pytest

import mtrec_jax
from benchmarks import conflict
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.experiments import overridden

SMALL = {
    "train.epochs": 0,
    "train.steps": 12,
    "train.batch_size": 64,
    "train.evaluate_every": 6,
    "train.mesh": [1, 1],
    "evaluate.bootstrap": 20,
}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Prepared]:
    """600 rows with two tasks, and a model of a few parameters."""
    experiment = overridden(conflict.experiment(), SMALL)
    tables = {"events": conflict.planted(600, seed=1)}
    folder = tmp_path_factory.mktemp("planted") / "prepared"
    return experiment, mtrec_jax.prepare(experiment, None, folder, tables=tables)
