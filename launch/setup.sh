#!/usr/bin/env bash
# Sets up .venv at the repository's root with the project (editable) and the given extras, at the tested versions.
# Idempotent: does nothing when they are already there. PYTHON names another interpreter.
#   bash launch/setup.sh [extra …]        e.g. bash launch/setup.sh plots test
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=$(IFS=,; echo "$*")

usable() { "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

if ! usable "$root/.venv/bin/python"; then
  for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    usable "$python" && break
    python=
  done
  if [ -z "$python" ]; then
    echo "No Python 3.11, 3.12 or 3.13 was found; install one, or name it: PYTHON=/path/to/python3.12 bash $0" >&2
    exit 2
  fi
  echo "Setting up $root/.venv with $("$python" --version) (about two minutes; later calls find it ready)" >&2
  "$python" -m venv --clear "$root/.venv"
fi

# What is installed is known by the files that say what to install.
stamp="$root/.venv/.installed-${extras:-base}-$(cat "$root/setup.py" "$root/constraints.txt" | cksum | tr -d ' ')"
if [ ! -e "$stamp" ]; then
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt" \
    --editable "$root${extras:+[$extras]}" >&2
  touch "$stamp"
fi
