"""Single keys that are set over a configuration: from the command line, and from Python."""

from __future__ import annotations

import tomllib
from typing import Any

from mtrec_jax.errors import ConfigError


def cut(override: str) -> tuple[str, Any]:
    """Key and value of an override such as "model.towers=ple"; the value is TOML, or else a text.

    Raises:
      ConfigError: it is no text with an equals sign.

    >>> cut("model.width=8"), cut("model.towers=ple")
    (('model.width', 8), ('model.towers', 'ple'))
    """
    key, equals, text = override.partition("=") if isinstance(override, str) else ("", "", "")
    if not equals:
        raise ConfigError(f"--set {override}: write it as key=value, e.g. model.towers=ple")
    try:
        return key.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), text.strip()  # a bare word is text


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested tables.

    Raises:
      ConfigError: the key is none, or leads through something that is no table.

    >>> values = {"train": {"steps": 9}}
    >>> set_key(values, "train.seed", 3)
    >>> values
    {'train': {'steps': 9, 'seed': 3}}
    """
    parts = key.split(".") if isinstance(key, str) else [""]
    if not all(parts):
        raise ConfigError(f"--set {key}: write it as key=value, e.g. model.towers=ple")
    node: Any = values
    for part in parts[:-1]:
        node = node.setdefault(part, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(f"--set {key}: '{'.'.join(parts[:-1])}' is not a table")
    node[parts[-1]] = value
