"""Run a command of `mtrec` in several processes that share one mesh of devices.

Start the same command once per process, on one machine or on many:

    python scripts/train.py --coordinator HOST:PORT --processes 2 --process 0 train CONFIG --run RUN
    python scripts/train.py --coordinator HOST:PORT --processes 2 --process 1 train CONFIG --run RUN

Under Slurm, Open MPI or on a TPU pod the first three options are left out: the cluster knows them.
Prepared data and the run folder have to be on storage that all processes see. The commands are
train, evaluate and recommend --all-users; `scripts/launch/` has them for several kinds of cluster.
"""

from __future__ import annotations

import argparse
import sys

from mtrec_jax import cli, processes

COMMANDS = ("train", "evaluate", "recommend")


def main() -> None:
    """Join the processes, then do as `mtrec` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coordinator", default="", help="HOST:PORT of the first process")
    parser.add_argument("--processes", type=int, default=0, help="how many there are")
    parser.add_argument("--process", type=int, default=-1, help="number of this one, from 0")
    parser.add_argument("command", choices=COMMANDS, help="of mtrec")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    given = parser.parse_args()
    sys.argv = ["mtrec", given.command, *given.arguments]
    cli.main(lambda: processes.start(given.coordinator, given.processes, given.process))


if __name__ == "__main__":
    main()
