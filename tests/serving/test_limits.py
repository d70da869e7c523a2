"""Lists of users and quotas on columns of items: nothing that was left out, and no list short."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mtrec_jax
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.serving.filters import read_quotas
from mtrec_jax.serving.recommender import Recommender
from tests.serving.test_recommender import USERS, items_of, seen_by


def values(prepared: Prepared, feature: str) -> dict[str, int]:
    """The local id of a feature by raw item id."""
    ids = prepared.items.column(f"item_{feature}").to_pylist()
    return dict(zip(prepared.item_names, ids, strict=False))


def greedy(order: list[str], k: int, limits: list[tuple[dict[str, int], int]]) -> list[str]:
    chosen: list[str] = []
    for item in order:
        counts = [Counter(of[other] for other in chosen)[of[item]] for of, _ in limits]
        if len(chosen) < k and all(n < m for n, (_, m) in zip(counts, limits, strict=True)):
            chosen.append(item)
    return chosen


def test_quotas_are_taken_in_the_order_of_the_list(shop_recommender: Recommender) -> None:
    """Of the twenty candidates that are asked for anyhow."""
    brand, category = (values(shop_recommender.prepared, n) for n in ("brand", "category"))
    every = shop_recommender.recommend(USERS, 20)
    found = shop_recommender.recommend(USERS, 7, at_most={"brand": 1, "category": 2})
    for user in USERS:
        expected = greedy(items_of(every, user), 7, [(brand, 1), (category, 2)])
        assert items_of(found, user) == expected
        assert expected != items_of(every, user)[:7]
    nothing = shop_recommender.recommend([*USERS, "nobody"], 4, at_most={"brand": 0})
    assert len(nothing) == 0
    alike = shop_recommender.recommend(USERS, 4, at_most={"brand": 60})
    assert alike.table == shop_recommender.recommend(USERS, 4).table


def test_lists_are_filled_beyond_the_candidates(shop_recommender: Recommender) -> None:
    """One item of each brand there is, also for somebody who gets popular items."""
    prepared = shop_recommender.prepared
    brand = values(prepared, "brand")
    blocked = [item for item, of in brand.items() if of == brand[prepared.item_names[0]]][1:]
    limits: dict[str, Any] = {"at_most": {"brand": 1}, "blocked": blocked}
    found = shop_recommender.recommend([*USERS, "nobody"], 50, **limits)
    for user in (*USERS, "nobody"):
        seen = seen_by(prepared, user) if user != "nobody" else set()
        left = set(brand) - seen - set(blocked)
        items = items_of(found, user)
        assert set(items) <= left
        assert Counter(brand[item] for item in items) == Counter({brand[item] for item in left})
        scores = [s for u, s in zip(found["user"], found["score"], strict=True) if u == user]
        assert user == "nobody" or scores == sorted(scores, reverse=True)


def test_each_user_chooses_from_a_list(shop_recommender: Recommender, tmp_path: Path) -> None:
    names = shop_recommender.prepared.item_names
    (tmp_path / "ids.txt").write_text("\n".join(names[20:50]))
    allowed: dict[Any, Any] = {
        "u00003": names[:9],
        "u00001": tmp_path / "ids.txt",
        "u00042": None,
        "nobody": [names[7], names[3], "gone"],
    }
    found = shop_recommender.recommend(list(allowed), 6, allowed=allowed)
    for user, ids in allowed.items():
        alone = shop_recommender.recommend([user], 6, allowed=ids)
        assert items_of(found, user) == alone["item"]
    assert sorted(items_of(found, "nobody")) == sorted([names[7], names[3]])
    assert found.ignored == {"allowed": 1}
    both = shop_recommender.recommend(
        ["u00003"], 6, allowed=allowed, at_most={"brand": 1}, exclude_seen=False
    )
    brand = values(shop_recommender.prepared, "brand")
    assert len(both) == min(6, len({brand[item] for item in names[:9]}))
    assert set(both["item"]) <= set(names[:9])


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ({"allowed": {"u00001": ["i0001"]}}, DataError, "allowed: no list for user 'u00003'; give"),
        ({"allowed": {"u00003": "i0001"}}, DataError, r"allowed\['u00003'\]: 'i0001' is one text"),
        ({"at_most": {"brnd": 2}}, ConfigError, "'brnd' is no categorical .*Did you mean 'brand'"),
        ({"at_most": {"price_bin": 2}}, ConfigError, "There are category, brand"),
        ({"at_most": {"brand": -1}}, DataError, r"at_most\['brand'\].*-1"),
    ],
)
def test_wrong_limits(
    shop_recommender: Recommender, limits: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shop_recommender.recommend(["u00003"], 3, **limits)


def test_baselines_take_the_same_limits(
    shop_experiment: Experiment, shop_prepared: Prepared
) -> None:
    popularity = mtrec_jax.fit_baseline(shop_experiment, shop_prepared, "popularity")
    names, brand = shop_prepared.item_names, values(shop_prepared, "brand")
    every = popularity.recommend(USERS, 60)
    found = popularity.recommend(USERS, 5, at_most={"brand": 1}, blocked=names[:3])
    for user in USERS:
        left = [item for item in items_of(every, user) if item not in names[:3]]
        assert items_of(found, user) == greedy(left, 5, [(brand, 1)])
    assert len(popularity.recommend(USERS, 5, at_most={"brand": 0})) == 0
    lists = dict(zip(USERS, np.split(np.array(names), 3), strict=True))
    found = popularity.recommend(USERS, 5, allowed=lists)
    for user in USERS:
        left = [item for item in items_of(every, user) if item in lists[user]]
        assert items_of(found, user) == left[:5]


def test_columns_are_limited_side_by_side(
    shop_prepared: Prepared,
) -> None:
    quotas = read_quotas(shop_prepared, {"brand": 2, "category": 3})
    assert quotas is not None
    brand, category = (list(values(shop_prepared, n).values()) for n in ("brand", "category"))
    np.testing.assert_array_equal(quotas.groups[:, 0], np.array(brand) - 1)
    np.testing.assert_array_equal(quotas.groups[:, 1], np.array(category) - 1 + max(brand))
    assert quotas.most[:-1].tolist() == [2] * max(brand) + [3] * max(category)
