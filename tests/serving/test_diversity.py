"""Diversifiers: worked by hand, beside brute force, and in what is recommended."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from mtrec_jax.diversity import DIVERSIFIERS, Dpp, Mmr, diversify
from mtrec_jax.errors import ConfigError
from mtrec_jax.result import Result
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train.run import Run
from tests.serving.test_recommender import USERS, items_of, seen_by


def rows(angles: list[float]) -> np.ndarray:
    """Vectors [1, C, 2] of length 1 at these angles, in degrees."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)[None]


def some(users: int, candidates: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, which places are real, and vectors that are far from length 1."""
    draw = np.random.default_rng(0)
    scores = draw.normal(size=(users, candidates)) * 7
    vectors = draw.normal(size=(users, candidates, width)) * 3
    return scores, np.ones((users, candidates), bool), vectors


def test_maximal_marginal_relevance_by_hand() -> None:
    """Scores 10, 8, 6 and 0 are a relevance of 1, .8, .6 and 0; angles 0, 0, 60 and 90 degrees.

    First the best, 0. Then half of relevance - cosine with it: (.8 - 1) / 2, (.6 - .5) / 2, 0: the
    third. Then, with the nearest of both: (.8 - 1) / 2 = -.1, (0 - .866) / 2 = -.433: the second.
    """
    scores, real = np.array([[10.0, 8, 6, 0]]), np.full((1, 4), True)
    found = diversify(Mmr(trade=0.5), scores, real, rows([0, 0, 60, 90]), 4)
    assert found.tolist() == [[0, 2, 1, 3]]


def test_the_determinant_is_the_largest_of_all_lists() -> None:
    """Three of five items, beside the exhaustive search for the largest determinant of
    exp(a r_i) (1 + cos(i, j)) / 2 exp(a r_j), a = trade / (2 (1 - trade)); and each step beside all
    other steps."""
    scores, real, vectors = some(1, 5, 4)
    trade = 0.4
    (found,) = diversify(Dpp(trade=trade), scores, real, vectors, 3)
    relevance = (scores[0] - scores.min()) / np.ptp(scores)
    quality = np.exp(trade / (2 * (1 - trade)) * relevance)
    unit = vectors[0] / np.linalg.norm(vectors[0], axis=1, keepdims=True)
    kernel = quality[:, None] * (1 + unit @ unit.T) / 2 * quality

    def volume(chosen: tuple[int, ...]) -> float:
        return float(np.linalg.det(kernel[np.ix_(chosen, chosen)]))

    best = max(itertools.combinations(range(5), 3), key=volume)
    assert set(found.tolist()) == set(best)
    assert set(found.tolist()) != set(np.argsort(-scores[0])[:3].tolist())
    for size in range(3):
        before = tuple(found[:size].tolist())
        left = [item for item in range(5) if item not in before]
        assert found[size] == max(left, key=lambda item: volume((*before, item)))


def test_a_determinant_sees_what_several_items_leave_of_another() -> None:
    """The third item lies between the two that are taken, and is near to neither; the fourth stands
    upright on both, and is worth less. Nearest items alone would take the third."""
    vectors = np.array([[[1.0, 0, 0], [0, 1, 0], [1, 1, 0.2], [0.6, 0.6, 1]]])
    scores, real = np.array([[1.0, 1.0, 0.5, 0.0]]), np.full((1, 4), True)
    assert diversify(Dpp(trade=0.3), scores, real, vectors, 3).tolist() == [[0, 1, 3]]
    assert diversify(Mmr(trade=0.6), scores, real, vectors, 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", DIVERSIFIERS)
def test_relevance_alone_is_the_plain_order(kind: str) -> None:
    """Equal scores in the order of the candidates, too."""
    scores, real, vectors = some(7, 20, 3)
    scores = np.round(scores / 5)
    found = diversify(DIVERSIFIERS[kind](trade=1.0), scores, real, vectors, 20)
    assert np.array_equal(found, np.argsort(-scores, axis=1, kind="stable"))


@pytest.mark.parametrize("kind", DIVERSIFIERS)
@pytest.mark.parametrize("trade", [0.0, 0.5, 1.0])
def test_lists_are_full_and_hold_each_candidate_once(kind: str, trade: float) -> None:
    """Far more than the width of the vectors, many times the same item, one without a direction;
    places without a candidate, whose scores are the highest, come after all others."""
    scores, real, vectors = some(6, 30, 3)
    vectors[:, 5:20] = vectors[:, 4:5]
    vectors[0, 2] = 0
    for user in range(6):
        real[user, user * 5 :: 2] = False
    real[5] = False
    scores = np.where(real, scores, 99)
    found = diversify(DIVERSIFIERS[kind](trade=trade), scores, real, vectors, 30)
    assert np.array_equal(np.sort(found, axis=1), np.tile(np.arange(30), (6, 1)))
    for user in range(6):
        falls = real[user, found[user]]
        assert not (np.diff(falls.astype(int)) > 0).any()
    short = diversify(DIVERSIFIERS[kind](trade=trade), scores, real, vectors, 4)
    assert np.array_equal(short, found[:, :4]), "a longer list begins with the shorter one"


def spread(recommender: Recommender, items: list[str]) -> float:
    """Mean cosine of the pairs of a list, of the vectors by which items are compared."""
    ids = [recommender.prepared.item_ids[item] for item in items]
    own = np.asarray(recommender._serving.compared(recommender._vectors))[ids]
    own = own / np.linalg.norm(own, axis=1, keepdims=True)
    return float((own @ own.T)[np.triu_indices(len(ids), 1)].mean())


@pytest.mark.parametrize("how", [{"kind": kind, "trade": 0.2} for kind in DIVERSIFIERS])
def test_recommended_lists_differ_within_and_keep_to_the_candidates(
    shop_recommender: Recommender, how: dict[str, Any]
) -> None:
    users = [*USERS, "nobody"]
    blocked = shop_recommender.recommend(users, 2)["item"][:2]
    asked: dict[str, Any] = {"blocked": blocked, "order_by": "next_item"}
    plain = shop_recommender.recommend(users, 8, **asked)
    found = shop_recommender.recommend(users, 8, **asked, diversify=how)
    pool = shop_recommender.recommend(users, 20, **asked)
    for user in USERS:
        items = items_of(found, user)
        assert len(items) == len(set(items)) == 8
        assert not set(items) & {*blocked, *seen_by(shop_recommender.prepared, user)}
        assert set(items) <= set(items_of(pool, user)), "of evaluate.candidates"
        assert spread(shop_recommender, items) < spread(shop_recommender, items_of(plain, user))
    assert items_of(found, "nobody") == items_of(plain, "nobody")
    assert "diversified by" in found.order
    assert "diversified by" not in plain.order
    scores = dict(scored(pool))
    assert all(score == scores[pair] for pair, score in scored(found))


def scored(result: Result) -> list[tuple[tuple[str, str], float | None]]:
    pairs = zip(result["user"], result["item"], strict=True)
    return list(zip(pairs, result["score"], strict=True))


def test_nobody_gets_fewer_items_or_another_order_by_relevance_alone(
    shop_recommender: Recommender,
) -> None:
    few: dict[str, Any] = {"allowed": shop_recommender.prepared.item_names[:9]}
    plain = shop_recommender.recommend(USERS, 12, **few)
    for how in ({"kind": "mmr", "trade": 0.0}, "dpp"):
        found = shop_recommender.recommend(USERS, 12, **few, diversify=how)
        for user in USERS:
            assert sorted(items_of(found, user)) == sorted(items_of(plain, user))
    same = shop_recommender.recommend(USERS, 12, **few, diversify={"kind": "dpp", "trade": 1})
    assert same["item"] == plain["item"]


@dataclass(frozen=True, kw_only=True)
class Backwards:
    """The last candidates first."""

    kind: Literal["backwards"] = "backwards"

    def choose(
        self, relevance: np.ndarray, vectors: np.ndarray, real: np.ndarray, k: int
    ) -> np.ndarray:
        return np.tile(np.arange(real.shape[1])[::-1][:k], (len(real), 1))


def test_a_diversifier_of_ones_own(shop_recommender: Recommender) -> None:
    asked: dict[str, Any] = {"order_by": "click", "exclude_seen": False}
    pool = shop_recommender.recommend(USERS[:1], 20, **asked)["item"]
    found = shop_recommender.recommend(USERS[:1], 3, **asked, diversify=Backwards())
    assert found["item"] == pool[::-1][:3]
    assert found.order.endswith("; diversified by backwards")


def test_an_unknown_diversifier_is_refused(shop_recommender: Recommender) -> None:
    with pytest.raises(ConfigError, match="'mrr' is not one of 'mmr', 'dpp'"):
        shop_recommender.recommend(USERS, diversify="mrr")
    with pytest.raises(ConfigError, match=r"must be 1\.0 or less, not 2"):
        shop_recommender.recommend(USERS, diversify={"kind": "dpp", "trade": 2})


def test_the_command_line_gives_the_same_lists(
    shop_run: Run,
    shop_recommender: Recommender,
    mtrec: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
) -> None:
    out = tmp_path / "lists.jsonl"
    users = [part for user in USERS for part in ("--users", user)]
    how = ["--diversify", "{kind='mmr', trade=0.2}", "--k", 4, "--out", out]
    status, _, notes = mtrec("recommend", shop_run.folder, *users, *how)
    assert status == 0
    assert "diversified by mmr (trade = 0.2)" in notes
    expected = shop_recommender.recommend(USERS, 4, diversify={"kind": "mmr", "trade": 0.2})
    lines = out.read_text("utf-8").splitlines()
    assert [json.loads(line)["item"] for line in lines] == expected["item"]
