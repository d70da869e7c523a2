"""New data never take away what an existing run was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train.run import Run

Mtrec = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(
    shop_data: Path,
    shop_experiment: Experiment,
    shop_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The default folders after `mtrec run mine.toml`, with one event more in the log since."""
    shutil.copytree(shop_data, tmp_path / "data" / "shop")
    shutil.copytree(shop_run.prepared.folder, tmp_path / "prepared" / "shop")
    shutil.copytree(shop_run.folder, tmp_path / "runs" / "shop")
    notes = {
        "folder": str((tmp_path / "prepared" / "shop").resolve()),
        "fingerprint": shop_run.prepared.manifest.fingerprint,
    }
    (tmp_path / "runs" / "shop" / "prepared.json").write_text(json.dumps(notes), encoding="utf-8")
    (tmp_path / "mine.toml").write_text(to_toml(shop_experiment), encoding="utf-8")
    events = tmp_path / "data" / "shop" / "events.csv"
    lines = events.read_text(encoding="utf-8").splitlines()
    events.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[Path, bytes]:
    """All files but those of the cleaned stage, on which no run depends."""
    files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {path: p.read_bytes() for path, p in files.items() if "cleaned" not in path.parts}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("run", "mine.toml"),
            "runs/shop was trained on other data",
        ),
        pytest.param(
            ("run", "mine.toml", "--prepared", "new"),
            "runs/shop was trained on other data",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("run", "mine.toml", "--run", "runs/new"),
            "that runs/shop was trained on",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("run", "mine.toml", "--run", "runs/new", "--set", "data.history_length=9"),
            "that runs/shop was trained on",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_refused_run_loses_nothing(
    mtrec: Mtrec, home: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = everything(home)
    status, _, err = mtrec(*arguments)
    assert status == 2
    assert message in err
    assert "Nothing was replaced. Name other folders for the new data with --run and --p" in err
    assert "or remove runs/shop" in err
    assert everything(home) == before
    assert len(Recommender("runs/shop").recommend(["u00001"], 3)) == 3


@pytest.mark.slow
def test_preparation_alone_heeds_the_runs_too(mtrec: Mtrec, home: Path) -> None:
    before = everything(home)
    status, _, err = mtrec("prepare", "mine.toml")
    assert status == 2
    assert "prepared/shop holds the data" in err
    assert "Nothing was replaced. Name another folder with --out, or remove runs/shop" in err
    assert everything(home) == before
    assert mtrec("prepare", "mine.toml", "--out", "prepared/new")[0] == 0
    shutil.rmtree("runs/shop")
    assert mtrec("prepare", "mine.toml")[0] == 0
    assert everything(home / "prepared/shop") == everything(home / "prepared/new")


@pytest.mark.slow
def test_equal_data_may_be_prepared_again(mtrec: Mtrec, home: Path, shop_data: Path) -> None:
    shutil.copy(shop_data / "events.csv", "data/shop/events.csv")
    before = everything(home / "prepared")
    status, _, err = mtrec("run", "mine.toml")
    assert status == 0, err
    assert "is trained already" in err
    assert everything(home / "prepared") == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.mesh=[16, 1]", "train.mesh: [16, 1] needs 16 devices, there are 8"),
        ("train.batch_size=12", "train.batch_size: 12 does not divide over 8 devices"),
        ("train.precision=float64", "train.precision: 'float64' needs 64-bit JAX"),
    ],
)
def test_what_the_devices_cannot_do_is_said_before_any_work(
    mtrec: Mtrec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = mtrec("run", "shop", "--set", setting)
    assert (status, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())
