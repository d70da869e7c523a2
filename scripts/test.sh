#!/usr/bin/env bash
# Set up and run the test suite: scripts/test.sh [pytest arguments]
#   scripts/test.sh --slow [pytest arguments]   the checks that it leaves out, of minutes each
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
if [ "${1:-}" = "--slow" ]; then
  set -- -m slow "${@:2}"
fi
exec "${VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadscope "$@"
