"""What callers hand over, checked where it comes in: an error names the argument and the remedy."""

from __future__ import annotations

import contextlib
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mtrec_jax.errors import ConfigError, DataError, Error, nearest

_naming: ContextVar[Callable[[str], str]] = ContextVar("naming", default="{}=".format)


@contextlib.contextmanager
def naming(name: Callable[[str], str]) -> Iterator[None]:
    """Have `argument` name arguments in this way: as options of a command, or as those of `fit`."""
    before = _naming.set(name)
    try:
        yield
    finally:
        _naming.reset(before)


@contextlib.contextmanager
def renaming(name: str, shown_as: str) -> Iterator[None]:
    """Have `argument` name another argument in the place of one.

    >>> with renaming("run", "out"):
    ...     argument("run"), argument("data")
    ('out=', 'data=')
    """
    outer = _naming.get()
    with naming(lambda one: outer(shown_as if one == name else one)):
        yield


def argument(name: str) -> str:
    """How a message names an argument to whoever gave it: `run=` in Python, `--run` of a command,
    "" where whoever it was cannot give it.

    >>> argument("init_from")
    'init_from='
    >>> with naming("--{}".format):
    ...     argument("run")
    '--run'
    """
    return _naming.get()(name)


def setting(name: str, key: str, value: str) -> str:
    """How a message says that a key is set by an argument that takes several.

    >>> setting("twins", "model.towers", "mmoe")
    'twins={"model.towers": "mmoe"}'
    >>> with naming("--{}".format):
    ...     setting("set", "model.towers", "mmoe")
    '--set model.towers=mmoe'
    """
    named = argument(name)
    return f'{named}{{"{key}": "{value}"}}' if named.endswith("=") else f"{named} {key}={value}"


def shown(value: Any) -> str:
    """A value for a message, cut where it is long.

    >>> shown([1, 2]), shown(list(range(99)))
    ('[1, 2]', '[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1 … (a list)')
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]} … (a {type(value).__name__})"


def a_path(name: str, value: Any) -> Path:
    """A path from a text or a path.

    Raises:
      DataError: it is neither.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise DataError(f"{name}: {shown(value)} is no path; pass a text or a pathlib.Path")
    return Path(value)


def a_whole_number(
    name: str, value: Any, least: int, most: int, what: str, error: type[Error] = DataError
) -> int:
    """A whole number within bounds; `what` says in words what the upper one is.

    Raises:
      Error: it is none, or beyond a bound.

    >>> a_whole_number("k", 3, 1, 9, "9 items")
    3
    """
    whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not whole or not least <= operator.index(value) <= most:
        kind = "" if whole else "a whole number "
        raise error(f"{name} = {shown(value)}: {kind}between {least} and {what}")
    return operator.index(value)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise `ConfigError` for a value that is not among the allowed ones.

    >>> one_of("split", "test", ("validation", "test"))
    """
    allowed = tuple(allowed)
    if not any(type(value) is type(known) and value == known for known in allowed):
        texts = [known for known in allowed if isinstance(known, str)]
        hint = nearest(value, texts) if isinstance(value, str) else ""
        named, known = argument(name).rstrip("="), ", ".join(map(repr, allowed))
        raise ConfigError(f"{named}: {shown(value)} is not one of {known}.{hint}")


def a_list(name: str, values: Any, error: type[Error] = DataError) -> list[Any]:
    """The values of any iterable but a text, a mapping or a table.

    Raises:
      Error: it is one of these, or no iterable.

    >>> a_list("users", (7, 8))
    [7, 8]
    """
    if isinstance(values, str | bytes):
        what = " of ids" if error is DataError else ""
        raise error(f"{name}: {shown(values)} is one text; pass a list{what}")
    if isinstance(values, Mapping) or hasattr(values, "columns"):
        raise error(
            f"{name}: {shown(values)} is a {type(values).__name__}; pass a list, or one column"
        )
    try:
        return list(values)
    except TypeError:
        raise error(f"{name}: {shown(values)} is no list; pass [{shown(values)}]") from None


def a_mapping(name: str, value: Any, example: str) -> dict[str, Any]:
    """A mapping with texts as keys.

    Raises:
      ConfigError: it is none; `example` says what to write.

    >>> a_mapping("settings", {"train.steps": 3}, "settings={'train.steps': 300}")
    {'train.steps': 3}
    """
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise ConfigError(f"{name}: {shown(value)} is a {kind}, not a mapping; write {example}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{name}: the key {shown(key)} is no text; write {example}")
    return dict(value)


def instance(name: str, value: Any, kind: type[Any], remedy: str) -> None:
    """Raise `ConfigError` unless the value is of the kind; `remedy` says what gives one.

    >>> instance("experiment", 7, int, "pass what load_experiment gives")
    """
    if not isinstance(value, kind):
        raise ConfigError(
            f"{name}: {shown(value)} is a {type(value).__name__}, not a {kind.__name__}; {remedy}"
        )


_UNITS = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def parse_bytes(name: str, text: str) -> float:
    """Bytes from a text such as "80GB".

    Raises:
      ConfigError: it is none.

    >>> parse_bytes("--device-memory", "80GB"), parse_bytes("--device-memory", "1.5T")
    (80000000000.0, 1500000000000.0)
    """
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([TGMk]?)(B?)", text.strip())
    value = float(found[1]) * _UNITS[found[2]] if found and (found[2] or found[3]) else 0.0
    if not value > 0:
        raise ConfigError(f"{name} {text}: write a number above 0 with its unit, such as 80GB")
    return value


def bytes_text(size: float | int) -> str:
    """Bytes with a unit, in three digits.

    >>> bytes_text(1.5e9), bytes_text(999), bytes_text(0)
    ('1.5 GB', '999 B', '0 B')
    """
    unit = next((unit for unit, each in _UNITS.items() if size >= each), "")
    return f"{float(f'{size / _UNITS[unit]:.3g}'):g} {unit}B"
