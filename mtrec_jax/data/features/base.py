"""What every kind of feature has, and what it answers where it does not say otherwise."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
from jaxtyping import Float, Int

from mtrec_jax.types import FIRST

NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
Count = Annotated[int, pydantic.Field(ge=1)]
Amount = Annotated[float, pydantic.Field(ge=0)]
Counts = Int[np.ndarray, " n"]
Codes = Int[np.ndarray, "n slots"] | Float[np.ndarray, "n slots"]


@dataclass(frozen=True, kw_only=True)
class IdField:
    """A feature that is looked up in an embedding table."""

    name: str
    size: int  # ids: padding, unknown, then the vocabulary; 0: it is looked up nowhere
    slots: int  # ids per example: 1, or max_values of a multi-valued feature
    missing: int = 0  # the id that a missing value takes: padding, unless it is imputed


@dataclass(frozen=True, kw_only=True)
class NumberField:
    """A feature that is used as numbers: (x - mean) / std, 0 where missing, or a code or vector."""

    name: str
    mean: float
    std: float
    slots: int = 1  # numbers per example: piecewise codes, an indicator of missing values
    missing: float | None = None  # the number that a missing one is taken for


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input of the model. A kind is a frozen dataclass that extends this one: it adds options,
    learns in `fit`, applies what it has learned in `encode`, and answers the questions below where
    its answer is another one."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    kind: str = ""
    on: Literal["context", "request", "item", "history"] = "context"
    column: str = ""  # "": the feature's own name
    impute: Literal["none", "median", "mode", "constant", "own"] = "none"  # own: marked as missing
    constant: str = ""  # impute = "constant"

    places: ClassVar[tuple[str, ...]] = ("context", "request", "item", "history")
    because: ClassVar[str] = ""  # why it is not on the other places
    imputes: ClassVar[tuple[str, ...]] = ("none",)
    gives_numbers: ClassVar[bool] = False  # to the model, not ids
    coded: ClassVar[bool] = False  # they are a code or several, not one and a mark of missing
    of_numbers: ClassVar[bool] = False  # a cell is a number
    takes_lists: ClassVar[bool] = False  # a cell may be a list
    computed: ClassVar[bool] = False  # of more than the row's own cell of the raw data
    looks_back: ClassVar[bool] = False  # at what happened before an event
    grows: ClassVar[bool] = False  # its vocabulary takes the values of new data
    fitted: ClassVar[bool] = True  # on the cells of its column
    looked_up: ClassVar[bool] = True  # an id is a row of a table; else the number is read itself
    encoded_once: ClassVar[bool] = False  # equal texts are found faster than they are encoded

    @property
    def reads_numbers(self) -> bool:
        """Whether the cells of the raw data have to be numbers."""
        return self.of_numbers and not self.computed

    @property
    def room(self) -> int:
        """Values that the configuration alone tells, or an upper bound; 0: only the data tell."""
        return getattr(self, "bins", int(self.gives_numbers))

    def origin(self, name: str, data: Any) -> tuple[str, str]:
        """The raw table that it is made of, and the column, given the section [data]."""
        column = self.column or name
        if self.on == "history" and data.queries is not None and column == data.query:
            return "queries", column
        return {"item": "items", "context": "users"}.get(self.on, "events"), column

    def fit(self, name: str, cells: pa.Array, counts: Counts) -> Encoding:
        """Learn the feature from its distinct training cells and how often each occurs."""
        raise NotImplementedError

    def encode(self, encoding: Encoding, cells: pa.Array) -> Codes:
        """Ids (int32) or numbers (float32) `[n, slots]` of cells."""
        raise NotImplementedError

    def problems(self, name: str, data: Any) -> Iterator[str]:
        """What cannot be, given the section [data]; each is put after `features.NAME`."""
        if self.on not in self.places:
            places = " or ".join(repr(place) for place in self.places)
            yield f".on: kind '{self.kind}' is for {places}, because {self.because}"
        elif self.on == "item" and not data.item:
            yield ".on: 'item' needs data.item"
        elif self.on == "context" and not data.user:
            yield ".on: 'context' needs data.user; use 'request' for a column of the event"
        elif self.on == "history" and not data.length:
            whole = "a history is of data.user and data.item, and data.history_length above 0"
            yield f".on: {whole}; use 'request' for what is known of the event"
        if self.impute not in self.imputes:
            allowed = ", ".join(repr(way) for way in self.imputes)
            yield f".impute: kind '{self.kind}' takes {allowed}, not '{self.impute}'"
        if (self.impute == "constant") != bool(self.constant):
            yield ".impute, .constant: impute = 'constant' and its value go together"
        elif self.constant and self.of_numbers and not re.fullmatch(NUMBER, self.constant):
            yield f".constant: '{self.constant}' is no number, which '{self.kind}' needs"


@dataclass(frozen=True)
class Encoding:
    """A fitted feature."""

    name: str
    feature: Feature
    # vocabulary, or the edges of the bins as text; row r is id r + 2
    values: pa.StringArray = dataclasses.field(default_factory=lambda: pa.array([], pa.string()))
    counts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    slots: int = 1  # ids or numbers that one row takes
    size: int = 0  # ids; 0: as many as the vocabulary has
    mean: float = 0.0
    std: float = 1.0
    missing: float | int = 0  # id of a missing value, or the number it is taken for (nan: none)
    imputed: int = 0  # training cells without a value that were given one
    unreadable: int = 0  # training cells whose text is no number where one is needed
    unread: tuple[str, ...] = ()  # some of these texts
    as_text: int = 0  # training cells that look like lists which became text, if they are many
    listed: tuple[str, ...] = ()  # some of these cells

    @property
    def is_number(self) -> bool:
        """Whether the model gets numbers, not ids."""
        return self.feature.gives_numbers

    @property
    def field(self) -> IdField | NumberField:
        """What the manifest says about the feature."""
        if not self.is_number:
            size = self.size or FIRST + len(self.values) if self.feature.looked_up else 0
            return IdField(name=self.name, size=size, slots=self.slots, missing=int(self.missing))
        missing = None if np.isnan(self.missing) else float(self.missing)
        return NumberField(
            name=self.name, mean=self.mean, std=self.std, slots=self.slots, missing=missing
        )


def as_numbers(cells: pa.Array) -> Float[np.ndarray, " n"]:
    """Cells as float64, NaN where they are missing or no finite number of 32 bits."""
    try:  # takes what NUMBER takes, and nan and inf, which are left out below
        cast = pc.cast(cells, pa.float64())
    except pa.ArrowInvalid:
        good = pc.match_substring_regex(cells, NUMBER)
        cast = pc.cast(pc.if_else(good, cells, pa.scalar(None, cells.type)), pa.float64())
    numbers = cast.to_numpy(zero_copy_only=False)
    return np.where(np.abs(numbers) <= np.finfo(np.float32).max, numbers, np.nan)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one contiguous array."""
    if isinstance(column, pa.Array):
        return column
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
