"""Text that is kept as it is, and its vector."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mtrec_jax.data.features.base import Codes, Counts, Encoding, Feature


@dataclass(frozen=True, kw_only=True)
class Text(Feature):
    """Stored beside the users or items. With an `encoder` the text of an item is an input, too: its
    vector, made at preparation and never trained."""

    kind: Literal["text"] = "text"
    encoder: str = ""  # a folder of weights, or the name of public ones in the folder data

    places = ("context", "item")
    because = "texts are kept for items and users, not for every event"
    takes_lists = True

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """As far as it is an input."""
        return bool(self.encoder)

    @property
    def gives_numbers(self) -> bool:  # type: ignore[override]
        """As far as it is an input."""
        return bool(self.encoder)

    @property
    def coded(self) -> bool:  # type: ignore[override]
        """Numbers of a vector have no meaning one by one."""
        return bool(self.encoder)

    @property
    def room(self) -> int:
        """The width of the vectors."""
        from mtrec_jax.models.text.bert import load_sizes  # JAX, where it is asked for

        return load_sizes(self.weights).width if self.encoder else 0

    @property
    def weights(self) -> Path:
        """The folder of the encoder's weights."""
        named = Path("data") / self.encoder
        return named if not Path(self.encoder).is_dir() and named.is_dir() else Path(self.encoder)

    def problems(self, name: str, data: Any) -> Iterator[str]:
        """Vectors are of items: those of a user would stand in every example."""
        yield from super().problems(name, data)
        if self.encoder and self.on != "item":
            yield ".encoder: vectors are made of the texts of items alone; use on = 'item'"

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Nothing but the number of numbers."""
        return Encoding(name, self, slots=self.room, missing=float("nan"))

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """The vector of each text, or of the texts of a list one behind the other, times the root
        of its width: 1 on average when squared, as scaled numbers are. 0 where there is no text."""
        texts = [joined(cell) for cell in cells.to_pylist()]
        found = np.zeros((len(texts), encoding.slots), np.float32)
        there = [number for number, text in enumerate(texts) if text]
        if there:
            from mtrec_jax.models.text import load_bert, text_vectors

            vectors = text_vectors([texts[number] for number in there], load_bert(self.weights))
            found[there] = vectors * np.float32(encoding.slots**0.5)
        return found


def joined(cell: Any) -> str:
    """A cell as one text: those of a list one behind the other, "" where there is none."""
    if isinstance(cell, list):
        return " ".join(str(part) for part in cell if part)
    return str(cell or "")
