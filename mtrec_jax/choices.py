"""What is chosen by its kind: frozen options dataclasses, the package's and a user's own.

A room of the package holds a dictionary {kind: dataclass}. A field of the configuration that is
annotated with `Choice` takes the kind alone, a table with `kind` and that kind's options, or an
instance. Classes of a user's own come as `extensions` in the context of the validation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from mtrec_jax.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Choice:
    """Annotation of a field whose class is chosen by `kind`: `Annotated[Base, Choice(KINDS)]`.

    Where `Base` is a class (no protocol), only extensions and instances of it are taken.

    Args:
      kinds: {kind: frozen dataclass with a field `kind` of that value}.
      default: the kind of a table that names none; "": it has to name one.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Flat:
    ...     kind: str = "flat"
    ...     width: int = 8
    >>> read(Choice({"flat": Flat}, default="flat"), {"width": 3}, "head")
    Flat(kind='flat', width=3)
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Mine:
    ...     kind: str = "mine"
    >>> read(Choice({"flat": Flat}), "mine", "head", extensions=[Mine])
    Mine(kind='mine')
    """

    kinds: Mapping[str, type]
    default: str = ""

    def __hash__(self) -> int:
        return hash((tuple(self.kinds.items()), self.default))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: pydantic.GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """How pydantic reads such a field; `source` is what the annotation says it is."""
        anything = source is Any or getattr(source, "_is_protocol", False)
        is_class = isinstance(source, type) and not anything
        read_it = functools.partial(self._read, source if is_class else object)
        return core_schema.with_info_plain_validator_function(read_it)

    def _read(self, base: type, value: Any, info: Any) -> Any:
        extensions = (info.context or {}).get("extensions", {})
        own = {kind: options for kind, options in extensions.items() if issubclass(options, base)}
        for kind in own.keys() & self.kinds.keys():
            if own[kind] is not self.kinds[kind]:
                name = own[kind].__name__
                raise _problem(f"'{kind}' is a kind of the package; give {name} another one")
        known = {**self.kinds, **own}
        value = kind_alone(value)
        if not isinstance(value, Mapping):
            if isinstance(value, base) and hasattr(value, "kind"):
                return _finite(value)
            raise _problem(f"a kind, or a table with kind, not {value!r}")
        kind = value.get("kind", self.default)
        if kind not in known:
            names = ", ".join(map(repr, known))
            if not kind:
                raise _problem(f"kind is required, one of {names}")
            hint = nearest(str(kind), known) or " A class of your own comes with extensions=[…]"
            raise _problem(f"{kind!r} is not one of {names}.{hint}")
        _check_keys(known, kind, value)
        found = _adapter(known[kind]).validate_python({**value, "kind": kind}, context=info.context)
        return _finite(found)


def kind_alone(value: Any) -> Any:
    """A kind alone as a table with that kind; anything else as it is.

    >>> kind_alone("binary")
    {'kind': 'binary'}
    """
    return {"kind": value} if isinstance(value, str) else value


def read(options: Any, value: Any, where: str, extensions: Iterable[type] = ()) -> Any:
    """A dataclass, or what a `Choice` chooses, from plain values.

    Args:
      options: a dataclass of options, or a `Choice`.
      value: nested mappings as TOML gives them; instances are taken where something is chosen.
      where: opens the message of an error.
      extensions: classes that may be chosen beside the package's.

    Raises:
      ConfigError: an unknown key or kind, or a value that a key does not take, one in a line.
    """
    own: dict[str, type] = {}
    for extension in extensions:
        if own.setdefault(kind_of(extension), extension) is not extension:
            raise ConfigError(f"extensions: two classes of kind '{kind_of(extension)}'; rename one")
    try:
        return _adapter(options).validate_python(value, context={"extensions": own})
    except pydantic.ValidationError as error:
        lines = "\n".join(f"  {_explained(e, options)}" for e in error.errors())
        raise ConfigError(f"{where}:\n{lines}") from None


def _explained(error: Any, options: Any) -> str:
    """One line for one of pydantic's errors: key, allowed values, nearest spelling."""
    location, given, limits = error["loc"], error["input"], error.get("ctx", {})
    key, kind = ".".join(map(str, location)), error["type"]
    if kind == "choice":
        return f"{key}: {limits['text']}"
    if kind == "unexpected_keyword_argument":
        known = keys(_class_at(options, location[:-1]))
        return (
            f"{key}: unknown key.{nearest(str(location[-1]), known)} Known here: {', '.join(known)}"
        )
    if kind == "missing":
        return f"{key}: required, and missing"
    if kind == "literal_error":
        allowed = limits["expected"]
        texts = [text.strip("' ") for text in allowed.replace(" or ", ", ").split(",")]
        return f"{key}: {given!r} is not one of {allowed}.{nearest(str(given), texts)}"
    words = {
        "greater_than": "must be above {gt:g}",
        "greater_than_equal": "must be {ge:g} or more",
        "less_than": "must be below {lt:g}",
        "less_than_equal": "must be {le:,} or less",
        "finite_number": "must be a finite number",
        "tuple_type": "must be a list",
        "dataclass_type": "must be a table",
        "too_short": "at least {min_length} needed",
    }
    text = words[kind].format(**limits) if kind in words else error["msg"]
    return f"{key}: {text}, not {given!r}"


def _class_at(node: Any, location: Iterable[Any]) -> Any:
    """The dataclass whose key stands at a path that begins with another dataclass."""
    for part in location:
        inside = dataclasses.is_dataclass(node)
        node = typing.get_type_hints(node)[part] if inside else _dataclass_in(node)
        node = _dataclass_in(node) if isinstance(node, types.UnionType) else node
    return node


def _dataclass_in(annotation: Any) -> Any:
    return next(a for a in typing.get_args(annotation) if dataclasses.is_dataclass(a))


def kind_of(options: Any) -> str:
    """The kind by which an options dataclass is chosen.

    Raises:
      ConfigError: it is no dataclass with such a field.
    """
    is_class = isinstance(options, type) and dataclasses.is_dataclass(options)
    kind = getattr(options, "kind", None)
    if not is_class or "kind" not in keys(options) or not isinstance(kind, str) or not kind:
        name = getattr(options, "__name__", repr(options))
        raise ConfigError(
            f"extensions: {name} is no frozen dataclass with a field such as "
            "kind: Literal['mine'] = 'mine'"
        )
    return kind


def chosen_kinds(node: Any) -> Iterator[type]:
    """The classes by which something is chosen in an experiment or a part of it, at any depth.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Mine:
    ...     kind: str = "mine"
    >>> [of.__name__ for of in chosen_kinds({"towers": Mine(), "heads": (Mine(), 3)})]
    ['Mine', 'Mine']
    """
    inside: Iterable[Any] = ()
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        if isinstance(getattr(type(node), "kind", None), str):
            yield type(node)
        inside = (getattr(node, field.name) for field in dataclasses.fields(node))
    elif isinstance(node, Mapping):
        inside = node.values()
    elif isinstance(node, (list, tuple)):
        inside = node
    for part in inside:
        yield from chosen_kinds(part)


def keys(options: Any) -> list[str]:
    """What may be said in a table of this dataclass."""
    return [field.name for field in dataclasses.fields(options) if field.init]


def _check_keys(known: Mapping[str, type], kind: str, value: Mapping[Any, Any]) -> None:
    """Refuse options that the kind does not have, with the kinds that have them."""
    have, problems = keys(known[kind]), list[InitErrorDetails]()
    everywhere = {key for options in known.values() for key in keys(options)}
    for key in value.keys() - set(have):
        others = ", ".join(repr(k) for k, options in known.items() if key in keys(options))
        what = f"unknown key.{nearest(str(key), have) or nearest(str(key), everywhere)}"
        what = f"not of kind '{kind}', but of {others}." if others else what
        error = _problem(f"{what} Known here: {', '.join(have)}")
        problems.append({"type": error, "loc": (key,), "input": value[key]})
    if problems:
        raise pydantic.ValidationError.from_exception_data(kind, problems)


def _finite(options: Any) -> Any:
    """The options, of which no number is infinite or NaN."""
    for field in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
        value = getattr(options, field.name)
        for number in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise _problem(f"{field.name} must be a finite number, not {number!r}")
    return options


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("choice", "{text}", {"text": text})


@functools.cache
def _adapter(options: Any) -> Any:
    annotated = isinstance(options, Choice)
    return pydantic.TypeAdapter(Annotated[Any, options] if annotated else options)
