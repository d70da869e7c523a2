#!/usr/bin/env bash
# Make .venv with the package and its pinned dependencies. Idempotent; needs only Python >= 3.11.
#   scripts/setup.sh            the package
#   scripts/setup.sh dev        and what the tests need
# The interpreter is $PYTHON, or the first of python3, python3.14 … python3.11 that is new enough.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-}"
venv="${VENV:-.venv}"

find_python() {
  for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2
  exit 1
}

python="$(find_python)"
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  rm -rf "$venv"
  "$python" -m venv "$venv" || {
    echo "setup: '$python -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
  }
fi

# A stamp of what was installed makes a second call instant.
stamp="$(cat pyproject.toml constraints.txt | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [ "$(cat "$venv/installed${extra:+-$extra}" 2>/dev/null)" != "$stamp" ]; then
  echo "setup: installing into $venv" >&2
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c constraints.txt -e ".${extra:+[$extra]}"
  echo "$stamp" > "$venv/installed${extra:+-$extra}"
fi
