"""Mutants of the rooms where a model learns and answers, each beside the tests of its room.

Called by scripts/mutate.sh in the environment of cosmic-ray, which makes the mutants, runs the
tests, and stores what became of each.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkResult

SECONDS = 1200  # that the tests of a mutant may take; of one that takes longer nothing is known
TESTS = {  # folder of the package: tests that have to notice its mutants, the quick ones first
    "balance": "tests/balance/test_balance.py tests/train/test_wiring.py",
    "losses": "tests/models/test_answers.py tests/losses",
    "models": "tests/models tests/train/test_step.py tests/serving/test_requests.py",
    "evaluation": "tests/evaluation mtrec_jax/evaluation",
    "serving": "tests/serving",
    "train": "tests/train/test_wiring.py tests/train/test_records.py tests/train/test_step.py "
    "tests/train/test_loop.py tests/train/test_checkpoint.py tests/train/test_not_finite.py "
    "tests/train/test_gradients.py tests/train/test_warm_start.py mtrec_jax/train",
}
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"}
BITS = {"BitOr", "BitAnd", "BitXor", "RShift", "LShift"}
IDENTITY = {"Is", "IsNot"}


def tree_of(work: Path) -> Path:
    """A fresh copy of what git knows and does not ignore: mutants are written there."""
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    for name in filter(os.path.isfile, listed.stdout.splitlines()):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(name, tree / name)
    return tree


def annotations(module: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where types stand, and the flags of dataclasses."""
    types = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        types += [getattr(node, name, None) for name in ("annotation", "returns")]
        types += node.decorator_list if isinstance(node, ast.ClassDef) else []
    types = [found for found in types if found is not None]
    return [((t.lineno, t.col_offset), (t.end_lineno, t.end_col_offset)) for t in types]


def says_something(mutation: MutationSpec, types: list) -> bool:
    """Not of types; no operator that its operands do not have, and that any test notices."""
    if any(start <= tuple(mutation.start_pos) < end for start, end in types):
        return False
    name = mutation.operator_name.removeprefix("core/")
    if name == "RemoveDecorator":  # of jax.jit and caches: the same, and slow
        return False
    old, new = [*name.split("_"), "", ""][1:3]
    if name.startswith("ReplaceBinaryOperator"):
        return {old, new} <= ARITHMETIC or {old, new} <= BITS
    if name.startswith("ReplaceComparisonOperator"):
        return (old in IDENTITY) == (new in IDENTITY)
    return True


def session_of(folder: str, work: Path, tree: Path, count: int, seed: int) -> Path | None:
    """The mutants of a folder as it is now, of which all but a sample are left out; of the working
    tree, where no mutant may be made, those that are known."""
    sources = sorted((tree / "mtrec_jax" / folder).rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:8]
    session = work / f"{folder}-{digest}-{count or 'all'}-{seed}.sqlite"
    if session.exists() or tree == Path.cwd():
        return session if session.exists() else None
    config, new = work / f"{folder}.toml", work / f"{folder}.partial"
    new.unlink(missing_ok=True)
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "mtrec_jax/{folder}"\ntimeout = {SECONDS}\n'
        'excluded-modules = []\ntest-command = ""\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    tool = str(Path(sys.executable).with_name("cosmic-ray"))
    subprocess.run([tool, "init", config, new], cwd=tree, check=True)
    database, places = WorkDB(new, WorkDB.Mode.open), {}
    types = {path.relative_to(tree): annotations(path) for path in sources}
    for item in database.work_items:
        (mutation,) = item.mutations
        if says_something(mutation, types[mutation.module_path]):
            place = str(mutation.module_path), tuple(mutation.start_pos), tuple(mutation.end_pos)
            places.setdefault(place, []).append((mutation.operator_name, item.job_id))
    chance = random.Random(seed)
    kept = [chance.choice(sorted(mutants))[1] for _, mutants in sorted(places.items())]
    if count:  # a mutant at a place, as those of a place are alike
        kept = chance.sample(kept, min(count, len(kept)))
    else:
        kept = [job for mutants in places.values() for _, job in mutants]
    others = [item.job_id for item in database.work_items if item.job_id not in set(kept)]
    database.set_multiple_results(others, WorkResult(WorkerOutcome.SKIPPED))
    database.close()
    return new.rename(session)


def run(folder: str, session: Path, tree: Path, python: str, again: bool, trusted: bool) -> None:
    """Test what is left to be tested."""
    database = WorkDB(session, WorkDB.Mode.open)
    pytest = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    if again:
        done = database.completed_work_items
        left = [i for i, r in done if r.test_outcome == SURVIVED or r.output == "timeout"]
    else:
        left = list(database.pending_work_items)
    left.sort(key=lambda item: (str(item.mutations[0].module_path), item.mutations[0].start_pos))
    command = pytest + TESTS[folder].split()
    if (
        left
        and not trusted
        and subprocess.run(command, cwd=tree, stdout=subprocess.DEVNULL).returncode
    ):
        sys.exit(f"{folder}: its tests fail without any mutant: {shlex.join(command)}")
    with contextlib.chdir(tree):  # mutants are named from there
        for number, item in enumerate(left, start=1):
            start = time.monotonic()
            mutation = item.mutations[0]
            own = f"test_{mutation.module_path.stem}.py"  # first the tests of the file itself
            command = pytest + sorted(TESTS[folder].split(), key=lambda name: own not in name)
            result = mutate_and_test(item.mutations, shlex.join(command), SECONDS)
            database.set_result(item.job_id, result)
            outcome = (
                result.test_outcome.value if result.test_outcome else result.worker_outcome.value
            )
            print(
                f"{folder} {number}/{len(left)} {outcome} {mutation.module_path}:"
                f"{mutation.start_pos[0]} {mutation.operator_name}, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    database.close()


SURVIVED = TestOutcome.SURVIVED


def report(sessions: dict[str, Path]) -> str:
    """The table, and what survived."""
    lines = ["| folder | mutants | killed | survived | share |", "|---|---:|---:|---:|---:|"]
    survivors, all_of, all_left = [], 0, 0
    for folder, session in sessions.items():
        database = WorkDB(session, WorkDB.Mode.open)
        done = [
            (item, result)
            for item, result in database.completed_work_items
            if result.test_outcome is not None and result.output != "timeout"
        ]
        left = [(i.mutations[0], r) for i, r in done if r.test_outcome == SURVIVED]
        database.close()
        all_of, all_left = all_of + len(done), all_left + len(left)
        share = f"{len(left) / max(len(done), 1):.0%}"
        row = folder, len(done), len(done) - len(left), len(left), share
        lines.append("| " + " | ".join(map(str, row)) + " |")
        for mutation, result in sorted(left, key=lambda p: (str(p[0].module_path), p[0].start_pos)):
            changed = [x[1:].strip() for x in result.diff.splitlines() if re.match("[-+][^-+]", x)]
            was, now = changed[0], changed[-1]
            survivors.append(f"- `{mutation.module_path}`: `{was}` → `{now}`")
    row = "all", all_of, all_of - all_left, all_left, f"{all_left / max(all_of, 1):.0%}"
    lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join([*lines, "", "Survivors:" if survivors else "", "", *survivors]).rstrip()


def main() -> None:
    """Sample, test, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="*", default=[], help=f"of {', '.join(TESTS)}")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--count", type=int, default=25, help="mutants of a folder")
    parser.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--again", action="store_true", help="survivors and what took too long")
    parser.add_argument("--trusted", action="store_true", help="tests pass without any mutant")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    parser.add_argument("--write", action="store_true", help="into docs/testing.md")
    given = parser.parse_args()
    root, work = Path.cwd(), given.work.resolve()
    tree = root if given.report else tree_of(work)
    count = 0 if given.all else given.count
    os.environ |= {"PYTHONPATH": str(tree), "MTREC_TESTS_KEEP": str(work / "kept")}
    sessions = {}
    for folder in given.folders or TESTS:
        session = session_of(folder, work, tree, count, given.seed)
        if session is None:
            continue
        sessions[folder] = session
        if not given.report:
            run(folder, session, tree, given.python, given.again, given.trusted)
    found = report(sessions)
    print(found)
    if given.write:
        page = root / "docs" / "testing.md"
        text = page.read_text(encoding="utf-8")
        pattern = re.compile("(<!-- mutants -->\n).*(<!-- end -->)", re.DOTALL)
        page.write_text(pattern.sub(lambda m: m[1] + found + "\n" + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
