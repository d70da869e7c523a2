"""Transfer: cosines and fronts by hand, and a study on the small shop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtrec_jax
from benchmarks import conflict
from mtrec_jax.balance import BALANCERS
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.data.pipeline import BatchSource
from mtrec_jax.errors import ConfigError, DataError
from mtrec_jax.experiments import chosen as chosen_tasks
from mtrec_jax.experiments import overridden
from mtrec_jax.models.model import make_model
from mtrec_jax.models.serve import load_catalogue
from mtrec_jax.sharding import make_mesh
from mtrec_jax.studies.conflict import from_gram, make_probe, shared_cosines
from mtrec_jax.studies.picture import draw_transfer
from mtrec_jax.studies.runs import Predicted
from mtrec_jax.studies.transfer import _front, _gate_rows, _plans, not_dominated
from mtrec_jax.tables.layout import DENSE
from mtrec_jax.tables.lookup import fetch
from mtrec_jax.train.step import make_step


def test_cosines_are_over_what_both_act_on() -> None:
    gradients = np.array([[3.0, 4.0, 0.0], [-3.0, 4.0, 9.0], [0.0, 0.0, 2.0]])
    found = shared_cosines(gradients)
    assert found[0, 1] == pytest.approx((-9 + 16) / (5 * 5)), "the third is one task's own"
    assert found[1, 2] == 1
    assert found[0, 2] == 0, "nothing in common"
    assert np.diag(found).tolist() == [1, 1, 1]
    plain = from_gram(gradients @ gradients.T)
    assert plain[0, 1] == pytest.approx(7 / (5 * 106**0.5))


def test_the_front_is_what_nothing_beats() -> None:
    points = np.array([[1.0, 5.0], [3.0, 3.0], [5.0, 1.0], [2.0, 3.0], [3.0, 3.0], [0.0, 0.0]])
    assert not_dominated(points).tolist() == [True, True, True, False, True, False]


def test_weights_are_swept_one_task_at_a_time_and_the_front_is_marked(
    small: tuple[Experiment, Prepared],
) -> None:
    """AUC of plus and minus: 1, 0 as declared; .5, 0 with plus x 4, which is beaten; 0, 1."""
    plans = _plans(small[0], (4.0,), {})
    assert list(plans) == ["joint", "only-plus", "only-minus", "joint@plusx4", "joint@minusx4"]
    assert list(plans["only-minus"].tasks) == ["minus"]
    labels = {task: np.array([0.0, 1.0]) for task in ("plus", "minus")}

    def said(plus: float, minus: float) -> list[Predicted]:
        """Of the second row; the first is said to be .5."""
        values = {"plus": np.array([0.5, plus]), "minus": np.array([0.5, minus])}
        return [Predicted(np.array(["u", "v"]), np.arange(2), np.full(2, -1), labels, values)]

    kept = {"joint": said(1, 0), "joint@plusx4": said(0.5, 0), "joint@minusx4": said(0, 1)}
    rows = list(_front(small[0], plans, kept))
    assert [(row["weight plus"], row["weight minus"]) for row in rows] == [(1, 1), (4, 1), (1, 4)]
    assert [row["plus auc"] for row in rows] == [1, 0.5, 0]
    assert [row["on the front"] for row in rows] == ["yes", "", "yes"]


def test_the_front_is_of_static_weights_whatever_balances_the_joint_model(
    small: tuple[Experiment, Prepared],
) -> None:
    """FAMO at AUC 1, 1 beats all, but the front is that of the static ones beside it: 1, 0 with the
    declared weights and 0, 1; .5, 0 is beaten by them. At 0, 0 it is behind them itself."""
    e = overridden(small[0], {"train.balance": "famo"})
    plans = _plans(e, (4.0,), {})
    kinds = {name: plan.train.balance.kind for name, plan in plans.items()}
    static = ["joint@static", "joint@plusx4", "joint@minusx4"]
    assert kinds == {"joint": "famo", "only-plus": "famo", "only-minus": "famo"} | dict.fromkeys(
        static, "static"
    )
    assert list(_plans(e, (), {})) == ["joint", "only-plus", "only-minus"]
    labels = {task: np.array([0.0, 1.0]) for task in ("plus", "minus")}

    def said(plus: float, minus: float) -> list[Predicted]:
        values = {"plus": np.array([0.5, plus]), "minus": np.array([0.5, minus])}
        return [Predicted(np.array(["u", "v"]), np.arange(2), np.full(2, -1), labels, values)]

    kept = dict(zip(static, (said(1, 0), said(0.5, 0), said(0, 1)), strict=True))
    rows = list(_front(e, plans, kept | {"joint": said(1, 1)}))
    assert [row["balance"] for row in rows] == ["famo", "static", "static", "static"]
    weights = [(row["weight plus"], row["weight minus"]) for row in rows]
    assert weights == [(1, 1), (1, 1), (4, 1), (1, 4)]
    assert [row["on the front"] for row in rows] == ["yes", "yes", "", "yes"]
    rows = list(_front(e, plans, kept | {"joint": said(0, 0)}))
    assert [row["on the front"] for row in rows] == ["", "yes", "", "yes"]


def test_gates_of_members_are_told_apart() -> None:
    """Two examples whose weights of expert 0 are .2 and .6 for the first member's one task, .9 and
    .9 for the second's: means .4 and .9, deviations .2 and 0. Alike, of a gate that all share."""
    gate = np.array([[[[0.2, 0.8]], [[0.9, 0.1]]], [[[0.6, 0.4]], [[0.9, 0.1]]]])  # [n, K, T, E]
    sums = {"gates": (gate.sum(axis=0), (gate**2).sum(axis=0))}
    rows = _gate_rows(2.0, sums, ["click"], 2)
    assert [(row["member"], row["task"], row["expert"]) for row in rows] == [
        (1, "click", 0),
        (1, "click", 1),
        (2, "click", 0),
        (2, "click", 1),
    ]
    assert [row["mean"] for row in rows] == pytest.approx([0.4, 0.6, 0.9, 0.1])
    assert [row["deviation"] for row in rows] == pytest.approx([0.2, 0.2, 0, 0], abs=1e-7)
    alone = {name: tuple(part[0, 0] for part in of) for name, of in sums.items()}
    (first, _) = _gate_rows(2.0, {"gate_shared": alone["gates"]}, ["click"], 1)
    assert (first["member"], first["task"], first["mean"]) == (1, "", pytest.approx(0.4))


def test_the_planted_conflict_has_every_balancing_where_something_is_learned() -> None:
    """Nothing is before the towers there: the shared representation teaches nobody."""
    declared = [overridden(conflict.experiment(), row) for row in conflict.MODELS.values()]
    assert {e.train.balance.kind for e in declared} == set(BALANCERS)
    assert {getattr(e.train.balance, "at", "parameters") for e in declared} == {"parameters"}


@pytest.mark.slow
def test_a_study_has_twins_cosines_and_gates(
    small: tuple[Experiment, Prepared], tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """Three runs; what is there is not trained again."""
    e, prepared = small
    members = {"model.members": 2, "model.members_share": "encoder"}
    mmoe = overridden(e, conflict.MODELS["MMoE, 2 experts"] | members)
    found = mtrec_jax.study_transfer(mmoe, prepared, tmp_path, seeds=1, show_progress=False)
    for row in found.tasks:
        name = f"only-{row['task']}"
        joint, alone = (
            mtrec_jax.evaluate_run(tmp_path / "runs" / of / "0")[0].tasks[row["task"]]["auc"]
            for of in ("joint", name)
        )
        assert (row["joint"], row["alone"]) == pytest.approx((joint, alone), abs=1e-9)
        assert row["gain"] == pytest.approx(joint - alone, abs=1e-9)
        assert row["low"] <= row["gain"] <= row["high"]
        steps = mtrec_jax.open_run(tmp_path / "runs" / name / "0").experiment.train.steps
        assert steps == e.train.steps, "an equal budget"
    assert found.cosines is not None
    assert found.cosines["step"] == [6, 12]
    assert all(-1 <= value <= 1 for value in found.cosines["parameters"])
    assert found.gates is not None
    means = np.array(found.gates["mean"]).reshape(4, 2)
    assert found.gates["task"] == ["plus", "plus", "minus", "minus"] * 2
    assert found.gates["member"] == [1] * 4 + [2] * 4
    assert means.sum(axis=1) == pytest.approx(1, abs=1e-6)
    assert np.abs(means[:2] - means[2:]).max() > 1e-3
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    again = mtrec_jax.study_transfer(mmoe, prepared, tmp_path, seeds=1, show_progress=False)
    assert list(again.tasks) == list(found.tasks)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == written
    report = json.loads((tmp_path / "transfer.json").read_text())
    assert report["tasks"] == list(found.tasks)
    assert draw_transfer(tmp_path).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_the_probe_takes_the_gradients_that_autodiff_takes(
    small: tuple[Experiment, Prepared], compiled_programs: dict[str, str]
) -> None:
    """Against `jax.grad` of each task's mean loss through encoder and towers at once."""
    e, prepared = small
    chosen = prepared.chosen(e)
    model, mesh = make_model(e, chosen.manifest), make_mesh((1, 1))
    state = make_step(e, model, mesh, total_steps=1).init(3)
    found = make_probe(e, chosen, batches=2)(state)
    assert found.names == ("plus", "minus")
    source = BatchSource(chosen, "train", 64, e.train.seed + 1, 1)
    catalogue = load_catalogue(chosen, e)

    def mean_loss(params: Any, task: str, batch: Any) -> jax.Array:
        wanted = model.ids(batch, catalogue, None)
        rows = fetch(model.layout, {DENSE: params[DENSE]} if DENSE in params else {}, wanted.ids)
        shared = model.encode(params, rows, batch, catalogue, wanted, None)
        sums, _ = model.losses(params, shared, batch, catalogue, wanted, None)
        return sums[task] / model.weights(batch, jnp.zeros(batch.weight.shape))[task]

    whole = []
    for task in found.names:
        parts = [jax.grad(mean_loss)(state.params, task, source[n]) for n in range(2)]
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)]) for part in parts]
        whole.append(np.sum(flat, axis=0, dtype=np.float64))
    expected = shared_cosines(np.stack(whole))
    assert found.parameters == pytest.approx(expected, abs=1e-4)
    assert found.norms == pytest.approx(np.linalg.norm(np.stack(whole), axis=1) / 2, rel=1e-4)
    assert abs(expected[0, 1]) < 0.99, "the tasks differ"


def test_one_task_has_nobody_to_share_with(
    small: tuple[Experiment, Prepared], tmp_path: Path
) -> None:
    e, prepared = small
    with pytest.raises(ConfigError, match="has one task"):
        mtrec_jax.study_transfer(chosen_tasks(e, tasks=["plus"]), prepared, tmp_path)
    home = overridden(e, {"model.towers": {"kind": "aitm", "steps": ["plus", "minus"]}})
    with pytest.raises(ConfigError, match=r'twin only-plus cannot .* twins=\{"model\.towers": "sh'):
        mtrec_jax.study_transfer(home, prepared, tmp_path)
    assert not (tmp_path / "runs").exists(), "nothing is trained before"
    with pytest.raises(DataError, match=r"no transfer\.json"):
        draw_transfer(tmp_path)


@pytest.mark.slow
def test_a_planted_conflict_is_found_and_experts_remove_it(
    tmp_path: Path, compiled_programs: dict[str, str]
) -> None:
    """The benchmark's claim on a smaller log and with one seed, whose chance is some thousandths
    of AUC: a minute of training."""
    found = conflict.answer(quick=True)
    bottom = [row for row in found if row["case"] == "shared bottom"]
    experts = [row for row in found if row["case"] != "shared bottom"]
    assert [row["verdict"] for row in bottom] == ["hurts", "hurts"]
    assert all(row["cosine"] < 0 for row in bottom)
    worst = [min(row["gain"] for row in rows) for rows in (bottom, experts)]
    assert worst[1] > worst[0] / 5, worst
