#!/usr/bin/env bash
# Set up and run the test suite: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
exec "${VENV:-.venv}/bin/python" -m pytest -n 2 --dist loadscope "$@"
