"""Which files a table is read from: paths, globs, and URLs through fsspec."""

from __future__ import annotations

import glob
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from mtrec_jax.arguments import argument
from mtrec_jax.config import Files
from mtrec_jax.errors import DataError


class File(NamedTuple):
    """One raw file."""

    path: str  # "": the table in memory
    system: Any  # fsspec file system of a URL, or None
    name: str  # for messages about rows


def find_files(name: str, files: Files, base: Path, public: str) -> list[File]:
    """The files of a table in order; globs give sorted names.

    Raises:
      DataError: there is no such file, it is a folder, or it is named twice.
    """
    found: list[tuple[str, Any]] = []
    for pattern in files.files:
        try:
            found += _match_url(pattern) if "://" in pattern else _match(pattern, base, public)
        except DataError:
            raise
        except ImportError as error:
            raise DataError(f"{pattern}: {error} (pip install s3fs or gcsfs)") from error
        except Exception as error:
            raise DataError(
                f"{pattern} cannot be looked up: {error}. Check its name and your access to it"
            ) from error
    names = Counter(path.rpartition("/")[2] for path, _ in found)
    for path, times in Counter(path for path, _ in found).items():
        if times > 1:
            raise DataError(f"data.{name}.files: {path} is named twice; every file is read once")
    return [
        File(path, system, short if names[short := path.rpartition("/")[2]] == 1 else path)
        for path, system in found
    ]


def _match(pattern: str, base: Path, public: str) -> list[tuple[str, Any]]:
    path = base / pattern
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the files in it, e.g. '{pattern}/*.parquet'")
    if path.is_file():
        return [(str(path), None)]
    hint = f" Fetch the data with: mtrec data {public}" if public else ""
    if not base.exists() and not Path(pattern).is_absolute():
        hint = hint or f" Name another: {argument('data')}"
        raise DataError(f"there is no folder {base}, in which '{pattern}' would be.{hint}")
    if not any(letter in pattern for letter in "*?["):
        raise DataError(f"{path}: there is no such file.{hint}")
    paths = sorted(base / file for file in glob.glob(pattern, root_dir=base, recursive=True))
    paths = [p for p in paths if p.is_file() and not _is_mark(p.name, pattern)]
    if not paths:
        raise DataError(f"no file in {base} matches '{pattern}'.{hint}")
    return [(str(path), None) for path in paths]


def _match_url(url: str) -> list[tuple[str, Any]]:
    import fsspec

    system, path = fsspec.url_to_fs(url)
    if any(letter in url for letter in "*?["):
        paths = sorted(p for p in system.glob(path) if system.isfile(p))
        paths = [p for p in paths if not _is_mark(p.rpartition("/")[2], url)]
        if not paths:
            raise DataError(f"no file matches '{url}'")
    elif system.isfile(path):
        paths = [path]
    elif system.isdir(path):
        raise DataError(f"{url} is a folder; name the files in it, e.g. '{url}/*.parquet'")
    else:
        raise DataError(f"{url}: there is no such file")
    return [(system.unstrip_protocol(path), system) for path in paths]


def _is_mark(name: str, pattern: str) -> bool:
    """Files such as _SUCCESS, which a pattern means only if it begins so."""
    return name[0] == "_" and not pattern.rpartition("/")[2].startswith("_")


def open_file(file: File) -> Any:
    """The bytes of a file, to be used in a `with`."""
    return file.system.open(file.path, "rb") if file.system else open(file.path, "rb")


class Hashed:
    """A file to be read once from start to end, whose bytes are hashed on the way."""

    closed = False

    def __init__(self, file: Any, hasher: Any) -> None:
        self.file, self.hasher = file, hasher

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self.file.read(size)
        self.hasher.update(data)
        return data

    def readable(self) -> bool:
        """As Arrow asks."""
        return True

    def close(self) -> None:
        """The file is closed by who opened it."""
