"""The boundaries of the package, read from its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mtrec_jax

PACKAGE = Path(mtrec_jax.__file__).parent
SOURCES = {p.relative_to(PACKAGE).as_posix(): p for p in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}

# Imports point to the same layer or to one further up. A room may be on several, by the file.
LAYERS = (
    ("errors", "types", "interrupts", "arguments", "processes", "choices", "machine", "result"),
    ("kernels", "sharding", "compilation", "mixing"),
    (
        *("data.features", "balance", "models.layers", "models.encoders", "models.towers"),
        *("models.fusions", "models.interactions", "models.numbers"),
        *("models.text", "models.views"),
        *("baselines", "evaluation.metrics", "losses.tasks", "losses.lists"),
        *("losses.retrieval", "losses.negatives", "diversity"),
    ),
    ("config", "experiments"),
    ("data", "tables"),
    ("losses",),
    ("models",),
    ("evaluation", "testing"),
    ("train",),
    ("serving", "studies"),
    ("from_tables", "planner"),
    ("cli",),
)
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}


def layer(name: str) -> int:
    """The layer of a module, by the longest name in LAYERS that it begins with."""
    parts = name.replace("/", ".").removesuffix(".py").removesuffix(".__init__").split(".")
    known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((LAYER[part] for part in known if part in LAYER), -1)


OWNERS = {  # a third-party library, and the only files that may know it
    "flax": ("models/",),
    "grain": ("data/pipeline.py", "train/checkpoint.py"),
    "orbax": ("train/checkpoint.py",),
    "ibis": tuple(
        f"data/{n}.py"
        for n in (
            *("prepare", "schema", "expressions", "clean", "rules", "split"),
            *("past", "guards", "engine", "social"),
        )
    ),
    "duckdb": (),
    "fsspec": ("data/locate.py",),
    "pandas": (),
    "matplotlib": ("evaluation/picture.py", "studies/picture.py"),
    "optuna": ("studies/tune.py",),
    "safetensors": ("models/text/bert.py",),
    "tokenizers": ("models/text/bert.py",),
    "typer": ("cli/",),
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of everything imported anywhere in a file; `from a import b` is a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> Iterator[str]:
    """The package's own modules that a file imports, without the leading package name."""
    for name in imports(tree):
        if name.startswith("mtrec_jax."):
            yield name.removeprefix("mtrec_jax.")


def part_of(name: str) -> str:
    """The room or the module of the package's root to which a file or import belongs."""
    return name.replace("/", ".").removesuffix(".py").split(".")[0]


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_imports_point_one_way() -> None:
    upwards = [
        f"{name} imports {found}"
        for name, tree in TREES.items()
        if name != "__init__.py"
        for found in own_imports(tree)
        if layer(found) > layer(name)
    ]
    assert not upwards


def test_every_part_has_its_layer() -> None:
    """A new module is placed before it can be imported from anywhere."""
    parts = {part_of(n) for n in SOURCES if n != "__init__.py"}
    assert parts == {part.split(".")[0] for part in LAYER}


def test_a_library_is_known_only_where_it_belongs() -> None:
    known = {name: {i.split(".")[0] for i in imports(tree)} for name, tree in TREES.items()}
    users = {library: [n for n in TREES if library in known[n]] for library in OWNERS}
    assert not [(o, n) for o in OWNERS for n in users[o] if not n.startswith(OWNERS[o])]
    without = [o for o in OWNERS if bool(users[o]) != bool(OWNERS[o])]
    assert not without, "OWNERS names a file that does without it"


def test_baselines_know_only_arrays() -> None:
    allowed = ("baselines", "errors", "kernels", "types")
    for name, tree in TREES.items():
        if name.startswith("baselines/"):
            for found in own_imports(tree):
                inside = any(found == a or found.startswith(f"{a}.") for a in allowed)
                assert inside, f"{name} imports {found}"


def test_nobody_imports_the_command_line() -> None:
    others = {name: tree for name, tree in TREES.items() if not name.startswith("cli/")}
    assert not [n for n, tree in others.items() if "cli" in {part_of(i) for i in own_imports(tree)}]


def test_functions_stay_readable() -> None:
    """At most 60 lines, the signature and the docstring aside."""
    long = []
    for name, tree in TREES.items():
        for function in functions(tree):
            body = function.body[1 if ast.get_docstring(function) else 0 :]
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            if lines > 60:
                long.append(f"{name}: {function.name} has {lines} lines")
    assert not long


def test_what_is_public_is_documented() -> None:
    """Modules, and public classes, functions and methods; nested functions are their owner's."""

    def bare(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for child in node.body:
            if not isinstance(child, ast.ClassDef | ast.FunctionDef) or child.name.startswith("_"):
                continue
            if not ast.get_docstring(child):
                yield prefix + child.name
            if isinstance(child, ast.ClassDef):
                yield from bare(child, f"{prefix}{child.name}.")

    silent = [name for name, tree in TREES.items() if not ast.get_docstring(tree)]
    assert not silent, "modules that do not say what they are"
    assert not [f"{name}: {thing}" for name, tree in TREES.items() for thing in bare(tree, "")]


def test_nothing_is_executed_that_was_read() -> None:
    """No pickle in any guise, and no text becomes code."""
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "compile", "__import__"}
    for name, tree in TREES.items():
        assert not unsafe & {i.split(".")[0] for i in imports(tree)}, name
        called = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & calls, name
        keywords = {
            (keyword.arg, keyword.value.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            for keyword in node.keywords
            if isinstance(keyword.value, ast.Constant)
        }
        assert ("allow_pickle", True) not in keywords, name


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_package_itself_loads_nothing() -> None:
    heavy = {"jax", "flax", "grain", "orbax", "ibis", "pyarrow", "numpy", "pydantic", "typer"}
    assert not loaded_by("import mtrec_jax, mtrec_jax.errors") & heavy


def test_the_kernels_are_light() -> None:
    loaded = loaded_by("import mtrec_jax.kernels\nfrom mtrec_jax import cosine_topk")
    assert "jax" in loaded
    assert not loaded & {"flax", "grain", "orbax", "ibis", "pyarrow", "optax", "pydantic", "typer"}


def test_public_names_are_what_they_say() -> None:
    """Each name twice: the first use imports a module, which must not take the name's place."""
    assert set(mtrec_jax.__all__) <= set(dir(mtrec_jax))
    for _ in range(2):
        for name in mtrec_jax.__all__:
            assert callable(getattr(mtrec_jax, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'recommendr'"):
        _ = mtrec_jax.recommendr
