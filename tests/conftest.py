"""Every test runs with shape and type checks on the package's functions, on 8 virtual devices."""

# ruff: noqa: E402 (devices and the import hook must be set up before anything is imported)

import os

# XLA takes twice as long to optimize programs that run for milliseconds here.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["MTREC_CACHE"] = "off"  # programs are kept for the session, not among the user's own
# Nor does it pay to compile a program in parts side by side, where two processes share two cores.
QUICKLY = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + QUICKLY + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook

install_import_hook("mtrec_jax", "beartype.beartype")

import jax
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_numpy_rank_promotion", "raise")

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import pytest

import mtrec_jax

gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that live on

if TYPE_CHECKING:  # the fixtures load what they need, and a test without them loads nothing
    from mtrec_jax.config import Experiment
    from mtrec_jax.data.dataset import Prepared
    from mtrec_jax.serving.recommender import Recommender
    from mtrec_jax.train.run import Run

SMALL_SHOP = (
    "data.history_length=16",
    "model.width=8",
    "model.encoder.layers=1",
    "model.towers.experts=2",
    "model.towers.expert_hidden=[8]",
    "model.towers.tower_hidden=[4]",
    "train.epochs=0",
    "train.steps=27",
    "train.batch_size=8",
    "train.negatives.count=16",
    "train.warmup_steps=4",
    "train.evaluate_every=12",
    "train.log_every=4",
    "train.mesh=[1, 1]",
    "evaluate.candidates=20",
    'evaluate.baselines=["popularity", "bias", { kind = "item_knn", neighbours = 10 }]',
    "evaluate.bootstrap=20",
    "evaluate.batch_size=16",
)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all processes of the suite share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def kept_folder(session_folder: Path) -> Path:
    """Prepared data and compiled programs, for many sessions if `MTREC_TESTS_KEEP` names a folder:
    `scripts/mutate.sh` changes nothing that they depend on."""
    kept = Path(os.environ.get("MTREC_TESTS_KEEP") or session_folder)
    kept.mkdir(exist_ok=True)
    return kept


@pytest.fixture(scope="session")
def compiled_programs(kept_folder: Path) -> dict[str, str]:
    """Keep compiled programs for the whole session: the settings, for other processes as well."""
    settings = {
        "jax_compilation_cache_dir": str(kept_folder / "compiled"),
        # With a limit processes wait for each other, and each new program reads the times of all
        # that are there: small ones are not worth it.
        "jax_compilation_cache_max_size": 2**32,
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it may have been found switched off already
    return {name.upper(): str(value) for name, value in settings.items()}


@pytest.fixture(scope="session")
def one_device(compiled_programs: dict[str, str]) -> dict[str, str]:
    """The environment of a process with one device that keeps compiled programs as well."""
    return os.environ | compiled_programs | {"XLA_FLAGS": QUICKLY}


@pytest.fixture(scope="session")
def shop_data(kept_folder: Path) -> Path:
    """Raw files of a shop with 48 users, 60 items and some 900 impressions; only to be read."""
    from mtrec_jax.data import shop

    folder = kept_folder / "raw" / "shop"
    with filelock.FileLock(kept_folder / "raw.lock"):
        if not folder.exists():
            shop.generate(folder, seed=3, users=48, items=60, impressions=20)
    return folder


@pytest.fixture(scope="session")
def shop_experiment() -> "Experiment":
    """The built-in experiment `shop` with a model that is too small to be good."""
    return mtrec_jax.load_experiment("shop", SMALL_SHOP)


@pytest.fixture(scope="session")
def shop_prepared(shop_data: Path, shop_experiment: "Experiment", kept_folder: Path) -> "Prepared":
    """The small shop, prepared; only to be read."""
    folder = kept_folder / "prepared" / "shop"
    with filelock.FileLock(kept_folder / "prepared.lock"):
        if folder.exists():
            return mtrec_jax.open_prepared(folder)
        return mtrec_jax.prepare(shop_experiment, shop_data, folder)


@pytest.fixture(scope="session")
def shop_run(
    shop_experiment: "Experiment",
    shop_prepared: "Prepared",
    compiled_programs: dict[str, str],
    session_folder: Path,
) -> "Run":
    """A finished run of 27 steps on the small shop; only to be read."""
    folder = session_folder / "runs" / "shop"
    with filelock.FileLock(session_folder / "runs.lock"):  # the second process has nothing to do
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
