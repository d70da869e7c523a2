"""A small, safe language of values and conditions over the columns of a table.

`rating >= 4 and not is_missing(time)` is parsed, never run: each node of its syntax tree becomes an
Ibis expression, so that every engine computes the same. Columns are text. Beside a number, or in
arithmetic, a column is read as a number, beside a string it stays text, and two columns are
compared by == as text and by < as numbers. What is missing or unreadable makes the result missing,
as NULL does in SQL, and so does a division by zero.
"""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import ibis

from mtrec_jax.data.features.base import NUMBER
from mtrec_jax.errors import ConfigError, nearest

FUNCTIONS = {
    "is_missing": "is_missing(x)",
    "if_else": "if_else(condition, x, y)",
    "lower": "lower(text)",
    "length": "length(text)",
    "contains": "contains(text, 'part')",
    "starts_with": "starts_with(text, 'start')",
    "abs": "abs(number)",
    "log": "log(number)",
    "column": "column('odd name')",
}
LARGEST = 3.4e38  # of a 32-bit float
# (the smallest numbers of a range, how many decimals they get), down to the least 32-bit float
_SMALL = tuple((float(f"1e-{9 + 6 * n}"), 18 + 6 * n) for n in range(7))
_WORDS = ("true", "false", "missing")
_DEEPEST = 40  # parts inside one another
_QUOTED = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|`([^`]*)`""")
_TEXTS = ("text", "string", "missing")


class _Value(NamedTuple):
    kind: str  # text, string (written in the expression), number, boolean, list or missing
    value: Any  # ibis


@dataclass(frozen=True)
class _Place:
    text: str
    where: str
    columns: dict[str, Any]

    def fail(self, node: ast.AST | None, problem: str) -> NoReturn:
        """Raise the error that names the key, the text, and the part of it that is wrong."""
        part = ast.get_source_segment(self.text, node) if node is not None else None
        at = f", at {part}" if part and part != self.text else ""
        raise ConfigError(f"{self.where}: {self.text}{at}: {problem}")


def compile_expression(text: str, columns: dict[str, Any], where: str) -> Any:
    """An expression as an Ibis value: boolean, float64 or string.

    Args:
      text: e.g. `"rating >= 4"`, `"category in ['a', 'b']"`, `"if_else(is_missing(x), 0, x / 2)"`;
        a column whose name is no plain word stands in backticks.
      columns: {name: Ibis column of text, or of lists of text}.
      where: the configuration key, for messages.

    Raises:
      ConfigError: what is no such expression, with the place, what is allowed and the nearest name.

    >>> table = ibis.table({"rating": "string"}, name="events")
    >>> compile_expression("rating >= 4", {"rating": table.rating}, "data.derive.good").type()
    Boolean(nullable=True)
    """
    place = _Place(_plain(text), where, columns)
    found = _compile(_parse(place), place, 0)
    if found.kind in ("list", "missing"):
        place.fail(None, f"the result is a {found.kind} value, not a condition, number or text")
    return _finite(found.value) if found.kind == "number" else found.value


def names(text: str, where: str = "expression") -> set[str]:
    """The columns that an expression reads.

    Raises:
      ConfigError: the text is no expression.

    >>> sorted(names("rating >= 4 and `odd name` == 'x'"))
    ['odd name', 'rating']
    """
    place, found = _Place(_plain(text), where, {}), set()
    tree = _parse(place)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in _WORDS and id(node) not in called:
            found.add(node.id)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "column":
            found.add(_quoted_name(node, place))
    return found


def number(value: Any) -> Any:
    """An Ibis column as a finite number that a 32-bit float can hold, NULL where it is none."""
    if value.type().is_string():
        value = ibis.ifelse(value.re_search(NUMBER), value, ibis.null("string"))
        return _finite(value.try_cast("float64"))
    return _finite(value.cast("float64"))


def as_text(value: Any) -> Any:
    """A value as the text that a file would hold: true is "1", numbers have up to 9 decimals, and
    below .001 as many as 9 significant digits take.

    The decimals are made of integers, as engines write floating-point numbers in different ways.
    """
    kind = value.type()
    if kind.is_boolean():
        return ibis.cases((value, "1"), (~value, "0"), else_=ibis.null("string"))
    if not kind.is_floating():
        return value if kind.is_string() or kind.is_array() else value.cast("string")
    size = value.abs()
    usual = ibis.ifelse(size < 9e18, size, 0.0)  # fits 64 bits; larger ones are whole
    whole = usual.floor().cast("int64")
    billionths = ((usual - whole.cast("float64")) * 1e9 + 0.5).floor().cast("int64")
    carried = whole + ibis.ifelse(billionths == 10**9, 1, 0)
    decimals = (billionths % 10**9).cast("string").lpad(9, "0")
    text = carried.cast("string") + "." + decimals
    small = [  # (from which size on, its decimals: 9 to 15 of them are no leading zeros)
        (size >= low, ibis.literal("0.") + _digits(size, low, places)) for low, places in _SMALL
    ]
    text = ibis.cases((size >= 1e-3, text), *small, else_="0.0").re_replace("[.]?0+$", "")
    sign = ibis.ifelse((value < 0) & (text != "0"), "-", "")
    return ibis.ifelse(size < 9e18, sign + text, value.cast("string").lower())


def _digits(size: Any, low: float, places: int) -> Any:
    """The decimals of numbers from `low` up to a million times as much, which fit a float64."""
    whole = (ibis.least(size, low * 1e6) * float(f"1e{places}") + 0.5).floor().cast("int64")
    return whole.cast("string").lpad(places, "0")


def _finite(value: Any) -> Any:
    """NULL for infinities and what is no number, which is larger than any in every engine."""
    return ibis.ifelse(value.abs() <= LARGEST, value, ibis.null("float64"))


def _plain(text: str) -> str:
    """The text with `odd name` written as column("odd name")."""
    return _QUOTED.sub(lambda match: match[1] or f"column({match[2]!r})", text.strip())


def _parse(place: _Place) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of doubtful escapes in strings
            return ast.parse(place.text, mode="eval").body
    except SyntaxError as error:
        rest = place.text[max((error.offset or 1) - 1, 0) :][:20]
        at = f" at {rest!r}" if rest else ""
        place.fail(
            None,
            f"no expression{at} ({error.msg}). Write such as rating >= 4 and shop == 'a'; equal is "
            "==, a column whose name is no plain word stands in backticks",
        )
    except (ValueError, RecursionError, MemoryError) as error:
        place.fail(None, f"no expression ({error})")


def _compile(node: ast.AST, place: _Place, depth: int) -> _Value:
    """One node of the syntax tree, its parts first."""
    if depth > _DEEPEST:
        place.fail(node, f"more than {_DEEPEST} parts inside one another; derive it in steps")

    def inner(part: ast.AST) -> _Value:
        return _compile(part, place, depth + 1)

    match node:
        case ast.Constant(value=bool()) | ast.Name(id="true" | "false"):
            truth = getattr(node, "id", "") == "true" or getattr(node, "value", False) is True
            return _Value("boolean", ibis.literal(truth))
        case ast.Constant(value=int() | float() as value):
            if not abs(value) <= LARGEST:
                place.fail(node, "the number is too large")
            # as text, because some engines would make a decimal of it
            return _Value("number", ibis.literal(repr(float(value))).cast("float64"))
        case ast.Constant(value=str() as value):
            return _Value("string", ibis.literal(value))
        case ast.Constant(value=None) | ast.Name(id="missing"):
            return _Value("missing", ibis.null("string"))
        case ast.Name(id=name):
            return _column(node, name, place)
        case ast.BoolOp(op=op, values=parts) if len(parts) <= _DEEPEST:
            conditions = [_condition(inner(part), part, place) for part in parts]
            result = conditions[0]
            for condition in conditions[1:]:
                result = result & condition if isinstance(op, ast.And) else result | condition
            return _Value("boolean", result)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return _Value("boolean", ~_condition(inner(part), part, place))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=part):
            value = _number(inner(part), part, place)
            return _Value("number", -value if isinstance(op, ast.USub) else value)
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op):
            left = _number(inner(node.left), node.left, place)
            right = _number(inner(node.right), node.right, place)
            return _Value("number", _arithmetic(op, left, right))
        case ast.Compare(left=first, ops=ops, comparators=others):
            return _comparisons(first, ops, others, place, depth)
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]):
            return _call(node, name, parts, place, depth)
    place.fail(
        node,
        "not part of the language: columns, numbers, strings, true, false, missing, + - * /, "
        f"comparisons, in [...], up to {_DEEPEST} conditions joined by and, or, not; "
        + ", ".join(FUNCTIONS.values()),
    )


def _column(node: ast.AST, name: str, place: _Place) -> _Value:
    if name not in place.columns:
        hint = nearest(name, place.columns)
        place.fail(node, f"no column '{name}'.{hint} Columns: {', '.join(place.columns)}")
    value = place.columns[name]
    return _Value("list" if value.type().is_array() else "text", value)


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(op, ast.Add):
        return left + right
    if isinstance(op, ast.Sub):
        return left - right
    return left * right if isinstance(op, ast.Mult) else left / right.nullif(0.0)


def _condition(found: _Value, node: ast.AST, place: _Place) -> Any:
    if found.kind == "missing":
        return ibis.null("boolean")
    if found.kind != "boolean":
        place.fail(node, f"a condition is needed, not a {found.kind}; compare it, e.g. x == 'yes'")
    return found.value


def _number(found: _Value, node: ast.AST, place: _Place) -> Any:
    if found.kind == "number":
        return found.value
    if found.kind == "missing":
        return ibis.null("float64")
    if found.kind != "text":
        place.fail(node, f"a number is needed, not a {found.kind}")
    return number(found.value)


def _text(found: _Value, node: ast.AST, place: _Place) -> Any:
    if found.kind not in _TEXTS:
        place.fail(node, f"text is needed, not a {found.kind}")
    return as_text(found.value)


def _comparisons(
    first: ast.expr, ops: list[ast.cmpop], others: list[ast.expr], place: _Place, depth: int
) -> _Value:
    """`a < b <= c` means a < b and b <= c."""
    result, left = None, first
    for op, right in zip(ops, others, strict=True):
        if isinstance(op, ast.In | ast.NotIn):
            found = _within(left, right, place, depth)
            found = ~found if isinstance(op, ast.NotIn) else found
        else:
            found = _compare(left, op, right, place, depth)
        result, left = found if result is None else result & found, right
    return _Value("boolean", result)


def _compare(left: ast.expr, op: ast.cmpop, right: ast.expr, place: _Place, depth: int) -> Any:
    sides = [_compile(node, place, depth + 1) for node in (left, right)]
    kinds = [side.kind for side in sides]
    ordered = isinstance(op, ast.Lt | ast.LtE | ast.Gt | ast.GtE)
    if not ordered and not isinstance(op, ast.Eq | ast.NotEq):
        place.fail(left, "compare by ==, !=, <, <=, >, >= or in; use is_missing(x) for missing")
    if "missing" in kinds:
        place.fail(right, "nothing equals what is missing; write is_missing(x)")
    if kinds == ["boolean", "boolean"] and not ordered:
        a, b = sides[0].value, sides[1].value
    elif "number" in kinds or (kinds == ["text", "text"] and ordered):
        a, b = _number(sides[0], left, place), _number(sides[1], right, place)
    else:
        a, b = _text(sides[0], left, place), _text(sides[1], right, place)
    match op:
        case ast.Eq():
            return a == b
        case ast.NotEq():
            return a != b
        case ast.Lt():
            return a < b
        case ast.LtE():
            return a <= b
        case ast.Gt():
            return a > b
    return a >= b


def _within(left: ast.expr, right: ast.expr, place: _Place, depth: int) -> Any:
    if not isinstance(right, ast.List | ast.Tuple) or not right.elts:
        place.fail(right, "`in` needs a list such as ['a', 'b'] or [1, 2]")
    choices = [_compile(node, place, depth + 1) for node in right.elts]
    kinds = {choice.kind for choice in choices}
    if kinds not in ({"number"}, {"string"}):
        place.fail(right, "the list of `in` holds numbers only or strings only")
    value = _compile(left, place, depth + 1)
    chosen = (_number if kinds == {"number"} else _text)(value, left, place)
    return chosen.isin([choice.value for choice in choices])


def _call(node: ast.AST, name: str, parts: list[ast.expr], place: _Place, depth: int) -> _Value:
    if name not in FUNCTIONS:
        known = ", ".join(FUNCTIONS.values())
        place.fail(node, f"no function '{name}'.{nearest(name, FUNCTIONS)} Functions: {known}")
    if len(parts) != FUNCTIONS[name].count(",") + 1:
        place.fail(node, f"write {FUNCTIONS[name]}")
    if name == "column":
        return _column(node, _quoted_name(node, place), place)
    found = [_compile(part, place, depth + 1) for part in parts]
    first, value = found[0], found[0].value
    if name == "is_missing":
        return _Value("boolean", value.isnull())
    if name == "if_else":
        return _if_else(found, parts, place)
    if name == "abs":
        return _Value("number", _number(first, parts[0], place).abs())
    if name == "log":  # of what is above 0; 9 decimals, the last bits differ between engines
        positive = ibis.greatest(_number(first, parts[0], place), 0.0).nullif(0.0)
        return _Value("number", (positive.ln() * 1e9 + 0.5).floor().cast("float64") / 1e9)
    if name == "length" and first.kind == "list":  # Spark counts -1 values of a missing list
        return _Value("number", value.length().nullif(-1).cast("float64"))
    if name == "contains" and first.kind == "list":
        return _Value("boolean", value.contains(_text(found[1], parts[1], place)))
    text = _text(first, parts[0], place)
    if name == "lower":  # engines differ in these two letters alone
        return _Value("text", text.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower())
    if name == "length":
        return _Value("number", text.length().cast("float64"))
    part = _text(found[1], parts[1], place)
    return _Value("boolean", text.contains(part) if name == "contains" else text.startswith(part))


def _if_else(found: list[_Value], parts: list[ast.expr], place: _Place) -> _Value:
    """The second value where the condition holds, the third where it does not or is missing."""
    condition = _condition(found[0], parts[0], place)
    kinds = {value.kind for value in found[1:]}
    if kinds == {"missing"}:
        return found[1]
    read, kind = _text, "text"
    if "boolean" in kinds:
        read, kind = _condition, "boolean"
    elif "number" in kinds:
        read, kind = _number, "number"
    pairs = zip(found[1:], parts[1:], strict=True)
    yes, no = (read(value, part, place) for value, part in pairs)
    return _Value(kind, ibis.ifelse(condition, yes, no))


def _quoted_name(node: ast.AST, place: _Place) -> str:
    match node:
        case ast.Call(args=[ast.Constant(value=str() as name)], keywords=[]):
            return name
    place.fail(node, f"write {FUNCTIONS['column']}")
