"""Write what another implementation says of 200 titles, which a test compares ours with.

Needs PyTorch and Transformers, in any environment, and two folders of public data:

    mtrec data all-minilm-l6-v2
    mtrec data ml-1m
    python scripts/minilm_reference.py --data data --out tests/models/minilm_titles.npy

Of each vector 24 numbers are kept, since titles may not be handed on: the first 8, and the products
with 16 of the 384 directions of the cosine transform, each of length 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

TITLES, BATCH, LENGTH = 200, 25, 256


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("tests/models/minilm_titles.npy"))
    chosen = parser.parse_args()
    lines = (chosen.data / "ml-1m" / "ml-1m.item").read_text("utf-8").splitlines()
    titles = [line.split("\t")[1] for line in lines[1 : 1 + TITLES]]
    vectors = mean_states(titles, chosen.data / "all-minilm-l6-v2")
    np.save(chosen.out, kept(vectors).astype(np.float32))


def mean_states(texts: list[str], weights: Path) -> np.ndarray:
    """[n, D]: the mean of the last states over the mask, at length 1."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModel.from_pretrained(weights).eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[start : start + BATCH],
                padding=True,
                truncation=True,
                max_length=LENGTH,
                return_tensors="pt",
            )
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            parts.append(torch.nn.functional.normalize(mean, dim=1).numpy())
    return np.concatenate(parts)


def kept(vectors: np.ndarray) -> np.ndarray:
    """[n, 24] of [n, D]."""
    width = vectors.shape[1]
    places = (np.arange(width) + 0.5)[:, None] * np.pi / width
    directions = np.sqrt(2 / width) * np.cos(places * np.arange(1, 16 * 24, 24)[None])
    return np.concatenate([vectors[:, :8], vectors.astype(np.float64) @ directions], axis=1)


if __name__ == "__main__":
    main()
