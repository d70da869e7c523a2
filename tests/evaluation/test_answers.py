"""How a run answers: the order that is worth most on validation, and calibrated probabilities."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrec_jax.errors import CheckpointError
from mtrec_jax.evaluation import answers as answering
from mtrec_jax.evaluation.answers import (
    Answers,
    calibrated_logits,
    described,
    find_answers,
    fit_calibrations,
    order_statistics,
)
from mtrec_jax.evaluation.collect import ABSENT, Collected
from mtrec_jax.evaluation.evaluate import evaluate
from mtrec_jax.evaluation.metrics import utility_auc_statistic
from mtrec_jax.models import calibration
from mtrec_jax.models.calibration import Scaling
from mtrec_jax.models.serve import Serving, prepared_serving
from mtrec_jax.serving.recommender import Recommender
from mtrec_jax.train.run import ANSWERS, Run, load_answers, load_best
from mtrec_jax.types import FIRST
from tests import tiny

TASKS = ("next_item", "click", "buy", "stars")


def targets(n: int, **parts: Any) -> Collected:
    """So many clicked targets of as many users, none of whom bought."""
    none = np.zeros(n, np.int64)
    labels = {"next_item": np.ones(n), "click": np.ones(n), "buy": np.zeros(n)}
    made = Collected(
        user=np.arange(n) + FIRST,
        candidate=none,
        labels=labels | {"stars": np.full(n, np.nan)},
        logits={task: np.zeros(n) for task in TASKS},
        fused=np.zeros(n),
        retrieved=np.ones(n, bool),
        ranks=none,
        order_ranks={name: np.full(n, ABSENT, np.int64) for name in ("fused", *TASKS)},
    )
    return replace(made, **parts)


def test_utility_auc_counts_pairs_by_the_difference_of_their_worths() -> None:
    """All pairs, one by one, on random amounts with ties in scores and worths, and weights."""
    rng = np.random.default_rng(0)
    worth, score = rng.integers(0, 4, 30) / 2, rng.integers(0, 9, 30) / 3
    weights = rng.integers(0, 3, 30).astype(float)
    won = total = 0.0
    for i in range(30):
        for j in range(30):
            if worth[i] > worth[j]:
                counts = weights[i] * weights[j] * (worth[i] - worth[j])
                won += counts * ((score[i] > score[j]) + 0.5 * (score[i] == score[j]))
                total += counts
    found = utility_auc_statistic(worth, score)(weights)
    assert found == pytest.approx(won / total)
    assert np.isnan(utility_auc_statistic(np.ones(3), np.arange(3.0))(np.ones(3)))
    assert np.isnan(utility_auc_statistic(np.zeros(0), np.zeros(0))(np.zeros(0)))


def test_orders_are_told_apart_by_the_declared_utility(shop_run: Run) -> None:
    """Worths 1 for a click and 3 for a purchase. The second target of two was bought: 1 and 4. An
    order that has it first of the list, and misses the other, wins 4 of 5."""
    model = replace(shop_run.experiment.model, fusion_objective={"click": 1.0, "buy": 3.0})
    experiment = replace(shop_run.experiment, model=model)
    labels = targets(2).labels | {"buy": np.array([0.0, 1.0])}
    ranks = targets(2).order_ranks | {"buy": np.array([ABSENT, 0]), "click": np.array([0, ABSENT])}
    made = targets(2, labels=labels, order_ranks=ranks, fused=np.array([0.0, 1.0]))
    found = order_statistics(experiment, shop_run.prepared, made)
    values = {n: metrics["value@10"][0](np.ones(2)) for n, metrics in found.items()}
    assert values == pytest.approx(
        {"fused": 0, "next_item": 0, "click": 0.2, "buy": 0.8, "stars": 0}
    )
    assert found["fused"]["utility auc"][0](np.ones(2)) == 1
    assert found["buy"]["utility auc"][0](np.ones(2)) == 0.5
    assert found["buy"]["value@10"][0](np.array([4.0, 1.0])) == 0.5, "a resample of the targets"


@pytest.mark.parametrize(
    ("places", "retrieved", "fused", "click", "order", "by"),
    [
        ({"fused": 0, "click": 1}, True, [0, 0], [0, 0], "fused", "value@10"),
        ({"fused": 1, "click": 0}, True, [0, 1], [0, 0], "click", "value@10"),  # AUC or not
        ({"fused": 1, "click": 1}, True, [0, 0], [0, 1], "fused", "value@10"),  # the first of equal
        ({}, False, [1, 0], [0, 1], "click", "utility auc"),
        ({}, False, [0, 1], [0, 0], "fused", "utility auc"),
    ],
)
def test_the_order_of_the_highest_declared_utility_is_chosen(
    shop_run: Run,
    serving: Serving,
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, int],
    retrieved: bool,
    fused: list[float],
    click: list[float],
    order: str,
    by: str,
) -> None:
    """By value@k of the retrieved targets; where none is retrieved, by the utility AUC of a click
    and of none, the second and the first target."""
    ranks = {n: np.full(2, places.get(n, ABSENT)) for n in ("fused", *TASKS)} if retrieved else {}
    labels = targets(2).labels | {"click": np.array([0.0, 1.0]), "buy": np.array([np.nan, 0.0])}
    made = targets(
        2,
        retrieved=np.full(2, retrieved),
        order_ranks=ranks,
        labels=labels,
        fused=np.array(fused, float),
        logits=targets(2).logits | {"click": np.array(click, float)},
    )
    taken = list[str]()

    def collected(*parts: Any, orders: bool) -> Collected:
        taken.append(parts[-1])
        return made

    monkeypatch.setattr(answering, "collect", collected)
    rules = replace(shop_run.experiment.evaluate, ks=(10, 1))  # chosen at the first
    experiment = replace(shop_run.experiment, evaluate=rules)
    found = find_answers(experiment, shop_run.prepared, serving, {}, {}, 7)
    assert taken == ["validation"] * 2, "nothing is fitted or chosen on the test set"
    assert (found.step, found.order, found.by) == (7, order, by)
    assert found.values[order] == max(found.values.values())


def test_rows_of_a_user_are_calibrated_by_those_of_others(shop_run: Run) -> None:
    """Ten users in five groups: what is fitted without a group has nothing of its labels. Here the
    first group alone has ones in a thousand zeros, so its own bias comes from zeros and ones of
    others, and turns when the labels of others do, not when its own do."""
    rng = np.random.default_rng(1)
    user = np.repeat(np.arange(10) + FIRST, 40)
    label, logit = rng.integers(0, 2, 400).astype(float), rng.normal(size=400)
    made = targets(400, user=user, logits=targets(400).logits | {"click": logit})
    known = {"click": Scaling(1.0)}

    def of(labels: np.ndarray) -> np.ndarray:
        part = replace(made, labels=made.labels | {"click": labels})
        return calibrated_logits(shop_run.experiment, part, known, cross_fitted=True)["click"]

    group = user % 5 == 0
    base = of(label)
    np.testing.assert_array_equal(of(np.where(group, 1 - label, label))[group], base[group])
    assert np.abs(of(np.where(group, label, 1 - label))[group] - base[group]).min() > 0
    others = calibration.fit_binary("platt", logit[~group], label[~group])
    np.testing.assert_allclose(base[group], calibration.apply(others, logit[group]))
    stored = calibrated_logits(shop_run.experiment, made, known, cross_fitted=False)
    np.testing.assert_array_equal(stored["click"], logit)


def test_ordered_classes_and_watch_time_stay_as_they_are() -> None:
    """Thresholds [n, 2], and a score beside the item's group [n, 2], of which nothing is scaled."""
    tasks = {"click": {"kind": "binary"}, "stars": {"kind": "ordinal"}}
    experiment = tiny.experiment(tasks=tasks | {"seconds": {"kind": "watch_time"}})
    rng = np.random.default_rng(2)
    logits = {"click": rng.normal(size=40), "stars": np.array([[1.0, -1.0]] * 40)}
    labels = {"click": rng.integers(0, 2, 40) * 1.0, "stars": np.ones(40), "seconds": np.ones(40)}
    made = targets(40, labels=labels, logits=logits | {"seconds": np.array([[0.5, 3.0]] * 40)})
    known = fit_calibrations(experiment, made, np.ones(40, bool))
    assert set(known) == {"click"}
    for cross_fitted in (False, True):
        found = calibrated_logits(experiment, made, known, cross_fitted)
        np.testing.assert_array_equal(found["stars"], made.logits["stars"])
        np.testing.assert_array_equal(found["seconds"], made.logits["seconds"])
        assert np.abs(found["click"] - made.logits["click"]).min() > 0


@pytest.fixture(scope="module")
def serving(shop_run: Run) -> Serving:
    return prepared_serving(shop_run.experiment, shop_run.prepared)


def test_a_run_keeps_what_was_found_for_its_best_step(shop_run: Run) -> None:
    _, _, step = load_best(shop_run)
    found = load_answers(shop_run, step)
    assert found is not None
    assert (found.step, found.by) == (step, "value@10")
    assert set(found.values) == {"fused", *TASKS}
    assert found.values[found.order] == max(found.values.values())
    assert set(found.calibration) == {"click", "buy"}
    assert load_answers(shop_run, step + 1) is None, "of other parameters nothing is known"


def test_recommendations_are_in_the_chosen_order_and_say_so(
    shop_run: Run, shop_recommender: Recommender
) -> None:
    chosen = shop_recommender.answers.order
    plain = shop_recommender.recommend(["u00003", "u00005"], 9)
    asked = shop_recommender.recommend(["u00003", "u00005"], 9, order_by=chosen)
    assert plain["item"] == asked["item"]
    assert plain.order == described(shop_run.experiment, shop_recommender.answers)
    assert "utility: 1 p(click) + 1 p(click) p(buy | click)" in plain.order
    assert plain.order in repr(plain).replace("\n", " ")
    assert plain.order in plain._repr_html_().replace("&#x27;", "'")


def test_what_was_stored_by_another_version_is_refused(shop_run: Run, tmp_path: Path) -> None:
    shutil.copytree(shop_run.folder, tmp_path / "run")
    run = replace(shop_run, folder=tmp_path / "run")
    plain = json.loads((run.folder / ANSWERS).read_text())
    plain.pop("calibration")
    (run.folder / ANSWERS).write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"answers.json is not what this version writes"):
        load_answers(run, plain["step"])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_predictions_are_calibrated_where_it_is_asked_for(
    shop_run: Run, serving: Serving, split: str
) -> None:
    """A bias of 3 for clicks: log loss by hand; what validation measures is fitted anew."""
    params, tables, step = load_best(shop_run)
    rules = replace(shop_run.experiment.evaluate, calibrate=True)
    experiment = replace(shop_run.experiment, evaluate=rules)
    answers = Answers(step=step, calibration={"click": Scaling(np.float32(1), np.float32(3))})
    parts = shop_run.prepared, serving, params, tables, split
    found = evaluate(experiment, *parts, full=False, answers=answers)
    raw = evaluate(shop_run.experiment, *parts, full=False, answers=answers)
    assert raw.calibration == ""
    assert found.tasks["buy"] == raw.tasks["buy"]
    if split == "test":
        assert found.calibration == "platt, fitted on validation"
        assert found.tasks["click"]["log_loss"] > raw.tasks["click"]["log_loss"] + 0.3
        assert found.tasks["click"]["auc"] == pytest.approx(raw.tasks["click"]["auc"])
    else:
        assert "cross-fitted over 5 groups of users" in found.calibration
        assert abs(found.tasks["click"]["log_loss"] - raw.tasks["click"]["log_loss"]) < 0.3


def test_the_model_answers_calibrated_as_evaluation_measures(shop_run: Run) -> None:
    """`predict`, by hand from the raw probabilities: log-odds times 1/2 plus 1; logits and the
    score of the retrieval stay, and the fused order is that of calibrated probabilities anyway."""
    rules = replace(shop_run.experiment.evaluate, calibrate=True)
    run = replace(shop_run, experiment=replace(shop_run.experiment, evaluate=rules))
    asked = ["u00003"] * 5, shop_run.prepared.item_names[:5]
    plain, told = Recommender(shop_run), Recommender(run)
    scaled = {"click": Scaling(np.float32(0.5), np.float32(1.0))}
    for recommender in (plain, told):
        of = {"calibration": scaled}
        recommender._params = recommender._params | of
    raw, found = plain.predict(*asked), told.predict(*asked)
    p = np.array(raw["click"], np.float64)
    expected = 1 / (1 + np.exp(-(0.5 * np.log(p / (1 - p)) + 1)))
    np.testing.assert_allclose(found["click"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["buy"], raw["buy"], rtol=1e-6)
    ranked = plain.recommend(["u00003"], 5, order_by="fused")
    both = [np.array(ranked[name], np.float64) for name in ("click", "buy")]
    right = 1 / (1 + np.exp(-(0.5 * np.log(both[0] / (1 - both[0])) + 1)))
    np.testing.assert_allclose(ranked["score"], right * (1 + both[1]), rtol=1e-4)
