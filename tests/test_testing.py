"""The kit for baselines: all of the package pass it, and what is wrong does not."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from mtrec_jax import check_baseline
from mtrec_jax.baselines import BASELINES, Interactions
from mtrec_jax.baselines.bias import Bias, Biases
from mtrec_jax.baselines.contract import check_ids
from mtrec_jax.baselines.item_knn import ItemKnn
from mtrec_jax.baselines.popularity import Popularity
from mtrec_jax.types import FIRST, Lists


@pytest.mark.parametrize("kind", [kind for kind in BASELINES if kind != "random"])
def test_the_package_s_own_pass(kind: str) -> None:
    check_baseline(BASELINES[kind](), personal=kind != "popularity")


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "popularity", "days": 30.0},
        {"kind": "item_knn", "weights": "tfidf", "shrinkage": 2.0},
        {"kind": "item_knn", "weights": "bm25"},
        {"kind": "user_knn", "weights": "tfidf", "shrinkage": 2.0},
        {"kind": "user_knn", "weights": "bm25"},
        {"kind": "ease", "precision": "float64"},
    ],
    ids=str,
)
def test_so_do_other_options(options: dict[str, Any]) -> None:
    kind = options.pop("kind")
    check_baseline(BASELINES[kind](**options), personal=kind != "popularity")


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Counts of items for the items of a user's own community, with one thing wrong."""

    kind: Literal["broken"] = "broken"
    wrong: str = ""

    def fit(self, interactions: Interactions) -> Fitted:
        if self.wrong != "ids":
            check_ids(self.kind, interactions)
        return Fitted(self.wrong, np.random.default_rng().random(interactions.n_items))


@dataclass(frozen=True)
class Fitted:
    wrong: str
    noise: np.ndarray

    def scorer(self, users: np.ndarray, histories: Lists) -> Scores:
        items, rows = len(self.noise), np.zeros((len(users), len(self.noise)), np.float32)
        for row, past in zip(rows, (histories[i] for i in range(len(users))), strict=True):
            shift = 1 if self.wrong == "padding" else FIRST
            known = past[past >= shift] - shift
            first = (known < items // 2).sum() * 2 > len(known)
            row[: items // 2] = first - 0.5
            row[items // 2 :] = 0.5 - first
            row += len(past) * (self.wrong == "padding")
            row += np.nan if self.wrong == "empty" and not len(known) else 0
        if self.wrong == "communities":
            rows = -rows
        if self.wrong == "random":
            rows = rows + np.float32(0.01) * self.noise.astype(np.float32)
        return Scores(rows if self.wrong != "type" else rows.astype(np.float64))


@dataclass(frozen=True)
class Scores:
    rows: np.ndarray

    def scores(self, queries: np.ndarray) -> np.ndarray:
        return self.rows[queries]


def test_a_baseline_of_one_s_own_passes() -> None:
    check_baseline(Broken())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("communities", "user id 2 likes the other items of the community"),
        ("random", "fitted twice on the same data, it gives other scores"),
        ("padding", "padding and unknown ids in a history change its scores"),
        ("empty", "a score is nan"),
        ("ids", "fit takes the user id -1, which is beyond the users"),
        ("type", "scores are float64"),
    ],
)
def test_what_is_wrong_is_named(wrong: str, message: str) -> None:
    with pytest.raises(AssertionError, match=f"broken: {message}"):
        check_baseline(Broken(wrong=wrong))


def test_who_says_that_nothing_is_personal_is_held_to_it() -> None:
    with pytest.raises(AssertionError, match="item_knn: not personal, but scores differ by query"):
        check_baseline(ItemKnn(), personal=False)
    with pytest.raises(AssertionError, match="popularity: user id 2 likes the other items"):
        check_baseline(Popularity())


def test_predictions_that_turn_things_round_are_found() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Turned(Bias):
        def fit(self, interactions: Interactions) -> Biases:
            found = super().fit(interactions)
            tasks = found.tasks.items()
            turned = {name: dataclasses.replace(of, items=-of.items) for name, of in tasks}
            return Biases(turned)

    with pytest.raises(AssertionError, match="predicted no higher for items that everybody rates"):
        check_baseline(Turned())
