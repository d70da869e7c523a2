"""A run that begins with another one: what it takes over, row by row, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtrec_jax.config import Experiment, Table, to_toml
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.features.hashed import Hashed
from mtrec_jax.data.prepare import prepare
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.encoders.transformer import Transformer
from mtrec_jax.models.inputs import make_inputs
from mtrec_jax.models.model import make_model
from mtrec_jax.models.towers.shared_bottom import SharedBottom
from mtrec_jax.sharding import make_mesh
from mtrec_jax.tables.layout import DENSE, spread
from mtrec_jax.train.loop import train
from mtrec_jax.train.run import Run, load_best
from mtrec_jax.train.step import make_step
from mtrec_jax.train.warm_start import find_source, warm_start
from mtrec_jax.types import TrainState

pytestmark = pytest.mark.usefixtures("compiled_programs")

CAPACITY, ITEMS = 64, 80
Mtrec = Callable[..., tuple[int, str, str]]


class World(NamedTuple):
    """A run on the first two thirds of a log, and the whole log prepared twice."""

    experiment: Experiment
    run: Run
    grown: Prepared  # as a continuation
    anew: Prepared  # by itself


def declared(
    experiment: Experiment,
    capacity: int = CAPACITY,
    item: Literal["sparse", "dense"] = "sparse",
    **model: Any,
) -> Experiment:
    """The plain experiment with users' ids: each with a row, hashed, and with shared rows."""
    user = replace(experiment.features["segment"], column="user")
    bucket = Hashed(on="context", column="user", buckets=7)
    room = {"item": ITEMS if capacity else 0, "user_id": capacity}
    return replace(
        experiment,
        data=replace(experiment.data, public=""),
        features={**experiment.features, "user_id": user, "bucket": bucket, "user_hash": user},
        tables={
            "item": Table(update=item, capacity=room["item"]),
            "user_id": Table(update="sparse", capacity=room["user_id"]),
            "user_hash": Table(update="sparse", hash_rows=20, hash_functions=2),
        },
        model=replace(experiment.model, **model),
        train=replace(experiment.train, steps=6, evaluate_every=6, checkpoint_every=3),
    )


@pytest.fixture(scope="module")
def world(shop_data: Path, plain: Experiment, tmp_path_factory: pytest.TempPathFactory) -> World:
    place, experiment = tmp_path_factory.mktemp("warm"), declared(plain)
    folders = {}
    for name in ("first", "whole"):
        folders[name] = place / name
        folders[name].mkdir()
        for path in shop_data.glob("*.csv"):
            lines = path.read_text("utf-8").splitlines(keepends=True)
            if name == "first" and path.name == "events.csv":
                users = next(csv.reader(lines)).index("user")
                some = [x for x in lines[1:] if next(csv.reader([x]))[users] > "u00015"]
                lines = [lines[0], *some[: len(some) * 2 // 3]]
            (folders[name] / path.name).write_text("".join(lines), encoding="utf-8")
    first = prepare(experiment, folders["first"], place / "prepared")
    said: list[str] = []
    grown = prepare(
        experiment, folders["whole"], place / "grown", progress=said.append, grow_from=first.folder
    )
    line = next(line for line in said if line.startswith(f"continues {first.folder}: items "))
    assert " user_id 31 known, 16 new" in line
    anew = prepare(experiment, folders["whole"], place / "anew")
    run = train(experiment, first, place / "run", show_progress=False)
    return World(experiment, run, grown, anew)


def begin(
    world: World, experiment: Experiment, prepared: Prepared, folder: Path
) -> tuple[dict[str, np.ndarray], TrainState, str]:
    """The stacks of a fresh state, the state after the warm start, and what was said."""
    mesh = make_mesh(experiment.train.mesh)
    model = make_model(experiment, prepared.manifest)
    fresh = make_step(experiment, model, mesh, 6).init(5)
    before = {s: np.asarray(t).copy() for s, t in stacks(fresh).items()}
    folder.mkdir()
    source = find_source(world.run.folder, Run(folder, experiment, prepared))
    assert source is not None
    kept = {s: t.sharding for s, t in stacks(fresh).items()}
    said: list[str] = []
    state = warm_start(fresh, Run(folder, experiment, prepared), source, mesh, said.append)
    assert {s: t.sharding for s, t in stacks(state).items()} == kept
    return before, state, said[0]


def stacks(state: TrainState) -> dict[str, jax.Array]:
    dense = {DENSE: state.params[DENSE]} if DENSE in state.params else {}
    return {**state.tables, **dense}


def rows_of(
    experiment: Experiment, prepared: Prepared, tables: Any, owner: str
) -> dict[str, np.ndarray]:
    """{raw value: its row} of an owner; "?" is the unknown one."""
    layout = make_inputs(experiment, prepared.manifest).layout
    place = layout.places[owner]
    values = prepared.item_vocabulary
    if owner != "item":
        values = prepared.vocabulary(owner)["value"]
    number = jnp.arange(len(values) + 1) + place.offset + 1
    address = spread(number, layout.rows[place.stack]) if place.stack != DENSE else number
    rows = np.asarray(tables[place.stack])[np.asarray(address)]
    return dict(zip(["?", *values.to_pylist()], rows, strict=True))


OWNERS = ("item", "user_id", "segment", "brand", "price_bin")


@pytest.mark.parametrize(
    ("which", "changes"),
    [
        ("grown", {}),
        pytest.param("grown", {"capacity": 0}, marks=pytest.mark.slow),
        ("anew", {}),
        pytest.param("anew", {"item": "dense"}, marks=pytest.mark.slow),
        pytest.param("anew", {"mesh": (2, 4)}, marks=pytest.mark.slow),
    ],
)
def test_rows_are_carried_over_by_raw_value(
    world: World, plain: Experiment, tmp_path: Path, which: str, changes: dict[str, Any]
) -> None:
    prepared = world.grown if which == "grown" else world.anew
    mesh = changes.get("mesh", (1, 1))
    experiment = declared(plain, **{k: v for k, v in changes.items() if k != "mesh"})
    experiment = replace(experiment, train=replace(experiment.train, mesh=mesh))
    params, tables, step = load_best(world.run)
    old = {**tables, DENSE: params[DENSE]}
    before, state, line = begin(world, experiment, prepared, tmp_path / "new")
    carried = fresh = 0
    for owner in OWNERS:
        theirs = rows_of(world.experiment, world.run.prepared, old, owner)
        ours = rows_of(experiment, prepared, stacks(state), owner)
        initial = rows_of(experiment, prepared, before, owner)
        known, new = ours.keys() & theirs.keys(), ours.keys() - theirs.keys()
        if owner in ("item", "user_id"):
            assert known - {"?"}
        if owner == "user_id":
            assert new
        for value in known:
            np.testing.assert_array_equal(ours[value], theirs[value], f"{owner} {value}")
        for value in new:
            np.testing.assert_array_equal(ours[value], initial[value], f"{owner} {value}")
            assert (ours[value] != 0).any()
        carried, fresh = carried + len(known) - 1, fresh + len(new)
    for a, b in zip(
        jax.tree.leaves(state.params["network"]), jax.tree.leaves(params["network"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert int(state.step) == 0
    assert f"(step {step}): " in line
    notes = json.loads((tmp_path / "new" / "init_from.json").read_text("utf-8"))
    assert notes["run"] == str(world.run.folder.resolve())
    assert notes["carried"]["bucket"] == 7  # ids that are hashes mean the same everywhere
    assert sum(notes["carried"][o] for o in OWNERS) == carried
    assert sum(notes["new"][o] for o in OWNERS) == fresh
    assert f"{sum(notes['carried'].values()):,} rows carried over" in line
    assert f"{sum(notes['new'].values()):,} new" in line
    # shared rows mean the same while ids do
    assert (notes["carried"]["user_hash"] > 0) == (which == "grown")
    assert ("(all of user_hash)" in line) == (which == "anew")


def test_a_folder_of_other_values_does_not_grow(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    text = "user,item,time\n" + "".join(f"v{i % 9},x{i % 7},{i}\n" for i in range(70))
    (tmp_path / "other" / "events.csv").write_text(text, "utf-8")
    other = parse_experiment(
        {
            "name": "other",
            "data": {
                **{"user": "user", "item": "item", "time": "time"},
                "events": {"files": ["events.csv"]},
            },
            "split": {"kind": "time"},
            "tasks": {"next": {"kind": "retrieval"}},
            "train": {"steps": 1},
        }
    )
    with pytest.raises(DataError, match=r"none of the values that .* knows trains here \(items 0"):
        prepare(other, tmp_path / "other", tmp_path / "p", grow_from=world.run.prepared.folder)


def test_a_grown_vocabulary_keeps_the_addresses(world: World) -> None:
    manifests = world.run.prepared.manifest, world.grown.manifest
    assert manifests[0].context_ids != manifests[1].context_ids
    old, new = (make_inputs(world.experiment, m).layout.places for m in manifests)
    moved = {owner for owner in old if old[owner] != new[owner]}
    assert not {"item", "user_id", "user_hash"} & moved


def test_the_same_data_are_taken_over_whole(world: World, tmp_path: Path) -> None:
    params, tables, _ = load_best(world.run)
    before, state, line = begin(world, world.experiment, world.run.prepared, tmp_path / "new")
    assert line.endswith(", 0 new")
    ours, theirs = (jax.tree.leaves(x) for x in ((state.params, state.tables), (params, tables)))
    for a, b in zip(ours, theirs, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert all((np.asarray(t) != before[s]).any() for s, t in stacks(state).items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"width": 16}, r"parameter network.* is .* in .*run and .* here: \[model\]"),
        pytest.param(
            {"towers": SharedBottom(expert_hidden=(4,))},
            r"parameter network\['towers'\].* Set them alike",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"encoder": Transformer(layers=2)},
            r"parameter network\['encoder'\].* is missing in .* and \[",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_shape_is_named(
    world: World, plain: Experiment, tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        begin(world, declared(plain, **model), world.grown, tmp_path / "new")
    assert not (tmp_path / "new" / "init_from.json").exists()


@pytest.mark.parametrize("what", ["tasks", "classes", "inputs of a user"])
def test_places_that_have_changed_are_named(world: World, tmp_path: Path, what: str) -> None:
    """Two tasks, classes or features that have changed places: every shape is as it was."""
    experiment, manifest = world.experiment, world.grown.manifest
    if what == "tasks":
        names = list(experiment.tasks)
        first, second = [n for n in names if experiment.tasks[n].kind == "binary"][:2]
        swapped = {first: second, second: first}
        tasks = {swapped.get(n, n): experiment.tasks[swapped.get(n, n)] for n in names}
        experiment = replace(experiment, tasks=tasks)
        fields = {swapped.get(n, n): manifest.tasks[swapped.get(n, n)] for n in manifest.tasks}
        manifest = replace(manifest, tasks=fields)
    elif what == "classes":
        name = next(iter(manifest.tasks))
        field = replace(manifest.tasks[name], classes=("1", "5", "3"))
        manifest = replace(manifest, tasks=manifest.tasks | {name: field})
    else:
        manifest = replace(manifest, context_ids=manifest.context_ids[::-1])
    prepared = replace(world.grown, manifest=manifest)
    with pytest.raises(ConfigError, match=f"the {what} are .* name them alike, in the same order"):
        begin(world, experiment, prepared, tmp_path / "new")


def test_a_source_that_may_have_trained_on_what_is_held_back_is_refused(
    world: World, tmp_path: Path
) -> None:
    def found(kind: str, old: dict[str, Any], new: dict[str, Any]) -> Run | None:
        runs = []
        for place, prepared, values in (("a", world.run.prepared, old), ("b", world.grown, new)):
            manifest = prepared.manifest
            split = replace(manifest.split, kind=kind, times=values.get("times", {}))
            files, config = values.get("files", ()), manifest.config | {"split": values.get("seed")}
            fingerprint = values.get("fingerprint", place)
            manifest = replace(manifest, split=split, event_files=files, config=config)
            prepared = replace(prepared, manifest=replace(manifest, fingerprint=fingerprint))
            runs.append(Run(tmp_path / place, world.experiment, prepared))
        return find_source(*runs)

    held_back = "may have trained on what is held back here: "
    with pytest.raises(ConfigError, match=r"was split by 1, .* Prepare with the same \[split\]"):
        found("random", {"seed": 1}, {"seed": 2})
    for kind in ("random", "folds", "files"):
        assert found(kind, {"files": ("x", "y")}, {"files": ("x", "y", "z")})
        for files in (("z", "x", "y"), ("x",)):
            with pytest.raises(ConfigError, match=f"{held_back}split.kind = '{kind}' goes by the"):
                found(kind, {"files": ("x", "y")}, {"files": files})
    early, late = (
        {"times": {"train": (0.0, t), "validation": (t + 1, t + 9)}} for t in (50.0, 90.0)
    )
    assert found("time", early, late)
    with pytest.raises(ConfigError, match=f"{held_back}events until 1970-01-01 00:01:30 trained"):
        found("time", late, early)
    for kind in ("leave_one_out", "user_ratio"):
        assert found(kind, early, late)
        with pytest.raises(ConfigError, match=r"1970-01-01 00:01:39, here it ends at .* 00:00:59"):
            found(kind, late, early)
    for kind in ("cold_user", "user_holdout", "cold_item"):
        assert found(kind, late, early), "users and items fall where their ids do"
    for kind in ("random", "time"):
        same = {"fingerprint": "same"}
        assert found(kind, late | same, early | same)


@pytest.mark.slow
def test_a_run_begins_so_once(
    mtrec: Mtrec, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    longer = replace(world.experiment, train=replace(world.experiment.train, learning_rate=1e-4))
    (tmp_path / "mine.toml").write_text(to_toml(longer), encoding="utf-8")
    old, new = world.run.folder, tmp_path / "runs" / "new"
    command = ("train", "mine.toml", "--prepared", world.grown.folder, "--run", new)
    status, _, err = mtrec(*command, "--init-from", old)
    assert (status, f"initialised from {old}" in " ".join(err.split())) == (0, True), err
    losses = [json.loads(x) for x in (new / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert losses
    # the same command, with and without the option, finds it trained already
    for more in (("--init-from", old), ()):
        status, _, err = mtrec(*command, *more)
        assert (status, "is trained already" in " ".join(err.split())) == (0, True), err
    status, _, err = mtrec(*command, "--init-from", tmp_path / "other")
    assert status == 2
    assert f"{new.relative_to(tmp_path)} was initialised from {old}, not from" in err or (
        f"{new} was initialised from {old}, not from" in err
    )
    with pytest.raises(ConfigError, match="was initialised at random, not from"):
        train(world.experiment, world.run.prepared, old, init_from=new, show_progress=False)
    with pytest.raises(ConfigError, match=r"names .* itself"):
        find_source(tmp_path, Run(tmp_path, world.experiment, world.grown))


def test_a_start_that_failed_leaves_no_trace(world: World, tmp_path: Path) -> None:
    (tmp_path / "init_from.json").write_text('{"run": "elsewhere"}', encoding="utf-8")
    assert find_source(None, Run(tmp_path, world.experiment, world.grown)) is None
    assert not (tmp_path / "init_from.json").exists()


@pytest.mark.slow
def test_a_run_with_shared_rows_resumes_to_the_bit(world: World, tmp_path: Path) -> None:
    params, tables, step = load_best(world.run)
    shutil.copytree(world.run.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = train(world.experiment, world.run.prepared, tmp_path / "run", show_progress=False)
    ours, theirs = load_best(again), (params, tables, step)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
