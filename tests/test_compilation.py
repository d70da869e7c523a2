"""Programs that are kept: where, how many, what is said, and that they compute the same bits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import mtrec_jax
from mtrec_jax import machine
from mtrec_jax.config import to_toml
from mtrec_jax.train.run import Run

# Compiles one program, and says where JAX keeps it and how often it was found there.
PROGRAM = """
import jax
from mtrec_jax.compilation import use_compilation_cache
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
use_compilation_cache()
use_compilation_cache()
assert jax.jit(lambda x: x * 3 + 1)(2.0) == 7
print(jax.config.jax_compilation_cache_dir, found.count("/jax/compilation_cache/cache_hits"))
"""


def environment(**settings: object) -> dict[str, str]:
    """That of the tests without any cache, and these."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("MTREC_CACHE", "JAX_COMPIL"))}
    return kept | {name: str(value) for name, value in settings.items()}


def compiled(**settings: object) -> tuple[str, int, str]:
    """(folder, programs found there, what was said) of a new process."""
    command, env = [sys.executable, "-c", PROGRAM], environment(**settings)
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    folder, hits = ran.stdout.rsplit(maxsplit=1)
    return folder, int(hits), ran.stderr


def test_a_second_process_finds_the_programs_of_the_first(tmp_path: Path) -> None:
    folder, hits, said = compiled(XDG_CACHE_HOME=tmp_path)
    home = tmp_path / "mtrec_jax" / "xla"
    assert Path(folder).parent == home
    assert Path(folder).stat().st_mode & 0o77 == 0, "others may not put programs there"
    assert hits == 0
    assert said.splitlines() == [
        f"mtrec: compiled programs are kept in {home}, at most 2 GB, so that the next start is "
        "faster; MTREC_CACHE=off keeps none"
    ]
    again, hits, said = compiled(XDG_CACHE_HOME=tmp_path)
    assert (again, said) == (folder, "")
    assert hits > 0


@pytest.mark.slow
def test_programs_are_another_where_threads_or_processor_are(tmp_path: Path) -> None:
    first, *_ = compiled(MTREC_CACHE=tmp_path)
    assert Path(first).name.endswith(f"-{machine.threads()}")
    one = machine.threads() > 1 and hasattr(os, "sched_setaffinity")
    if one:
        code = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\n{PROGRAM}"
        command, env = [sys.executable, "-c", code], environment(MTREC_CACHE=tmp_path)
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert ran.stdout.split() == [f"{first.rsplit('-', 1)[0]}-1", "0"]


@pytest.mark.parametrize("setting", ["off", "OFF"])
def test_it_can_be_switched_off(tmp_path: Path, setting: str) -> None:
    assert compiled(MTREC_CACHE=setting, HOME=tmp_path) == ("None", 0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_setting_of_jax_stands(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert compiled(JAX_COMPILATION_CACHE_DIR=own, HOME=tmp_path) == (str(own), 0, "")
    assert not (tmp_path / ".cache").exists()
    folder, *_ = compiled(JAX_ENABLE_COMPILATION_CACHE=False, HOME=tmp_path)
    assert folder == "None"


@pytest.mark.slow
def test_where_nothing_can_be_written_it_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    folder, _, said = compiled(MTREC_CACHE=tmp_path / "file" / "cache")
    assert folder == "None"
    assert len(said.splitlines()) == 1
    assert "compiled programs are not kept" in said


@pytest.mark.slow
def test_a_program_that_is_half_written_is_made_anew(tmp_path: Path) -> None:
    folder, *_ = compiled(MTREC_CACHE=tmp_path)
    entries = sorted(Path(folder).glob("*-cache"))
    whole = {path: path.read_bytes() for path in entries}
    for path, content in whole.items():
        path.write_bytes(content[:-9])
    _, hits, said = compiled(MTREC_CACHE=tmp_path)
    assert (hits, said) == (0, "")
    assert sorted(Path(folder).glob("*-cache")) == entries
    assert compiled(MTREC_CACHE=tmp_path)[1] == len(entries)


@pytest.mark.slow
def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    other = tmp_path / "another-machine"
    other.mkdir()
    for number in range(3):
        (other / f"{number}-cache").write_bytes(b"x" * 1000)
        os.utime(other / f"{number}-cache", (1000 + number, 1000 + number))
    compiled(MTREC_CACHE=tmp_path, MTREC_CACHE_SIZE="2kB")
    assert sorted(path.name for path in other.iterdir()) == ["1-cache", "2-cache"]


@pytest.mark.slow
def test_a_limit_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        compiled(MTREC_CACHE=tmp_path, MTREC_CACHE_SIZE="much")
    assert "MTREC_CACHE_SIZE much: write a number above 0 with its unit" in raised.value.stderr


@pytest.mark.slow
def test_a_run_has_the_same_bits_with_kept_programs(shop_run: Run, tmp_path: Path) -> None:
    """The first run compiles, the second one finds every program that the first one had."""
    config = tmp_path / "shop.toml"
    config.write_text(to_toml(shop_run.experiment), encoding="utf-8")
    records, before = [], set[str]()
    for name in ("cold", "warm"):
        places = ["--prepared", str(shop_run.prepared.folder), "--run", str(tmp_path / name)]
        code = "from mtrec_jax.cli import main; main()"
        subprocess.run(
            [sys.executable, "-c", code, "train", str(config), *places],
            env=environment(MTREC_CACHE=tmp_path / "cache"),
            capture_output=True,
            check=True,
        )
        lines = (tmp_path / name / "metrics.jsonl").read_bytes().splitlines()
        records.append([line for line in lines if b"timing" not in line])
        programs = {path.name for path in (tmp_path / "cache").rglob("*-cache")}
        assert name == "cold" or programs == before
        before = programs
    assert len(before) > 10
    assert records[0] == records[1]
    assert len(records[0]) > 10


# --- Limits of the machine


def test_limits_of_control_groups_of_both_versions(tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    new, old = tmp_path / "new", tmp_path / "old"
    (new / "job" / "step").mkdir(parents=True)
    (new / "job" / "memory.max").write_text("4000\n")
    (new / "job" / "step" / "memory.max").write_text("max\n")
    (new / "cpu.max").write_text("150000 100000\n")
    groups.write_text("0::/job/step\n")
    assert machine.memory_limit(groups, new) == 4000
    assert machine.cpu_quota(groups, new) == 1.5
    for controller, name, value in (
        ("memory", "memory.limit_in_bytes", 5000),
        ("cpu", "cpu.cfs_quota_us", 50_000),
        ("cpu", "cpu.cfs_period_us", 100_000),
    ):
        (old / controller).mkdir(parents=True, exist_ok=True)
        (old / controller / name).write_text(f"{value}\n")
    groups.write_text("4:memory:/a/place/outside\n1:cpu,cpuacct:/\n")
    assert machine.memory_limit(groups, old) == 5000
    assert machine.cpu_quota(groups, old) == 0.5
    (old / "memory" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    (old / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.memory_limit(groups, old) is None
    assert machine.cpu_quota(groups, old) is None
    assert machine.memory_limit(tmp_path / "none", old) is None


def test_slow_compilations_are_no_bugs_to_be_filed(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA logs such a request as an error; who has chosen a level of the log keeps it."""
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    assert mtrec_jax.fit
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "3"
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    assert mtrec_jax.fit
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


# A program with work space of 70 MiB; the page faults of the median call, after a few.
FAULTS = """
import resource
import sys
import jax
import jax.numpy as jnp
from mtrec_jax.machine import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
a, b, c = jnp.ones((2048, 8)), jnp.ones((8, 9000)), jnp.ones((9000, 8))
program = jax.jit(lambda a, b, c: jnp.tanh(a @ b) @ c).lower(a, b, c).compile()
for _ in range(5):
    jax.block_until_ready(program(a, b, c))
found = []
for _ in range(15):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(a, b, c))
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(found)[7])
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_a_command_keeps_the_work_space_of_its_programs() -> None:
    """18,000 pages of 4 KiB are cleared in each call without it; with it now and then, as the heap
    moves."""
    command = [sys.executable, "-c", FAULTS, "keep"]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 5_000
