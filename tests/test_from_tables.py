"""A recommender from a DataFrame in one call."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtrec_jax
from mtrec_jax import from_tables
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.from_tables import fit

Stopped = mtrec_jax.Stopped
pandas = pytest.importorskip("pandas")

QUICK: dict[str, Any] = {
    "data": {"history_length": 8},
    "model": {
        "width": 4,
        "encoder": {"layers": 1},
        "towers": {"experts": 2, "expert_hidden": [4], "tower_hidden": [4]},
    },
    "train": {"steps": 4, "batch_size": 8, "negatives": {"count": 8}, "mesh": [1, 1]},
    "evaluate": {"batch_size": 8, "candidates": 6},
}
TASKS: dict[str, Any] = {
    "next": "retrieval",
    "like": {"kind": "binary", "column": "rating", "at_least": 4},
}


def events() -> Any:
    """Twelve people with six ratings each of nine films; ids are numbers, times are timestamps."""
    rows = [
        {"person": 100 + p, "film": (p + 2 * n) % 9, "rating": 1 + (p * n) % 5, "day": n}
        for p in range(12)
        for n in range(6)
    ]
    frame = pandas.DataFrame(rows)
    frame["when"] = pandas.Timestamp("2026-01-01") + pandas.to_timedelta(frame.pop("day"), "D")
    return frame


def films() -> Any:
    return pandas.DataFrame({"film": range(9), "name": [f"Film {i}" for i in range(9)]})


@pytest.fixture(scope="module")
def recommender(compiled_programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mtrec_jax.fit(
        events(),
        user="person",
        item="film",
        time="when",
        tasks=TASKS,
        items=films(),
        title="name",
        settings=QUICK,
        folder=tmp_path_factory.mktemp("fitted") / "films",
        show_progress=False,
    )


def test_recommendations_and_predictions_follow_at_once(recommender: Any) -> None:
    found = recommender.recommend([100, 111], k=2)
    assert found["user"] == ["100", "100", "111", "111"]
    assert all(found["known"])
    assert set(found["title"]) <= {f"Film {i}" for i in range(9)}
    seen = {(0 + 2 * n) % 9 for n in range(6)}
    assert not {int(i) for i in found["item"][:2]} & seen
    pairs = recommender.predict([100], [3])
    assert 0 < pairs["like"][0] < 1
    assert recommender.recommend(["nobody"], k=1)["known"] == [False]


@pytest.mark.slow
def test_without_a_time_the_order_of_the_table_counts(recommender: Any) -> None:
    """A table that is in the order of time says the same without it."""
    ordered = events().sort_values("when", kind="stable")
    arguments: dict[str, Any] = {"user": "person", "item": "film", "tasks": TASKS}
    arguments |= {"settings": QUICK, "show_progress": False}
    timeless = mtrec_jax.fit(ordered.drop(columns="when"), **arguments)
    assert timeless.experiment.data.time == ""

    def history(made: Any, person: str) -> list[str]:
        items = made.prepared.user_lists("event_item")[made.prepared.user_ids[person] - 2]
        return [made.prepared.item_names[item - 2] for item in items]

    for person in ("100", "107"):
        assert history(timeless, person) == history(recommender, person)
    assert len(timeless.recommend([100], k=2)) == 2


def test_the_history_shows_past_labels_by_default(recommender: Any) -> None:
    (feature,) = recommender.prepared.manifest.history
    assert feature.name == "rating"
    liked = recommender.predict(["100"], ["5"])
    histories = [{"item": [1, 2], "rating": [5, 5]}, {"item": [1, 2], "rating": [1, 1]}]
    high, low = (recommender.recommend(["x"], 1, histories=[h])["score"] for h in histories)
    assert high != low
    with pytest.raises(DataError, match="place 1 of rating holds 'five', which is no number"):
        recommender.recommend(["x"], 1, histories=[{"item": [1, 2], "rating": [5, "five"]}])
    missing = ({"item": [1, 2], "rating": [5, none]} for none in (None, float("nan"), ""))
    assert len({recommender.recommend(["x"], 1, histories=[h])["score"][0] for h in missing}) == 1
    assert np.isfinite(liked["like"]).all()


@pytest.mark.slow
def test_past_labels_are_inputs_whatever_their_type_and_column(
    tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    frame = events()
    frame["did like"] = frame["rating"] >= 4
    frame["did_like"] = frame["rating"] / 2
    found = fit(
        frame,
        user="person",
        item="film",
        time="when",
        tasks={
            "like": {"kind": "binary", "column": "did like"},
            "half": {"kind": "regression", "column": "did_like"},
        },
        settings=QUICK,
        folder=tmp_path,
        show_progress=False,
    )
    like, half = found.experiment.features.items()
    assert (like[0], like[1].kind, like[1].column) == ("did_like_", "categorical", "did like")
    assert (half[0], half[1].kind, half[1].column) == ("did_like", "binned", "did_like")
    assert 0 < found.predict([100], [3])["like"][0] < 1


def test_a_stopped_fit_says_what_is_kept(
    recommender: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders: list[Path] = []

    def stop(experiment: Any, prepared: Any, folder: Path, show_progress: bool) -> Any:
        folders.append(folder)
        raise Stopped(f"stopped at step 2 of 4; everything is saved in {folder}", 143)

    monkeypatch.setattr(from_tables, "train", stop)
    monkeypatch.setattr(from_tables, "prepare", lambda *_, **__: recommender.prepared)
    columns: dict[str, Any] = {"user": "person", "item": "film", "time": "when"}
    with pytest.raises(Stopped, match="stopped at step 2 of 4; its folder was temp") as caught:
        fit(events(), **columns, tasks={"next": "retrieval"})
    assert caught.value.status == 143
    assert "Pass folder= to keep and continue a run" in str(caught.value)
    assert not folders[0].parent.exists()
    with pytest.raises(Stopped, match="everything is saved in"):
        fit(events(), **columns, tasks={"next": "retrieval"}, folder=tmp_path)


def test_a_temporary_folder_lives_as_long_as_the_recommender(
    recommender: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_tables, "train", lambda *_, **__: recommender.run)
    folders: list[Path] = []

    def prepare(*arguments: Any, **tables: Any) -> Any:
        folders.append(arguments[2])
        arguments[2].mkdir()
        return recommender.prepared

    monkeypatch.setattr(from_tables, "prepare", prepare)
    columns: dict[str, Any] = {"user": "person", "item": "film", "time": "when"}
    brief = fit(events(), **columns, tasks={"next": "retrieval"})
    assert folders[0].is_dir()
    del brief
    gc.collect()
    assert not folders[0].parent.exists()
    assert (recommender.run.folder / "config.toml").is_file()


def test_a_given_folder_is_kept_and_can_be_opened(recommender: Any, tmp_path: Path) -> None:
    answer, folder = recommender.recommend([100], 2).table, recommender.run.folder.parent
    shutil.copytree(folder, tmp_path / "kept")
    folder.rename(tmp_path / "moved")
    try:
        again = mtrec_jax.load(tmp_path / "kept")
        assert again.recommend([100], 2).table == answer
    finally:
        (tmp_path / "moved").rename(folder)
    assert again.experiment.train.steps == 4
    assert again.experiment.train.epochs == 0, "steps take the place of the default epochs"
    arguments: dict[str, Any] = {"user": "person", "item": "film", "time": "when"}
    arguments |= {"tasks": dict(TASKS), "settings": QUICK, "folder": folder}
    arguments |= {"items": films(), "title": "name"}
    with pytest.raises(ConfigError, match=r"Nothing was replaced\. Pass another folder= than"):
        fit(events().iloc[1:], **arguments)
    assert mtrec_jax.Recommender(folder / "run").recommend([100], 2).table == answer


def test_the_defaults_follow_the_split() -> None:
    def train(**split: Any) -> Any:
        given = ("person", "film", "when", {"next": "retrieval"}, "", None, {"split": split})
        return from_tables.experiment_of(*given).train

    assert (train().patience, train().epochs) == (4, 30)
    tests_only = train(kind="user_ratio", validation=0)
    assert (tests_only.patience, tests_only.epochs) == (0, 30), "nothing judges before the end"


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    columns: dict[str, Any] = {"user": "person", "item": "film", "time": "when"}
    with pytest.raises(ConfigError, match=r"tasks\.next\.kind: 'retreival' is not one of"):
        fit(events(), **columns, tasks={"next": "retreival"}, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"tasks\.like\.kind: required, and missing"):
        fit(events(), **columns, tasks={"like": {"column": "rating"}}, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key. Did you mean 'epochs'\?"):
        fit(
            events(),
            **columns,
            tasks={"next": "retrieval"},
            settings={"train": {"epoch": 3}},
            folder=tmp_path,
        )
    with pytest.raises(DataError, match=r"'whn'.*Did you mean 'when'\?"):
        fit(
            events(),
            **{**columns, "time": "whn"},
            tasks={"next": "retrieval"},
            folder=tmp_path,
        )
    assert not list(tmp_path.iterdir())
