"""How many titles a second become vectors, and beside what?

The distinct titles of MovieLens 1M by the weights `all-minilm-l6-v2`, both in `--data`. "mtrec_jax"
is `text_vectors`; "transformers" is BERT of that library on PyTorch, with the texts sorted by
length, padded by batch, averaged and brought to length 1, in batches of 32 and 128. Contestants
take turns in one process; the first turn of each, which compiles, does not count. "cores" is the
time on processors over the time on the clock: where others use the machine as well, divide by it.
"apart" is the largest difference of any number to ours.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Call = Callable[[list[str]], np.ndarray]  # texts to vectors [n, D]
QUICK = 200
_LENGTH = 256  # tokens of a text at most


def answer(
    quick: bool,
    data: Path = Path("data"),
    only: list[str] | None = None,
    rounds: int = 3,
) -> list[dict[str, Any]]:
    """A row a contestant: the median, slowest and fastest turn."""
    titles = _titles(data / "ml-1m" / "ml-1m.item")
    titles = titles[:QUICK] if quick else titles
    weights = data / "all-minilm-l6-v2"
    makers = {
        "mtrec_jax": lambda: _ours(weights, "float32"),
        "mtrec_jax bfloat16": lambda: _ours(weights, "bfloat16"),
        "transformers 32": lambda: _transformers(weights, 32),
        "transformers 128": lambda: _transformers(weights, 128),
    }
    if unknown := set(only or ()) - set(makers):
        raise SystemExit(f"--only: {', '.join(unknown)}; there are {', '.join(makers)}")
    calls, missing = {}, []
    for name in only or makers:
        try:
            calls[name] = makers[name]()
        except ModuleNotFoundError as error:
            if name.startswith("mtrec_jax"):
                raise
            missing.append({"case": f"{name}: {error.name} is not installed"})
    vectors = {name: call(titles) for name, call in calls.items()}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(1 if quick else rounds):
        for name, call in calls.items():
            at, used = time.perf_counter(), time.process_time()
            call(titles)
            turns[name].append((time.perf_counter() - at, time.process_time() - used))
    ours = next(iter(vectors.values()))
    return [_row(name, titles, turns[name], vectors[name] - ours) for name in calls] + missing


def _row(
    name: str, titles: list[str], turns: list[tuple[float, float]], apart: np.ndarray
) -> dict[str, Any]:
    speeds = sorted(len(titles) / seconds for seconds, _ in turns)
    cores = statistics.median(used / seconds for seconds, used in turns)
    row: dict[str, Any] = {"case": name, "titles": len(titles)}
    row |= {"a second": round(statistics.median(speeds)), "slowest": round(speeds[0])}
    row |= {"fastest": round(speeds[-1]), "cores": round(cores, 2)}
    return row | {"apart": f"{np.abs(apart).max():.1e}"}


def _titles(file: Path) -> list[str]:
    if not file.is_file():
        raise SystemExit(f"{file}: not there; run: mtrec data ml-1m --to {file.parents[1]}")
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return list(dict.fromkeys(line.split("\t")[1] for line in lines))


def _ours(weights: Path, dtype: str) -> Call:
    from mtrec_jax.models.text import load_bert, text_vectors

    bert = load_bert(weights)
    return lambda texts: text_vectors(texts, bert, dtype=dtype)


def _transformers(weights: Path, size: int) -> Call:
    torch, library = (importlib.import_module(name) for name in ("torch", "transformers"))
    tokenizer = library.AutoTokenizer.from_pretrained(weights)
    model = library.AutoModel.from_pretrained(weights).eval()

    def call(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        found = np.zeros((len(texts), model.config.hidden_size), np.float32)
        for start in range(0, len(texts), size):
            part = order[start : start + size]
            batch = tokenizer(
                [texts[number] for number in part],
                padding=True,
                truncation=True,
                max_length=_LENGTH,
                return_tensors="pt",
            )
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
                mask = batch["attention_mask"][..., None].to(states.dtype)
                mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
                found[part] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return found

    return call
