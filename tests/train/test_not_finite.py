"""Steps whose loss is not finite."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mtrec_jax import from_tables
from mtrec_jax.arguments import naming
from mtrec_jax.config import Experiment
from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import Error
from mtrec_jax.train import loop
from mtrec_jax.train.loop import train
from mtrec_jax.train.progress import Progress
from mtrec_jax.train.records import read_records
from mtrec_jax.train.run import load_best, open_run
from mtrec_jax.types import TrainState

pytestmark = pytest.mark.usefixtures("compiled_programs")


def _experiment(plain: Experiment, **keys: Any) -> Experiment:
    settings: dict[str, Any] = {"steps": 16, "log_every": 4, "evaluate_every": 8}
    return replace(plain, train=replace(plain.train, **settings | keys))


@pytest.mark.parametrize(("backend", "steps"), [("cpu", 4), ("gpu", 32), ("tpu", 32)])
def test_only_cpus_wait_often(monkeypatch: pytest.MonkeyPatch, backend: str, steps: int) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert loop.steps_in_flight() == steps


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the batch of a step a label that is not a number."""

    def arrange(step: int) -> None:
        put, batches = loop.put_batch, list[Any]()

        def poison(batch: Any, mesh: Any) -> Any:
            batches.append(batch)  # it comes once more, to find out what was wrong
            if len(batches) >= step and batch is batches[step - 1]:
                stars = np.full_like(batch.labels["stars"], np.nan)
                batch = batch._replace(
                    labels={**batch.labels, "stars": stars},
                    mask={**batch.mask, "stars": np.ones_like(stars)},
                )
            return put(batch, mesh)

        monkeypatch.setattr(loop, "put_batch", poison)

    return arrange


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [4, pytest.param(32, marks=pytest.mark.slow)])
def test_training_stops_names_the_loss_and_batch_and_keeps_what_was_right(
    plain: Experiment,
    shop_prepared: Prepared,
    poisoned: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_flight: int,
) -> None:
    """Also where the host waits for the device only when a checkpoint is due."""
    monkeypatch.setattr(loop, "steps_in_flight", lambda: in_flight)
    poisoned(11)
    with pytest.raises(
        Error, match=r"at step 11 \(epoch 2, batch 2\): first the loss of stars"
    ) as caught:
        train(_experiment(plain), shop_prepared, tmp_path, show_progress=False)
    params, tables, step = load_best(open_run(tmp_path))
    assert step == 8
    assert f"init_from= {tmp_path} begins it with the best" in str(caught.value)
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves((params, tables)))


def test_fit_names_no_argument_that_it_lacks(plain: Experiment, tmp_path: Path) -> None:
    """It has no init_from=, and its folder may be temporary."""
    rest = [None] * (len(loop._Job._fields) - 3)
    job = tuple.__new__(loop._Job, [plain, None, tmp_path, *rest])
    state = tuple.__new__(TrainState, [np.array([1, 3])] * len(TrainState._fields))
    bar = Progress(16, 0, False, "shop")
    remedy = r'at step 3\. .* with train\.not_finite = "skip", in a new run$'
    with naming(from_tables._of_fit), pytest.raises(Error, match=remedy):
        loop._check_finite(job, bar, state, 4, deque(), 0)


@pytest.mark.slow
def test_a_step_that_is_skipped_changes_nothing(
    plain: Experiment,
    shop_prepared: Prepared,
    poisoned: Callable[[int], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = _experiment(plain, not_finite="skip")
    poisoned(11)
    run = train(experiment, shop_prepared, tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "is not finite at step 11 (epoch 2, batch 2): first the loss of stars" in said
    assert "left out, 1 so far" in said
    params, tables, _ = load_best(run)
    assert all(np.isfinite(np.asarray(a)).all() for a in jax.tree.leaves((params, tables)))
    assert max(r["step"] for r in read_records(tmp_path / "metrics.jsonl")) == 16


@pytest.mark.slow
def test_the_step_itself_moves_nothing_but_its_count(
    plain: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    for policy, again in (("stop", False), ("skip", True)):
        job = loop._make_job(_experiment(plain, not_finite=policy), shop_prepared, tmp_path, None)
        state = job.step.init(0)
        good = next(job.batches)
        nan = {**good.labels, "click": np.full_like(good.labels["click"], np.nan)}
        bad = good._replace(labels=nan)
        parts = ("params", "tables", "slots", "optimizer", "balance", "sums")

        def bits(state: Any, parts: tuple[str, ...] = parts) -> list[bytes]:
            leaves = jax.tree.leaves([getattr(state, part) for part in parts])
            return [np.asarray(leaf).tobytes() for leaf in leaves]

        before, start = bits(state), bits(state, ("params", "tables"))
        state = job.step.update(state, loop.put_batch(bad, job.mesh), job.catalogue)
        assert bits(state) == before
        assert (int(state.step), state.bad.tolist()) == (1, [1, 1])
        finite = job.step.inspect(state, loop.put_batch(bad, job.mesh), job.catalogue)
        assert next(n for n, is_finite in finite.items() if not is_finite) == "the loss of click"
        state = job.step.update(state, loop.put_batch(good, job.mesh), job.catalogue)
        assert (bits(state) != before) == again
        assert state.bad.tolist() == ([1, 1] if again else [2, 1])
        # a step that is left out moves neither schedule: both warm-ups are at their first rate, 0
        assert bits(state, ("params", "tables")) == start
        state = job.step.update(state, loop.put_batch(good, job.mesh), job.catalogue)
        for part in ("params", "tables"):
            assert (bits(state, (part,)) != bits(job.step.init(0), (part,))) == again, part


@pytest.mark.slow
def test_a_gradient_whose_square_is_not_finite_changes_nothing(
    plain: Experiment, shop_prepared: Prepared, tmp_path: Path
) -> None:
    """Adam and Adagrad would add infinity to what they remember, and never move again."""
    experiment = _experiment(plain, not_finite="skip")
    job = loop._make_job(experiment, shop_prepared, tmp_path, None)
    state, batch = job.step.init(0), next(job.batches)
    stars, mask = (np.zeros_like(part["stars"]) for part in (batch.labels, batch.mask))
    stars[0], mask[0] = 1e19, np.minimum(1, np.arange(stars.shape[1]) == 0)
    large = batch._replace(
        labels={**batch.labels, "stars": stars},
        mask={**batch.mask, "stars": mask},
        weight=np.maximum(batch.weight, mask),
    )
    large = loop.put_batch(large, job.mesh)
    bad = [
        n for n, is_finite in job.step.inspect(state, large, job.catalogue).items() if not is_finite
    ]
    assert bad
    assert all(name.startswith("the squared gradient of ") for name in bad)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.optimizer))]
    state = job.step.update(state, large, job.catalogue)
    after = [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.optimizer))]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    assert state.bad.tolist() == [1, 1]
