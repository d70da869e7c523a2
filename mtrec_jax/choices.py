"""What is chosen by its kind: frozen options dataclasses, the package's and a user's own.

A room of the package holds a dictionary {kind: dataclass}. A field of the configuration that is
annotated with `Choice` takes the kind alone, a table with `kind` and that kind's options, or an
instance. Classes of a user's own come as `extensions` in the context of the validation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
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
    >>> read(Choice({"flat": Flat}, default="flat"), {"width": 3})
    Flat(kind='flat', width=3)
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Mine:
    ...     kind: str = "mine"
    >>> read(Choice({"flat": Flat}), "mine", extensions=[Mine])
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

    def _read(self, base: type, value: Any, info: core_schema.ValidationInfo) -> Any:
        extensions = (info.context or {}).get("extensions", ())
        known = {**self.kinds, **{kind_of(e): e for e in extensions if issubclass(e, base)}}
        value = {"kind": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            if isinstance(value, base) and hasattr(value, "kind"):
                return value
            raise PydanticCustomError("choice", "a kind is needed, or a table with kind")
        kind = value.get("kind", self.default)
        if kind not in known:
            given = f"{kind!r} is not one of" if kind else "kind is required, one of"
            hint = nearest(str(kind), known)
            text = f"{given} {', '.join(map(repr, known))}.{hint}"
            raise PydanticCustomError("choice", "{text}", {"text": text})
        _check_keys(known, kind, value)
        return _adapter(known[kind]).validate_python({**value, "kind": kind}, context=info.context)


def read(choice: Choice, value: Any, extensions: Iterable[type] = ()) -> Any:
    """An instance of what is chosen, outside of a configuration.

    Raises:
      pydantic.ValidationError: an unknown kind or option, or a value that an option does not take.
    """
    return _adapter(choice).validate_python(value, context={"extensions": tuple(extensions)})


def kind_of(options: Any) -> str:
    """The kind by which an options dataclass is chosen.

    Raises:
      ConfigError: it is no dataclass with such a field.
    """
    kind = getattr(options, "kind", None)
    if not dataclasses.is_dataclass(options) or "kind" not in keys(options) or not kind:
        name = getattr(options, "__name__", repr(options))
        raise ConfigError(
            f"extensions: {name} is no frozen dataclass with a field such as "
            "kind: Literal['mine'] = 'mine'"
        )
    return kind


def keys(options: Any) -> list[str]:
    """What may be said in a table of this dataclass."""
    return [field.name for field in dataclasses.fields(options) if field.init]


def _check_keys(known: Mapping[str, type], kind: str, value: Mapping[Any, Any]) -> None:
    """Refuse options that the kind does not have, with the kinds that have them."""
    have, problems = keys(known[kind]), list[InitErrorDetails]()
    for key in value.keys() - set(have):
        others = ", ".join(repr(k) for k, options in known.items() if key in keys(options))
        what = f"unknown key.{nearest(str(key), have)}"
        what = f"not of kind '{kind}', but of {others}." if others else what
        text = f"{what} Known here: {', '.join(have)}"
        error = PydanticCustomError("choice", "{text}", {"text": text})
        problems.append({"type": error, "loc": (key,), "input": value[key]})
    if problems:
        raise pydantic.ValidationError.from_exception_data(kind, problems)


@functools.cache
def _adapter(options: Any) -> pydantic.TypeAdapter[Any]:
    annotated = isinstance(options, Choice)
    return pydantic.TypeAdapter(Annotated[Any, options] if annotated else options)
