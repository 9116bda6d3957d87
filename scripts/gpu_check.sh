#!/usr/bin/env bash
# One command on a machine with an NVIDIA GPU, under 8 minutes, offline; needs torch, triton and
# transformers alone:
#
#   bash scripts/gpu_check.sh [OUT_DIR]         default runs/gpu_check; more flags: gpu_check.py --help
#
# Are the kernels right on this GPU, and do they reach what they must? Prints tables, writes
# OUT_DIR/gpu_check.json, and fails if a result is wrong. PYTHON names the interpreter to use
# (default: .venv's, where there is one, else python3); nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec "$python" scripts/gpu_check.py "$@"
