#!/usr/bin/env bash
# Trains a small Gated State Space model on text that every Python installation carries, interrupts and resumes it,
# evaluates it at 1, 2 and 4 times the training length, and lets it write. Three to six minutes on two CPU cores, and the set-up.
#   bash launch/quickstart.sh [--steps=N] [--model_dir=FOLDER]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh" plots
cd "$root"
exec .venv/bin/python -m launch.quickstart "$@"
