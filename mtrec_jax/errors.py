"""The one family of errors that this library raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(Exception):
    """Base of every error that mtrec_jax raises; its message names the place and the remedy."""


class ConfigError(Error):
    """The configuration has an unknown key, a wrong type or an impossible combination."""


class DataError(Error):
    """A file, a row, a column or an id is not what the configuration says."""


class CheckpointError(Error):
    """A run folder or a checkpoint cannot be used."""


class Stalled(Error):
    """Storage does not answer. A thread still waits for it, which only the process's end stops."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `" Did you mean 'x'?"` for a misspelt `name`, or `""` when nothing known is close.

    >>> nearest("towrs", ["towers", "encoder"])
    " Did you mean 'towers'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
