"""The rules of a measurement travel with its scores."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from mtrec_jax.config import Experiment, Published, Rules
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.evaluate import Evaluation
from mtrec_jax.evaluation.protocol import Protocol, check_same, protocol_of
from mtrec_jax.evaluation.tables import compared, print_compared, print_evaluation

RULES = Protocol(
    data="random split (0.1 validation, 0.1 test, seed 0), 7 users, 5 items, 99 events",
    split="random",
    validation=0.1,
    test=0.1,
    order="place",
    past="rolling",
    task="next",
    items=5,
    ks=(3, 10),
)
OTHER: dict[str, Any] = {
    "data": "other",
    "split": "time",
    "validation": 0.2,
    "test": 0.2,
    "order": "time",
    "past": "frozen",
    "targets": ("next: retrieval, where click",),
    "task": "",
    "ranked": "last",
    "candidates": "99 sampled items",
    "items": 6,
    "exclude_seen": True,
    "seen": ("click",),
    "seen_targets": "missed",
    "query_time": "known",
    "ties": "at random",
    "ks": (3,),
    "reranked": 20,
}


def test_a_protocol_is_a_sentence() -> None:
    assert str(RULES) == (
        f"{RULES.data}; next ranked among all items (5), seen ones as well, of equals the lower "
        "item first, at 3, 10"
    )
    assert str(replace(RULES, task="")) == RULES.data
    told = replace(RULES, task="", targets=("like: binary, rating >= 4",))
    assert str(told) == f"{RULES.data}; like: binary, rating >= 4"


def test_every_rule_changes_the_hash() -> None:
    hashes = [replace(RULES, **{key: value}).hash for key, value in OTHER.items()]
    assert len({RULES.hash, *hashes}) == 1 + len(OTHER)
    assert replace(RULES).hash == RULES.hash
    assert set(OTHER) == set(RULES.to_dict()) - {"sentence", "hash"}


def test_the_protocol_of_an_experiment(
    shop_experiment: Experiment, shop_prepared: Prepared
) -> None:
    found = protocol_of(shop_experiment, shop_prepared.manifest)
    assert found == Protocol(
        data=shop_prepared.manifest.protocol,
        split="time",
        validation=0.1,
        test=0.1,
        order="time",
        past="rolling",
        targets=(
            "next_item: retrieval, where click",
            "click: binary, click",
            "buy: binary, buy, where click",
            "stars: regression, stars, where buy",
        ),
        task="next_item",
        items=60,
        reranked=20,
        exclude_seen=True,
        seen=("click",),  # next_item is asked where there was a click
        seen_targets="missed",
        ks=(10,),
    )
    evaluate = replace(shop_experiment.evaluate, exclude_seen=False)
    seen = protocol_of(replace(shop_experiment, evaluate=evaluate), shop_prepared.manifest)
    check_same({"a": found, "b": replace(found)})
    with pytest.raises(ConfigError, match=r"'a' and 'c' were measured by .*exclude_seen: True"):
        check_same({"a": found, "b": found, "c": seen})


def test_other_labels_are_another_protocol(
    shop_experiment: Experiment, shop_prepared: Prepared
) -> None:
    """What is asked for is part of the rules, also where nothing that was seen is left out."""
    evaluate = replace(shop_experiment.evaluate, exclude_seen=False)
    experiment, m = replace(shop_experiment, evaluate=evaluate), shop_prepared.manifest
    tasks, hashes = m.config["tasks"], {protocol_of(experiment, m).hash}
    for name, key, value in (
        ("next_item", "where", ""),
        ("next_item", "where", "buy"),
        ("stars", "where", "click"),
        ("click", "column", "buy"),
        ("click", "at_least", 3),
        ("click", "at_least", 4),
        ("click", "equals", "yes"),
    ):
        changed = {**tasks, name: {**tasks[name], key: value}}
        config = m.config | {"tasks": changed}
        hashes.add(protocol_of(experiment, replace(m, config=config)).hash)
    derived = m.config["data"] | {"derive": {"click": "clicks > 2"}}
    hashes.add(protocol_of(experiment, replace(m, config=m.config | {"data": derived})).hash)
    fewer = replace(experiment, evaluate=replace(evaluate, candidates=7))
    hashes.add(protocol_of(fewer, m).hash)
    assert len(hashes) == 10
    # a task alone keeps its sample space, which its labels have
    alone = replace(experiment, tasks={"stars": experiment.tasks["stars"]})
    assert protocol_of(alone, m).targets == ("stars: regression, stars, where buy",)


def test_a_published_figure_of_another_protocol_says_so(
    shop_experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(protocol: str, **under: Any) -> str:
        told: dict[str, Any] = {"source": "Table 3", "protocol": protocol, "under": Rules(**under)}
        paper = Published(name="Paper", task="click", metrics={"auc": 0.9}, **told)
        tasks: dict[str, dict[str, float]] = {name: {} for name in shop_experiment.tasks}
        tasks["click"] = {"auc": 0.75}
        made = Evaluation(split="test", protocol=RULES, fingerprint="", tasks=tasks)
        print_evaluation(replace(shop_experiment, published=(paper,)), made)
        return " ".join(capsys.readouterr().out.split())

    assert "ANOTHER PROTOCOL" not in shown("") + shown(RULES.hash)
    assert "published, test split, by ANOTHER PROTOCOL (0123abcd), not comparable" in shown(
        "0123abcd"
    )
    assert f"[protocol {RULES.hash}]" in shown("")
    same, other = shown("", split=RULES.split), shown("", split="time", ranked="all")
    assert "published, test split: Paper" in same
    assert "0.9000" in same
    assert f"under other rules (split time, here {RULES.split}): Paper" in other
    assert "0.9000" not in other
    assert "under other rules (ranked last, here all" in shown("", ranked="last")
    each_one = replace(RULES, split="leave_one_out")
    assert not each_one.other_than(Rules(ranked="last"))  # of each user there is one target
    assert "under other rules (past frozen, here " in shown("", past="frozen")
    assert f"under other rules (test 0.3, here {RULES.test}" in shown("", test=0.3)


def evaluation_of(**values: Any) -> Evaluation:
    like, stars = "like: binary, rating >= 4", "stars: regression, rating"
    rules = replace(RULES, targets=("next: retrieval", like, stars), reranked=5)
    base: dict[str, Any] = {
        "split": "validation",
        "protocol": rules,
        "fingerprint": "0",
        "judged": "1",
        "tasks": {"next": {"ndcg@3": 0.5}, "like": {"auc": 0.7}, "stars": {"rmse": 0.9}},
        "targets": {"next": 9, "like": 8, "stars": 7},
        "intervals": {"like": {"auc": (0.65, 0.75)}},
    }
    return Evaluation(**base | values)


def users_of(**columns: list[float]) -> pa.Table:
    """Sums of three users, in the order of nobody."""
    found = {name.replace("__", "/").replace("_at", "@"): v for name, v in columns.items()}
    targets = {"like targets": [2, 1, 1], "next targets": [1, 0, 1]}
    return pa.table({"user": ["b", "c", "a"], **targets, **found})


def test_models_beside_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    """Likes: users a, b, c add 1, 2, .5 to the log loss of the first model and 1, .4, .7 to that of
    the other, of 1, 2 and 1 rows: a difference of -1.4 / 4, from -.35 of each row 0 + .35, -1.6 +
    .7, .2 + .35 are left, over 4."""
    one = evaluation_of(
        tasks={"next": {"ndcg@3": 0.5}, "like": {"log_loss": 3.5 / 4, "calibration_error": 0.1}},
        users=users_of(next__ndcg_at3=[1.0, 0.0, 0.0], like__log_loss=[2.0, 0.5, 1.0]),
    )
    other = evaluation_of(
        fingerprint="1",  # other features, and the tasks in another order
        protocol=replace(RULES, targets=("like: binary, rating >= 4", "next: retrieval")),
        tasks={
            "like": {"log_loss": 2.1 / 4, "calibration_error": 0.05, "auc": 0.7},
            "next": {"ndcg@3": np.nan},
        },
        targets={"next": 9, "like": 8},
        users=users_of(next__ndcg_at3=[np.nan] * 3, like__log_loss=[0.4, 0.7, 1.0]).take([2, 0, 1]),
    )
    result = compared({"all": one, "two": other})
    ndcg, loss, error = result
    assert ndcg == {"task": "next", "metric": "ndcg@3", "better": "higher", "users": 2} | {
        "all": 0.5, "two": None, "two difference": None, "two low": None, "two high": None,
        "two p": None,
    }  # fmt: skip
    left = np.array([0.35, -0.9, 0.55]) / 4
    spread = (3 / 2 * (left**2).sum()) ** 0.5
    t = 0.35 / spread
    assert loss["two difference"] == pytest.approx(-0.35)
    assert loss["two p"] == pytest.approx(2 * stats.t.sf(t, 2)), "one test alone is not corrected"
    assert loss["two high"] - loss["two low"] == pytest.approx(2 * stats.t.ppf(0.975, 2) * spread)
    assert (loss["better"], loss["users"]) == ("lower", 3)
    assert error["two difference"] == pytest.approx(-0.05)
    assert error["two p"] is None, "it has no sums"
    twice = compared({"all": one, "two": other, "again": other}, ["like/log_loss"])
    assert twice["again p"] == pytest.approx([min(2 * loss["two p"], 1)])
    assert len(twice) == 1
    print_compared(result, "validation")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["next", "ndcg@3", "↑", "0.5000"] in shown
    assert ["like", "calibration_error", "↓", "0.1000", "0.0500", "-0.0500"] in shown
    with pytest.raises(ConfigError, match=r"like/acc: the models share .*like/log_loss"):
        compared({"all": one, "two": other}, ["like/acc"])


def test_models_measured_otherwise_are_refused() -> None:
    one = evaluation_of()
    alone = evaluation_of(
        protocol=replace(RULES, task="", items=0, ks=(), targets=("stars: regression, rating",)),
        tasks={"stars": {"rmse": 0.8}},
        targets={"stars": 7},
        intervals={},
    )
    assert compared({"all": one, "alone": alone})["better"] == ["lower"]
    wrong: list[tuple[Evaluation, str]] = [
        (evaluation_of(split="test"), "on different split: .*'wrong': 'test'"),
        (evaluation_of(judged="2"), r"different events, .* \(one: 1, wrong: 2\)"),
        (evaluation_of(targets={"next": 9, "like": 8, "stars": 6}), "on different targets"),
        (evaluation_of(protocol=replace(one.protocol, ks=(3,))), r"ks: \(3, 10\) and \(3,\)"),
        (evaluation_of(tasks={}), "one, wrong have no task in common"),
    ]
    for evaluation, message in wrong:
        with pytest.raises(ConfigError, match=message):
            compared({"one": one, "wrong": evaluation})
    sums = {"like__auc": [1.0, 1.0, 1.0]}
    moved = users_of(**sums).set_column(1, "like targets", pa.array([1, 1, 2]))
    pair = {"one": evaluation_of(users=users_of(**sums)), "moved": evaluation_of(users=moved)}
    with pytest.raises(ConfigError, match="not measured on the same targets of like"):
        compared(pair)


def test_an_evaluation_survives_its_file() -> None:
    made = evaluation_of(tasks={"next": {"ndcg@3": np.nan}, "like": {"auc": 0.5}})
    stored = json.loads(json.dumps(made.to_dict() | {"test_looks": 3}))
    found = Evaluation.from_dict(stored)
    assert np.isnan(found.tasks["next"].pop("ndcg@3"))
    assert found == replace(made, tasks={"next": {}, "like": {"auc": 0.5}})
