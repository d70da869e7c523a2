"""The generated shop: reproducible, consistent, hard for a linear model, and its best is known."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, special
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from benchmarks import requests
from mtrec_jax.data import shop, shop_requests, shop_social
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import load_experiment

SMALL: dict[str, Any] = {"users": 60, "items": 80, "impressions": 24}


@pytest.fixture(scope="module", params=[0, 1])
def full(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], pd.DataFrame, Path]:
    folder = tmp_path_factory.mktemp("shop")
    truth = shop.generate(folder, seed=request.param)
    return truth, pd.read_csv(folder / "events.csv"), folder


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in shop.FILES]


def test_the_plain_shop_stays_what_it_was(tmp_path: Path) -> None:
    """What can be planted on top leaves no trace; `shop._VERSION` is raised with these digests."""
    shop.generate(tmp_path, seed=3, **SMALL)
    digests = [hashlib.sha256(content).hexdigest()[:16] for content in _bytes(tmp_path)]
    assert digests == [
        "687fadfef96e0d02",
        "388bcda7a7645263",
        "9b121621c43c94a3",
        "6459618d3f21fb36",
    ]


def test_the_same_seed_writes_the_same_bytes_and_another_seed_writes_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        shop.generate(tmp_path / name, seed=seed, **SMALL)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    pairs = zip(_bytes(tmp_path / "a"), _bytes(tmp_path / "c"), strict=True)
    assert all(first != second for first, second in pairs)


def test_outcomes_follow_the_funnel(full: tuple[dict[str, Any], pd.DataFrame, Path]) -> None:
    truth, events, _ = full
    clicked, bought = events.click == 1, events.buy == 1
    assert len(events) == truth["events"]
    assert set(events.click) == {0, 1}
    assert events.buy.notna().equals(clicked)
    assert events.cart.notna().equals(clicked)
    assert (events.cart[bought] == 1).all()
    assert events.stars.notna().equals(bought)
    assert set(events.stars[bought]) == {1, 2, 3, 4, 5}
    assert events.time.is_monotonic_increasing
    assert not events.duplicated(["user", "item"]).any()
    assert clicked.mean() == pytest.approx(0.35, abs=0.01)
    assert events.buy[clicked].mean() == pytest.approx(0.4, abs=0.01)


def test_probabilities_are_those_of_the_outcomes(
    full: tuple[dict[str, Any], pd.DataFrame, Path],
) -> None:
    truth, events, _ = full
    for outcome, where in (("click", events.click >= 0), ("buy", events.click == 1)):
        rows = events[where]
        p = rows[f"p_{outcome}"]
        for _, part in rows.groupby(pd.cut(p, [0, 0.2, 0.4, 0.6, 0.8, 1])):
            expected, spread = part[f"p_{outcome}"].mean(), 0.5 / np.sqrt(len(part))
            assert part[outcome].mean() == pytest.approx(expected, abs=5 * spread)
        best = truth["best"][outcome]["auc"]
        assert roc_auc_score(rows[outcome], p) == pytest.approx(best, abs=1e-4)
    error = (events.stars - events.p_stars).dropna()
    assert error.mean() == pytest.approx(0, abs=5 / np.sqrt(len(error)))
    assert np.sqrt((error**2).mean()) == pytest.approx(truth["best"]["stars"]["rmse"], abs=1e-4)


@pytest.mark.slow
def test_the_best_possible_is_not_trivial_and_a_linear_model_stays_behind(
    full: tuple[dict[str, Any], pd.DataFrame, Path],
) -> None:
    _, events, folder = full
    rows = events.merge(pd.read_csv(folder / "items.csv")).merge(pd.read_csv(folder / "users.csv"))
    rows = rows.sort_values("time")
    columns = ["user", "item", "category", "brand", "segment", "age_group"]
    hot = OneHotEncoder().fit_transform(rows[columns])
    price = np.log(rows[["price"]].to_numpy()) - 3
    table = sparse.csr_matrix(sparse.hstack([hot, price]))
    late = np.arange(len(rows)) >= 0.8 * len(rows)
    for outcome in ("click", "buy"):
        there = rows[outcome].notna().to_numpy()
        train, test = there & ~late, there & late
        linear = LogisticRegression(C=0.1, max_iter=200)
        linear.fit(table[train], rows[outcome][train])
        score = roc_auc_score(rows[outcome][test], linear.predict_proba(table[test])[:, 1])
        best = roc_auc_score(rows[outcome][test], rows[f"p_{outcome}"][test])
        assert 0.78 < best < 0.88
        assert score < best - 0.06


def test_every_type_has_every_combination_of_tastes() -> None:
    for seed in range(20):
        tastes = shop._draw_tastes(np.random.default_rng(seed))
        for table in (tastes.click, tastes.buy, tastes.stars):
            assert not table.sum(axis=0).any()
            assert not table.sum(axis=1).any()
        combined = 4 * tastes.click + 2 * tastes.buy + tastes.stars
        assert all(len(set(row)) == len(shop.CATEGORIES) for row in combined)
        assert len({tuple(row) for row in tastes.click}) == shop.TYPES


def test_users_see_items_throughout_the_period(
    full: tuple[dict[str, Any], pd.DataFrame, Path],
) -> None:
    _, events, _ = full
    late = events.iloc[int(0.9 * len(events)) :]
    assert late.user.nunique() > 0.6 * shop.USERS
    counts = events.user.value_counts()
    position = events.time.rank(pct=True).groupby(events.user).mean()
    assert position[counts < 60].mean() == pytest.approx(position[counts > 84].mean(), abs=0.03)
    assert events.item.value_counts().min() > 200


def test_a_generated_folder_is_recognised(tmp_path: Path) -> None:
    assert not shop.is_generated(tmp_path)
    shop.generate(tmp_path, **SMALL)
    assert not shop.is_generated(tmp_path)  # other sizes
    shop.generate(tmp_path)
    assert shop.is_generated(tmp_path)
    assert not shop.is_generated(tmp_path, seed=1)
    (tmp_path / "truth.json").write_text("{", encoding="utf-8")
    assert not shop.is_generated(tmp_path)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 8/3 of the impressions"):
        shop.generate(tmp_path, users=100, items=40, impressions=30)


@pytest.mark.parametrize("name", ["shop", "shop-requests"])
def test_the_experiment_names_columns_of_the_files(tmp_path: Path, name: str) -> None:
    shop.generate(tmp_path, **SMALL, **shop.SHOPS[name])
    experiment = load_experiment(name)
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("events", "items", "users")}
    for name, feature in experiment.features.items():
        table = {"item": "items", "context": "users"}.get(feature.on, "events")
        assert feature.origin(name, experiment.data)[1] in tables[table]
    for name, task in experiment.tasks.items():
        assert task.kind == "retrieval" or (task.column or name) in tables["events"]
        assert task.kind == "retrieval" or task.reference in tables["events"]


@pytest.mark.slow
def test_a_social_shop_is_the_shop_with_searches_and_circles(tmp_path: Path) -> None:
    truth = shop.generate(tmp_path, seed=2, social=True)
    shop.generate(tmp_path / "plain", seed=2)
    read = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("queries", "ties", "items")}
    events, plain = (pd.read_csv(f / "events.csv") for f in (tmp_path, tmp_path / "plain"))
    assert events[["user", "item", "time"]].equals(plain[["user", "item", "time"]])
    assert shop.is_generated(tmp_path, seed=2, social=True)
    assert not shop.is_generated(tmp_path, seed=2)
    assert not shop.is_generated(tmp_path / "plain", seed=2, social=True)
    # each part is worth more than any interval, and none of them is a small part of the whole
    without = truth["social"]["without"]
    assert truth["best"]["click"]["auc"] > max(without["queries"], without["ties"]) + 0.02
    assert min(without["queries"], without["ties"]) > without["all"] + 0.02
    # ties: symmetric, once, to others, mostly inside the circle
    pairs = set(zip(read["ties"].user, read["ties"].friend, strict=True))
    assert len(pairs) == len(read["ties"])
    assert all((b, a) in pairs and a != b for a, b in pairs)
    circle = dict(zip(sorted(plain.user.unique()), truth["social"]["circle"], strict=True))
    assert np.mean([circle[a] == circle[b] for a, b in pairs]) == pytest.approx(0.77, abs=0.03)
    # searches: what follows within the session is clicked more often in the searched category
    queries = read["queries"].rename(columns={"time": "asked"})
    rows = events.merge(read["items"]).sort_values("time")
    rows = pd.merge_asof(rows, queries, left_on="time", right_on="asked", by="user")
    rows = rows[rows.time - rows.asked < 360]
    words = {p: c for c, phrases in shop_social._PHRASES.items() for p in phrases}
    said = rows["query"].str.replace("^(cheap|best|new|good) ", "", regex=True).map(words)
    assert said.notna().all()
    matches = said == rows.category
    assert matches.mean() > 0.2
    assert rows.click[matches].mean() > rows.click[~matches].mean() + 0.2


def test_a_shop_of_requests_is_the_shop_with_a_signal_of_the_moment(tmp_path: Path) -> None:
    truth = shop.generate(tmp_path, seed=2, requests=True)
    shop.generate(tmp_path / "plain", seed=2)
    events, plain = (pd.read_csv(f / "events.csv") for f in (tmp_path, tmp_path / "plain"))
    assert events[["user", "item", "time"]].equals(plain[["user", "item", "time"]])
    assert set(events) - set(plain) == {"device", "place"}
    assert [shop.is_generated(tmp_path, 2, requests=r) for r in (True, False)] == [True, False]
    assert not shop.is_generated(tmp_path / "plain", 2, requests=True)
    assert roc_auc_score(events.click, events.p_click) == pytest.approx(
        truth["best"]["click"]["auc"], abs=1e-4
    )
    # each part is worth more than any interval
    without = truth["requests"]["without"]
    parts = [without[part] for part in ("device", "hour", "place")]
    assert truth["best"]["click"]["auc"] > max(parts) + 0.01
    assert min(parts) > without["all"] + 0.02
    # sessions: places 1 to 6 in turn, one device, which is the user's own three times in four
    ordered = events.sort_values(["user", "time"], kind="stable")
    assert set(events.place) == set(range(1, 7))
    assert (events.place == 1).mean() == pytest.approx(1 / 6, abs=0.01)
    own = ordered.groupby("user").device.agg(lambda devices: devices.mode()[0])
    at_home = (events.device == events.user.map(own)).mean()
    assert at_home == pytest.approx(0.75 + 0.25 / 3, abs=0.02)
    # what is clicked: the upper places, and the categories that device and quarter like
    rate = events.groupby("place").click.mean()
    assert rate.is_monotonic_decreasing
    assert rate[1] > rate[6] + 0.15
    events = events.merge(pd.read_csv(tmp_path / "items.csv"), on="item")
    quarter = events.time // 21_600 % 4
    for name, values in (("device", events.device), ("hour", quarter)):
        planted = np.array(truth["requests"][name])
        assert set(np.unique(planted)) == {-0.8, 0.8}
        assert not planted.sum(axis=1).any()
        found = events.pivot_table("click", values, "category")
        if name == "device":
            found = found.loc[list(shop_requests.DEVICES)]
        logits = special.logit(found[list(shop.CATEGORIES)].to_numpy())
        centred = logits - logits.mean(axis=0)
        assert np.corrcoef(centred.ravel(), (planted - planted.mean(axis=0)).ravel())[0, 1] > 0.97


def test_the_benchmark_of_requests_chooses_from_one_folder() -> None:
    """Four models whose features are what they are said to lack, and nothing else."""
    declared = load_experiment("shop-requests").features
    for name, lacking in requests.MODELS.items():
        experiment = load_experiment("shop-requests", requests.chosen_without(*lacking))
        left = {n for n, f in declared.items() if f.on not in lacking}
        assert set(experiment.features) == left, name
        assert (experiment.model.encoder.kind == "none") == ("history" in lacking)
        assert experiment.tasks.keys() == load_experiment("shop-requests").tasks.keys()
