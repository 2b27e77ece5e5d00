#!/usr/bin/env bash
# Installs the test extra and runs the test suite; arguments go to pytest.
#   bash launch/test.sh                    the whole suite
#   bash launch/test.sh -m "not slow"      the quick part
#   bash launch/test.sh -m nightly         the wide grids
#   bash launch/test.sh -n 0 --pdb …       in one process; two share the work otherwise
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" test
cd "$root"
exec .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
