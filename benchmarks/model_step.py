"""Time of a training step of an experiment: of the first, which compiles, and of those after it.

mtrec prepare shop
python -m benchmarks.model_step shop prepared/shop --steps 60
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np

import mtrec_jax
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.models.model import make_model
from mtrec_jax.models.serve import load_catalogue
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.train.step import make_step


def main() -> None:
    """Print the seconds of the first step, and median, least and 90th percentile of the others."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment")
    parser.add_argument("prepared")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()

    mtrec_jax.keep_freed_memory()
    experiment = mtrec_jax.load_experiment(given.experiment, given.set)
    prepared = mtrec_jax.open_prepared(given.prepared).chosen(experiment)
    mesh = make_mesh((1, 1))
    model = make_model(experiment, prepared.manifest)
    step = make_step(experiment, model, mesh, 1000)
    catalogue = replicate(load_catalogue(prepared, experiment), mesh)
    source = BatchSource(prepared, "train", experiment.train.batch_size, seed=0)
    batches = [put_batch(source[i], mesh) for i in range(8)]
    state = step.init(0)
    seconds = []
    for i in range(given.steps + 1):
        start = time.perf_counter()
        state = step.update(state, batches[i % 8], catalogue)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    ms = 1e3 * np.asarray(seconds[1:])
    print(
        f"{given.experiment}: first step {seconds[0]:.1f} s; of {given.steps} more, "
        f"median {np.median(ms):.1f} ms, least {ms.min():.1f}, "
        f"90th percentile {np.quantile(ms, 0.9):.1f}"
    )


if __name__ == "__main__":
    main()
