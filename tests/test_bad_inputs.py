"""What goes wrong most often: one message on standard error that names the place and the remedy,
exit status 2, and nothing half-written left behind."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.clean import open_cleaned
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import load_experiment
from mtrec_jax.from_tables import fit
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train import run as runs
from mtrec_jax.train.loop import train as train_run
from mtrec_jax.train.run import Run, open_run

Mtrec = Callable[..., tuple[int, str, str]]
Refused = Callable[..., str]


@pytest.fixture
def config(shop_experiment: Experiment, tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(shop_experiment), encoding="utf-8")
    return path


@pytest.fixture
def data(shop_data: Path, tmp_path: Path) -> Path:
    """A copy of the raw files, to be spoilt."""
    shutil.copytree(shop_data, tmp_path / "data" / "shop")
    return tmp_path / "data" / "shop"


@pytest.fixture
def refused(mtrec: Mtrec) -> Refused:
    """The message of a command that must be refused."""

    def call(*arguments: object) -> str:
        status, out, err = mtrec(*arguments)
        assert (status, out) == (2, "")
        assert "Traceback" not in err
        progress, found, message = err.partition("mtrec: ")
        assert found
        assert not any(line.startswith(" ") for line in progress.splitlines())
        return found + message

    return call


@pytest.fixture
def preparation(refused: Refused, config: Path, data: Path, tmp_path: Path) -> Callable[[], str]:
    """The message of a preparation that must fail, which leaves at most the whole cleaned log."""

    def call() -> str:
        message = refused("prepare", config, "--data", data.parent, "--out", tmp_path / "prepared")
        left = {p.name for p in tmp_path.iterdir()} - {"data", "mine.toml"}
        assert left <= {"cleaned"}
        for folder in (tmp_path / "cleaned").glob("*"):
            assert folder.name == "shop"
            open_cleaned(folder)
        return message

    return call


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def set_clicks(text: str, value: str, every: int = 1) -> str:
    """The log with the column `click` of every so many rows replaced."""
    header, *rows = text.splitlines()
    place = header.replace('"', "").split(",").index("click")
    changed = []
    for number, row in enumerate(rows):
        cells = row.split(",")
        cells[place] = value if number % every == 0 else cells[place]
        changed.append(",".join(cells))
    return "\n".join([header, *changed, ""])


def test_a_missing_file(preparation: Callable[[], str], data: Path) -> None:
    (data / "events.csv").unlink()
    message = preparation()
    assert f"{data / 'events.csv'}: there is no such file" in message
    assert "Fetch the data with: mtrec data shop" in message


def test_a_missing_column(preparation: Callable[[], str], data: Path) -> None:
    rewrite(data / "events.csv", lambda text: text.replace("stars", "star", 1))
    message = preparation()
    assert "no column 'stars' (the label of task 'stars') in events.csv" in message
    assert "Did you mean 'star'?" in message


@pytest.mark.parametrize("left", ["", "header"])
def test_an_empty_file(preparation: Callable[[], str], data: Path, left: str) -> None:
    rewrite(data / "events.csv", lambda text: text.splitlines()[0] + "\n" if left else "")
    message = preparation()
    assert f"{data / 'events.csv'}" in message
    assert "is empty" in message


def test_labels_that_are_all_equal(preparation: Callable[[], str], data: Path) -> None:
    rewrite(data / "events.csv", lambda text: set_clicks(text, "0"))
    message = preparation()
    assert re.search(
        r"task 'click': every training label is 0 \(\d+ rows, column 'click'\)", message
    )
    assert "Check tasks.click.column, or remove the task" in message


def test_labels_that_are_no_numbers(preparation: Callable[[], str], data: Path) -> None:
    """'nan' is text of other programs for a missing number; here a missing label is empty."""
    rewrite(data / "events.csv", lambda text: set_clicks(text, "nan", every=50))
    message = preparation()
    assert "18 of 879 rows are malformed, more than clean.max_bad_fraction = 0.01" in message
    assert "malformed label of click: 18; row 0 (events.csv line 2): 'nan'" in message
    assert "Fix these rows, or raise clean.max_bad_fraction" in message


def test_a_few_malformed_labels_are_counted(
    mtrec: Mtrec, config: Path, data: Path, tmp_path: Path
) -> None:
    rewrite(data / "events.csv", lambda text: set_clicks(text, "nan", every=400))
    status, _, err = mtrec("prepare", config, "--data", data.parent, "--out", tmp_path / "prepared")
    assert status == 0
    assert re.search(r"malformed label of click +3 +row 0 \(events\.csv line 2\): 'nan'", err)


def test_an_unknown_key(refused: Refused, config: Path) -> None:
    rewrite(config, lambda text: text.replace("batch_size = 8", "batchsize = 8"))
    message = refused("train", config)
    assert str(config) in message
    assert "train.batchsize: unknown key. Did you mean 'batch_size'?" in message


def test_a_label_among_the_features(refused: Refused, config: Path) -> None:
    message = refused("prepare", config, "--set", 'features.leak={column = "buy"}')
    assert "features.leak: column 'buy' is the label of task 'buy'" in message
    assert "leaks the answer. Remove the feature, or declare it on = 'history'" in message


def test_a_run_of_another_configuration(refused: Refused, config: Path, shop_run: Run) -> None:
    prepared, before = shop_run.prepared.folder, (shop_run.folder / "config.toml").read_bytes()
    train = ("train", config, "--prepared", prepared, "--run", shop_run.folder)
    message = refused(*train, "--set", "model.width=16", "--set", "model.towers=ple")
    assert f"{shop_run.folder} is a run of another configuration:" in message
    assert "model.towers.kind: 'mmoe' there, 'ple' here" in message
    assert "model.width: 8 there, 16 here" in message
    assert "Pass another --run, or the configuration" in message
    assert (shop_run.folder / "config.toml").read_bytes() == before


def test_data_of_another_configuration(refused: Refused, config: Path, shop_run: Run) -> None:
    train = ("train", config, "--prepared", shop_run.prepared.folder, "--run", "elsewhere")
    message = refused(*train, "--set", "data.history_length=9")
    assert "was prepared for another experiment than 'shop'" in message
    assert "data.history_length: 16 there, 9 here" in message
    assert "Prepare it anew: mtrec prepare" in message
    assert not Path("elsewhere").exists()


def test_a_folder_of_something_else(refused: Refused, config: Path, shop_run: Run) -> None:
    folder = config.parent / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("dear reader", encoding="utf-8")
    train = ("train", config, "--prepared", shop_run.prepared.folder, "--run", folder)
    assert f"{folder} is not empty and no run folder; pass another --run" in refused(*train)
    assert [p.name for p in folder.iterdir()] == ["chapter1.tex"]


@pytest.mark.slow
def test_a_truncated_checkpoint(shop_run: Run, tmp_path: Path) -> None:
    """In a process of its own: when one array fails, Orbax leaves the reading of others behind."""
    shutil.copytree(shop_run.folder, tmp_path / "run")
    damaged = 0
    for path in (tmp_path / "run" / "checkpoints").glob("*/model/**/d/*"):
        path.write_bytes(path.read_bytes()[:64])
        damaged += 1
    assert damaged
    code = "from mtrec_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "recommend", "run", "--users", "u00001"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    message = next(line for line in ran.stderr.splitlines() if line.startswith("mtrec: "))
    assert re.match(r"mtrec: checkpoint .*/run/checkpoints/\d+ cannot be restored", message)
    assert "It is damaged" in message
    assert "to continue from the step before it" in message


def test_a_run_without_a_checkpoint(refused: Refused, shop_run: Run, tmp_path: Path) -> None:
    for name in ("config.toml", "prepared.json"):
        shutil.copy(shop_run.folder / name, tmp_path)
    message = refused("evaluate", tmp_path)
    assert f"{tmp_path / 'checkpoints'} has no checkpoint yet. Run: mtrec train CONFIG" in message


def test_an_unknown_user(
    mtrec: Mtrec, shop_run: Run, shop_recommender: Recommender, tmp_path: Path
) -> None:
    """An error where the caller asks for it; otherwise a warning, an answer and a mark in it."""
    with pytest.raises(
        DataError, match=r"user 'u1' is not in the data of .*on_unknown=\"popular\""
    ):
        shop_recommender.recommend(["u00001", "u1"], on_unknown="error")
    out = tmp_path / "out.jsonl"
    status, _, err = mtrec("recommend", shop_run.folder, "--users", "u1", "--k", 2, "--out", out)
    assert status == 0
    assert "mtrec: 1 unknown user ('u1'): not in the prepared data" in err
    assert out.read_text(encoding="utf-8").count('"known": false') == 2


def test_a_folder_of_raw_data_that_is_not_there(
    refused: Refused, config: Path, shop_experiment: Experiment, tmp_path: Path
) -> None:
    """Each way of asking hears the name of its own argument."""
    own = shop_experiment.data
    own = replace(own, public="", events=replace(own.events, files=("*.csv",)))
    experiment = replace(shop_experiment, data=own)
    config.write_text(to_toml(experiment), encoding="utf-8")
    message = refused("prepare", config, "--data", "nowhere", "--out", tmp_path / "out")
    assert "there is no folder nowhere, in which '*.csv' would be. Name another: --data" in message
    with pytest.raises(DataError, match=r"there is no folder nowhere, .* Name another: data="):
        prepare(experiment, "nowhere", tmp_path / "out")


def test_an_output_folder_that_engines_misread(
    refused: Refused, config: Path, data: Path, tmp_path: Path
) -> None:
    message = refused("prepare", config, "--data", data.parent, "--out", tmp_path / "back\\slash")
    assert "back\\slash: a backslash in the path; name another folder" in message
    assert {p.name for p in tmp_path.iterdir()} == {"data", "mine.toml"}


def test_prepared_data_that_has_moved(refused: Refused, shop_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(shop_run.folder, run)
    (run / "prepared.json").write_text('{"folder": "/gone", "fingerprint": "0"}', encoding="utf-8")
    was = f"{run} was trained on /gone, where no prepared folder is any more"
    assert f"{was}; say where it is now: --prepared" in refused("evaluate", run)
    with pytest.raises(DataError, match=r"say where it is now: prepared="):
        open_run(run)


def test_errors_of_python_calls_name_its_arguments(
    shop_run: Run, shop_experiment: Experiment, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"no run folder; pass another run=$"):
        train_run(shop_experiment, shop_run.prepared, tmp_path, show_progress=False)
    with pytest.raises(ConfigError, match=r"^init_from= names .* itself; pass another run=$"):
        train_run(
            shop_experiment,
            shop_run.prepared,
            shop_run.folder,
            init_from=shop_run,
            show_progress=False,
        )
    with pytest.raises(ConfigError, match=r"^overrides= model\.width: write it as key=value"):
        load_experiment("shop", ["model.width"])
    wide = {"train.steps": 3, "model.width..": 8}
    table = {"user": [1], "item": [2]}
    with pytest.raises(ConfigError, match=r"^settings model\.width\.\.: write it as key=value"):
        fit(table, user="user", item="item", tasks={"next": "retrieval"}, settings=wide)


@pytest.mark.slow
def test_metrics_of_a_run_that_cannot_be_written(
    mtrec: Mtrec, shop_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    before = {p.name for p in shop_run.folder.iterdir()}
    monkeypatch.setattr(runs, "write_json", refuse)
    status, out, err = mtrec("evaluate", shop_run.folder, "--split", "test")
    assert status == 0
    assert "click" in out
    why = "this look at the test set among it: Read-only file system"
    assert f"mtrec: nothing was stored in {shop_run.folder}, {why}" in err
    assert "Traceback" not in err
    assert {p.name for p in shop_run.folder.iterdir()} == before
