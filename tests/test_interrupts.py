"""Ctrl-C, SIGTERM and SIGHUP at the worst moments: one line, the right status, nothing partial."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtrec_jax.train.run import Run

# a command whose interrupt a library turns into another error, or drops inside a callback
COMMAND = """
import os, signal, time
signal.signal({number}, signal.SIG_DFL)  # whatever started the tests may ignore it, like nohup
from pathlib import Path
from mtrec_jax import cli
from mtrec_jax.result import save_tables

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), {number})
        time.sleep(0.2)

def tables(made):
    import pyarrow
    yield pyarrow.table({{"a": [1]}})
    if made == "dropped":
        Swallows()
    else:
        try:
            os.kill(os.getpid(), {number})
            time.sleep(20)
        except KeyboardInterrupt:
            raise RuntimeError("Query interrupted") from None
    time.sleep(20)
    yield pyarrow.table({{"a": [2]}})

@cli.app.command()
def write(made: str) -> None:
    save_tables(tables(made), Path("out.csv"))

cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("made", ["another error", "dropped"])
def test_an_interrupt_counts_whatever_becomes_of_it(
    tmp_path: Path, made: str, number: signal.Signals
) -> None:
    code = COMMAND.format(number=int(number))
    command = [sys.executable, "-c", code, "write", made]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (128 + number, "")
    assert ran.stderr.strip() == "mtrec: interrupted"
    assert not list(tmp_path.iterdir())


# a training that is asked to stop says so and exits as the command line does
TRAINING = """
import sys, time
from pathlib import Path
from mtrec_jax import cli
from mtrec_jax.interrupts import collecting
from mtrec_jax.train.stopping import stopped_at

@cli.app.command()
def work() -> None:
    with collecting() as stopped:
        print("ready", flush=True)
        for number in range(200):
            time.sleep(0.05)
            print("step", number, file=sys.stderr, flush=True)
            if stopped:
                open("saved", "w").close()
                raise stopped_at(number, 200, Path("here"), stopped[0])

cli.main()
"""


def test_a_run_whose_terminal_is_lost_saves(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and then every write to the terminal fails."""
    ours, theirs = pty.openpty()
    own_terminal = (
        "import fcntl, signal, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # nohup may have started the tests
    )

    process = subprocess.Popen(
        [sys.executable, "-c", own_terminal + TRAINING, "work"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    while b"ready" not in os.read(ours, 1000):
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_a_run_that_ignores_lost_terminals_goes_on(tmp_path: Path) -> None:
    """`nohup` starts a process so."""
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", TRAINING, "work"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    assert not (tmp_path / "saved").exists()
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "everything is saved in here" in said


def test_a_lost_terminal_is_no_error_where_outputs_are_closed() -> None:
    code = (
        "import os, signal, sys; from mtrec_jax.interrupts import leave_terminal\n"
        "os.close(1); os.close(2); leave_terminal(signal.SIGHUP); os._exit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 7


@pytest.mark.slow
@pytest.mark.parametrize("command", ["prepare", pytest.param("recommend", marks=pytest.mark.slow)])
def test_an_interrupted_command_leaves_nothing_partial(
    shop_data: Path, shop_run: Run, tmp_path: Path, command: str
) -> None:
    """The signal comes as soon as there is something partial."""
    arguments = {
        "prepare": ["--data", str(shop_data.parent), "--out", "out"],
        "recommend": ["--all-users", "--out", "out.csv"],
    }
    target = {"prepare": "shop", "recommend": str(shop_run.folder)}[command]
    code = "from mtrec_jax.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, command, target, *arguments[command]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, ""), err
    assert err.strip().endswith("mtrec: interrupted")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())
