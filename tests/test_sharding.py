"""Meshes, and the errors of those that cannot be."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mtrec_jax.errors import ConfigError
from mtrec_jax.sharding import check_batch_size, cut_examples, make_mesh, put_batch
from tests import tiny


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((0, 1), (8, 1)), ((0, 2), (4, 2)), ((2, 0), (2, 4)), ((1, 1), (1, 1)), ((8, 1), (8, 1))],
)
def test_zero_stands_for_the_devices_that_are_left(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    mesh = make_mesh(shape)
    assert (mesh.shape["data"], mesh.shape["table"]) == expected


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 4), r"train\.mesh: \[4, 4\] needs 16 devices, there are 8; .*takes one"),
        ((9, 1), r"train\.mesh: \[9, 1\] needs 9 devices, there are 8; .*takes one"),
        ((0, 16), r"train\.mesh: \[0, 16\] needs 16 devices, there are 8; .*takes one"),
        ((0, 0), r"train\.mesh: \[0, 0\]: 0, all that are left, can stand once only"),
        (
            (2, 3),
            r"train\.mesh: 3 table shards; tables have 128 equal parts, .*128 shards are possible",
        ),
    ],
)
def test_a_mesh_larger_than_the_machine_is_an_error(shape: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make_mesh(shape)


def test_a_batch_must_divide_over_the_devices() -> None:
    mesh = make_mesh((4, 2))
    check_batch_size(64, mesh)
    message = (
        r"^train\.batch_size: 60 does not divide over 8 devices; use a multiple of 8, or fewer "
        r"devices \(one trains with train\.mesh = \[1, 1\]\)$"
    )
    with pytest.raises(ConfigError, match=message):
        check_batch_size(60, mesh)
    check_batch_size(64, mesh, 8)
    message = (
        r"^train\.batch_size, train\.accumulate: 40 does not divide into 2 parts over 8 devices; "
        r"use a multiple of 16, or fewer parts$"
    )
    with pytest.raises(ConfigError, match=message):
        check_batch_size(40, mesh, 2)


def test_every_device_cuts_the_examples_that_it_has() -> None:
    mesh = make_mesh((4, 2))
    examples = put_batch(tiny.batch(0, size=32), mesh)
    cut = jax.jit(lambda batch: cut_examples(batch, 2, mesh)).lower(examples).compile()
    parts = cut(examples)
    for whole, part in zip(jax.tree.leaves(examples), jax.tree.leaves(parts), strict=True):
        assert part.shape == (2, 16, *whole.shape[1:])
        own = {s.device: np.asarray(s.data) for s in whole.addressable_shards}
        for shard in part.addressable_shards:
            np.testing.assert_array_equal(
                np.asarray(shard.data).reshape(own[shard.device].shape), own[shard.device]
            )
    words = ("all-to-all", "all-gather", "collective-permute", "all-reduce")
    text = cut.as_text() or ""
    assert text
    assert not any(word in text for word in words)


def test_a_batch_is_split_over_all_devices_in_order() -> None:
    examples = tiny.batch(0, size=16)
    placed = put_batch(examples, make_mesh((4, 2)))
    assert placed.row is None, "source rows stay on the host"
    leaves = jax.tree.leaves(examples._replace(row=None)), jax.tree.leaves(placed)
    for whole, split in zip(*leaves, strict=True):
        assert {shard.data.shape[0] for shard in split.addressable_shards} == {2}
        assert len({shard.device for shard in split.addressable_shards}) == 8
        np.testing.assert_array_equal(split, whole)
