"""The language of expressions: every engine computes what was worked out by hand."""

from __future__ import annotations

import string
from typing import Any

import ibis
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec_jax.data.engine import Engine
from mtrec_jax.data.expressions import as_text, compile_expression, names
from mtrec_jax.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

TABLE = pa.table(
    {
        "row": [0, 1, 2, 3, 4, 5],
        "a": ["1", "x", None, "1e400", "-0.5", "0"],
        "b": ["Ab", "c d", "b", None, "ΟΔΟΣ", "İ'\\"],
        "odd name": ["1.0", "2", "3", "4", "5", "6"],
        "list": [["x"], ["y", "x"], None, [], ["z"], ["x"]],
    }
)
T, F, N = True, False, None
VALUES: dict[str, list[Any]] = {
    "true": [T] * 6,
    "a >= 1": [T, N, N, N, F, F],
    "0 <= a < 1": [F, N, N, N, F, T],
    "a in [1, 0]": [T, N, N, N, F, T],
    "a not in [1, 0]": [F, N, N, N, T, F],
    "a == '1'": [T, F, N, F, F, F],
    "b in ('Ab', 'c d')": [T, T, F, N, F, F],
    "b != 'b'": [T, T, F, N, T, T],
    "b < 'b'": [T, F, F, N, F, F],
    "a == `odd name`": [F, F, N, F, F, F],
    "a < `odd name`": [F, N, N, N, T, T],
    "a == 1 or b == 'b'": [T, N, T, N, F, F],
    "a == 1 and b == 'b'": [F, F, N, N, F, F],
    "not a > 0": [F, N, N, N, T, T],
    "(a > 0) == (b == 'Ab')": [T, N, N, N, T, T],
    "is_missing(a)": [F, F, T, F, F, F],
    "is_missing(a + 0)": [F, T, T, T, F, F],
    "is_missing(list)": [F, F, T, F, F, F],
    "a + 2 * `odd name` - 1": [2.0, N, N, N, 8.5, 11.0],
    "-a": [-1.0, N, N, N, 0.5, 0.0],
    "a / a": [1.0, N, N, N, 1.0, N],
    "1 / (a - 1)": [N, N, N, N, -1 / 1.5, -1.0],
    "column('odd name') / 3": [1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0],
    "1e38 * 1e38 * `odd name`": [N] * 6,
    "abs(a)": [1.0, N, N, N, 0.5, 0.0],
    "log(a)": [0.0, N, N, N, N, N],
    "log(`odd name`)": [0.0, 0.693147181, 1.098612289, 1.386294361, 1.609437912, 1.791759469],
    "lower(b)": ["ab", "c d", "b", N, "οδοσ", "i'\\"],
    "length(b)": [2.0, 3.0, 1.0, N, 4.0, 3.0],
    "length(list)": [1.0, 2.0, N, 0.0, 1.0, 1.0],
    "contains(list, 'x')": [T, T, N, F, F, T],
    "contains(b, ' ')": [F, T, F, N, F, F],
    "contains(b, '\\\\')": [F, F, F, N, F, T],
    'contains(b, "\'")': [F, F, F, N, F, T],
    "starts_with(b, 'A')": [T, F, F, N, F, F],
    "if_else(a > 0, a, missing)": ["1", N, N, N, N, N],
    "if_else(a > 0, a, -1)": [1.0, -1.0, -1.0, -1.0, -1.0, -1.0],
    "if_else(is_missing(b), 'none', lower(b))": ["ab", "c d", "b", "none", "οδοσ", "i'\\"],
    "if_else(a > 0, b == 'Ab', missing) ": [T, N, N, N, N, N],
}
NUMBERS = [12.5, -3.0, 1 / 3, -0.0, 1e15, 123456789.125, 9e17, -1e-10, 0.9999999999, 2e-9, 100.0]
WRITTEN = ["12.5", "-3", "0.333333333", "0", "1000000000000000", "123456789.125"]
WRITTEN += ["900000000000000000", "-0.0000000001", "1", "0.000000002", "100"]
NUMBERS += [2.5e-4 / 1e6, 2.5e-4, -1 / 3000, 1e-3, 9.99999999999e-4, 1.25e-30, 3e-45, 1e-60]
WRITTEN += ["0.00000000025", "0.00025", "-0.000333333333333333", "0.001", "0.000999999999999"]
WRITTEN += ["0." + 29 * "0" + "125", "0." + 44 * "0" + "3", "0"]


def computed(engine: Engine, table: pa.Table, values: dict[str, Any]) -> dict[str, list[Any]]:
    """Ibis values of `table`, {name: function of the table}, in the order of its rows."""
    raw = engine.load("raw", table)
    picked = raw.select("row", **{f"v{i}": v(raw) for i, v in enumerate(values.values())})
    engine.keep("picked", picked)
    whole = pa.concat_tables(engine.batches("picked")).sort_by("row")
    return {name: whole[f"v{i}"].to_pylist() for i, name in enumerate(values)}


def check_engine(engine: Engine) -> None:
    def compiled(text: str) -> Any:
        return lambda t: compile_expression(text, {c: t[c] for c in t.columns}, "data.derive.x")

    assert computed(engine, TABLE, {text: compiled(text) for text in VALUES}) == VALUES
    flags = pa.table({"row": range(len(NUMBERS)), "x": NUMBERS, "yes": [T, F, N, *[T] * 16]})
    texts = computed(engine, flags, {"x": lambda t: as_text(t.x), "yes": lambda t: as_text(t.yes)})
    assert texts == {"x": WRITTEN, "yes": ["1", "0", None, *["1"] * 16]}


def test_values_on_duckdb(duckdb: Engine) -> None:
    check_engine(duckdb)


@pytest.mark.slow
def test_values_on_spark(spark: Engine) -> None:
    check_engine(spark)


def test_names_are_the_columns_that_are_read() -> None:
    assert names("rating >= 4 and `odd name` == 'x `y`' or log(log) > 1") == {
        "rating",
        "odd name",
        "log",
    }
    assert names("if_else(true, missing, column('c'))") == {"c"}
    with pytest.raises(ConfigError, match=r"clean\.values\.x\.valid: a =: no expression"):
        names("a =", "clean.values.x.valid")


def columns() -> dict[str, Any]:
    table = ibis.table({"rating": "string", "b": "string", "list": "array<string>"}, name="t")
    return {name: table[name] for name in table.columns}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ratng > 1", "at ratng: no column .ratng.. Did you mean 'rating'. Columns: rating, b"),
        ("length(b) > 1 and lowr(b) == 'x'", "no function 'lowr'. Did you mean 'lower'?"),
        ("rating = 1", "no expression at '= 1' .* equal is =="),
        ("rating && b", "no expression at '& b'"),
        ("", "no expression"),
        ("rating == missing", "at missing: .*write is_missing"),
        ("rating is None", "use is_missing"),
        ("b and rating > 1", "at b: a condition is needed, not a text"),
        ("1 + 'a'", "at 'a': a number is needed, not a string"),
        ("1 + (b == 'a')", "a number is needed, not a boolean"),
        ("list == 'x'", "at list: text is needed, not a list"),
        ("length(1)", "at 1: text is needed, not a number"),
        ("contains(b)", r"write contains\(text, 'part'\)"),
        ("column(b)", r"write column\('odd name'\)"),
        ("b in rating", "at rating: `in` needs a list"),
        ("b in [1, 'x']", "numbers only or strings only"),
        ("missing", "the result is a missing value"),
        ("list", "the result is a list value"),
        ("1e999", "the number is too large"),
        ("b.__class__", "not part of the language"),
        ("rating[0]", "not part of the language"),
        ("rating ** 2", "not part of the language"),
        ("lambda: 1", "not part of the language"),
        ("f'{b}'", "not part of the language"),
        ("abs(x=1)", "not part of the language"),
        ("(1).bit_length()", "not part of the language"),
        ("-" * 5000 + "1", "no expression|inside one another"),
        ("not " * 60 + "b == 'a'", "more than 40 parts inside one another"),
        (" or ".join(["rating > 1"] * 50), "up to 40 conditions"),
        ("b\0", "no expression"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as raised:
        compile_expression(text, columns(), "data.derive.x")
    assert str(raised.value).startswith("data.derive.x: ")


@pytest.mark.slow
@given(
    st.text(
        st.sampled_from("abrating`'\"()[]<>=!+-*/., 019_\\\n" + string.ascii_letters), max_size=30
    )
    | st.text(max_size=12)
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_compiles_or_is_refused(text: str) -> None:
    try:
        value = compile_expression(text, columns(), "data.derive.x")
    except ConfigError:
        return
    assert value.type().is_boolean() or value.type().is_float64() or value.type().is_string()
