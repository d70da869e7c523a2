"""Encoded events to examples: every target once, and never its own future."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.data.dataset import BLOCK
from mtrec_jax.data.examples import MODULUS, Log, mix, sequence_examples, write_examples


def test_row_groups_and_random_order(tmp_path: Path) -> None:
    blocks = [{"row": np.arange(n, n + 3000)[:, None]} for n in range(0, 12_000, 3000)]
    assert write_examples(tmp_path / "x.parquet", iter(blocks)) == (12_000, 12_000)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    assert sizes == [BLOCK, BLOCK, 12_000 - 2 * BLOCK]


@given(st.integers(0, 2**40), st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_mix_agrees_between_python_and_numpy(value: int, seed: int) -> None:
    assert 0 <= mix(value, seed) < MODULUS
    assert mix(np.array([value]), seed).tolist() == [mix(value, seed)]


@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    history=st.integers(1, 6),
    positions=st.integers(1, 6),
    hide_ties=st.booleans(),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_target_once_and_only_events_that_it_may_see(
    data: st.DataObject, lengths: list[int], history: int, positions: int, hide_ties: bool
) -> None:
    """Its own user's earlier events: for training those of training, for validation no test."""
    user = np.repeat(np.arange(len(lengths)) + 2, lengths).astype(np.int32)
    n = len(user)
    nth = np.concatenate([np.arange(length) for length in lengths])
    drawn = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    split = np.array(drawn, np.int8)
    items = np.arange(n, dtype=np.int32) + 2  # an item is its event, so that it can be traced
    time = (nth // 2).astype(np.float64)
    log = Log(user, split, np.arange(n), time, {"item": items}, {}, {})
    for part, may_see in ((0, {0}), (1, {0, 1, 3}), (2, {0, 1, 2, 3})):
        p = min(positions, history) if part == 0 else 1
        seen = []
        for block in sequence_examples(log, {}, part, p, history, hide_ties, seed=3):
            for index in range(len(block["row"])):
                tokens = block["event_item"][index] - 2
                for place in np.flatnonzero(block["row"][index] >= 0):
                    target = block["row"][index, place]
                    seen.append(target)
                    assert block["candidate"][index, place] == items[target]
                    past = tokens[: block["cutoff"][index, place]].tolist()
                    end = target - nth[target] % 2 if hide_ties else target
                    expected = [
                        e
                        for e in range(target - nth[target], end)
                        if user[e] == user[target] and split[e] in may_see
                    ]
                    assert past == expected[len(expected) - len(past) :]
                    most = history - p + 1 - (1 if hide_ties else 0)
                    assert len(past) >= min(len(expected), most)
                assert set(split[tokens[tokens >= 0]].tolist()) <= may_see
        assert sorted(seen) == np.flatnonzero(split == part).tolist()
