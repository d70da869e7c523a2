"""Answers with events that came after training: newer folders, and tables of new events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import mtrec_jax
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.new_rows import with_events, with_users
from mtrec_jax.data.newer import in_terms_of
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train.run import Run
from mtrec_jax.train.warm_start import find_source
from tests.data.test_growth import FIRST_LOG, HEADER, experiment, prepared

# what `b` does after FIRST_LOG; `new` and `grey` have never trained, the bins are those of 1 .. 9
NEWER = f"""{HEADER}
b,y,light,5,1
b,x,dark,6,2
b,x,dark,7,3
b,w,dark,8,4
b,new,grey,1,5
b,y,light,3,6
b,w,dark,9,7
c,x,light,5,1
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("own"), FIRST_LOG)


@pytest.fixture(scope="module")
def grown(own: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepared(tmp_path_factory.mktemp("grown"), NEWER, own)


def events_of(view: Prepared, user: str, column: str) -> list[Any]:
    return view.user_lists(f"event_{column}")[view.user_ids[user] - 2].tolist()


def test_a_newer_folder_speaks_in_the_terms_of_the_own_one(own: Prepared, grown: Prepared) -> None:
    view = in_terms_of(grown, own)
    # by hand: dark 2, light 3 in the own vocabulary; grey has never trained
    assert own.vocabulary("shade")["value"].to_pylist() == ["dark", "light"]
    assert events_of(view, "b", "shade") == [3, 2, 2, 2, 1, 3, 2]
    assert events_of(view, "c", "shade") == [3]
    items = [view.item_names[i - 2] for i in events_of(view, "b", "item")]
    assert items == ["y", "x", "x", "w", "new", "y", "w"]
    # x and y have rows of their own, rows 2 and 3; w and new have never trained
    rows = dict(zip(view.item_names, view.item_rows()[2:].tolist(), strict=True))
    assert rows == {"x": 2, "y": 3, "w": 1, "new": 1}
    # blue 2, red 3 in the own vocabulary; green and pink have never trained
    tags = dict(zip(view.item_names, view.catalogue()["ids"][2:].tolist(), strict=True))
    assert own.vocabulary("tags")["value"].to_pylist() == ["blue", "red"]
    assert tags == {"x": [0, 0], "y": [1, 0], "w": [2, 1], "new": [1, 3]}
    # a 2, b 3; c has never trained
    who = dict(zip(view.user_names, view.user_context()["ids"][:, 0].tolist(), strict=True))
    assert who == {"b": 3, "c": 1}
    for group in ("context_ids", "item_ids", "history"):
        assert getattr(view.manifest, group) == getattr(own.manifest, group)
    assert view.manifest.item_values == own.manifest.trained_items


def test_the_same_folder_stays_what_it_is(own: Prepared) -> None:
    view = in_terms_of(own, own)
    assert view.users.equals(own.users)
    assert view.items.equals(own.items)
    assert (view.item_rows() == own.item_rows()).all()


@pytest.mark.slow
def test_numbers_come_to_the_own_scale(tmp_path: Path) -> None:
    own, newer = (_with_ages(tmp_path / n, ages) for n, ages in (("own", "1,3"), ("new", "5,13")))
    # own: mean 2, deviation 1; there: mean 9, deviation 4
    assert own.user_context()["numbers"].tolist() == [[-1, 0], [1, 0]]
    assert newer.user_context()["numbers"].tolist() == [[-1, 0], [1, 0]]
    view = in_terms_of(newer, own)
    assert view.user_context()["numbers"].tolist() == [[3, 0], [11, 0]]


@pytest.mark.parametrize(
    ("impute", "wanted"),
    [
        ("own", [[3, 0], [11, 0], [0, 1]]),
        pytest.param("none", [[3], [11], [0]], marks=pytest.mark.slow),
        pytest.param("constant", [[3], [11], [5]], marks=pytest.mark.slow),  # is 7 in both
    ],
)
def test_what_is_missing_stays_missing_on_another_scale(
    tmp_path: Path, impute: str, wanted: list[list[float]]
) -> None:
    # own: mean 2, deviation 1; there: mean 9, deviation 4
    own = _with_ages(tmp_path / "own", "1,3,", impute)
    newer = _with_ages(tmp_path / "new", "5,13,", impute)
    assert in_terms_of(newer, own).user_context()["numbers"].tolist() == wanted


def _with_ages(folder: Path, ages: str, impute: str = "own") -> Prepared:
    from tests.data.small import make

    folder.mkdir()
    rows = list(zip("abc", ages.split(","), strict=False))
    events = [f"{u},{i},{t}\n" for u, _ in rows for t, i in enumerate("xyzx")]
    (folder / "log.csv").write_text("user,item,time\n" + "".join(events), encoding="utf-8")
    text = "user,age\n" + "".join(f"{user},{age}\n" for user, age in rows)
    (folder / "users.csv").write_text(text, encoding="utf-8")
    age = {"on": "context", "kind": "numeric", "impute": impute}
    age |= {"constant": "7"} if impute == "constant" else {}
    experiment = make(data={"users": {"files": ["users.csv"]}}, features={"age": age})
    return mtrec_jax.prepare(experiment, folder, folder / "out")


@pytest.mark.slow
def test_other_features_and_bins_are_refused_by_name(own: Prepared, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", NEWER, shade={"kind": "hashed"}, bin={"bins": 4})
    with pytest.raises(ConfigError) as error:
        in_terms_of(other, own)
    assert "features.shade.kind: 'hashed' there, 'categorical' here" in str(error.value)
    assert "features.bin.bins: 4 there, 3 here" in str(error.value)
    alone = prepared(tmp_path / "alone", NEWER)  # other quantiles
    with pytest.raises(ConfigError, match=r"features\.bin: its . bins.*\n.*grow_from"):
        in_terms_of(alone, own)


def test_events_follow_the_stored_ones_in_the_order_of_time(own: Prepared) -> None:
    table = pa.table(
        {
            "user": ["b", "zoe", "b", "zoe"],
            "item": ["w", "y", "nothing", "x"],
            "shade": ["light", None, "dark", "grey"],
            "price": [1.0, None, 100.0, 2.0],
            "time": [30, 2, 20, 1],
        }
    )
    view = with_events(own, table)
    ids = own.item_ids
    before = events_of(own, "b", "item")
    assert events_of(view, "b", "item") == [*before, 1, ids["w"]]
    assert events_of(view, "a", "item") == events_of(own, "a", "item")
    assert events_of(view, "zoe", "item") == [ids["x"], ids["y"]]
    assert events_of(view, "zoe", "shade") == [1, 0]
    # bins begin at 1, 2 and 5: ids 2, 3, 4; no price was missing in training: unknown
    assert events_of(view, "b", "bin")[-2:] == [4, 2]
    assert events_of(view, "zoe", "bin") == [3, 1]
    assert view.user_context()["ids"][:, 0].tolist() == [2, 3, 1]
    assert view.manifest.users == 3
    with pytest.warns(UserWarning, match="4 of 4 are not later than the last stored one .*, 30"):
        again = with_events(view, table)
    assert events_of(again, "b", "item") == [*before, 1, ids["w"], 1, ids["w"]]
    first = table.slice(1, 1).set_column(0, "user", pa.array(["c"]))
    who = with_users(own, pa.table({"user": ["c"]}))
    assert events_of(with_events(who, first), "c", "item") == [ids["y"]], "nothing was stored"


def test_times_of_another_unit_are_refused(own: Prepared) -> None:
    """Milliseconds of 2026 are seconds of some year beyond 50000."""
    one = {"user": ["b"], "item": ["w"], "shade": ["light"], "price": [1.0]}
    with pytest.raises(DataError, match=r"after the year 2199.*1794181551000 .*Write them in 's'"):
        with_events(own, pa.table(one | {"time": [1794181551000]}))
    view = with_events(own, pa.table(one | {"time": [1794181551]}))
    assert view.manifest.events == own.manifest.events + 1


def test_what_answers_are_given_for_trains_no_model(own: Prepared, grown: Prepared) -> None:
    """Its examples hold codes of another folder, or know less than its histories."""
    later = pa.table({"user": ["b"], "item": ["x"], "shade": ["dark"], "price": [1], "time": [30]})
    for view in (in_terms_of(grown, own), with_events(own, later)):
        with pytest.raises(ConfigError, match="train none: open_prepared"):
            view.chosen(experiment())


def test_events_without_a_key_are_refused(own: Prepared) -> None:
    columns = {"user": ["b", None], "item": ["x", "x"], "time": [1, 2]}
    table = pa.table(columns | {"shade": ["dark", "dark"], "price": [1, 1]})
    with pytest.raises(DataError, match="row 1: missing user"):
        with_events(own, table)
    with pytest.raises(DataError, match="no column 'shade'"):
        with_events(own, table.drop_columns(["shade"]))


def raw_events(shop_data: Path) -> pa.Table:
    import pyarrow.csv

    return pyarrow.csv.read_csv(shop_data / "events.csv")


def test_a_recommender_answers_with_new_events(
    shop_recommender: Recommender, shop_data: Path
) -> None:
    table = raw_events(shop_data)
    mine = table.filter(pa.compute.equal(table["user"], "u00003"))
    stranger = mine.set_column(
        mine.column_names.index("user"), "user", pa.array(["stranger"] * len(mine))
    )
    shop_recommender.similar_users("u00001", 2)
    newer = shop_recommender.with_events(stranger)
    assert len(newer.similar_users("stranger", 2)["user"]) == 2  # nothing is left of those before
    answers = newer.recommend(["stranger", "u00001"], 5)
    assert answers["known"] == [True] * 10
    # the same model: whose history is u00003's gets the answer of somebody with that history
    m = shop_recommender.prepared
    history = {"item": [m.item_names[i - 2] for i in events_of(m, "u00003", "item")]}
    for field in m.manifest.history:
        values = [None, None, *m.vocabulary(field.name)["value"].to_pylist()]
        history[field.name] = [values[i] for i in events_of(m, "u00003", field.name)]
    asked = shop_recommender.recommend(["stranger"], 5, histories=[history])
    assert answers["item"][:5] == asked["item"]
    np.testing.assert_allclose(answers["score"][:5], asked["score"], rtol=1e-5)
    assert answers["item"][5:] == shop_recommender.recommend(["u00001"], 5)["item"]
    with pytest.raises(ConfigError, match="newer data serve for"):  # they would count as seen
        mtrec_jax.evaluate_run(newer.run)


@pytest.mark.slow
def test_who_has_met_more_needs_no_other_program(
    shop_run: Run, shop_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lists hold 4 or 32 seen items, and nobody has seen more than 4 before; then one sees 20."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        compiled.extend([event] * ("backend_compile" in event))

    monkeypatch.setattr("mtrec_jax.serving.recommender.SEEN", (4, 32))
    monkeypatch.setattr("mtrec_jax.serving.requests.Encoder.most_seen", 4)
    model = Recommender(shop_run)
    expected = model.recommend(["u00003"], 5)
    monkeypatch.undo()
    one = raw_events(shop_data).slice(0, 1).to_pylist()[0] | {"user": "zoe", "click": 1}
    items = model.prepared.item_names[:20]
    newer = model.with_events(pa.Table.from_pylist([one | {"item": item} for item in items]))
    assert newer._encoder.most_seen >= 20
    jax.monitoring.register_event_duration_secs_listener(listen)
    assert newer.recommend(["u00003"], 5).table == expected.table
    assert not set(newer.recommend(["zoe"], 20)["item"]) & set(items)
    assert compiled == []


def test_new_users_are_answered_by_their_features(
    shop_recommender: Recommender, shop_data: Path
) -> None:
    table = pa.csv.read_csv(shop_data / "users.csv")
    one, *rest = table.to_pylist()
    other = next(user for user in rest if user["segment"] != one["segment"])
    asked = [one | {"user": "zoe"}, one | {"user": "max"}, other | {"user": "kim"}]
    newer = shop_recommender.with_users(pa.Table.from_pylist(asked))
    items = shop_recommender.prepared.item_names[:1] * 3
    found = newer.predict(["zoe", "max", "kim"], items)
    assert found["known"] == [True] * 3
    assert found["click"][0] == found["click"][1] != found["click"][2]
    # the codes of somebody in the data with the same features
    context = newer.prepared.user_context()["ids"]
    ids = newer.prepared.user_ids
    np.testing.assert_array_equal(context[ids["zoe"] - 2], context[ids[one["user"]] - 2])
    assert newer.recommend(["zoe"], 3)["score"][0] is not None
    stored = shop_recommender.recommend(["u00001"], 3)["item"]
    assert newer.recommend(["u00001"], 3)["item"] == stored
    with pytest.raises(DataError, match="'zoe' has several"):
        shop_recommender.with_users(pa.Table.from_pylist(asked[:1] * 2))


def test_a_run_opens_newer_data(
    shop_run: Any, shop_data: Path, tmp_path: Path, mtrec: Any, shop_recommender: Recommender
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for path in shop_data.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    lines = (folder / "events.csv").read_text(encoding="utf-8").splitlines()
    last = next(line for line in reversed(lines) if "u00003" in line)
    with (folder / "events.csv").open("a", encoding="utf-8") as file:
        file.write(last.replace("u00003", "zoe") + "\n")
    whole = mtrec_jax.load_experiment("shop", ["data.history_length=16"], choose=False)
    newer = mtrec_jax.prepare(whole, folder, tmp_path / "newer", grow_from=shop_run.prepared.folder)
    model = mtrec_jax.load(shop_run.folder, newer.folder)
    assert model.recommend(["zoe"], 3)["known"] == [True] * 3
    known = model.recommend(["u00001"], 3)
    assert known["item"] == shop_recommender.recommend(["u00001"], 3)["item"]
    with pytest.raises(ConfigError, match="newer data serve for"):
        mtrec_jax.evaluate_run(model.run)
    # a run that begins with this one is told what this one was trained on, not what it answers for
    own = shop_run.prepared.manifest.fingerprint
    source = find_source(model.run, Run(tmp_path / "next", shop_run.experiment, newer))
    assert source is not None
    assert source.prepared.manifest.fingerprint == own != newer.manifest.fingerprint
    arguments = ("--users", "zoe", "--k", 2, "--out", tmp_path / "top.parquet")
    status, _, _ = mtrec("recommend", shop_run.folder, "--prepared", newer.folder, *arguments)
    assert status == 0
    assert pq.read_table(tmp_path / "top.parquet")["known"].to_pylist() == [True, True]
