"""Sizes and speeds as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from mtrec_jax.errors import ConfigError

_PREFIXES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}


def parse_quantity(name: str, text: str, unit: str) -> float:
    """A number with a unit, such as "80GB".

    Raises:
      ConfigError: it is none; `name` opens the message.

    >>> parse_quantity("--device-memory", "80GB", "B"), parse_quantity("--flops", "50T", "FLOP/s")
    (80000000000.0, 50000000000000.0)
    """
    found = re.fullmatch(rf"([\d.]+(?:e\d+)?)\s*([TGMk]?)((?:{re.escape(unit)})?)", text.strip())
    try:
        value = float(found[1]) * _PREFIXES[found[2]] if found and (found[2] or found[3]) else 0.0
    except ValueError:
        value = 0.0
    if not value > 0:
        raise ConfigError(f"{name} {text}: write a number above 0 with its unit, such as 80G{unit}")
    return value


def parse_rows(texts: Iterable[str]) -> dict[str, int]:
    """Table sizes from texts such as "item=1e9".

    Raises:
      ConfigError: a text is no name and number, or a name comes twice.

    >>> parse_rows(["item=1e9", "user=20_000"])
    {'item': 1000000000, 'user': 20000}
    """
    found: dict[str, int] = {}
    for text in texts:
        name, _, size = (part.strip() for part in text.partition("="))
        if name in found:
            raise ConfigError(f"--rows {text}: {name} has been given {found[name]:,} rows already")
        try:
            found[name] = int(float(size))
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"--rows {text}: write it as item=1e9") from error
    return found


def quantity_text(value: float | int, unit: str = "B") -> str:
    """A number with a unit, in three digits.

    >>> quantity_text(1.5e9), quantity_text(999), quantity_text(2e12, "B/s")
    ('1.5 GB', '999 B', '2 TB/s')
    """
    for prefix, each in _PREFIXES.items():
        if value >= each:
            return f"{float(f'{value / each:.3g}'):g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
