"""A model measured by other rules than its own: what its protocol allows, and what it does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mtrec_jax.data.dataset import Prepared
from mtrec_jax.errors import ConfigError
from mtrec_jax.evaluation.evaluate import judged
from mtrec_jax.evaluation.protocol import check_same, protocol_of
from mtrec_jax.train.run import Run, evaluate_run, measured_under


@pytest.fixture
def own_run(shop_run: Run, tmp_path: Path) -> Run:
    """A copy of the run, to be written to."""
    shutil.copytree(shop_run.folder, tmp_path / "run")
    return replace(shop_run, folder=tmp_path / "run")


@pytest.fixture
def prepared_by(shop_prepared: Prepared, tmp_path: Path) -> Callable[..., Path]:
    """The folder of the small shop as if other rules had made it: {section: {key: value}}."""

    def make(section: str, **keys: object) -> Path:
        folder = tmp_path / f"by {section}"
        shutil.copytree(shop_prepared.folder, folder)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        manifest["config"][section] |= keys
        manifest["fingerprint"] = "f" * 16
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        return folder

    return make


def test_rules_of_the_evaluation_need_nothing_else(own_run: Run) -> None:
    usual = protocol_of(own_run.experiment, own_run.prepared.manifest)
    under = ["evaluate.exclude_seen=false", "evaluate.ks=[3]", "evaluate.baselines=[]"]
    found = evaluate_run(own_run, under=[*under, "evaluate.bootstrap=0"])[0]
    assert found.protocol == replace(usual, exclude_seen=False, seen=(), seen_targets="", ks=(3,))
    assert {name.partition("@")[2] for name in found.tasks["next_item"]} == {"3"}
    assert (found.baselines.keys(), found.intervals) == ({"best possible"}, {})
    stored = json.loads((own_run.folder / "evaluation.json").read_text("utf-8"))
    assert stored["protocol"]["hash"] == found.protocol.hash != usual.hash
    same = measured_under(own_run, {"evaluate.bootstrap": 0}, None, "test")
    assert protocol_of(same.experiment, same.prepared.manifest) == usual


def test_a_frozen_past_is_a_folder_of_its_own(
    shop_run: Run, prepared_by: Callable[..., Path]
) -> None:
    """The same targets by the same ids, of which less is known."""
    frozen = prepared_by("data", past="frozen")
    found = measured_under(shop_run, ["data.past=frozen"], frozen, "test")
    assert found.prepared.folder == frozen
    protocols = {
        name: protocol_of(run.experiment, run.prepared.manifest)
        for name, run in {"usual": shop_run, "found": found}.items()
    }
    with pytest.raises(ConfigError, match=r"'usual' and 'found' .* past: 'rolling' and 'frozen'"):
        check_same(protocols)
    events = judged(shop_run.prepared.manifest)
    assert judged(found.prepared.manifest) == events


def test_what_cannot_be_measured_is_refused_with_the_reason(
    shop_run: Run, prepared_by: Callable[..., Path]
) -> None:
    def refused(under: list[str], prepared: Path | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            measured_under(shop_run, under, prepared, "test")
        return str(caught.value)

    assert "under: model.width" not in refused(["model.width=4"])
    assert "model.width: what a model was trained with cannot" in refused(["model.width=4"])
    assert "mtrec prepare CONFIG --set data.past=" in refused(["data.past=frozen"])
    there = shop_run.prepared.folder
    assert "needs no other folder" in refused(["evaluate.ks=[3]"], there)
    assert "data.past: 'rolling' there, 'frozen' here" in refused(["data.past=frozen"], there)
    assert "unknown key. Did you mean 'ks'" in refused(["evaluate.kss=[3]"])
    assert "segments: 'x' is none of" in refused(['evaluate.segments=["x"]'])
    other = prepared_by("split", kind="leave_one_out")
    path = other / "vocabularies" / "segment.parquet"
    known = pq.read_table(path)
    pq.write_table(known.take(list(range(len(known)))[::-1]), path)
    message = refused(["split=leave_one_out"], other)
    assert "has learned other things from its training rows" in message
    assert "(values of segment)" in message


def test_judges_that_have_trained_the_model_are_refused(
    shop_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split with the same vocabularies, of which two judging rows are training rows here."""
    trained = shop_run.prepared.interactions("train")["row"][:2]

    def interactions(self: Prepared, split: str = "train") -> dict[str, np.ndarray]:
        found = original(self, split)
        if split == "test":
            found["row"] = np.concatenate([trained, found["row"]])
        return found

    original = Prepared.interactions
    monkeypatch.setattr(Prepared, "interactions", interactions)
    same = shop_run.prepared.folder
    with pytest.raises(ConfigError, match=r"^2 of the \d+ events that judge in .* have trained"):
        measured_under(shop_run, ["data.past=rolling"], same, "test")
    monkeypatch.undo()
    assert measured_under(shop_run, ["data.past=rolling"], same, "test").experiment
