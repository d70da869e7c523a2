"""Configuration: what is read, what is refused, and whether the message helps."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

from mtrec_jax.choices import kind_of
from mtrec_jax.config import (
    Experiment,
    Task,
    fusion_objective,
    selection,
    table_of,
    to_dict,
    to_toml,
)
from mtrec_jax.data.features import Feature
from mtrec_jax.data.features.binned import Binned
from mtrec_jax.errors import ConfigError
from mtrec_jax.experiments import (
    RESERVED,
    built_in_names,
    chosen,
    load_experiment,
    parse_experiment,
    without_effect,
)
from mtrec_jax.from_tables import experiment_of
from mtrec_jax.losses.negatives.catalogue import Popular

LEAST: dict[str, Any] = {
    "name": "least",
    "data": {"user": "u", "item": "i", "time": "t"},
    "tasks": {"next": {"kind": "retrieval"}, "like": {"kind": "binary", "column": "rating"}},
    "train": {"epochs": 1},
}


def with_keys(**sections: Any) -> dict[str, Any]:
    """The least experiment with keys of its sections replaced; a whole section is `tasks`."""
    values = {**LEAST, **{n: {**LEAST.get(n, {}), **keys} for n, keys in sections.items()}}
    return values | ({"tasks": sections["tasks"]} if "tasks" in sections else {})


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(with_keys(**sections), where="mine.toml")
    return str(caught.value)


def test_the_least_experiment_gets_the_defaults() -> None:
    experiment = parse_experiment(LEAST)
    assert experiment.train.batch_size == 128
    assert experiment.tasks["like"] == Task(kind="binary", column="rating")
    assert selection(experiment) == ((("next", "ndcg@10"),), True, ())
    assert fusion_objective(experiment) == {"next": 1.0, "like": 1.0}


def test_an_experiment_cannot_be_changed() -> None:
    experiment = parse_experiment(LEAST)
    with pytest.raises(dataclasses.FrozenInstanceError):
        experiment.name = "other"  # type: ignore[misc]


def test_reads_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(parse_experiment(LEAST)), encoding="utf-8")
    overrides = [
        "model.towers=ple",  # a bare word is text
        'name = "with spaces"',
        "train.epochs=0",
        "train.steps=1_000",
        "train.learning_rate=3e-3",
        "model.towers.expert_hidden=[8, 4]",
        "features.price.on=item",  # tables that are not there yet
        "features.price.kind=numeric",
    ]
    found = load_experiment(path, overrides)
    assert (found.model.towers.kind, found.name) == ("ple", "with spaces")
    assert (found.train.steps, found.train.learning_rate) == (1000, 0.003)
    assert found.model.towers.expert_hidden == (8, 4)
    assert found.features["price"].kind == "numeric"


def test_a_kind_alone_is_a_table_with_that_kind(tmp_path: Path) -> None:
    """In TOML, as an override, where one begins with it, and in `fit`."""
    path = tmp_path / "mine.toml"
    text = 'split = "random"\nname = "mine"\n[data]\nuser = "u"\nitem = "i"\n[train]\nepochs = 1\n'
    text += '[tasks]\nr = "binary"\nnext = "retrieval"\n[features]\nage = "numeric"\n'
    path.write_text(text, encoding="utf-8")
    overrides = ['tasks.s="regression"', "tasks.r.column=stars", "features.size=binned"]
    found = load_experiment(path, [*overrides, "features.size.bins=4", "split.test=0.2"])
    assert found.tasks["next"] == Task(kind="retrieval")
    assert found.tasks["s"] == Task(kind="regression")
    assert found.tasks["r"] == Task(kind="binary", column="stars")
    assert found.features["size"] == Binned(bins=4)
    assert (found.split.kind, found.split.test) == ("random", 0.2)
    assert found.features["age"].kind == "numeric"
    assert load_experiment(path, ["split=folds"]).split.kind == "folds"
    fitted = experiment_of(
        "u", "i", "", {"r": "binary"}, "", {"age": "numeric"}, {"split": "random"}
    )
    assert fitted.features == {"age": found.features["age"]}
    assert refusal(tasks={"r": 3}).endswith("tasks.r: must be a table, not 3")


def test_later_overrides_win() -> None:
    assert load_experiment("shop", ["train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("name", built_in_names())
def test_built_in_experiments_load_and_survive_the_way_through_toml(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert parse_experiment(tomllib.loads(to_toml(experiment))) == experiment


def test_nothing_in_a_configuration_is_evaluated() -> None:
    text = "__import__('os').system('touch /tmp/evaluated')"
    assert load_experiment("shop", [f"data.user={text}"]).data.user == text
    message = refusal(train={"batch_size": "2 ** 3"})
    assert "train.batch_size" in message
    assert "'2 ** 3'" in message


@pytest.mark.parametrize(
    ("sections", "key", "hint"),
    [
        ({"model": {"towrs": "ple"}}, "model.towrs", "towers"),
        ({"train": {"batchsize": 8}}, "train.batchsize", "batch_size"),
        ({"data": {"histroy_length": 8}}, "data.histroy_length", "history_length"),
        ({"data": {"events": {"file": ["a.csv"]}}}, "data.events.file", "files"),
        ({"tasks": {"like": {"kind": "binary", "colum": "x"}}}, "tasks.like.colum", "column"),
        ({"features": {"age": {"bin": 3}}}, "features.age.bin", "bins"),
        ({"modle": {"width": 8}}, "modle", "model"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(
    sections: dict[str, Any], key: str, hint: str
) -> None:
    message = refusal(**sections)
    assert message.startswith("mine.toml:")
    assert f"{key}: unknown key. Did you mean '{hint}'?" in message
    assert "Known here: " in message


def test_an_unknown_key_that_resembles_nothing_gets_no_hint() -> None:
    message = refusal(select={"zzzz": 1})
    assert "select.zzzz: unknown key. Known here: metric" in message


def test_an_unknown_override_is_refused_like_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.widht: unknown key. Did you mean 'width'\?"):
        load_experiment("shop", ["model.widht=3"])


def test_a_value_of_a_choice_lists_the_choices() -> None:
    message = refusal(model={"towers": "mmeo"})
    for choice in ("shared_bottom", "mmoe", "ple"):
        assert choice in message
    assert "model.towers: 'mmeo' is not one of" in message
    assert "Did you mean 'mmoe'?" in message


@pytest.mark.parametrize(
    ("sections", "key", "value"),
    [
        ({"train": {"batch_size": "many"}}, "train.batch_size", "'many'"),
        ({"train": {"batch_size": 1.5}}, "train.batch_size", "1.5"),
        ({"model": {"towers": {"expert_hidden": 8}}}, "model.towers.expert_hidden", "8"),
        ({"data": {"user": 3}}, "data.user", "3"),
        ({"train": {"learning_rate": [1]}}, "train.learning_rate", "[1]"),
    ],
)
def test_a_wrong_type_names_key_and_value(sections: dict[str, Any], key: str, value: str) -> None:
    message = refusal(**sections)
    assert f"{key}: " in message
    assert f"not {value}" in message


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match="name: required, and missing"):
        parse_experiment({})
    assert "tasks.like.kind: required, and missing" in refusal(tasks={"like": {"column": "x"}})


def test_all_problems_are_told_at_once() -> None:
    message = refusal(model={"towrs": "ple", "width": "wide"}, train={"epoch": 3})
    assert all(key in message for key in ("model.towrs", "model.width", "train.epoch"))


RETRIEVAL, LIKE = {"kind": "retrieval"}, {"kind": "binary"}
ALONE = {"user": "", "item": "", "time": ""}  # rows of nobody, without a history


def rows(**sections: Any) -> dict[str, Any]:
    """The least experiment without users, items and times."""
    values: dict[str, Any] = {"name": "rows", "data": {}, "tasks": {"like": LIKE}}
    values |= {"features": {"age": {"on": "request"}}, "train": {"epochs": 1}}
    return {**values, "model": {"encoder": "none"}, "split": {"kind": "random"}, **sections}


def test_equal_rows_are_kept_and_equal_events_are_not() -> None:
    plain = parse_experiment(rows())
    assert plain.clean.duplicates == "keep"
    assert parse_experiment(rows(clean={"min_user_events": 0})).clean.duplicates == "keep"
    assert parse_experiment(rows(clean={"duplicates": "drop"})).clean.duplicates == "drop"
    columns = {"duplicate_columns": ["age"]}
    assert parse_experiment(rows(clean=columns)).clean.duplicates == "drop"
    assert load_experiment("shop").clean.duplicates == "drop"
    assert parse_experiment(to_dict(plain)) == plain


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"tasks": {}}, "tasks: at least one is needed"),
        ({"data": {"positions": 9, "history_length": 8}}, "data.positions: at most"),
        ({"data": ALONE}, "tasks.next.kind: 'retrieval' needs data.item"),
        ({"data": ALONE, "tasks": {"like": LIKE}}, "split.kind: 'leave_one_out' needs data.user"),
        ({"data": {"time": ""}, "split": {"kind": "time"}}, "split.kind: 'time' needs data.time"),
        ({"data": ALONE, "tasks": {"like": LIKE}}, "features: one is needed with on = 'request'"),
        ({"data": {"time": "", "hide_ties": True}}, "data.hide_ties: needs data.time"),
        ({"data": {"time": "", "queries": {}}}, "data.queries: needs data.user and data.time"),
        ({"model": {"encoder": "none"}}, "'context' or 'request' every user would be the same"),
        (
            {"model": {"encoder": "none"}, "features": {"age": {}, "seen": {"on": "history"}}},
            "model.encoder: with 'none' nothing would read the history (seen)",
        ),
        (
            {"data": {"user": ""}, "split": {"kind": "time"}, "features": {"a": {"on": "request"}}},
            "tasks: retrieval asks by what is known of a user, and nothing is",
        ),
        (
            {"model": {"encoder": "none"}, "features": {"hour": {"on": "request", "kind": "hour"}}},
            "tasks: retrieval asks by what is known of a user, and nothing is",
        ),
        ({"data": {"history_length": 0}, "features": {"a": {"on": "request"}}}, "nothing is"),
        (
            {"tasks": {"next": {**RETRIEVAL, "reference": "theirs"}}},
            "tasks.next.reference: for tasks of kind binary, regression, o",
        ),
        (
            {"tasks": {"genre": {"kind": "multiclass", "reference": "theirs"}}},
            "tasks.genre.reference: for tasks of kind binary, regression, o",
        ),
        (
            {"model": {"fusion_objective": {"next": 0.0, "like": 0.0}}},
            "model.fusion_objective: at least one worth must be above 0",
        ),
        ({"split": {"kind": "folds", "folds": 2}}, "split.folds: 3 or more"),
        ({"split": {"kind": "folds", "fold": 5}}, "split.fold: between 0 and 4, not 5"),
        ({"split": {"test_files": ["t.csv"]}}, "split.test_files: for split.kind = 'files'"),
        ({"split": {"kind": "time", "validation": 0.5, "test": 0.5}}, "together below 1"),
        ({"split": {"kind": "files"}}, "split.test_files: needed"),
        ({"tasks": {"buy": {**LIKE, "where": "lik"}, "like": LIKE}}, "Did you mean 'like'?"),
        ({"tasks": {"a": RETRIEVAL, "b": RETRIEVAL}}, "tasks: one retrieval task at most"),
        (
            {"tasks": {"stars": {"kind": "regression", "at_least": 4}}},
            "tasks.stars: at_least and equals are for binary tasks",
        ),
        (
            {"tasks": {"stars": {"kind": "regression", "loss": "listwise"}}},
            "tasks.stars.loss: 'listwise' is none of kind 'regression', which has pointwise, pair",
        ),
        (
            {"tasks": {"next": {**RETRIEVAL, "loss": "pointwise"}}},
            "tasks.next.loss: 'pointwise' is none of kind 'retrieval', which has one loss",
        ),
        (
            {"tasks": {"like": {**LIKE, "loss": "pairwise"}}, "data": {"positions": 1}},
            "tasks.like.loss: 'pairwise' is over lists of a user's impressions, and a training",
        ),
        (
            {"tasks": {"like": {**LIKE, "pointwise": 0.5}}},
            "tasks.like.pointwise, .lists: of loss = 'pairwise' or 'listwise'",
        ),
        (
            {"tasks": {"like": {**LIKE, "loss": "listwise", "lists": "request"}}},
            "tasks.like.lists: 'request' puts together what a user was shown at one time",
        ),
        (
            {"tasks": {"watch": {"kind": "watch_time", "loss": "duration_quantiles"}}},
            "tasks.watch.duration: needed by loss = 'duration_quantiles'",
        ),
        (
            {"tasks": {"watch": {"kind": "watch_time", "duration": "length"}}},
            "tasks.watch.duration: there is no feature 'length'",
        ),
        (
            {
                "tasks": {"watch": {"kind": "watch_time", "duration": "length"}},
                "features": {"length": {"on": "item", "kind": "numeric"}},
            },
            "tasks.watch.duration: 'length' does not put each item in one group",
        ),
        (
            {
                "tasks": {"like": {**LIKE, "duration": "length"}},
                "features": {"length": {"on": "item", "kind": "binned"}},
            },
            "tasks.like.duration: for tasks of kind 'watch_time'",
        ),
        ({"model": {"fusion_objective": {"lik": 1.0}}}, "there is no such task. Did you mean"),
        (
            {
                "tasks": {"a": RETRIEVAL, "stars": {"kind": "regression"}},
                "model": {"fusion_objective": {"stars": 1.0}},
            },
            "model.fusion_objective.stars: a retrieval or binary task is needed",
        ),
        ({"select": {"metric": "lik/auc"}}, "there is no task 'lik'. Did you mean 'like'?"),
        ({"select": {"metric": "like/ndcg@7"}}, "task 'like' has auc, log_loss"),
        ({"select": {"metric": "like/copc"}}, "like/copc is best at 1, neither as large nor"),
        (
            {"evaluate": {"segments": ["likes"]}},
            "segments: 'likes' is none of cold_users, cold_items",
        ),
        ({"select": {"metric": "next/ndcg@5"}}, "task 'next' has hr@10, ndcg@10"),
        ({"train": {"epochs": 0}}, "train.epochs, train.steps: exactly one"),
        ({"train": {"steps": 5}}, "train.epochs, train.steps: exactly one"),
        (
            {"model": {"width": 10, "encoder": {"heads": 3}}},
            "model.width: 10 is no multiple of model.encoder.heads = 3",
        ),
        (
            {"tasks": {"a": {**LIKE, "where": "b"}, "b": {**LIKE, "where": "a"}}},
            "tasks.a.where: the sample spaces run in a circle",
        ),
        (
            {"tasks": {"like": {**LIKE, "at_least": 4, "equals": "5"}}},
            "tasks.like: at_least or equals, not both",
        ),
        ({"guard": {"allow": ["nothing/like"]}}, "guard.allow: 'nothing/like' is neither"),
        ({"features": {"a b": {}}}, "features: 'a b' names a file or column; use letters"),
        ({"features": {"City": {}, "city": {}}}, "features: 'City' occurs twice (upper and lower"),
        ({"features": {"item": {"on": "item"}}}, "features.item: the items' own rows have this"),
        ({"clean": {"earliest": "1"}, "data": {"time": ""}}, "clean.earliest: needs data.time"),
        ({"data": ALONE, "clean": {"min_item_events": 2}}, "clean.min_item_events: needs data.it"),
        (
            {"clean": {"values": {"p": {"column": "p", "low": 2.0, "high": 1.0}}}},
            "clean.values.p: low is above high",
        ),
        (
            {"clean": {"values": {"p": {"column": "p"}}}},
            "clean.values.p: give low, high or both",
        ),
        (
            {"model": {"encoder": "bert4rec"}, "data": {"hide_ties": True}},
            "data.hide_ties: kind 'bert4rec' of model.encoder hides single events",
        ),
        (
            {"features": {n: {"on": "history", "kind": "moment"} for n in ("a", "b")}},
            "features: a and b are both of kind 'moment'",
        ),
        (
            {"train": {"length_buckets": 9}, "data": {"history_length": 8}},
            "train.length_buckets: 9 for histories of 8",
        ),
        (
            {"train": {"retrieval": {"kind": "softmax", "shown": "user"}}},
            "train.retrieval.shown: every event is one that the retrieval is to find",
        ),
        (
            {
                "train": {"retrieval": {"kind": "softmax", "shown": "user"}},
                "model": {"encoder": "bert4rec"},
            },
            "train.retrieval.shown: kind 'bert4rec' of model.encoder learns hidden events alone",
        ),
        (
            {
                "evaluate": {"baselines": ["bias", {"kind": "popularity", "days": 3}]},
                "data": {"time": ""},
            },
            "evaluate.baselines.1: 3 days of what has no time",
        ),
        (
            {"train": {"negatives": {"kind": "queue", "count": 10, "batches": 4}}},
            "train.negatives.count: 10 is no multiple of train.negatives.batches = 4",
        ),
    ],
)
def test_an_impossible_combination_is_refused(sections: dict[str, Any], problem: str) -> None:
    message = refusal(**sections)
    assert "experiment 'least':" in message
    assert problem in message


@pytest.mark.parametrize(
    ("key", "least"),
    [
        ("data.history_length", 0),
        ("data.positions", 0),
        ("data.seed", 0),
        ("clean.min_user_events", 0),
        ("clean.min_item_events", 0),
        ("clean.max_bad_fraction", 0),
        ("split.seed", 0),
        ("train.batch_size", 1),
        ("train.accumulate", 1),
        ("train.length_buckets", 1),
        ("train.log_every", 1),
        ("evaluate.candidates", 1),
        ("evaluate.batch_size", 1),
        ("train.epochs", 0),
        ("train.steps", 0),
        ("train.seed", 0),
        ("train.warmup_steps", 0),
        ("train.evaluate_every", 0),
        ("train.checkpoint_every", 0),
        ("train.patience", 0),
        ("train.input_timeout", 0),
        ("train.weight_decay", 0),
        ("train.clip_norm", 0),
        ("train.row_learning_rate", 0),
        ("train.row_weight_decay", 0),
        ("train.row_clip_norm", 0),
        ("evaluate.bootstrap", 0),
    ],
)
def test_a_number_below_its_least_is_refused(key: str, least: int) -> None:
    section, name = key.split(".")
    message = refusal(**{section: {name: least - 1}})
    assert f"{key}: must be {least} or more, not {least - 1}" in message
    assert "must be" not in message.replace(f"{key}: must be", "", 1).replace(
        "exactly one must", ""
    )


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("train.mesh", [1, -1], "train.mesh.1: must be 0 or more, not -1"),
        ("train.learning_rate", 0, "train.learning_rate: must be above 0, not 0"),
        ("model.temperature", -1.0, "model.temperature: must be above 0, not -1.0"),
        ("model.dropout", 1.0, "model.dropout: must be below 1, not 1.0"),
        ("model.encoder", {"layers": 0}, "model.encoder.layers: must be 1 or more, not 0"),
        ("model.towers", {"experts": 0}, "model.towers.experts: must be 1 or more, not 0"),
        ("model.towers", {"expert_hidden": []}, "towers.expert_hidden: at least 1 needed, not []"),
        ("model.towers", {"expert_hidden": [8, 0]}, "towers.expert_hidden.1: must be 1 or more"),
        ("model.towers", {"depth": 3}, "model.towers.depth: unknown key. Known here: kind,"),
        ("train.balance", "pcgard", "train.balance: 'pcgard' is not one of 'static', 'uncertaint"),
        ("model.fusion_objective", {"like": -1.0}, "fusion_objective.like: must be 0 or more, not"),
        ("split.validation", 1.0, "split.validation: must be below 1, not 1.0"),
        ("split.test", 1.0, "split.test: must be below 1, not 1.0"),
        ("split.fold_in", 1.0, "split.fold_in: must be below 1, not 1.0"),
        ("evaluate.ks", [], "evaluate.ks: at least 1 needed, not []"),
        ("evaluate.ks", [0], "evaluate.ks.0: must be 1 or more, not 0"),
        ("train.clip_norm", math.inf, "train.clip_norm: must be a finite number, not inf"),
        (
            "train.negatives",
            {"kind": "popular", "power": math.nan},
            "train.negatives: power must be a finite number, not nan",
        ),
        (
            "train.negatives",
            {"kind": "popular", "power": "inf"},
            "train.negatives: power must be a finite number, not inf",
        ),
        ("train.negatives", Popular(power=math.nan), "power must be a finite number, not nan"),
        (
            "model.fusion",
            {"kind": "multiplicative", "powers": {"like": math.inf}},
            "model.fusion.powers.like: must be a finite number, not inf",
        ),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(key: str, value: Any, problem: str) -> None:
    section, name = key.split(".")
    assert problem in refusal(**{section: {name: value}})


@pytest.mark.parametrize("name", RESERVED)
def test_a_task_cannot_take_a_name_of_the_results(name: str) -> None:
    message = refusal(tasks={name: LIKE})
    assert f"tasks.{name}: the results use this name" in message
    assert f"rename the task and set column = '{name}'" in message


@pytest.mark.parametrize(
    ("feature", "task"),
    [
        ({"rating": {}}, {"like": {"kind": "binary", "column": "rating", "at_least": 4}}),
        ({"stars": {"column": "rating", "on": "item"}}, {"rating": {"kind": "regression"}}),
        ({"score": {}}, {"like": {"kind": "binary", "reference": "score"}}),
    ],
)
def test_a_label_among_the_features_is_refused(feature: Any, task: Any) -> None:
    message = refusal(features=feature, tasks=task)
    column = "score" if "score" in feature else "rating"
    assert f"column '{column}' is the label of task '{next(iter(task))}'" in message
    assert "leaks the answer" in message


def test_the_history_may_show_past_labels() -> None:
    experiment = parse_experiment(with_keys(features={"rating": {"on": "history"}}))
    assert experiment.features["rating"].on == "history"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.towers", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("model..towers=3", "write it as key=value"),
        ("name.first=3", "'name' is not a table"),
    ],
)
def test_a_malformed_override_is_explained(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_experiment("shop", [override])


def test_a_name_that_is_no_experiment_lists_the_built_in_ones() -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor one of .*Did you mean 'ml-1m'\?"):
        load_experiment("ml-1")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.toml"):
        load_experiment(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML: "):
        load_experiment(broken)
    broken.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*broken\.toml"):
        load_experiment(broken)


def test_selection_is_a_mean_of_metrics_of_one_direction() -> None:
    tasks = {"like": {"kind": "binary"}, "stars": {"kind": "regression"}}
    both = {"metric": ["like/log_loss", "stars/rmse"]}
    found = selection(parse_experiment(with_keys(tasks=tasks, select=both)))
    assert (found.metrics, found.larger) == ((("like", "log_loss"), ("stars", "rmse")), False)
    assert found.value({"like": {"log_loss": 0.5}, "stars": {"rmse": 1.5}}) == 1.0
    message = refusal(tasks=tasks, select={"metric": ["like/auc", "stars/rmse"]})
    assert "stars/rmse is better when lower, unlike the first" in message
    assert "has auc, log_loss" in refusal(tasks=tasks, select={"metric": ["like/auc", "like/x"]})


def test_a_selection_by_weights_is_a_sum() -> None:
    tasks = {"like": {"kind": "binary"}, "stars": {"kind": "regression"}}
    weighted = {"metric": {"like/auc": 2.0, "stars/rmse": -0.5}}
    experiment = parse_experiment(with_keys(tasks=tasks, select=weighted))
    found = selection(experiment)
    assert found.larger
    assert found.value({"like": {"auc": 0.75}, "stars": {"rmse": 1.0}}) == 1.0
    assert found.name == "2 like/auc - 0.5 stars/rmse"
    assert parse_experiment(tomllib.loads(to_toml(experiment))) == experiment
    assert chosen(experiment, tasks=["stars"]).select.metric == {"stars/rmse": -0.5}
    for metric, wanted in (("like/auc", "above"), ("stars/rmse", "below")):
        wrong = {"metric": weighted["metric"] | {metric: 0.0}}
        assert f"{metric} needs a weight {wanted} 0, not 0" in refusal(tasks=tasks, select=wrong)
    wrong = {"metric": {"like/auc": 1.0, "stars/rmse": 1.0}}
    assert "stars/rmse needs a weight below 0, not 1" in refusal(tasks=tasks, select=wrong)


def test_segments_are_features_with_values() -> None:
    features = {
        "city": {},
        "age": "numeric",
        "years": {"kind": "binned", "column": "age"},
        "like": {"on": "history"},
    }
    rules = {"segments": ["city", "years", "cold_items"]}
    found = parse_experiment(with_keys(features=features, evaluate=rules))
    assert chosen(found, features=["city"]).evaluate.segments == ("city", "cold_items")
    for name in ("age", "like"):
        message = refusal(features=features, evaluate={"segments": [name]})
        assert f"segments: '{name}' is none of city, years, cold_users, cold_items" in message


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "sgd"])
def test_a_weight_decay_that_would_do_nothing_is_refused(optimizer: str) -> None:
    train = {"weight_decay": 0.1, "optimizer": optimizer}
    assert "train.weight_decay: " in refusal(train=train)
    assert parse_experiment(with_keys(train=train | {"optimizer": "adamw"}))


def test_a_decay_of_rows_that_ftrl_would_undo_is_refused() -> None:
    train = {"row_weight_decay": 0.1, "row_optimizer": "ftrl"}
    message = "train.row_weight_decay: 'ftrl'"
    assert message in refusal(train=train)
    assert message in refusal(train={"row_weight_decay": 0.1}, tables={"item": {"rule": "ftrl"}})
    dense = {"item": {"update": "dense"}}
    assert parse_experiment(with_keys(train=train, tables=dense))


def test_selection_knows_which_way_is_better() -> None:
    lower = parse_experiment(with_keys(select={"metric": "like/log_loss"}))
    assert selection(lower) == ((("like", "log_loss"),), False, ())
    tasks = {"stars": {"kind": "regression"}}
    assert selection(parse_experiment(with_keys(tasks=tasks)))[:2] == ((("stars", "rmse"),), False)
    first_k = with_keys(evaluate={"ks": [5, 10]})
    assert selection(parse_experiment(first_k))[:2] == ((("next", "ndcg@5"),), True)


def test_a_published_figure_names_rules_that_there_are() -> None:
    figure = {"name": "a", "task": "next", "metrics": {"ndcg@10": 0.1}, "source": "b"}
    values = LEAST | {"published": [figure, figure | {"under": {"splits": "time"}}]}
    with pytest.raises(ConfigError, match=r"published\W1\W+under\W+splits"):
        parse_experiment(values)


def test_every_experiment_that_can_be_written_can_be_read_again() -> None:
    """Optional parts are left out of TOML, which knows no null."""
    values = with_keys(
        data={"items": {"files": ["i.csv"], "rename": {"a.b": "c"}}},
        model={"fusion_objective": {"like": 0.1}},
        train={"mesh": [2, 1], "learning_rate": 1e-20},
    )
    values["published"] = [
        {"name": "é", "task": "next", "metrics": {"ndcg@10": 0.1}, "source": 'a "quoted"\nline'}
    ]
    experiment = parse_experiment(values)
    again = parse_experiment(tomllib.loads(to_toml(experiment)))
    assert isinstance(again, Experiment)
    assert again == experiment


# --- Features


@pytest.mark.parametrize(
    ("feature", "problem"),
    [
        ({"kind": "numerc"}, "f: 'numerc' is not one of 'categorical', "),
        ({"kind": "numerc"}, "Did you mean 'numeric'?"),
        (3, "features.f: a kind, or a table with kind, not 3"),
        ({"bins": 3}, "f.bins: not of kind 'categorical', but of 'binned', 'piecewise', 'gap', "),
        ({"kind": "binned", "bins": 0}, "f.bins: must be 1 or more, not 0"),
        ({"kind": "binned", "bins": "many"}, "f.bins: "),
        ({"kind": "hashed", "buckets": 2**31}, "f.buckets: must be 2,147,483,644 or less, not 2"),
        ({"kind": "multi_valued", "separator": ""}, "f.separator: "),
        ({"kind": "multi_valued", "on": "history"}, "f.kind: one value an event on the history"),
        ({"kind": "numeric", "on": "history"}, "f.on: kind 'numeric' is for 'context' or"),
        ({"kind": "text", "on": "request"}, "because texts are kept for items and users, not"),
        ({"kind": "ties", "on": "item"}, "f.on: kind 'ties' is for 'context', because friends"),
        ({"kind": "hour"}, "f.on: kind 'hour' is for 'request' or 'history', because users and"),
        ({"kind": "past_count", "on": "item"}, "would contain the outcome of the target itself"),
        ({"kind": "past_rate", "on": "history"}, "features.f.label: required, and missing"),
        (
            {"kind": "past_rate", "on": "history", "label": "lke"},
            "f.label: 'lke' is no binary or regression task. Did you mean 'like'?",
        ),
        ({"kind": "past_rate", "on": "history", "label": "next"}, "'next' is no binary or"),
        ({"impute": "median"}, "f.impute: kind 'categorical' takes 'none', 'mode', 'constant', "),
        ({"kind": "ties", "impute": "own"}, "f.impute: kind 'ties' takes 'none', not 'own'"),
        ({"impute": "constant"}, "f.impute, .constant: impute = 'constant' and its value go tog"),
        ({"constant": "x"}, "f.impute, .constant: impute = 'constant' and its value go together"),
        (
            {"kind": "numeric", "impute": "constant", "constant": "x"},
            "f.constant: 'x' is no number, which 'numeric' needs",
        ),
    ],
)
def test_a_feature_that_cannot_be_is_refused_at_once(feature: Any, problem: str) -> None:
    assert problem in refusal(features={"f": feature})


@pytest.mark.parametrize(
    ("data", "feature", "problem"),
    [
        (ALONE, {}, "features.f.on: 'context' needs data.user; use 'request'"),
        (ALONE, {"on": "item"}, "features.f.on: 'item' needs data.item"),
        ({"history_length": 0}, {"on": "history"}, "features.f.on: a history is of data.user and"),
        ({"time": ""}, {"kind": "hour", "on": "request"}, "features.f: needs data.time, or a colu"),
        ({"time": ""}, {"kind": "gap", "on": "request"}, "features.f.kind: 'gap' needs data.user"),
    ],
)
def test_a_feature_needs_what_it_is_made_of(data: Any, feature: Any, problem: str) -> None:
    assert problem in refusal(data=data, features={"f": feature}, tasks={"like": LIKE})


def test_a_kind_alone_is_a_feature() -> None:
    features = parse_experiment(with_keys(features={"age": "numeric", "city": {}})).features
    assert (features["age"].kind, features["city"].kind) == ("numeric", "categorical")


# --- Tables


def test_a_table_says_what_the_configuration_does_not() -> None:
    experiment = parse_experiment(
        with_keys(
            features={"city": {}, "who": {"column": "u"}},
            tables={"who": {"update": "sparse", "capacity": 9}, "item": {"rule": "ftrl"}},
            train={"row_optimizer": "adagrad"},
        )
    )
    city, who, item = (table_of(experiment, name) for name in ("city", "who", "item"))
    assert (city.update, who.update, item.update) == ("dense", "sparse", "sparse")
    assert (who.rule, item.rule, who.capacity) == ("adagrad", "ftrl", 9)
    assert (city.hash_functions, city.id_dropout) == (2, 0.0)


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        (
            {"cty": {}},
            "tables.cty: no such table; there are item, city, hour. Did you mean 'city'?",
        ),
        ({"age": {}}, "tables.age: 'numeric' gives no ids to look up; remove it"),
        ({"city": {"rule": "sgd"}}, "tables.city.rule: of row by row updates; set update ="),
        ({"city": {"rule": "sgdd"}}, "tables.city.rule: 'sgdd' is not one of"),
        ({"city": {"capacity": -1}}, "tables.city.capacity: must be 0 or more, not -1"),
        ({"city": {"id_dropout": 1.0}}, "tables.city.id_dropout: must be below 1, not 1.0"),
        ({"hour": {"capacity": 9}}, "tables.hour.capacity: the values of kind 'hour' do not grow"),
        ({"city": {"hash_rows": 9, "hash_functions": 0}}, "must be 1 or more, not 0"),
        ({"city": {"hash_rows": 2, "hash_functions": 3}}, "tables.city.hash_functions: at most"),
        ({"city": {"hash_rows": 9, "capacity": 5}}, "hash_rows has room for any number of values"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tables: dict[str, Any], problem: str) -> None:
    features = {"city": {}, "age": "numeric", "hour": {"kind": "hour", "on": "request"}}
    assert problem in refusal(features=features, tables=tables)


# --- Some of the declared tasks and features


FUNNEL: dict[str, Any] = with_keys(
    features={"city": {}, "age": "numeric", "rate": {"on": "request", "kind": "past_rate"}},
    tasks={"next": RETRIEVAL, "click": LIKE, "buy": {**LIKE, "where": "click"}},
    tables={"city": {"update": "sparse"}, "item": {"capacity": 9}},
    model={"fusion_objective": {"click": 2.0, "next": 0.0}},
    select={"metric": "click/auc"},
    guard={"allow": ["city/click", "age/buy"]},
)
FUNNEL["features"]["rate"]["label"] = "click"
CLICKED = FUNNEL["tasks"] | {"next": {**RETRIEVAL, "where": "click"}}


def test_a_list_chooses_from_what_is_declared(tmp_path: Path) -> None:
    path = tmp_path / "funnel.toml"
    path.write_text(to_toml(parse_experiment(FUNNEL)), encoding="utf-8")
    whole = load_experiment(path, ['tasks=["buy"]', "features=[]"], choose=False)
    assert whole == parse_experiment(FUNNEL)
    found = load_experiment(path, ['tasks=["buy", "next"]', "features=rate,age", "train.seed=7"])
    assert list(found.tasks) == ["next", "buy"]  # in the order in which they are declared
    assert list(found.features) == ["age", "rate"]
    assert (found.left_out, found.train.seed) == (("click",), 7)
    # what names something else falls away
    assert (found.tasks["buy"].where, found.select.metric) == ("", "")
    assert (found.model.fusion_objective, found.guard.allow) == ({}, ("age/buy",))
    assert list(found.tables) == ["item"]
    assert found.features["rate"] == whole.features["rate"]  # means what it meant
    # and a run can be opened again, and chosen from again
    assert parse_experiment(tomllib.loads(to_toml(found))) == found
    assert found.evaluate.seen == ()  # what makes items seen stays what it was
    funnel = chosen(parse_experiment(FUNNEL | {"tasks": CLICKED}), tasks=["next"])
    assert funnel.evaluate.seen == ("click",)
    again = chosen(found, tasks=["buy"])
    assert (list(again.tasks), again.left_out) == (["buy"], ("click", "next"))


def test_a_sample_space_stays_with_its_task() -> None:
    found = chosen(parse_experiment(FUNNEL), tasks=["click", "buy"])
    assert found.tasks["buy"].where == "click"
    assert found.select.metric == "click/auc"
    assert found.model.fusion_objective == {"click": 2.0}


def test_powers_of_the_fusion_fall_away_with_their_tasks() -> None:
    """Else the model of what is left would be refused; where none is left they are learned."""
    powers = {"click": 1.0, "buy": 0.5}
    model = {"fusion": {"kind": "multiplicative", "powers": powers}}
    whole = parse_experiment(FUNNEL | {"model": model})
    assert chosen(whole, tasks=["next", "buy"]).model.fusion.powers == {"buy": 0.5}
    assert chosen(whole, tasks=["next"]).model.fusion.powers == {}
    assert chosen(whole, features=[]).model.fusion.powers == powers


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"tasks": ["clik"]}, "tasks: 'clik' is not declared. Did you mean 'click'?"),
        ({"features": "cty"}, "features: 'cty' is not declared. Did you mean 'city'?"),
        ({"tasks": []}, "tasks: at least one is needed"),
        ({"tasks": 3}, "tasks: 3 is no list"),
        ({"tasks": [3]}, "tasks: 3 is not declared"),
    ],
)
def test_a_choice_of_nothing_declared_is_refused(choice: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(parse_experiment(FUNNEL), **choice)
    assert problem in str(caught.value)


# --- Kinds of one's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(Feature):
    """A kind that no file of the package knows."""

    kind: Literal["parity"] = "parity"
    least: int = 0


def test_a_kind_of_ones_own_is_read_and_written() -> None:
    values = with_keys(features={"odd": {"kind": "parity", "least": 2}, "plain": "parity"})
    experiment = parse_experiment(values, extensions=[Parity])
    assert experiment.features == {"odd": Parity(least=2), "plain": Parity()}
    text = tomllib.loads(to_toml(experiment))
    assert parse_experiment(text, extensions=[Parity]) == experiment
    with pytest.raises(ConfigError, match=r"odd: 'parity' is not one of .*extensions=\["):
        parse_experiment(text)
    misspelt = with_keys(features={"odd": {"kind": "parity", "leest": 2}})
    with pytest.raises(ConfigError, match=r"odd\.leest: unknown key\. Did you mean 'least'\?"):
        parse_experiment(misspelt, extensions=[Parity])
    instance = parse_experiment(with_keys(features={"odd": Parity(least=3)}))
    assert instance.features["odd"] == Parity(least=3)


@pytest.mark.parametrize("extension", [7, int, Experiment, Feature, Parity()])
def test_an_extension_is_a_class_with_a_kind(extension: Any) -> None:
    with pytest.raises(ConfigError, match=r"extensions: .* is no frozen dataclass with a field"):
        kind_of(extension)


def test_a_kind_of_ones_own_takes_no_other_ones_name() -> None:
    make: Any = functools.partial(dataclasses.make_dataclass, frozen=True, kw_only=True)
    hours = make("Hours", [("kind", str, "hour")], bases=(Feature,))
    with pytest.raises(ConfigError, match="'hour' is a kind of the package; give Hours another"):
        parse_experiment(with_keys(features={"city": {}}), extensions=[hours])
    twin = make("Twin", [("kind", str, "parity")])
    with pytest.raises(ConfigError, match="extensions: two classes of kind 'parity'; rename one"):
        parse_experiment(LEAST, extensions=[Parity, twin])


def test_an_option_may_be_set_where_a_kind_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = to_toml(parse_experiment(with_keys(features={"age": "binned"})))
    [table] = re.findall(r"\[features.age\]\n(?:.+\n)+", text)
    path.write_text(text.replace(table, "") + "[features]\nage = 'binned'\n", "utf-8")
    assert load_experiment(path, ["features.age.bins=3"]).features["age"] == Binned(bins=3)
    found = load_experiment(path, ["model.towers=ple", "model.towers.experts=3"])
    assert (found.model.towers.kind, found.model.towers.experts) == ("ple", 3)


def test_the_model_suits_what_is_chosen_not_what_is_declared() -> None:
    """Without an encoder nothing reads a history: fine where no history feature is chosen."""
    plain = "model.encoder=none"
    with pytest.raises(ConfigError, match="nothing would read the history"):
        load_experiment("shop", [plain])
    with pytest.raises(ConfigError, match="nothing would read the history"):
        load_experiment("shop", [plain, "features=segment,click"])
    assert list(load_experiment("shop", [plain, "features=segment"]).features) == ["segment"]
    assert "click" in load_experiment("shop", [plain, "features=segment"], choose=False).features


def test_what_changes_nothing_is_said() -> None:
    when = {"features.when": {"on": "history", "kind": "moment"}}
    read = {"model.encoder": "hstu"}
    assert without_effect(load_experiment("shop", when | read)) == []
    assert without_effect(load_experiment("shop")) == []
    (said,) = without_effect(load_experiment("shop", when | {"model.encoder": "gru"}))
    assert said.startswith("features.when has no effect: model.encoder = 'gru' does not compare")
