"""Batches as a pure function of (seed, s), from a folder of several small blocks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_jax.config import Experiment, to_toml
from mtrec_jax.data.dataset import Prepared, fixed_size
from mtrec_jax.data.pipeline import BatchSource, training_batches
from mtrec_jax.errors import Stalled
from mtrec_jax.types import Batch
from tests import tiny

EXAMPLES, BLOCK, SIZE = 45, 7, 8  # 7 blocks, the last of 3; 6 batches, the last of 5


def _columns(n: int) -> dict[str, np.ndarray]:
    """Example i is user i: its targets are rows 2 i and 2 i + 1, the latter padding if i is odd."""
    place = np.arange(n)
    rows = np.stack([2 * place, np.where(place % 2, -1, 2 * place + 1)], axis=1)
    click = np.stack([place % 2, np.full(n, np.nan)], axis=1).astype(np.float32)
    return {
        "user": place.astype(np.int32),
        "context_segment": (place % 5).astype(np.int32),
        "context_tags": np.stack([place % 7, place % 3, place * 0], axis=1).astype(np.int32),
        "context_age": place.astype(np.float32) / 3,
        "request_hour": np.stack([place % 6, place % 4], axis=1).astype(np.int32),
        "request_discount": rows.astype(np.float32) / 7,
        "event_item": np.stack([place, place + 1, place + 2], axis=1).astype(np.int32),
        "event_click": np.ones((n, 3), np.int32),
        "cutoff": np.tile(np.array([[2, 3]], np.int32), (n, 1)),
        "candidate": np.where(rows >= 0, place[:, None] + 3, 0).astype(np.int32),
        "label_next": np.where(rows >= 0, 1, np.nan).astype(np.float32),
        **{f"label_{task}": click for task in ("click", "stars", "genre")},
        "row": rows.astype(np.int64),
    }


def _write(folder: Path, split: str, n: int) -> None:
    columns = {k: fixed_size(a) if a.ndim == 2 else pa.array(a) for k, a in _columns(n).items()}
    pq.write_table(pa.table(columns), folder / f"{split}.parquet", row_group_size=BLOCK)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("prepared")
    for split, n in (("train", EXAMPLES), ("validation", 2 * SIZE), ("test", 0)):
        _write(folder, split, n)
    assert pq.ParquetFile(folder / "train.parquet").num_row_groups == 7
    return Prepared(folder, replace(tiny.manifest(), history_length=3))


def _users(batches: Sequence[Batch]) -> list[int]:
    """Users of the examples that count, in order."""
    return [int(u) for b in batches for u in np.asarray(b.user)[np.asarray(b.weight)[:, 0] > 0]]


def _assert_equal(one: Batch, other: Batch) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), one, other)


def test_batch_s_is_a_pure_function_of_the_seed_and_s(prepared: Prepared) -> None:
    source = BatchSource(prepared, "train", SIZE, seed=3, epochs=3)
    assert (len(source), source.batches_per_epoch) == (18, 6)
    sequential = [source[s] for s in range(18)]
    order = np.random.default_rng(0).permutation(18).tolist()
    for s in order:
        _assert_equal(BatchSource(prepared, "train", SIZE, seed=3, epochs=3)[s], sequential[s])
    longer = BatchSource(prepared, "train", SIZE, seed=3, epochs=9)
    _assert_equal(longer[17], sequential[17])
    assert _users([BatchSource(prepared, "train", SIZE, seed=4)[0]]) != _users(sequential[:1])


def test_an_epoch_visits_every_example_once_in_an_order_of_its_own(prepared: Prepared) -> None:
    source = BatchSource(prepared, "train", SIZE, seed=3, epochs=3)
    epochs = [_users([source[s] for s in range(e * 6, e * 6 + 6)]) for e in range(3)]
    for users in epochs:
        assert sorted(users) == list(range(EXAMPLES))
    assert len({tuple(users) for users in epochs}) == 3
    blocks = [[user // BLOCK for user in users] for users in epochs]
    assert blocks[0] != blocks[1]  # blocks are shuffled,
    first = [[u for u in users if u < BLOCK] for users in epochs]
    assert first[0] != first[1]  # and so are the examples inside


def test_the_last_batch_of_an_epoch_is_filled_with_weight_0(prepared: Prepared) -> None:
    last = BatchSource(prepared, "train", SIZE, seed=3)[5]
    filling = np.arange(SIZE) >= EXAMPLES - 5 * SIZE
    np.testing.assert_array_equal(np.asarray(last.weight)[:, 0] == 0, filling)
    for values in (last.weight, last.candidate, last.user, last.cutoff, *last.mask.values()):
        np.testing.assert_array_equal(np.asarray(values)[filling], 0)
    np.testing.assert_array_equal(np.asarray(last.row)[filling], -1)
    assert all(np.isfinite(values).all() for values in last.labels.values())


def test_a_batch_is_the_example_s_columns(prepared: Prepared) -> None:
    for found in (BatchSource(prepared, "train", SIZE, seed=3)[s] for s in range(5)):
        columns = {name: values[found.user] for name, values in _columns(EXAMPLES).items()}
        ids = [columns["context_segment"][:, None], columns["context_tags"]]
        np.testing.assert_array_equal(found.context["ids"], np.concatenate(ids, axis=1))
        np.testing.assert_array_equal(found.context["numbers"][:, 0], columns["context_age"])
        np.testing.assert_array_equal(found.request["ids"][..., 0], columns["request_hour"])
        np.testing.assert_array_equal(found.request["numbers"][..., 0], columns["request_discount"])
        np.testing.assert_array_equal(found.events["item"], columns["event_item"])
        np.testing.assert_array_equal(found.events["ids"][..., 0], columns["event_click"])
        np.testing.assert_array_equal(found.cutoff, columns["cutoff"])
        np.testing.assert_array_equal(found.candidate, columns["candidate"])
        np.testing.assert_array_equal(found.row, columns["row"])
        np.testing.assert_array_equal(found.weight, columns["row"] >= 0)
        # a missing label, or one outside its sample space, is masked and reads 0
        observed = ~np.isnan(columns["label_click"])
        np.testing.assert_array_equal(found.mask["click"], observed)
        labels = np.where(observed, columns["label_click"], 0)
        np.testing.assert_array_equal(found.labels["click"], labels)


def test_floats_have_the_declared_precision(prepared: Prepared) -> None:
    found = BatchSource(prepared, "train", SIZE, seed=3, dtype="float64")[0]
    numbers = (found.context["numbers"], found.request["numbers"])
    parts = (*numbers, found.weight, *found.labels.values(), *found.mask.values())
    assert {np.asarray(part).dtype for part in parts} == {np.dtype("float64")}


def test_evaluation_keeps_the_order_of_the_file(prepared: Prepared) -> None:
    for split, examples in (("train", EXAMPLES), ("validation", 2 * SIZE)):
        source = BatchSource(prepared, split, SIZE)
        assert _users([source[s] for s in range(len(source))]) == list(range(examples))


def test_an_empty_split_is_one_batch_of_padding(prepared: Prepared) -> None:
    source = BatchSource(prepared, "test", SIZE)
    (only,) = (source[s] for s in range(len(source)))
    assert only.candidate.shape == (SIZE, 2)
    np.testing.assert_array_equal(only.weight, 0)


@pytest.mark.parametrize("consumed", [0, 4, 6, 13])
def test_the_state_of_the_iterator_resumes_exactly(prepared: Prepared, consumed: int) -> None:
    def batches() -> Any:
        return training_batches(BatchSource(prepared, "train", SIZE, seed=3, epochs=3))

    through = batches()
    for _ in range(consumed):
        next(through)
    state = through.get_state()
    rest = list(through)
    assert len(rest) == 18 - consumed
    resumed = batches()
    resumed.set_state(state)
    for expected, found in zip(rest, resumed, strict=True):
        _assert_equal(found, expected)


@pytest.mark.parametrize("cached", [True, False])
def test_a_split_larger_than_memory_is_decoded_block_by_block(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """It gives the same batches as one that fits, which is decoded once for all epochs."""
    whole = BatchSource(prepared, "train", SIZE, seed=3, epochs=2)
    expected = [whole[s] for s in range(12)]
    decoded: list[int] = []
    decode = BatchSource._decode

    def counted(source: BatchSource, block: int | None) -> Batch:
        decoded.extend([] if block is None else [block])
        return decode(source, block)

    monkeypatch.setattr(BatchSource, "_decode", counted)
    if not cached:
        monkeypatch.setattr("mtrec_jax.data.pipeline.CACHE_BYTES", 0)
    source = BatchSource(prepared, "train", SIZE, seed=3, epochs=2)
    for s in range(12):
        _assert_equal(source[s], expected[s])
    assert sorted(decoded) == sorted([*range(7)] * (1 if cached else 2))
    assert len(source._decoded) == (7 if cached else 0)


def test_threads_may_share_a_source(prepared: Prepared) -> None:
    source = BatchSource(prepared, "train", SIZE, seed=3, epochs=5)
    expected = [source[s] for s in range(30)]
    shared = BatchSource(prepared, "train", SIZE, seed=3, epochs=5)
    with ThreadPoolExecutor(4) as pool:
        for s, found in enumerate(pool.map(shared.__getitem__, range(30))):
            _assert_equal(found, expected[s])


def test_a_batch_that_does_not_come_is_noticed(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, decode = threading.Event(), BatchSource._decode

    def slow(source: BatchSource, block: int | None) -> Batch:
        if block is not None:
            answers.wait(60)
        return decode(source, block)

    monkeypatch.setattr(BatchSource, "_decode", slow)
    monkeypatch.setattr("mtrec_jax.data.pipeline._PATIENCE", 1)
    source = BatchSource(prepared, "train", SIZE, timeout=2)
    batches = training_batches(source)
    with pytest.raises(Stalled, match="no batch came for 2 s"):
        next(batches)
    assert capsys.readouterr().err == "waiting for a batch, 1 s so far: is the storage slow?\n"
    answers.set()
    assert len(source[0].user) == SIZE


STALLED = """
import sys, threading
from mtrec_jax import cli
from mtrec_jax.data.pipeline import BatchSource

BatchSource._read = lambda *arguments: threading.Event().wait()
cli.main()
"""


@pytest.mark.slow
def test_a_command_ends_although_storage_still_hangs(
    shop_experiment: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    train = replace(shop_experiment.train, input_timeout=1)
    (tmp_path / "shop.toml").write_text(to_toml(replace(shop_experiment, train=train)), "utf-8")
    arguments = ["train", "shop.toml", "--prepared", str(shop_prepared.folder), "--run", "run"]
    done = subprocess.run(
        [sys.executable, "-c", STALLED, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "mtrec: no batch came for 1 s" in done.stderr


def test_batches_by_length_have_every_target_once_and_no_more_places_than_needed(
    tmp_path: Path,
) -> None:
    """Of L = 8 in four classes: batches of 4 examples of up to 8 or 6 places, of 8 of up to 4, and
    of 16 of up to 2."""
    rng, n = np.random.default_rng(0), 100
    length = rng.integers(1, 9, n).astype(np.int32)
    places = np.arange(8) < length[:, None]
    rows = np.where(places, np.arange(8 * n).reshape(n, 8), -1)
    columns = _columns(n) | {
        "length": length,
        "event_item": np.where(places, rows % 50 + 2, 0).astype(np.int32),
        "event_click": np.where(places, 1, 0).astype(np.int32),
        "cutoff": np.where(places, np.arange(8), 0).astype(np.int32),
        "candidate": np.where(places, rows % 50 + 3, 0).astype(np.int32),
        "row": rows,
        "request_hour": np.where(places, 1, 0).astype(np.int32),
        "request_discount": np.where(places, 0.5, 0).astype(np.float32),
        **{f"label_{t}": np.where(places, 1, np.nan).astype(np.float32) for t in tiny.TASKS},
    }
    table = {k: fixed_size(a) if a.ndim == 2 else pa.array(a) for k, a in columns.items()}
    pq.write_table(pa.table(table), tmp_path / "train.parquet", row_group_size=40)
    manifest = replace(tiny.manifest(), history_length=8, positions={"train": 8})
    source = BatchSource(Prepared(tmp_path, manifest), "train", 4, seed=1, epochs=2, buckets=4)
    shapes = {8: 4, 6: 4, 4: 8, 2: 16}
    for epoch in range(2):
        first = epoch * source.batches_per_epoch
        every = []
        for s in range(first, first + source.batches_per_epoch):
            batch = source[s]
            found = np.asarray(batch.row)
            size, cut = found.shape
            assert size == shapes[cut]
            assert batch.events["item"].shape == batch.cutoff.shape == (size, cut)
            filled = (found >= 0).sum(axis=1)
            assert (filled[filled > 0] > cut - 2).all()
            np.testing.assert_array_equal(np.asarray(batch.events["item"]) > 0, found >= 0)
            every.append(found[found >= 0])
        np.testing.assert_array_equal(np.sort(np.concatenate(every)), rows[rows >= 0])
    again = BatchSource(source._prepared, "train", 4, seed=1, epochs=2, buckets=4)
    _assert_equal(again[source.batches_per_epoch + 3], source[source.batches_per_epoch + 3])
    one, other = (
        [source[e + s].cutoff.shape for s in range(9)] for e in (0, source.batches_per_epoch)
    )
    assert one != other, "epochs are mixed anew"
