"""mtrec_jax: from raw behaviour logs to trained multi-task recommenders, in JAX.

The public names load on first use, so that `import mtrec_jax.kernels` stays light.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from mtrec_jax.errors import CheckpointError, ConfigError, DataError, Error

__version__ = "0.1.0"

_HOME = {
    "load_experiment": "mtrec_jax.experiments",
    "parse_experiment": "mtrec_jax.experiments",
    "prepare": "mtrec_jax.data.prepare",
    "open_prepared": "mtrec_jax.data.dataset",
    "train_run": "mtrec_jax.train.loop:train",  # `mtrec_jax.train` is the package
    "open_run": "mtrec_jax.train.run",
    "evaluate_run": "mtrec_jax.train.run",
    "compare": "mtrec_jax.train.run",
    "draw_reliability": "mtrec_jax.evaluation.picture",
    "Stopped": "mtrec_jax.train.stopping",
    "fit": "mtrec_jax.from_tables",
    "fine_tune": "mtrec_jax.train.fine_tune",
    "load": "mtrec_jax.serving.recommender",
    "Recommender": "mtrec_jax.serving.recommender",
    "fit_baseline": "mtrec_jax.serving.baseline",
    "check_baseline": "mtrec_jax.testing",
    "plan": "mtrec_jax.planner",
    "keep_freed_memory": "mtrec_jax.machine",
    "study_tune": "mtrec_jax.studies.tune:tune",
    "study_crossval": "mtrec_jax.studies.crossval:crossval",
    "study_transfer": "mtrec_jax.studies.transfer:transfer",
    "cosine_scores": "mtrec_jax.kernels",
    "cosine_topk": "mtrec_jax.kernels",
    "dot_topk": "mtrec_jax.kernels",
    "ItemIndex": "mtrec_jax.kernels",
    "target_rank": "mtrec_jax.kernels",
}

__all__ = ["CheckpointError", "ConfigError", "DataError", "Error", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mtrec_jax' has no attribute {name!r}")
    # XLA calls a compilation of two minutes a bug to be filed; read when JAX is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
