"""Several vectors of a user."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mtrec_jax
from mtrec_jax.errors import DataError
from mtrec_jax.kernels import ItemIndex
from mtrec_jax.models import interests

pandas = pytest.importorskip("pandas")

K, D, N = 3, 4, 40


def _cosines(vectors: np.ndarray, items: np.ndarray) -> np.ndarray:
    """[Q, N]: of the best of each user's vectors."""
    each = vectors.reshape(len(vectors), -1, items.shape[1])
    each = each / np.linalg.norm(each, axis=-1, keepdims=True)
    items = items / np.linalg.norm(items, axis=-1, keepdims=True)
    return np.einsum("qkd,nd->qkn", each, items).max(axis=1)


def test_lists_and_ranks_are_those_of_the_best_vector() -> None:
    rng = np.random.default_rng(0)
    items = rng.normal(size=(N, D)).astype(np.float32)
    items[7] = items[3]  # equals, of which the first comes first
    vectors = rng.normal(size=(6, K * D)).astype(np.float32)
    vectors[0, :D] = items[3]
    exclude = rng.integers(N, size=(6, 5)).astype(np.int32)
    exclude[0] = -1
    scores = _cosines(vectors, items)
    np.put_along_axis(scores, np.where(exclude < 0, 0, exclude), -np.inf, axis=1)
    scores[0, 0] = _cosines(vectors, items)[0, 0]
    index = ItemIndex(items)
    for k in (5, N):
        found, ids = interests.search(index, vectors, k, exclude)
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        there = np.take_along_axis(scores, expected, axis=1) > -np.inf
        np.testing.assert_array_equal(ids, np.where(there, expected, -1))
        assert (np.isfinite(found) == there).all()
    assert ids[0, :2].tolist() == [3, 7]
    targets = np.argsort(-scores, axis=1, kind="stable")[np.arange(6), [0, 1, 4, 9, 10, 30]]
    ranks = interests.ranks(index, vectors, targets, exclude, None, 10)
    assert ranks.tolist() == [0, 1, 4, 9, N, N]


def test_a_vector_is_a_weighted_mean_of_the_events_so_far_beside_the_state() -> None:
    """Written out; a later event changes nothing before it."""
    module = interests.Interests(2, D, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    tokens, states = rng.normal(size=(2, 1, 5, D)).astype(np.float32)
    known = np.array([[True, True, True, True, False]])
    found = np.asarray(jax.jit(module.__call__)(tokens, known, states))[0]
    hidden, logits, outputs = module.hidden, module.logits, module.outputs
    drawn = np.tanh(tokens[0] @ hidden.kernel[...] + hidden.bias[...])
    drawn = 8 * np.tanh((drawn @ logits.kernel[...] + logits.bias[...]) / 8)
    weights = np.exp(drawn) * known[0][:, None]
    for s in range(4):
        for k in range(2):
            mean = weights[: s + 1, k] @ tokens[0, : s + 1] / weights[: s + 1, k].sum()
            expected = states[0, s] + mean @ outputs[k].kernel[...] + outputs[k].bias[...]
            np.testing.assert_allclose(found[s, k * D : (k + 1) * D], expected, atol=1e-5)


def _mixed_tastes(people: int, tastes: int, films: int, events: int) -> tuple[Any, Any]:
    """Everyone likes two genres, and takes films of both in any order, none of them twice."""
    rng, rows = np.random.default_rng(0), []
    for person in range(people):
        own = rng.choice(tastes, 2, replace=False)
        left = [list(rng.permutation(films)) for _ in own]
        for n, which in enumerate(rng.integers(2, size=events)):
            film = f"{own[which]}-{left[which].pop()}"
            rows.append({"person": f"p{person}", "film": film, "when": 1000 * n + person})
    items = [
        {"film": f"{t}-{i}", "genre": f"taste {t}"} for t in range(tastes) for i in range(films)
    ]
    return pandas.DataFrame(rows), pandas.DataFrame(items)


def _fit(
    count: int, folder: Path, sizes: tuple[int, int, int, int], steps: int, **train: Any
) -> Any:
    events, films = _mixed_tastes(*sizes)
    return mtrec_jax.fit(
        events,
        user="person",
        item="film",
        time="when",
        items=films,
        tasks={"next": "retrieval"},
        features={"genre": {"on": "item"}},
        settings={
            "data": {"history_length": 12, "positions": 12},
            "model": {"width": 8, "encoder": "mean", "dropout": 0.0, "interests": count}
            | {"event_dropout": 0.1},
            "train": {"steps": steps, "batch_size": 50, "negatives": "all", "learning_rate": 1e-2}
            | {"mesh": [1, 1], "evaluate_every": steps}
            | train,
            "evaluate": {"bootstrap": 0, "candidates": 20},
        },
        folder=folder,
        show_progress=False,
    )


@pytest.mark.slow
def test_a_run_with_interests_and_altered_views_answers_and_says_what_they_are(
    tmp_path: Path,
) -> None:
    model = _fit(2, tmp_path, (60, 4, 16, 10), 60, contrast={"weight": 0.1})
    found = model.interests(["p0", "p1"])
    assert found["interest"] == [1, 2, 1, 2]
    assert [sum(found["events"][:2]), sum(found["events"][2:])] == [10, 10]
    assert all("genre taste" in values for values in found["values"][::2])
    assert [names.count(",") for names in found["items"]] == [4] * 4
    answer = model.recommend(["p0"], k=5)
    assert len(set(answer["item"])) == 5
    assert answer["next"] == sorted(answer["next"], reverse=True)
    with pytest.raises(DataError, match="user 'nobody' is not in the data"):
        model.interests(["nobody"])


@pytest.mark.slow
def test_several_vectors_beat_one_where_tastes_are_mixed(tmp_path: Path) -> None:
    """24 tastes on eight numbers: between two of them others lie. Of the films of two tastes that
    somebody has not seen, the best order has an NDCG@10 of about .165."""
    best = {}
    for count in (1, 3):
        model = _fit(count, tmp_path / str(count), (600, 24, 20, 14), 200, evaluate_every=50)
        records = (model.run.folder / "metrics.jsonl").read_text("utf-8").splitlines()
        [line] = [line for line in records if '"best"' in line]
        best[count] = float(line.rpartition('"value": ')[2].rstrip("}"))
    assert best[3] > best[1] + 0.005
    found = model.interests([f"p{number}" for number in range(20)])
    tastes = [values for values, n in zip(found["values"], found["events"], strict=True) if n > 3]
    assert all("genre taste" in values for values in tastes)
