"""Each kind of feature on cells whose codes were worked out by hand."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtrec_jax.choices import read
from mtrec_jax.data.features import (
    CHOICE,
    Encoding,
    Feature,
    IdField,
    NumberField,
    encode,
    encode_all,
    fit,
)
from mtrec_jax.errors import DataError
from mtrec_jax.types import FIRST


def text(*cells: str | None) -> pa.Array:
    return pa.array(cells, pa.string())


def feature(**declared: Any) -> Feature:
    """A feature as the configuration declares it."""
    return read(CHOICE, declared, "f")


def fitted(cells: pa.Array, counts: list[int] | None = None, **declared: Any) -> Encoding:
    sizes = np.array(counts or [1] * len(cells))
    return fit("f", feature(**declared), cells, sizes)


def codes(encoding: Encoding, *cells: str | None) -> list[list[float]]:
    return encode(encoding, text(*cells)).tolist()


def ids(encoding: Encoding, *cells: str | None) -> list[int]:
    array = encode(encoding, text(*cells))
    assert array.dtype == np.int32
    assert array.shape == (len(cells), 1)
    assert isinstance(encoding.field, IdField)
    assert array.max(initial=0) < encoding.field.size
    return array[:, 0].tolist()


def size(encoding: Encoding) -> int:
    assert isinstance(encoding.field, IdField)
    return encoding.field.size


def test_categories_by_falling_count_then_by_bytes() -> None:
    cells = text("b", "é", "a", "rare", None, "Z")
    encoding = fitted(cells, [2, 2, 5, 1, 9, 2], min_count=2)
    assert encoding.values.to_pylist() == ["a", "Z", "b", "é"]
    assert encoding.counts.tolist() == [5, 2, 2, 2]
    assert ids(encoding, "a", "é", "rare", "new", None, "") == [2, 5, 1, 1, 0, 0]
    assert encoding.field == IdField(name="f", size=6, slots=1)
    with pytest.raises(DataError, match="'f': column 'f' has no training value that occurs 9 time"):
        fitted(cells, [2, 2, 5, 1, 9, 2], min_count=9)


@pytest.mark.parametrize(
    ("impute", "missing", "values"),
    [
        ("none", 0, ["a", "b", "c"]),
        ("mode", 2, ["a", "b", "c"]),
        ("own", 3, ["a", "", "b", "c"]),
        ("constant", 2, ["c", "a", "b"]),  # c has 1 + 3 then
    ],
)
def test_missing_categories(impute: Any, missing: int, values: list[str]) -> None:
    cells, constant = text("b", "a", None, "c"), "c" if impute == "constant" else ""
    encoding = fitted(cells, [2, 3, 3, 1], impute=impute, constant=constant)
    values = ["", "a", "b", "c"] if impute == "own" else values  # equal counts: by value
    missing = 2 if impute == "own" else missing
    assert encoding.values.to_pylist() == values
    assert ids(encoding, None) == [missing]
    assert encoding.field.missing == missing
    assert encoding.imputed == (0 if impute == "none" else 3)
    assert encoding.counts.sum() == (6 if impute == "none" else 9)


def test_what_training_never_saw_missing_is_unknown() -> None:
    cells = text("a", "b")
    assert ids(fitted(cells, impute="own"), None, "a") == [1, 2]
    assert ids(fitted(cells, impute="constant", constant="x"), None) == [1]
    assert ids(fitted(cells, impute="constant", constant="b"), None) == [3]
    numbers = text("1", "2")
    assert ids(fitted(numbers, kind="binned", bins=2, impute="own"), None, "2") == [1, 3]
    assert ids(fitted(cells, kind="hashed", buckets=3, impute="own"), None) == [1]


def test_hashed() -> None:
    encoding = fitted(text("a", "b", None), [2, 3, 4], kind="hashed", buckets=10)
    hashed = [FIRST + zlib.crc32(v.encode()) % 10 for v in ("a", "é", "new")]
    assert ids(encoding, "a", None, "é", "new", "a") == [hashed[0], 0, *hashed[1:], hashed[0]]
    assert ids(encoding, "123456789") == [FIRST + 0xCBF43926 % 10]  # the check value of CRC-32
    assert (size(encoding), len(encoding.values)) == (12, 0)
    own = fitted(text("a", None), kind="hashed", buckets=10, impute="own")
    assert (ids(own, None), size(own), own.imputed) == ([12], 13, 1)
    mode = fitted(text("a", "b", None), [2, 3, 4], kind="hashed", buckets=10, impute="mode")
    assert ids(mode, None) == ids(mode, "b")


def test_several_values_in_a_cell() -> None:
    declared: dict[str, Any] = {"kind": "multi_valued", "separator": "|", "max_values": 2}
    cells = text("a|b", "b| |c |a", None, "")
    encoding = fitted(cells, [1, 2, 4, 1], **declared)
    assert encoding.values.to_pylist() == ["b", "c", "a"]  # 3, 2, 1: the third value is cut off
    assert encoding.counts.tolist() == [3, 2, 1]
    expected = [[4, 2], [1, 3], [0, 0], [3, 0]]
    assert codes(encoding, "a|b", "x|c|b", None, " c|") == expected
    lists = pa.array([["a", "b"], ["x", "", "c", "b"], None, [" c", None]])
    assert encode(encoding, lists).tolist() == expected
    one = fitted(cells, [1, 2, 4, 1], **declared | {"max_values": 1})
    assert codes(one, "a|b", "b|a", None) == [[3], [2], [0]]
    own = fitted(cells, [1, 2, 4, 1], impute="own", **declared)
    assert own.values.to_pylist() == ["", "b", "c", "a"]
    assert codes(own, None, "c", " | ") == [[2, 0], [4, 0], [2, 0]]


def test_numbers_on_three_scales() -> None:
    cells, counts = text("1", "3", None, "x", "1e99"), [2, 6, 4, 3, 5]  # mean 2.5, variance .75
    standard = fitted(cells, counts, kind="numeric")
    assert (standard.mean, standard.std) == (2.5, pytest.approx(0.75**0.5))
    assert (standard.unreadable, standard.unread) == (8, ("'1e99'", "'x'"))
    assert standard.imputed == 0
    expected = [[0], [0.5 / 0.75**0.5], [0], [0]]
    np.testing.assert_allclose(codes(standard, "2.5", "3", None, "nan"), expected, rtol=1e-6)
    raw = fitted(cells, counts, kind="numeric", scale="none")
    assert codes(raw, "-7.5", "+.5", "2.", None, "inf") == [[-7.5], [0.5], [2], [0], [0]]
    found = codes(raw, "1e3", "1_0", "0x1", "-5e-1", "3.5e38")
    assert found == [[1000], [0], [0], [-0.5], [0]]
    log = fitted(text("0", repr(np.e - 1)), kind="numeric", scale="log")  # 0 and 1
    assert (log.mean, log.std) == (pytest.approx(0.5), pytest.approx(0.5))
    found = codes(log, "0", repr(np.e - 1), repr(1 - np.e))
    np.testing.assert_allclose(found, [[-1], [1], [-3]], rtol=1e-6)
    assert fitted(text("4", "4"), kind="numeric").std == 1.0
    with pytest.raises(DataError, match=r"no training value of column 'f' is a number.*categorica"):
        fitted(text("x", None), kind="numeric")
    with pytest.raises(DataError, match=r"2 of 3 training values .* are no numbers.*'4,5'"):
        fitted(text("4", "4,5", "7 €"), kind="numeric")


@pytest.mark.parametrize(
    ("impute", "constant", "expected"),
    [("median", "", 2.5), ("mode", "", 4.0), ("constant", "-1.5", -1.5)],
)
def test_missing_numbers(impute: Any, constant: str, expected: float) -> None:
    cells, counts = text("1", "4", None, "2", "3"), [1, 2, 3, 2, 1]  # 1 2 2 3 4 4
    declared: dict[str, Any] = {"impute": impute, "constant": constant}
    if impute == "mode":
        counts[1] = 3
    numeric = fitted(cells, counts, kind="numeric", **declared)
    assert numeric.missing == expected
    assert codes(numeric, None) == codes(numeric, repr(expected))
    assert isinstance(numeric.field, NumberField)
    assert (numeric.field.missing, numeric.imputed) == (expected, 3)
    binned = fitted(cells, counts, kind="binned", bins=3, **declared)
    assert ids(binned, None) == ids(binned, repr(expected))
    assert binned.counts.sum() == sum(counts)
    piecewise = fitted(cells, counts, kind="piecewise", bins=3, **declared)
    assert codes(piecewise, None) == codes(piecewise, repr(expected))


def test_missing_numbers_with_a_mark_of_their_own() -> None:
    cells = text("1", "3", None)
    numeric = fitted(cells, kind="numeric", impute="own")
    assert numeric.field == NumberField(name="f", mean=2.0, std=1.0, slots=2, missing=None)
    assert codes(numeric, "1", None, "x") == [[-1, 0], [0, 1], [0, 1]]
    binned = fitted(cells, kind="binned", bins=2, impute="own")
    assert binned.values.to_pylist() == ["1.0", "3.0", ""]
    assert ids(binned, "0", "2", "9", None) == [2, 2, 3, 4]
    piecewise = fitted(cells, kind="piecewise", bins=1, impute="own")
    assert codes(piecewise, "2", None) == [[0.5, 0], [0, 1]]


def test_bins_hold_equally_many() -> None:
    encoding = fitted(text(*"0123456789"), kind="binned", bins=4)
    assert encoding.values.to_pylist() == ["0.0", "2.0", "5.0", "7.0"]
    assert encoding.counts.tolist() == [2, 3, 2, 3]
    assert ids(encoding, "-5", "1.9", "2", "4", "7", "99", "x") == [2, 2, 3, 3, 5, 5, 0]
    ties = fitted(text("0", "1"), [8, 2], kind="binned", bins=4)
    assert ties.values.to_pylist() == ["0.0"]  # every quantile is 0


def test_piecewise_linear_codes() -> None:
    encoding = fitted(text("0", "10", "20", "40"), kind="piecewise", bins=2)
    assert encoding.values.to_pylist() == ["0.0", "20.0", "40.0"]
    assert encoding.field.slots == 2
    expected = [[0, 0], [0.25, 0], [1, 0], [1, 0.75], [1, 1], [1, 1], [0, 0]]
    assert codes(encoding, "-9", "5", "20", "35", "40", "99", None) == expected
    assert codes(fitted(text("7", "7"), kind="piecewise"), "7", "6") == [[0], [0]]


finite = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(st.lists(finite, min_size=1, max_size=30), st.integers(1, 6), st.lists(finite, max_size=20))
def test_piecewise_against_a_loop(train: list[float], bins: int, new: list[float]) -> None:
    encoding = fitted(text(*map(repr, train)), kind="piecewise", bins=bins)
    edges = [float(v) for v in encoding.values.to_pylist()]
    assert edges == sorted(set(edges))
    assert len(edges) <= bins + 1
    found = encode(encoding, text(*map(repr, new)))
    for row, x in zip(found, new, strict=True):
        for t, (low, high) in enumerate(itertools.pairwise(edges)):
            wanted = min(max((x - low) / (high - low), 0.0), 1.0)
            assert row[t] == pytest.approx(wanted, abs=1e-6)


def test_hours_and_weekdays_have_all_their_ids() -> None:
    encoding = fitted(text("9", "23", None), [2, 1, 1], kind="hour")
    assert size(encoding) == FIRST + 24
    assert encoding.counts[[9, 23]].tolist() == [2, 1]
    assert ids(encoding, "0", "9", "23", None, "24") == [2, 11, 25, 0, 1]
    own = fitted(text("6", None), kind="weekday", impute="own")
    assert (ids(own, "6", "0", None), size(own)) == ([8, 2, 9], FIRST + 8)


def test_what_the_past_says_may_be_binned_or_scaled() -> None:
    cells = pa.array([0.0, 1.0, 3.0, None])
    binned = fitted(cells, on="history", kind="past_count", bins=2)
    assert encode(binned, pa.array([0.5, 3.0, None]))[:, 0].tolist() == [2, 3, 0]
    scaled = fitted(cells, on="request", kind="past_count")  # log 1, log 2, log 4
    assert scaled.mean == pytest.approx(np.log(2))
    found = encode(scaled, pa.array([1.0, 0.0, None]))
    np.testing.assert_allclose(found[:, 0], [0, -(1.5**0.5), 0], atol=1e-6)
    rate = fitted(cells, on="request", kind="past_rate", label="click")
    assert rate.mean == pytest.approx(4 / 3)
    gap = fitted(cells, on="history", kind="gap", bins=1)
    assert encode(gap, cells)[:, 0].tolist() == [2, 2, 2, 0]
    with pytest.raises(DataError, match=r"a number\. Remove the feature"):
        fitted(pa.array([None, None], pa.float64()), on="history", kind="gap")


@given(
    st.lists(st.none() | st.sampled_from(["1", "2.5", "a", "a b", "b", ""]), min_size=1),
    st.sampled_from(["categorical", "hashed", "multi_valued", "numeric", "binned", "piecewise"]),
    st.sampled_from(["none", "mode", "own"]),
)
def test_dictionaries_give_the_same_codes(cells: Any, kind: Any, impute: Any) -> None:
    bins: dict[str, Any] = {"bins": 2} if kind in ("binned", "piecewise") else {}
    encoding = fitted(text("1", "2.5", "a", "b", None), kind=kind, impute=impute, **bins)
    plain = encode(encoding, text(*cells))
    assert plain.shape == (len(cells), encoding.slots)
    np.testing.assert_array_equal(encode(encoding, text(*cells).dictionary_encode()), plain)


def test_all_features_side_by_side() -> None:
    city = fit("city", feature(), text("a", "b"), np.array([2, 1]))
    age = fit("age", feature(kind="piecewise", bins=2), text("0", "1", "2", "4"), np.ones(4, int))
    tall = fit("size", feature(kind="numeric", scale="none"), text("1"), np.ones(1, int))
    tags = fit("tags", feature(kind="multi_valued", max_values=2), text("x y"), np.ones(1, int))
    cells = {"city": text("b"), "age": text("3"), "size": text("7"), "tags": text("y x")}
    found_ids, numbers = encode_all([city, age, tall, tags], cells, 1)
    assert found_ids.tolist() == [[3, 3, 2]]
    assert numbers.tolist() == [[1.0, 0.5, 7.0]]
    nothing = encode_all([], {}, 3)
    assert [array.shape for array in nothing] == [(3, 0), (3, 0)]
