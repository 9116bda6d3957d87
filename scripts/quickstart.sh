#!/usr/bin/env bash
# The main job from nothing, offline once installed, a few minutes on two CPU cores:
#
#   bash scripts/quickstart.sh                      everything, into runs/quickstart
#   bash scripts/quickstart.sh --seeds 0 1 2        further arguments go to scripts/compare.py
#
# Makes .venv; pretrains a small GPT-2 on the documentation topics of Python's standard library;
# patches that trained model in several ways; fine-tunes every one beside the unpatched control;
# prints the tables and where report and plots are. Needs python3 (3.11 or newer, with venv).
# A second run uses what the first one left; delete runs/quickstart to start anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/harness/setup_env.sh
set_up scripts
exec "$venv_python" scripts/harness/quickstart.py "$@"
