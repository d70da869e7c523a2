"""What trained runs reach on validation, by commit: `--runs runs/sasrec runs/hstu --json FILE`.

A run is named by its folder, and stands under the commit that the command is given at: train and
ask at the same one. Every line is kept, so that the page shows what has become better or worse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mtrec_jax
from mtrec_jax.evaluation.protocol import protocol_of
from mtrec_jax.train.records import read_records


def answer(quick: bool, runs: list[Path]) -> list[dict[str, Any]]:
    """A row a run: its model, its protocol, and the best checkpoint's metrics of the retrieval."""
    return [_row(path) for path in runs]


def _row(path: Path) -> dict[str, Any]:
    run = mtrec_jax.open_run(path)
    model, records = run.experiment.model, read_records(run.folder / "metrics.jsonl")
    [task] = [n for n, t in run.experiment.tasks.items() if t.kind == "retrieval"]
    [best] = {record["step"] for record in records if record["split"] == "best"}
    found = {
        record["metric"]: record["value"]
        for record in records
        if (record["split"], record["task"], record["step"]) == ("validation", task, best)
    }
    seconds = [r["value"] for r in records if (r["task"], r["metric"]) == ("run", "seconds")]
    protocol = protocol_of(run.experiment, run.prepared.manifest)
    return {
        "trained": path.name,
        "model": f"{model.encoder.kind} {model.width} x {getattr(model.encoder, 'layers', 0)}",
        "tasks": len(run.experiment.tasks),
        "step": best,
        "minutes": sum(seconds) / 60,
        **{name: value for name, value in found.items() if name.startswith(("hr@", "ndcg@"))},
        "protocol": protocol.hash,
        "rules": str(protocol),
    }
