"""An experiment that compiles quickly, for what does not depend on the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtrec_jax.config import Experiment, Table
from mtrec_jax.models.fusions.none import NoFusion
from mtrec_jax.models.towers.shared_bottom import SharedBottom


@pytest.fixture(scope="session")
def plain(shop_experiment: Experiment) -> Experiment:
    """Row-wise updated items, sampled negatives and dropout, and no fusion."""
    towers = SharedBottom(expert_hidden=(8,), tower_hidden=(4,))
    model = replace(shop_experiment.model, towers=towers, fusion=NoFusion(), dropout=0.2)
    tables = {**shop_experiment.tables, "item": Table(update="sparse")}
    return replace(shop_experiment, model=model, tables=tables)
