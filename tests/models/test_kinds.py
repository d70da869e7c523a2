"""Any mix of kinds in one model: sample spaces, missing labels, weights of examples, lists."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtrec_jax
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Manifest, TaskField
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.metrics import METRICS, metrics_of
from mtrec_jax.models.model import Model, make_model
from mtrec_jax.models.serve import make_serving
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.gradients import draw
from mtrec_jax.train.loop import check_lists
from mtrec_jax.types import Batch, Outputs, PyTree, UserStates
from tests import tiny

SIZE = 32
TASKS: dict[str, Any] = {
    "click": {"kind": "binary", "loss": "listwise", "pointwise": 0.25},
    "stars": {"kind": "ordinal", "where": "click"},
    "grade": {"kind": "ordinal", "loss": "pairwise", "lists": "request"},
    "seconds": {"kind": "watch_time", "loss": "duration_quantiles", "duration": "brand"},
    "minutes": {"kind": "watch_time"},
    "cost": {"kind": "regression"},
    "genre": {"kind": "multiclass"},
}
NUMBERS = ("1", "2", "3", "5")
GROUPS = ((0.0, 5.0, 20.0),) * 3 + ((0.0, 40.0, 80.0), (10.0, 20.0, 40.0))  # by the brand's id


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return tiny.experiment(tasks=TASKS, model={"dropout": 0.0}, data={"hide_ties": True})


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    learned = {
        "click": TaskField(mean=0.5, std=0.5),
        "stars": TaskField(classes=NUMBERS, shares=(0.1, 0.2, 0.3, 0.4)),
        "grade": TaskField(classes=NUMBERS),
        "seconds": TaskField(mean=20.0, std=9.0, quantiles=GROUPS),
        "minutes": TaskField(mean=2.0, std=3.0),
        "cost": TaskField(mean=3.0, std=2.0),
        "genre": TaskField(classes=("a", "b", "c")),
    }
    return dataclasses.replace(tiny.manifest(), tasks=learned)


@pytest.fixture(scope="module")
def model(experiment: Experiment, manifest: Manifest) -> Model:
    return make_model(experiment, manifest)


@pytest.fixture(scope="module")
def params(model: Model) -> PyTree:
    rng = np.random.default_rng(0)

    def drawn(like: Any) -> jax.Array:
        return jnp.asarray(0.4 * rng.normal(size=like.shape), jnp.float32)

    found: PyTree = jax.tree.map(drawn, model.abstract)
    stacks = {s: drawn(jax.ShapeDtypeStruct((n, 8), "f4")) for s, n in model.layout.rows.items()}
    return found | {DENSE: stacks.pop(DENSE), "tables": stacks}


def _batch() -> Batch:
    """Labels of every kind; a third of them are missing, stars where nobody clicked; requests are
    told apart by their cutoff; two tasks have weights, some of them 0."""
    examples, rng = tiny.batch(3, SIZE), np.random.default_rng(1)
    shape = examples.weight.shape
    labels = {
        "click": rng.integers(0, 2, shape),
        "stars": rng.choice([1, 2, 3, 5], shape),
        "grade": rng.choice([1, 2, 3, 5], shape),
        "seconds": rng.choice([0.0, 3.0, 12.0, 60.0], shape),
        "minutes": rng.choice([0.0, 0.5, 4.0], shape),
        "cost": rng.normal(size=shape),
        "genre": rng.integers(0, 3, shape),
    }
    mask = {n: (examples.weight > 0) & (rng.random(shape) < 0.7) for n in labels}
    mask["grade"] = examples.weight > 0
    mask["stars"] &= (labels["click"] == 1) & mask["click"]
    weights = {n: rng.choice([0.0, 0.5, 1.0, 3.0], shape) for n in ("click", "seconds", "grade")}
    return examples._replace(
        cutoff=np.minimum(examples.cutoff, 1),
        labels={n: np.where(mask[n], x, 0).astype("f4") for n, x in labels.items()},
        mask={n: x.astype("f4") for n, x in mask.items()},
        weights={n: x.astype("f4") for n, x in weights.items()},
    )


def _groups(batch: Batch) -> np.ndarray:
    return np.asarray(tiny.catalogue().ids)[batch.candidate][..., 0]


def _pointwise(logits: dict[str, Any], b: Batch) -> dict[str, np.ndarray]:
    """The losses of each position, from the papers' formulas."""

    def sigmoid(x: Any) -> np.ndarray:
        return 1 / (1 + np.exp(-np.asarray(x, np.float64)))

    def class_of(name: str) -> np.ndarray:
        return np.searchsorted([1, 2, 3, 5], np.maximum(b.labels[name], 1))

    cut = np.pad(sigmoid(logits["stars"]), ((0, 0), (0, 0), (1, 1)), constant_values=((0, 0),) * 3)
    cut[..., 0] = 1
    p = np.take_along_axis(cut[..., :-1] - cut[..., 1:], class_of("stars")[..., None], -1)[..., 0]
    target = np.empty(b.weight.shape)
    for place, group in np.ndenumerate(_groups(b)):
        target[place] = np.interp(b.labels["seconds"][place], GROUPS[group], [0, 0.5, 1])
    odds = np.exp(np.asarray(logits["minutes"], np.float64))
    genre = np.asarray(jax.nn.log_softmax(logits["genre"]))
    of_genre = np.take_along_axis(genre, np.asarray(b.labels["genre"], int)[..., None], -1)
    return {
        "click": np.log1p(np.exp(-(2 * b.labels["click"] - 1) * np.asarray(logits["click"]))),
        "stars": -np.log(p),
        "seconds": 12 * (sigmoid(logits["seconds"]) - target) ** 2,
        "minutes": b.labels["minutes"] / 2 * np.log(1 + 1 / odds) + np.log(1 + odds),
        "cost": (np.asarray(logits["cost"]) - (b.labels["cost"] - 3) / 2) ** 2,
        "genre": -of_genre[..., 0],
    }


def _listwise(scores: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> np.ndarray:
    found = np.zeros_like(scores)
    for s, y, w, out in zip(scores, labels, weight, found, strict=True):
        if (w * y).sum():
            out[:] = -(w * y) @ (s - np.log(w @ np.exp(s))) / (w * y).sum()
    return found


def _pairwise(
    scores: np.ndarray, labels: np.ndarray, weight: np.ndarray, request: np.ndarray
) -> np.ndarray:
    found = np.zeros_like(scores)
    for s, y, w, r, out in zip(scores, labels, weight, request, found, strict=True):
        for one in set(r.tolist()):
            pairs = [
                (w[i] * w[j], np.log1p(np.exp(s[j] - s[i])))
                for i in range(len(s))
                for j in range(len(s))
                if r[i] == r[j] == one and y[i] > y[j]
            ]
            if total := sum(count for count, _ in pairs):
                out[r == one] = sum(count * loss for count, loss in pairs) / total
    return found


def test_losses_of_every_kind_worked_out(model: Model, params: PyTree) -> None:
    """From the logits: what is missing has no part in any sum or weight, an example of weight w
    counts w times, and lists are those of the example, or of it and one cutoff."""
    b, catalogue, key = _batch(), tiny.catalogue(), jax.random.key(0)
    tables = params["tables"]

    @jax.jit
    def run(params: PyTree, batch: Batch) -> Any:
        wanted = model.ids(batch, catalogue, key)
        rows = fetch(model.layout, tables | {DENSE: params[DENSE]}, wanted.ids)
        draws = draw(key, batch)
        shared = model.encode(params, rows, batch, catalogue, wanted, None)
        sums, _ = model.losses(params, shared, batch, catalogue, wanted, None)
        weights = model.weights(batch, draws.lottery)
        outputs = tiny.forward(model, params, tables, catalogue, batch)[2]
        return sums, weights, outputs.logits

    sums, weights, logits = jax.device_get(run(params, b))
    assert logits["stars"].shape == (*b.weight.shape, 3)
    weight = {n: b.weight * b.mask[n] * b.weights.get(n, 1) for n in TASKS}
    losses = _pointwise(logits, b)
    clicked, graded = (np.asarray(b.labels[name]) for name in ("click", "grade"))
    listed = _listwise(logits["click"], clicked, np.asarray(weight["click"]))
    losses["click"] = 0.75 * listed + 0.25 * losses["click"]
    grades = logits["grade"][..., 0], graded, np.asarray(weight["grade"])
    losses["grade"] = _pairwise(*grades, np.asarray(b.cutoff))
    assert (losses["grade"].max(1) != losses["grade"].min(1)).any()  # two requests in an example
    for name in TASKS:
        np.testing.assert_allclose(weights[name], weight[name].sum(), rtol=1e-5, err_msg=name)
        expected = (losses[name] * weight[name]).sum()
        np.testing.assert_allclose(sums[name], expected, rtol=1e-4, err_msg=name)
        assert expected > 0


def test_answers_are_in_the_labels_unit(
    experiment: Experiment, manifest: Manifest, model: Model
) -> None:
    """A quantile of 1/2 is 5, 40 or 20 seconds, by the item's brand; log-odds of log 3 are three
    times the mean of 2 minutes; of cumulative log-odds log 3, 0 and -log 3 each class has 1/4."""
    b, catalogue = _batch(), tiny.catalogue()
    logits = {"seconds": 0.0, "minutes": np.log(3.0), "stars": np.log([3.0, 1.0, 1 / 3])}

    def score(params: PyTree, states: UserStates, found: Any) -> Outputs:
        shape, none = found.shape[:2], jnp.zeros(found.shape[:2])
        whole = {n: jnp.broadcast_to(x, (*shape, *np.shape(x))) for n, x in logits.items()}
        return Outputs(whole, none, none[..., None], {}, {})

    serving = make_serving(experiment, manifest, model._replace(score=score), catalogue)
    nothing = jnp.zeros((SIZE, 0))
    states = UserStates(nothing, nothing, nothing, nothing, nothing, jnp.asarray(b.cutoff))
    vectors = jnp.zeros((len(catalogue.row), 8))
    found = jax.device_get(serving.answer({}, states, vectors, b.candidate).predictions)
    middle = np.array(GROUPS)[_groups(b), 1]
    assert len(set(middle.ravel().tolist())) == 3
    np.testing.assert_allclose(found["seconds"], middle, rtol=1e-5)
    np.testing.assert_allclose(found["minutes"], 6.0, rtol=1e-5)
    np.testing.assert_allclose(found["stars"], np.full((*b.cutoff.shape, 4), 0.25), rtol=1e-5)


def test_a_loss_over_lists_needs_lists(experiment: Experiment, manifest: Manifest) -> None:
    alone = dataclasses.replace(manifest, positions={"train": 1})
    with pytest.raises(ConfigError, match=r"tasks\.click\.loss: 'listwise' .* more than one pos"):
        make_model(experiment, alone)


def test_towers_with_a_loss_of_their_own_take_none_over_lists() -> None:
    tasks = {
        "click": {"kind": "binary"},
        "buy": {"kind": "binary", "where": "click", "loss": "pairwise"},
    }
    experiment = tiny.experiment(tasks=tasks, model={"towers": {"kind": "esmm"}})
    learned = {name: TaskField() for name in tasks}
    model = make_model(experiment, dataclasses.replace(tiny.manifest(), tasks=learned))
    b = _batch()
    labels, mask = (dict.fromkeys(tasks, of["click"]) for of in (b.labels, b.mask))
    b = b._replace(labels=labels, mask=mask)
    with pytest.raises(ConfigError, match=r"tasks\.buy\.loss: model\.towers\.kind = 'esmm'"):
        jax.eval_shape(model.weights, b._replace(row=None), jnp.zeros(b.weight.shape))


@pytest.fixture(scope="module")
def recommender(compiled_programs: dict[str, str], tmp_path_factory: Any) -> Any:
    """A short run on 30 people who watched 12 films each: short ones up to 10 seconds, long ones
    between 100 and 200."""
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    rows = [(p, (p + place) % 12, place) for p in range(30) for place in range(12)]
    events = pandas.DataFrame(rows, columns=["person", "film", "when"])
    is_long = events["film"].to_numpy() >= 6
    seconds = np.where(is_long, rng.integers(100, 200, len(rows)), rng.integers(0, 10, len(rows)))
    events["seconds"], events["weight"] = seconds, rng.integers(0, 3, len(rows))
    events["stars"], events["like"] = (
        rng.choice([1, 2, 5], len(rows)),
        rng.integers(0, 2, len(rows)),
    )
    items = {"film": range(12), "length": [30 + n if n < 6 else 300 + n for n in range(12)]}
    return mtrec_jax.fit(
        events,
        user="person",
        item="film",
        time="when",
        items=pandas.DataFrame(items),
        tasks={
            "next": "retrieval",
            "seconds": TASKS["seconds"] | {"duration": "length"},
            "stars": {"kind": "ordinal", "weight_column": "weight"},
            "like": {"kind": "binary", "loss": "pairwise", "pointwise": 0.5},
        },
        features={"length": {"on": "item", "kind": "binned", "bins": 2}},
        settings={
            "data": {"history_length": 8},
            "model": {
                "width": 4,
                "encoder": {"layers": 1},
                "towers": {"experts": 2, "expert_hidden": [4], "tower_hidden": [4]},
            },
            "train": {"steps": 4, "batch_size": 8, "negatives": {"count": 8}, "mesh": [1, 1]},
            "evaluate": {"batch_size": 32, "candidates": 12, "baselines": ["bias"], "bootstrap": 5},
            "guard": {"allow": ["length"]},
        },
        folder=tmp_path_factory.mktemp("fitted") / "films",
        show_progress=False,
    )


@pytest.mark.slow
def test_a_run_answers_in_seconds_and_stars(recommender: Any) -> None:
    """Slow: a whole run, whose parts others test. Whatever was learned, a quantile of a short film
    is at most 9 seconds, and one of a long film 100 at least; expected stars are those of the
    classes' probabilities."""
    people = [person for person in range(30) for _ in range(12)]
    found = recommender.predict(people, list(range(12)) * 30)
    seconds, film = np.array(found["seconds"]), np.array(found["item"], int)
    assert seconds[film < 6].max() <= 9
    assert 100 <= seconds[film >= 6].min() <= seconds.max() <= 199
    classes = np.stack([found[f"stars {name}"] for name in ("1", "2", "5")], axis=1)
    np.testing.assert_allclose(classes.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(found["stars"], classes @ [1, 2, 5], rtol=1e-5)
    listed = recommender.recommend([3], k=5, order_by="seconds", exclude_seen=False)
    assert listed["seconds"] == sorted(listed["seconds"], reverse=True)
    np.testing.assert_allclose(listed["score"], listed["seconds"], rtol=1e-6)
    listed = recommender.recommend([3], k=5, order_by="stars", exclude_seen=False)
    assert listed["stars"] == sorted(listed["stars"], reverse=True)


@pytest.mark.slow
def test_an_evaluation_has_the_metrics_of_every_kind(recommender: Any) -> None:
    """Slow: of the same run. The predictions that are judged are those that people read."""
    found = mtrec_jax.evaluate_run(recommender.run, "validation")[0].to_dict()
    rows = recommender.prepared.interactions("validation")
    for name in ("seconds", "stars"):
        assert list(found["tasks"][name]) == metrics_of(recommender.experiment.tasks[name].kind, ())
    assert list(found["baselines"]["bias"]) == [
        *(f"seconds/{metric}" for metric in METRICS["watch_time"]),
        *("stars/rmse", "stars/mae"),
        *(f"like/{metric}" for metric in metrics_of("binary", (10,))),
    ]
    assert {"seconds", "stars", "like", "fused"} < set(found["orders"])
    # ordered classes and times have a place in the orders, and none in the utility
    assert set(recommender.answers.calibration) == {"like"}
    assert set(recommender.answers.values) == set(found["orders"])
    assert "utility: p(next) (1 + 1 p(like | next))" in found["order"]
    assert np.isin(rows["label_stars"], [1, 2, 5]).all()
    assert found["tasks"]["seconds"]["mae"] < 100  # the group is that of the film


def test_lists_that_teach_nothing_are_refused(experiment: Experiment) -> None:
    """Impressions that all have a time, and so a request, of their own."""
    batch = _batch()
    check_lists(experiment, [batch])
    each = np.broadcast_to(np.arange(batch.weight.shape[1]), batch.weight.shape)
    nothing = batch._replace(cutoff=each)
    check_lists(experiment, [nothing, batch])
    grade = dataclasses.replace(experiment.tasks["grade"], pointwise=0.5)
    check_lists(dataclasses.replace(experiment, tasks={"grade": grade}), [nothing])
    with pytest.raises(ConfigError, match=r"tasks\.grade\.loss: .* that of the request"):
        check_lists(experiment, [nothing])
