"""What a step is wired to: a model of a few numbers, and every step of it written out in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from mtrec_jax.balance import BALANCERS
from mtrec_jax.choices import keys
from mtrec_jax.config import Train
from mtrec_jax.losses.negatives.contract import items_drawn
from mtrec_jax.models.model import Model, Rows, make_catalogue
from mtrec_jax.sharding import make_mesh, put_batch, replicate
from mtrec_jax.tables.layout import TableSize, make_layout
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.step import Step, learning_rate, make_step
from mtrec_jax.types import Batch, Catalogue, PyTree, Shared, TrainState, Wanted
from tests import tiny

ITEMS, WIDTH, SIZE, NEGATIVES = 12, 2, 5, 8
RATE = 0.1  # of what balancing methods learn
TASKS: dict[str, dict[str, Any]] = {"click": {"kind": "binary"}, "stars": {"kind": "regression"}}
START = {"scale": [1.5, -0.5], "click": [0.3, 0.8], "stars": [-0.6, 0.9], "luck": [0.0, 0.0]}


def batch(seed: int) -> Batch:
    """Five examples of one position; one item comes twice, and labels are missing."""
    rng = np.random.default_rng(seed)
    shape = (SIZE, 1)
    items = rng.integers(2, ITEMS, shape).astype(np.int32)
    items[1] = items[0]
    mask = {"click": np.ones(shape), "stars": np.array([[1.0], [0], [1], [1], [0]])}
    return Batch(
        context={},
        request={},
        events={},
        cutoff=np.zeros(shape, np.int32),
        candidate=items,
        labels={name: rng.normal(size=shape) for name in TASKS},
        mask=mask,
        user=np.arange(SIZE, dtype=np.int32),
        weight=np.ones(shape),
        row=None,
    )


def toy(lucky: bool) -> Model:
    """user = scale * row of the item; the loss of a task is (user . head - label)^2.

    `lucky` adds a loss whose gradient is what chance has drawn: how often each negative, and a
    number from the key of each dropout.
    """
    layout = make_layout({"item": TableSize("sgd", ITEMS)}, {"item": [("item", 1)]}, WIDTH)
    network = {name: jnp.array(values) for name, values in START.items()}
    network["negatives"] = jnp.zeros(ITEMS)
    names = (*TASKS, *["luck"] * lucky)

    def ids(batch: Batch, catalogue: Catalogue, key: jax.Array | None, drawing: PyTree) -> Wanted:
        assert key is not None
        drawn = items_drawn(catalogue.cumulative, NEGATIVES, key)
        looked_up, none = {"item": jnp.asarray(batch.candidate)[..., None]}, jnp.zeros(0)
        return Wanted(looked_up, none, drawn, none, {"steps": drawing["steps"] + 1})

    def encode(
        params: PyTree, rows: Rows, batch: Batch, catalogue: Catalogue, wanted: Wanted, key: Any
    ) -> Shared:
        users = rows["item"][:, :, 0] * params["network"]["scale"][None, None]
        none = jnp.zeros((SIZE, 0))
        luck = jax.random.uniform(key, (SIZE, 1)) if lucky else none
        return Shared(users, luck, none, none, none, none, none, none)

    def weights(batch: Batch, lottery: jax.Array) -> dict[str, jax.Array]:
        found = {name: jnp.sum(jnp.asarray(batch.mask[name])) for name in TASKS}
        return found | ({"luck": jnp.ones(())} if lucky else {})

    def losses(
        params: PyTree,
        shared: Shared,
        batch: Batch,
        catalogue: Catalogue,
        wanted: Wanted,
        key: jax.Array,
    ) -> tuple[dict[str, jax.Array], None]:
        own, sums = params["network"], {}
        for name in TASKS:
            error = shared.users @ own[name] - jnp.asarray(batch.labels[name])
            sums[name] = jnp.sum(jnp.asarray(batch.mask[name]) * error**2)
        if lucky:
            numbers = jnp.stack([shared.context[0, 0], jax.random.uniform(key)])
            drawn = own["negatives"][wanted.negatives].sum()
            sums["luck"] = drawn + (own["luck"] * numbers).sum()
        return sums, None

    def unused(*arguments: Any) -> Any:
        raise NotImplementedError

    return Model(
        layout=layout,
        tasks=tuple(TASKS),
        names=names,
        fuses=False,
        owners=(),
        by_example=frozenset({"item"}),
        abstract={"network": jax.eval_shape(lambda: network)},
        init=lambda seed: {"network": network},
        altered=lambda batch, key: batch,
        ids=ids,
        drawing=lambda: {"steps": jnp.zeros((), jnp.int32)},
        encode=encode,
        weights=weights,
        losses=losses,
        fusion_loss=None,
        items=unused,
        users=unused,
        score=unused,
        item_ids=unused,
    )


class Case(NamedTuple):
    """A step of the toy."""

    model: Model
    step: Step
    mesh: jax.sharding.Mesh
    catalogue: Catalogue

    def learn(self, state: TrainState, seed: int) -> TrainState:
        return self.step.update(state, put_batch(batch(seed), self.mesh), self.catalogue)

    def numbers(self, state: TrainState) -> dict[str, np.ndarray]:
        """Everything that is trained: the layers, and the rows of all items."""
        everything = np.arange(ITEMS, dtype=np.int32)[:, None]
        rows = fetch(self.model.layout, state.tables, {"item": jnp.asarray(everything)})["item"]
        found = {name: np.array(value) for name, value in state.params["network"].items()}
        return found | {"rows": np.array(rows)[:, 0]}


def case(weights: tuple[float, float] = (1.0, 1.0), lucky: bool = False, **train: Any) -> Case:
    """With plain descent, unless told otherwise."""
    plain = {"optimizer": "sgd", "row_optimizer": "sgd", "learning_rate": 0.1, "batch_size": SIZE}
    tasks = {n: t | {"weight": w} for (n, t), w in zip(TASKS.items(), weights, strict=True)}
    experiment = tiny.experiment(tasks=tasks, train=plain | {"precision": "float64"} | train)
    mesh, model = make_mesh((1, 1)), toy(lucky)
    none: dict[str, np.ndarray] = {
        "ids": np.zeros((ITEMS, 0), np.int32),
        "numbers": np.zeros((ITEMS, 0)),
    }
    catalogue = make_catalogue(none, np.arange(1, ITEMS - 1), ITEMS - 2, 1.0, "float64")
    return Case(model, make_step(experiment, model, mesh, 8), mesh, replicate(catalogue, mesh))


class Gradients(NamedTuple):
    """Of the toy, by hand."""

    losses: np.ndarray  # [T]
    heads: np.ndarray  # [T, 2] of each task's own head
    users: np.ndarray  # [T, B, 2] at the shared representation


def written_out(now: dict[str, np.ndarray], examples: Batch) -> Gradients:
    users = now["rows"][examples.candidate[:, 0]] * now["scale"]
    losses, heads, at_users = [], [], []
    for name in TASKS:
        mask = examples.mask[name][:, 0]
        error = users @ now[name] - examples.labels[name][:, 0]
        losses.append((mask * error**2).sum() / mask.sum())
        slope = 2 * mask * error / mask.sum()
        heads.append(slope @ users)
        at_users.append(slope[:, None] * now[name])
    return Gradients(np.array(losses), np.array(heads), np.array(at_users))


def total(
    now: dict[str, np.ndarray], examples: Batch, of_heads: np.ndarray, of_users: np.ndarray
) -> dict[str, np.ndarray]:
    """The gradient of everything, from those of the heads and at the shared representation."""
    items = examples.candidate[:, 0]
    found = {name: of_heads[t] for t, name in enumerate(TASKS)}
    found["scale"] = (of_users * now["rows"][items]).sum(axis=0)
    found["rows"] = np.zeros((ITEMS, WIDTH))
    np.add.at(found["rows"], items, of_users * now["scale"])
    return found


def weighted(
    now: dict[str, np.ndarray], examples: Batch, weights: np.ndarray
) -> dict[str, np.ndarray]:
    one = written_out(now, examples)
    mixed = np.einsum("t,tbd->bd", weights, one.users)
    return total(now, examples, weights[:, None] * one.heads, mixed)


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: before[n] - after[n] for n in ("click", "stars", "scale", "rows")}


def assert_close(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 1e-9
) -> None:
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=rtol, atol=1e-12, err_msg=name)


class Rule:
    """A balancing method written out: what its paper says of two tasks, in NumPy.

    `weights` are those of the heads, `shares` those of the shared part, both of the unweighted
    gradients; `scale`, if there is one, takes the place of the shared layer's gradient.
    """

    def __init__(self, kind: str, at: str, declared: np.ndarray):
        self.kind, self.at, self.declared, self.scale = kind, at, declared, np.zeros(0)
        self.logs, self.first = np.zeros(0), np.zeros(0)  # of the last losses, the first losses
        self.learned = np.zeros(2)  # log-variances, logits, averages of norms
        self.moments, self.averages = np.zeros((2, 2)), np.zeros((2, 2))
        self.factors, self.before = declared, np.zeros(0)
        self.conflicts = 0

    def __call__(
        self, step: int, losses: np.ndarray, own: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weights and shares, given the gradients [T, n] of the tasks where they are compared."""
        declared = self.declared
        if self.kind in ("pcgrad", "cagrad"):
            gram = np.outer(declared, declared) * (own @ own.T)
            self.conflicts += gram[0, 1] < 0
            return declared, declared * {"pcgrad": surgery, "cagrad": averse}[self.kind](gram)
        if self.kind == "dbmtl":
            return declared / losses, self._dual(step, losses, own)
        found = {
            "static": lambda: declared,
            "uncertainty": lambda: self._uncertainty(losses),
            "dwa": lambda: self._average(step, losses),
            "famo": lambda: self._famo(step, losses),
            "gradnorm": lambda: self._norms(losses, np.linalg.norm(own, axis=1)),
        }[self.kind]()
        return found, found

    def _uncertainty(self, losses: np.ndarray) -> np.ndarray:
        weights = self.declared * np.exp(-self.learned)
        self.learned = self.learned - RATE * (1 - np.exp(-self.learned) * losses)
        return weights

    def _average(self, step: int, losses: np.ndarray) -> np.ndarray:
        """Dynamic weight average with windows of one step."""
        weights = self.factors
        if step:
            ratio = np.exp(losses / self.before / 2)
            self.factors = self.declared * 2 * ratio / ratio.sum()
        self.before = losses
        return weights

    def _famo(self, step: int, losses: np.ndarray) -> np.ndarray:
        z = self.declared * np.exp(self.learned)
        z = z / z.sum()
        if step:
            fallen = self.logs - np.log(losses)
            slope = z * (fallen - z @ fallen) + 0.001 * self.learned
            beta = np.array([[0.9], [0.999]])
            self.moments = beta * self.moments + (1 - beta) * np.array([slope, slope**2])
            one, two = self.moments / (1 - beta**step)
            self.learned = self.learned - RATE * one / (np.sqrt(two) + 1e-8)
            z = self.declared * np.exp(self.learned)
        self.logs = np.log(losses)
        return z / losses * self.declared.sum() / (z / losses).sum()

    def _norms(self, losses: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        """GradNorm."""
        weights = self.factors
        self.first = self.first if len(self.first) else losses
        ratio = losses / self.first
        target = (weights * slopes).mean() * (ratio / ratio.mean()) ** 1.5
        moved = weights - RATE * np.sign(weights * slopes - target) * slopes
        self.factors = moved * self.declared.sum() / moved.sum()
        return weights

    def _dual(self, step: int, losses: np.ndarray, own: np.ndarray) -> np.ndarray:
        """DB-MTL."""
        own = own / losses[:, None]
        norms = np.linalg.norm(own, axis=1)
        if self.at == "representation":
            self.learned = norms if not step else 0.9 * self.learned + 0.1 * norms
            return self.declared / losses * self.learned.max() / self.learned
        self.averages = 0.9 * self.averages + 0.1 * own
        norms = np.linalg.norm(self.averages, axis=1)
        factors = self.declared * norms.max() / norms
        self.scale = factors @ self.averages
        return factors / losses


def surgery(gram: np.ndarray) -> np.ndarray:
    """PCGrad of two tasks: each loses its projection on the other, if they conflict."""
    return 1 - min(gram[0, 1], 0) / np.diag(gram)


def averse(gram: np.ndarray) -> np.ndarray:
    """CAGrad of two tasks with c = 0.4, by a search over the simplex."""

    def dual(x: float) -> float:
        w = np.array([x, 1 - x])
        return w @ gram.sum(axis=1) + radius * np.sqrt(w @ gram @ w)

    radius = 0.4 * np.sqrt(gram.sum())
    x = optimize.minimize_scalar(dual, bounds=(0, 1), method="bounded", options={"xatol": 1e-10}).x
    w = np.array([x, 1 - x])
    return 1 + radius * w / np.sqrt(w @ gram @ w)


_AT = [(kind, "representation") for kind in BALANCERS]
_AT += [(kind, "parameters") for kind, options in BALANCERS.items() if "at" in keys(options)]
_REST = ("cagrad", "dbmtl", "dwa")  # their rules are tested alone, the first two at parameters too


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        pytest.param(
            kind, at, marks=[pytest.mark.slow] * (kind in _REST and at == "representation")
        )
        for kind, at in _AT
    ],
)
def test_steps_of_each_balancing_in_numpy(kind: str, at: str) -> None:
    """At the representation, of the users' vectors; at the parameters, of the only layer that both
    tasks use, whose gradients the papers speak of: rows follow with the same shares."""
    declared, options = np.array([1.0, 3.0]), dict[str, Any]({"kind": kind})
    if "at" in keys(BALANCERS[kind]):
        options["at"] = at
    options |= {"window": 1} if kind == "dwa" else {}
    options |= {"learning_rate": RATE} if "learning_rate" in keys(BALANCERS[kind]) else {}
    with jax.enable_x64(True):
        made = case((1.0, 3.0), balance=options)
        state, rule = made.step.init(3), Rule(kind, at, declared)
        for step, seed in enumerate((1, 2, 5)):
            now, examples = made.numbers(state), batch(seed)
            one = written_out(now, examples)
            at_scale = (one.users * now["rows"][examples.candidate[:, 0]]).sum(axis=1)
            own = one.users.reshape(2, -1) if at == "representation" else at_scale
            weights, shares = rule(step, one.losses, own)
            mixed = np.einsum("t,tbd->bd", shares, one.users)
            expected = total(now, examples, weights[:, None] * one.heads, mixed)
            if len(rule.scale):
                expected["scale"] = rule.scale
            state = made.learn(state, seed)
            taken = moved(now, made.numbers(state))
            tolerance = 1e-5 if kind == "cagrad" else 1e-9
            assert_close(taken, {name: 0.1 * g for name, g in expected.items()}, tolerance)
        if kind == "pcgrad":
            assert rule.conflicts


def test_twice_the_weight_is_twice_the_step_of_that_task_alone() -> None:
    with jax.enable_x64(True):
        taken = []
        for weights in ((1.0, 1.0), (1.0, 2.0), (1.0, 0.0)):
            made = case(weights)
            state = made.step.init(3)
            before = made.numbers(state)
            taken.append(moved(before, made.numbers(made.learn(state, 1))))
    once, twice, never = taken
    np.testing.assert_allclose(twice["stars"], 2 * once["stars"], rtol=1e-9)
    np.testing.assert_allclose(twice["click"], once["click"], rtol=1e-9)
    for name in ("scale", "rows"):
        second = once[name] - never[name]
        np.testing.assert_allclose(twice[name], once[name] + second, rtol=1e-9, atol=1e-12)
    assert not never["stars"].any()


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("constant", 0.4, 0.4), ("cosine", 0.2, 0), ("linear", 0.2, 0)]
)
def test_rates_at_the_ends_of_warm_up_and_training(schedule: Any, half: float, end: float) -> None:
    """12 steps, the first 4 of them warm up; step 8 is half of what is left."""
    config = Train(learning_rate=0.4, row_learning_rate=0.8, schedule=schedule, warmup_steps=4)
    rates = learning_rate(config, config.learning_rate, 12)
    expected = [0.0, 0.1, 0.2, 0.4, half, end]
    steps = (0, 1, 2, 4, 8, 12)
    np.testing.assert_allclose([rates(step) for step in steps], expected, atol=1e-7)
    rows = learning_rate(config, config.row_learning_rate, 12)
    np.testing.assert_allclose([rows(s) for s in steps], [2 * e for e in expected], atol=1e-7)
    same = learning_rate(config, 0.0, 12)  # rows without a rate of their own
    np.testing.assert_allclose([same(step) for step in steps], expected, atol=1e-7)
    cold = learning_rate(Train(learning_rate=0.4, schedule=schedule), 0.4, 8)
    np.testing.assert_allclose([cold(s) for s in (0, 4, 8)], [0.4, half, end], atol=1e-7)


def test_each_step_has_its_rate_and_rows_have_their_own() -> None:
    """8 steps in all: warm-up over two, then linearly to 0 over six."""
    shares = [0, 1 / 2, 1, 5 / 6, 4 / 6]
    with jax.enable_x64(True):
        made = case(schedule="linear", warmup_steps=2, row_learning_rate=0.3)
        state = made.step.init(3)
        for seed, share in enumerate(shares):
            now = made.numbers(state)
            gradient = weighted(now, batch(seed), np.ones(2))
            state = made.learn(state, seed)
            expected = {n: (0.3 if n == "rows" else 0.1) * share * g for n, g in gradient.items()}
            assert_close(moved(now, made.numbers(state)), expected, 1e-6)  # rates are float32


def test_gradients_are_clipped_the_layers_together_and_each_row_by_itself() -> None:
    with jax.enable_x64(True):
        made = case(clip_norm=0.2, row_clip_norm=0.3)
        state = made.step.init(3)
        now = made.numbers(state)
        now["rows"][2:] *= 100  # of initial rows, whose gradients are small
        state = _with_rows(made, state, now["rows"])
        gradient = weighted(now, batch(1), np.ones(2))
        dense = np.concatenate([gradient[n] for n in ("click", "stars", "scale")])
        share = 0.2 / np.linalg.norm(dense)
        norms = np.linalg.norm(gradient["rows"], axis=1, keepdims=True)
        assert share < 1
        assert (norms > 0.3).any()
        expected = {name: 0.1 * share * g for name, g in gradient.items()}
        expected["rows"] = 0.1 * gradient["rows"] * np.minimum(1, 0.3 / np.maximum(norms, 1e-9))
        assert_close(moved(now, made.numbers(made.learn(state, 1))), expected)


def _with_rows(made: Case, state: TrainState, rows: np.ndarray) -> TrainState:
    """The state with other rows of the items."""
    ids = jnp.asarray(np.arange(ITEMS, dtype=np.int32)[:, None])
    held = np.array(state.tables["sgd"])
    for row in range(2, ITEMS):
        before = np.asarray(fetch(made.model.layout, state.tables, {"item": ids[row]})["item"])
        place = np.flatnonzero((held == before).all(axis=1))
        held[place] = rows[row]
    put = jax.device_put(held, state.tables["sgd"].sharding)
    return state._replace(tables={"sgd": put})


def test_weights_decay_those_of_layers_always_and_rows_that_are_touched() -> None:
    """The first step of Adam is the sign of the gradient, whatever its size."""
    with jax.enable_x64(True):
        made = case(optimizer="adamw", weight_decay=0.5, row_weight_decay=0.25)
        state = made.step.init(3)
        now, examples = made.numbers(state), batch(1)
        gradient = weighted(now, examples, np.ones(2))
        after = made.numbers(made.learn(state, 1))
    for name in ("click", "stars", "scale"):
        expected = 0.1 * (np.sign(gradient[name]) + 0.5 * now[name])
        np.testing.assert_allclose(now[name] - after[name], expected, rtol=1e-4)
    touched = np.isin(np.arange(ITEMS), examples.candidate)[:, None]
    assert touched.any()
    assert not touched[2:].all()
    expected = 0.1 * (gradient["rows"] + 0.25 * now["rows"] * touched)
    np.testing.assert_allclose(now["rows"] - after["rows"], expected, rtol=1e-9, atol=1e-12)


def test_chance_draws_anew_at_each_step_and_by_the_seed() -> None:
    """Negatives, the dropout in the encoder, the dropout before the towers."""

    def drawn(made: Case, seed: int) -> list[np.ndarray]:
        state, found = made.step.init(seed), []
        for _ in range(3):
            before = made.numbers(state)
            state = made.learn(state, 1)
            after = made.numbers(state)
            counts = (before["negatives"] - after["negatives"]) / 0.1
            np.testing.assert_allclose(counts, np.round(counts), atol=1e-6)
            assert counts.sum() == pytest.approx(NEGATIVES)
            found.append(np.append(np.round(counts), (before["luck"] - after["luck"]) / 0.1))
        return found

    with jax.enable_x64(True):
        made = case(lucky=True)
        one, again, other = drawn(made, 3), drawn(made, 3), drawn(made, 4)
    np.testing.assert_array_equal(one, again)
    different = [*one, *other]
    for part in (slice(0, ITEMS), slice(ITEMS, ITEMS + 1), slice(ITEMS + 1, ITEMS + 2)):
        assert len({tuple(draw[part]) for draw in different}) == 6


@pytest.mark.parametrize(
    ("power", "expected"),
    [(0.0, [1 / 3, 1 / 3, 1 / 3]), (0.5, [2 / 6, 3 / 6, 1 / 6]), (1.0, [4 / 14, 9 / 14, 1 / 14])],
)
def test_negatives_follow_a_power_of_the_counts(power: float, expected: list[float]) -> None:
    """Counts of 4, 9 and 1; a fourth item was never met in training."""
    none: dict[str, np.ndarray] = {"ids": np.zeros((6, 0), np.int32), "numbers": np.zeros((6, 0))}
    found = make_catalogue(none, np.array([4, 9, 1, 7]), 3, power, "float64")
    np.testing.assert_allclose(np.exp(found.log_probability), [0, 0, *expected, 0], atol=1e-12)
    many = 20_000
    ids = np.asarray(items_drawn(found.cumulative, many, jax.random.key(0)))
    shares = np.bincount(ids, minlength=6) / many
    np.testing.assert_allclose(shares, [0, 0, *expected, 0], atol=0.02)
