#!/usr/bin/env bash
# Mutation tests: does a test fail where a line of the package is wrong? See docs/testing.md.
#   scripts/mutate.sh                    a sample of each folder; goes on where it was stopped
#   scripts/mutate.sh train balance      of these folders
#   scripts/mutate.sh --count 50         a larger sample; --all: every mutant
#   scripts/mutate.sh --again            those that survived once more, with the tests of now
#   scripts/mutate.sh --trusted          without a run of the tests on the package as it is before
#   scripts/mutate.sh --write            the table goes into docs/testing.md
# The tool has an environment of its own, and all work is done in $MUTATE, by default build/mutate.
set -euo pipefail
cd "$(dirname "$0")/.."
work="${MUTATE:-build/mutate}"
python="${VENV:-.venv}/bin/python"
if [ ! -x "$python" ]; then
  scripts/setup.sh dev
fi
mkdir -p "$work"
if [ ! -x "$work/environment/bin/cosmic-ray" ]; then
  "$python" -m venv "$work/environment"
  "$work/environment/bin/python" -m pip install --quiet --disable-pip-version-check "cosmic-ray==8.7.0"
fi
exec "$work/environment/bin/python" scripts/mutate.py --work "$work" --python "$(realpath -s "$python")" "$@"
