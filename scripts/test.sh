#!/usr/bin/env bash
# All checks, from nothing: makes .venv, then lint, format, types and the tests.
#
#   bash scripts/test.sh                    everything
#   bash scripts/test.sh tests/scripts      further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/harness/setup_env.sh
set_up scripts,test
bin=$(dirname "$venv_python")
"$bin/ruff" check
"$bin/ruff" format --check
"$bin/mypy"
exec "$venv_python" -m pytest -n 2 "$@"
