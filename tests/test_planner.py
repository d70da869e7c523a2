"""Plans: a pod from table sizes alone, refusals with what would fit, and every row in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtrec_jax
from mtrec_jax import ConfigError, Device, plan
from mtrec_jax.config import Experiment
from mtrec_jax.data.assumed import assumed_manifest, batch_shapes, catalogue_shapes
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.evaluation.inference import load_catalogue
from mtrec_jax.models.network import make_plan
from mtrec_jax.planner import check_placement
from mtrec_jax.quantities import parse_rows, quantity_text
from mtrec_jax.sharding import make_mesh, put_batch
from mtrec_jax.tables.layout import spread
from mtrec_jax.train.costs import places_of_batch, state_shapes

pytestmark = pytest.mark.usefixtures("compiled_programs")

POD = """
name = "pod"
data = { kind = "rows" }
split = { kind = "random" }
tasks = { click = { kind = "binary" } }
[model]
encoder = "none"
width = 128
fusion = "none"
towers = "shared_bottom"
expert_hidden = [8]
[features]
user = { placement = "sparse" }
page = { placement = "sparse" }
query = { placement = "sparse" }
advert = { placement = "sparse" }
device = { placement = "sparse" }
[train]
steps = 10
batch_size = 65536
row_optimizer = "rowwise_adagrad"
"""
FEATURES = ("user", "page", "query", "advert", "device")


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    (tmp_path / "pod.toml").write_text(POD)
    return tmp_path / "pod.toml"


def test_ten_thousand_million_rows_are_planned_on_256_devices(
    pod: Path, mtrec: Callable[..., tuple[int, str, str]]
) -> None:
    rows = [text for name in FEATURES for text in ("--rows", f"{name}=2e9")]
    status, out, _ = mtrec("plan", pod, "--devices", 256, "--device-memory", "80GB", *rows)
    assert status == 0
    # 10^10 rows of 512 bytes over 128 devices; 4 bytes a row of Adagrad and of scratch
    assert "train.mesh = [2, 128]" in out
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert lines["tables"].split()[-2:] == ["40", "GB"]
    assert lines["slots"].split()[-2:] == lines["scratch"].split()[-2:] == ["313", "MB"]
    assert "rowwise_adagrad-5" in lines["context.device"]
    assert "bound by network" in " ".join(out.split())


def test_what_does_not_fit_names_the_cheapest_change_that_does(pod: Path) -> None:
    rows = dict.fromkeys(FEATURES, 2 * 10**9)

    def refused(*overrides: str, devices: int = 256, memory: float = 80e9) -> str:
        experiment = mtrec_jax.load_experiment(pod, overrides)
        with pytest.raises(ConfigError) as error:
            plan(experiment, devices=devices, rows=rows, device=Device(memory=memory))
        return str(error.value)

    # 5.12 TB of tables: 160 GB on each of 32 shards, though 128 would do
    text = refused("train.mesh=[0,32]")
    assert "pod needs 163 GB on each of 256 devices, which have 80 GB" in text
    assert text.endswith("fits: train.mesh=[2,128] (40.6 GB on each)")
    # 41 GB; half of it with bfloat16
    assert "train.row_precision=bfloat16 train.mesh=[2,128]" in refused(memory=30e9)
    # 120 GB with the moments of Adam, which bfloat16 does not halve
    adam = refused("train.row_optimizer=lazy_adam")
    assert "fits: train.row_optimizer=rowwise_adagrad train.mesh=[2,128]" in adam
    assert "512 devices" not in adam
    # eight devices hold a sixteenth of it
    assert "fits: 64 devices with train.row_precision=bfloat16" in refused(devices=8, memory=50e9)
    assert "Nothing near fits" in refused(memory=1e9)
    # a table of 1 TB is whole on every device, with its moments
    dense = "features.user.placement=dense"
    assert "fits: model.item_placement=sparse and placement=sparse of the features, train" in (
        refused(dense)
    )
    few = refused(dense, devices=8, memory=60e9)
    assert "fits: 64 devices with model.item_placement=sparse and placement=sparse of" in few
    assert "train.row_precision=bfloat16" in few
    assert "128 table shards neither" in refused("train.batch_size=8", devices=8)  # not over 16


def test_what_the_exchange_needs_is_part_of_a_refusal(pod: Path) -> None:
    experiment = mtrec_jax.load_experiment(pod, ["train.mesh=[0,8]", "train.accumulate=64"])
    rows = dict.fromkeys(FEATURES, 1000)
    needed = plan(experiment, devices=8, rows=rows).bytes
    with pytest.raises(ConfigError) as error:
        plan(experiment, devices=8, rows=rows, device=Device(memory=needed - 1.0))
    said = str(error.value)
    assert f"pod needs {quantity_text(needed)} on each of 8 devices" in said
    assert "of it: working memory" in said
    assert "fits: train.mesh=[1,8]" not in said
    with pytest.raises(ConfigError, match="Nothing near fits: a smaller train"):
        plan(experiment, devices=8, rows=rows, device=Device(memory=1e5))


def test_sizes_are_asked_for_and_checked(pod: Path, mtrec: Any) -> None:
    experiment = mtrec_jax.load_experiment(pod)
    with pytest.raises(ConfigError, match=r"page, query, advert, device are .*--rows page"):
        plan(experiment, devices=8, rows={"user": 5})
    with pytest.raises(ConfigError, match=r"--rows usr: no such table.*Did you mean 'user'"):
        plan(experiment, devices=8, rows={"usr": 5})
    with pytest.raises(ConfigError, match="batch_size: 65536 does not divide over 48 devices"):
        plan(experiment, devices=48, rows=dict.fromkeys(FEATURES, 9))
    with pytest.raises(ConfigError, match="user has been given 5 rows already"):
        parse_rows(["user=5", "user=6"])
    fixed = mtrec_jax.load_experiment(pod, ["train.mesh=[3,2]"])
    with pytest.raises(ConfigError, match=r"train.mesh: \[3, 2\] does not fill 8 devices"):
        plan(fixed, devices=8, rows=dict.fromkeys(FEATURES, 9))
    for option, text, message in (
        ("--device-memory", "lots", "--device-memory lots: write a number above 0 with its unit"),
        ("--bandwidth", "0GB/s", "such as 80GB/s"),
        ("--bandwidth", "25", "--bandwidth 25: write a number above 0 with its unit"),
        ("--rows", "user", "--rows user: write it as item=1e9"),
        ("--rows", "click=5", "--rows click: no such table"),
        ("--rows", "item=5", "no such table; there are user, page, query, advert, device."),
    ):
        status, _, err = mtrec("plan", pod, option, text)
        assert status == 2
        assert message in err


def test_every_row_and_slot_has_one_place(pod: Path) -> None:
    experiment = mtrec_jax.load_experiment(pod, ["train.row_optimizers.page=lazy_adam"])
    manifest = assumed_manifest(experiment, dict(zip(FEATURES, (300, 7, 50, 129, 1), strict=True)))
    layout, state = make_plan(experiment, manifest), state_shapes(experiment, manifest)
    check_placement(layout, state, 8)
    for stack, rows in layout.rows.items():  # by hand: the shard of each row of each table
        numbers = [
            np.arange(f.offset, f.offset + f.size)
            for f in layout.fields.values()
            if f.stack == stack
        ]
        taken = np.concatenate(numbers)
        places = np.asarray(spread(jnp.asarray(taken, jnp.int32), rows))
        assert len(set(places)) == len(places) == sum(map(len, numbers))
        assert places.max() < rows == state.tables[stack].shape[0]
    fields = layout.fields | {"twice": replace(layout.fields["context.user"], owner="twice")}
    with pytest.raises(AssertionError, match="begins at row 0"):
        check_placement(layout._replace(fields=fields), state, 8)
    short: Any = {s: jax.ShapeDtypeStruct((128,), "int32") for s in state.scratch}
    with pytest.raises(AssertionError, match="rowwise_adagrad"):
        check_placement(layout, state._replace(scratch=short), 8)


def test_prepared_data_gives_sizes_shapes_and_buffers(
    shop_prepared: Prepared, shop_experiment: Experiment
) -> None:
    manifest = shop_prepared.manifest
    mesh = make_mesh((1, 1))
    batch = put_batch(BatchSource(shop_prepared, "train", 8)[0], mesh)
    catalogue = load_catalogue(shop_prepared, shop_experiment)
    pairs = (
        (batch, batch_shapes(shop_experiment, manifest, 8)),
        (catalogue, catalogue_shapes(shop_experiment, manifest)),
    )
    for actual, assumed in pairs:
        shapes = [jax.tree.leaves_with_path(tree) for tree in (actual, assumed)]
        for (path, one), (where, other) in zip(*shapes, strict=True):
            assert (path, one.shape, one.dtype) == (where, other.shape, other.dtype)
    model = replace(
        shop_experiment.model, item_placement="sparse", fusion="none", towers="shared_bottom"
    )
    train = replace(shop_experiment.train, mesh=(0, 4))
    found = plan(
        replace(shop_experiment, model=model, train=train), devices=8, prepared=shop_prepared
    )
    assert found.mesh == (2, 4)
    assert found.measured
    # a device's 33 places of 60 items, over four owners
    assert 2 < found.buffers["lazy_adam"].places < 33


def test_data_that_were_prepared_otherwise_are_refused(
    shop_prepared: Prepared, shop_experiment: Experiment
) -> None:
    other = replace(shop_experiment, data=replace(shop_experiment.data, history_length=5))
    with pytest.raises(ConfigError, match=r"was prepared with other \[data\] settings"):
        plan(other, prepared=shop_prepared)


def test_shared_rows_and_capacities_are_the_size_of_a_table(pod: Path) -> None:
    sizes = dict.fromkeys(FEATURES, 1000)
    with pytest.raises(ConfigError, match=r"--rows user: 10,000,000,000 values .* hash them"):
        plan(mtrec_jax.load_experiment(pod), devices=8, rows=sizes | {"user": 10**10})
    del sizes["page"], sizes["user"]
    changes = ["features.page.capacity=5000", "features.user.hash_rows=3_000_000"]
    found = plan(mtrec_jax.load_experiment(pod, changes), devices=8, rows=sizes)
    rows = {table.owner.removeprefix("context."): table.rows for table in found.tables}
    assert rows == dict.fromkeys(sizes, 1002) | {"page": 5002, "user": 3_000_002}
    experiment = mtrec_jax.load_experiment(pod, changes)
    places = places_of_batch(experiment, assumed_manifest(experiment, sizes))
    assert places == {"rowwise_adagrad": 6 * 65536}  # a hashed id asks for two rows


def test_what_a_step_reads_does_not_grow_with_the_catalogue(shop_experiment: Experiment) -> None:
    model = replace(
        shop_experiment.model, item_placement="sparse", fusion="none", towers="shared_bottom"
    )
    experiment = replace(
        shop_experiment, model=model, train=replace(shop_experiment.train, mesh=(0, 1))
    )
    sizes = dict.fromkeys(["segment", "age_group", "category", "brand"], 10)
    sizes |= dict.fromkeys(["click", "cart", "buy", "stars"], 2)
    small, large = (
        plan(
            experiment,
            devices=8,
            rows=sizes | {"item": items},
            device=Device(memory=1e12),
        )
        for items in (10**6, 10**9)
    )
    assert small.seconds["memory reads"] == large.seconds["memory reads"]
    assert 900 < large.memory["catalogue"] / small.memory["catalogue"] < 1100


@pytest.mark.slow
def test_items_have_room_for_their_capacity() -> None:
    changes = ["model.item_placement=sparse", "model.item_capacity=9000"]
    shop = mtrec_jax.load_experiment("shop", changes)
    sizes = dict.fromkeys(["segment", "age_group", "category", "brand"], 10)
    sizes |= dict.fromkeys(["click", "cart", "buy", "stars"], 2)
    found = plan(replace(shop, train=replace(shop.train, batch_size=64)), devices=1, rows=sizes)
    assert {table.owner: table.rows for table in found.tables}["item"] == 9002
