"""A baseline that no file of the package knows is measured beside the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest

from mtrec_jax.baselines import Interactions
from mtrec_jax.baselines.item_knn import ItemKnn
from mtrec_jax.config import Experiment, to_dict
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.collect import Collected
from mtrec_jax.evaluation.comparison import compare
from mtrec_jax.experiments import load_experiment, parse_experiment
from mtrec_jax.types import FIRST, Lists


@dataclass(frozen=True, kw_only=True)
class Newest:
    """Ranks items by their number, and says the same of everything."""

    kind: Literal["newest"] = "newest"
    says: float = 0.25

    def fit(self, interactions: Interactions) -> Fitted:
        return Fitted(interactions.n_items, self.says)


@dataclass(frozen=True)
class Fitted:
    items: int
    says: float

    def scorer(self, users: np.ndarray, histories: Lists) -> Fitted:
        assert len(users) == len(histories)
        return self

    def scores(self, queries: np.ndarray) -> np.ndarray:
        return np.tile(np.arange(self.items, dtype=np.float32), (len(queries), 1))

    def predict(self, task: str, users: np.ndarray, items: np.ndarray) -> np.ndarray | None:
        return np.full(len(users), self.says) if task == "click" else None


@dataclass(frozen=True, kw_only=True)
class Idle:
    kind: Literal["idle"] = "idle"

    def fit(self, interactions: Interactions) -> int:
        return 0


@pytest.fixture
def collected(shop_prepared: Prepared) -> Collected:
    """All test targets, without a model."""
    rows = shop_prepared.interactions("test")
    clicked = rows["label_click"] == 1
    labels = {n.removeprefix("label_"): v for n, v in rows.items() if n.startswith("label_")}
    nothing = np.zeros(len(clicked))
    return Collected(
        rows["user"], rows["candidate"], labels, {}, nothing, clicked, nothing.astype(int), {}
    )


def test_it_is_named_in_a_configuration(
    shop_experiment: Experiment, shop_prepared: Prepared, collected: Collected
) -> None:
    values = to_dict(shop_experiment)
    values["evaluate"]["baselines"] = ["newest", {"kind": "newest", "says": 0.5}, "item_knn"]
    experiment = parse_experiment(values, extensions=[Newest])
    assert experiment.evaluate.baselines == (Newest(), Newest(says=0.5), ItemKnn())
    found = compare(experiment, shop_prepared, collected, "test")
    assert set(found) == {"newest (says=0.25)", "newest (says=0.5)", "item_knn", "best possible"}
    one = found["newest (says=0.25)"]
    clicks = collected.labels["click"]
    share = (clicks == 1).mean()
    loss = -share * np.log(0.25) - (1 - share) * np.log(0.75)
    assert one["click/log_loss"] == pytest.approx(loss)
    assert one["click/auc"] == 0.5
    assert not any(metric.startswith(("buy", "stars")) for metric in one)
    # a target's rank: how many items with a larger number the user had not clicked before
    log = shop_prepared.users.to_pylist()
    did = Lists(shop_prepared.behaviour("click"), shop_prepared.user_lists("event_item").offsets)
    ranks = []
    for user, item in zip(
        collected.user[clicks == 1], collected.candidate[clicks == 1], strict=True
    ):
        mine = log[user - FIRST]
        events = zip(mine["event_item"], mine["split"], did[user - FIRST], strict=True)
        seen = {i for i, split, clicked in events if split < 2 and clicked}
        after = set(range(item + 1, shop_prepared.manifest.items + FIRST))
        ranks.append(np.inf if item in seen else len(after - seen))
    assert one["next_item/hr@10"] == pytest.approx(np.mean(np.array(ranks) < 10))


def test_an_instance_will_do_and_one_that_can_do_nothing_is_refused(
    shop_experiment: Experiment, shop_prepared: Prepared, collected: Collected
) -> None:
    def beside(baseline: Any) -> dict[str, dict[str, float]]:
        evaluate = replace(shop_experiment.evaluate, baselines=(baseline,))
        experiment = replace(shop_experiment, evaluate=evaluate)
        return compare(experiment, shop_prepared, collected, "test")

    assert set(beside(Newest())) == {"newest", "best possible"}
    with pytest.raises(ConfigError, match=r"Idle.fit gave a int, which has neither scorer"):
        beside(Idle())


def test_load_experiment_takes_it() -> None:
    chosen = ['evaluate.baselines=["newest"]']
    experiment = load_experiment("shop", chosen, extensions=[Newest])
    assert experiment.evaluate.baselines == (Newest(),)
    with pytest.raises(ConfigError, match="'newest' is not one of 'random', 'popularity'"):
        load_experiment("shop", chosen)
