"""docs/data.md: its commands and TOML run as written, and say what the page says that they say."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from typer.testing import CliRunner

from mtrec_jax.cli import app
from mtrec_jax.data import describe
from mtrec_jax.experiments import parse_experiment

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


class Block(NamedTuple):
    """A fenced block."""

    language: str
    text: str


BLOCKS = [Block(*b) for b in re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.S)]
MAIN, *MORE = [block.text for block in BLOCKS if block.language == "toml"]
COMMANDS = [
    (line, after.text if after.language == "text" else "")
    for block, after in zip(BLOCKS, [*BLOCKS[1:], Block("", "")], strict=True)
    if block.language == "bash"
    for line in block.text.splitlines()
    if line.startswith("mtrec")
]
PREPARED = [pair for pair in COMMANDS if "prepare" in pair[0] and "spark" not in pair[0]]


def words(text: str) -> str:
    return " ".join(text.split())


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in more.items():
        old = both.get(key)
        nested = isinstance(value, dict) and isinstance(old, dict)
        both[key] = merged(old, value) if nested and isinstance(old, dict) else value
    return both


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a reader would be after the first two blocks."""
    path = tmp_path_factory.mktemp("page")
    assert BLOCKS[0].language == "python"
    script = BLOCKS[0].text.replace('Path("bookshop")', f"Path({str(path / 'bookshop')!r})")
    exec(script, {})
    (path / "bookshop.toml").write_text(MAIN, encoding="utf-8")
    return path


@pytest.mark.parametrize(("command", "output"), PREPARED)
def test_preparing_gives_the_output_of_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert words(output) in words(f"{result.output}\nmtrec: {result.exception}")
    failed = output.startswith("mtrec:")
    assert bool(result.exit_code) == failed
    if not failed:
        assert {"report.html", "quarantine.parquet", "manifest.json"} <= {
            path.name for path in (folder / "prepared" / "bookshop").iterdir()
        }


def test_every_command_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "runs" / "bookshop").mkdir(parents=True)
    group = typer.main.get_command(app)
    assert {shlex.split(c)[1] for c, _ in COMMANDS} == {"prepare", "train", "evaluate", "recommend"}
    for command, _ in COMMANDS:
        _, name, *rest = shlex.split(command)
        group.commands[name].make_context(name, rest)  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", MORE)
def test_every_further_piece_of_toml_fits_the_first(text: str) -> None:
    experiment = parse_experiment(merged(tomllib.loads(MAIN), tomllib.loads(text)))
    describe.check(experiment)
