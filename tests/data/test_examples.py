"""Encoded events to examples: every target once, and never its own future."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.data import examples
from mtrec_jax.data.dataset import BLOCK, to_arrays
from mtrec_jax.data.examples import (
    MODULUS,
    QUERY,
    Log,
    mix,
    sequence_examples,
    write_examples,
)
from tests.data import small


def test_row_groups_and_random_order(tmp_path: Path) -> None:
    blocks = [{"row": np.arange(n, n + 3000)[:, None]} for n in range(0, 12_000, 3000)]
    assert write_examples(tmp_path / "x.parquet", iter(blocks)) == (12_000, 12_000)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sizes == [BLOCK, BLOCK, 12_000 - 2 * BLOCK]


def test_blocks_of_any_size_hold_the_same_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 users' examples, as one block and as five of at most 16."""
    log = "user,item,rating,time\n" + "".join(
        f"u{user},{'vwxyz'[(user + time) % 5]},{user % 5 + 1},{time}\n"
        for user in range(70)
        for time in range(user % 3, 6)
    )
    for name in ("one", "several"):
        (tmp_path / name).mkdir()
    one = small.run(tmp_path / "one", small.make(), log)
    monkeypatch.setattr(examples, "BLOCK", 16)
    several = small.run(tmp_path / "several", small.make(), log)
    for split in ("train", "validation", "test"):
        whole, cut = one.parquet(split), several.parquet(split)
        assert whole.num_row_groups == 1
        assert cut.num_row_groups == -(-whole.metadata.num_rows // 16) > 1
        expected, found = to_arrays(whole.read()), to_arrays(cut.read())
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values, name)


@given(st.integers(0, 2**40), st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_mix_agrees_between_python_and_numpy(value: int, seed: int) -> None:
    assert 0 <= mix(value, seed) < MODULUS
    assert mix(np.array([value]), seed).tolist() == [mix(value, seed)]


SEES = {  # what targets of each split may see, and so the searches of a frozen past
    "rolling": ((0, {0}), (1, {0, 1, 3}), (2, {0, 1, 2, 3})),
    "frozen": ((0, {0}), (1, {0, 3}), (2, {0, 1, 3})),
}


@pytest.mark.parametrize("past", ["rolling", "frozen"])
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    history=st.integers(1, 6),
    positions=st.integers(1, 6),
    hide_ties=st.booleans(),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_target_once_and_only_events_that_it_may_see(
    past: Literal["rolling", "frozen"],
    data: st.DataObject,
    lengths: list[int],
    history: int,
    positions: int,
    hide_ties: bool,
) -> None:
    """Its own user's earlier events: for training those of training, for validation no test. All
    see searches; with a frozen past those before the last event that they see."""
    user = np.repeat(np.arange(len(lengths)) + 2, lengths).astype(np.int32)
    n = len(user)
    nth = np.concatenate([np.arange(length) for length in lengths])
    drawn = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    split = np.array(drawn, np.int8)
    items = np.arange(n, dtype=np.int32) + 2  # an item is its event, so that it can be traced
    time = (nth // 2).astype(np.float64)
    log = Log(user, split, np.arange(n), time, {"item": items}, {}, {})

    def known(query: int, may_see: set[int]) -> bool:
        later = [e for e in range(query, n) if user[e] == user[query] and split[e] in may_see]
        return past == "rolling" or bool(later)

    def visible(target: int, may_see: set[int]) -> list[int]:
        end = target - nth[target] % 2 if hide_ties else target
        return [
            e
            for e in range(target - nth[target], end)
            if split[e] in may_see or (split[e] == QUERY and known(e, may_see))
        ]

    for part, may_see in SEES[past]:
        p = min(positions, history) if part == 0 else 1
        seen = []
        for block in sequence_examples(log, {}, part, p, history, hide_ties, 3, past):
            for index in range(len(block["row"])):
                tokens = block["event_item"][index] - 2
                for place in np.flatnonzero(block["row"][index] >= 0):
                    target = block["row"][index, place]
                    seen.append(target)
                    assert block["candidate"][index, place] == items[target]
                    found = tokens[: block["cutoff"][index, place]].tolist()
                    expected = visible(target, may_see)
                    assert found == expected[len(expected) - len(found) :]
                    behind = visible(block["row"][index].max(), may_see)[len(expected) :]
                    assert len(found) == max(0, min(len(expected), history - len(behind)))
                    before = len(expected) - len(found)
                    assert not found or block["skipped"][index] == before
                assert set(split[tokens[tokens >= 0]].tolist()) <= may_see | {QUERY}
        assert sorted(seen) == np.flatnonzero(split == part).tolist()


@given(
    data=st.data(),
    pages=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    history=st.integers(2, 8),
    positions=st.integers(2, 8),
)
@settings(max_examples=60, deadline=None)
def test_positions_of_one_time_are_those_of_one_cutoff_where_ties_are_hidden(
    data: st.DataObject, pages: list[int], history: int, positions: int
) -> None:
    """Which is what a loss over the lists of requests goes by; events of other splits, too, stand
    between them."""
    time = np.repeat(np.arange(len(pages), dtype=np.float64), pages)
    n = len(time)
    split = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int8)
    user, item = np.full(n, 2, np.int32), np.arange(n, dtype=np.int32) + 2
    log = Log(user, split, np.arange(n), time, {"item": item}, {}, {})
    for block in sequence_examples(log, {}, 0, min(positions, history), history, hide_ties=True):
        for row, cutoff in zip(block["row"], block["cutoff"], strict=True):
            times, cutoffs = time[row[row >= 0]], cutoff[row >= 0]
            same = times[:, None] == times[None]
            np.testing.assert_array_equal(cutoffs[:, None] == cutoffs[None], same)


@pytest.mark.parametrize("users", [False, True])
def test_without_a_history_every_target_stands_alone_in_mixed_order(users: bool) -> None:
    n = 5000
    row = np.arange(n) if users else np.random.default_rng(0).permutation(n)
    user = np.repeat(np.arange(50, dtype=np.int32) + 2, 100) if users else np.zeros(n, np.int32)
    split = (np.arange(n) % 3).astype(np.int8)
    item = (row + 2).astype(np.int32)
    request = {"request_a": item * 2, "request_b": np.stack([row, -row], 1).astype(np.float32)}
    log = Log(user, split, row, row * 1.0, {"item": item}, {"label_y": row % 2 * 1.0}, request)
    context = {"context_c": np.arange(50, dtype=np.int32)} if users else {}
    blocks = list(sequence_examples(log, context, 1, 1, 0, seed=7))
    found = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    rows = found["row"][:, 0]
    assert rows.tolist() == sorted(row[split == 1], key=lambda r: mix(int(r), 7))
    assert found["candidate"][:, 0].tolist() == (rows + 2).tolist()
    assert found["request_a"].tolist() == (2 * rows + 4).tolist()
    np.testing.assert_array_equal(found["request_b"], np.stack([rows, -rows], 1))
    assert not found["cutoff"].any()
    assert not any(name.startswith("event_") for name in found)
    if users:
        assert found["context_c"].tolist() == (found["user"] - 2).tolist()
