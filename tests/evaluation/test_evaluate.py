"""Evaluation of a trained model: every number beside a slow and obvious computation of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import sklearn.metrics

from mtrec_jax.config import Published
from mtrec_jax.data.dataset import Manifest, Prepared, TaskField, fixed_size, to_arrays
from mtrec_jax.data.examples import past_items
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.evaluation.collect import (
    ABSENT,
    Collected,
    collect,
    left_out_items,
    met_items,
    rank_in_list,
    seen_items,
)
from mtrec_jax.evaluation.comparison import _reference
from mtrec_jax.evaluation.evaluate import Evaluation, _intervals, _orders, evaluate
from mtrec_jax.evaluation.metrics import OF_LISTS, RANKING, mean_statistic
from mtrec_jax.evaluation.picture import draw_reliability
from mtrec_jax.evaluation.protocol import Protocol, protocol_of
from mtrec_jax.evaluation.segments import _by_value
from mtrec_jax.evaluation.tables import print_evaluation
from mtrec_jax.experiments import overridden
from mtrec_jax.models.serve import Serving, predictions, prepared_serving
from mtrec_jax.train.run import Run, evaluate_run, load_answers, load_best
from mtrec_jax.types import FIRST, UNKNOWN
from tests.data.small import make, run

TASKS = {"next_item", "click", "buy", "stars"}


@pytest.fixture(scope="module")
def serving(shop_run: Run) -> Serving:
    return prepared_serving(shop_run.experiment, shop_run.prepared)


@pytest.fixture(scope="module")
def evaluation(shop_run: Run, serving: Serving) -> Evaluation:
    params, tables, step = load_best(shop_run)
    parts = shop_run.experiment, shop_run.prepared, serving, params, tables
    return evaluate(*parts, "test", answers=load_answers(shop_run, step))


@pytest.fixture(scope="module")
def targets(shop_run: Run, serving: Serving) -> dict[str, np.ndarray]:
    """What the model says of every target of the test split, one entry a target, in float64."""
    params, tables, _ = load_best(shop_run)
    vectors = serving.item_vectors(params, tables)
    parts: list[dict[str, np.ndarray]] = []
    source = BatchSource(shop_run.prepared, "test", 16)
    for number in range(len(source)):
        batch = source[number]
        states = serving.states(params, tables, vectors, batch)
        outputs = serving.answer(params, states, vectors, batch.candidate)
        real = np.asarray(batch.row) >= 0
        user = np.broadcast_to(np.asarray(batch.user)[:, None], real.shape)
        part = {"user": user[real], "candidate": np.asarray(batch.candidate)[real]}
        part["row"] = np.asarray(batch.row)[real]
        part["state"] = np.asarray(states.vectors, np.float64)[real]
        values = {n: np.asarray(v)[real] for n, v in outputs.logits.items()}
        part |= predictions(shop_run.experiment, shop_run.prepared.manifest, values)
        parts.append(part)
    found = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return found | {"vectors": np.asarray(vectors, np.float64)}


def labels_by_row(prepared: Prepared) -> dict[int, dict[str, float]]:
    """{source row: {task: label}} of the test split."""
    found = prepared.interactions("test")
    names = [n for n in found if n.startswith("label_")]
    return {
        int(row): {n.removeprefix("label_"): float(found[n][i]) for n in names}
        for i, row in enumerate(found["row"])
    }


def cosines(states: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    return unit(states) @ unit(vectors).T


def seen_before(prepared: Prepared, split: int) -> dict[int, set[int]]:
    """{user id: item ids that were clicked in the splits before}, from the labels of these."""
    found: dict[int, set[int]] = {}
    for name in ("train", "validation", "test")[:split]:
        part = prepared.interactions(name)
        clicked = part["label_click"] == 1
        for user, item in zip(part["user"][clicked], part["candidate"][clicked], strict=True):
            found.setdefault(int(user), set()).add(int(item))
    return found


def sorted_ranks(scores: np.ndarray, target: Iterable[int], hidden: list[set[int]]) -> np.ndarray:
    """Rank of each target item id by a full sort of all items that are not hidden, a million for
    one that is hidden itself."""
    ranks = []
    for row, item, other in zip(scores, target, hidden, strict=True):
        shown = [i for i in range(2, len(row)) if i not in other]
        order = sorted(shown, key=lambda i: (-row[i], i))
        ranks.append(order.index(item) if item in order else 10**6)
    return np.array(ranks)


def retrieval_metrics(ranks: np.ndarray, k: int) -> dict[str, float]:
    hit = ranks < k
    return {
        f"hr@{k}": hit.mean(),
        f"ndcg@{k}": np.mean(hit / np.log2(ranks + 2)),
        f"mrr@{k}": np.mean(hit / (ranks + 1)),
        f"recall@{k}": hit.mean(),
        f"precision@{k}": hit.mean() / k,
        f"map@{k}": np.mean(hit / (ranks + 1)),
    }


@pytest.mark.parametrize("exclude_seen", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_retrieval_equals_a_full_sort(
    shop_run: Run, serving: Serving, targets: dict[str, np.ndarray], exclude_seen: bool
) -> None:
    """The targets of next_item are the clicked items, ranked among all that were not seen."""
    labels = labels_by_row(shop_run.prepared)
    clicked = np.array([labels[row]["click"] == 1 for row in targets["row"].tolist()])
    seen = seen_before(shop_run.prepared, 2) if exclude_seen else {}
    hidden = [seen.get(u, set()) for u in targets["user"][clicked].tolist()]
    scores = cosines(targets["state"][clicked], targets["vectors"])
    ranks = sorted_ranks(scores, targets["candidate"][clicked].tolist(), hidden)
    settings = replace(shop_run.experiment.evaluate, exclude_seen=exclude_seen, ks=(3, 10))
    params, tables, _ = load_best(shop_run)
    experiment = replace(shop_run.experiment, evaluate=settings)
    found = evaluate(experiment, shop_run.prepared, serving, params, tables, "test", full=False)
    assert found.targets["next_item"] == len(ranks) > 10
    expected = retrieval_metrics(ranks, 3) | retrieval_metrics(ranks, 10)
    assert found.tasks["next_item"] == pytest.approx(expected)
    assert not found.baselines
    assert not found.orders
    assert not found.intervals


def test_the_other_tasks_are_measured_where_they_have_labels(
    shop_run: Run, evaluation: Evaluation, targets: dict[str, np.ndarray]
) -> None:
    labels = labels_by_row(shop_run.prepared)
    rows = targets["row"].tolist()
    assert evaluation.targets["click"] == len(rows)
    observed = {t: np.array([labels[row][t] for row in rows]) for t in ("click", "buy", "stars")}
    assert np.isnan(observed["buy"][observed["click"] == 0]).all(), "bought after a click only"
    for task in ("click", "buy"):
        known = ~np.isnan(observed[task])
        y, p = observed[task][known], targets[task][known]
        assert evaluation.targets[task] == len(y)
        pairs = p[y == 1][:, None] - p[y == 0][None]
        metrics = evaluation.tasks[task]
        assert metrics["auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
        losses = -np.where(y == 1, np.log(p), np.log1p(-p))
        assert metrics["log_loss"] == pytest.approx(losses.mean())
        assert metrics["accuracy"] == pytest.approx(((p >= 0.5) == y).mean())
    known = ~np.isnan(observed["stars"])
    errors = observed["stars"][known] - targets["stars"][known]
    assert evaluation.targets["stars"] == len(errors) > 0
    assert evaluation.tasks["stars"]["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert evaluation.tasks["stars"]["mae"] == pytest.approx(np.mean(np.abs(errors)))


def test_the_popularity_baseline_has_the_same_targets(
    shop_run: Run, evaluation: Evaluation
) -> None:
    prepared = shop_run.prepared
    train, test = prepared.interactions("train"), prepared.interactions("test")
    liked = train["candidate"][train["label_click"] == 1]
    counts = np.bincount(liked, minlength=prepared.manifest.items + 2).astype(float)
    clicked = test["label_click"] == 1
    seen = seen_before(prepared, 2)
    hidden = [seen.get(u, set()) for u in test["user"][clicked].tolist()]
    scores = np.broadcast_to(counts, (len(hidden), len(counts)))
    ranks = sorted_ranks(scores, test["candidate"][clicked].tolist(), hidden)
    expected = {f"next_item/{m}": v for m, v in retrieval_metrics(ranks, 10).items()}
    found = evaluation.baselines["popularity"]
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_reference_predictions_are_measured_on_the_same_rows(
    shop_run: Run, evaluation: Evaluation
) -> None:
    found = shop_run.prepared.interactions("test")
    reference = evaluation.baselines[shop_run.experiment.data.reference]
    known = ~np.isnan(found["label_stars"])
    errors = (found["label_stars"] - found["reference_stars"])[known]
    assert reference["stars/rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-6)
    y, p = found["label_click"], found["reference_click"]
    pairs = p[y == 1][:, None] - p[y == 0][None]
    assert reference["click/auc"] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    assert reference["click/auc"] > evaluation.tasks["click"]["auc"], "the truth beats 27 steps"


def test_every_baseline_has_its_row(shop_run: Run, evaluation: Evaluation) -> None:
    reference = shop_run.experiment.data.reference
    assert set(evaluation.baselines) == {"popularity", "item_knn", "bias", reference}
    knn = evaluation.baselines["item_knn"]
    assert set(knn) == {f"next_item/{m}@10" for m in (*RANKING, *OF_LISTS)}
    shared = ("auc", "log_loss", "accuracy", "gauc", "ndcg@10")
    both = {f"{t}/{m}" for t in ("click", "buy") for m in shared}
    assert both <= set(evaluation.baselines["bias"])


def test_intervals_contain_the_value(evaluation: Evaluation) -> None:
    assert set(evaluation.intervals) == set(evaluation.tasks) == TASKS
    for task, metrics in evaluation.tasks.items():
        # resampling moves the calibration error upwards: its percentiles may leave the value out;
        # and fewer users have fewer items
        without = {"calibration_error", "coverage@10", "gini@10"}
        assert set(evaluation.intervals[task]) == set(metrics) - without
        ends = [end for pair in evaluation.intervals[task].values() for end in pair]
        assert not np.isnan(ends).any()
        for metric, (low, high) in evaluation.intervals[task].items():
            assert low <= metrics[metric] <= high, f"{task}/{metric}"
            assert low < high


def test_within_users_is_what_a_loop_over_users_gives(
    evaluation: Evaluation, targets: dict[str, np.ndarray], shop_run: Run
) -> None:
    labels = labels_by_row(shop_run.prepared)
    click = np.array([labels[row]["click"] for row in targets["row"].tolist()])
    aucs, ndcgs, sizes = [], [], []
    for user in np.unique(targets["user"]):
        own = targets["user"] == user
        if len(np.unique(click[own])) == 2:
            aucs.append(sklearn.metrics.roc_auc_score(click[own], targets["click"][own]))
            lists = click[own][None], targets["click"][own][None]
            ndcgs.append(sklearn.metrics.ndcg_score(*lists, k=10))
            sizes.append(own.sum())
    assert len(sizes) > 10
    found = evaluation.tasks["click"]
    assert found["gauc"] == pytest.approx(np.average(aucs, weights=sizes))
    assert found["ndcg@10"] == pytest.approx(np.mean(ndcgs), abs=1e-6)  # ties of float32


def test_sums_by_user_are_kept(
    evaluation: Evaluation, targets: dict[str, np.ndarray], shop_run: Run
) -> None:
    """A row a user, and the sums over all targets make the metrics."""
    table = evaluation.users
    assert table is not None
    names = [shop_run.prepared.user_names[u - FIRST] for u in np.unique(targets["user"])]
    assert sorted(table["user"].to_pylist()) == sorted(names)
    for task, found in evaluation.tasks.items():
        total = evaluation.targets[task]
        assert pc.sum(table[f"{task} targets"]).as_py() == total
        for metric, value in found.items():
            if metric not in ("calibration_error", "coverage@10", "gini@10"):
                assert pc.sum(table[f"{task}/{metric}"]).as_py() / total == pytest.approx(value)
    one = names[3]
    [place] = [i for i, name in enumerate(table["user"].to_pylist()) if name == one]
    own = targets["user"] == shop_run.prepared.user_ids[one]
    labels = labels_by_row(shop_run.prepared)
    click = np.array([labels[row]["click"] for row in targets["row"][own].tolist()])
    right = ((targets["click"][own] >= 0.5) == click).sum()
    assert table["click/accuracy"][place].as_py() == pytest.approx(right)


def test_segments_are_the_metrics_of_their_targets_alone(
    shop_run: Run, serving: Serving, targets: dict[str, np.ndarray]
) -> None:
    """By the category of the item, read from the raw ids, and for items that never trained."""
    prepared = shop_run.prepared
    asked = ("segment", "category", "cold_items")
    rules = replace(shop_run.experiment.evaluate, segments=asked, bootstrap=0, baselines=())
    params, tables, _ = load_best(shop_run)
    experiment = replace(shop_run.experiment, evaluate=rules)
    found = evaluate(experiment, prepared, serving, params, tables, "test").segments
    assert tuple(found) == asked
    labels = labels_by_row(prepared)
    click = np.array([labels[row]["click"] for row in targets["row"].tolist()])
    vocabulary = ["missing", "unknown", *prepared.vocabulary("category")["value"].to_pylist()]
    of_item = prepared.items["item_category"].to_pylist()
    category = np.array([vocabulary[of_item[c - FIRST]] for c in targets["candidate"]])
    assert set(found["category"]) == set(category)
    for name, of in found["category"].items():
        own = category == name
        assert of["click"]["targets"] == own.sum()
        if 0 < click[own].sum() < own.sum():
            auc = sklearn.metrics.roc_auc_score(click[own], targets["click"][own])
            assert of["click"]["auc"] == pytest.approx(auc, abs=1e-6)
    counts = prepared.items["count"].to_numpy()[targets["candidate"] - FIRST]
    sizes = {name: of["click"]["targets"] for name, of in found["cold_items"].items()}
    expected = {"cold": int((counts == 0).sum()), "warm": int((counts > 0).sum())}
    assert sizes == {name: size for name, size in expected.items() if size}
    by_user = {name: of["click"]["targets"] for name, of in found["segment"].items()}
    assert sum(by_user.values()) == len(click)
    assert list(by_user.values()) == sorted(by_user.values(), reverse=True)


def test_a_picture_of_reliability(evaluation: Evaluation, tmp_path: Path) -> None:
    """A line a binary task through its bins, beside the diagonal."""
    pytest.importorskip("matplotlib")
    for task in ("click", "buy"):
        bins = evaluation.reliability[task]
        gaps = [abs(b["predicted"] - b["observed"]) * b["targets"] for b in bins]
        error = evaluation.tasks[task]["calibration_error"]
        assert sum(gaps) / evaluation.targets[task] == pytest.approx(error)
    draw_reliability(evaluation, tmp_path / "bins.svg")
    drawn = (tmp_path / "bins.svg").read_text("utf-8")
    assert drawn.count('<g id="axes_') == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "bins.svg"]
    with pytest.raises(DataError, match="must end in"):
        draw_reliability(evaluation, tmp_path / "bins.txt")
    with pytest.raises(ConfigError, match="no binary task"):
        draw_reliability(replace(evaluation, reliability={}), tmp_path / "bins.png")


def test_values_of_a_segment() -> None:
    """Tags of five targets, 0 fills: one has two, one none, and the rare ones are one part."""
    ids = np.array([[2, 3], [2, 0], [0, 0], [3, 2], [4, 1]])
    names = ["missing", "unknown", "red", "blue", "green"]
    found = {name: places.tolist() for name, places in _by_value(ids, names).items()}
    assert found == {
        "red": [0, 1, 3], "blue": [0, 3], "missing": [2], "unknown": [4], "green": [4]
    }  # fmt: skip
    many = np.concatenate([np.arange(2, 32), np.arange(2, 22)])[:, None]
    cut = _by_value(many, [str(n) for n in range(32)])
    assert list(cut) == [*map(str, range(2, 22)), "other"]
    assert cut["other"].tolist() == list(range(20, 30))


def test_orders_compare_the_fused_score_with_each_task(
    shop_run: Run, evaluation: Evaluation, targets: dict[str, np.ndarray]
) -> None:
    assert set(evaluation.orders) == {"fused"} | TASKS
    for metrics in evaluation.orders.values():
        assert set(metrics) == {
            *("ndcg@10", "value@10", "utility auc", "auc click", "auc buy", "diversity@10")
        }
        assert all(0 <= value <= 1 for value in metrics.values())
    for task in ("click", "buy"):
        own = evaluation.orders[task][f"auc {task}"]
        assert own == pytest.approx(evaluation.tasks[task]["auc"])
    own = evaluation.orders["next_item"]["ndcg@10"]
    assert own == pytest.approx(evaluation.tasks["next_item"]["ndcg@10"]), "20 candidates hold 10"


def test_rank_in_a_list_of_candidates() -> None:
    scores = np.array(
        [
            [0.1, 0.9, 0.5, 0.7],  # the best but one
            [0.5, 0.5, 0.5, 0.5],  # ties: in the order of retrieval
            [0.5, 0.5, 0.9, 0.5],
            [0.1, 0.2, 0.3, 0.4],  # not among the candidates
            [9.0, 0.2, 0.9, 0.4],  # the first and the third candidate are only padding
        ]
    )
    hit = np.zeros((5, 4), bool)
    hit[[0, 1, 2, 4], [3, 2, 3, 1]] = True
    real = np.ones((5, 4), bool)
    real[4, [0, 2]] = False
    ranks = rank_in_list(scores, hit, real)
    assert ranks[[0, 1, 2, 4]].tolist() == [1, 2, 3, 1]
    assert ranks[3] > 10**6


def test_intervals_resample_users_and_each_unknown_one_alone() -> None:
    """Two users of four equal targets are two draws, whose mean is anything; eight are not."""
    statistic = mean_statistic(np.repeat([0.0, 1.0], 4))
    measured = {"like": ({"accuracy": statistic}, np.arange(8))}
    known = _intervals(measured, np.repeat([FIRST, FIRST + 5], 4), 400)
    assert known == {"like": {"accuracy": (0, 1)}}
    low, high = _intervals(measured, np.full(8, UNKNOWN), 400)["like"]["accuracy"]
    assert 0 < low < 0.5 < high < 1


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((3, -1, -2), {"like/auc": 0.5}),  # no probabilities: the order alone means something
        (
            (1, 0.5, 0.5),
            {"like/auc": 0.75, "like/log_loss": np.log(2) * 2 / 3, "like/accuracy": 2 / 3},
        ),
    ],
)
def test_predictions_of_an_existing_system(
    tmp_path: Path, scores: tuple[float, ...], expected: dict[str, float]
) -> None:
    """Those of the last event of three users, with the labels 1, 0 and 1."""
    last = zip("abc", (1, 0, 1), scores, strict=True)
    log = "user,item,like,score,time\n" + "".join(
        f"{user},x,{n % 2},0,{n}\n" for user in "abc" for n in range(3)
    )
    log += "".join(f"{user},y,{label},{score},9\n" for user, label, score in last)
    experiment = make(tasks={"like": {"kind": "binary", "reference": "score"}})
    found = _reference(experiment, run(tmp_path, experiment, log), "test")
    named = set(found) if set(expected) == {"like/auc"} else set(expected)
    assert {name: found[name] for name in named} == pytest.approx(expected, abs=1e-6)


def test_targets_of_source_rows_beyond_32_bits_are_measured(
    shop_run: Run, serving: Serving, evaluation: Evaluation, tmp_path: Path
) -> None:
    """Rows of long logs: as 32-bit numbers half of these would be negative, which is padding."""
    folder = tmp_path / "long"
    shutil.copytree(shop_run.prepared.folder, folder)
    table = pq.read_table(folder / "test.parquet")
    row = to_arrays(table.select(["row"]))["row"]
    row = np.where(row >= 0, (row + 1) * (2**31 - 1), row)
    place = table.column_names.index("row")
    table = table.set_column(place, "row", fixed_size(row))
    pq.write_table(table, folder / "test.parquet")
    params, tables, _ = load_best(shop_run)
    prepared = replace(shop_run.prepared, folder=folder)
    found = evaluate(shop_run.experiment, prepared, serving, params, tables, "test", full=False)
    assert found.targets == evaluation.targets
    for task, metrics in found.tasks.items():  # but for those of lists
        assert metrics == {name: evaluation.tasks[task][name] for name in metrics}


def test_seen_items_are_those_of_earlier_splits(shop_prepared: Prepared, tmp_path: Path) -> None:
    users = pa.table(
        {
            "event_item": [[2, 3, 4, 2], [], [5, 3]],
            "split": [[0, 1, 2, 2], [], [0, 0]],
            "did_buy": [[False, True, True, False], [], [True, False]],
            "did_like": [[False, False, False, False], [], [False, True]],
        }
    )
    pq.write_table(users, tmp_path / "users.parquet")
    manifest: Manifest = replace(shop_prepared.manifest, users=3, items=4)
    prepared = Prepared(tmp_path, manifest)
    asked = np.array([4, 2, 1, 3, 0, 2])  # ids; 0 and 1 are nobody
    for split, expected in (
        ("train", [[], [], [], [], [], []]),
        ("validation", [[3, 1], [0], [], [], [], [0]]),
        ("test", [[3, 1], [0, 1], [], [], [], [0, 1]]),
    ):
        found = seen_items(prepared, split, asked)
        assert [found[i].tolist() for i in range(len(asked))] == expected
    for behaviours, expected in (
        (("buy",), [[3], [1], [], [], [], [1]]),
        (("buy", "like"), [[3, 1], [1], [], [], [], [1]]),
    ):
        found = seen_items(prepared, "test", asked, behaviours)
        assert [found[i].tolist() for i in range(len(asked))] == expected
    with pytest.raises(DataError, match="does not say which past events have a 1 in 'cart'"):
        seen_items(prepared, "test", asked, ("cart",))


def test_of_each_user_the_last_target_alone_is_ranked(shop_run: Run, serving: Serving) -> None:
    """Among what the user has not met until then."""
    params, tables, _ = load_best(shop_run)
    whole = shop_run.experiment
    last = overridden(whole, {"evaluate.targets": "last"})
    parts = shop_run.prepared, serving, params, tables, "test", False
    every, found = collect(whole, *parts), collect(last, *parts)
    rows, times = shop_run.prepared.interactions("test"), shop_run.prepared.times("test")
    assert times is not None
    users, behaviours = np.arange(shop_run.prepared.manifest.users) + FIRST, ("click",)
    earlier = seen_items(shop_run.prepared, "test", users, behaviours)
    left_out = left_out_items(last, shop_run.prepared, "test", users)
    expected, more = [], 0
    for number, user in enumerate(users):
        own = np.flatnonzero(every.retrieved & (every.user == user))
        own = own[np.lexsort((rows["row"][own], times[own]))]
        before = every.candidate[own[:-1]] - FIRST
        assert sorted(left_out[number]) == sorted([*earlier[number], *before])
        if not len(own):
            continue
        expected.append(own[-1])
        rank, among_all = found.ranks[own[-1]], every.ranks[own[-1]]
        is_seen = every.candidate[own[-1]] - FIRST in left_out[number]
        assert rank == ABSENT if is_seen else rank <= among_all
        more += len(own) > 1
    assert np.flatnonzero(found.retrieved).tolist() == sorted(expected)
    assert more > 5
    one = replace(last, tasks={n: t for n, t in last.tasks.items() if t.kind == "retrieval"})
    alone = collect(one, *parts)  # others are not even encoded
    np.testing.assert_array_equal(alone.ranks, found.ranks)
    np.testing.assert_array_equal(np.isnan(alone.fused), ~found.retrieved)


@pytest.mark.parametrize(("positions", "where"), [(0, ""), (3, "click"), (1, "")])
def test_past_items_are_the_events_before_the_target(
    tmp_path: Path, positions: int, where: str
) -> None:
    """Those of the target's own split too; never an event of the target's own timestamp, nor one
    that the retrieval is not to find."""
    log = "user,item,time,click\n" + "".join(
        f"{user},{'vwxyz'[(time + shift) % 5]},{time},{(time // 3) % 2}\n"
        for shift, user in enumerate("abc")
        for time in range(shift, 20)
    )
    log += "a,y,19.5,1\nb,y,19.5,0\nb,v,19.5,1\n"
    data = {"positions": positions, "hide_ties": True, "history_length": 4}
    split = {"kind": "time", "validation": 0.2, "test": 0.3}
    tasks = {"next": {"kind": "retrieval", "where": where}, "click": {"kind": "binary"}}
    prepared = run(tmp_path, make(data=data, split=split, tasks=tasks), log)
    lines = [line.split(",") for line in log.splitlines()[1:]]
    for name in ("train", "test"):
        rows = prepared.interactions(name)["row"].tolist()
        assert len(rows) > 15
        wanted = met_items(prepared, prepared.wanted)[2]
        past = past_items(prepared, name, np.arange(len(rows)), wanted)
        for i, row in enumerate(rows):
            user, _, time, _ = lines[row]
            seen = [line for line in lines if line[3] == "1" or not where]
            before = [item for u, item, t, _ in seen if u == user and float(t) < float(time)]
            assert [prepared.item_names[item - 2] for item in past[i]] == before
        assert past_items(prepared, name, np.array([3]), wanted)[0].tolist() == past[3].tolist()


def test_classes_that_are_no_numbers_have_no_order(shop_run: Run) -> None:
    experiment = make(tasks={"kind": {"kind": "multiclass"}, "size": {"kind": "multiclass"}})
    fields = {"kind": TaskField(classes=("a", "b")), "size": TaskField(classes=("1", "2.5"))}
    prepared = replace(
        shop_run.prepared, manifest=replace(shop_run.prepared.manifest, tasks=fields)
    )
    logits = {name: np.zeros((1, 2)) for name in fields}
    none = np.zeros(1, int)
    made = Collected(none, none, {}, logits, np.zeros(1), none > 0, none, {})
    assert set(_orders(experiment, prepared, made)) == {"fused", "size"}


def test_an_unknown_split_is_refused(shop_run: Run) -> None:
    with pytest.raises(
        ConfigError, match="split: 'valid' is not one of 'train', 'validation', 'test'"
    ):
        evaluate_run(shop_run, "valid")


def test_undefined_metrics_are_null_in_json() -> None:
    made = Evaluation(
        split="test",
        protocol=Protocol(
            data="", split="time", validation=0.1, test=0.1, order="time", past="rolling"
        ),
        fingerprint="",
        tasks={"click": {"auc": float("nan"), "accuracy": 1.0}},
        intervals={"click": {"auc": (float("nan"), 0.5)}},
    )
    text = json.dumps(made.to_dict(), allow_nan=False)
    assert json.loads(text)["tasks"]["click"] == {"auc": None, "accuracy": 1.0}
    assert json.loads(text)["intervals"]["click"]["auc"] == [None, 0.5]


@pytest.fixture
def own_run(shop_run: Run, tmp_path: Path) -> Run:
    """A copy of the run, to be written to."""
    shutil.copytree(shop_run.folder, tmp_path / "run")
    return replace(shop_run, folder=tmp_path / "run")


@pytest.mark.slow
def test_looks_at_the_test_set_are_counted(own_run: Run, evaluation: Evaluation) -> None:
    def stored() -> dict[str, Any]:
        return json.loads((own_run.folder / "evaluation.json").read_text(encoding="utf-8"))

    assert evaluate_run(own_run)[1] == 0
    assert (stored()["split"], stored()["test_looks"]) == ("validation", 0)
    found, looks = evaluate_run(own_run, "test")
    assert looks == stored()["test_looks"] == 1
    assert found == evaluation
    assert evaluate_run(own_run.folder, "test")[1] == 2, "a path will do"
    assert evaluate_run(own_run, "validation")[1] == 2, "validation does not count"
    rules = protocol_of(own_run.experiment, own_run.prepared.manifest)
    assert stored()["protocol"]["sentence"] == str(rules)
    assert stored()["protocol"]["hash"] == rules.hash
    assert set(stored()["tasks"]) == TASKS


def test_tables_show_the_model_beside_everything_else(
    shop_run: Run, evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = Published(
        name="Paper [2018]", task="next_item", metrics={"ndcg@10": 0.1234}, source="Table 3"
    )
    experiment = replace(shop_run.experiment, published=(paper,))
    print_evaluation(experiment, evaluation)
    shown = capsys.readouterr().out
    for text in ("this model", *evaluation.baselines, "fused"):
        assert text in shown
    assert "published: Paper [2018]" in shown
    assert "0.1234" in shown
    assert f"{evaluation.tasks['click']['auc']:.4f}" in shown


def test_a_baseline_is_shown_under_its_own_tasks(
    shop_run: Run, evaluation: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"other": {"buy/auc": 0.98765}}
    print_evaluation(shop_run.experiment, replace(evaluation, baselines=made))
    shown = capsys.readouterr().out
    assert shown.count("other") == shown.count("0.9877") == 1
    assert shown.index("buy (binary") < shown.index("other") < shown.index("stars (regression")
