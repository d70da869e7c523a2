"""Towers, an encoder, a balancing method, a baseline and a kind of features of one's own: written
here, passed in from Python, and no file of the package knows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx
from pydantic import Field

import mtrec_jax
from mtrec_jax.balance import Balancer, Gradients, Pullback
from mtrec_jax.baselines import Interactions
from mtrec_jax.config import Experiment
from mtrec_jax.data.features import Encoding, Feature
from mtrec_jax.errors import ConfigError
from mtrec_jax.models.encoders import Behaviour, EncoderSizes
from mtrec_jax.models.towers import TowerInput, TowerOutput, TowerSizes
from mtrec_jax.train.records import read_records
from mtrec_jax.train.run import Run
from mtrec_jax.types import FIRST, Lists
from tests.conftest import SMALL_SHOP

# --- Towers: a cross layer, and a loss of their own


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """`kind = "crossed"`: x + x (W x + b), then a linear head a task."""

    kind: Literal["crossed"] = "crossed"
    strength: Annotated[float, Field(gt=0)] = 0.01  # of the logits' decay

    def make(self, sizes: TowerSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> CrossedTowers:
        return CrossedTowers(sizes, self.strength, dtype=dtype, rngs=rngs)


class CrossedTowers(nnx.Module):
    extra_losses = ("decay",)

    def __init__(self, sizes: TowerSizes, strength: float, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        n = sizes.inputs
        self.tasks, self.strength = tuple(sizes.tasks), strength
        self.cross = nnx.Linear(n, n, param_dtype=dtype, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(n, 1, param_dtype=dtype, rngs=rngs) for _ in self.tasks])

    def __call__(self, given: TowerInput) -> TowerOutput:
        x = given.x + given.x * self.cross(given.x)
        logits = {t: head(x)[:, 0] for t, head in zip(self.tasks, self.heads, strict=True)}
        return TowerOutput(logits, dict.fromkeys(self.tasks, x), {"crossed": x})

    def losses(
        self,
        logits: Mapping[str, jax.Array],
        labels: Mapping[str, jax.Array],
        mask: Mapping[str, jax.Array],
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Logits are drawn to 0 where clicks are known; the tasks' own losses stay."""
        total = jnp.sum(jnp.stack([jnp.square(logits[task]) for task in self.tasks]), axis=0)
        return {"decay": (self.strength * total, mask["click"])}


# --- An encoder


@dataclass(frozen=True, kw_only=True)
class RunningMean:
    """`kind = "running_mean"`: state s is the mean of the tokens 0 .. s, through a layer."""

    kind: Literal["running_mean"] = "running_mean"

    def make(self, sizes: EncoderSizes, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> MeanEncoder:
        return MeanEncoder(sizes.width, dtype=dtype, rngs=rngs)


class MeanEncoder(nnx.Module):
    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.project = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)

    def __call__(self, past: Behaviour, key: jax.Array | None) -> jax.Array:
        tokens = past.tokens
        count = jnp.arange(1, tokens.shape[1] + 1, dtype=tokens.dtype)[None, :, None]
        return self.project(jnp.cumsum(tokens, axis=1) / count)


# --- Balancing


@dataclass(frozen=True, kw_only=True)
class RandomWeights:
    """`kind = "drawn"`: other weights in every step, of the declared sum (Lin et al. 2022)."""

    kind: Literal["drawn"] = "drawn"

    def make(self, initial: jax.Array) -> Balancer:
        def combine(
            pullback: Pullback, observed: jax.Array, state: Any, key: jax.Array
        ) -> tuple[Gradients, Any]:
            weights = jax.nn.softmax(jax.random.normal(key, initial.shape, initial.dtype))
            return pullback(weights * jnp.sum(initial)), state + 1

        return Balancer(
            init=lambda params: jnp.zeros((), jnp.int32), combine=combine, in_parts=True
        )


# --- A baseline


@dataclass(frozen=True, kw_only=True)
class Again:
    """`kind = "again"`: what a user has had, the more often the better."""

    kind: Literal["again"] = "again"

    def fit(self, interactions: Interactions) -> Fitted:
        return Fitted(interactions.n_items, float(np.nanmean(interactions.labels["click"])))


@dataclass(frozen=True)
class Fitted:
    n_items: int
    clicks: float

    def scorer(self, users: np.ndarray, histories: Lists) -> Counted:
        return Counted(histories, self.n_items)

    def predict(self, task: str, users: np.ndarray, items: np.ndarray) -> np.ndarray | None:
        return np.full(len(users), self.clicks) if task == "click" else None


@dataclass(frozen=True)
class Counted:
    histories: Lists
    n_items: int

    def scores(self, queries: np.ndarray) -> np.ndarray:
        size = self.n_items + FIRST
        counts = [np.bincount(self.histories[q], minlength=size)[FIRST:] for q in queries]
        return np.array(counts, np.float32)


# --- A kind of features


@dataclass(frozen=True, kw_only=True)
class Magnitude(Feature):
    """`kind = "magnitude"`: an id for each number of digits before the point."""

    kind: Literal["magnitude"] = "magnitude"
    most: Annotated[int, Field(ge=1)] = 6
    of_numbers: ClassVar[bool] = True

    def fit(self, name: str, cells: pa.Array, counts: np.ndarray) -> Encoding:
        return Encoding(name, self, size=FIRST + self.most)

    def encode(self, encoding: Encoding, cells: pa.Array) -> np.ndarray:
        digits = [
            0 if cell is None else FIRST + min(len(str(int(float(cell)))), self.most) - 1
            for cell in cells.to_pylist()
        ]
        return np.array(digits, np.int32)[:, None]


OWN = [Crossed, RunningMean, RandomWeights, Again, Magnitude]


def _from_toml() -> Experiment:
    return mtrec_jax.load_experiment(
        "shop",
        [
            *(
                override
                for override in SMALL_SHOP
                if not override.startswith(("model.towers", "model.encoder"))
            ),
            'model.towers={ kind = "crossed", strength = 0.05 }',
            "model.encoder=running_mean",
            "train.balance=drawn",
            'evaluate.baselines=["popularity", "again"]',
            'features.magnitude={ kind = "magnitude", on = "item", column = "price", most = 3 }',
            "train.steps=6",
            "train.evaluate_every=3",
            "train.log_every=2",
            "train.accumulate=2",
        ],
        extensions=OWN,
    )


def _from_instances(shop: Experiment) -> Experiment:
    magnitude = Magnitude(on="item", column="price", most=3)
    model = dataclasses.replace(shop.model, towers=Crossed(strength=0.05), encoder=RunningMean())
    train = dataclasses.replace(
        shop.train,
        balance=RandomWeights(),
        steps=6,
        evaluate_every=3,
        log_every=2,
        accumulate=2,
    )
    baselines = (shop.evaluate.baselines[0], Again())
    return dataclasses.replace(
        shop,
        features={**shop.features, "magnitude": magnitude},
        model=model,
        train=train,
        evaluate=dataclasses.replace(shop.evaluate, baselines=baselines),
    )


@pytest.fixture(scope="module")
def run(
    shop_experiment: Experiment,
    shop_data: Path,
    compiled_programs: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """Trained with what was passed in as instances."""
    folder = tmp_path_factory.mktemp("extensions")
    experiment = _from_instances(shop_experiment)
    prepared = mtrec_jax.prepare(experiment, shop_data, folder / "prepared")
    return mtrec_jax.train_run(experiment, prepared, folder / "run", show_progress=False)


def test_names_and_instances_say_the_same(shop_experiment: Experiment) -> None:
    assert _from_toml() == _from_instances(shop_experiment)


def test_options_are_checked_where_they_are_declared() -> None:
    with pytest.raises(ConfigError, match=r"model\.towers\.strength: must be above 0, not -1"):
        mtrec_jax.load_experiment(
            "shop", {"model.towers": {"kind": "crossed", "strength": -1}}, extensions=OWN
        )


def test_they_are_trained_and_evaluated(run: Run) -> None:
    records = read_records(run.folder / "metrics.jsonl")
    losses = [r["value"] for r in records if (r["split"], r["task"]) == ("train", "decay")]
    assert len(losses) == 3
    assert min(losses) > 0
    evaluation, _ = mtrec_jax.evaluate_run(run)
    assert set(evaluation.tasks) == set(run.experiment.tasks)
    assert 0 < evaluation.tasks["click"]["auc"] < 1
    again = evaluation.baselines["again"]
    assert {"next_item/ndcg@10", "click/log_loss"} <= set(again)
    assert [
        field.size for field in run.prepared.manifest.item_ids if field.name == "magnitude"
    ] == [5]


def test_a_run_is_opened_again_with_its_classes(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"'crossed' is not one of .*extensions=\["):
        mtrec_jax.open_run(run.folder)
    opened = mtrec_jax.open_run(run.folder, extensions=OWN)
    assert opened.experiment == run.experiment
    users = run.prepared.user_names[:3]
    one, other = (mtrec_jax.Recommender(r).recommend(users, 5) for r in (run, opened))
    assert one.table.equals(other.table)
    assert one.table.num_rows == 15
