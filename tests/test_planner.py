"""Plans, against states and programs on eight devices; sizes without data; refusals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtrec_jax
from mtrec_jax import ConfigError, planner
from mtrec_jax.arguments import bytes_text
from mtrec_jax.cli.plan import parse_rows
from mtrec_jax.config import Experiment, Table
from mtrec_jax.data.assumed import assumed_manifest, batch_shapes, resized
from mtrec_jax.data.dataset import Manifest, Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.model import make_catalogue, make_model
from mtrec_jax.models.serve import load_catalogue
from mtrec_jax.planner import Collective, DevicePlan, plan
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.exchange import default_buffers
from mtrec_jax.tables.layout import DENSE, computed_dtype, stacks
from mtrec_jax.train.loop import steps_in_flight
from mtrec_jax.train.step import Step, make_step
from mtrec_jax.types import FIRST, Batch
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_programs")

LENGTH, SIZE = 24, 256
FEATURES = ("user", "page", "query", "advert", "device")
PLAIN: dict[str, Any] = {"towers": "shared_bottom", "fusion": "none"}


class Case(NamedTuple):
    """A model, its data, and the batch of its first step."""

    experiment: Experiment
    manifest: Manifest
    batch: Batch


def _sequences(**train: Any) -> Case:
    """Histories and retrieval; items, their brands and users' tags are updated row by row."""
    experiment = tiny.experiment(
        tasks={"next": {"kind": "retrieval"}, "click": {"kind": "binary"}},
        model={"width": 32, **PLAIN},
        data={"history_length": LENGTH},
        train={"batch_size": SIZE, "negatives": {"count": 128}, **train},
    )
    made = tiny.manifest()
    manifest = replace(
        resized(made, {"item": 60_000, "tags": 20_000}),
        history_length=LENGTH,
        positions={"train": LENGTH},
        tasks={name: made.tasks[name] for name in experiment.tasks},
    )
    return Case(experiment, manifest, _zeros(experiment, manifest))


def _rows(**train: Any) -> Case:
    """Rows of a click log with three large features and one small."""
    experiment = _clicks(
        {"user": 64, "page": 64, "advert": 64, "device": 0}, {"width": 64}, 4096, **train
    )
    sizes = {"user": 100_000, "page": 30_000, "advert": 5_000, "device": 900}
    manifest = assumed_manifest(experiment, sizes)
    return Case(experiment, manifest, _zeros(experiment, manifest))


def _clicks(
    features: dict[str, int], model: dict[str, Any], batch_size: int, **train: Any
) -> Experiment:
    """A click log without users or items; features of value above 0 have sparse tables."""
    return parse_experiment(
        {
            "name": "clicks",
            "data": {"history_length": 0},
            "split": {"kind": "random"},
            "features": {name: {"on": "request"} for name in features},
            "tables": {name: {"update": "sparse"} for name, large in features.items() if large},
            "tasks": {"click": {"kind": "binary"}, "buy": {"kind": "binary"}},
            "model": {"encoder": "none", **PLAIN, **model},
            "train": {"steps": 10, "batch_size": batch_size, **train},
        }
    )


def _zeros(experiment: Experiment, manifest: Manifest) -> Batch:
    """A batch as the tests of the data check its shapes, without `batch_shapes`."""
    size, positions, length = (
        experiment.train.batch_size,
        manifest.positions["train"],
        manifest.history_length,
    )

    def whole(*shape: int) -> np.ndarray:
        return np.zeros((size, *shape), np.int32)

    def numbers(*shape: int) -> np.ndarray:
        return np.zeros((size, *shape), experiment.train.precision)

    has_events, place = length > 0, (positions,)
    return Batch(
        context={"ids": whole(4), "numbers": numbers(1)} if has_events else {},
        request=(
            {"ids": whole(*place, 1), "numbers": numbers(*place, 1)}
            if has_events
            else {"ids": whole(*place, len(manifest.request_ids))}
        ),
        events={"item": whole(length), "ids": whole(length, 1)} if has_events else {},
        cutoff=whole(*place),
        candidate=whole(*place),
        labels={task: numbers(*place) for task in experiment.tasks},
        mask={task: numbers(*place) for task in experiment.tasks},
        user=whole(),
        weight=numbers(*place),
        row=None,
    )


CASES: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "sequences, (2, 4), lazy Adam, bfloat16": (
        _sequences,
        {"mesh": [2, 4], "row_precision": "bfloat16"},
    ),
    "sequences, (1, 8), FTRL": (_sequences, {"mesh": [1, 8], "row_optimizer": "ftrl"}),
    "rows, (4, 2), row-wise Adagrad": (
        _rows,
        {"mesh": [4, 2], "row_optimizer": "rowwise_adagrad", "optimizer": "adagrad"},
    ),
    "rows, (8, 1), lazy Adam": (_rows, {"mesh": [8, 1]}),
    "sequences, (2, 4), in 4 parts": (_sequences, {"mesh": [2, 4], "accumulate": 4}),
}
SLOW = (
    "sequences, (1, 8), FTRL",
    "sequences, (2, 4), lazy Adam, bfloat16",
    "rows, (8, 1), lazy Adam",
    "sequences, (2, 4), in 4 parts",
)
every_case = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)


@functools.cache
def _planned(name: str) -> tuple[Case, DevicePlan]:
    """A case and its plan, for the sizes of the case's manifest."""
    make, train = CASES[name]
    case = make(**train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "assumed_manifest", lambda *_: case.manifest)
        return case, plan(case.experiment, devices=8)


def _step(case: Case) -> Step:
    model = make_model(case.experiment, case.manifest)
    return make_step(case.experiment, model, make_mesh(case.experiment.train.mesh), 1)


def _held(tree: Any) -> int:
    """Bytes of arrays on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def _given(case: Case) -> tuple[Any, Any]:
    """Catalogue and batch as training places them."""
    mesh, items = make_mesh(case.experiment.train.mesh), case.manifest.items
    has_items = int(items > 0)
    shape = (items + FIRST, has_items)
    features = {"ids": np.zeros(shape, np.int32), "numbers": np.zeros(shape, np.float32)}
    catalogue = make_catalogue(features, np.ones(items), items, 0.5, "float32")
    if not has_items:
        catalogue = jax.tree.map(np.asarray, catalogue)
    return replicate(catalogue, mesh), put_batch(case.batch, mesh)


@pytest.mark.slow
@every_case
def test_memory_is_that_of_a_state_and_of_its_compiled_step(name: str) -> None:
    case, found = _planned(name)
    step = _step(case)
    state = step.init(0)
    catalogue, batch = _given(case)
    for part, held in (
        ("tables", state.tables),
        ("slots", state.slots),
        ("scratch", state.scratch),
        ("dense parameters", state.params),
        ("catalogue", catalogue),
    ):
        assert found.memory[part] == _held(held), part
    rest = state._replace(tables={}, slots={}, scratch={}, params={}, key=())  # type: ignore[arg-type]
    assert found.memory["their optimizer"] == _held(rest) + 16  # the key
    assert found.memory["batches"] == steps_in_flight() * _held(batch)
    lowered = step.update.lower(state, batch, catalogue)  # type: ignore[attr-defined]
    working = lowered.compile().memory_analysis().temp_size_in_bytes
    assert found.memory["working memory"] == pytest.approx(working, rel=0.1)


@every_case
def test_bytes_are_those_of_the_exchange_and_of_the_gradients(name: str) -> None:
    case, found = _planned(name)
    config, (replicas, shards) = case.experiment.train, found.mesh
    model, mesh = make_model(case.experiment, case.manifest), make_mesh(found.mesh)
    state = _step(case).abstract
    key = jax.random.key(0, impl="rbg")
    catalogue = planner.catalogue_shapes(case.experiment, case.manifest)
    wanted = jax.eval_shape(lambda b, c: model.ids(b, c, key).ids, case.batch, catalogue)
    dense = [group for group in model.layout.groups.values() if DENSE in stacks(group)]
    # in each part the layers' gradients; once those of the dense stack, of each group by itself
    expected = {("all-reduce", 8): config.accumulate * _bytes(state.params["network"])}
    if dense:
        expected["all-reduce", 8] += len(dense) * _bytes(state.params[DENSE])
    for stack, table in state.tables.items():
        places = sum(
            math.prod(ids.shape[:-1]) * slots.ids
            for group, ids in wanted.items()
            for slots in model.layout.groups[group]
            if slots.place.stack == stack
        )
        width, gradient = table.shape[1], table.shape[1] * computed_dtype(table).itemsize
        if shards == 1:  # all devices get all ids and gradients
            expected["all-gather", 8] = (4 + gradient) * places
            continue
        sizes = default_buffers(places, mesh)
        sent = shards * sizes.places  # ids out, rows and numbers back, gradients and numbers back
        row = width * table.dtype.itemsize
        expected["all-to-all", shards] = sent * (4 + row + 4 + gradient + 4)
        if replicas > 1:
            expected["all-gather", replicas] = 4 * sent * replicas
            expected["all-reduce", replicas] = gradient * sizes.window
    # single numbers, such as the rounds of an exchange, aside
    actual = {(c.how, c.over): c.size for c in found.collectives if c.size > 64}
    if case.manifest.items:  # vectors of the negatives, which all parts share; their gradients
        size = config.negatives.count * case.experiment.model.width * 4
        expected["all-gather", 8] = expected.get(("all-gather", 8), 0) + size
        expected["all-reduce", 8] += config.accumulate * size
    assert actual.keys() == expected.keys()
    for kind, size in expected.items():
        assert actual[kind] == pytest.approx(size, rel=0.1), kind


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_virtual_devices_say_what_devices_here_say(monkeypatch: pytest.MonkeyPatch) -> None:
    small = _clicks({"user": 1}, {"width": 8, "towers": "shared_bottom"}, 64, mesh=[2, 4])
    manifest = assumed_manifest(small, {"user": 1000})
    here = planner._compiled(small, manifest, (2, 4), {})
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert planner._compiled(small, manifest, (2, 4), {}) == here
    assert here.collectives


def test_collectives_are_read_from_a_program() -> None:
    program = """
%body.1 (p: f32[]) -> f32[] {
  %a = (f32[4,2]{1,0}, s32[4]{0}) all-to-all(%b, %c), replica_groups=[2,4]<=[8]
}
ENTRY %main (p: f32[]) -> f32[] {
  %w = f32[] while(%p), condition=%c.1, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups={}
  %d = bf16[16]{0} all-gather-done(%g)
  %r = pred[7]{0} all-reduce(%y), replica_groups={{0},{1}}, to_apply=%add
}
"""
    assert planner.collectives_in(program, 8) == (
        Collective("all-gather", 8, 1, 32),
        Collective("all-to-all", 4, 3, 3 * (32 + 16)),
    )


POD = """
name = "pod"
data = { history_length = 0 }
split = { kind = "random" }
tasks = { click = { kind = "binary" } }
[model]
encoder = "none"
width = 128
fusion = "none"
towers = { kind = "shared_bottom", expert_hidden = [8] }
[features]
user = { on = "request" }
page = { on = "request" }
query = { on = "request" }
advert = { on = "request" }
device = { on = "request" }
[tables]
user = { update = "sparse" }
page = { update = "sparse" }
query = { update = "sparse" }
advert = { update = "sparse" }
device = { update = "sparse" }
[train]
steps = 10
batch_size = 65536
row_optimizer = "rowwise_adagrad"
mesh = [2, 128]
"""


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    (tmp_path / "pod.toml").write_text(POD)
    return tmp_path / "pod.toml"


@pytest.mark.slow
def test_ten_thousand_million_rows_are_planned_on_256_devices(
    pod: Path, mtrec: Callable[..., tuple[int, str, str]]
) -> None:
    rows = [text for name in FEATURES for text in ("--rows", f"{name}=2e9")]
    status, out, _ = mtrec("plan", pod, "--devices", 256, "--device-memory", "80GB", *rows)
    assert status == 0
    assert "train.mesh = [2, 128]" in out
    lines = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}
    # 10^10 rows of 512 bytes over 128 devices; 4 bytes a row of Adagrad and of scratch
    assert lines["tables"][-2:] == ["40", "GB"]
    assert lines["slots"][-2:] == lines["scratch"][-2:] == ["313", "MB"]
    assert lines["device"][1:] == [
        "2,000,000,002",
        "sparse,",
        "rowwise_adagrad",
        "128",
        "8.13",
        "GB",
    ]
    assert lines["all-to-all"][1] == "128"


def test_a_refusal_has_the_numbers_and_names_what_matters(pod: Path) -> None:
    rows = dict.fromkeys(FEATURES, 2 * 10**9)

    def refused(*overrides: str, devices: int = 256, memory: float = 80e9) -> str:
        experiment = mtrec_jax.load_experiment(pod, overrides)
        with pytest.raises(ConfigError) as error:
            plan(experiment, devices, rows=rows, device_memory=memory)
        return str(error.value)

    # 5.12 TB of tables: 160 GB on each of 32 shards
    text = refused("train.mesh=[0,32]")
    assert "pod needs 163 GB on each of 256 devices, which have 80 GB: tables 160 GB" in text
    assert "What matters here: more devices a table (train.mesh = [8, 32])" in text
    assert 'train.row_precision = "bfloat16"' in text
    text = refused("train.row_precision=bfloat16", memory=10e9)
    assert "tables 20 GB" in text
    assert "What matters here: a rule with small slots" in text  # 128 devices are the most
    # a table of 1 TB is whole on every device, with its moments
    assert 'What matters here: tables.page.update = "sparse"' in refused("tables.page.update=dense")


@pytest.mark.slow
def test_what_a_step_works_with_is_part_of_a_refusal(pod: Path) -> None:
    changes = ["train.mesh=[2,4]", "model.width=8", "train.batch_size=4096"]
    experiment = mtrec_jax.load_experiment(pod, changes)
    rows = dict.fromkeys(FEATURES, 1000)
    needed = plan(experiment, 8, rows=rows).bytes
    with pytest.raises(ConfigError) as error:
        plan(experiment, 8, rows=rows, device_memory=needed - 1.0)
    assert f"pod needs {bytes_text(needed)} on each of 8 devices" in str(error.value)
    assert "What matters here: train.batch_size, train.accumulate, more devices" in str(error.value)


def test_sizes_are_asked_for_and_checked(pod: Path, mtrec: Any) -> None:
    experiment = mtrec_jax.load_experiment(pod, ["train.mesh=[1,1]"])
    with pytest.raises(ConfigError, match=r"page, query, advert, device are .*rows= page"):
        plan(experiment, 8, rows={"user": 5})
    with pytest.raises(ConfigError, match=r"rows= usr: no such table.*Did you mean 'user'"):
        plan(experiment, 8, rows={"usr": 5})
    with pytest.raises(ConfigError, match=r"user: a table of 10,000,000,002 rows .*hash_rows"):
        plan(experiment, 8, rows=dict.fromkeys(FEATURES, 9) | {"user": 10**10})
    split = mtrec_jax.load_experiment(pod, ["train.mesh=[0,1]"])
    with pytest.raises(ConfigError, match="batch_size: 65536 does not divide over 48 devices"):
        plan(split, 48, rows=dict.fromkeys(FEATURES, 9))
    with pytest.raises(ConfigError, match="user has been given 5 rows already"):
        parse_rows(["user=5", "user=6"])
    for option, text, message in (
        ("--device-memory", "lots", "--device-memory lots: write a number above 0 with its unit"),
        ("--device-memory", "0GB", "such as 80GB"),
        ("--device-memory", "25", "--device-memory 25: write a number above 0 with its unit"),
        ("--rows", "user", "--rows user: write it as item=1e9"),
        ("--rows", "click=5", "--rows click: no such table"),
        ("--rows", "item=5", "no such table; there are user, page, query, advert, device."),
        ("--devices", "6", "train.mesh: [4, 2] needs 8 devices, there are 6"),
    ):
        status, _, err = mtrec("plan", pod, "--set", "train.mesh=[4,2]", option, text)
        assert status == 2
        assert message in err


def test_shared_rows_and_capacities_are_the_size_of_a_table(pod: Path) -> None:
    sizes = dict.fromkeys(FEATURES[2:], 1000)
    changes = ["tables.page.capacity=5000", "tables.user.hash_rows=3_000_000"]
    experiment = mtrec_jax.load_experiment(pod, changes)
    layout = make_model(experiment, assumed_manifest(experiment, sizes)).layout
    rows = {name: place.size for name, place in layout.places.items()}
    assert rows == dict.fromkeys(sizes, 1002) | {"page": 5002, "user": 3_000_002}


@pytest.mark.slow
def test_prepared_data_gives_sizes_shapes_and_buffers(
    shop_prepared: Prepared, shop_experiment: Experiment
) -> None:
    train = replace(shop_experiment.train, mesh=(0, 4))
    tables = {"item": Table(update="sparse")}
    experiment = replace(shop_experiment, train=train, tables=tables)
    manifest = shop_prepared.chosen(experiment).manifest
    batch = put_batch(BatchSource(shop_prepared, "train", 8)[0], make_mesh((1, 1)))
    pairs = (
        (batch, batch_shapes(experiment, manifest)),
        (load_catalogue(shop_prepared, experiment), planner.catalogue_shapes(experiment, manifest)),
    )
    for actual, assumed in pairs:
        shapes = [jax.tree.leaves_with_path(tree) for tree in (actual, assumed)]
        for (path, one), (where, other) in zip(*shapes, strict=True):
            assert (path, one.shape, jnp.dtype(one.dtype)) == (where, other.shape, other.dtype)
    found = plan(experiment, 8, shop_prepared)
    assert found.mesh == (2, 4)
    # a device's 33 places of 60 items, over four owners
    assert 2 < found.buffers["lazy_adam"].places < 33
    assert {table.name: table.split for table in found.tables}["item"] == 4
    assert {table.stack for table in found.tables if table.split == 1} == {DENSE}
    with pytest.raises(ConfigError, match=r"tables 8 GB.*catalogue 28 GB"):  # other sizes
        plan(experiment, 8, shop_prepared, {"item": 10**9}, device_memory=1e9)


def test_data_that_were_prepared_otherwise_are_refused(
    shop_prepared: Prepared, shop_experiment: Experiment
) -> None:
    other = replace(shop_experiment, data=replace(shop_experiment.data, history_length=5))
    with pytest.raises(ConfigError, match="was prepared for another experiment"):
        plan(other, 1, shop_prepared)
