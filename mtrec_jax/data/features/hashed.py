"""Categories without a vocabulary: any value falls into one of so many buckets."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from mtrec_jax.data.features.base import Codes, Counts, Encoding, Feature
from mtrec_jax.data.features.categorical import IMPUTES, ids_of, ranked
from mtrec_jax.types import FIRST, UNKNOWN

MOST_IDS = 2**31 - 4  # that 32 bits hold, beside padding, unknown and missing


@dataclass(frozen=True, kw_only=True)
class Hashed(Feature):
    """The CRC-32 of a value's UTF-8 bytes modulo `buckets`."""

    kind: Literal["hashed"] = "hashed"
    buckets: Annotated[int, Field(ge=1, le=MOST_IDS)] = 1024

    imputes = IMPUTES
    takes_lists = True
    encoded_once = True

    @property
    def room(self) -> int:
        """The buckets, and the id of missing values."""
        return self.buckets + (self.impute == "own")

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Nothing but what missing values are taken for."""
        _, fill, missing = ranked(self, cells, counts)
        encoding = Encoding(name, self, size=FIRST + self.buckets)
        if fill is None:
            return encoding
        place = int(self._buckets(encoding, pa.array([fill]))[0])
        if self.impute == "own":
            place = FIRST + self.buckets if missing else UNKNOWN
        size = max(encoding.size, place + 1)
        return replace(encoding, missing=place, imputed=missing, size=size)

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """A bucket a cell, or what missing values are taken for."""
        return ids_of(encoding, cells, self._buckets)

    def _buckets(self, _: Encoding, values: pa.StringArray) -> np.ndarray:
        codes = [zlib.crc32((text or "").encode()) for text in values.to_pylist()]
        return np.array([FIRST + code % self.buckets for code in codes], np.int32)
