"""How long does a loaded model take to answer: the first request, and 200 mixed ones?

The model is loaded in a new process with no compiled programs kept, then asked one request after
the other: histories of 0 to 500 items, k from 1 to 400, half of them with `allowed` and `blocked`,
a stored user now and then, `predict` for every tenth. "compiled" counts programs that XLA made
after loading. `--against COMMIT` asks another commit the same, in a worktree with an environment of
its own (in `--folder`, which is kept; else in a temporary one). Each side prepares and trains 20
steps by itself, as formats differ; raw files are shared, in FOLDER/data/NAME. How good the model is
does not matter here.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.commits import Side, environment_of, here, other

DATA = ("shop", "ml-1m")
REQUESTS = 200
RATIO, SLOWEST = 0.3, 50.0  # of the first answer beside the other commit; ms, of 99 in 100
SHORT = (
    *("train.epochs=0", "train.steps=20", "train.evaluate_every=20", "train.warmup_steps=2"),
    *("train.mesh=[1,1]", "evaluate.baselines=[]", "evaluate.bootstrap=0"),
)
MTREC = "from mtrec_jax.cli import main; main()"

ASK = """
import json, sys, time
import jax
import numpy as np
import mtrec_jax

folder, requests = sys.argv[1], int(sys.argv[2])
compiled = []

def listen(event, seconds, **more):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(seconds)

jax.monitoring.register_event_duration_secs_listener(listen)
start = time.perf_counter()
load = getattr(mtrec_jax, "load", None) or mtrec_jax.Recommender
model = load(folder)
loaded, ahead = time.perf_counter() - start, len(compiled)
rng = np.random.default_rng(0)
items, users = model.prepared.item_names, model.prepared.user_names
times = []
for number in range(requests):
    length, k = int(rng.integers(0, 501)), int(rng.integers(1, min(400, len(items)) + 1))
    history = [items[i] for i in rng.integers(0, len(items), length)]
    allowed = [items[i] for i in rng.permutation(len(items))[: len(items) // 2]]
    user = users[int(rng.integers(0, len(users)))]
    filters = {"allowed": allowed, "blocked": allowed[:9]} if number % 2 else {}
    if number % 3 == 0:
        filters["histories"] = [history]
    start = time.perf_counter()
    if number % 10 == 9:
        model.predict([user] * 5, allowed[:5])
    else:
        model.recommend([user], k, **filters)
    times.append((time.perf_counter() - start) * 1e3)
fifty, most = np.percentile(times, [50, 99])
print(json.dumps({
    "load, s": loaded, "first, ms": times[0], "p50, ms": fifty, "p99, ms": most,
    "compiled": len(compiled) - ahead,
}))
"""


def answer(
    quick: bool, against: str = "", only: list[str] | None = None, folder: Path | None = None
) -> list[dict[str, Any]]:
    """A row a data set and commit."""
    chosen = only or list(DATA[:1] if quick else DATA)
    if unknown := set(chosen) - set(DATA):
        raise SystemExit(f"--only: {', '.join(unknown)}; there are {', '.join(DATA)}")
    rows = []
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-latency-")))
        kept = (folder or place).absolute()
        sides = [here(place / "here")]
        if against:
            sides.append(stack.enter_context(other(against, kept, place / "other", folder is None)))
        for name in chosen:
            found = []
            for side in sides:
                run = _trained(side, name, kept / "data" / name)
                shutil.rmtree(side.work / "compiled", ignore_errors=True)
                requests = 40 if quick else REQUESTS
                found.append(json.loads(_python(side, ASK, str(run), str(requests))))
            rows += [_row(name, sides[i], found[i], found[-1]) for i in range(len(sides))]
    return rows


def _row(
    name: str, side: Side, found: dict[str, float], other_side: dict[str, float]
) -> dict[str, Any]:
    row: dict[str, Any] = {"case": f"{name}, {side.name}", **found}
    row["first / other's"] = found["first, ms"] / other_side["first, ms"]
    good = found["compiled"] == 0 and found["p99, ms"] <= SLOWEST
    alone = found is other_side
    row["met"] = "yes" if good and (alone or row["first / other's"] <= RATIO) else "no"
    return row


def _trained(side: Side, name: str, data: Path) -> Path:
    """A run of few steps."""
    run = side.work / name / "run"
    settings = [word for text in SHORT for word in ("--set", text)]
    folders = ("--data", str(data), "--prepared", str(side.work / name / "prepared"))
    _python(side, MTREC, "run", name, *folders, "--run", str(run), *settings)
    return run


def _python(side: Side, code: str, *arguments: str) -> str:
    """Standard output of a new process of a side."""
    side.work.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [side.python, "-c", code, *arguments],
        cwd=side.work,
        env=environment_of(side),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{arguments} failed at {side.name}:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
