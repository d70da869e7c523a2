"""The pages: what they show runs as written, and gives what they say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
import tomllib
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main
from typer.testing import CliRunner

import mtrec_jax
from mtrec_jax import config
from mtrec_jax.arguments import naming
from mtrec_jax.balance import BALANCERS
from mtrec_jax.baselines import BASELINES
from mtrec_jax.cli import app, as_option
from mtrec_jax.data.features import KINDS, Feature
from mtrec_jax.diversity import DIVERSIFIERS
from mtrec_jax.experiments import parse_experiment
from mtrec_jax.models.encoders import ENCODERS
from mtrec_jax.models.fusions import FUSIONS
from mtrec_jax.models.interactions import INTERACTIONS
from mtrec_jax.models.numbers import NUMBERS
from mtrec_jax.models.towers import TOWERS

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
PREPARED = [pair for pair in COMMANDS if "mtrec prepare" in pair[0] and "spark" not in pair[0]]


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


@pytest.mark.slow
@pytest.mark.parametrize(("command", "output"), PREPARED)
def test_preparing_gives_the_output_of_the_page(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    with naming(as_option):
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
    assert parse_experiment(merged(tomllib.loads(MAIN), tomllib.loads(text)))


CONFIGURATION = (PAGE.parent / "configuration.md").read_text("utf-8")
SECTIONS = {
    "`[data]`": config.Data,
    "`[data.events]`": config.Files,
    "`[clean]`": config.Clean,
    "`[clean.values.NAME]`": config.Values,
    "`[split]`": config.Split,
    "`[features.NAME]`": config.Feature,
    "`[tables.NAME]`": config.Table,
    "`[guard]`": config.Guard,
    "`[tasks.NAME]`": config.Task,
    "`[model]`": config.Model,
    "`[model.bias]`": config.Bias,
    "`[train]`": config.Train,
    "`[train.contrast]`": config.Contrast,
    "`[select]`": config.Select,
    "`[evaluate]`": config.Evaluate,
    "`[tune]`": config.Tune,
    "`[[published]]`": config.Published,
}


def shown(field: dataclasses.Field[Any]) -> str:
    """The default of a key as its table writes it."""
    value = field.default if field.name != "kind" or field.default else "categorical"
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, config.Files):
        return "no files"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{json.dumps(getattr(plain, 'kind', plain))}`"


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_key_is_listed_with_its_choices_and_default(heading: str) -> None:
    part = re.split(r"\n#{2,3} ", CONFIGURATION)
    (text,) = [p for p in part if p.startswith(heading)]
    first = text[text.index("| key |") :].split("\n\n")[0]
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| `")]
    table = {row[0].strip("| `"): row for row in rows}
    fields = {field.name: field for field in dataclasses.fields(SECTIONS[heading])}
    assert list(table) == [name for name in fields if name in table]  # in the order of the source
    assert set(table) == set(fields)
    hints = typing.get_type_hints(SECTIONS[heading])
    for name, (_, kind, default, *_) in table.items():
        written = 0.001 if name == "learning_rate" else None
        expected = f"`{written}`" if written else shown(fields[name])
        assert default.startswith(expected), name
        if typing.get_origin(hints[name]) is typing.Literal:
            assert kind == ", ".join(f'`"{c}"`' for c in typing.get_args(hints[name])), name


CHOICES = {
    "`[features.NAME]`": KINDS,
    "`[model.encoder]`": ENCODERS,
    "`[model.numbers]`": NUMBERS,
    "`[model.interaction]`": INTERACTIONS,
    "`[model.towers]`": TOWERS,
    "`[model.fusion]`": FUSIONS,
    "`[train.balance]`": BALANCERS,
    "`[evaluate]`": {**BASELINES, **DIVERSIFIERS},
}


@pytest.mark.parametrize(
    ("heading", "kind"), [(h, k) for h, kinds in CHOICES.items() for k in kinds]
)
def test_every_kind_is_listed_with_its_options(heading: str, kind: str) -> None:
    (text,) = [p for p in re.split(r"\n#{2,3} ", CONFIGURATION) if p.startswith(heading)]
    (row,) = re.findall(rf"\n\| (?:`\w+`, )*`{kind}`(?:, `\w+`)* \| (.*?) \| ", text)
    shared = {field.name for field in dataclasses.fields(Feature)} | {"kind"}
    own = [f for f in dataclasses.fields(CHOICES[heading][kind]) if f.name not in shared]
    options = []
    for f in own:
        default = f.default_factory() if callable(f.default_factory) else f.default
        has = default is not dataclasses.MISSING
        options.append(f"`{f.name} = {json.dumps(default)}`" if has else f"`{f.name}` required")
    assert row == (", ".join(options) or "none")


def test_the_toml_of_the_configuration_page_is_toml() -> None:
    for text in re.findall(r"```toml\n(.*?)```", CONFIGURATION, re.S):
        assert tomllib.loads(text)


QUICK: dict[str, Any] = {  # a model as small as can be
    "train": {"epochs": 0, "steps": 2, "batch_size": 8, "negatives": {"count": 8}, "mesh": [1, 1]},
    "model": {
        "width": 4,
        "encoder": {"layers": 1},
        "towers": {"kind": "shared_bottom", "expert_hidden": [4], "tower_hidden": [4]},
    },
    "data": {"history_length": 8},
    "evaluate": {"batch_size": 64},
}


@pytest.mark.slow
def test_the_python_of_the_pages_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled_programs: dict[str, str],
) -> None:
    """One fit of few steps for both pages; the other call must be one that `fit` takes."""
    fit = mtrec_jax.fit
    fitted: list[Any] = []

    def once(*tables: Any, **options: Any) -> Any:
        inspect.signature(fit).bind(*tables, **options)
        if not fitted:
            fitted.append(fit(*tables, **options | {"settings": QUICK}))
        return fitted[0]

    monkeypatch.setattr(mtrec_jax, "fit", once)
    monkeypatch.chdir(tmp_path)
    for page in (PAGE.parent / "usage.md", PAGE.parents[1] / "README.md"):
        scope: dict[str, Any] = {}
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S):
            exec(block, scope)
        assert scope["scores"].shape == (2, 5), "both end with the kernel"
