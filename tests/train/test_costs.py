"""What the planner says of a step, against the compiled program on eight devices."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtrec_jax.config import Experiment
from mtrec_jax.data.assumed import assumed_manifest, batch_shapes, catalogue_shapes, resized
from mtrec_jax.data.dataset import Manifest
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.model import make_model
from mtrec_jax.planner import Device, plan_on
from mtrec_jax.sharding import AXES, make_mesh
from mtrec_jax.tables.exchange import default_buffers
from mtrec_jax.train import costs
from mtrec_jax.train.loop import STEPS_IN_FLIGHT
from mtrec_jax.train.step import make_step
from tests import tiny

LENGTH, SIZE = 24, 256


class Case(NamedTuple):
    """A model whose step is compiled for a mesh of eight devices."""

    experiment: Experiment
    manifest: Manifest
    mesh: tuple[int, int]


def _sequences(mesh: tuple[int, int], **train: Any) -> Case:
    """Histories and retrieval; items, their brands and users' tags are split."""
    experiment = tiny.experiment(
        tasks={"next": {"kind": "retrieval"}, "click": {"kind": "binary"}},
        model={
            "item_placement": "sparse",
            "width": 32,
            "expert_hidden": [64],
            "towers": "shared_bottom",
            "fusion": "none",
        },
        data={"history_length": LENGTH},
        train={"batch_size": SIZE, "negatives": 128, **train},
    )
    manifest = resized(tiny.manifest(), experiment, {"item": 60_000, "tags": 20_000})
    return Case(
        experiment,
        dataclasses.replace(manifest, history_length=LENGTH, positions={"train": LENGTH}),
        mesh,
    )


def _dense_items() -> Case:
    """As above with items updated by optax; all devices hold all tables."""
    case = _sequences((8, 1))
    model = dataclasses.replace(case.experiment.model, item_placement="dense")
    manifest = resized(case.manifest, case.experiment, {"item": 5_000})
    return Case(dataclasses.replace(case.experiment, model=model), manifest, (8, 1))


def _rows(mesh: tuple[int, int], **train: Any) -> Case:
    """Rows of a click log with three large features and one small."""
    features = {n: {"placement": "sparse"} for n in ("user", "page", "advert")} | {"device": {}}
    experiment = parse_experiment(
        {
            "name": "clicks",
            "data": {"kind": "rows"},
            "split": {"kind": "random"},
            "features": features | {"age": {"kind": "numeric"}},
            "tasks": {"click": {"kind": "binary"}, "buy": {"kind": "binary"}},
            "model": {"encoder": "none", "width": 64, "fusion": "none"},
            "train": {"steps": 10, "batch_size": 4096, **train},
        }
    )
    sizes = {"user": 100_000, "page": 30_000, "advert": 5_000, "device": 900}
    return Case(experiment, assumed_manifest(experiment, sizes), mesh)


CASES = {
    "sequences, (1, 8), row-wise Adagrad": lambda: _sequences(
        (1, 8), row_optimizer="rowwise_adagrad", optimizer="adagrad"
    ),
    "sequences, (2, 4), lazy Adam, bfloat16": lambda: _sequences((2, 4), row_precision="bfloat16"),
    "sequences, (8, 1), dense items": _dense_items,
    "rows, (4, 2), FTRL": lambda: _rows((4, 2), row_optimizer="ftrl"),
    "rows, (4, 2), lazy Adam, bfloat16": lambda: _rows((4, 2), row_precision="bfloat16"),
    "sequences, (2, 4), in 4 parts": lambda: _sequences((2, 4), accumulate=4),
}


@functools.cache
def _compiled(name: str) -> Any:
    experiment, manifest, shape = CASES[name]()
    mesh = make_mesh(shape)
    step = make_step(experiment, manifest, make_model(experiment, manifest), mesh, 1)

    def all_of(tree: Any, spec: P) -> Any:
        where = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    return step.update.lower(  # type: ignore[attr-defined]
        step.abstract,
        all_of(batch_shapes(experiment, manifest, experiment.train.batch_size), P(AXES)),
        all_of(catalogue_shapes(experiment, manifest), P()),
    ).compile()


SLOW = (
    *("rows, (4, 2), lazy Adam, bfloat16", "sequences, (2, 4), in 4 parts"),
    "sequences, (8, 1), dense items",
)
every_case = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in CASES]
)
SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "u16": 2,
    "bf16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "f64": 8,
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(-start)?\("
)


def moved_in(text: str) -> dict[str, int]:
    """Bytes of the results of all collectives in a compiled program.

    The body of a loop counts as often as it runs where that is known, else once. Those over an
    axis of one device move nothing.
    """
    counted = re.findall(r'body=(%[^,]+),.*"known_trip_count":\{"n":"(\d+)"', text)
    runs = {body: int(n) for body, n in counted}
    found: dict[str, int] = {}
    times = 1
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?(%\S+) \(", line):
            times = runs.get(header[1], 1)
        match = COLLECTIVE.search(line)
        if match and not re.search(r"replica_groups=(\{\{\d+\}|\[\d+,1\])", line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            size = sum(
                SIZES[kind] * math.prod(map(int, filter(None, dims.split(","))))
                for kind, dims in arrays
            )
            found[match[2]] = found.get(match[2], 0) + times * size
    return found


@every_case
def test_memory_is_what_the_compiled_step_takes(name: str) -> None:
    experiment, manifest, mesh = CASES[name]()
    state = costs.state_shapes(experiment, manifest)
    work = costs.work_of_share(experiment, manifest, 8)
    found = plan_on(experiment, manifest, None, state, work, mesh, Device())
    actual = _compiled(name).memory_analysis()
    stored = actual.argument_size_in_bytes
    # the batches of the steps before are on the device as well
    one = found.bytes - found.memory["batches"] * (STEPS_IN_FLIGHT - 1) // STEPS_IN_FLIGHT
    batch = batch_shapes(experiment, manifest, experiment.train.batch_size // 8)
    # on the device, but not given to the program, which does not read it
    unused: list[Any] = [batch.user, batch.row]
    if manifest.items:
        unused.append(batch.labels["next"])
    else:
        unused += [batch.cutoff, batch.candidate, catalogue_shapes(experiment, manifest)]
    assert one - found.memory["working memory"] == stored + costs.size_of(unused)
    assert one == pytest.approx(stored + actual.temp_size_in_bytes, rel=0.1)


@every_case
def test_bytes_are_what_the_compiled_collectives_move(name: str) -> None:
    experiment, manifest, mesh = CASES[name]()
    state = costs.state_shapes(experiment, manifest)
    places = costs.places_of_batch(experiment, manifest)
    split = places if mesh[1] > 1 else {}
    buffers = {stack: default_buffers(n, make_mesh(mesh)) for stack, n in split.items()}
    expected: dict[str, int] = {}
    for moved in costs.moved_by_step(experiment, manifest, state, buffers, mesh):
        expected[moved.how] = expected.get(moved.how, 0) + moved.size
    actual = moved_in(_compiled(name).as_text())
    assert actual.keys() == expected.keys()
    for how, size in expected.items():
        assert size == pytest.approx(actual[how], rel=0.1), how
