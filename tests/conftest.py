"""Every test runs with shape and type checks on the package's functions, on 8 virtual devices."""

# ruff: noqa: E402 (devices and the import hook must be set up before anything is imported)

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# XLA takes a third longer to optimize programs that run for milliseconds here.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from jaxtyping import install_import_hook

install_import_hook("mtrec_jax", "beartype.beartype")

import jax
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import mtrec_jax

if TYPE_CHECKING:  # the fixtures load what they need, and a test without them loads nothing
    from mtrec_jax.config import Experiment
    from mtrec_jax.data.dataset import Prepared
    from mtrec_jax.recommender import Recommender
    from mtrec_jax.train.run import Run

SMALL_SHOP = (
    "data.history_length=16",
    "model.width=8",
    "model.layers=1",
    "model.experts=2",
    "model.expert_hidden=[8]",
    "model.tower_hidden=[4]",
    "train.epochs=0",
    "train.steps=27",
    "train.batch_size=8",
    "train.negatives=16",
    "train.warmup_steps=4",
    "train.evaluate_every=12",
    "train.log_every=4",
    "train.mesh=[1, 1]",
    "evaluate.candidates=20",
    "evaluate.neighbours=10",
    "evaluate.bootstrap=20",
    "evaluate.batch_size=16",
)


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled programs: the same model is compiled once a session, not once a run."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have been found switched off already
    return folder


@pytest.fixture(scope="session")
def shop_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of a shop with 48 users, 60 items and some 900 impressions; only to be read."""
    from mtrec_jax.data import shop

    folder = tmp_path_factory.mktemp("raw")
    shop.generate(folder / "shop", seed=3, users=48, items=60, impressions=20)
    return folder / "shop"


@pytest.fixture(scope="session")
def shop_experiment() -> "Experiment":
    """The built-in experiment `shop` with a model that is too small to be good."""
    return mtrec_jax.load_experiment("shop", SMALL_SHOP)


@pytest.fixture(scope="session")
def shop_prepared(
    shop_data: Path, shop_experiment: "Experiment", tmp_path_factory: pytest.TempPathFactory
) -> "Prepared":
    """The small shop, prepared; only to be read."""
    return mtrec_jax.prepare(
        shop_experiment, shop_data, tmp_path_factory.mktemp("prepared") / "shop"
    )


@pytest.fixture(scope="session")
def shop_run(
    shop_experiment: "Experiment",
    shop_prepared: "Prepared",
    compiled_programs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> "Run":
    """A finished run of 27 steps on the small shop; only to be read."""
    folder = tmp_path_factory.mktemp("runs") / "shop"
    return mtrec_jax.train_run(shop_experiment, shop_prepared, folder, show_progress=False)


@pytest.fixture(scope="session")
def shop_recommender(shop_run: "Run") -> "Recommender":
    """The recommender of the small shop's run."""
    return mtrec_jax.Recommender(shop_run)


@pytest.fixture
def mtrec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`mtrec("recommend", ...)` in this process: (exit status, standard output, standard error)."""
    from mtrec_jax import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mtrec", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        status = end.value.code
        return (status if isinstance(status, int) else 0), captured.out, captured.err

    return call
